//! The library's own source under shuttle: long scenarios in random schedules.
//!
//! Loom tries everything and gets as far as two or three operations. Here each thread does many, and of the endlessly
//! many schedules some are tried: evenly random ones, and those of the PCT scheduler, which finds a bug that needs *d*
//! changes of thread with a probability that does not fall with the length of the run (Burckhardt et al., ASPLOS 2010).
//! Every access is sequentially consistent here, so what is found is an order of events and never a weak ordering.
//!
//! Schedules come from a seed: a run is the same each time, and one that fails prints what replays it.

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
    pub(super) use nestling_shuttle as library;
    pub(super) use shuttle::sync::Mutex as Lock;
    pub(super) use shuttle::thread::{spawn, yield_now};

    /// vCPUs of the machine.
    pub(super) const VCPUS: usize = 4;
    /// Table frames of the machine.
    pub(super) const TABLES: usize = 96;
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, MaxSteps, Runner};

use super::scenarios::Long;
use super::shadow::ShadowScenario;

/// How much is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    /// Schedules of each kind.
    pub schedules: usize,
    /// Changes of thread that a bug may need, for the PCT scheduler.
    pub depth: usize,
    /// Where the random numbers begin.
    pub seed: u64,
}

impl Effort {
    /// What fits into a test run, or with `NESTLING_DEEP=n` n times 100,000 more, from a seed of their own.
    pub fn usual() -> Self {
        let deep = crate::scene::deep();
        Self { schedules: 250 + 100_000 * deep as usize, depth: 4, seed: 0x6e65_7374 + deep }
    }

    /// The same for scenarios of shadow paging, which are many and long.
    pub fn of_shadow() -> Self {
        let usual = Self::usual();
        Self { schedules: usual.schedules / 2, ..usual }
    }
}

/// Runs `scenario` in schedules of both kinds. Panics in the first that goes wrong; `executions` counts up to it.
pub fn explore(scenario: &Arc<Long>, effort: Effort, executions: &Arc<AtomicU64>) {
    let scenario = Arc::clone(scenario);
    run(effort, executions, move || {
        execute::execute(&scenario.scenario());
    });
}

/// The same for a scenario of shadow paging, each thread's part a few times.
pub fn explore_shadow(scenario: &'static ShadowScenario, effort: Effort, executions: &Arc<AtomicU64>) {
    run(effort, executions, move || {
        shadow_guest::execute(scenario, REPEATED);
    });
}

/// Times that each thread of a shadow scenario does its part.
const REPEATED: usize = 3;

fn run(effort: Effort, executions: &Arc<AtomicU64>, execute: impl Fn() + Clone + Send + Sync + 'static) {
    let Effort { schedules, depth, seed } = effort;
    run_by(PctScheduler::new_from_seed(seed, depth, schedules), executions, execute.clone());
    run_by(RandomScheduler::new_from_seed(seed, schedules), executions, execute);
}

fn run_by(
    scheduler: impl Scheduler + 'static,
    executions: &Arc<AtomicU64>,
    execute: impl Fn() + Send + Sync + 'static,
) {
    let mut config = Config::default();
    config.max_steps = MaxSteps::FailAfter(2_000_000);
    // Of accesses that are weaker than sequentially consistent: see the head.
    config.silence_warnings = true;
    let count = Arc::clone(executions);
    Runner::new(scheduler, config).run(move || {
        count.fetch_add(1, Ordering::Relaxed);
        execute();
    });
}
