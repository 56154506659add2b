//! The library's own source under loom: every interleaving of a scenario up to a bound on preemptions, with the memory
//! model's weak orderings.
//!
//! `nestling-loom` is the same files as `nestling`, compiled with loom's atomics and with tables of two entries. What
//! loom does not model (sequentially consistent accesses, a load that the same thread follows up with a store) is told
//! where the library gives way to it, in its `sync` module; `canary` shows that the checker still sees a publication
//! that is too weak.

mod canary;
mod machine;
pub mod mutants;
mod scenarios;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use canary::{Publish, canary};
pub use machine::Work;
pub use scenarios::{Actor, SCENARIOS, Scenario};

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
    pub fn usual(scenario: &Scenario) -> Self {
        if std::env::var_os("NESTLING_DEEP").is_some() {
            Self { preemptions: Some(4), limit: Duration::from_secs(3600) }
        } else {
            let preemptions = if scenario.actors.len() > 2 { 1 } else { 2 };
            Self { preemptions: Some(preemptions), limit: Duration::from_secs(6) }
        }
    }
}

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
pub fn explore(scenario: &'static Scenario, bounds: Bounds, executions: &Arc<AtomicU64>) -> Explored {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = bounds.preemptions;
    model.max_branches = 100_000;
    model.max_duration = Some(bounds.limit);
    let (count, start) = (Arc::clone(executions), Instant::now());
    let (freed, kept) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (all_freed, all_kept) = (Arc::clone(&freed), Arc::clone(&kept));
    model.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        let counters = scenarios::execute(scenario);
        all_freed.fetch_add(counters.roots_freed, Ordering::Relaxed);
        all_kept.fetch_add(counters.roots_kept, Ordering::Relaxed);
    });
    // In some orders the request finds a vCPU that has a new root already. If none ever keeps it, none looks.
    let (freed, kept) = (freed.load(Ordering::Relaxed), kept.load(Ordering::Relaxed));
    assert!(freed == 0 || kept > 0, "vCPUs dropped {freed} roots and never kept one");
    Explored { executions: executions.load(Ordering::Relaxed), stopped: start.elapsed() >= bounds.limit }
}
