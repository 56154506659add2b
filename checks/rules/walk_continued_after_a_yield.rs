//! To yield is to end one hold and begin another. The place of a walk belongs to the hold that it was walked in.

use crate::addr::Gfn;
use crate::lock::Ticket;
use crate::reclaim::{Batch, Reach, hold};
use crate::root::RootRef;
use crate::table::Table;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch, root: &RootRef) {
    for gfn in [Gfn(0), Gfn(1)] {
        hold(mmu, ticket, batch, Reach::Live, |hold| Table::root(hold.step().0, root).entry(gfn).read());
    }
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch, root: &RootRef) {
    let mut place = None;
    hold(mmu, ticket, batch, Reach::Live, |hold| {
        place = Some(Table::root(hold.step().0, root));
    });
    hold(mmu, ticket, batch, Reach::Live, |_| place.map(|table| table.entry(Gfn(1)).read()));
}
