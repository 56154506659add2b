//! A root becomes invalid together with the request to every vCPU and the wait for all of them, in one method of the
//! exclusive guard. Its steps are not to be had one by one, so no release of the lock can be written between them.

use crate::Host;
use crate::lock::Exclusive;
use crate::root::{Defunct, RootRef};

pub(crate) fn right<H: Host>(alone: &Exclusive<'_, H>, _root: &RootRef) -> Defunct {
    alone.invalidate_all_roots()
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(_alone: &Exclusive<'_, H>, root: &RootRef) {
    root.0.invalid.store(true, crate::sync::Ordering::Release);
}
