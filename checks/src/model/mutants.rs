//! Which scenarios are to find which mutant.
//!
//! A mutant is on for a whole process, so each is run in one of its own (the `mutants` program); this is the table and
//! what such a process does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nestling_loom::mutants::{Mutant, activate};

use super::{Bounds, SCENARIOS, explore};

/// A mutant, and what is run against it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The name that the program prints.
    pub name: &'static str,
    /// The bug.
    pub mutant: Mutant,
    /// Scenarios in which it must show, in the order in which they are tried.
    pub scenarios: &'static [&'static str],
    /// Preemptions that it needs.
    pub preemptions: usize,
}

const GUEST_ZAP: &str = "guest beside zap";
const GUEST_ZAP_ALL: &str = "guest beside zap-all";
const GUEST_DELETE: &str = "guest beside slot delete";
const FAULTS_DELETE: &str = "guest that faults beside slot delete";
const FAULTS_MOVE: &str = "guest that faults beside invalidation";
const COMES_BACK: &str = "guest that comes back beside invalidation";
const GUEST_MOVE: &str = "guest beside invalidation";
const FAULT_ZAP: &str = "fault beside zap";
const ROLES: &str = "guest of two roles beside zap-all";

const fn case(name: &'static str, mutant: Mutant, scenarios: &'static [&'static str], preemptions: usize) -> Case {
    Case { name, mutant, scenarios, preemptions }
}

/// All of them.
pub const CASES: &[Case] = &[
    case("request-after-unlock", Mutant::RequestAfterUnlock, &[GUEST_ZAP_ALL], 2),
    case("kick-without-waiting", Mutant::KickWithoutWaiting, &[GUEST_MOVE, GUEST_DELETE], 2),
    case("local-flush-only", Mutant::LocalFlushOnly, &[GUEST_MOVE, GUEST_DELETE], 2),
    case("notifier-on-valid-roots-only", Mutant::NotifierOnValidRootsOnly, &["zap-all beside invalidation"], 2),
    case("free-before-flush", Mutant::FreeBeforeFlush, &[GUEST_ZAP], 2),
    case("free-without-grace-period", Mutant::FreeWithoutGracePeriod, &[FAULT_ZAP], 2),
    case("thaw-before-flush", Mutant::ThawBeforeFlush, &["guest, zap and zap in the zap"], 2),
    case("frozen-filled", Mutant::FrozenFilled, &[FAULT_ZAP], 2),
    case("leaf-changed-in-place", Mutant::LeafChangedInPlace, &[GUEST_MOVE], 2),
    case("retry-test-before-the-lock-only", Mutant::RetryTestBeforeTheLockOnly, &[FAULTS_MOVE], 2),
    case("slots-tested-before-the-lock-only", Mutant::SlotsTestedBeforeTheLockOnly, &[FAULTS_DELETE], 1),
    case("sequence-truncated", Mutant::SequenceTruncated, &["guest beside two invalidations"], 2),
    case("fault-into-obsolete-root", Mutant::FaultIntoObsoleteRoot, &["fault beside zap-all"], 2),
    case("obsolete-roots-not-emptied", Mutant::ObsoleteRootsNotEmptied, &["fault beside zap-all"], 1),
    case("previous-roots-judged-by-current", Mutant::PreviousRootsJudgedByCurrent, &[ROLES], 2),
    case("current-roots-dropped", Mutant::CurrentRootsDropped, &["root load and free beside zap-all"], 2),
    case(
        "slots-swapped-during-invalidation",
        Mutant::SlotsSwappedDuringInvalidation,
        &["guest at the new place, slot move and invalidation"],
        1,
    ),
    case("mode-after-the-look", Mutant::ModeAfterTheLook, &[COMES_BACK], 2),
    case("exclusive-without-fence", Mutant::ExclusiveWithoutFence, &[FAULTS_MOVE], 2),
    case("exclusive-without-waiting", Mutant::ExclusiveWithoutWaiting, &[FAULTS_MOVE], 2),
    case("unlinked-table-not-seized", Mutant::UnlinkedTableNotSeized, &[FAULT_ZAP], 2),
];

/// Turns the mutant on and runs its scenarios. Returns if none of them finds it; otherwise panics in one, whose name and
/// number of executions `progress` tells.
pub fn hunt(case: &Case, progress: &Progress) {
    activate(case.mutant);
    for name in case.scenarios {
        let scenario = SCENARIOS.iter().find(|scenario| scenario.name == *name).expect("the table names scenarios");
        *progress.scenario.lock().unwrap() = scenario.name;
        progress.executions.store(0, Ordering::Relaxed);
        let bounds = Bounds { preemptions: Some(case.preemptions), limit: Duration::from_secs(50) };
        explore(scenario, bounds, &progress.executions);
    }
}

/// How far a hunt is.
#[derive(Debug, Default)]
pub struct Progress {
    /// The scenario that is being explored.
    pub scenario: std::sync::Mutex<&'static str>,
    /// Its executions so far.
    pub executions: Arc<AtomicU64>,
}
