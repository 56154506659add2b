//! An invalidation lasts as long as its value: one that is not kept gives the range back before anything was changed.

use crate::{GfnRange, Host, Worker};

pub(crate) fn right<H: Host>(worker: &mut Worker<H>, range: GfnRange, change: impl FnOnce()) {
    let taken = worker.invalidate(range);
    change();
    drop(taken);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(worker: &mut Worker<H>, range: GfnRange, change: impl FnOnce()) {
    worker.invalidate(range);
    change();
}
