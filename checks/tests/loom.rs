//! The model checks: each scenario in all its interleavings up to a bound, and the canary that shows that the checker
//! can see.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nestling_checks::model::{Bounds, Publish, SCENARIOS, SHADOW_SCENARIOS, canary, explore, explore_shadow};

#[test]
fn every_scenario_holds() {
    for scenario in SCENARIOS {
        let explored = explore(scenario, Bounds::usual(scenario), &Arc::new(AtomicU64::new(0)));
        let more = if explored.stopped { " and there are more" } else { "" };
        println!("{}: {} executions{more}", scenario.name, explored.executions);
        assert!(explored.executions > 1, "{}: nothing raced", scenario.name);
    }
}

#[test]
fn every_scenario_of_shadow_paging_holds() {
    for scenario in SHADOW_SCENARIOS {
        let explored = explore_shadow(scenario, Bounds::of_shadow(scenario), &Arc::new(AtomicU64::new(0)));
        let more = if explored.stopped { " and there are more" } else { "" };
        println!("{}: {} executions{more}", scenario.name, explored.executions);
        assert!(explored.executions > 1, "{}: nothing raced", scenario.name);
    }
}

#[test]
fn a_table_published_strongly_enough_is_seen_whole() {
    canary(Publish::Release);
}

#[test]
#[should_panic(expected = "the table was seen before what it holds")]
fn a_relaxed_publication_is_found() {
    canary(Publish::Relaxed);
}
