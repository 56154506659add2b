//! A hold pays at its end, and its end can not be kept from it: the work is lent the hold and never owns it.

use crate::lock::Ticket;
use crate::reclaim::{Batch, Reach, hold};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) {
    hold(mmu, ticket, batch, Reach::Live, |hold| {
        hold.step();
    });
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) {
    hold(mmu, ticket, batch, Reach::Live, |hold| {
        core::mem::forget(*hold);
    });
}
