//! Counters and trace events.
//!
//! Counters belong to a seat of the MMU lock (one vCPU or one worker) and are written by its holder alone: an
//! increment is a plain load, add and store on the holder's own cache line, no locked instruction. A reader sums all
//! seats; a sum taken while others work is a snapshot of no single moment, each term of it is right. Some counters go
//! both ways (what one seat maps another zaps): a seat's own value may then be "negative", which wrapping addition
//! makes right in the sum.
//!
//! Trace events go to the embedder's [`crate::host::Host::trace`] and cost nothing unless its `TRACE` is true.

use crate::addr::{Gfn, GfnRange, Level};
use crate::sync::Ordering;
use crate::sync::plain::AtomicU64;
use crate::vcpu::Outcome;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident = $name:ident,)*) => {
        /// A counter's name inside the library.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub(crate) enum Counter { $($name,)* }

        const COUNT: usize = [$(Counter::$name,)*].len();

        /// Sums of all counters at one moment (KVM's statistics, F70).
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $field: u64,)* }

        impl Counters {
            fn add(&mut self, seat: &SeatCounters) {
                $(self.$field = self.$field.wrapping_add(seat.0[Counter::$name as usize].load(Ordering::Relaxed));)*
            }
        }
    };
}

counters! {
    /// Faults that made or changed a mapping.
    faults_fixed = Fixed,
    /// Of these, the ones that gave a write right back that only the dirty log had taken.
    faults_fast = Fast,
    /// Faults that found the mapping already there: another vCPU was faster, or the TLB was stale.
    faults_spurious = Spurious,
    /// Faults given back to the guest to try again: slots, backing or entry were changing.
    faults_retried = Retried,
    /// Accesses to frames without memory.
    faults_mmio = Mmio,
    /// Of these, the ones answered from an MMIO entry, without a look at the memslots.
    faults_mmio_cached = MmioCached,
    /// Writes to read-only memory.
    faults_read_only = ReadOnly,
    /// Writes to tracked pages.
    faults_tracked = Tracked,
    /// Faults that ended in an error to the embedder.
    faults_failed = Failed,
    /// Compare-and-swaps of an entry that another thread won.
    lost_races = LostRace,
    /// Leaves of 4 KiB mapped now.
    leaves_4k = Leaf4K,
    /// Leaves of 2 MiB mapped now.
    leaves_2m = Leaf2M,
    /// Leaves of 1 GiB mapped now.
    leaves_1g = Leaf1G,
    /// Huge leaves ever split.
    leaves_split = LeafSplit,
    /// Huge leaves ever made of a table of smaller ones.
    leaves_collapsed = LeafCollapsed,
    /// Leaves ever zapped.
    leaves_zapped = Zapped,
    /// Table frames that the library holds now (linked, cached by a vCPU, or waiting to be freed).
    table_frames = TableFrames,
    /// TLB flushes asked of vCPUs (one a vCPU and flush).
    flush_requests = FlushRequest,
    /// TLB flushes carried out by vCPUs at entry.
    flushes = Flush,
    /// Flushes that a shadowed guest asked for, by loading CR3 for one, and that took none: nothing was in the TLB that its
    /// tables do not say.
    flushes_spared = FlushSpared,
    /// Flushes that the embedder carried out by range, which asked nothing of vCPUs.
    flushes_by_range = FlushByRange,
    /// Kicks sent to vCPUs in guest mode.
    kicks = Kick,
    /// Page faults of the guest's own, which shadow paging found.
    faults_injected = Injected,
    /// Leaves that shadow paging made beside the one that was asked for.
    shadow_prefetched = Prefetched,
    /// Times that a guest's page table became writable, its shadow page out of step.
    shadow_unsynced = Unsynced,
    /// Shadow pages zapped because the guest writes to them as if they were no tables, or because their frame has too many.
    shadow_flooded = Flooded,
    /// Shadow pages zapped to make room for others.
    shadow_recycled = Recycled,
    /// Roots made.
    roots_made = RootMade,
    /// Roots that vCPUs dropped because they were obsolete (KVM: obsolete_roots_freed).
    roots_freed = RootFreed,
    /// Roots that vCPUs looked at when they were asked to drop obsolete ones, and kept.
    roots_kept = RootKept,
    /// Times everything was zapped.
    zap_alls = ZapAll,
    /// Times a long operation let go of the lock before its end.
    yields = Yield,
    /// Times the lock was taken for exclusive use.
    exclusive_locks = Exclusive,
}

impl Counters {
    /// Bytes of guest memory mapped now, by leaf size: 4 KiB, 2 MiB, 1 GiB.
    pub const fn mapped_bytes(&self) -> [u64; 3] {
        [self.leaves_4k << 12, self.leaves_2m << 21, self.leaves_1g << 30]
    }

    pub(crate) fn sum<'a>(seats: impl Iterator<Item = &'a SeatCounters>) -> Self {
        let mut sum = Self::default();
        seats.for_each(|seat| sum.add(seat));
        sum
    }
}

/// The counters of one seat.
#[derive(Debug)]
pub(crate) struct SeatCounters([AtomicU64; COUNT]);

impl SeatCounters {
    pub(crate) fn new() -> Self {
        Self([const { AtomicU64::new(0) }; COUNT])
    }

    /// Adds `delta` (two's complement for a decrease). Called by the seat's holder only, which is why no
    /// read-modify-write is needed.
    #[inline]
    pub(crate) fn add(&self, counter: Counter, delta: u64) {
        let cell = &self.0[counter as usize];
        cell.store(cell.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn leaf(&self, level: Level, delta: u64) {
        let counter = match level {
            Level::K4 => Counter::Leaf4K,
            Level::M2 => Counter::Leaf2M,
            _ => Counter::Leaf1G,
        };
        self.add(counter, delta);
    }
}

/// A side of the MMU lock, as others feel it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// A zap's hold of the shared side: it keeps out who wants the lock for itself.
    Shared,
    /// Exclusive use: it keeps out everybody.
    Exclusive,
}

/// What happened, for [`crate::host::Host::trace`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A fault ended.
    Fault {
        /// The frame that faulted.
        gfn: Gfn,
        /// How it ended.
        outcome: Outcome,
    },
    /// A range was zapped; all of it, or the step of it that one hold of the lock did.
    Zap {
        /// The frames.
        range: GfnRange,
        /// Leaves that were removed.
        leaves: u64,
        /// Table frames that were unlinked.
        tables: u64,
    },
    /// A worker has taken the lock; from here on it may be in others' way. Exclusive use is told when it was announced,
    /// before the wait for those who are inside.
    LockTaken {
        /// How.
        side: Side,
    },
    /// The worker is in nobody's way any more.
    LockReleased {
        /// How it was taken.
        side: Side,
        /// Steps that were done in between, of a zap or of a walk for dirty logs, ages and the like: each is the work that
        /// one 4 KiB table is, at most.
        steps: u32,
    },
    /// All vCPUs were made to flush.
    Flush {
        /// The TLB generation that they reach by it.
        generation: u64,
    },
    /// The memslots changed.
    Slots {
        /// Their new generation.
        generation: u64,
    },
}
