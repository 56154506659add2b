//! A thread that is inside does not enter again: a writer between the two would wait for the first, and the second for
//! the writer.

use crate::lock::{Exclusive, Shared, Ticket};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket) {
    drop(Shared::enter(mmu, ticket));
    drop(Exclusive::enter(mmu, ticket));
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket) {
    let inside = Shared::enter(mmu, ticket);
    drop(Exclusive::enter(mmu, ticket));
    drop(inside);
}
