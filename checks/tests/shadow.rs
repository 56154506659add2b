//! Shadow paging under guests that edit the tables they run on.

use nestling_checks::scene::deep;
use nestling_checks::shadow::program::{Layout, single, storm};

fn assert_none(found: &[String], what: &str) {
    assert!(found.is_empty(), "{what}: {} violations\n{}", found.len(), found.join("\n"));
}

#[test]
fn random_guests_one_thread() {
    for layout in Layout::ALL {
        let mut total = 0;
        for seed in 0..6 + 400 * deep() {
            let (found, reached) = single(layout, seed, 2500, 256);
            assert_none(&found, &format!("{layout:?}, seed {seed}"));
            total += reached;
        }
        assert!(total > 4_000, "{layout:?}: only {total} accesses reached memory");
    }
}

#[test]
fn random_guests_many_threads() {
    for layout in Layout::ALL {
        for seed in 0..2 + 100 * deep() {
            let (found, reached) = storm(layout, seed, 1000, 256);
            assert_none(&found, &format!("{layout:?}, seed {seed}"));
            assert!(reached > 100, "{layout:?}: only {reached} accesses reached memory");
        }
    }
}

#[test]
fn random_guests_under_a_small_quota() {
    for layout in [Layout::Long4, Layout::Pae] {
        for seed in 100..102 + 100 * deep() {
            let (found, _) = single(layout, seed, 2000, 64);
            assert_none(&found, &format!("{layout:?}, seed {seed}"));
        }
    }
    let (found, _) = storm(Layout::Long4, 7, 1500, 64);
    assert_none(&found, "a storm");
}
