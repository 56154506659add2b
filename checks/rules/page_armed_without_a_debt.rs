//! Dirty pages are told of after a flush: to arm one takes the debt that the operation pays before it tells.

use crate::addr::Level;
use crate::entry::{Entry, weaken};
use crate::format::Format;
use crate::tlb::Debt;
use crate::Host;

pub(crate) fn right<H: Host>(cell: &Entry, debt: &mut Debt) -> Result<(), u64> {
    weaken::<H::Format>(cell, Level::K4, cell.read(), H::Format::WRITE, debt)
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(cell: &Entry) -> Result<(), u64> {
    weaken::<H::Format>(cell, Level::K4, cell.read(), H::Format::WRITE)
}
