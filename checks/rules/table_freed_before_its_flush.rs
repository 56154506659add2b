//! Tables go back through the end of the hold that unlinked them, after its flush. The list of frames that wait for
//! readers takes them from there and from nowhere else.

use crate::addr::Hfn;
use crate::events::SeatCounters;
use crate::reclaim::Debts;
use crate::tlb::Flushed;
use crate::{Host, Mmu};

pub(crate) fn right(debts: &mut Debts<'_>, table: Hfn) {
    debts.unlinked(table);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, table: Hfn, counters: &SeatCounters) {
    mmu.reclaim.defer(mmu, &[table], &Flushed(()), counters);
}
