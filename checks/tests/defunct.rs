//! Roots that are obsolete and not empty yet: a zap of everything is stopped in the middle of its back half, and
//! whoever gives memory back to the host meanwhile has to find what such a root still maps. No vCPU runs on it any
//! more, so nothing but a look at its tables shows it; with dirty bits to hand over, or reference counts of pages, an
//! entry that outlives its memory would be a use after free.

use std::sync::Arc;
use std::sync::mpsc::channel;

use nestling::{Access, Config, Gfn, GfnRange, Level, Mmu, SlotFlags, SlotId, SlotZap, VcpuId};
use nestling_checks::ghost::tree::Tree;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables, current_root};
use nestling_checks::scene::{Amd, add, assert_none, two_by_two};

const LOW: Gfn = Gfn(0x400);
const HIGH: Gfn = Gfn(5 << 18);

/// Does `meanwhile` while a zap of everything has emptied the low block of the old root, and not yet the high one; then
/// looks at the high block in the old root. Returns the leaves that it still has there.
fn leaves_left_by(config: Config, meanwhile: impl FnOnce(&Arc<Mmu<Amd>>)) -> usize {
    // Each step of a zap is a hold of its own, so that the first table is freed before the others are looked at.
    let mmu = Machine::build(Build { restless: 1, ..Build::default() }, config);
    add(&mmu, 0, LOW, 512);
    add(&mmu, 1, HIGH, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    for gfn in [LOW, HIGH, Gfn(HIGH.0 + 99)] {
        assert_eq!(cpu.run_one(gfn, Access::Write), Done::Memory);
    }
    let mut worker = mmu.worker().expect("a worker is free");
    let old = current_root(&mut worker, mmu.role()).expect("a vCPU has loaded it");
    drop(worker);
    let high = GfnRange { start: HIGH, end: Gfn(HIGH.0 + 512) };
    let left = || {
        let tree = Tree::read::<nestling::format::Npt>(&mmu.host().arena, old, mmu.role());
        assert!(tree.freed.is_empty());
        tree.leaves.iter().filter(|leaf| high.contains(leaf.gfn)).count()
    };

    let (pause, paused) = channel();
    let (go, gone) = channel();
    mmu.host().on_next_free(Box::new(move || {
        pause.send(()).expect("the test waits");
        gone.recv().expect("the test goes on");
    }));
    let found = std::thread::scope(|scope| {
        scope.spawn(|| mmu.worker().expect("a worker is free").zap_all());
        paused.recv().expect("the zap frees the low block's table");
        assert_eq!(left(), 2, "the test came too late");
        meanwhile(&mmu);
        let found = left();
        go.send(()).expect("the zap waits");
        found
    });
    drop(cpu);
    assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
    assert_none(&mmu.host().violations());
    found
}

fn config(slot_zap: SlotZap) -> Config {
    Config { largest: Level::K4, slot_zap, workers: 4, ..two_by_two() }
}

#[test]
fn an_invalidation_searches_obsolete_roots_too() {
    let left = leaves_left_by(config(SlotZap::Slot), |mmu| {
        let mut worker = mmu.worker().expect("a worker is free");
        drop(worker.invalidate(GfnRange { start: HIGH, end: Gfn(HIGH.0 + 512) }));
    });
    assert_eq!(left, 0);
}

#[test]
fn so_does_one_that_must_not_block() {
    let left = leaves_left_by(config(SlotZap::Slot), |mmu| {
        let mut worker = mmu.worker().expect("a worker is free");
        drop(worker.try_invalidate(GfnRange { start: HIGH, end: Gfn(HIGH.0 + 512) }).expect("nobody is in the way"));
    });
    assert_eq!(left, 0);
}

#[test]
fn a_slot_that_goes_is_unmapped_in_obsolete_roots_too() {
    for slot_zap in [SlotZap::Slot, SlotZap::Everything] {
        for what in 0..3 {
            let left = leaves_left_by(config(slot_zap), |mmu| {
                let mut worker = mmu.worker().expect("a worker is free");
                let done = match what {
                    0 => worker.delete_slot(SlotId(1)),
                    1 => worker.move_slot(SlotId(1), Gfn(9 << 18).gpa()),
                    _ => worker.set_slot_flags(SlotId(1), SlotFlags::READ_ONLY),
                };
                done.expect("the slot is there");
            });
            assert_eq!(left, 0, "{slot_zap:?}, change {what}");
        }
    }
}

/// Two zaps of everything at once: each empties what it made obsolete, and nothing is emptied twice or never.
#[test]
fn a_second_zap_of_everything_beside_the_first() {
    let left = leaves_left_by(config(SlotZap::Slot), |mmu| {
        let mut cpu = GuestCpu::new(mmu, VcpuId(1), 2, Manners::Right).with_patience(4);
        assert_eq!(cpu.run_one(HIGH, Access::Write), Done::Memory);
        let zapped = mmu.worker().expect("a worker is free").zap_all();
        assert_eq!(zapped.leaves, 1, "only its own root's");
        assert_eq!(cpu.run_one(LOW, Access::Write), Done::Memory);
        mmu.worker().expect("a worker is free").zap_all();
    });
    assert_eq!(left, 2, "the first root is the first zap's to empty");
}

/// The new root is filled while the old one is emptied.
#[test]
fn faults_go_on_beside_the_back_half() {
    leaves_left_by(config(SlotZap::Slot), |mmu| {
        let mut cpu = GuestCpu::new(mmu, VcpuId(1), 2, Manners::Right).with_patience(4);
        for gfn in [LOW, HIGH] {
            assert_eq!(cpu.run_one(gfn, Access::Write), Done::Memory);
        }
        let counters = mmu.counters();
        assert_eq!(counters.faults_retried, 0, "{counters:?}");
        mmu.worker().expect("a worker is free").zap_all();
    });
}

#[test]
fn the_tables_of_roots_that_nobody_let_go_of_are_freed_at_the_end() {
    let mmu = Machine::<nestling::format::Npt>::build(Build::default(), two_by_two());
    add(&mmu, 0, LOW, 512);
    let mut cpus = [0, 1].map(|id| GuestCpu::new(&mmu, VcpuId(id), 1, Manners::Right).with_patience(4));
    for round in 0..20u64 {
        // The other one sleeps through the zap, with a root that is obsolete by then.
        let cpu = &mut cpus[(round % 2) as usize];
        assert_eq!(cpu.run_one(LOW, Access::Write), Done::Memory);
        mmu.worker().expect("a worker is free").zap_all();
        check_tables(&mmu);
    }
    assert!(mmu.counters().roots_freed > 10);
    let arena = Arc::clone(&mmu.host().arena);
    assert_none(&mmu.host().violations());
    drop((cpus, mmu));
    assert_eq!((arena.live(), arena.take_misuse()), (0, Vec::new()));
}
