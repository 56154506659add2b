//! Guest and host frame numbers are different types: a table is not looked for at a guest's address.

use crate::addr::{Gfn, Hfn};
use crate::format::{Format, Npt};

pub(crate) fn right(table: Hfn) -> u64 {
    Npt::table(table)
}

#[cfg(wrong)]
pub(crate) fn wrong(gfn: Gfn) -> u64 {
    Npt::table(gfn)
}
