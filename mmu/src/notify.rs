//! Host-range invalidation: how the embedder takes memory from under a guest (KVM's MMU notifiers, F27, F28).
//!
//! # Protocol
//! The embedder holds an [`Invalidation`] of a range for as long as what stands behind its frames is changing. Its
//! beginning marks the range as in progress under the exclusive lock, which waits for every fault that had checked
//! before, then zaps the range in *all* roots and flushes; its end advances the sequence.
//!
//! A fault takes a snapshot of the sequence before it asks the backing. It must start over if the frame lies in a
//! range in progress, or if any invalidation has ended since the snapshot. It looks before it asks (so that it does
//! not spin in the lock while a long invalidation runs) and again inside the lock, where the answer counts: from there
//! until it leaves, no invalidation can begin.
//!
//! Several ranges in progress are kept as their union, which may make a fault wait that need not: never the reverse.

use crate::addr::{Gfn, GfnRange};
use crate::host::Host;
use crate::lock::Exclusive;
use crate::sync::{AtomicU64, Ordering};

/// Sequence and ranges in progress. Written under the exclusive lock.
#[derive(Debug)]
pub(crate) struct Notify {
    /// Invalidations that have ended. 64 bits: never truncated (KVM once kept it in 32), never wraps.
    ended: AtomicU64,
    in_progress: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

/// The sequence as a fault saw it before it asked the backing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot(u64);

impl Notify {
    pub(crate) const fn new() -> Self {
        Self {
            ended: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        }
    }

    /// Acquire: what the backing answers after this is newer than the invalidations that the snapshot counts.
    #[inline]
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.ended.load(Ordering::Acquire))
    }

    /// Whether `gfn` is being invalidated, or anything was since the snapshot. Decisive inside the lock, a hint
    /// outside it.
    #[inline]
    pub(crate) fn must_retry(&self, snapshot: Snapshot, gfn: Gfn) -> bool {
        if self.in_progress.load(Ordering::Acquire) != 0 {
            let range =
                GfnRange { start: Gfn(self.start.load(Ordering::Relaxed)), end: Gfn(self.end.load(Ordering::Relaxed)) };
            if range.contains(gfn) {
                return true;
            }
        }
        self.ended.load(Ordering::Acquire) != snapshot.0
    }

    pub(crate) fn begin<H: Host>(&self, range: GfnRange, _alone: &Exclusive<'_, H>) {
        let in_progress = self.in_progress.load(Ordering::Relaxed);
        let mut union = range;
        if in_progress != 0 {
            let start = Gfn(self.start.load(Ordering::Relaxed));
            union = range.union(GfnRange { start, end: Gfn(self.end.load(Ordering::Relaxed)) });
        }
        self.start.store(union.start.0, Ordering::Relaxed);
        self.end.store(union.end.0, Ordering::Relaxed);
        self.in_progress.store(in_progress + 1, Ordering::Release);
    }

    pub(crate) fn end<H: Host>(&self, _alone: &Exclusive<'_, H>) {
        self.ended.store(self.ended.load(Ordering::Relaxed) + 1, Ordering::Release);
        self.in_progress.store(self.in_progress.load(Ordering::Relaxed) - 1, Ordering::Release);
    }
}
