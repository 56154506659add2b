//! That nothing is left to flush is said by the flush that made it so, and only defunct roots hold the proof of one.

use crate::reclaim::Reach;
use crate::root::{Defunct, RootSet, ValidRoots};
use crate::tlb::Flushed;
use crate::Host;

pub(crate) fn right<H: Host>(defunct: &Defunct) -> Reach<'_> {
    RootSet::<H>::reach(defunct)
}

#[cfg(wrong)]
pub(crate) fn wrong(_valid: &ValidRoots) -> Reach<'_> {
    Reach::Unreachable(&Flushed(()))
}
