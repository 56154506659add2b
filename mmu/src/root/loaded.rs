//! The roots that one vCPU holds: the one it runs on, and the ones it ran on before.
//!
//! A vCPU that goes back and forth between roles (system-management mode and back, another number of levels) finds its
//! previous root here without a look at the list, and keeps it filled. Used by the vCPU's thread alone, outside guest
//! mode.

use super::{Role, RootRef};
use crate::events::{Counter, SeatCounters};
use crate::host::Host;
use crate::mutants::{self, Mutant};

/// Previous roots kept (KVM_MMU_NUM_PREV_ROOTS).
const PREVIOUS: usize = 3;

#[derive(Debug, Default)]
pub(crate) struct Loaded {
    current: Option<RootRef>,
    /// Most recent first.
    previous: [Option<RootRef>; PREVIOUS],
}

impl Loaded {
    #[inline]
    pub(crate) fn current(&self) -> Option<&RootRef> {
        self.current.as_ref()
    }

    /// Makes `root`, of the vCPU's `role`, the current one; there was none.
    pub(crate) fn load(&mut self, root: RootRef, role: Role) {
        debug_assert_eq!(root.role(), role, "a vCPU runs on roots of its own role");
        debug_assert!(self.current.is_none(), "the current root is put or kept before another is loaded");
        self.current = Some(root);
    }

    /// Turns to `role`: its root becomes the current one if it is among the previous, else there is none and one must
    /// be loaded. Whether it was found.
    ///
    /// An obsolete root may be found: the request to drop it is pending then, and is served before the vCPU enters.
    pub(crate) fn switch<H: Host>(&mut self, role: Role, host: &H, counters: &SeatCounters) -> bool {
        let is_wanted = |root: &Option<RootRef>| root.as_ref().is_some_and(|root| root.role() == role);
        if is_wanted(&self.current) {
            return true;
        }
        let place = self.previous.iter().position(is_wanted);
        let found = place.and_then(|place| self.previous[place].take());
        let hit = found.is_some();
        if let Some(old) = core::mem::replace(&mut self.current, found) {
            // Everything more recent than the hole (or than the end) moves one back.
            let hole = place.unwrap_or(PREVIOUS - 1);
            if let Some(oldest) = self.previous[hole].take() {
                oldest.put(host, counters);
            }
            self.previous[..=hole].rotate_right(1);
            self.previous[0] = Some(old);
        }
        hit
    }

    /// Drops the roots that are obsolete, each judged by itself, and keeps the others. (Judging the previous roots by
    /// the current one is a bug that KVM shipped.)
    pub(crate) fn drop_obsolete<H: Host>(&mut self, host: &H, counters: &SeatCounters) {
        let current = self.current.as_ref().is_some_and(RootRef::is_obsolete);
        for place in core::iter::once(&mut self.current).chain(&mut self.previous) {
            let is_obsolete = |root: &mut RootRef| match () {
                () if mutants::is(Mutant::PreviousRootsJudgedByCurrent) => current,
                () if mutants::is(Mutant::CurrentRootsDropped) => true,
                () => root.is_obsolete(),
            };
            match place.take_if(is_obsolete) {
                Some(root) => {
                    counters.add(Counter::RootFreed, 1);
                    root.put(host, counters);
                }
                None => counters.add(Counter::RootKept, u64::from(place.is_some())),
            }
        }
    }

    /// Puts all of them.
    pub(crate) fn put_all<H: Host>(&mut self, host: &H, counters: &SeatCounters) {
        for root in core::iter::once(&mut self.current).chain(&mut self.previous).filter_map(Option::take) {
            root.put(host, counters);
        }
    }
}
