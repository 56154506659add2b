//! Every pair of operations, and the triples that bugs of the past needed, in long scenarios and random schedules.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nestling_checks::model::SHADOW_SCENARIOS;
use nestling_checks::model::scenarios::{Op, long};
use nestling_checks::model::under_shuttle::{Effort, explore, explore_shadow};

#[test]
fn every_long_scenario_holds() {
    for scenario in long().into_iter().map(Arc::new) {
        let executions = Arc::new(AtomicU64::new(0));
        explore(&scenario, Effort::usual(), &executions);
        println!("{}: {} schedules", scenario.name, executions.load(Ordering::Relaxed));
    }
}

#[test]
fn every_scenario_of_shadow_paging_holds() {
    for scenario in SHADOW_SCENARIOS {
        let executions = Arc::new(AtomicU64::new(0));
        explore_shadow(scenario, Effort::of_shadow(), &executions);
        println!("{}: {} schedules", scenario.name, executions.load(Ordering::Relaxed));
    }
}

#[test]
fn every_pair_has_a_scenario() {
    let names: BTreeSet<_> = long().into_iter().map(|scenario| scenario.name).collect();
    for first in Op::ALL {
        for second in Op::ALL {
            let (a, b) = (first.min(second).name(), first.max(second).name());
            assert!(names.contains(&format!("{a} beside {b}")), "{a} beside {b} is run nowhere");
        }
    }
}
