//! A memslot update ends when nothing leads to the old slot's memory, from *any* root. A zap of the valid ones proves
//! less, and its proof does not fit.

use crate::root::{AllRoots, ValidRoots};
use crate::slots::{Begun, Prepared, Slots, Updates};
use crate::tdp::zap::Gone;

pub(crate) fn right(updates: &mut Updates, slots: &Slots, begun: Begun, gone: &Gone<AllRoots>) -> Prepared {
    updates.finish(slots, begun, gone)
}

#[cfg(wrong)]
pub(crate) fn wrong(updates: &mut Updates, slots: &Slots, begun: Begun, gone: &Gone<ValidRoots>) -> Prepared {
    updates.finish(slots, begun, gone)
}
