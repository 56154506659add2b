//! The checks can fail: embedders that break the protocol, each in one way, and the ghost that notices.
//!
//! What a test like this shows is that the machine would see the library make the same mistake: a TLB that is not
//! flushed looks the same whoever forgot it.

use std::sync::Arc;

use nestling::format::{Ept, Npt};
use nestling::host::TableFrames;
use nestling::{Access, Gfn, GfnRange, Level, VcpuId};
use nestling_checks::ghost::Violation;
use nestling_checks::machine::arena::Misuse;
use nestling_checks::machine::check_tables;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::program::storm::{Care, Plan, Report, run};
use nestling_checks::scene::{add, small, two_by_two};

const START: Gfn = Gfn(0x400);

fn all() -> GfnRange {
    GfnRange { start: START, end: Gfn(START.0 + 512) }
}

#[track_caller]
fn assert_some(found: &[Violation], what: &str) {
    assert!(found.iter().any(|violation| violation.what.contains(what)), "no {what:?} among {found:#?}");
}

/// One thread, so that it is certain: map, zap, use what the TLB still has.
#[test]
fn a_flush_that_is_ignored_is_seen_after_a_zap() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 512);
    for (manners, found) in [(Manners::Right, false), (Manners::IgnoresFlush, true)] {
        let mut cpu = GuestCpu::new(&mmu, VcpuId(u16::from(found)), 1, manners);
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        let called = mmu.host().ghost().tick();
        mmu.worker().expect("a worker is free").zap(all());
        mmu.host().ghost().zapped(all(), called);
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        assert_eq!(!mmu.host().violations().is_empty(), found, "{manners:?}");
    }
    assert_some(&mmu.host().violations(), "after the zap");
}

/// The same with a slot that goes: the access reaches memory that is somebody else's by then.
#[test]
fn a_flush_that_is_ignored_is_seen_after_a_delete() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::IgnoresFlush);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    mmu.host().ghost().deleting(config.id);
    mmu.worker().expect("a worker is free").delete_slot(config.id).expect("the slot is there");
    mmu.host().ghost().deleted(config.id, true);
    mmu.host().ghost().drop_object(config.backing);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    assert_some(&mmu.host().violations(), "may not reach");
}

/// A page walk from a cached pointer to a table that was freed and is something else now.
#[test]
fn a_walk_through_a_freed_table_is_seen() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 3);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::IgnoresFlush);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    let mut worker = mmu.worker().expect("a worker is free");
    worker.zap(GfnRange { start: Gfn(0), end: Gfn(1 << 18) });
    worker.collect();
    for page in 0..100 {
        // Frames that the TLB has no leaf of, so that it walks.
        cpu.run_one(Gfn(START.0 + 1 + page % 2), Access::Read);
    }
    assert_some(&mmu.host().violations(), "which is freed");
}

#[test]
fn pages_that_move_without_an_invalidation_are_seen() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    assert_eq!(check_tables(&mmu)[0].leaves.len(), 1);
    assert!(mmu.host().violations().is_empty());
    mmu.host().ghost().moved_behind_the_librarys_back(GfnRange { start: START, end: Gfn(START.0 + 1) });
    check_tables(&mmu);
    assert_some(&mmu.host().violations(), "not behind the slot");
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    assert_some(&mmu.host().violations(), "may not reach");
}

/// What the arena says of a library that would not keep its promises to it.
#[test]
fn misused_frames_are_seen() {
    let mmu = small(two_by_two());
    let machine = mmu.host();
    let frame = machine.alloc_table().expect("the arena is fresh");
    let table = Arc::clone(&machine.arena);
    let life = table.life(frame).expect("it is the arena's");
    table.entry(frame, life, 5).expect("it is alive").store(0x1234, std::sync::atomic::Ordering::Relaxed);
    machine.free_table(frame);
    assert!(table.entry(frame, life, 5).is_none());
    machine.free_table(frame);
    machine.table(frame);
    assert_eq!(table.take_misuse(), [Misuse::DoubleFree(frame), Misuse::UseAfterFree(frame)]);
}

fn storm_notices(plan: impl Fn(u64) -> Plan, what: &str) {
    // How threads interleave is not in the seed, so there are some tries; one is enough nearly always.
    let mut operations = 0;
    for seed in 0..20 {
        let Report { violations, operations: done, .. } = run::<Npt>(plan(seed));
        operations += done;
        if violations.iter().any(|violation| violation.what.contains(what)) {
            println!("noticed in storm {seed}, after {operations} worker operations:\n{}", violations[0]);
            return;
        }
    }
    panic!("{operations} operations in 20 storms and nobody noticed");
}

#[test]
fn a_storm_notices_a_vcpu_that_ignores_flushes() {
    storm_notices(|seed| Plan { manners: Manners::IgnoresFlush, ..Plan::new(seed, 2_000) }, "");
}

#[test]
fn a_storm_notices_a_vcpu_that_lies_about_leaving() {
    storm_notices(|seed| Plan { manners: Manners::LiesAboutLeaving, ..Plan::new(seed, 2_000) }, "");
}

#[test]
fn a_storm_notices_pages_that_move_unasked() {
    storm_notices(|seed| Plan { care: Care::MovesPagesUnasked, ..Plan::new(seed, 2_000) }, "");
}

#[test]
fn a_storm_notices_memory_that_is_freed_too_early() {
    storm_notices(|seed| Plan { care: Care::FreesTooEarly, ..Plan::new(seed, 2_000) }, "may not reach");
}

#[test]
fn a_storm_notices_a_log_that_tells_more_than_was_written() {
    let plan = |seed| Plan { care: Care::MarksUnwritten, logs: true, largest: Level::M2, ..Plan::new(seed, 2_000) };
    storm_notices(plan, "nobody wrote it");
}

/// The two decoders disagree about a stray entry: the tree is read with the CPU's eyes.
#[test]
fn a_stray_entry_is_seen() {
    use nestling_checks::machine::cpu::{Cpu, Seen};
    // PS in a PML4 entry, a write-only EPT entry, a frame above the machine's address bits.
    assert_eq!(Npt::see(0x1087, 4), Seen::Reserved);
    assert_eq!(Ept::see(0x1002, 1), Seen::Reserved);
    assert_eq!(Npt::see(1 << 50 | 7, 1), Seen::Reserved);
    assert_eq!(Ept::see(1 << 46 | 0x37, 1), Seen::Reserved);
    assert_eq!(
        Npt::see(0x1003, 1),
        Seen::Leaf(
            nestling::Hfn(1),
            nestling_checks::machine::cpu::Allows { read: false, write: false, execute: false }
        )
    );
}
