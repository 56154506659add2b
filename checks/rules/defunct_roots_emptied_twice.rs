//! The roots that one invalidation made defunct are put once, by whoever made them so.

use crate::events::SeatCounters;
use crate::root::Defunct;
use crate::tdp::zap::Gone;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, defunct: Defunct, gone: &Gone<Defunct>, counters: &SeatCounters) {
    defunct.put_emptied(gone, mmu, counters);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, defunct: Defunct, gone: &Gone<Defunct>, counters: &SeatCounters) {
    defunct.put_emptied(gone, mmu, counters);
    defunct.put_emptied(gone, mmu, counters);
}
