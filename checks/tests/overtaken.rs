//! Faults that are overtaken between their look at the slots and their entry into the lock: each interleaving is made
//! by hand, in one thread, by letting the backing's answer wait for what overtakes it.

use std::sync::Arc;

use nestling::host::BackingError;
use nestling::{Access, Cause, Fault, Gfn, GfnRange, Mmu, Outcome, SlotFlags, SlotId, VcpuId};
use nestling_checks::machine::check_tables;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{Amd, add, assert_none, small, two_by_two};

/// First frame of the tests' slot.
const START: Gfn = Gfn(0x400);

fn fault(gfn: Gfn, access: Access) -> Fault {
    Fault { gpa: gfn.gpa(), access, cause: Cause::Translation }
}

fn guest(mmu: &Arc<Mmu<Amd>>) -> GuestCpu<nestling::format::Npt> {
    let mut cpu = GuestCpu::new(mmu, VcpuId(0), 7, Manners::Right).with_patience(4);
    drop(cpu.vcpu.enter().expect("there is a frame for the root"));
    cpu
}

fn one(gfn: Gfn) -> GfnRange {
    GfnRange { start: gfn, end: Gfn(gfn.0 + 1) }
}

/// An invalidation of one page begins while the backing answers a fault on another page of the same 2 MiB with a run
/// that holds both. A leaf of 2 MiB would map the page that is being taken.
#[test]
fn a_huge_leaf_does_not_reach_into_an_invalidation_in_progress() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, START, 512);
    let mut cpu = guest(&mmu);
    let (taken, touched) = (Gfn(START.0 + 100), Gfn(START.0 + 7));

    let mut worker = mmu.worker().expect("a worker is free");
    let held = worker.invalidate(one(taken));
    // The host may still answer with what was, until it has changed it.
    let outcome = cpu.vcpu.fault(fault(touched, Access::Write));
    let pages = mmu.host().ghost().taken(one(taken));
    mmu.host().ghost().given(one(taken), &pages, true);
    drop(held);
    assert_ne!(outcome, Ok(Outcome::Fixed { level: nestling::Level::M2 }));
    assert_eq!(cpu.run_one(touched, Access::Write), Done::Memory);
    assert_eq!(cpu.run_one(taken, Access::Write), Done::Memory);
    check_tables(&mmu);
    assert_none(&mmu.host().violations());
    worker.delete_slot(config.id).expect("the slot is there");
}

/// The same, but the invalidation begins after the fault has looked at it the first time.
#[test]
fn a_huge_leaf_is_not_installed_over_an_invalidation_that_began_meanwhile() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = guest(&mmu);
    let (taken, touched) = (Gfn(START.0 + 100), Gfn(START.0 + 7));
    let mut worker = mmu.worker().expect("a worker is free");

    let inner = Arc::clone(&mmu);
    std::thread::scope(|scope| {
        let (begun, began) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel();
        let worker = &mut worker;
        let host = Arc::clone(&mmu);
        scope.spawn(move || {
            gone.recv().expect("the fault asks the backing");
            let held = worker.invalidate(one(taken));
            begun.send(()).expect("the fault waits");
            gone.recv().expect("the fault ends");
            let pages = host.host().ghost().taken(one(taken));
            host.host().ghost().given(one(taken), &pages, true);
            drop(held);
        });
        let answer = go.clone();
        mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
            answer.send(()).expect("the other thread waits");
            began.recv().expect("the invalidation begins");
            inner.host().ghost().resolve(slot, gfn, true)
        }));
        assert_eq!(cpu.vcpu.fault(fault(touched, Access::Write)), Ok(Outcome::Retry));
        go.send(()).expect("the other thread waits");
    });
    check_tables(&mmu);
    assert_eq!(cpu.run_one(taken, Access::Write), Done::Memory);
    check_tables(&mmu);
    assert_none(&mmu.host().violations());
}

/// A whole invalidation passes while the backing answers.
#[test]
fn an_answer_that_a_whole_invalidation_overtook_is_not_installed() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
        let old = inner.host().ghost().resolve(slot, gfn, true);
        let mut worker = inner.worker().expect("a worker is free");
        let held = worker.invalidate(one(gfn));
        let pages = inner.host().ghost().taken(one(gfn));
        inner.host().ghost().given(one(gfn), &pages, true);
        drop(held);
        old
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Read)), Ok(Outcome::Retry));
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_none(&mmu.host().violations());
}

/// What the backing says while its page is away is not the last word: the guest would be stopped for an error that
/// is none.
#[test]
fn an_error_that_an_invalidation_overtook_is_retried() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |_, gfn| {
        let mut worker = inner.worker().expect("a worker is free");
        drop(worker.invalidate(one(gfn)));
        Err(BackingError::NotBacked)
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Read)), Ok(Outcome::Retry));
    // And an error that nothing overtook is one.
    mmu.host().on_next_resolve(Box::new(|_, _| Err(BackingError::Poisoned)));
    let failed = cpu.vcpu.fault(fault(START, Access::Read));
    assert_eq!(failed, Err(nestling::FaultError::Backing(BackingError::Poisoned)));
}

/// A host page that may not be written while it is away, and may afterwards.
#[test]
fn a_refused_write_that_an_invalidation_overtook_is_retried() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
        let mut worker = inner.worker().expect("a worker is free");
        drop(worker.invalidate(one(gfn)));
        inner.host().ghost().resolve(slot, gfn, true).map(|extent| nestling::host::Extent { writable: false, ..extent })
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Write)), Ok(Outcome::Retry));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Write)), Ok(Outcome::Fixed { level: nestling::Level::K4 }));
}

/// The slot and its memory go while the fault asks for it: the guest's access is a device's then, not an error.
#[test]
fn an_error_of_a_slot_that_was_deleted_meanwhile_is_retried() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
        inner.host().ghost().deleting(config.id);
        inner.worker().expect("a worker is free").delete_slot(config.id).expect("the slot is there");
        inner.host().ghost().deleted(config.id, true);
        inner.host().ghost().drop_object(config.backing);
        inner.host().ghost().resolve(slot, gfn, false)
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Read)), Ok(Outcome::Retry));
    assert_eq!(cpu.run_one(START, Access::Read), Done::Mmio);
    assert_none(&mmu.host().violations());
}

/// The slot is deleted and its memory answers as before: nothing of it may be mapped.
#[test]
fn an_answer_for_a_slot_that_was_deleted_meanwhile_is_not_installed() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
        let old = inner.host().ghost().resolve(slot, gfn, true);
        inner.worker().expect("a worker is free").delete_slot(config.id).expect("the slot is there");
        old
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Read)), Ok(Outcome::Retry));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Read)), Ok(Outcome::Mmio));
    assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
}

/// The slot becomes read-only while a write asks the backing.
#[test]
fn a_write_right_that_was_taken_meanwhile_is_not_installed() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, START, 4);
    let mut cpu = guest(&mmu);
    let inner = Arc::clone(&mmu);
    mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
        let mut worker = inner.worker().expect("a worker is free");
        worker.set_slot_flags(SlotId(0), SlotFlags::READ_ONLY).expect("the slot is there");
        inner.host().ghost().changing_flags(config.id, SlotFlags::READ_ONLY);
        inner.host().ghost().changed_flags(config.id, SlotFlags::READ_ONLY, true);
        inner.host().ghost().resolve(slot, gfn, true)
    }));
    assert_eq!(cpu.vcpu.fault(fault(START, Access::Write)), Ok(Outcome::Retry));
    assert_eq!(cpu.run_one(START, Access::Write), Done::ReadOnly);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    assert_none(&mmu.host().violations());
}
