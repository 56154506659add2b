//! The library's own source under loom: every interleaving of a scenario up to a bound on preemptions, with the memory
//! model's weak orderings.

#![expect(clippy::duplicate_mod, reason = "machine and scenarios are compiled for each checker")]

#[path = "execute.rs"]
mod execute;
#[path = "machine.rs"]
mod machine;
#[path = "shadow_guest.rs"]
mod shadow_guest;
#[path = "shadow_machine.rs"]
mod shadow_machine;

/// What the machine and the scenarios are made of here.
mod checker {
    pub(super) use loom::sync::Mutex as Lock;
    pub(super) use loom::thread::{spawn, yield_now};
    pub(super) use nestling_loom as library;

    /// vCPUs of the machine.
    pub(super) const VCPUS: usize = 2;
    /// Table frames of the machine.
    pub(super) const TABLES: usize = 24;
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::scenarios::Scenario;
use super::shadow::ShadowScenario;

/// How far a check goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Preemptions in one execution; `None` is all interleavings.
    pub preemptions: Option<usize>,
    /// When to stop.
    pub limit: Duration,
}

impl Bounds {
    /// What fits into a test run, or with `NESTLING_DEEP` in the environment, into a night.
    pub fn usual(scenario: &Scenario<'_>) -> Self {
        Self::of_threads(scenario.threads().count(), Duration::from_secs(6))
    }

    /// The same for a scenario of shadow paging, whose executions are longer: they are stopped sooner, and the random
    /// schedules go further.
    pub fn of_shadow(scenario: &ShadowScenario) -> Self {
        Self::of_threads(scenario.threads.len(), Duration::from_secs(3))
    }

    fn of_threads(threads: usize, limit: Duration) -> Self {
        if std::env::var_os("NESTLING_DEEP").is_some() {
            Self { preemptions: Some(4), limit: Duration::from_secs(3600) }
        } else {
            let preemptions = if threads > 2 { 1 } else { 2 };
            Self { preemptions: Some(preemptions), limit }
        }
    }
}

/// Executions between two looks at the clock: no scenario is stopped sooner.
const LOOK: usize = 20_000;
/// The same for shadow paging, of which an execution takes milliseconds.
const LOOK_AT_SHADOW: usize = 100;

/// How far it went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Explored {
    /// Executions tried.
    pub executions: u64,
    /// Whether there were more.
    pub stopped: bool,
}

/// Runs `scenario` in all its interleavings within `bounds`. Panics in the first that goes wrong; `executions` counts up
/// to it.
pub fn explore(scenario: &'static Scenario<'static>, bounds: Bounds, executions: &Arc<AtomicU64>) -> Explored {
    let (freed, kept) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (all_freed, all_kept) = (Arc::clone(&freed), Arc::clone(&kept));
    let explored = check(bounds, LOOK, executions, move || {
        let counters = execute::execute(scenario);
        all_freed.fetch_add(counters.roots_freed, Ordering::Relaxed);
        all_kept.fetch_add(counters.roots_kept, Ordering::Relaxed);
    });
    // In some orders the request finds a vCPU that has a new root already. If none ever keeps it, none looks.
    let (freed, kept) = (freed.load(Ordering::Relaxed), kept.load(Ordering::Relaxed));
    assert!(freed == 0 || kept > 0, "vCPUs dropped {freed} roots and never kept one");
    explored
}

/// The same for a scenario of shadow paging.
pub fn explore_shadow(scenario: &'static ShadowScenario, bounds: Bounds, executions: &Arc<AtomicU64>) -> Explored {
    let recycled = Arc::new(AtomicU64::new(0));
    let all_recycled = Arc::clone(&recycled);
    let explored = check(bounds, LOOK_AT_SHADOW, executions, move || {
        let counters = shadow_guest::execute(scenario, 1);
        all_recycled.fetch_add(counters.shadow_recycled, Ordering::Relaxed);
    });
    let tight = recycled.load(Ordering::Relaxed) > 0;
    assert_eq!(tight, scenario.is_tight(), "{}: pages are recycled, or never are", scenario.name);
    explored
}

/// Looks at the clock once in `look` executions.
fn check(
    bounds: Bounds,
    look: usize,
    executions: &Arc<AtomicU64>,
    execute: impl Fn() + Send + Sync + 'static,
) -> Explored {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = bounds.preemptions;
    model.max_branches = 100_000;
    model.checkpoint_interval = look;
    model.max_duration = Some(bounds.limit);
    let (count, start) = (Arc::clone(executions), Instant::now());
    model.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        execute();
    });
    Explored { executions: executions.load(Ordering::Relaxed), stopped: start.elapsed() >= bounds.limit }
}
