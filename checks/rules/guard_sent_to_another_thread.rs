//! The mark is the seat's, and the seat is its thread's: a guard stays where it was taken.

use crate::lock::{Shared, Ticket};
use crate::{Host, Mmu};

fn send<T: Send>(_: T) {}

pub(crate) fn right(ticket: Ticket) {
    send(ticket);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket) {
    send(Shared::enter(mmu, ticket));
}
