//! Who watches entries change: for a checker that is built in beside the library.
//!
//! With the feature `watch`, every change of an entry in a table that may be linked is made under one lock and told to
//! the watcher before the lock is let go, so that the watcher sees the changes of all threads in the order in which they
//! happened. That costs what a global lock costs. Without the feature nothing of this is compiled.
//!
//! The watcher is called inside the MMU lock, on any CPU: it must not wait and not call back. It is not told of accessed
//! and dirty bits, which the CPU sets, nor of what is written into a table before an entry leads there.

use crate::addr::Level;

/// One change of one entry.
#[cfg(feature = "watch")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Where the entry is, as the processor that changed it addresses it.
    pub cell: usize,
    /// Level of the table that it is in.
    pub level: Level,
    /// What it held.
    pub old: u64,
    /// What it holds.
    pub new: u64,
}

/// See the module head.
#[cfg(feature = "watch")]
pub trait Watcher: Sync {
    /// An entry was changed.
    fn changed(&self, change: Change);
}

#[cfg(feature = "watch")]
static WATCHER: spin::Mutex<Option<&'static dyn Watcher>> = spin::Mutex::new(None);

/// From here on `watcher` is told.
#[cfg(feature = "watch")]
pub fn install(watcher: &'static dyn Watcher) {
    *WATCHER.lock() = Some(watcher);
}

/// Makes a change, which returns what the entry held if it was made, and tells of it.
#[cfg(feature = "watch")]
pub(crate) fn watched(
    cell: usize,
    level: Level,
    new: u64,
    make: impl FnOnce() -> Result<u64, u64>,
) -> Result<u64, u64> {
    let watcher = WATCHER.lock();
    let old = make()?;
    if let Some(watcher) = *watcher {
        watcher.changed(Change { cell, level, old, new });
    }
    Ok(old)
}

/// Makes a change.
#[cfg(not(feature = "watch"))]
#[inline(always)]
pub(crate) fn watched(_: usize, _: Level, _: u64, make: impl FnOnce() -> Result<u64, u64>) -> Result<u64, u64> {
    make()
}
