//! The frame allocator: a binary buddy over physical memory, 4 KiB to 1 GiB.
//!
//! A block of order *n* is 2^n frames, aligned to its size in physical addresses, so a block of order 9 can be mapped
//! by a 2 MiB leaf and one of order 18 by a 1 GiB leaf. Free blocks are on one doubly linked list an order, threaded
//! through the free memory itself; one byte a frame says whether a free block of which order begins there. Giving a
//! block back merges it with its buddy as long as that is free as a whole, so after everything came back, memory
//! looks as it did at the start.
//!
//! One spin lock guards it. It is taken once a 2 MiB of guest memory at most, and once a page table; both are rare next
//! to what they pay for. Interrupt and NMI handlers do not allocate.

use core::ops::Range;
use core::ptr;

use spin::Mutex;

/// Bytes of a frame.
pub const FRAME: u64 = 4096;
/// The order of the largest block, 1 GiB.
pub const MAX_ORDER: u32 = 18;
const ORDERS: usize = MAX_ORDER as usize + 1;

/// Marks a free block's first frame in the map; the low bits are its order.
const FREE: u8 = 0x80;
/// End of a list. No block has this address: it is not aligned.
const NONE: u64 = u64::MAX;

/// The links in the first bytes of a free block.
#[repr(C)]
struct Links {
    next: u64,
    previous: u64,
}

/// The allocator's state. Addresses are pointers: the machine's RAM is mapped where it is, and in tests a piece of the
/// process's own memory plays the machine's.
#[derive(Debug)]
pub struct Buddy {
    map: *mut u8,
    /// The first frame that the map knows.
    base: u64,
    /// How many it knows.
    frames: u64,
    heads: [u64; ORDERS],
    free: u64,
    total: u64,
}

// SAFETY: the pointers lead to memory that this value owns; whoever has the value may use them from any thread.
unsafe impl Send for Buddy {}

impl Buddy {
    /// An allocator that has no memory.
    #[must_use]
    pub const fn empty() -> Self {
        Self { map: ptr::null_mut(), base: 0, frames: 0, heads: [NONE; ORDERS], free: 0, total: 0 }
    }

    /// Gives the allocator its map: one byte a frame, for `frames` frames from number `base` on.
    ///
    /// # Safety
    /// `map` is `frames` bytes that nobody else uses. Whatever is given with [`Buddy::add`] must be memory at the pointer
    /// that its address is.
    pub unsafe fn set_map(&mut self, base: u64, map: *mut u8, frames: u64) {
        // SAFETY: the caller gives us these bytes.
        unsafe { map.write_bytes(0, frames as usize) };
        (self.base, self.map, self.frames) = (base, map, frames);
    }

    /// Adds the whole frames of `range`.
    ///
    /// # Safety
    /// The memory is nobody else's, lies below the map's end and was not added before.
    pub unsafe fn add(&mut self, range: Range<u64>) {
        let (mut at, end) = (range.start.div_ceil(FRAME).max(self.base), (range.end / FRAME).min(self.end()));
        while at < end {
            let order = largest_at(at, end);
            self.total += 1 << order;
            self.free(at * FRAME, order);
            at += 1 << order;
        }
    }

    /// A block of 2^`order` frames, its content undefined.
    pub fn alloc(&mut self, order: u32) -> Option<u64> {
        let from = (order..=MAX_ORDER).find(|&o| self.heads[o as usize] != NONE)?;
        let block = self.heads[from as usize];
        self.take(block, from, order);
        Some(block)
    }

    /// The same, of memory that ends at or below `limit`. Looks through the lists of free blocks: rare.
    pub fn alloc_below(&mut self, order: u32, limit: u64) -> Option<u64> {
        let (block, from) = (order..=MAX_ORDER).find_map(|from| {
            let mut block = self.heads[from as usize];
            while block != NONE && block + (FRAME << order) > limit {
                block = self.links(block).next;
            }
            (block != NONE).then_some((block, from))
        })?;
        self.take(block, from, order);
        Some(block)
    }

    /// Takes the lower end of a free block.
    fn take(&mut self, block: u64, from: u32, order: u32) {
        self.unlink(block, from);
        // The upper halves go back, from large to small.
        for half in (order..from).rev() {
            self.link(block + (FRAME << half), half);
        }
        self.free -= 1 << order;
    }

    /// Takes a block back that [`Buddy::alloc`] gave for the same order.
    pub fn free(&mut self, block: u64, order: u32) {
        let (mut frame, mut order) = (block / FRAME, order);
        let inside = frame >= self.base && frame + (1 << order) <= self.end();
        assert!(inside && frame.trailing_zeros() >= order, "a block that was never given");
        assert!(self.state(frame) & FREE == 0, "a frame came back twice");
        self.free += 1 << order;
        while order < MAX_ORDER {
            let buddy = frame ^ 1 << order;
            let inside = buddy >= self.base && buddy + (1 << order) <= self.end();
            if !inside || self.state(buddy) != FREE | order as u8 {
                break;
            }
            self.unlink(buddy * FRAME, order);
            frame &= !(1 << order);
            order += 1;
        }
        self.link(frame * FRAME, order);
    }

    /// Takes back frames that follow each other, whatever blocks [`Buddy::alloc`] gave them in.
    pub fn free_run(&mut self, run: Range<u64>) {
        let (mut at, end) = (run.start / FRAME, run.end / FRAME);
        assert!(at >= self.base && end <= self.end(), "a block that was never given");
        assert!((at..end).all(|frame| self.state(frame) & FREE == 0), "a frame came back twice");
        while at < end {
            let order = largest_at(at, end);
            self.free(at * FRAME, order);
            at += 1 << order;
        }
    }

    /// Frames that are free now.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        self.free
    }

    /// Frames that were ever added.
    #[must_use]
    pub fn total_frames(&self) -> u64 {
        self.total
    }

    /// Behind the last frame that the map knows.
    fn end(&self) -> u64 {
        self.base + self.frames
    }

    fn state(&self, frame: u64) -> u8 {
        // SAFETY: the map knows `frame`: every caller has checked it.
        unsafe { *self.map.add((frame - self.base) as usize) }
    }

    fn set_state(&mut self, block: u64, state: u8) {
        // SAFETY: as in `state`; `&mut self` excludes other users of the map.
        unsafe { *self.map.add((block / FRAME - self.base) as usize) = state };
    }

    fn links(&mut self, block: u64) -> &mut Links {
        let pointer: *mut Links = ptr::with_exposed_provenance_mut(block as usize);
        // SAFETY: the block is free memory that was given to us, aligned to 4 KiB, and large enough for the links.
        unsafe { &mut *pointer }
    }

    fn link(&mut self, block: u64, order: u32) {
        let next = self.heads[order as usize];
        *self.links(block) = Links { next, previous: NONE };
        if next != NONE {
            self.links(next).previous = block;
        }
        self.heads[order as usize] = block;
        self.set_state(block, FREE | order as u8);
    }

    fn unlink(&mut self, block: u64, order: u32) {
        let Links { next, previous } = *self.links(block);
        if next != NONE {
            self.links(next).previous = previous;
        }
        if previous == NONE {
            self.heads[order as usize] = next;
        } else {
            self.links(previous).next = next;
        }
        self.set_state(block, 0);
    }
}

/// The order of the largest block that begins at frame `at` and does not reach past frame `end`.
fn largest_at(at: u64, end: u64) -> u32 {
    let aligned = if at == 0 { MAX_ORDER } else { at.trailing_zeros().min(MAX_ORDER) };
    aligned.min((end - at).ilog2())
}

static FRAMES: Mutex<Buddy> = Mutex::new(Buddy::empty());

/// Sets up the machine's allocator with `usable` memory and room for `frames` frames (counted from address 0) in its
/// map, which is taken from the first range that is large enough. Returns false when none is.
///
/// # Safety
/// Once, on the boot CPU, with ranges of identity-mapped RAM that nobody uses.
#[must_use]
pub unsafe fn init(usable: &[Range<u64>], frames: u64) -> bool {
    let bytes = frames.next_multiple_of(FRAME);
    let start = |r: &Range<u64>| r.start.next_multiple_of(FRAME);
    let Some(home) = usable.iter().position(|r| r.end.saturating_sub(start(r)) >= bytes) else { return false };
    let map = start(&usable[home]);
    let mut buddy = FRAMES.lock();
    // SAFETY: the map's bytes are free RAM that is left out of what is added below.
    unsafe { buddy.set_map(0, ptr::with_exposed_provenance_mut(map as usize), frames) };
    for (index, range) in usable.iter().enumerate() {
        let from = if index == home { map + bytes } else { range.start };
        // SAFETY: the caller vouches for the ranges; the map's own frames are skipped.
        unsafe { buddy.add(from..range.end) };
    }
    true
}

/// Adds memory that was not reachable at [`init`].
///
/// # Safety
/// As [`init`], each range once.
pub unsafe fn add(range: Range<u64>) {
    // SAFETY: the caller vouches for it.
    unsafe { FRAMES.lock().add(range) };
}

/// A block of 2^`order` frames from the machine's allocator: its physical address. Its content is undefined.
#[must_use]
pub fn alloc(order: u32) -> Option<u64> {
    FRAMES.lock().alloc(order)
}

/// The same, of memory that ends at or below `limit`.
#[must_use]
pub fn alloc_below(order: u32, limit: u64) -> Option<u64> {
    FRAMES.lock().alloc_below(order, limit)
}

/// Gives a block back to the machine's allocator.
pub fn free(block: u64, order: u32) {
    FRAMES.lock().free(block, order);
}

/// Gives frames back that follow each other, as [`Buddy::free_run`].
pub fn free_run(run: Range<u64>) {
    FRAMES.lock().free_run(run);
}

/// A block's bytes.
///
/// # Safety
/// The block was given by [`alloc()`] for this order, and the result is its only use for as long as it lives.
#[must_use]
pub unsafe fn block<'a>(block: u64, order: u32) -> &'a mut [u8] {
    let start = ptr::with_exposed_provenance_mut(block as usize);
    // SAFETY: identity-mapped RAM that is the caller's.
    unsafe { core::slice::from_raw_parts_mut(start, (FRAME as usize) << order) }
}

/// Free and total frames of the machine's allocator.
#[must_use]
pub fn counts() -> (u64, u64) {
    let frames = FRAMES.lock();
    (frames.free_frames(), frames.total_frames())
}

/// Memory of the process in the role of the machine's, for this crate's tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::{Buddy, FRAME, FRAMES};
    use core::ops::Range;
    use std::alloc::{Layout, alloc};
    use std::vec;

    /// An allocator over `ranges`, which count from the start of a fresh piece of memory with that alignment. The memory is
    /// not given back: it is a test's.
    pub(super) fn arena(bytes: u64, align: usize, ranges: &[Range<u64>]) -> (u64, Buddy) {
        let layout = Layout::from_size_align(bytes as usize, align).expect("a layout");
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) }.expose_provenance() as u64;
        let map = vec![0xffu8; (bytes / FRAME) as usize].leak();
        let mut buddy = Buddy::empty();
        // SAFETY: map and memory are leaked, and nobody else's.
        unsafe {
            buddy.set_map(start / FRAME, map.as_mut_ptr(), bytes / FRAME);
            ranges.iter().for_each(|range| buddy.add(start + range.start..start + range.end));
        }
        (start, buddy)
    }

    /// Gives the machine's allocator 256 MiB, once.
    pub(crate) fn machine() {
        const BYTES: u64 = 256 << 20;
        let mut frames = FRAMES.lock();
        if frames.total_frames() == 0 {
            *frames = arena(BYTES, 2 << 20, &[0..BYTES / 2, BYTES / 2..BYTES]).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::arena;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn blocks_are_aligned_and_everything_merges_back() {
        let (_, mut buddy) = arena(16 << 20, 16 << 20, &[0x3000..0x9f000, 0x10_0000..0x100_0000]);
        let before = buddy.free_frames();
        assert_eq!(before, 0x9c + 0xf00);
        let huge = buddy.alloc(9).unwrap();
        assert_eq!(huge % (512 * FRAME), 0);
        let mut taken = vec![(huge, 9)];
        let mut seed = 1u64;
        while let Some(block) = buddy.alloc((seed % 4) as u32) {
            taken.push((block, (seed % 4) as u32));
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 1;
        }
        let mut spans: Vec<_> = taken.iter().map(|&(b, o)| b..b + (FRAME << o)).collect();
        spans.sort_by_key(|s| s.start);
        assert!(spans.windows(2).all(|w| w[0].end <= w[1].start), "two blocks overlap");
        let (even, odd): (Vec<_>, Vec<_>) = taken.iter().enumerate().partition(|(index, _)| index % 2 == 0);
        for (_, (block, order)) in even.into_iter().chain(odd) {
            buddy.free(*block, *order);
        }
        assert_eq!(buddy.free_frames(), before);
        // Only complete merging makes all these possible again: the largest aligned blocks of 1 MiB to 16 MiB.
        for order in [11, 10, 9, 8] {
            assert!(buddy.alloc(order).is_some(), "order {order} did not merge back");
        }
    }

    #[test]
    fn low_memory_is_found_behind_what_was_added_last() {
        let (start, mut buddy) = arena(0x40_0000, 0x40_0000, &[0..0x10_0000, 0x20_0000..0x30_0000]);
        let limit = start + 0x10_0000;
        assert!(buddy.alloc(0).is_some_and(|block| block >= limit), "high memory goes first");
        let mut taken = Vec::new();
        while let Some(block) = buddy.alloc_below(0, limit) {
            taken.push(block);
        }
        assert!(taken.iter().all(|block| *block < limit) && taken.len() == 0x100);
        assert_eq!(buddy.alloc_below(3, start + 0x20_7000), None, "one frame too low");
        assert!(buddy.alloc_below(3, start + 0x21_0000).is_some());
    }

    #[test]
    #[should_panic(expected = "came back twice")]
    fn a_double_free_is_noticed() {
        let (start, mut buddy) = arena(0x4_0000, 0x4_0000, &[0..0x2_0000, 0x2_0000..0x4_0000]);
        let block = buddy.alloc(0).unwrap();
        buddy.free(block, 0);
        buddy.free(start, 0);
    }

    #[test]
    fn a_run_comes_back_whatever_it_was_given_as() {
        let (_, mut buddy) = arena(16 << 20, 16 << 20, &[0x3000..0x9f000, 0x10_0000..0x100_0000]);
        let before = buddy.free_frames();
        let mut taken: Vec<_> = core::iter::from_fn(|| buddy.alloc(0)).collect();
        taken.sort_unstable();
        let mut left = &taken[..];
        // Cut at odd places, and where memory has a hole.
        for length in [1, 2, 3, 50, 100, 700, 1, 2000].into_iter().cycle() {
            let Some(&first) = left.first() else { break };
            let follows = |(frame, expected): &(&u64, u64)| **frame == *expected;
            let run = left.iter().zip((first..).step_by(FRAME as usize)).take(length).take_while(follows).count();
            buddy.free_run(first..first + run as u64 * FRAME);
            left = &left[run..];
        }
        assert_eq!(buddy.free_frames(), before);
        for order in [11, 10, 9, 8] {
            assert!(buddy.alloc(order).is_some(), "order {order} did not merge back");
        }
    }

    #[test]
    #[should_panic(expected = "came back twice")]
    fn a_run_with_a_free_frame_in_it_is_noticed() {
        let (start, mut buddy) = arena(0x4_0000, 0x4_0000, &[0..0x2_0000, 0x2_0000..0x4_0000]);
        while buddy.alloc(0).is_some() {}
        buddy.free(start + 5 * FRAME, 0);
        buddy.free_run(start..start + 8 * FRAME);
    }

    #[test]
    fn an_empty_allocator_gives_nothing() {
        assert_eq!(Buddy::empty().alloc(0), None);
    }
}
