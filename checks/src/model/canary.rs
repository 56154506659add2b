//! The canary: a table published by compare-and-swap, as the library publishes its own, once strongly enough and once
//! not. The checker must find the second; if it ever does not, its silence about the library means nothing.

use std::sync::Arc;

use loom::thread;
use nestling_loom::sync::{AtomicU64, Ordering, load_for_update};

/// How the new table is published.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Publish {
    /// Its contents are seen by whoever follows the entry.
    Release,
    /// They need not be.
    Relaxed,
}

/// Two threads that want the same table: one makes it, or both try.
pub fn canary(publish: Publish) {
    let ordering = if publish == Publish::Release { Ordering::AcqRel } else { Ordering::Relaxed };
    loom::model(move || {
        let shared = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (entry, table) = &*shared;
                let seen = load_for_update(entry);
                if seen == 0 {
                    table.store(42, Ordering::Relaxed);
                    let published = entry.compare_exchange(seen, 1, ordering, Ordering::Acquire);
                    assert!(published.is_ok(), "nobody else publishes");
                }
            })
        };
        let (entry, table) = &*shared;
        if entry.load(Ordering::Acquire) == 1 {
            assert_eq!(table.load(Ordering::Relaxed), 42, "the table was seen before what it holds");
        }
        other.join().unwrap();
    });
}
