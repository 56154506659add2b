//! A set of all roots is made by the exclusive guard and by nobody else.

use crate::Host;
use crate::lock::Exclusive;
use crate::root::{AllRoots, Spaces};

pub(crate) fn right<H: Host>(alone: &Exclusive<'_, H>) -> AllRoots {
    alone.all_roots(Spaces::All)
}

#[cfg(wrong)]
pub(crate) fn wrong() -> AllRoots {
    AllRoots { after: 0, end: u64::MAX, spaces: Spaces::All }
}
