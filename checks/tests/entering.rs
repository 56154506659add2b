//! The way into the guest: the flush that is owed, and to whom; what a vCPU is asked for before.

use std::sync::atomic::{AtomicBool, Ordering};

use nestling::format::Npt;
use nestling::{
    Access, AddressSpace, Cause, Config, Fault, Flush, Gfn, GfnRange, Level, Outcome, Request, VcpuId, Wait,
};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, current_root};
use nestling_checks::scene::{add, assert_none, small, two_by_two};

const START: Gfn = Gfn(0x400);

fn all() -> GfnRange {
    GfnRange { start: START, end: Gfn(START.0 + 512) }
}

#[test]
fn the_first_entry_flushes_and_the_next_does_not() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    assert!(vcpu.enter().expect("there is a frame for the root").take_flush().is_some());
    assert!(vcpu.enter().expect("there is a root").take_flush().is_none());
}

/// The embedder called the entry off; its TLB still has everything.
#[test]
fn a_flush_that_was_not_taken_stays_owed() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    drop(vcpu.enter().expect("there is a root"));
    let mut turn = vcpu.enter().expect("there is a root");
    assert!(turn.take_flush().is_some());
    assert!(turn.take_flush().is_none(), "it is owed once");
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
    assert!(vcpu.enter().expect("there is a root").take_flush().is_some());
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

/// A fault that is handled within a turn: the vCPU stays in guest mode. What takes more than that is left alone.
#[test]
fn a_fault_is_fixed_within_a_turn() {
    let mmu = small(Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, 1024);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let write = |page| Fault { gpa: Gfn(START.0 + page).gpa(), access: Access::Write, cause: Cause::Translation };
    let before = mmu.counters();
    let mut turn = cpu.vcpu.enter().expect("there is a root");
    // The backing does not have each page at hand each time.
    let mut fix = |page| (0..3).any(|_| turn.fix_at_once(write(page)));
    assert!(fix(1) && mmu.in_guest(VcpuId(0)));
    assert!(!fix(1), "it is there");
    assert!(!fix(512), "there is no table");
    assert!(!turn.fix_at_once(Fault { cause: Cause::Reserved, ..write(2) }), "an entry says that there is no memory");
    drop(turn);
    assert_eq!(mmu.counters().faults_fixed, before.faults_fixed + 1);
    // What was left alone is handled from the start, whichever it was.
    for (page, outcome) in [(512, Outcome::Fixed { level: Level::K4 }), (1, Outcome::Spurious)] {
        assert_eq!(cpu.vcpu.fault(write(page)), Ok(outcome));
    }
    assert!(cpu.vcpu.enter().expect("there is a root").take_flush().is_none());
    assert_none(&mmu.host().violations());
}

/// A zap of everything holds the lock and waits for the vCPU, which does not come in, nor wait for it.
#[test]
fn nothing_is_fixed_within_a_turn_that_a_writer_waits_for() {
    let mmu = small(Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let mut turn = cpu.vcpu.enter().expect("there is a root");
    std::thread::scope(|scope| {
        let zap = scope.spawn(|| mmu.worker().expect("a worker is free").zap_all());
        while !mmu.host().is_kicked(VcpuId(0)) {
            std::thread::yield_now();
        }
        let (access, cause) = (Access::Write, Cause::Translation);
        let fault = |page| Fault { gpa: Gfn(START.0 + page).gpa(), access, cause };
        assert!((1..8).all(|page| !turn.fix_at_once(fault(page))));
        drop(turn);
        zap.join().expect("it ends");
    });
    assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_none(&mmu.host().violations());
}

/// Which flush is owed: all when translations were taken away, what the root uses when the vCPU turned to another.
#[test]
fn a_flush_is_no_more_than_it_has_to_be() {
    let mmu = small(two_by_two());
    let smm = mmu.role().in_space(AddressSpace::Smm);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    let mut owed = |role| {
        vcpu.set_role(role);
        vcpu.enter().expect("there is a root").take_flush()
    };
    let mut worker = mmu.worker().expect("a worker is free");
    assert_eq!(owed(mmu.role()), Some(Flush::All), "whatever ran on this CPU before");
    assert_eq!(owed(mmu.role()), None);
    assert_eq!(owed(smm), Some(Flush::Current));
    assert_eq!(owed(mmu.role()), Some(Flush::Current));
    for (request, flush) in [(Request::FlushCurrent, Flush::Current), (Request::Flush, Flush::All)] {
        assert_eq!(worker.request(VcpuId(0), request, Wait::UntilServed), Some(()));
        assert_eq!(owed(mmu.role()), Some(flush));
        assert_eq!(owed(mmu.role()), None);
    }
    // The larger one is owed, whichever came first.
    for first in [Request::Flush, Request::FlushCurrent] {
        let second = if first == Request::Flush { Request::FlushCurrent } else { Request::Flush };
        for request in [first, second] {
            assert_eq!(worker.request(VcpuId(0), request, Wait::No), Some(()));
        }
        assert_eq!(owed(smm), Some(Flush::All));
    }
    worker.zap_all();
    assert_eq!(owed(smm), Some(Flush::All), "also when the root is a new one");
    assert_eq!(worker.request(VcpuId(2), Request::Flush, Wait::UntilServed), None, "there are two");
}

/// Nobody waits for who is not in guest mode, or wakes it; who is, is kicked, and waited for if that is asked for.
#[test]
fn a_request_kicks_whom_it_finds_in_the_guest() {
    let mmu = small(two_by_two());
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    let mut worker = mmu.worker().expect("a worker is free");
    drop(vcpu.enter().expect("there is a frame for the root"));
    worker.request(VcpuId(0), Request::Reload, Wait::UntilServed).expect("it exists");
    assert!(!mmu.host().is_kicked(VcpuId(0)));

    let turn = vcpu.enter().expect("there is a root");
    worker.request(VcpuId(0), Request::Flush, Wait::No).expect("it exists");
    assert!(mmu.host().is_kicked(VcpuId(0)));
    let returned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            worker.request(VcpuId(0), Request::FlushCurrent, Wait::UntilServed).expect("it exists");
            returned.store(true, Ordering::SeqCst);
        });
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        drop(turn);
        assert!(!early, "the guest still ran");
    });
    // Both were served, at the next entry.
    assert_eq!(vcpu.enter().expect("there is a root").take_flush(), Some(Flush::All));
}

/// A reload drops what is loaded and at hand, and finds the same root again if it is valid.
#[test]
fn a_reload_keeps_what_is_mapped() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let mut worker = mmu.worker().expect("a worker is free");
    let before = (current_root(&mut worker, mmu.role()), mmu.counters().roots_made);
    worker.request(VcpuId(0), Request::Reload, Wait::UntilServed).expect("it exists");
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!((current_root(&mut worker, mmu.role()), mmu.counters().roots_made), before);
    let counters = mmu.counters();
    assert_eq!((counters.roots_freed, counters.roots_kept), (0, 0), "nothing was obsolete, and nobody asked");
    // Together with a zap of everything: what is obsolete is dropped as that, and nothing else is there to reload.
    worker.request(VcpuId(0), Request::Reload, Wait::No).expect("it exists");
    worker.zap_all();
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!((mmu.counters().roots_freed, mmu.counters().roots_made), (1, before.1 + 1));
    assert_none(&mmu.host().violations());
}

/// Where the CPUs can be told to forget a range, a zap asks nothing of vCPUs, not even of one in the guest.
#[test]
fn a_range_that_the_embedder_flushes_kicks_nobody() {
    let mmu = Machine::<Npt>::build(Build { by_range: true, ..Build::default() }, two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let before = mmu.counters();
    let turn = cpu.vcpu.enter().expect("there is a root");
    mmu.worker().expect("a worker is free").zap(all());
    let (called, after) = (mmu.host().ghost().tick(), mmu.counters());
    mmu.host().ghost().zapped(all(), called);
    assert_eq!((after.kicks, after.flush_requests), (before.kicks, before.flush_requests));
    assert_eq!((after.flushes_by_range, after.leaves_zapped), (before.flushes_by_range + 1, before.leaves_zapped + 1));
    drop(turn);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    // Roots that become obsolete are another matter: no range names a root.
    let turn = cpu.vcpu.enter().expect("there is a root");
    std::thread::scope(|scope| {
        let zap = scope.spawn(|| mmu.worker().expect("a worker is free").zap_all());
        while !mmu.host().is_kicked(VcpuId(0)) && !zap.is_finished() {
            std::thread::yield_now();
        }
        assert!(mmu.host().is_kicked(VcpuId(0)));
        drop(turn);
    });
    assert_none(&mmu.host().violations());
}

/// A vCPU that finds the request of a zap of everything with a root that was made since: it keeps that one, and drops the
/// one of the other role, which is obsolete. No vCPU frees what is not.
#[test]
fn a_root_that_is_current_is_kept_when_obsolete_ones_are_dropped() {
    let mmu = small(two_by_two());
    let smm = mmu.role().in_space(AddressSpace::Smm);
    let mut vcpus = [0, 1].map(|id| mmu.vcpu(VcpuId(id)).expect("each number once"));
    for vcpu in &mut vcpus {
        drop(vcpu.enter().expect("there is a frame for the root"));
    }
    mmu.worker().expect("a worker is free").zap_all();
    let made = mmu.counters().roots_made;
    for (count, vcpu) in (1..).zip(&mut vcpus) {
        // Its root is put aside unasked; the new one is loaded before the request is met.
        vcpu.set_role(smm);
        drop(vcpu.enter().expect("there is a frame for the root"));
        let counters = mmu.counters();
        assert_eq!((counters.roots_freed, counters.roots_kept), (count, count));
    }
    assert_eq!(mmu.counters().roots_made, made + 1, "both kept the same one");
    assert_none(&mmu.host().violations());
}
