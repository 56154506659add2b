//! Leaves of 2 MiB in shadow tables: where they are made, what they stand back for, and how they go.

use std::sync::Arc;

use nestling::guest::{Controls, CpuFeatures, Privilege, Request, Width};
use nestling::shadow::ShadowConfig;
use nestling::shadow::vcpu::ShadowOutcome;
use nestling::slots::dirty::{LogConfig, LogStart, Tracking};
use nestling::{
    Access, AddressSpace, Age, Config, Gfn, GfnRange, Gpa, Level, Mmu, SlotConfig, SlotFlags, SlotId, VcpuId, Worker,
};
use nestling_checks::shadow::cpu::{Done, ShadowCpu};
use nestling_checks::shadow::machine::{BLOCK, BLOCKS, LARGE, SECOND, ShadowMachine};
use nestling_checks::shadow::oracle::{Paging, Question};

const LONG: Controls = Controls { cr0: 1 << 31 | 1 << 16 | 1, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 };
const PAE: Controls = Controls { efer: 0, ..LONG };
const LEGACY: Controls = Controls { cr4: 1 << 4, ..PAE };
const OFF: Controls = Controls { cr0: 1, cr4: 0, efer: 0 };
const KERNEL: Privilege = Privilege::Supervisor { ac: false };
/// P, W, U, A, D.
const ALL: u64 = 0x67;
const READ_ONLY: u64 = ALL & !2;
const LARGE_PAGE: u64 = 1 << 7;
/// Tables of level 4 to 1.
const TABLES: [u64; 4] = [1, 2, 3, 4];
/// Where the guest has the frames with its tables, by small pages.
const WINDOW: u64 = 0;
/// Where it has the blocks, by large ones: the page of a frame is its number.
const FIRST: u64 = LARGE;
const SECOND_BLOCK: u64 = LARGE + BLOCK;

/// A machine whose guest has the first 64 frames where they are by small pages, and each block by a large one.
fn machine_with(largest: Level) -> (Arc<Mmu<ShadowMachine>>, Worker<ShadowMachine>) {
    let machine = ShadowMachine::new(1024, 0);
    let put = |table: u64, entry: u64, value| machine.prepare(Gfn(table), entry as u32 * 8, Width::Eight, value);
    (0..3).for_each(|level| put(TABLES[level], 0, TABLES[level + 1] << 12 | ALL));
    (0..SECOND).for_each(|page| put(TABLES[3], page, page << 12 | ALL));
    for block in LARGE / BLOCK..LARGE / BLOCK + BLOCKS {
        put(TABLES[2], block, (block * BLOCK) << 12 | ALL | LARGE_PAGE);
    }
    let config = Config { vcpus: 2, workers: 2, slots: 4, largest, ..Config::default() };
    let mmu = Mmu::new(machine, config).expect("the configuration is right");
    let cpu = CpuFeatures { physical_bits: 40, gigantic_pages: true };
    mmu.enable_shadow(ShadowConfig { pages: 64, cpu }).expect("there is memory");
    let mut worker = mmu.worker().expect("a worker is free");
    for (id, base, pages) in [(0, 0, SECOND), (1, LARGE, BLOCKS * BLOCK)] {
        let (space, flags) = (AddressSpace::Main, SlotFlags::empty());
        let slot = SlotConfig { id: SlotId(id), space, base: Gpa(base << 12), size: pages << 12, flags, backing: 0 };
        worker.add_slot(slot).expect("the slot fits");
    }
    (mmu, worker)
}

fn machine() -> (Arc<Mmu<ShadowMachine>>, Worker<ShadowMachine>) {
    machine_with(Level::G1)
}

fn cpu_of(mmu: &Arc<Mmu<ShadowMachine>>, id: u16, controls: Controls, cr3: u64) -> ShadowCpu {
    let vcpu = mmu.shadow_vcpu(VcpuId(id)).expect("there is memory").expect("each vCPU is made once");
    let mut cpu = ShadowCpu::new(vcpu, Paging { controls, cr3 }, 1);
    cpu.alone = true;
    cpu
}

fn cpu(mmu: &Arc<Mmu<ShadowMachine>>, id: u16) -> ShadowCpu {
    cpu_of(mmu, id, LONG, TABLES[0] << 12)
}

#[track_caller]
fn reaches(cpu: &mut ShadowCpu, page: u64, access: Access) {
    let question = Question { linear: page << 12, access, privilege: Privilege::User };
    assert_eq!(cpu.access(question, None), Done::Memory, "{access:?} of page {page}");
}

#[track_caller]
fn reads(cpu: &mut ShadowCpu, page: u64) {
    reaches(cpu, page, Access::Read);
}

#[track_caller]
fn writes(cpu: &mut ShadowCpu, page: u64) {
    reaches(cpu, page, Access::Write);
}

/// The guest writes an entry, at a page where it has the table.
#[track_caller]
fn write_entry(cpu: &mut ShadowCpu, page: u64, entry: u64, value: u64) {
    let question = Question { linear: page << 12, access: Access::Write, privilege: KERNEL };
    assert_eq!(cpu.access(question, Some((entry as u32 * 8, Width::Eight, value))), Done::Memory);
}

/// Leaves of 2 MiB and of 4 KiB now, and faults that were fixed.
fn mapped(mmu: &Mmu<ShadowMachine>) -> (u64, u64, u64) {
    let counters = mmu.counters();
    (counters.leaves_2m, counters.leaves_4k, counters.faults_fixed)
}

#[track_caller]
fn end(mmu: Arc<Mmu<ShadowMachine>>, mut worker: Worker<ShadowMachine>, cpus: Vec<ShadowCpu>) {
    let arena = Arc::clone(&mmu.host().arena);
    assert_eq!(mmu.host().record().violations, Vec::<String>::new());
    drop(cpus);
    // Nothing is left of memory that is taken away.
    [0, 1].into_iter().for_each(|slot| worker.delete_slot(SlotId(slot)).expect("the slot is there"));
    let left = mmu.shadow_metadata().expect("it is enabled");
    assert_eq!((left.mappings, mmu.counters().leaves_2m, mmu.counters().leaves_4k), (0, 0, 0));
    drop((worker, mmu));
    assert_eq!((arena.live(), arena.take_misuse()), (0, Vec::new()));
}

#[test]
fn a_large_page_in_one_piece_of_memory_is_one_leaf() {
    let (mmu, worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    reads(&mut cpu, FIRST + 17);
    assert_eq!(mapped(&mmu), (1, 0, 1));
    (0..BLOCK).for_each(|page| writes(&mut cpu, FIRST + page));
    reaches(&mut cpu, FIRST + 3, Access::Execute);
    assert_eq!(mapped(&mmu), (1, 0, 1), "all of it by one fault");
    assert_eq!(mmu.shadow_metadata().expect("it is enabled").mappings, 1);
    writes(&mut cpu, SECOND_BLOCK);
    assert_eq!(mapped(&mmu), (2, 0, 2));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn no_leaf_is_larger_than_the_largest() {
    let (mmu, worker) = machine_with(Level::K4);
    let mut cpu = cpu(&mmu, 0);
    writes(&mut cpu, FIRST + 17);
    assert_eq!(mapped(&mmu), (0, 8, 1));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn large_leaves_are_made_in_every_format_of_the_guests() {
    let (mmu, worker) = machine();
    let put = |table: u64, entry, width, value| mmu.host().prepare(Gfn(table), entry, width, value);
    // Long mode: a page of 1 GiB.
    put(TABLES[1], 8, Width::Eight, ALL | LARGE_PAGE);
    let mut long = cpu(&mmu, 0);
    reads(&mut long, (1 << 18) + FIRST);
    writes(&mut long, (1 << 18) + SECOND_BLOCK + 1);
    assert_eq!(mapped(&mmu), (2, 0, 2));
    drop(long);
    // PAE, by the tables of long mode from level 2 down.
    put(8, 0, Width::Eight, TABLES[2] << 12 | 1);
    let mut pae = cpu_of(&mmu, 0, PAE, 8 << 12);
    writes(&mut pae, FIRST + 1);
    assert_eq!(mapped(&mmu).0, 3);
    drop(pae);
    // Four bytes an entry: a page of 4 MiB, whose second half is the first block, and one whose first is the second.
    put(9, 0, Width::Four, ALL | LARGE_PAGE);
    put(9, 4, Width::Four, 1 << 22 | ALL | LARGE_PAGE);
    let mut legacy = cpu_of(&mmu, 0, LEGACY, 9 << 12);
    writes(&mut legacy, FIRST + 1);
    writes(&mut legacy, SECOND_BLOCK + 511);
    assert_eq!(mapped(&mmu).0, 5);
    drop(legacy);
    let mut off = cpu_of(&mmu, 0, OFF, 0);
    let question = Question { linear: SECOND_BLOCK << 12, access: Access::Write, privilege: KERNEL };
    assert_eq!(off.access(question, None), Done::Memory);
    assert_eq!(mapped(&mmu).0, 6);
    end(mmu, worker, vec![off]);
}

/// Without CR0.WP an entry says more of one page than of another.
#[test]
fn a_guest_without_write_protection_gets_small_leaves() {
    let (mmu, worker) = machine();
    let mut cpu = cpu_of(&mmu, 0, Controls { cr0: LONG.cr0 & !(1 << 16), ..LONG }, TABLES[0] << 12);
    reads(&mut cpu, FIRST);
    assert_eq!(mapped(&mmu), (0, 8, 1));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn what_the_guest_changes_of_a_large_page_counts_once_it_flushes() {
    let (mmu, worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    let entry = FIRST / BLOCK;
    writes(&mut cpu, FIRST + 5);
    for value in [FIRST << 12 | READ_ONLY | LARGE_PAGE, SECOND_BLOCK << 12 | ALL | LARGE_PAGE, 0] {
        write_entry(&mut cpu, WINDOW + TABLES[2], entry, value);
        cpu.load_cr3(TABLES[0] << 12);
        let access = |access| Question { linear: (FIRST + 5) << 12, access, privilege: Privilege::User };
        let done = |possible| if possible { Done::Memory } else { Done::Fault };
        assert_eq!(cpu.access(access(Access::Read), None), done(value != 0));
        assert_eq!(cpu.access(access(Access::Write), None), done(value & 2 != 0));
    }
    write_entry(&mut cpu, WINDOW + TABLES[2], entry, FIRST << 12 | ALL | LARGE_PAGE);
    writes(&mut cpu, FIRST + 5);
    // INVLPG is enough, and of no other page of it.
    write_entry(&mut cpu, WINDOW + TABLES[2], entry, 0);
    cpu.invlpg((FIRST + 5) << 12);
    let question = Question { linear: (FIRST + 5) << 12, access: Access::Read, privilege: Privilege::User };
    assert_eq!(cpu.access(question, None), Done::Fault);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_table_in_a_block_ends_its_large_leaf_and_keeps_it_from_coming_back() {
    const TABLE: u64 = FIRST + 100;
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    (0..BLOCK).for_each(|page| writes(&mut cpu, FIRST + page));
    assert_eq!(mapped(&mmu).0, 1);
    // Pages from 2048 on by the table.
    write_entry(&mut cpu, TABLE, 7, 20 << 12 | ALL);
    write_entry(&mut cpu, WINDOW + TABLES[2], 4, TABLE << 12 | ALL);
    reads(&mut cpu, 2048 + 7);
    // For reading it is there still.
    let before = mapped(&mmu);
    reads(&mut cpu, FIRST + 300);
    assert_eq!((mapped(&mmu), before.0), (before, 1));
    // The guest writes to the table and is noticed: what was made of it goes when it flushes.
    write_entry(&mut cpu, TABLE, 7, 21 << 12 | ALL);
    assert_eq!(mapped(&mmu).0, 0);
    assert!(mmu.counters().shadow_unsynced > 0);
    cpu.load_cr3(TABLES[0] << 12);
    reads(&mut cpu, 2048 + 7);
    // Whatever is zapped of it, it does not come back while the table is one.
    worker.zap(GfnRange::new(Gfn(FIRST), 100).unwrap());
    (0..BLOCK).filter(|page| *page != 100).for_each(|page| writes(&mut cpu, FIRST + page));
    assert_eq!((mapped(&mmu).0, mapped(&mmu).1 >= BLOCK - 1), (0, true));
    write_entry(&mut cpu, WINDOW + TABLES[2], 4, 0);
    cpu.load_cr3(TABLES[0] << 12);
    worker.zap_all();
    writes(&mut cpu, FIRST + 100);
    assert_eq!(mapped(&mmu).0, 1);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn memory_that_is_taken_in_part_takes_the_whole_leaf() {
    let (mmu, mut worker) = machine();
    let mut cpus = [cpu(&mmu, 0), cpu(&mmu, 1)];
    cpus.iter_mut().for_each(|cpu| writes(cpu, FIRST + 5));
    let invalidation = worker.invalidate(GfnRange::new(Gfn(FIRST + 9), 1).unwrap());
    assert_eq!(mapped(&mmu).0, 0);
    mmu.host().move_frame(Gfn(FIRST + 9));
    // Beside the range small leaves are made, and no large one that would reach into it.
    reads(&mut cpus[0], FIRST + 5);
    assert_eq!(mapped(&mmu).0, 0);
    drop(invalidation);
    for cpu in &mut cpus {
        (0..16).for_each(|page| writes(cpu, FIRST + page));
    }
    assert_eq!(mapped(&mmu).0, 0, "it is in two pieces");
    // In one piece again.
    let invalidation = worker.invalidate(GfnRange::new(Gfn(FIRST), BLOCK).unwrap());
    mmu.host().move_block(0);
    drop(invalidation);
    worker.zap_all();
    cpus.iter_mut().for_each(|cpu| writes(cpu, FIRST + 9));
    assert_eq!(mapped(&mmu).0, 1);
    // A range that is gone through bucket by bucket, and ends in the leaf.
    worker.zap(GfnRange { start: Gfn(0), end: Gfn(FIRST + 1) });
    assert_eq!(mapped(&mmu).0, 0);
    writes(&mut cpus[0], FIRST + 9);
    worker.zap(GfnRange { start: Gfn(FIRST + BLOCK - 1), end: Gfn(1 << 31) });
    assert_eq!(mapped(&mmu).0, 0);
    end(mmu, worker, cpus.into());
}

#[test]
fn a_log_is_of_single_pages() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    for start in [LogStart::Clean, LogStart::AllDirty] {
        writes(&mut cpu, FIRST + 5);
        assert_eq!(mapped(&mmu).0, 1);
        worker
            .start_log(SlotId(1), LogConfig { tracking: Tracking::WriteProtect, start, ..LogConfig::default() })
            .unwrap();
        let harvest = |worker: &mut Worker<ShadowMachine>| {
            let mut words = [0; (BLOCKS * BLOCK / 64) as usize];
            worker.harvest_dirty(SlotId(1), 0, &mut words).unwrap();
            words
        };
        let all = start == LogStart::AllDirty;
        assert_eq!(harvest(&mut worker), [if all { u64::MAX } else { 0 }; 16]);
        // It is read by the large leaf, and written by small ones.
        let before = mapped(&mmu);
        reads(&mut cpu, FIRST + 200);
        assert_eq!((before.0, mapped(&mmu)), (1, before));
        [5, 64, 65, 511].into_iter().for_each(|page| writes(&mut cpu, FIRST + page));
        assert_eq!(mapped(&mmu).0, 0);
        let mut expected = [0; 16];
        (expected[0], expected[1], expected[7]) = (1 << 5, 3, 1 << 63);
        assert_eq!(harvest(&mut worker), expected);
        writes(&mut cpu, FIRST + 6);
        assert_eq!(harvest(&mut worker)[0], 1 << 6);
        // Who has no large leaf yet gets none.
        writes(&mut cpu, SECOND_BLOCK);
        assert_eq!((mapped(&mmu).0, harvest(&mut worker)[8]), (0, 1));
        worker.stop_log(SlotId(1)).unwrap();
        worker.collapse(SlotId(1)).unwrap();
    }
    end(mmu, worker, vec![cpu]);
}

/// In a slot that is logged, no write goes by a large leaf that is not known.
#[test]
fn a_log_that_is_all_dirty_takes_the_right_of_large_leaves_as_it_is_asked() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    writes(&mut cpu, FIRST + 5);
    let config = LogConfig { tracking: Tracking::WriteProtect, start: LogStart::AllDirty, ..LogConfig::default() };
    worker.start_log(SlotId(1), config).unwrap();
    let before = mapped(&mmu);
    writes(&mut cpu, FIRST + 6);
    assert_eq!(mapped(&mmu), before, "all are dirty as it is");
    // One page is taken: it is armed, whatever maps it.
    assert_eq!(worker.clear_dirty(SlotId(1), 0, &[1 << 9]), Ok(1));
    writes(&mut cpu, FIRST + 9);
    let mut words = [0; 1];
    worker.get_dirty(SlotId(1), 0, &mut words).unwrap();
    assert_eq!((words, mapped(&mmu).0), ([u64::MAX], 0));
    worker.stop_log(SlotId(1)).unwrap();
    end(mmu, worker, vec![cpu]);
}

#[test]
fn tracked_pages_have_no_large_leaf_that_is_written() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    writes(&mut cpu, FIRST + 5);
    worker.track_page(AddressSpace::Main, Gfn(FIRST + 7)).unwrap();
    mmu.host().set_tracked(Some(Gfn(FIRST + 7)));
    let request = Request { linear: (FIRST + 7) << 12, access: Access::Write, privilege: KERNEL, pkru: 0 };
    for _ in 0..2 {
        reads(&mut cpu, FIRST + 7);
        assert_eq!(cpu.vcpu.fault(&request), Ok(ShadowOutcome::Tracked { gpa: Gfn(FIRST + 7).gpa() }));
        writes(&mut cpu, FIRST + 8);
        assert_eq!(mapped(&mmu).0, 0);
        worker.zap_all();
    }
    // Others of the slot are not concerned.
    writes(&mut cpu, SECOND_BLOCK);
    assert_eq!(mapped(&mmu).0, 1);
    mmu.host().set_tracked(None);
    worker.untrack_page(AddressSpace::Main, Gfn(FIRST + 7)).unwrap();
    worker.zap_all();
    writes(&mut cpu, FIRST + 7);
    assert_eq!(mapped(&mmu).0, 1);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_read_only_slot_has_large_leaves_that_are_read() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    writes(&mut cpu, FIRST);
    worker.set_slot_flags(SlotId(1), SlotFlags::READ_ONLY).unwrap();
    reads(&mut cpu, FIRST + 1);
    assert_eq!(mapped(&mmu).0, 1);
    let question = Question { linear: (FIRST + 1) << 12, access: Access::Write, privilege: KERNEL };
    assert_eq!(cpu.access(question, None), Done::Elsewhere);
    assert_eq!(mapped(&mmu).0, 1);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn the_age_of_a_large_leaf_is_that_of_each_of_its_pages() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    writes(&mut cpu, FIRST);
    let range = |from: u64, pages| GfnRange::new(Gfn(FIRST + from), pages).unwrap();
    let age = |mapped, young| Age { mapped, young };
    assert_eq!(worker.test_young(AddressSpace::Main, range(0, BLOCK)), age(512, 512));
    assert_eq!(worker.clear_young(AddressSpace::Main, range(500, 100)), age(12, 12));
    assert_eq!(worker.test_young(AddressSpace::Main, range(0, BLOCK)), age(512, 0));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn what_could_be_large_is_zapped_for_faults_to_make_it_so() {
    let (mmu, mut worker) = machine();
    let mut cpu = cpu(&mmu, 0);
    worker.track_page(AddressSpace::Main, Gfn(FIRST + 7)).unwrap();
    for page in [FIRST, FIRST + 100, SECOND_BLOCK] {
        writes(&mut cpu, page);
    }
    let small = mapped(&mmu).1;
    assert_eq!(mapped(&mmu).0, 1);
    // Not while something is in the way, which it is of one block alone.
    worker.collapse(SlotId(1)).unwrap();
    assert_eq!((mapped(&mmu).0, mapped(&mmu).1), (1, small));
    worker.untrack_page(AddressSpace::Main, Gfn(FIRST + 7)).unwrap();
    let invalidation = worker.invalidate(GfnRange::new(Gfn(FIRST + 300), 1).unwrap());
    mmu.host().move_frame(Gfn(FIRST + 300));
    drop(invalidation);
    worker.collapse(SlotId(1)).unwrap();
    assert_eq!(mapped(&mmu).1, small, "its memory is in two pieces");
    let invalidation = worker.invalidate(GfnRange::new(Gfn(FIRST), BLOCK).unwrap());
    mmu.host().move_block(0);
    drop(invalidation);
    writes(&mut cpu, FIRST + 1);
    assert_eq!((mapped(&mmu).0, mapped(&mmu).1), (1, 8));
    worker.collapse(SlotId(1)).unwrap();
    writes(&mut cpu, FIRST + 1);
    assert_eq!((mapped(&mmu).0, mapped(&mmu).1), (2, 0));
    worker.split(SlotId(1)).unwrap();
    assert_eq!(mapped(&mmu).0, 0);
    // (Until the CPU forgets it, it has what was there.)
    cpu.load_cr3(TABLES[0] << 12);
    writes(&mut cpu, FIRST + 300);
    assert_eq!(mapped(&mmu).0, 1);
    end(mmu, worker, vec![cpu]);
}
