//! Memory objects: what stands behind slots.
//!
//! An object is a run of pages with a host frame each. Most pages have the frame that the object's shape gives them;
//! a page that was moved has one of its own, a page that is being taken away has none for the guest. Host frames are
//! never used twice, so a stale translation can not become right again by chance.

use std::collections::BTreeMap;

use nestling::format::MemoryType;
use nestling::host::Extent;
use nestling::{Gfn, GfnRange, Hfn, Slot};

/// How an object lies in host memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Pages.
    pub pages: u64,
    /// Pages before the slot's first: the backing's answers reach beyond the slot.
    pub lead: u64,
    /// The first page's frame modulo 2^18, so that it can be congruent with the slot, or not.
    pub phase: u64,
    /// Pages in one contiguous piece.
    pub chunk: u64,
    /// Frames left out between two pieces.
    pub gap: u64,
    /// Whether the guest may write.
    pub writable: bool,
}

/// Where a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Page {
    /// The guest may reach it at this frame.
    At(Hfn),
    /// Taken from the guest; this was its frame.
    Taken(Hfn),
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Object {
    /// How it lies.
    pub shape: Shape,
    first: Hfn,
    moved: BTreeMap<u64, Page>,
}

impl Object {
    /// Host frames that an object of this shape spans.
    pub const fn span(shape: &Shape) -> u64 {
        shape.pages + shape.pages / shape.chunk * shape.gap
    }

    /// An object at `first`.
    pub const fn new(shape: Shape, first: Hfn) -> Self {
        Self { shape, first, moved: BTreeMap::new() }
    }

    fn natural(&self, page: u64) -> Hfn {
        Hfn(self.first.0 + page + page / self.shape.chunk * self.shape.gap)
    }

    /// Where `page` is.
    pub fn page(&self, page: u64) -> Page {
        self.moved.get(&page).copied().unwrap_or_else(|| Page::At(self.natural(page)))
    }

    /// Takes `page` from the guest.
    pub fn take(&mut self, page: u64) {
        let (Page::At(frame) | Page::Taken(frame)) = self.page(page);
        self.moved.insert(page, Page::Taken(frame));
    }

    /// Gives `page` to the guest at `frame`, or where it was.
    pub fn give(&mut self, page: u64, frame: Option<Hfn>) {
        let (Page::At(old) | Page::Taken(old)) = self.page(page);
        let frame = frame.unwrap_or(old);
        if frame == self.natural(page) {
            self.moved.remove(&page);
        } else {
            self.moved.insert(page, Page::At(frame));
        }
    }

    /// The contiguous run of pages that holds `page`; pages that are taken are not part of their neighbours' runs.
    pub fn run(&self, page: u64) -> std::ops::Range<u64> {
        self.run_over(page, |_, _| true)
    }

    /// The run as it was before pages were taken: what a backing may answer while an invalidation is in progress.
    fn stale_run(&self, page: u64) -> std::ops::Range<u64> {
        self.run_over(page, |page, now| now != Page::Taken(self.natural(page)))
    }

    /// The run of `page` between the pages that are not where the shape has them and that `cuts` confirms.
    fn run_over(&self, page: u64, cuts: impl Fn(u64, Page) -> bool) -> std::ops::Range<u64> {
        if self.moved.get(&page).is_some_and(|now| cuts(page, *now)) {
            return page..page + 1;
        }
        let chunk = page / self.shape.chunk * self.shape.chunk;
        let cut = |(page, now): (&u64, &Page)| cuts(*page, *now).then_some(*page);
        let after = self.moved.range(page..).find_map(cut).unwrap_or(u64::MAX);
        let before = self.moved.range(..page).rev().find_map(cut).map_or(0, |page| page + 1);
        let end = chunk.saturating_add(self.shape.chunk).min(self.shape.pages);
        chunk.max(before)..end.min(after)
    }

    /// What the backing says of `gfn` of `slot`; `stale` as if nothing were taken.
    pub fn extent(&self, slot: &Slot, gfn: Gfn, stale: bool) -> Extent {
        let start = slot.range().start.0;
        let page = gfn.0 - start + self.shape.lead;
        let mut run = if stale { self.stale_run(page) } else { self.run(page) };
        // The lead of an object may lie below guest frame 0.
        run.start = run.start.max(self.shape.lead.saturating_sub(start));
        let (Page::At(hfn) | Page::Taken(hfn)) = self.page(run.start);
        let first = Gfn(start + run.start - self.shape.lead);
        let gfns = GfnRange { start: first, end: Gfn(first.0 + (run.end - run.start)) };
        Extent { gfns, hfn, writable: self.shape.writable, memory: MemoryType::WriteBack }
    }
}
