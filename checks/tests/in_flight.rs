//! Memory does not turn up at a new place while an invalidation is in flight: the invalidation names frames where the
//! embedder found the memory, and would not hold back a fault on another place of it (invariant I20).

use std::time::{Duration, Instant};

use nestling::slots::SlotState;
use nestling::{Access, AddressSpace, Cause, Fault, Gfn, GfnRange, Outcome, SlotConfig, SlotId, VcpuId};
use nestling_checks::scene::{add, small, two_by_two};

const START: Gfn = Gfn(0x400);
const NEW: Gfn = Gfn(0x10_000);
/// How long an update that should wait has to show itself by mistake; a right one never fails by it.
const PATIENCE: Duration = Duration::from_millis(15);

fn write(gfn: Gfn) -> Fault {
    Fault { gpa: gfn.gpa(), access: Access::Write, cause: Cause::Translation }
}

#[test]
fn slots_do_not_move_under_an_invalidation() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 16);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("the number is free");
    drop(vcpu.enter().expect("there is a root"));
    let mut worker = mmu.worker().expect("a worker is free");
    let held = worker.invalidate(GfnRange { start: START, end: Gfn(START.0 + 1) });
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| mmu.worker().expect("a worker is free").move_slot(SlotId(0), NEW.gpa()));
        let mut watcher = mmu.worker().expect("a worker is free");
        while watcher.slot_at(AddressSpace::Main, START).is_some_and(|slot| slot.state() == SlotState::Ready) {
            std::thread::yield_now();
        }
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            assert_eq!(vcpu.fault(write(NEW)), Ok(Outcome::Mmio), "the memory turned up while it was being taken");
        }
        drop(held);
        mover.join().expect("it does not panic").expect("the place is free");
    });
    assert!(matches!(vcpu.fault(write(NEW)), Ok(Outcome::Fixed { .. })));
}

#[test]
fn slots_are_not_added_under_an_invalidation() {
    let mmu = small(two_by_two());
    let first = add(&mmu, 0, START, 16);
    let mut worker = mmu.worker().expect("a worker is free");
    let held = worker.invalidate(GfnRange { start: START, end: Gfn(START.0 + 1) });
    std::thread::scope(|scope| {
        // The same memory a second time.
        let alias = SlotConfig { id: SlotId(1), base: NEW.gpa(), ..first };
        let adder = scope.spawn(move || mmu.worker().expect("a worker is free").add_slot(alias));
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            assert!(!adder.is_finished(), "the memory turned up while it was being taken");
            std::thread::yield_now();
        }
        drop(held);
        adder.join().expect("it does not panic").expect("the place is free");
    });
}
