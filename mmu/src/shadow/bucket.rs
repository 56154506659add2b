//! Buckets: what is known of guest frames. Each belongs to one bucket; a bucket's lock protects, for its frames, the list
//! of shadow pages that stand for the frame, whether those are in step, the reverse map, and when a right to write was
//! last taken away.
//!
//! Frames that are neighbours are in different buckets, so that faults in the same place rarely meet in one; frames
//! [`STRIDE`] apart share a chunk of reverse maps.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::page::{Place, UNSYNC};
use super::rmap::{Key, Rmap, Room, WORDS};
use super::role::{Identity, Source};
use super::table::Inside;
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange, Level};
use crate::events::Counter;
use crate::format::long_mode::{self, ABSENT};
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU64, Ordering, Padded, load_for_update};
use crate::tlb::Moment;

/// Distance of the frames in one chunk of reverse maps.
const STRIDE: u64 = 512;
/// log2 of the frames from the first to the last of a chunk, rounded up.
const SPAN_SHIFT: u32 = (STRIDE * WORDS as u64).ilog2();

/// All buckets.
#[derive(Debug)]
pub(super) struct Buckets {
    buckets: Box<[Padded<LeafLock<Bucket>>]>,
}

/// See the module head.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Of the shadow pages of its frames, the places in the arena.
    pages: Vec<u32>,
    rmap: Rmap,
    /// When a right to write was last taken away.
    protected: Moment,
}

/// Whether a leaf may become writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Written {
    /// No shadow page of the frame is in step.
    Free,
    /// This one is.
    InStep(u32),
}

fn key(gfn: Gfn) -> Key {
    Key { chunk: (gfn.0 >> SPAN_SHIFT) as u32, word: (gfn.0 / STRIDE) as usize & (WORDS - 1) }
}

impl Buckets {
    /// Buckets for `pages` shadow pages.
    pub(super) fn new(pages: u32) -> Self {
        let count = (pages / 8).next_power_of_two().clamp(STRIDE as u32, 1 << 16);
        let bucket = || Bucket { pages: Vec::new(), rmap: Rmap::new(), protected: Moment::NEVER };
        Self { buckets: (0..count).map(|_| Padded(LeafLock::new(bucket()))).collect() }
    }

    fn index(&self, gfn: Gfn) -> usize {
        (gfn.0 % STRIDE + (gfn.0 >> SPAN_SHIFT) * STRIDE) as usize & (self.buckets.len() - 1)
    }

    pub(super) fn of(&self, gfn: Gfn) -> &LeafLock<Bucket> {
        &self.buckets[self.index(gfn)]
    }

    /// The number of the bucket of `gfn`.
    pub(super) fn number(&self, gfn: Gfn) -> usize {
        self.index(gfn)
    }

    /// A frame of the bucket of that number.
    pub(super) fn any_of(&self, number: usize) -> Gfn {
        self.gfn(number, Key { chunk: (number as u64 / STRIDE) as u32, word: 0 })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &LeafLock<Bucket>> {
        self.buckets.iter().map(|bucket| &bucket.0)
    }

    /// The frame behind a key of the bucket of that number.
    fn gfn(&self, bucket: usize, key: Key) -> Gfn {
        let first = Gfn((u64::from(key.chunk) << SPAN_SHIFT) + key.word as u64 * STRIDE);
        let start = self.index(first);
        Gfn(first.0 + (bucket.wrapping_sub(start) & (self.buckets.len() - 1)) as u64 % STRIDE)
    }

    /// Bytes of buckets, and of reverse maps.
    pub(super) fn usage(&self, relax: impl Fn()) -> (u64, u64) {
        let mut bytes = size_of_val(&*self.buckets);
        let mut rmaps = 0;
        for bucket in self.all() {
            let bucket = bucket.lock(&relax);
            bytes += bucket.pages.capacity() * size_of::<u32>();
            rmaps += bucket.rmap.bytes();
        }
        (bytes as u64, rmaps as u64)
    }
}

impl Bucket {
    /// Makes room for a page of a frame, and for a place of its reverse map. Outside the MMU lock.
    pub(super) fn reserve(&mut self, gfn: Gfn) -> Result<(), OutOfMemory> {
        self.pages.try_reserve(1)?;
        self.rmap.reserve(key(gfn))
    }

    /// Whether a page can be added without an allocation.
    pub(super) fn has_room_for_page(&self) -> bool {
        self.pages.len() < self.pages.capacity()
    }

    pub(super) fn add_page(&mut self, index: u32) {
        self.pages.push(index);
    }

    pub(super) fn remove_page(&mut self, index: u32) {
        self.pages.retain(|other| *other != index);
    }

    /// The page of this identity, made in this epoch.
    pub(super) fn find<H: Host>(&self, inside: Inside<'_, H>, wanted: Identity) -> Option<u32> {
        let epoch = inside.shadow.epoch();
        self.pages.iter().copied().find(|index| {
            let page = inside.page(*index);
            let role = mutants::is(Mutant::ShadowRoleNotCompared) || page.role() == wanted.role;
            page.gfn() == wanted.gfn && role && page.epoch() == epoch && page.life() & 1 == 1
        })
    }

    /// The pages of `gfn`.
    pub(super) fn pages<H: Host>(&self, inside: Inside<'_, H>, gfn: Gfn) -> impl Iterator<Item = u32> {
        self.pages.iter().copied().filter(move |index| inside.page(*index).gfn() == gfn)
    }

    /// The pages of frames in `range`.
    pub(super) fn pages_in<H: Host>(&self, inside: Inside<'_, H>, range: GfnRange) -> impl Iterator<Item = u32> {
        self.pages.iter().copied().filter(move |index| range.contains(inside.page(*index).gfn()))
    }

    /// Whether a leaf of `gfn` may be writable now.
    pub(super) fn may_write<H: Host>(&self, inside: Inside<'_, H>, gfn: Gfn) -> Written {
        let in_step = |index: &u32| {
            let page = inside.page(*index);
            page.role().source() != Source::Identity && !page.has(UNSYNC)
        };
        self.pages(inside, gfn).find(in_step).map_or(Written::Free, Written::InStep)
    }

    pub(super) fn room(&self, gfn: Gfn) -> Room {
        self.rmap.room(key(gfn))
    }

    /// Enters a leaf that was made at `place`.
    pub(super) fn mapped(&mut self, gfn: Gfn, place: Place) {
        self.rmap.add(key(gfn), place);
    }

    /// Removes the leaf at `place`, which maps `gfn`, if there is one. Whether there was.
    pub(super) fn unmap<H: Host>(&mut self, inside: Inside<'_, H>, gfn: Gfn, place: Place) -> bool {
        let Some(cell) = inside.entry(place) else { return false };
        let old = cell.swap(ABSENT, Ordering::AcqRel);
        if old == ABSENT {
            return false;
        }
        if long_mode::is_writable(old) {
            self.protected = inside.mmu.tlb.moment();
        }
        let found = self.rmap.remove(key(gfn), place);
        // The leaf was entered for the frame that its page remembers, and nothing but this removes it.
        assert!(found, "a leaf of {gfn:?} was not in its reverse map");
        inside.counters().leaf(Level::K4, 1u64.wrapping_neg());
        inside.counters().add(Counter::Zapped, 1);
        true
    }

    /// Removes all leaves of `gfn`; how many.
    pub(super) fn unmap_all<H: Host>(&mut self, inside: Inside<'_, H>, gfn: Gfn) -> u64 {
        let mut count = 0;
        while let Some(place) = self.rmap.first(key(gfn)) {
            let present = self.unmap(inside, gfn, place);
            assert!(present, "an entry in the reverse map of {gfn:?} is absent");
            count += 1;
        }
        count
    }

    /// Removes the leaves of `range` that are in the `from`-th chunk of the bucket of that number; how many, `None` past
    /// the last.
    pub(super) fn unmap_chunk<H: Host>(
        &mut self,
        inside: Inside<'_, H>,
        number: usize,
        from: usize,
        range: GfnRange,
    ) -> Option<u64> {
        let mut count = 0;
        for key in self.rmap.keys(from)? {
            let gfn = inside.shadow.buckets.gfn(number, key);
            if range.contains(gfn) {
                count += self.unmap_all(inside, gfn);
            }
        }
        Some(count)
    }

    /// Takes the right to write from all leaves of `gfn`; whether any had it.
    pub(super) fn write_protect<H: Host>(&mut self, inside: Inside<'_, H>, gfn: Gfn) -> bool {
        let mut any = false;
        for place in self.rmap.places(key(gfn)) {
            any |= inside
                .entry(place)
                .is_some_and(|cell| change(cell, long_mode::is_writable, long_mode::write_protected));
        }
        if any {
            self.protected = inside.mmu.tlb.moment();
        }
        any
    }

    /// A leaf lost its right to write at the hands of the caller.
    pub(super) fn note_protected<H: Host>(&mut self, inside: Inside<'_, H>) {
        self.protected = inside.mmu.tlb.moment();
    }

    /// When a right to write was last taken away here. Only after a flush since then no TLB has one that no leaf has.
    pub(super) fn protected(&self) -> Moment {
        self.protected
    }
}

/// Changes an entry if `applies`, whatever marks the CPU sets meanwhile. Whether it did.
fn change(cell: &AtomicU64, applies: impl Fn(u64) -> bool, new: impl Fn(u64) -> u64) -> bool {
    let mut raw = load_for_update(cell);
    while applies(raw) {
        match cell.compare_exchange(raw, new(raw), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => raw = now,
        }
    }
    false
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_found_again_from_its_bucket_and_key() {
        for pages in [64, 512, 2048, 1 << 20] {
            let buckets = Buckets::new(pages);
            let frames = [0, 1, 63, 64, 65, 4095, 32767, 32768, 32769, 98303, 1 << 20, (1 << 32) - 1];
            for gfn in frames.map(Gfn) {
                assert_eq!(buckets.gfn(buckets.index(gfn), key(gfn)), gfn, "{pages}");
            }
            assert_eq!(buckets.index(buckets.any_of(buckets.index(Gfn(77)))), buckets.index(Gfn(77)));
            assert_ne!(buckets.index(Gfn(100)), buckets.index(Gfn(101)));
        }
    }
}
