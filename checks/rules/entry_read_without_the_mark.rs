//! A table is reached from a root, inside the lock: the mark is what keeps it from being freed.

use crate::addr::{Gfn, Level};
use crate::lock::Shared;
use crate::root::RootRef;
use crate::table::Table;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gfn: Gfn) -> u64 {
    Table::root(inside, root).entry(gfn).read()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &Mmu<H>, root: &RootRef, gfn: Gfn) -> u64 {
    Table::at(&mmu.host, root.frame(), Level::L4).entry(gfn).read()
}
