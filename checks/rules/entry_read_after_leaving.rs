//! An entry is borrowed from the guard. After leaving, its table may be freed.

use crate::addr::Gfn;
use crate::lock::{Shared, Ticket};
use crate::root::RootRef;
use crate::table::Table;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, root: &RootRef, gfn: Gfn) -> u64 {
    let inside = Shared::enter(mmu, ticket);
    Table::root(&inside, root).entry(gfn).read()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, root: &RootRef, gfn: Gfn) -> u64 {
    let inside = Shared::enter(mmu, ticket);
    let cell = Table::root(&inside, root).entry(gfn);
    drop(inside);
    cell.read()
}
