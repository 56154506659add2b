//! Shadow paging under guests that edit the tables they run on.

use nestling_checks::scene::deep;
use nestling_checks::shadow::program::{Layout, Outcome, single, storm};

#[track_caller]
fn assert_none(Outcome { found, .. }: &Outcome, what: &str) {
    assert!(found.is_empty(), "{what}: {} violations\n{}", found.len(), found.join("\n"));
}

#[test]
fn random_guests_one_thread() {
    for layout in Layout::ALL {
        let (mut total, mut large) = (0, 0);
        for seed in 0..6 + 400 * deep() {
            let outcome = single(layout, seed, 2500, 256);
            assert_none(&outcome, &format!("{layout:?}, seed {seed}"));
            total += outcome.reached;
            large += outcome.large;
        }
        assert!(total > 4_000, "{layout:?}: only {total} accesses reached memory");
        assert!(large > 50, "{layout:?}: there were hardly any large leaves, {large} at all looks");
    }
}

#[test]
fn random_guests_many_threads() {
    for layout in Layout::ALL {
        for seed in 0..8 + 100 * deep() {
            let outcome = storm(layout, seed, 1000, 256);
            assert_none(&outcome, &format!("{layout:?}, seed {seed}"));
            assert!(outcome.reached > 100, "{layout:?}: only {} accesses reached memory", outcome.reached);
        }
    }
}

#[test]
fn random_guests_under_a_small_quota() {
    for layout in [Layout::Long4, Layout::Pae] {
        for seed in 100..102 + 100 * deep() {
            assert_none(&single(layout, seed, 2000, 64), &format!("{layout:?}, seed {seed}"));
        }
    }
    for seed in 7..11 + 100 * deep() {
        assert_none(&storm(Layout::Long4, seed, 1500, 64), &format!("a storm, seed {seed}"));
    }
}
