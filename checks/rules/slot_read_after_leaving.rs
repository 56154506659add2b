//! What the memslots say is borrowed from the guard: after leaving, the set may be freed.

use crate::lock::{Shared, Ticket};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket) -> u64 {
    let inside = Shared::enter(mmu, ticket);
    mmu.slots.read(&inside).generation()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket) -> u64 {
    let inside = Shared::enter(mmu, ticket);
    let slots = mmu.slots.read(&inside);
    drop(inside);
    slots.generation()
}
