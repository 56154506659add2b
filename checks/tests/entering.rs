//! The way into the guest: the flush that is owed, and to whom.

use nestling::{Access, Gfn, GfnRange, VcpuId};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{add, assert_none, small, two_by_two};

const START: Gfn = Gfn(0x400);

fn all() -> GfnRange {
    GfnRange { start: START, end: Gfn(START.0 + 512) }
}

#[test]
fn the_first_entry_flushes_and_the_next_does_not() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    assert!(vcpu.enter().expect("there is a frame for the root").take_flush());
    assert!(!vcpu.enter().expect("there is a root").take_flush());
}

/// The embedder called the entry off; its TLB still has everything.
#[test]
fn a_flush_that_was_not_taken_stays_owed() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    drop(vcpu.enter().expect("there is a root"));
    let mut turn = vcpu.enter().expect("there is a root");
    assert!(turn.take_flush());
    assert!(!turn.take_flush(), "it is owed once");
}

/// A vCPU that is made again under an old number: what its CPU's TLB holds nobody has said.
#[test]
fn a_vcpu_that_is_made_again_flushes() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    mmu.worker().expect("a worker is free").zap(all());
    // Entered, told of the flush, called off, and gone.
    drop(cpu.vcpu.enter().expect("there is a root"));
    drop(cpu);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("the number is free again");
    assert!(vcpu.enter().expect("there is a root").take_flush());
    assert_none(&mmu.host().violations());
}

#[test]
fn in_guest_is_told_truly() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(1)).expect("it is the first");
    assert!(!mmu.in_guest(VcpuId(1)));
    let turn = vcpu.enter().expect("there is a frame for the root");
    assert!(mmu.in_guest(VcpuId(1)) && !mmu.in_guest(VcpuId(0)) && !mmu.in_guest(VcpuId(77)));
    drop(turn);
    assert!(!mmu.in_guest(VcpuId(1)));
}
