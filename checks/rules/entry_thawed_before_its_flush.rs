//! A zapped entry may be filled again when no TLB has what it held: thawing takes the proof of the flush.

use crate::entry::{Entry, thaw};
use crate::tlb::Flushed;
use crate::Host;

pub(crate) fn right<H: Host>(cell: &Entry, flushed: &Flushed) {
    thaw::<H::Format>(cell, flushed);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(cell: &Entry) {
    thaw::<H::Format>(cell);
}
