//! Invalidations that must not block: all of it at once, or nothing.

use std::sync::{Arc, Mutex};

use nestling::events::{Event, Side};
use nestling::{Access, Cause, Config, Fault, Gfn, GfnRange, Level, Mmu, Outcome, Vcpu, VcpuId, WouldBlock};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables};
use nestling_checks::scene::{Amd, add, assert_none, two_by_two};

const START: Gfn = Gfn(3 << 18);
/// More than one hold of the lock may remove.
const PAGES: u64 = 200 * 512;

fn mapped() -> (Arc<Mmu<Amd>>, Vcpu<Amd>) {
    let mmu = Machine::build(Build::default(), Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, PAGES);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    for page in [0, 1, 511, 512, 700, PAGES - 1] {
        assert!(matches!(touch(&mut vcpu, page), Outcome::Fixed { .. }));
    }
    (mmu, vcpu)
}

fn touch(vcpu: &mut Vcpu<Amd>, page: u64) -> Outcome {
    let fault = Fault { gpa: Gfn(START.0 + page).gpa(), access: Access::Write, cause: Cause::Translation };
    vcpu.fault(fault).expect("there is memory")
}

fn pages(from: u64, to: u64) -> GfnRange {
    GfnRange { start: Gfn(START.0 + from), end: Gfn(START.0 + to) }
}

/// Nothing is begun and nothing is gone.
fn assert_untouched(mmu: &Arc<Mmu<Amd>>, vcpu: &mut Vcpu<Amd>) {
    assert_eq!(check_tables(mmu)[0].leaves.len(), 6);
    assert_eq!(touch(vcpu, 0), Outcome::Spurious);
}

#[test]
fn what_fits_is_done_in_one_hold() {
    for (range, gone) in [(pages(0, 1), 1), (pages(1, 900), 4), (pages(0, 1024), 5), (pages(5, 5), 0), (pages(9, 5), 0)]
    {
        let (mmu, mut vcpu) = mapped();
        let mut worker = mmu.worker().expect("a worker is free");
        let (holds, before): (Arc<Mutex<Vec<_>>>, _) = (Arc::default(), mmu.counters());
        let seen = Arc::clone(&holds);
        mmu.host().on_trace(Box::new(move |event| {
            if let Event::LockTaken { side } = event {
                seen.lock().expect("the hook does not panic").push(side);
            }
        }));
        let held = worker.try_invalidate(range).expect("nobody is in the way");
        assert_eq!((held.zapped().leaves, mmu.counters().yields), (gone, before.yields));
        assert_eq!(*holds.lock().expect("the hook does not panic"), [Side::Exclusive]);
        if gone > 0 {
            assert_eq!(touch(&mut vcpu, range.start.0 - START.0), Outcome::Retry);
        }
        drop(held);
        if gone > 0 {
            assert!(matches!(touch(&mut vcpu, range.start.0 - START.0), Outcome::Fixed { .. }));
        }
        drop(worker);
        check_tables(&mmu);
        assert_none(&mmu.host().violations());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (mmu, mut vcpu) = mapped();
    let mut worker = mmu.worker().expect("a worker is free");
    for range in [pages(0, PAGES), GfnRange { start: Gfn(0), end: Level::L5.root_limit() }] {
        assert_eq!(worker.try_invalidate(range).err(), Some(WouldBlock));
        assert_untouched(&mmu, &mut vcpu);
    }
}

/// In the middle of another's zap, and of another's exclusive hold.
#[test]
fn whoever_is_in_the_way_is_not_waited_for() {
    let (mmu, mut vcpu) = mapped();
    let mut zapper = mmu.worker().expect("a worker is free");
    let refused: Arc<Mutex<Vec<bool>>> = Arc::default();
    let refuse = || {
        let (refused, mmu) = (Arc::clone(&refused), Arc::downgrade(&mmu));
        move || {
            let mmu = mmu.upgrade().expect("the test holds it");
            let mut worker = mmu.worker().expect("a worker is free");
            let refusal = worker.try_invalidate(pages(0, 1)).is_err();
            refused.lock().expect("nobody panics").push(refusal);
        }
    };
    let walk = zapper.walk(mmu.role(), Gfn(START.0 + PAGES - 1)).expect("there is a root");
    mmu.host().on_next_look_at(walk.last().expect("it has steps").address.hfn(), Box::new(refuse()));
    zapper.zap(GfnRange { start: Gfn(START.0 + PAGES - 2), end: Gfn(START.0 + PAGES - 1) });
    assert_eq!(*refused.lock().expect("nobody panics"), [true]);
    assert_untouched(&mmu, &mut vcpu);

    let mut once = Some(refuse());
    mmu.host().on_trace(Box::new(move |event| {
        if let (Event::LockTaken { side: Side::Exclusive }, Some(refuse)) = (event, once.take()) {
            refuse();
        }
    }));
    drop(zapper.invalidate(GfnRange { start: Gfn(0), end: Gfn(1) }));
    assert_eq!(*refused.lock().expect("nobody panics"), [true, true]);
    assert_untouched(&mmu, &mut vcpu);
    // The way is free again.
    assert!(zapper.try_invalidate(pages(0, 1)).is_ok());
}

/// A guest's TLB has forgotten the page when the call returns, as after any invalidation.
#[test]
fn what_was_taken_is_reached_by_no_vcpu() {
    let mmu = Machine::<nestling::format::Npt>::build(Build::default(), two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut worker = mmu.worker().expect("a worker is free");
    for moved in [true, false, true] {
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        let range = pages(0, 1);
        let held = worker.try_invalidate(range).expect("nobody is in the way");
        let taken = mmu.host().ghost().taken(range);
        mmu.host().ghost().given(range, &taken, moved);
        drop(held);
        assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    }
    check_tables(&mmu);
    assert_none(&mmu.host().violations());
}
