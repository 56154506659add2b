//! What single faults in shadow tables do, step by step.

use nestling::guest::{Controls, Privilege, Request, Width};
use nestling::shadow::vcpu::ShadowOutcome;
use nestling::slots::dirty::{LogConfig, LogStart, Tracking};
use nestling::{Access, AddressSpace, Age, Config, Gfn, GfnRange, Mmu, SlotFlags, SlotId, VcpuId, Worker};
use nestling_checks::shadow::cpu::{Done, ShadowCpu};
use nestling_checks::shadow::machine::ShadowMachine;
use nestling_checks::shadow::oracle::Question;
use nestling_checks::shadow::small::{
    ALL, DATA, KERNEL, LARGE, LONG, OTHER_ROOT, READ_ONLY, TABLES, ask, cpu, end, machine, machine_of, write_entry,
};

#[test]
fn a_fault_maps_a_page_and_the_neighbours_that_the_guest_has_used() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
    let counters = mmu.counters();
    assert_eq!((counters.leaves_4k, counters.shadow_prefetched, counters.faults_fixed), (8, 7, 1));
    // The worker takes one away: the others stay.
    assert_eq!(worker.zap(GfnRange::new(Gfn(DATA + 1), 1).unwrap()).leaves, 1);
    assert_eq!(mmu.counters().leaves_4k, 7);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn the_supervisor_writes_to_read_only_pages_without_write_protection_and_the_user_does_not() {
    let (mmu, worker) = machine(64);
    let no_wp = Controls { cr0: LONG.cr0 & !(1 << 16), cr4: LONG.cr4 | 1 << 20, ..LONG };
    let mut cpu = cpu(&mmu, 0, no_wp);
    mmu.host().prepare(Gfn(TABLES[3]), DATA as u32 * 8, Width::Eight, DATA << 12 | READ_ONLY);
    for _ in 0..3 {
        assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Memory);
        // Under SMEP the page stays closed to the supervisor's fetches, and open to the user's.
        assert_eq!(cpu.access(ask(DATA, Access::Execute, KERNEL), None), Done::Fault);
        assert_eq!(cpu.access(ask(DATA, Access::Execute, Privilege::User), None), Done::Memory);
        assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Fault);
    }
    cpu.set_controls(LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Fault, "the bit is set again");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn what_the_supervisor_may_write_over_protection_is_found_of_one_entry() {
    const MARKS: u64 = 1 << 5 | 1 << 6;
    // SMAP keeps the supervisor from the page once it is the user's; where it is not kept, the page is not dirty.
    for smap in [1 << 21, 0] {
        let (mmu, worker) = machine(64);
        let no_wp = Controls { cr0: LONG.cr0 & !(1 << 16), cr4: LONG.cr4 | smap, ..LONG };
        let (entry, offset) = (DATA << 12, DATA as u32 * 8);
        let put = |value| mmu.host().prepare(Gfn(TABLES[3]), offset, Width::Eight, value);
        put(entry | READ_ONLY & !(4 | MARKS));
        let mut cpu = cpu(&mmu, 0, no_wp);
        drop(cpu.vcpu.enter().expect("there is a root"));
        // Another CPU makes it a user's page that nobody has written to.
        mmu.host().write_after_mark(Gfn(TABLES[3]), offset, entry | READ_ONLY & !(1 << 6));
        let request = Request { linear: entry, access: Access::Write, privilege: KERNEL, pkru: 0 };
        assert_eq!(cpu.vcpu.fault(&request), Ok(ShadowOutcome::Retry));
        let read = cpu.access(ask(DATA, Access::Read, KERNEL), None);
        assert_eq!(read == Done::Memory, smap == 0, "{read:?}");
        end(mmu, worker, vec![cpu]);
    }
}

#[test]
fn where_no_entry_can_say_what_the_supervisor_may_the_embedder_executes() {
    let (mmu, worker) = machine(64);
    let controls = Controls { cr0: LONG.cr0 & !(1 << 16), cr4: LONG.cr4 | 1 << 21, ..LONG };
    mmu.host().prepare(Gfn(TABLES[3]), DATA as u32 * 8, Width::Eight, DATA << 12 | READ_ONLY);
    let mut cpu = cpu(&mmu, 0, controls);
    let privilege = Privilege::Supervisor { ac: true };
    drop(cpu.vcpu.enter().expect("there is a root"));
    let request = Request { linear: DATA << 12, access: Access::Write, privilege, pkru: 0 };
    assert_eq!(cpu.vcpu.fault(&request), Ok(ShadowOutcome::Emulate { gpa: Gfn(DATA).gpa() }));
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_load_of_cr3_leaves_the_tables_of_other_address_spaces_as_they_are() {
    // Tables of level 4 to 1 of a root that shares none with the first.
    const APART: [u64; 4] = [6, 7, 8, 9];
    let (mmu, worker) = machine(64);
    let put = |table: u64, page: u32, value| mmu.host().prepare(Gfn(table), page * 8, Width::Eight, value);
    (0..3).for_each(|level| put(APART[level], 0, APART[level + 1] << 12 | ALL));
    (0..64).for_each(|page| put(APART[3], page, u64::from(page) << 12 | ALL));
    let mut cpu = cpu(&mmu, 0, LONG);
    let load = |cpu: &mut ShadowCpu, root: u64| {
        cpu.load_cr3(root << 12);
        drop(cpu.vcpu.enter().expect("there is memory for a root"));
    };
    load(&mut cpu, APART[0]);
    assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Memory);
    load(&mut cpu, TABLES[0]);
    let faults = || mmu.counters().faults_fixed;
    // Writing the other address space's table opens it once, however often this one is loaded.
    write_entry(&mut cpu, APART[3], DATA, (DATA + 1) << 12 | ALL);
    let opened = faults();
    for root in [TABLES[0], OTHER_ROOT, TABLES[0]] {
        load(&mut cpu, root);
        assert_eq!(cpu.access(ask(DATA, Access::Read, KERNEL), None), Done::Memory);
    }
    let before = faults();
    write_entry(&mut cpu, APART[3], DATA, (DATA + 2) << 12 | ALL);
    assert_eq!((faults(), opened > 0), (before, true), "it was brought in step for a root that does not reach it");
    // Its own root's load compares it, and so does each after it was opened again.
    load(&mut cpu, APART[0]);
    for frame in [DATA + 2, DATA + 3] {
        let before = mmu.counters().leaves_zapped;
        assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Memory);
        write_entry(&mut cpu, APART[3], DATA, (frame + 1) << 12 | ALL);
        load(&mut cpu, APART[0]);
        assert!(mmu.counters().leaves_zapped > before, "the old leaf is there still");
    }
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_table_that_is_written_between_any_two_loads_stays_open_for_some_and_is_compared_at_each() {
    const ROUNDS: u64 = 24;
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let opened = || mmu.counters().shadow_unsynced;
    for round in 0..ROUNDS {
        assert_eq!(cpu.access(ask(DATA, Access::Write, KERNEL), None), Done::Memory);
        let before = mmu.counters().leaves_zapped;
        write_entry(&mut cpu, TABLES[3], DATA, (DATA + 1 + round % 2) << 12 | ALL);
        cpu.load_cr3(TABLES[0] << 12);
        drop(cpu.vcpu.enter().expect("there is memory for a root"));
        assert!(mmu.counters().leaves_zapped > before, "the old leaf is there still in round {round}");
    }
    assert!((2..=ROUNDS / 6).contains(&opened()), "it was opened {} times", opened());
    // Nobody writes it any more: some load is the last that compares it.
    for _ in 0..ROUNDS {
        cpu.load_cr3(TABLES[0] << 12);
        drop(cpu.vcpu.enter().expect("there is memory for a root"));
    }
    let before = opened();
    write_entry(&mut cpu, TABLES[3], DATA, DATA << 12 | ALL);
    assert_eq!(opened(), before + 1, "it was open still");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn going_back_and_forth_between_roots_makes_none() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let no_wp = Controls { cr0: LONG.cr0 & !(1 << 16), ..LONG };
    let mut made = Vec::new();
    for _ in 0..4 {
        for (root, controls) in [(TABLES[0], LONG), (OTHER_ROOT, LONG), (TABLES[0], no_wp)] {
            cpu.load_cr3(root << 12);
            cpu.set_controls(controls);
            assert_eq!(cpu.access(ask(DATA, Access::Read, KERNEL), None), Done::Memory);
        }
        made.push(mmu.counters().roots_made);
    }
    assert!(made.windows(2).all(|pair| pair[0] == pair[1]), "{made:?}");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_table_that_is_written_and_not_used_is_taken_for_data() {
    const TABLE: u64 = 9;
    let (mmu, worker) = machine(64);
    let put = |table: u64, entry: u64, frame| {
        mmu.host().prepare(Gfn(table), entry as u32 * 8, Width::Eight, frame << 12 | ALL);
    };
    put(TABLES[2], 1, TABLE);
    put(TABLE, DATA, DATA);
    let (mut one, mut other) = (cpu(&mmu, 0, LONG), cpu(&mmu, 1, LONG));
    for round in 0..8 {
        write_entry(&mut one, OTHER_ROOT, 9, round << 12);
        // Brings it in step again, and uses it for nothing.
        for root in [OTHER_ROOT, TABLES[0]] {
            other.load_cr3(root << 12);
            drop(other.vcpu.enter().expect("there is memory for a root"));
        }
    }
    let counters = mmu.counters();
    assert!(counters.shadow_unsynced >= 3, "{counters:?}");
    // A page that a vCPU keeps as a root is never taken for data.
    assert_eq!(counters.shadow_flooded, 0, "{counters:?}");
    drop(other);
    assert_eq!(one.access(ask(512 + DATA, Access::Read, KERNEL), None), Done::Memory);
    // Having been opened twice, it stays open for some loads.
    for round in 0..32 {
        write_entry(&mut one, TABLE, 9, round << 12);
        one.load_cr3(TABLES[0] << 12);
    }
    assert_eq!(mmu.counters().shadow_flooded, 1);
    end(mmu, worker, vec![one]);
}

/// A frame has room for 128 roots of PAE. More of them are in use here than may be out of step at once, as by a guest of many
/// CPUs whose processes' roots lie side by side; it can be written all the same.
#[test]
fn a_frame_of_more_roots_in_use_than_may_be_out_of_step_can_be_written() {
    const CPUS: u16 = 32;
    const ROOTS: u32 = 128;
    let (mmu, worker) = machine_of(1024, CPUS);
    let pae = Controls { efer: 1 << 11, ..LONG };
    let pointer = TABLES[2] << 12 | 1;
    (0..ROOTS).for_each(|root| mmu.host().prepare(Gfn(TABLES[0]), root * 32, Width::Eight, pointer));
    let mut cpus: Vec<_> = (0..CPUS).map(|id| cpu(&mmu, id, pae)).collect();
    // Each keeps the last four that it was on.
    for root in 0..ROOTS as usize {
        let cpu = &mut cpus[root / 4];
        cpu.load_cr3(TABLES[0] << 12 | root as u64 * 32);
        assert_eq!(cpu.access(ask(DATA, Access::Read, KERNEL), None), Done::Memory);
    }
    // The second gibibyte of the first root is where the first is.
    let request = Request { linear: TABLES[0] << 12, access: Access::Write, privilege: KERNEL, pkru: 0 };
    let written = (0..100).any(|_| {
        drop(cpus[0].vcpu.enter().expect("it goes on"));
        cpus[0].vcpu.fault(&request) == Ok(ShadowOutcome::Fixed)
    });
    assert!(written, "after a hundred faults it is not: {:?}", mmu.counters());
    write_entry(&mut cpus[0], TABLES[0], 124 * 4 + 1, pointer);
    for (number, cpu) in cpus.iter_mut().enumerate() {
        cpu.load_cr3(TABLES[0] << 12 | 124 * 32);
        let question = Question { linear: 1 << 30 | DATA << 12, access: Access::Write, privilege: KERNEL };
        assert_eq!(cpu.access(question, None), Done::Memory, "CPU {number}");
    }
    end(mmu, worker, cpus);
}

#[test]
fn large_pages_of_the_guest_are_runs_of_small_ones() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    mmu.host().prepare(Gfn(TABLES[2]), 8, Width::Eight, ALL | LARGE);
    for page in [0, 17, 63] {
        assert_eq!(cpu.access(ask(512 + page, Access::Write, Privilege::User), None), Done::Memory);
    }
    assert_eq!(cpu.access(ask(512 + 64, Access::Write, Privilege::User), None), Done::Elsewhere, "no memory there");
    assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
    // The frames that are tables are not writable by the large page either, but out of step once they are.
    let before = mmu.counters().shadow_unsynced;
    let store = Some((DATA as u32 * 8, Width::Eight, 0));
    assert_eq!(cpu.access(ask(512 + TABLES[3], Access::Write, Privilege::User), store), Done::Memory);
    assert!(mmu.counters().shadow_unsynced > before);
    cpu.invlpg(DATA << 12);
    assert_eq!(cpu.access(ask(DATA, Access::Read, KERNEL), None), Done::Fault);
    worker.zap_all();
    assert_eq!(cpu.access(ask(512 + 17, Access::Write, Privilege::User), None), Done::Memory);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_frame_that_is_mapped_from_thousands_of_places_stays_cheap_and_is_found_in_all() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    // Ten tables in frames 40 to 49, each with 512 entries for the same page.
    for table in 0..10 {
        mmu.host().prepare(Gfn(TABLES[2]), (2 + table) * 8, Width::Eight, (40 + u64::from(table)) << 12 | ALL);
        (0..512).for_each(|entry| {
            mmu.host().prepare(Gfn(40 + u64::from(table)), entry * 8, Width::Eight, DATA << 12 | ALL);
        });
    }
    let mut most = 0;
    for page in (1024..1024 + 10 * 512).step_by(7) {
        assert_eq!(cpu.access(ask(page, Access::Write, Privilege::User), None), Done::Memory);
        most = mmu.counters().leaves_4k.max(most);
    }
    assert!((500..1100).contains(&most), "{most} places");
    // Up to the middle of the next crowd.
    for page in (1024..1024 + 4 * 512).step_by(7) {
        assert_eq!(cpu.access(ask(page, Access::Write, Privilege::User), None), Done::Memory);
    }
    let invalidation = worker.invalidate(GfnRange::new(Gfn(DATA), 1).unwrap());
    mmu.host().move_frame(Gfn(DATA));
    drop(invalidation);
    for page in (1024..1024 + 10 * 512).step_by(97) {
        assert_eq!(cpu.access(ask(page, Access::Read, Privilege::User), None), Done::Memory);
    }
    end(mmu, worker, vec![cpu]);
}

#[test]
fn the_quota_is_kept_and_what_it_takes_comes_back() {
    let (mmu, worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    // 40 tables, each under entries of 8 different rights: 320 pages.
    (24..64).for_each(|table| mmu.host().prepare(Gfn(table), 0, Width::Eight, DATA << 12 | ALL));
    let entries: Vec<u64> = (0..320).map(|n| (24 + n / 8) << 12 | 0x61 | (n & 3) << 1 | (n & 4) << 61).collect();
    for (entry, value) in (1..).zip(&entries) {
        mmu.host().prepare(Gfn(TABLES[2]), entry * 8, Width::Eight, *value);
    }
    for _ in 0..2 {
        for entry in 1..=320 {
            assert_eq!(cpu.access(ask(entry << 9, Access::Read, KERNEL), None), Done::Memory, "{entry}");
            let metadata = mmu.shadow_metadata().expect("it is enabled");
            assert!(metadata.pages <= 64, "{metadata:?}");
        }
    }
    assert!(mmu.counters().shadow_recycled > 400);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn writes_through_shadow_tables_are_logged() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    let config = LogConfig { tracking: Tracking::WriteProtect, start: LogStart::Clean, ..LogConfig::default() };
    worker.start_log(SlotId(0), config).expect("the slot has no log");
    let mut words = [0; 1];
    let mut harvest = |worker: &mut Worker<ShadowMachine>| {
        worker.harvest_dirty(SlotId(0), 0, &mut words).expect("the slot has a log");
        words[0]
    };
    assert_eq!(harvest(&mut worker), 0);
    for _ in 0..3 {
        assert_eq!(cpu.access(ask(DATA + 1, Access::Read, Privilege::User), None), Done::Memory);
        assert_eq!(harvest(&mut worker), 0);
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
        assert_eq!(harvest(&mut worker), 1 << DATA);
    }
    // A mark that the walk sets in the guest's table is a write as well.
    mmu.host().prepare(Gfn(TABLES[3]), 30 * 8, Width::Eight, 30 << 12 | 7);
    assert_eq!(cpu.access(ask(30, Access::Read, Privilege::User), None), Done::Memory);
    assert_eq!(harvest(&mut worker), 1 << TABLES[3]);
    worker.stop_log(SlotId(0)).expect("the slot has a log");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_log_that_starts_all_dirty_is_cleared_by_a_mask() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    for tracking in [Tracking::WriteProtect, Tracking::DirtyBit] {
        let config = LogConfig { tracking, start: LogStart::AllDirty, ..LogConfig::default() };
        worker.start_log(SlotId(0), config).expect("the slot has no log");
        let mut words = [0; 1];
        let mut get = |worker: &mut Worker<ShadowMachine>| {
            worker.get_dirty(SlotId(0), 0, &mut words).expect("the slot has a log");
            words[0]
        };
        assert_eq!(get(&mut worker), u64::MAX);
        let mask = 3 << DATA;
        assert_eq!(worker.clear_dirty(SlotId(0), 0, &[mask]), Ok(2));
        assert_eq!(get(&mut worker), !mask, "nothing was written since");
        assert_eq!(cpu.access(ask(DATA + 1, Access::Read, Privilege::User), None), Done::Memory);
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
        assert_eq!(get(&mut worker), !mask | 1 << DATA);
        // A leaf that was not cleared is not armed: its bit is set already.
        let before = mmu.counters().faults_fixed;
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
        assert_eq!(mmu.counters().faults_fixed, before);
        worker.stop_log(SlotId(0)).expect("the slot has a log");
    }
    end(mmu, worker, vec![cpu]);
}

#[test]
fn ages_are_those_of_the_leaves_and_go_with_a_look() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    let all = GfnRange::new(Gfn(0), 64).unwrap();
    assert_eq!(worker.test_young(AddressSpace::Main, all), Age::default());
    assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
    // Its seven neighbours were mapped, and not used yet.
    let age = |mapped, young| Age { mapped, young };
    assert_eq!(worker.test_young(AddressSpace::Main, all), age(8, 1));
    assert_eq!(worker.clear_young(AddressSpace::Main, GfnRange::new(Gfn(0), DATA).unwrap()).young, 0);
    assert_eq!(worker.clear_young(AddressSpace::Main, all), age(8, 1));
    assert_eq!(worker.clear_young(AddressSpace::Main, all), age(8, 0));
    assert_eq!(worker.test_young(AddressSpace::Smm, all), Age::default());
    // The guest's own bit is not what was asked about, and stays.
    worker.zap(all);
    assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
    assert_eq!(worker.test_young(AddressSpace::Main, all).young, 1);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn writes_to_tracked_pages_are_the_embedders() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    for page in [DATA, DATA + 8] {
        assert_eq!(cpu.access(ask(page, Access::Write, Privilege::User), None), Done::Memory);
    }
    worker.track_page(AddressSpace::Main, Gfn(DATA)).expect("there is memory");
    let request = Request { linear: DATA << 12, access: Access::Write, privilege: Privilege::User, pkru: 0 };
    for _ in 0..2 {
        assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
        assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Elsewhere);
        assert_eq!(cpu.vcpu.fault(&request), Ok(ShadowOutcome::Tracked { gpa: Gfn(DATA).gpa() }));
        assert_eq!(cpu.access(ask(DATA + 8, Access::Write, Privilege::User), None), Done::Memory);
        // Whatever makes the leaf anew finds it tracked still, as a neighbour and by itself.
        worker.zap(GfnRange::new(Gfn(DATA), 1).unwrap());
        assert_eq!(cpu.access(ask(DATA + 1, Access::Write, Privilege::User), None), Done::Memory);
    }
    worker.untrack_page(AddressSpace::Main, Gfn(DATA)).expect("it is tracked");
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    assert_eq!(mmu.counters().faults_tracked, 4);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn a_slot_that_becomes_read_only_is_read_and_not_written() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    worker.set_slot_flags(SlotId(0), SlotFlags::READ_ONLY).expect("the slot is there");
    // The guest's tables are in the same slot: their marks can not be set either, and are there already.
    assert_eq!(cpu.access(ask(DATA, Access::Read, Privilege::User), None), Done::Memory);
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Elsewhere);
    let request = Request { linear: DATA << 12, access: Access::Write, privilege: Privilege::User, pkru: 0 };
    assert_eq!(cpu.vcpu.fault(&request), Ok(ShadowOutcome::ReadOnly { gpa: Gfn(DATA).gpa() }));
    worker.set_slot_flags(SlotId(0), SlotFlags::empty()).expect("the slot is there");
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    end(mmu, worker, vec![cpu]);
}

#[test]
fn who_must_not_block_does_not_invalidate_what_is_shadowed() {
    let (mmu, mut worker) = machine(64);
    assert!(worker.try_invalidate(GfnRange::new(Gfn(DATA), 1).unwrap()).is_err());
    end(mmu, worker, vec![]);
}

#[test]
fn nothing_is_left_of_memory_that_was_taken_away() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    assert_eq!(cpu.access(ask(DATA, Access::Write, Privilege::User), None), Done::Memory);
    worker.delete_slot(SlotId(0)).expect("the slot is there");
    let metadata = mmu.shadow_metadata().expect("it is enabled");
    assert_eq!((metadata.pages, mmu.counters().leaves_4k), (0, 0), "no table of the guest is in memory any more");
    end(mmu, worker, vec![cpu]);
}

#[test]
fn when_its_cpus_are_gone_and_its_memory_is_deleted_nothing_of_a_guest_is_left() {
    let (mmu, mut worker) = machine(64);
    let mut cpus = [cpu(&mmu, 0, LONG), cpu(&mmu, 1, LONG)];
    for (page, cpu) in (DATA..).zip(&mut cpus) {
        assert_eq!(cpu.access(ask(page, Access::Write, Privilege::User), None), Done::Memory);
        cpu.load_cr3(OTHER_ROOT << 12);
        assert_eq!(cpu.access(ask(page, Access::Read, Privilege::User), None), Done::Memory);
    }
    let now = mmu.shadow_metadata().expect("it is enabled");
    assert_eq!(
        (now.pages, now.mappings, now.handles),
        (5, 8, 4),
        "two roots over three tables, and eight pages of data"
    );
    drop(cpus);
    assert_eq!(mmu.shadow_metadata().expect("it is enabled").handles, 0);
    worker.delete_slot(SlotId(0)).expect("the slot is there");
    let left = mmu.shadow_metadata().expect("it is enabled");
    assert_eq!((left.pages, left.mappings, left.handles), (0, 0, 0));
    end(mmu, worker, vec![]);
}

#[test]
fn what_is_never_shadowed_costs_nothing() {
    let machine = ShadowMachine::new(8, 0);
    let mmu = Mmu::new(machine, Config::default()).expect("the configuration is right");
    assert_eq!(mmu.shadow_metadata(), None);
    assert!(mmu.shadow_vcpu(VcpuId(0)).expect("there is memory").is_none());
}
