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
//!
//! How many have ended and how many are in progress share one word, so that a fault that nothing interferes with finds
//! that out by one comparison.
//!
//! An invalidation that its embedder forgets (`mem::forget`) stays in progress, and its range is never filled again: a
//! leak, and not an answer that is wrong. Were so many forgotten that the count is full, it stays full.

use crate::addr::{Gfn, GfnRange, Level};
use crate::host::Host;
use crate::lock::Exclusive;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU64, Ordering};

/// One invalidation in progress, in the sequence word. Each borrows a worker, of which there are at most 256; more only
/// where an embedder forgets them.
const BEGUN: u64 = 1;
const IN_PROGRESS: u64 = (1 << 16) - 1;
/// One invalidation that has ended, in the sequence word. 48 bits of them, of which a fault compares all: it would have
/// to be overtaken by 2^48 invalidations to miss them. (KVM once compared 32 bits of 64.)
const ENDED: u64 = 1 << 16;

/// The bits of the sequence word that are compared.
#[inline(always)]
fn kept() -> u64 {
    if mutants::is(Mutant::SequenceTruncated) { 2 * ENDED - 1 } else { u64::MAX }
}

/// Sequence and ranges in progress. Written under the exclusive lock.
#[derive(Debug)]
pub(crate) struct Notify {
    sequence: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

/// The sequence as a fault saw it before it asked the backing: what had ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot(u64);

impl Notify {
    pub(crate) fn new() -> Self {
        Self { sequence: AtomicU64::new(0), start: AtomicU64::new(0), end: AtomicU64::new(0) }
    }

    /// What has ended; `None` while `gfn` is being invalidated, which only saves the caller's effort.
    ///
    /// Acquire: what the backing answers after this is newer than the invalidations that the snapshot counts.
    #[inline]
    pub(crate) fn snapshot(&self, gfn: Gfn) -> Option<Snapshot> {
        let now = self.sequence.load(Ordering::Acquire);
        if now & IN_PROGRESS == 0 { Some(Snapshot(now)) } else { self.snapshot_beside(now, gfn) }
    }

    /// What has ended; `None` while anything is being invalidated.
    #[inline]
    pub(crate) fn quiet(&self) -> Option<Snapshot> {
        let now = self.sequence.load(Ordering::Acquire);
        (now & IN_PROGRESS == 0).then_some(Snapshot(now))
    }

    #[cold]
    fn snapshot_beside(&self, now: u64, gfn: Gfn) -> Option<Snapshot> {
        let snapshot = Snapshot(now & !IN_PROGRESS);
        (!self.overtakes(now, snapshot, GfnRange::block(Level::K4, gfn))).then_some(snapshot)
    }

    /// Whether a frame of `block` is being invalidated, or anything was since the snapshot. Called inside the lock,
    /// where nothing can begin or end.
    ///
    /// It takes the whole block that a leaf would map and not the frame that faulted: a huge leaf beside a range in
    /// progress would reach into it, after the range was zapped.
    pub(crate) fn must_retry(&self, snapshot: Snapshot, block: GfnRange) -> bool {
        let now = self.sequence.load(Ordering::Acquire);
        now != snapshot.0 && self.overtakes(now, snapshot, block) && !mutants::is(Mutant::RetryTestBeforeTheLockOnly)
    }

    /// Whether anything at all is in progress or has ended since the snapshot. Inside the lock, `false` spares a look
    /// at the ranges. Outside it, where they can not be told apart, it is for an answer that will not be installed.
    #[inline]
    pub(crate) fn is_overtaken(&self, snapshot: Snapshot) -> bool {
        (self.sequence.load(Ordering::Acquire) ^ snapshot.0) & kept() != 0
    }

    fn overtakes(&self, now: u64, snapshot: Snapshot, block: GfnRange) -> bool {
        let range =
            GfnRange { start: Gfn(self.start.load(Ordering::Relaxed)), end: Gfn(self.end.load(Ordering::Relaxed)) };
        (now ^ snapshot.0) & !IN_PROGRESS & kept() != 0 || (now & IN_PROGRESS != 0 && range.overlaps(block))
    }

    /// Whether any invalidation is in progress. None begins or ends while the exclusive side is held.
    pub(crate) fn is_busy<H: Host>(&self, _alone: &Exclusive<'_, H>) -> bool {
        self.seems_busy()
    }

    /// As [`Notify::is_busy`] for whoever is not in the lock, and may learn it late.
    pub(crate) fn seems_busy(&self) -> bool {
        self.sequence.load(Ordering::Relaxed) & IN_PROGRESS != 0
    }

    pub(crate) fn begin<H: Host>(&self, range: GfnRange, _alone: &Exclusive<'_, H>) {
        let mut union = range;
        // Read by an addition of nothing, for the reason of `load_for_update`.
        let in_progress = self.sequence.fetch_add(0, Ordering::Relaxed) & IN_PROGRESS;
        if in_progress != 0 {
            let start = Gfn(self.start.load(Ordering::Relaxed));
            union = range.union(GfnRange { start, end: Gfn(self.end.load(Ordering::Relaxed)) });
        }
        self.start.store(union.start.0, Ordering::Relaxed);
        self.end.store(union.end.0, Ordering::Relaxed);
        let begun = if in_progress == IN_PROGRESS { 0 } else { BEGUN };
        self.sequence.fetch_add(begun, Ordering::Release);
    }

    pub(crate) fn end<H: Host>(&self, _alone: &Exclusive<'_, H>) {
        let stuck = self.sequence.fetch_add(0, Ordering::Relaxed) & IN_PROGRESS == IN_PROGRESS;
        self.sequence.fetch_add(if stuck { ENDED } else { ENDED - BEGUN }, Ordering::Release);
    }
}
