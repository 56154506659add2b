//! There is no hold but the one that `hold` makes, and ends.

use crate::lock::Ticket;
use crate::reclaim::{Batch, Reach, Zapping, hold};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) {
    hold(mmu, ticket, batch, Reach::Live, |_: &mut Zapping<'_, H>| ());
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) {
    core::mem::forget(Zapping::enter(mmu, ticket, batch, Reach::Live));
}
