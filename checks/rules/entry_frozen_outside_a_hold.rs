//! Taking something away owes a flush. To freeze an entry takes the proof that a hold is open which will pay.

use crate::addr::Gfn;
use crate::entry;
use crate::reclaim::{Debts, Owed};
use crate::table::Table;
use crate::Host;

pub(crate) fn right<H: Host>(debts: &mut Debts<'_>, table: &Table<'_, H>, gfn: Gfn) -> Result<(), u64> {
    let cell = table.entry(gfn);
    debts.freeze::<H>(cell, table.level, gfn, cell.read())
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(inside: &crate::lock::Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn) -> Result<(), u64> {
    let (cell, owed) = (table.entry(gfn), Owed(core::marker::PhantomData));
    entry::freeze::<H::Format>(cell, table.level, cell.read(), inside.counters(), owed)
}
