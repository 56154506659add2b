//! The MMU's references to defunct roots are put after a zap of these roots: until then an invalidation must find them.

use crate::events::SeatCounters;
use crate::root::{Defunct, ValidRoots};
use crate::tdp::zap::Gone;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, defunct: Defunct, gone: &Gone<Defunct>, counters: &SeatCounters) {
    defunct.put_emptied(gone, mmu, counters);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, defunct: Defunct, gone: &Gone<ValidRoots>, counters: &SeatCounters) {
    defunct.put_emptied(gone, mmu, counters);
}
