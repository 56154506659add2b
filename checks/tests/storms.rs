//! Many threads at once, with the adversarial TLB.
//!
//! Two million operations beside dirty logs, in a few minutes:
//! `NESTLING_DEEP=2 cargo test --release -p nestling-checks --test storms what_logs_tell`.

use nestling::format::{Ept, Npt};
use nestling::{Level, SlotZap};
use nestling_checks::machine::cpu::Cpu;
use nestling_checks::machine::fence::Fences;
use nestling_checks::program::storm::{Plan, Report, run};
use nestling_checks::scene::{assert_none, deep};

const OPERATIONS: u64 = 600;

fn storms<F: Cpu>(name: &str, plan: Plan) {
    for round in 0..1 + deep() * 20 {
        let plan = Plan { seed: plan.seed + round, ..plan };
        let Report { violations, accesses, hits, operations, answers, ring_entries, counters } = run::<F>(plan);
        println!("{name}: {plan:?}");
        println!("    {accesses} accesses, {hits} by the TLB alone, {operations} operations, {counters:?}");
        println!("    {answers:?}, {ring_entries} entries of rings");
        assert_none(&violations);
        assert!(counters.zap_alls > 0 || plan.only_zaps, "no zap of everything in {plan:?}");
        assert!(operations > 0 && accesses > 0 && counters.leaves_zapped > 0, "nothing happened in {plan:?}");
    }
}

#[test]
fn npt_two_vcpus_two_workers() {
    storms::<Npt>("npt", Plan::new(1, OPERATIONS));
}

#[test]
fn ept_four_vcpus_one_worker_five_levels() {
    let plan = Plan { vcpus: 4, workers: 1, root_level: Level::L5, ..Plan::new(100, OPERATIONS) };
    storms::<Ept>("ept", plan);
}

#[test]
fn npt_small_leaves_three_workers() {
    storms::<Npt>("npt 4K", Plan { workers: 3, largest: Level::K4, ..Plan::new(203, OPERATIONS) });
}

#[test]
fn ept_asymmetric_fences() {
    match Fences::asymmetric() {
        Some(fences) => storms::<Ept>("ept membarrier", Plan { fences, vcpus: 3, ..Plan::new(301, OPERATIONS) }),
        None => println!("this kernel has no membarrier(2): the full pair is covered by the other storms"),
    }
}

#[test]
fn npt_roles_and_zap_all_at_slot_changes() {
    storms::<Npt>("npt roles", Plan { roles: true, slot_zap: SlotZap::Everything, ..Plan::new(401, OPERATIONS) });
}

#[test]
fn npt_dirty_logs() {
    let plan = Plan { logs: true, roles: true, workers: 3, largest: Level::M2, ..Plan::new(601, OPERATIONS) };
    storms::<Npt>("npt logs", plan);
}

#[test]
fn ept_dirty_logs_of_one_role() {
    storms::<Ept>("ept logs", Plan { logs: true, ..Plan::new(701, OPERATIONS) });
}

/// Zaps of the same few ranges by several workers: who finds an entry gone must not conclude that no TLB has it.
#[test]
fn ept_zaps_that_meet() {
    let plan = Plan { only_zaps: true, workers: 3, vcpus: 3, largest: Level::M2, ..Plan::new(501, 2 * OPERATIONS) };
    storms::<Ept>("ept zaps", plan);
}

/// No write is missing from what dirty logs tell, and nothing is told that nobody tried to write since: while vCPUs write,
/// devices write, rings are emptied, and others zap and invalidate. `checks/src/ghost/dirty.rs` says what that means.
fn what_logs_tell<F: Cpu>(first_seed: u64) {
    let (mut operations, mut told, mut excused, mut clean, mut ring_entries) = (0, 0, 0, 0, 0);
    let wanted = if deep() > 0 { deep() * 500_000 } else { 30_000 };
    for seed in first_seed.. {
        let plan = Plan {
            logs: true,
            vcpus: 2 + (seed % 3) as u16,
            // One alone, so that nothing is removed while a log is asked; or others that zap and invalidate.
            workers: 1 + (seed / 3 % 3) as u16,
            roles: seed % 4 == 1,
            largest: [Level::M2, Level::K4, Level::M2, Level::G1][(seed % 4) as usize],
            slot_zap: if seed % 5 == 0 { SlotZap::Everything } else { SlotZap::Slot },
            accesses: 1500,
            ..Plan::new(seed, OPERATIONS)
        };
        let report = run::<F>(plan);
        assert!(report.violations.is_empty(), "{plan:?}: {}", report.violations[0]);
        operations += report.accesses + report.operations;
        told += report.answers.told;
        excused += report.answers.excused;
        clean += report.answers.clean;
        ring_entries += report.ring_entries;
        if operations >= wanted {
            break;
        }
    }
    println!(
        "{}: {operations} operations, {told} pages told ({excused} of them while a write or a removal was under way), \
         {clean} not, {ring_entries} entries of rings",
        F::NAME
    );
    assert!(told > 0 && clean > 0 && ring_entries > 0, "nothing was told");
    assert!(
        excused * 2 < told,
        "{excused} of {told} pages were told while a write or a removal of theirs was under way"
    );
}

#[test]
fn what_logs_tell_is_what_was_written_npt() {
    what_logs_tell::<Npt>(10_000);
}

#[test]
fn what_logs_tell_is_what_was_written_ept() {
    what_logs_tell::<Ept>(20_000);
}
