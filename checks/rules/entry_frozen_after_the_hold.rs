//! The right to take something away ends with the hold that pays for it.

use crate::lock::Ticket;
use crate::reclaim::{Batch, Owed, Reach, hold};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) {
    hold(mmu, ticket, batch, Reach::Live, |hold| {
        let (_inside, debts) = hold.step();
        let _owed: Owed<'_> = debts.owed();
    });
}

#[cfg(wrong)]
pub(crate) fn wrong<'z, H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch) -> Option<Owed<'z>> {
    let mut kept = None;
    hold(mmu, ticket, batch, Reach::Live, |hold| {
        let (_inside, debts) = hold.step();
        kept = Some(debts.owed());
    });
    kept
}
