//! A zapped entry may be filled again when no TLB has what it held: thawing takes the proof of the flush.

use crate::entry::{Entry, Thaw, thaw};
use crate::events::SeatCounters;
use crate::tlb::Flushed;
use crate::Host;

pub(crate) fn right<H: Host>(cell: &Entry, flushed: &Flushed, seat: &SeatCounters) {
    thaw::<H::Format>(cell, Thaw::Absent, flushed, seat);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(cell: &Entry, seat: &SeatCounters) {
    thaw::<H::Format>(cell, Thaw::Absent, seat);
}
