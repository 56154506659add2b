//! What splitting makes small, collapsing makes huge again: in place, with everything that the small leaves said.

use std::sync::Arc;

use nestling::format::Ept;
use nestling::{
    Access, Config, Gfn, GfnRange, Granularity, Level, LogConfig, LogError, LogStart, Mmu, SlotConfig, SlotFlags,
    SlotId, Split, Tracking, VcpuId,
};
use nestling_checks::ghost::object::Shape;
use nestling_checks::ghost::tree::Tree;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables};
use nestling_checks::scene::{aligned, assert_none, two_by_two};

type Intel = Machine<Ept>;

/// At a border of 1 GiB.
const START: Gfn = Gfn(3 << 18);
const ID: SlotId = SlotId(0);

fn vm(largest: Level, pages: u64, shape: Shape) -> (Arc<Mmu<Intel>>, GuestCpu<Ept>) {
    let mmu = Intel::build(Build { tables: 4096, ..Build::default() }, Config { largest, ..two_by_two() });
    let backing = mmu.host().ghost().make_object(shape);
    let flags = SlotFlags::empty();
    let config = SlotConfig { id: ID, space: Default::default(), base: START.gpa(), size: pages << 12, flags, backing };
    mmu.host().ghost().adding(&config);
    mmu.worker().unwrap().add_slot(config).unwrap();
    mmu.host().ghost().added(&config, true);
    let cpu = GuestCpu::new(&mmu, VcpuId(0), 7, Manners::Right).with_patience(4);
    (mmu, cpu)
}

fn tree(mmu: &Arc<Mmu<Intel>>) -> Tree {
    let mut trees = check_tables(mmu);
    assert_none(&mmu.host().violations());
    assert_eq!(trees.len(), 1);
    trees.remove(0)
}

fn by_pages() -> LogConfig {
    LogConfig {
        tracking: Tracking::WriteProtect,
        granularity: Granularity::Page,
        start: LogStart::Clean,
        split: Split::Eager,
    }
}

#[test]
fn all_that_was_huge_is_huge_again_without_a_fault() {
    let blocks = 8;
    let (mmu, mut cpu) = vm(Level::M2, blocks * 512, aligned(START, blocks * 512));
    for block in 0..blocks {
        assert_eq!(cpu.run_one(Gfn(START.0 + block * 512), Access::Read), Done::Memory);
    }
    assert_eq!(tree(&mmu).leaves_of(Level::M2), blocks);
    let mut worker = mmu.worker().unwrap();
    worker.start_log(ID, by_pages()).unwrap();
    assert_eq!(tree(&mmu).leaves_of(Level::K4), blocks * 512, "splitting is eager");
    assert_eq!(worker.collapse(ID), Err(LogError::Running));
    for page in [0, 511, 512, 1500] {
        assert_eq!(cpu.run_one(Gfn(START.0 + page), Access::Write), Done::Memory);
    }
    worker.stop_log(ID).unwrap();
    let before = mmu.counters();
    assert_eq!(worker.collapse(ID).unwrap().leaves_2m, blocks);
    let after = mmu.counters();
    assert_eq!((after.faults_fixed, after.exclusive_locks), (before.faults_fixed, before.exclusive_locks));
    assert_eq!((after.leaves_2m, after.leaves_4k, after.leaves_collapsed), (blocks, 0, blocks));
    let dirty: Vec<_> = tree(&mmu).leaves.iter().map(|leaf| leaf.dirty).collect();
    assert_eq!(
        dirty,
        [true, true, true, false, false, false, false, false],
        "dirty bits are kept, and none is made up"
    );
    // The log's protection went with it.
    assert!(tree(&mmu).leaves.iter().all(|leaf| leaf.allows.write));
    let spurious = mmu.counters().faults_fixed;
    assert_eq!(cpu.run_one(Gfn(START.0 + 3000), Access::Write), Done::Memory);
    assert_eq!(mmu.counters().faults_fixed, spurious);
    assert_none(&mmu.host().violations());
}

#[test]
fn a_gibibyte_falls_apart_and_comes_back() {
    let pages = 1 << 18;
    let (mmu, mut cpu) = vm(Level::G1, pages, aligned(START, pages));
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!(tree(&mmu).leaves_of(Level::G1), 1);
    let mut worker = mmu.worker().unwrap();
    worker.split(ID).unwrap();
    assert_eq!(mmu.counters().leaves_split, 1 + 512);
    assert_eq!(tree(&mmu).leaves_of(Level::K4), pages);
    assert_eq!(worker.collapse(ID).unwrap().leaves_1g, 1);
    assert_eq!(tree(&mmu).leaves_of(Level::G1), 1);
    worker.collect();
    assert_eq!(tree(&mmu).tables, 2, "the tables in between are gone");
}

#[test]
fn what_can_not_be_one_leaf_stays_apart() {
    // Crooked backing, pieces, a slot that covers no whole block, a page elsewhere.
    let odd = Shape { phase: aligned(START, 0).phase + 1, ..aligned(START, 1024) };
    for (pages, shape) in
        [(1024, odd), (1024, Shape { chunk: 500, gap: 1, ..aligned(START, 1024) }), (511, aligned(START, 511))]
    {
        let (mmu, mut cpu) = vm(Level::M2, pages, shape);
        for page in 0..pages {
            assert_eq!(cpu.run_one(Gfn(START.0 + page), Access::Read), Done::Memory);
        }
        assert_eq!(mmu.worker().unwrap().collapse(ID).unwrap().leaves_2m, 0, "{shape:?}");
        assert_eq!(tree(&mmu).leaves_of(Level::K4), pages);
    }
    let (mmu, mut cpu) = vm(Level::M2, 512, aligned(START, 512));
    let (mut worker, page) = (mmu.worker().unwrap(), GfnRange { start: Gfn(START.0 + 7), end: Gfn(START.0 + 8) });
    let held = worker.invalidate(page);
    let pages = mmu.host().ghost().taken(page);
    mmu.host().ghost().given(page, &pages, true);
    drop(held);
    for page in [7, 8] {
        assert_eq!(cpu.run_one(Gfn(START.0 + page), Access::Read), Done::Memory);
    }
    assert_eq!(worker.collapse(ID).unwrap().leaves_2m, 0);
    assert_eq!(tree(&mmu).leaves_of(Level::K4), 2);
}

/// While a part of a block is taken from the guest, the block stays apart; no leaf reaches into what was taken.
#[test]
fn nothing_collapses_into_what_is_being_invalidated() {
    let (mmu, mut cpu) = vm(Level::M2, 1024, aligned(START, 1024));
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!(cpu.run_one(Gfn(START.0 + 600), Access::Write), Done::Memory);
    let (mut worker, mut other) = (mmu.worker().unwrap(), mmu.worker().unwrap());
    worker.split(ID).unwrap();
    let page = GfnRange { start: Gfn(START.0 + 5), end: Gfn(START.0 + 6) };
    let held = worker.invalidate(page);
    assert_eq!(other.collapse(ID).unwrap().leaves_2m, 1, "the other block only");
    let pages = mmu.host().ghost().taken(page);
    assert_eq!((tree(&mmu).leaves_of(Level::M2), tree(&mmu).leaves_of(Level::K4)), (1, 511));
    mmu.host().ghost().given(page, &pages, false);
    drop(held);
    assert_eq!(other.collapse(ID).unwrap().leaves_2m, 1);
    assert_eq!(tree(&mmu).leaves_of(Level::M2), 2);
}
