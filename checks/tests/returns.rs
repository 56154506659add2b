//! What takes something from a guest does not return while a vCPU in guest mode may still have it, also when another
//! operation is already waiting for that vCPU: it finds the entries gone, and must not conclude that nothing has them.
//!
//! The vCPU stays in guest mode until the test lets it go. That an operation has not returned yet can not be seen in
//! bounded time; the wait here bounds how long a wrong one has to show itself, and a right one never fails by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nestling::{Access, Cause, Config, Fault, Gfn, GfnRange, Level, Mmu, Role, SlotFlags, SlotId, SlotZap, VcpuId};
use nestling_checks::machine::check_tables;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{Amd, add, assert_none, small, two_by_two};

const START: Gfn = Gfn(0x400);
/// How long an operation that should wait has to return by mistake.
const PATIENCE: Duration = Duration::from_millis(15);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taker {
    /// One frame.
    ZapFrame,
    /// All of the block, whose table is unlinked.
    ZapBlock,
    ZapAll,
    Invalidate,
    Delete,
    Flags,
    Move,
}

const TAKERS: [Taker; 7] =
    [Taker::ZapFrame, Taker::ZapBlock, Taker::ZapAll, Taker::Invalidate, Taker::Delete, Taker::Flags, Taker::Move];

fn take(mmu: &Arc<Mmu<Amd>>, what: Taker) {
    let mut worker = mmu.worker().expect("a worker is free");
    let block = GfnRange { start: START, end: Gfn(START.0 + 512) };
    match what {
        Taker::ZapFrame => drop(worker.zap(GfnRange { start: START, end: Gfn(START.0 + 1) })),
        Taker::ZapBlock => drop(worker.zap(block)),
        Taker::ZapAll => drop(worker.zap_all()),
        Taker::Invalidate => drop(worker.invalidate(block)),
        // The slot may be gone or elsewhere already: then there is nothing to wait for.
        Taker::Delete => drop(worker.delete_slot(SlotId(0))),
        Taker::Flags => drop(worker.set_slot_flags(SlotId(0), SlotFlags::READ_ONLY)),
        Taker::Move => drop(worker.move_slot(SlotId(0), Gfn(0x10_000).gpa())),
    }
}

fn returns_too_early(config: Config, first: Taker, second: Taker) {
    let mmu = small(config);
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let mut turn = cpu.vcpu.enter().expect("there is a root");
    assert!(turn.take_flush().is_none());
    let returned = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for what in [first, second] {
            let (mmu, returned) = (&mmu, &returned);
            let (tell, told) = std::sync::mpsc::channel();
            scope.spawn(move || {
                tell.send(()).expect("the test waits");
                take(mmu, what);
                returned.fetch_add(1, Ordering::SeqCst);
            });
            told.recv().expect("the thread tells");
            // The first one has to be in the middle of it, which its kick shows.
            while what == first && !mmu.host().is_kicked(VcpuId(0)) && returned.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
        }
        let began = Instant::now();
        // Nor does the vCPU wait for them: it is still in guest mode, and they wait for it.
        let fault = Fault { gpa: START.gpa(), access: Access::Write, cause: Cause::Translation };
        while began.elapsed() < PATIENCE && returned.load(Ordering::SeqCst) == 0 {
            assert!(!turn.fix_at_once(fault), "{first:?}, then {second:?}: the page came back");
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        drop(turn);
        assert_eq!(early, 0, "{first:?}, then {second:?}: {early} returned while the guest could still use the page");
    });
    assert!(cpu.vcpu.enter().expect("there is a root").take_flush().is_some());
    drop(cpu);
    assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
    assert_none(&mmu.host().violations());
}

fn all_pairs(largest: Level, slot_zap: SlotZap) {
    for first in TAKERS {
        for second in TAKERS {
            returns_too_early(Config { largest, slot_zap, workers: 4, ..two_by_two() }, first, second);
        }
    }
}

#[test]
fn nobody_returns_early_with_small_leaves() {
    all_pairs(Level::K4, SlotZap::Slot);
}

#[test]
fn nobody_returns_early_with_huge_leaves() {
    all_pairs(Level::M2, SlotZap::Everything);
}

/// A vCPU outside guest mode is not waited for.
#[test]
fn a_vcpu_outside_guest_mode_is_not_waited_for() {
    for what in TAKERS {
        let mmu = small(two_by_two());
        add(&mmu, 0, START, 512);
        let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        take(&mmu, what);
        assert!(!mmu.host().is_kicked(VcpuId(0)), "{what:?}");
        assert!(cpu.vcpu.enter().expect("there is a root").take_flush().is_some());
        assert_eq!(check_tables(&mmu).iter().map(|tree| tree.leaves.len()).sum::<usize>(), 0);
    }
}

/// A zap that has done one root, when a zap of everything makes the other one obsolete and waits for the vCPU that
/// runs on it: the other root is no longer among the valid ones, but the guest still has what it maps.
#[test]
fn a_zap_does_not_return_while_a_root_it_missed_is_in_use() {
    let mmu = small(Config { root_level: Level::L5, largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, 512);
    let mut first = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut second = GuestCpu::new(&mmu, VcpuId(1), 2, Manners::Right).with_patience(4);
    first.set_role(Role::new(Level::L4).expect("a root's level"));
    assert_eq!(first.run_one(START, Access::Write), Done::Memory);
    assert_eq!(second.run_one(START, Access::Write), Done::Memory);

    let returned = AtomicUsize::new(0);
    let (pause, paused) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel();
    mmu.host().on_next_free(Box::new(move || {
        pause.send(()).expect("the test waits");
        gone.recv().expect("the test goes on");
    }));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            take(&mmu, Taker::ZapBlock);
            returned.fetch_add(1, Ordering::SeqCst);
        });
        paused.recv().expect("the zap frees a table of the first root");
        // The second root still maps the block, and this vCPU may have read that.
        let turn = second.vcpu.enter().expect("there is a root");
        scope.spawn(|| take(&mmu, Taker::ZapAll));
        while !mmu.host().is_kicked(VcpuId(1)) {
            std::thread::yield_now();
        }
        go.send(()).expect("the zap waits");
        let began = Instant::now();
        while began.elapsed() < PATIENCE && returned.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        drop(turn);
        assert_eq!(early, 0, "the zap returned while a vCPU could still use what it should have removed");
    });
    assert_none(&mmu.host().violations());
}

/// Two zaps have found the same table, one unlinks it and waits for the vCPU: the other one loses, and has nothing left
/// to remove, but the guest still has what it should have removed.
#[test]
fn a_zap_that_loses_a_table_to_another_waits_for_the_guest_too() {
    let mmu = small(Config { largest: Level::K4, workers: 4, ..two_by_two() });
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    let walk = mmu.worker().expect("a worker is free").walk(mmu.role(), START).expect("there is a root");
    let table = walk.last().expect("a walk has a first step").address.hfn();

    let turn = cpu.vcpu.enter().expect("there is a root");
    let returned = AtomicUsize::new(0);
    let (pause, paused) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel();
    mmu.host().on_next_look_at(
        table,
        Box::new(move || {
            pause.send(()).expect("the test waits");
            gone.recv().expect("the test goes on");
        }),
    );
    std::thread::scope(|scope| {
        let zap = || {
            take(&mmu, Taker::ZapBlock);
            returned.fetch_add(1, Ordering::SeqCst);
        };
        scope.spawn(zap);
        paused.recv().expect("the zap follows the entry");
        scope.spawn(zap);
        while !mmu.host().is_kicked(VcpuId(0)) {
            std::thread::yield_now();
        }
        go.send(()).expect("the first zap waits");
        let began = Instant::now();
        while began.elapsed() < PATIENCE && returned.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let early = returned.load(Ordering::SeqCst);
        drop(turn);
        assert_eq!(early, 0, "a zap returned while the vCPU could still use what it should have removed");
    });
    assert_none(&mmu.host().violations());
}
