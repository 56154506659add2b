//! Whoever works beside others sees valid roots. All roots, with those that are being taken apart, are for whoever
//! is alone.

use crate::Host;
use crate::lock::{Exclusive, Shared};
use crate::root::{AllRoots, Spaces, ValidRoots};

pub(crate) fn right<H: Host>(inside: &Shared<'_, H>, alone: &Exclusive<'_, H>) -> (ValidRoots, AllRoots) {
    (inside.valid_roots(Spaces::All), alone.all_roots(Spaces::All))
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(inside: &Shared<'_, H>) -> AllRoots {
    inside.all_roots(Spaces::All)
}
