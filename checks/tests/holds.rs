//! How an embedder sees the lock: each hold begins and ends, and exclusive ones are few.

use std::sync::{Arc, Mutex};

use nestling::events::{Event, Side};
use nestling::{Gfn, GfnRange, SlotId, VcpuId};
use nestling_checks::scene::{add, small, two_by_two};

#[test]
fn every_hold_of_a_worker_is_told_with_its_end() {
    let mmu = small(two_by_two());
    add(&mmu, 0, Gfn(0), 64);
    let mut worker = mmu.worker().expect("a worker is free");
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let held: Arc<Mutex<(Option<Side>, Vec<Side>)>> = Arc::default();
    let seen = Arc::clone(&held);
    mmu.host().on_trace(Box::new(move |event| {
        let (now, all) = &mut *seen.lock().expect("the hook does not panic");
        match event {
            Event::LockTaken { side } => assert_eq!(now.replace(side), None, "taken inside another hold"),
            Event::LockReleased { side } => {
                assert_eq!(now.take(), Some(side), "released what was not taken");
                all.push(side);
            }
            _ => {}
        }
    }));
    let mut holds = |operation: &mut dyn FnMut(&mut nestling::Worker<_>)| {
        operation(&mut worker);
        let (now, all) = &mut *held.lock().expect("the hook does not panic");
        assert_eq!(*now, None, "still held");
        std::mem::take(all)
    };
    let range = GfnRange { start: Gfn(0), end: Gfn(64) };
    assert_eq!(holds(&mut |worker| _ = worker.zap(range)), [Side::Shared]);
    let pair = holds(&mut |worker| drop(worker.invalidate(range)));
    assert_eq!(pair, [Side::Exclusive, Side::Shared, Side::Exclusive]);
    assert_eq!(holds(&mut |worker| _ = worker.zap_all())[0], Side::Exclusive);
    let delete = holds(&mut |worker| worker.delete_slot(SlotId(0)).expect("it is there"));
    assert!(delete.contains(&Side::Exclusive), "{delete:?}");
}
