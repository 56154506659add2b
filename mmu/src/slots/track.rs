//! Pages whose writes somebody watches (F42).
//!
//! # Protocol
//! Each page has a count of watchers; while it is not zero no entry of any size lets the guest write the page, and a
//! write ends in [`crate::Outcome::Tracked`]: the embedder carries it out and tells whoever watches. Reads and fetches go on.
//! That is one of three reasons for which a write may be held back, beside a read-only slot and the dirty log; they add up,
//! because each is asked of every fault by itself, and an entry says which of them may be forgotten without asking:
//! MMU_WRITABLE is set where the log alone stands in the way.
//!
//! Tracking begins: the bit is set → a grace period, after which every fault sees it → the page's entries lose W and
//! MMU_WRITABLE, flushed before the lock is left. Faults look at the bit inside the lock. Tracking ends when the count is
//! zero: the next write faults and finds nothing in its way.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use super::dirty::{Bitmap, WORD};
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange};
use crate::leaf_lock::LeafLock;

/// The tracked pages of one slot. Pages are counted from the slot's first.
#[derive(Debug)]
pub(crate) struct Tracked {
    bits: Bitmap,
    /// Watchers of each page that has any; changed under the memslot update lock.
    watchers: LeafLock<BTreeMap<u64, u32>>,
}

impl Tracked {
    pub(super) fn new(pages: u64) -> Result<Arc<Self>, OutOfMemory> {
        Ok(Arc::new(Self { bits: Bitmap::new(pages, false)?, watchers: LeafLock::new(BTreeMap::new()) }))
    }

    /// One more watches `page`; whether it is the first.
    pub(crate) fn add(&self, page: u64, relax: impl Fn()) -> bool {
        let mut watchers = self.watchers.lock(relax);
        let count = watchers.entry(page).or_insert(0);
        *count = count.saturating_add(1);
        if *count == 1 {
            self.bits.set((page / WORD) as usize, 1 << (page % WORD));
        }
        *count == 1
    }

    /// One less watches `page`; whether anyone did.
    pub(crate) fn remove(&self, page: u64, relax: impl Fn()) -> bool {
        let mut watchers = self.watchers.lock(relax);
        let Some(count) = watchers.get_mut(&page) else { return false };
        *count -= 1;
        if *count == 0 {
            watchers.remove(&page);
            self.bits.take((page / WORD) as usize, 1 << (page % WORD));
        }
        true
    }

    /// Whether any page of `block` is watched, in a slot that begins at `first` and holds the block.
    pub(crate) fn touches(&self, first: Gfn, block: GfnRange) -> bool {
        let (mut page, end) = (block.start.0 - first.0, block.end.0 - first.0);
        while page < end {
            let next = ((page / WORD + 1) * WORD).min(end);
            let here = u64::MAX << (page % WORD) & u64::MAX >> (page / WORD * WORD + WORD - next);
            if self.bits.get((page / WORD) as usize) & here != 0 {
                return true;
            }
            page = next;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_are_counted() {
        let tracked = Tracked::new(200).unwrap();
        let has = |page| tracked.touches(Gfn(0), GfnRange { start: Gfn(page), end: Gfn(page + 1) });
        assert!(tracked.add(130, || ()) && !tracked.add(130, || ()));
        let block = |start: u64, end: u64| GfnRange { start: Gfn(1000 + start), end: Gfn(1000 + end) };
        assert!(has(130) && !has(129));
        assert!(tracked.touches(Gfn(1000), block(0, 131)) && tracked.touches(Gfn(1000), block(130, 200)));
        assert!(!tracked.touches(Gfn(1000), block(0, 130)) && !tracked.touches(Gfn(1000), block(131, 200)));
        assert!(tracked.remove(130, || ()) && has(130), "one watcher is left");
        assert!(tracked.remove(130, || ()) && !has(130));
        assert!(!tracked.remove(130, || ()), "nobody watches it");
    }
}
