//! Entries change by the functions of `entry`, which compare, account and assert. There is no store.

use crate::addr::Gfn;
use crate::entry::{Books, change};
use crate::events::SeatCounters;
use crate::table::Table;
use crate::Host;

pub(crate) fn right<H: Host>(table: &Table<'_, H>, gfn: Gfn, new: u64, seat: &SeatCounters) -> Result<(), u64> {
    let cell = table.entry(gfn);
    change::<H::Format>(cell, table.level, cell.read(), new, Books::None, seat)
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(table: &Table<'_, H>, gfn: Gfn, new: u64) {
    table.entry(gfn).store(new, crate::sync::Ordering::Release);
}
