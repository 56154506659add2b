//! Invalidation leaves a duty: the roots that it made defunct are emptied by whoever called it.

use crate::Host;
use crate::lock::Exclusive;
use crate::root::Defunct;

pub(crate) fn right<H: Host>(alone: Exclusive<'_, H>) -> Defunct {
    alone.invalidate_all_roots()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(alone: Exclusive<'_, H>) {
    alone.invalidate_all_roots();
}
