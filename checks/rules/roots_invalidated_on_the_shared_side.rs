//! Roots become invalid while nobody is inside: a fault that has seen its root valid, inside, may fill it.

use crate::Host;
use crate::lock::{Exclusive, Shared};
use crate::root::Defunct;

pub(crate) fn right<H: Host>(alone: &Exclusive<'_, H>) -> Defunct {
    alone.invalidate_all_roots()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(inside: &Shared<'_, H>) -> Defunct {
    inside.invalidate_all_roots()
}
