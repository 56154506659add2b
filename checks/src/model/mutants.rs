//! Which scenarios are to find which mutant, and which bugs no mutant can be made of.
//!
//! A mutant is on for a whole process, so each is run in one of its own (the `mutants` program); this is the table and
//! what such a process does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nestling_loom::mutants::{Mutant, activate};
use nestling_shuttle::mutants::Mutant as Far;

use super::scenarios::long;
use super::under_shuttle::{self, Effort};
use super::{Bounds, SCENARIOS, SHADOW_SCENARIOS, ShadowScenario, explore, explore_shadow};
use crate::rules::{RULES, Rule};

/// A mutant, and what is run against it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The name that the program prints.
    pub name: &'static str,
    /// What is to find it.
    pub check: Check,
}

/// A bug, and where it must show.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// Every interleaving of small scenarios.
    Loom {
        /// The bug.
        mutant: Mutant,
        /// The scenarios, in the order in which they are tried.
        scenarios: &'static [&'static str],
        /// Preemptions that it needs.
        preemptions: usize,
    },
    /// Every interleaving of a scenario of shadow paging.
    ShadowLoom {
        /// The bug.
        mutant: Mutant,
        /// The scenario.
        scenario: &'static str,
        /// Preemptions that it needs.
        preemptions: usize,
    },
    /// Random schedules of a scenario of shadow paging.
    ShadowShuttle {
        /// The bug.
        mutant: Far,
        /// The scenario.
        scenario: &'static str,
    },
    /// Random schedules of a long scenario.
    Shuttle {
        /// The bug.
        mutant: Far,
        /// The scenario.
        scenario: &'static str,
    },
}

const GUEST_ZAP: &str = "guest beside zap";
const GUEST_ZAP_ALL: &str = "guest beside zap-all";
const GUEST_DELETE: &str = "guest beside slot delete";
const FAULTS_DELETE: &str = "guest that faults beside slot delete";
const FAULTS_MOVE: &str = "guest that faults beside invalidation";
const COMES_BACK: &str = "guest that comes back beside invalidation";
const GUEST_MOVE: &str = "guest beside invalidation";
const WRITES_HARVEST: &str = "writes beside harvest, by protection";
const FAULT_ZAP: &str = "fault beside zap";
const ROLES: &str = "guest of two roles beside zap-all";

const fn case(name: &'static str, mutant: Mutant, scenarios: &'static [&'static str], preemptions: usize) -> Case {
    Case { name, check: Check::Loom { mutant, scenarios, preemptions } }
}

/// One for a long scenario.
const fn far(name: &'static str, mutant: Far, scenario: &'static str) -> Case {
    Case { name, check: Check::Shuttle { mutant, scenario } }
}

/// One for a scenario of shadow paging, in all its interleavings.
const fn shadow(name: &'static str, mutant: Mutant, scenario: &'static str, preemptions: usize) -> Case {
    Case { name, check: Check::ShadowLoom { mutant, scenario, preemptions } }
}

/// One for a scenario of shadow paging, in random schedules.
const fn shadow_far(name: &'static str, mutant: Far, scenario: &'static str) -> Case {
    Case { name, check: Check::ShadowShuttle { mutant, scenario } }
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
    case("snapshot-after-backing", Mutant::SnapshotAfterBacking, &[FAULTS_MOVE], 2),
    case(
        "slot-without-grace-period",
        Mutant::SlotWithoutGracePeriod,
        &["fault beside slot delete", GUEST_DELETE, FAULTS_DELETE],
        3,
    ),
    case("frozen-by-another-not-flushed", Mutant::FrozenByAnotherNotFlushed, &["guest, zap and zap in the zap"], 2),
    case("unlinked-table-leaked", Mutant::UnlinkedTableLeaked, &[GUEST_ZAP], 1),
    case("root-of-another-role", Mutant::RootOfAnotherRole, &[ROLES], 1),
    case("enter-relaxed", Mutant::EnterRelaxed, &["fault beside slot delete"], 3),
    case("leave-relaxed", Mutant::LeaveRelaxed, &[FAULTS_DELETE], 2),
    case("shared-without-look", Mutant::SharedWithoutLook, &[FAULTS_MOVE], 2),
    case("guest-waits-for-writer", Mutant::GuestWaitsForWriter, &["guest that stays beside zap-all"], 2),
    case("requests-before-mode", Mutant::RequestsBeforeMode, &["zap-all, then invalidation beside one turn"], 3),
    case("dirty-bit-dropped-by-zap", Mutant::DirtyBitDroppedByZap, &["writes beside zap, by dirty bit"], 2),
    case("dirty-before-writable", Mutant::DirtyBeforeWritable, &[WRITES_HARVEST], 2),
    case("dirty-handed-out-before-flush", Mutant::DirtyHandedOutBeforeFlush, &[WRITES_HARVEST], 2),
    case("protected-without-flush", Mutant::ProtectedWithoutFlush, &[WRITES_HARVEST], 2),
    case(
        "dirty-bit-cleared-where-protection-tracks",
        Mutant::DirtyBitClearedWhereProtectionTracks,
        &["writes beside harvest, without dirty bits", WRITES_HARVEST],
        2,
    ),
    case("software-bits-lost", Mutant::SoftwareBitsLost, &["writes beside split", WRITES_HARVEST], 1),
    case("unlinked-table-not-seized", Mutant::UnlinkedTableNotSeized, &[FAULT_ZAP], 2),
    shadow("shadow-role-not-compared", Mutant::ShadowRoleNotCompared, "one table in two roles", 1),
    shadow("shadow-access-not-inherited", Mutant::ShadowAccessNotInherited, "one table in two roles", 1),
    shadow_far("shadow-fault-not-fresh", Far::ShadowFaultNotFresh, "shadow fault beside invalidation"),
    shadow("shadow-linked-out-of-step", Mutant::ShadowLinkedOutOfStep, "link of what is out of step", 1),
    shadow_far("shadow-unsync-after-writable", Far::ShadowUnsyncAfterWritable, "a table becomes writable twice"),
    shadow_far("shadow-entry-not-read-again", Far::ShadowEntryNotReadAgain, "fault beside sync"),
    shadow_far("shadow-page-without-flush", Far::ShadowPageWithoutFlush, "sync beside writes that go on"),
    shadow_far("shadow-slot-not-zapped", Far::ShadowSlotNotZapped, "shadow fault beside slot delete"),
    shadow("shadow-unmapped-by-guest-entry", Mutant::ShadowUnmappedByGuestEntry, "unsync beside sync", 1),
    shadow("shadow-link-without-look", Mutant::ShadowLinkWithoutLook, "load of a root beside link below it", 2),
    shadow("shadow-link-unnoticed", Mutant::ShadowLinkUnnoticed, "link of a table that is out of step", 1),
    shadow("shadow-large-over-table", Mutant::ShadowLargeOverTable, "large leaf beside link of a table under it", 1),
    shadow_far(
        "shadow-large-decided-early",
        Far::ShadowLargeDecidedEarly,
        "large leaf beside link of a table under it",
    ),
    shadow("shadow-large-fresh-in-part", Mutant::ShadowLargeFreshInPart, "large leaf beside invalidation of a part", 2),
    shadow_far("shadow-neighbours-not-fresh", Far::ShadowNeighboursNotFresh, "neighbours beside invalidation"),
    shadow_far("shadow-tag-kept-behind", Far::ShadowTagKeptBehind, "loads of two roots beside invalidation"),
    shadow("shadow-looked-once", Mutant::ShadowLookedOnce, "writes below a link that stays", 1),
    shadow_far("shadow-listed-before-marked", Far::ShadowListedBeforeMarked, "link of a table that is being opened"),
    shadow_far("shadow-opened-again-unnoticed", Far::ShadowOpenedAgainUnnoticed, "sync, sync and writes"),
    shadow_far("shadow-leaf-overwritten", Far::ShadowLeafOverwritten, "a leaf of another frame"),
    // Some of them again, to show that the long scenarios can see.
    far("request-after-unlock-in-a-long-run", Far::RequestAfterUnlock, "fault beside zap-all"),
    far("kick-without-waiting-in-a-long-run", Far::KickWithoutWaiting, "fault beside zap"),
    far("free-without-grace-period-in-a-long-run", Far::FreeWithoutGracePeriod, "zap beside root free"),
    far("leaf-changed-in-place-in-a-long-run", Far::LeafChangedInPlace, "zap beside invalidation"),
    far("slots-tested-before-the-lock-only-in-a-long-run", Far::SlotsTestedBeforeTheLockOnly, "zap beside slot delete"),
    far("exclusive-without-waiting-in-a-long-run", Far::ExclusiveWithoutWaiting, "zap beside invalidation"),
];

/// A bug of the past that the types rule out: there is no way to put it back that compiles.
#[derive(Clone, Copy, Debug)]
pub struct RuledOut {
    /// The name that the program prints.
    pub name: &'static str,
    /// The program that would be it, in `checks/rules`.
    pub rule: &'static str,
}

impl RuledOut {
    /// The program and what the compiler says of it; `None` if there is none, or it is not what it should be.
    pub fn rule(&self) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.name == self.rule && rule.error().starts_with("error"))
    }
}

const fn ruled_out(name: &'static str, rule: &'static str) -> RuledOut {
    RuledOut { name, rule }
}

/// All of them.
pub const RULED_OUT: &[RuledOut] = &[
    ruled_out("yield-before-the-request", "roots_marked_invalid_without_the_request"),
    ruled_out("roots-invalidated-beside-faults", "roots_invalidated_on_the_shared_side"),
    ruled_out("all-roots-walked-beside-invalidation", "all_roots_from_the_shared_side"),
    ruled_out("slot-gone-before-its-mappings", "slot_finished_without_a_zap"),
    ruled_out("slot-gone-from-valid-roots-only", "slot_finished_after_a_zap_of_valid_roots"),
    ruled_out("roots-emptied-by-two", "defunct_roots_emptied_twice"),
    ruled_out("roots-left-to-the-last-put", "defunct_roots_left_alone"),
    ruled_out("roots-put-before-they-are-empty", "defunct_roots_put_before_they_are_empty"),
    ruled_out("walk-continued-after-a-yield", "walk_continued_after_a_yield"),
    ruled_out("flush-lost-with-its-hold", "hold_forgotten_with_its_debts"),
    ruled_out("armed-without-owing", "page_armed_without_a_debt"),
    ruled_out("zapped-without-owing", "entry_frozen_outside_a_hold"),
    ruled_out("thawed-without-a-flush", "entry_thawed_before_its_flush"),
    ruled_out("freed-without-a-flush", "table_freed_before_its_flush"),
    ruled_out("entry-overwritten", "entry_stored_to"),
    ruled_out("table-walked-without-the-mark", "entry_read_without_the_mark"),
    ruled_out("table-kept-after-leaving", "entry_read_after_leaving"),
    ruled_out("lock-taken-twice", "inside_twice"),
    ruled_out("shadow-page-zapped-after-the-look", "shadow_answer_kept_over_a_zap"),
    ruled_out("shadow-locks-in-a-cycle", "shadow_page_locked_under_a_bucket"),
    ruled_out("shadow-page-made-of-an-old-answer", "shadow_page_made_without_a_fresh_answer"),
    ruled_out("fault-in-guest-mode", "fault_handled_in_guest_mode"),
];

/// Where the schedules of shadow mutants begin. A page that is not flushed is met by one in ten thousand: from here it is
/// found early enough for a test run.
const SHADOW_SEED: u64 = 12;

/// Turns the mutant on and runs what is to find it. Returns if nothing does; otherwise panics in a scenario whose name and
/// number of executions `progress` tells.
pub fn hunt(case: &Case, progress: &Progress) {
    match case.check {
        Check::Loom { mutant, scenarios, preemptions } => {
            activate(mutant);
            for name in scenarios {
                let scenario = SCENARIOS.iter().find(|scenario| scenario.name == *name);
                let scenario = scenario.expect("the table names scenarios");
                progress.begin("loom", scenario.name);
                let bounds = Bounds { preemptions: Some(preemptions), limit: Duration::from_secs(50) };
                explore(scenario, bounds, &progress.executions);
            }
        }
        Check::ShadowLoom { mutant, scenario, preemptions } => {
            activate(mutant);
            progress.begin("loom", scenario);
            let bounds = Bounds { preemptions: Some(preemptions), limit: Duration::from_secs(50) };
            explore_shadow(shadow_scenario(scenario), bounds, &progress.executions);
        }
        Check::ShadowShuttle { mutant, scenario } => {
            nestling_shuttle::mutants::activate(mutant);
            progress.begin("shuttle", scenario);
            let effort = Effort { schedules: 20_000, seed: SHADOW_SEED, ..Effort::usual() };
            under_shuttle::explore_shadow(shadow_scenario(scenario), effort, &progress.executions);
        }
        Check::Shuttle { mutant, scenario } => {
            nestling_shuttle::mutants::activate(mutant);
            let scenario = long().into_iter().find(|long| long.name == scenario).expect("the table names scenarios");
            progress.begin("shuttle", &scenario.name);
            let effort = Effort { schedules: 5000, ..Effort::usual() };
            under_shuttle::explore(&Arc::new(scenario), effort, &progress.executions);
        }
    }
}

fn shadow_scenario(name: &str) -> &'static ShadowScenario {
    SHADOW_SCENARIOS.iter().find(|scenario| scenario.name == name).expect("the table names scenarios")
}

/// How far a hunt is.
#[derive(Debug, Default)]
pub struct Progress {
    /// The checker, and the scenario that it explores.
    pub scenario: std::sync::Mutex<String>,
    /// Its executions so far.
    pub executions: Arc<AtomicU64>,
}

impl Progress {
    fn begin(&self, checker: &str, scenario: &str) {
        *self.scenario.lock().unwrap() = format!("{checker}, \"{scenario}\"");
        self.executions.store(0, Ordering::Relaxed);
    }
}
