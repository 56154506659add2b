//! A vCPU's dirty ring: its writes in the order in which they were noticed (F35).
//!
//! # Protocol
//! The bitmap is what is believed; a ring says where to look. A fault that sets a bit which was clear pushes the page on the
//! ring of its vCPU, in the same stay in the lock; whoever holds the [`DirtyRing`] takes entries, uses them, and arms their
//! pages again with [`crate::Worker::reset_dirty`], which takes the bits. One vCPU pushes, one holder takes: head and tail
//! are each written by one side.
//!
//! A ring that is nearly full ends the vCPU's turn before it begins ([`crate::FaultError::DirtyRingFull`]), so that the
//! embedder empties it. What does not fit all the same is in the bitmap alone, as are the embedder's own writes, writes
//! that the CPU notices by dirty bits, and what was dirty from the start: the last look is always a harvest of the bitmap.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::OutOfMemory;
use crate::addr::Level;
use crate::slots::SlotId;
use crate::sync::{AtomicU64, Ordering, Padded};

/// Entries that are kept free: a fault pushes at most one, and handling one exit may take a few faults. (In shadow tables it
/// may push another one for each of the guest's tables that its walk marks, which happens once a table.)
const RESERVED: u64 = 8;
/// Where the second word of an entry has the level.
const LEVEL_SHIFT: u32 = 56;

/// Pages that a fault made writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyPages {
    /// The slot.
    pub slot: SlotId,
    /// The page that was written, counted from the slot's first.
    pub page: u64,
    /// The leaf that maps it: all of its pages are dirty.
    pub level: Level,
}

#[derive(Debug)]
pub(crate) struct Ring {
    entries: Box<[[AtomicU64; 2]]>,
    /// Entries ever pushed.
    head: Padded<AtomicU64>,
    /// Entries ever taken.
    tail: Padded<AtomicU64>,
}

/// The taking end of a vCPU's ring.
#[derive(Debug)]
pub struct DirtyRing {
    ring: Arc<Ring>,
}

impl Ring {
    /// A ring of `entries`, which is no less than [`RESERVED`], and its taking end.
    pub(crate) fn new(entries: usize) -> Result<(Arc<Self>, DirtyRing), OutOfMemory> {
        let (count, mut words) = (entries.max(2 * RESERVED as usize), Vec::new());
        words.try_reserve_exact(count)?;
        words.resize_with(count, || [AtomicU64::new(0), AtomicU64::new(0)]);
        let counter = || Padded(AtomicU64::new(0));
        let ring = Arc::new(Self { entries: words.into_boxed_slice(), head: counter(), tail: counter() });
        let taking = DirtyRing { ring: Arc::clone(&ring) };
        Ok((ring, taking))
    }

    fn slot(&self, number: u64) -> &[AtomicU64; 2] {
        &self.entries[(number % self.entries.len() as u64) as usize]
    }

    /// Pushes, if there is room. By the vCPU alone.
    pub(crate) fn push(&self, pages: DirtyPages) {
        let head = self.head.load(Ordering::Relaxed);
        // Acquire: the holder has read the entry that is about to be overwritten.
        if head - self.tail.load(Ordering::Acquire) >= self.entries.len() as u64 {
            return;
        }
        let [slot, page] = self.slot(head);
        slot.store(u64::from(pages.slot.0), Ordering::Relaxed);
        page.store(pages.page | u64::from(pages.level.number()) << LEVEL_SHIFT, Ordering::Relaxed);
        // Release: who sees the new head sees the entry.
        self.head.store(head + 1, Ordering::Release);
    }

    /// Whether the vCPU should not enter before the ring was emptied.
    pub(crate) fn is_nearly_full(&self) -> bool {
        let used = self.head.load(Ordering::Relaxed) - self.tail.load(Ordering::Acquire);
        used + RESERVED > self.entries.len() as u64
    }
}

impl DirtyRing {
    /// Takes the oldest entry.
    pub fn take(&mut self) -> Option<DirtyPages> {
        let tail = self.ring.tail.load(Ordering::Relaxed);
        if tail == self.ring.head.load(Ordering::Acquire) {
            return None;
        }
        let [slot, page] = self.ring.slot(tail);
        let (slot, word) = (SlotId(slot.load(Ordering::Relaxed) as u32), page.load(Ordering::Relaxed));
        self.ring.tail.store(tail + 1, Ordering::Release);
        let level = Level::from_number((word >> LEVEL_SHIFT) as u8)?;
        Some(DirtyPages { slot, page: word & ((1 << LEVEL_SHIFT) - 1), level })
    }

    /// Entries in it now.
    pub fn len(&self) -> u64 {
        self.ring.head.load(Ordering::Acquire) - self.ring.tail.load(Ordering::Relaxed)
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_order_and_refuses_what_does_not_fit() {
        let (ring, mut taking) = Ring::new(0).unwrap();
        let entry = |page| DirtyPages { slot: SlotId(7), page, level: Level::M2 };
        for page in 0..100 {
            assert_eq!(ring.is_nearly_full(), page > RESERVED, "{page}");
            ring.push(entry(page));
        }
        assert_eq!(taking.len(), 2 * RESERVED);
        for page in 0..2 * RESERVED {
            assert_eq!(taking.take(), Some(entry(page)));
        }
        assert_eq!(taking.take(), None);
        assert!(taking.is_empty() && !ring.is_nearly_full());
        ring.push(entry(1 << 40));
        assert_eq!(taking.take(), Some(entry(1 << 40)), "it goes round");
    }
}
