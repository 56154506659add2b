//! Buckets: what is known of guest frames. Each belongs to one bucket; a bucket's lock protects, for its frames, the list
//! of shadow pages that stand for the frame, whether those are in step, the reverse map, and when a right to write was
//! last taken away.
//!
//! Frames of one *block* of 2 MiB share a bucket. So whatever a leaf of 2 MiB has to be weighed against (tables of the
//! guest's among its frames, leaves of 4 KiB of the same frames) is behind the one lock under which the leaf is made or
//! goes, and a fault takes one lock for itself and the neighbours that it maps. Blocks are spread over the buckets, so that
//! vCPUs that go through memory side by side do not meet in the same one again and again. Those that fault in the same
//! block at the same time wait for each other, for as long as eight leaves take.
//!
//! # Two reverse maps
//! A leaf of 2 MiB is entered once, in a map of its own, for its block. What is asked of a *frame* (remove its leaves, take
//! their right to write, look at their age) is asked of both maps, and of a leaf of 2 MiB as a whole: it goes, or loses the
//! right, for all of its frames.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::page::{Place, UNSYNC};
use super::rmap::{Key, NoRoom, RUN, Rmap};
use super::role::{Identity, Source};
use super::table::Inside;
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange, INDEX_BITS, Level};
use crate::events::Counter;
use crate::format::long_mode::{self, ABSENT};
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU64, Ordering, Padded, load_for_update};
use crate::tdp::age::{Age, Clear};
use crate::tlb::Moment;

/// log2 of the words that share a chunk of reverse maps.
const RUN_SHIFT: u32 = RUN.ilog2();
/// log2 of the frames that share a bucket: those of a leaf of 2 MiB.
const BLOCK_SHIFT: u32 = INDEX_BITS;
/// Buckets at least.
const LEAST: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) { 4 } else { 512 };

/// All buckets.
#[derive(Debug)]
pub(super) struct Buckets {
    buckets: Box<[Padded<LeafLock<Bucket>>]>,
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// The shadow pages of its frames, by frame and place in the arena; sorted by frame, those of one frame by age.
    pages: Vec<(u32, u32)>,
    /// Leaves of 4 KiB, by frame.
    rmap: Rmap,
    /// Leaves of 2 MiB, by block; made when there is to be one.
    large: Option<Box<Rmap>>,
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

/// The word of a number: of a frame's in one reverse map, of a block's in the other.
fn key(number: u64) -> Key {
    Key { chunk: (number >> RUN_SHIFT) as u32, word: number as usize & (RUN - 1) }
}

fn number(key: Key) -> u64 {
    u64::from(key.chunk) << RUN_SHIFT | key.word as u64
}

/// Of `gfn`, in the map of leaves of `level`.
#[inline(always)]
fn key_at(level: Level, gfn: Gfn) -> Key {
    if level == Level::K4 { key(gfn.0) } else { key(gfn.0 >> BLOCK_SHIFT) }
}

/// What `range` has of each run.
fn runs(range: GfnRange) -> impl Iterator<Item = GfnRange> {
    let (first, end) = (range.start.0 >> RUN_SHIFT, range.end.0.div_ceil(RUN as u64));
    (first..end).map(move |run| {
        let (start, end) = (Gfn(run << RUN_SHIFT), Gfn((run + 1) << RUN_SHIFT));
        GfnRange { start: start.max(range.start), end: end.min(range.end) }
    })
}

impl Buckets {
    /// Buckets for `pages` shadow pages.
    pub(super) fn new(pages: u32) -> Self {
        let count = (pages / 4).next_power_of_two().clamp(LEAST, 1 << 16);
        let bucket = Bucket::new;
        Self { buckets: (0..count).map(|_| Padded(LeafLock::new(bucket()))).collect() }
    }

    /// The number of the bucket of `gfn`.
    #[inline]
    pub(super) fn number(&self, gfn: Gfn) -> usize {
        // By the golden ratio, of whose multiples the upper bits count: no regular distance in memory is none here.
        let mixed = ((gfn.0 >> BLOCK_SHIFT) as u32).wrapping_mul(0x9e37_79b1);
        (u64::from(mixed) * self.buckets.len() as u64 >> 32) as usize
    }

    pub(super) fn of(&self, gfn: Gfn) -> &LeafLock<Bucket> {
        self.numbered(self.number(gfn))
    }

    /// The bucket of that number.
    pub(super) fn numbered(&self, number: usize) -> &LeafLock<Bucket> {
        &self.buckets[number]
    }

    pub(super) fn all(&self) -> impl ExactSizeIterator<Item = &LeafLock<Bucket>> {
        self.buckets.iter().map(|bucket| &bucket.0)
    }

    /// Bytes of buckets, and of reverse maps.
    pub(super) fn usage(&self, relax: impl Fn()) -> (u64, u64) {
        let mut bytes = size_of_val(&*self.buckets);
        let mut rmaps = 0;
        for bucket in self.all() {
            let bucket = bucket.lock(&relax);
            bytes += bucket.pages.capacity() * size_of::<(u32, u32)>();
            rmaps += bucket.rmap.bytes() + bucket.large.as_ref().map_or(0, |map| size_of::<Rmap>() + map.bytes());
        }
        (bytes as u64, rmaps as u64)
    }

    /// Entries in all reverse maps.
    pub(super) fn mappings(&self, relax: impl Fn()) -> u64 {
        let of = |bucket: &Bucket| bucket.rmap.count() + bucket.large.as_ref().map_or(0, |map| map.count());
        self.all().map(|bucket| of(&bucket.lock(&relax))).sum()
    }
}

impl Bucket {
    fn new() -> Self {
        Self { pages: Vec::new(), rmap: Rmap::new(), large: None, protected: Moment::NEVER }
    }

    #[inline(always)]
    fn map(&mut self, level: Level) -> Option<&mut Rmap> {
        if level == Level::K4 { Some(&mut self.rmap) } else { self.large.as_deref_mut() }
    }

    /// The places of the leaves of 2 MiB that map `gfn`.
    #[inline]
    fn large_places(&self, gfn: Gfn) -> impl Iterator<Item = Place> {
        self.large.iter().flat_map(move |map| map.places(key_at(Level::M2, gfn)))
    }

    /// Makes room for a page of a frame, and for a place of a leaf of `level` that maps it. Outside the MMU lock.
    pub(super) fn reserve(&mut self, level: Level, gfn: Gfn) -> Result<(), OutOfMemory> {
        self.pages.try_reserve(1)?;
        let map =
            if level == Level::K4 { &mut self.rmap } else { self.large.get_or_insert_with(|| Box::new(Rmap::new())) };
        map.reserve(key_at(level, gfn))
    }

    /// Whether a page can be added without an allocation.
    pub(super) fn has_room_for_page(&self) -> bool {
        self.pages.len() < self.pages.capacity()
    }

    /// Enters a page of `gfn`, for which there is room.
    pub(super) fn add_page(&mut self, gfn: Gfn, index: u32) {
        let position = self.pages.partition_point(|(other, _)| u64::from(*other) <= gfn.0);
        self.pages.insert(position, (gfn.0 as u32, index));
    }

    pub(super) fn remove_page(&mut self, index: u32) {
        self.pages.retain(|(_, other)| *other != index);
    }

    /// The page of this identity, made in this epoch.
    pub(super) fn find<H: Host>(&self, inside: Inside<'_, H>, wanted: Identity) -> Option<u32> {
        let epoch = inside.shadow.epoch();
        self.pages(wanted.gfn).find(|index| {
            let page = inside.page(*index);
            let role = mutants::is(Mutant::ShadowRoleNotCompared) || page.role() == wanted.role;
            role && page.epoch() == epoch && page.life() & 1 == 1
        })
    }

    /// The pages of `gfn`.
    #[inline]
    pub(super) fn pages(&self, gfn: Gfn) -> impl Iterator<Item = u32> {
        self.pages_in(GfnRange { start: gfn, end: Gfn(gfn.0 + 1) })
    }

    /// The pages of frames in `range`.
    #[inline]
    pub(super) fn pages_in(&self, range: GfnRange) -> impl Iterator<Item = u32> {
        // Most buckets have none.
        let first = match self.pages.is_empty() {
            true => 0,
            false => self.pages.partition_point(|(gfn, _)| u64::from(*gfn) < range.start.0),
        };
        let rest = self.pages[first..].iter();
        rest.take_while(move |(gfn, _)| u64::from(*gfn) < range.end.0).map(|(_, index)| *index)
    }

    /// Whether a leaf of `gfn` may be writable now.
    #[inline]
    pub(super) fn may_write<H: Host>(&self, inside: Inside<'_, H>, gfn: Gfn) -> Written {
        let in_step = |index: &u32| {
            let page = inside.page(*index);
            page.role().source() != Source::Identity && !page.has(UNSYNC)
        };
        self.pages(gfn).find(in_step).map_or(Written::Free, Written::InStep)
    }

    /// Whether a leaf of 2 MiB may map `block`: no shadow page stands for a table among its frames, in step or not, nor
    /// one that is being taken apart, for that one leaves its bucket last.
    ///
    /// Under this lock a page becomes visible, and the leaf is made: of the two, the second sees the first.
    #[inline]
    pub(super) fn may_be_large<H: Host>(&self, inside: Inside<'_, H>, block: GfnRange) -> bool {
        !self.pages_in(block).any(|index| inside.page(index).role().source() != Source::Identity)
            || mutants::is(Mutant::ShadowLargeOverTable)
    }

    /// Of the pages that are made of the table `gfn`, one that is in the way if there are more than `most`: one that no
    /// vCPU keeps as a root, if there is such.
    pub(super) fn surplus<H: Host>(&self, inside: Inside<'_, H>, gfn: Gfn, most: usize) -> Option<u32> {
        // One that is dying goes by itself.
        let counts = |index: &u32| {
            let page = inside.page(*index);
            page.role().source() != Source::Identity && page.life() & 1 == 1
        };
        let pages = || self.pages(gfn).filter(counts);
        pages().nth(most)?;
        pages().find(|index| inside.page(*index).loads() == 0).or_else(|| pages().next())
    }

    /// Enters a leaf of `level` that is about to be made at `place`, for `gfn` or from there on.
    #[inline(always)]
    pub(super) fn mapped(&mut self, level: Level, gfn: Gfn, place: Place) -> Result<(), NoRoom> {
        self.map(level).map_or(Err(NoRoom::Yet), |map| map.add(key_at(level, gfn), place))
    }

    /// Removes the leaf of `level` at `place`, which maps `gfn`, if there is one. Whether there was.
    #[inline(always)]
    pub(super) fn unmap<H: Host>(&mut self, inside: Inside<'_, H>, level: Level, gfn: Gfn, place: Place) -> bool {
        let Some(cell) = inside.entry(place) else { return false };
        let old = cell.swap(ABSENT, Ordering::AcqRel);
        if old == ABSENT {
            return false;
        }
        if long_mode::is_writable(old) {
            self.protected = inside.mmu.tlb.moment();
        }
        let found = self.map(level).is_some_and(|map| map.remove(key_at(level, gfn), place));
        // The leaf was entered for the frame that its page remembers, and nothing but this removes it.
        assert!(found, "a leaf of {gfn:?} was not in its reverse map");
        inside.counters().leaf(level, 1u64.wrapping_neg());
        inside.counters().add(Counter::Zapped, 1);
        true
    }

    /// Removes all leaves of `level` that map `gfn`; how many.
    fn unmap_level<H: Host>(&mut self, inside: Inside<'_, H>, level: Level, gfn: Gfn) -> u64 {
        let mut count = 0;
        while let Some(place) = self.map(level).and_then(|map| map.first(key_at(level, gfn))) {
            let present = self.unmap(inside, level, gfn, place);
            assert!(present, "an entry in the reverse map of {gfn:?} is absent");
            count += 1;
        }
        count
    }

    /// Removes the leaves of 2 MiB that map `gfn`.
    pub(super) fn unmap_large<H: Host>(&mut self, inside: Inside<'_, H>, gfn: Gfn) {
        self.unmap_level(inside, Level::M2, gfn);
    }

    /// Removes all leaves that map a frame of `range`, which lies in one block; how many.
    pub(super) fn unmap_range<H: Host>(&mut self, inside: Inside<'_, H>, range: GfnRange) -> u64 {
        let mut count = self.unmap_level(inside, Level::M2, range.start);
        for run in runs(range) {
            if self.rmap.has(key_at(Level::K4, run.start)) {
                count += (run.start.0..run.end.0).map(|gfn| self.unmap_level(inside, Level::K4, Gfn(gfn))).sum::<u64>();
            }
        }
        count
    }

    /// Removes the leaves that map frames of `range` and are in the `from`-th chunk, of both reverse maps; how many, `None`
    /// past the last.
    pub(super) fn unmap_chunk<H: Host>(&mut self, inside: Inside<'_, H>, from: usize, range: GfnRange) -> Option<u64> {
        // (Chunks that are made meanwhile move later ones further back: none is passed over.)
        Some(if let Some(keys) = self.rmap.keys(from) {
            let frames = keys.map(|key| Gfn(number(key))).filter(|gfn| range.contains(*gfn));
            frames.map(|gfn| self.unmap_level(inside, Level::K4, gfn)).sum()
        } else {
            let keys = self.large.as_ref()?.keys(from - self.rmap.chunks())?;
            let blocks = keys.map(|key| Gfn(number(key) << BLOCK_SHIFT));
            let blocks = blocks.filter(|gfn| GfnRange::block(Level::M2, *gfn).overlaps(range));
            blocks.map(|gfn| self.unmap_level(inside, Level::M2, gfn)).sum()
        })
    }

    /// Takes the right to write from all leaves that map one of `gfns`, which lie in the block of `block`.
    pub(super) fn write_protect<H: Host>(
        &mut self,
        inside: Inside<'_, H>,
        block: Gfn,
        gfns: impl Iterator<Item = Gfn>,
    ) {
        let protect = |place| {
            inside.entry(place).is_some_and(|cell| change(cell, long_mode::is_writable, long_mode::write_protected))
        };
        let mut any = self.large_places(block).fold(false, |any, place| any | protect(place));
        for gfn in gfns {
            any = self.rmap.places(key_at(Level::K4, gfn)).fold(any, |any, place| any | protect(place));
        }
        if any {
            self.protected = inside.mmu.tlb.moment();
        }
    }

    /// Whether nothing is known of its frames.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.rmap.chunks() == 0 && self.large.is_none()
    }

    /// Takes the right to write from one leaf, of a frame of this bucket, if it is there and has it.
    pub(super) fn write_protect_leaf<H: Host>(&mut self, inside: Inside<'_, H>, cell: &AtomicU64) {
        if change(cell, long_mode::is_writable, long_mode::write_protected) {
            self.protected = inside.mmu.tlb.moment();
        }
    }

    /// Adds the ages of the leaves of `range`, which lies in one block, to `age`.
    pub(super) fn look_at_age<H: Host>(&self, inside: Inside<'_, H>, range: GfnRange, clear: Clear, age: &mut Age) {
        let mut look = |place, pages| {
            let Some(cell) = inside.entry(place) else { return };
            let raw = load_for_update(cell);
            age.mapped += pages;
            if !long_mode::is_young(raw) {
                return;
            }
            age.young += pages;
            if clear == Clear::Yes {
                // Once: see `age`.
                let _ = cell.compare_exchange(raw, long_mode::aged(raw), Ordering::AcqRel, Ordering::Acquire);
            }
        };
        self.large_places(range.start).for_each(|place| look(place, range.pages()));
        for run in runs(range).filter(|run| self.rmap.has(key_at(Level::K4, run.start))) {
            for gfn in (run.start.0..run.end.0).map(Gfn) {
                self.rmap.places(key_at(Level::K4, gfn)).for_each(|place| look(place, 1));
            }
        }
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
    use alloc::vec;

    #[test]
    fn a_frame_is_found_again_by_its_key_and_shares_its_bucket_with_its_block() {
        for pages in [64, 512, 2048, 1 << 20] {
            let buckets = Buckets::new(pages);
            let frames = [0, 1, 63, 64, 65, 4095, 32767, 32768, 32769, 98303, 1 << 20, (1 << 32) - 1];
            for frame in frames.map(Gfn) {
                assert_eq!(number(key_at(Level::K4, frame)), frame.0);
                assert_eq!(number(key_at(Level::M2, frame)) << BLOCK_SHIFT, Level::M2.align_down(frame).0);
                assert_eq!(buckets.number(frame), buckets.number(Level::M2.align_down(frame)), "{pages}");
            }
        }
    }

    /// Two vCPUs that go through memory side by side, any power of two apart, are rarely at the same bucket.
    #[test]
    fn blocks_are_spread() {
        let buckets = Buckets::new(2048);
        for distance in (0..23).map(|shift| 1u64 << shift) {
            let meet = (0..1u64 << 12).filter(|block| {
                let gfn = |block: u64| Gfn(block << BLOCK_SHIFT);
                buckets.number(gfn(*block)) == buckets.number(gfn(block + distance))
            });
            assert!(meet.count() < 64, "{distance}");
        }
        let mut counts = vec![0; buckets.all().len()];
        (0..1u64 << 12).for_each(|block| counts[buckets.number(Gfn(block << BLOCK_SHIFT))] += 1);
        assert!(counts.iter().all(|count| (2..=16).contains(count)), "{counts:?}");
    }

    #[test]
    fn pages_are_found_by_frame() {
        let mut bucket = Bucket::new();
        for (gfn, index) in [(5, 1), (3, 2), (5, 3), (9, 4), (0, 5)] {
            bucket.reserve(Level::K4, Gfn(gfn)).unwrap();
            bucket.add_page(Gfn(gfn), index);
        }
        let of = |gfn| bucket.pages(Gfn(gfn)).collect::<Vec<u32>>();
        assert_eq!((of(5), of(3), of(9), of(0)), (vec![1, 3], vec![2], vec![4], vec![5]));
        assert!(of(4).is_empty());
        bucket.remove_page(1);
        let range = GfnRange { start: Gfn(1), end: Gfn(9) };
        assert_eq!(bucket.pages_in(range).collect::<Vec<_>>(), [2, 3]);
    }
}
