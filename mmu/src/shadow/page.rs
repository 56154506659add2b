//! Shadow pages: their books, and the arena that they live in.
//!
//! # Lives
//! A page's *life* is a number that is odd while the page is in use. A [`Handle`] names a page in one life; whoever has
//! kept one asks [`Page::is`] under the page's lock, and a handle of an earlier life is refused. A life begins when the
//! page is put into its bucket, under that bucket's lock, and ends under the page's own lock; from then on nothing is
//! linked to the page or mapped by it. Identity, epoch and the guest's frame are written before a life begins and stand
//! until it has ended.
//!
//! A page's table frame goes back by way of `reclaim`: after a flush, and a grace period that began after the frame was
//! taken out of the page. Whoever has read it inside the lock may therefore use it until it leaves.
//!
//! The place of a page that was zapped is given out again at once. That is safe for everyone who remembers its number:
//! handles have the life; entries that lead to it are compared by frame, of which no other page can have the same while
//! the reader is inside; parents and reverse maps were emptied of it before.
//!
//! Books are made when a place is first used and stay: the arena costs nothing for pages that never were.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::role::{Identity, Role};
use crate::OutOfMemory;
use crate::addr::{ENTRIES, Gfn, Hfn};
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::lock::Shared;
use crate::once::OnceBox;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Pages of one chunk of the arena.
const CHUNK: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) { 4 } else { 64 };

/// The guest's table may be written without our notice (KVM: unsync). Set and cleared under the table's bucket lock, set
/// with [`STALE`] and never without.
pub(super) const UNSYNC: u32 = 1;
/// Entries may be out of step with the guest's table. Set under the bucket lock; cleared under the page's lock and the
/// bucket's, after a look at all entries that began when the table could no more be written.
pub(super) const STALE: u32 = 2;
/// A fault went through the page since the quota last looked.
const USED: u32 = 4;

/// Looks for which a page stays open that was opened before.
const PATIENCE: u32 = 8;

/// A page in one of its lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Handle {
    pub(super) index: u32,
    pub(super) life: u32,
}

/// Where a frame is mapped: an entry of a page. What reverse maps and lists of parents hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place(pub(super) u32);

/// An entry's number takes the low bits of a place.
const ENTRY_BITS: u32 = 9;

impl Place {
    pub(super) const fn new(page: u32, entry: usize) -> Self {
        Self(page << ENTRY_BITS | entry as u32)
    }

    pub(super) const fn page(self) -> u32 {
        self.0 >> ENTRY_BITS
    }

    pub(super) const fn entry(self) -> usize {
        (self.0 & ((1 << ENTRY_BITS) - 1)) as usize
    }
}

/// Neighbouring entries that are noted together as made.
pub(super) const GROUP: usize = if ENTRIES < 64 { 1 } else { ENTRIES / 64 };

/// What is behind a page's lock besides the right to change its links.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// The entries that lead to this page.
    pub(super) parents: Vec<Place>,
    /// The groups of [`GROUP`] entries in which one may be present, a bit each; in the others all are absent. Entries are
    /// made under this lock, and noted here before; they may go without it.
    groups: u64,
}

impl Links {
    /// Entry `entry` is about to be made.
    #[inline]
    pub(super) fn note(&mut self, entry: usize) {
        self.groups |= 1 << (entry / GROUP);
    }

    /// The groups in which an entry may be present, each by its first entry.
    pub(super) fn groups(&self) -> Groups {
        Groups(self.groups)
    }

    /// All entries of the group that begins with `first` are absent, and stay so for as long as the lock is held.
    pub(super) fn note_empty(&mut self, first: usize) {
        self.groups &= !(1 << (first / GROUP));
    }

    /// All entries of the page are absent, and will be.
    pub(super) fn note_all_empty(&mut self) {
        self.groups = 0;
    }
}

/// The first entries of groups.
#[derive(Clone, Copy, Debug)]
pub(super) struct Groups(u64);

impl Groups {
    /// Whether the group that begins with `first` is one of them.
    pub(super) const fn contain(self, first: usize) -> bool {
        self.0 >> (first / GROUP) & 1 != 0
    }

    /// How many they are.
    pub(super) const fn len(self) -> usize {
        self.0.count_ones() as usize
    }
}

impl Iterator for Groups {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let group = self.0.trailing_zeros() as usize;
        // Clears the lowest bit.
        self.0 &= self.0.wrapping_sub(1);
        (group < 64).then_some(group * GROUP)
    }
}

/// One shadow page. On lines of its own, for its lock is written at each leaf that is made in it, and its neighbour in the
/// arena is another vCPU's.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Page {
    life: AtomicU32,
    gfn: AtomicU32,
    role: AtomicU32,
    epoch: AtomicU32,
    marks: AtomicU32,
    /// Times that the guest's table became writable since a fault last went through the page.
    writes: AtomicU32,
    /// 0: the guest's table was never opened; otherwise one more than the looks for which it may stay open.
    patience: AtomicU32,
    /// vCPUs that keep it as a root.
    loads: AtomicU32,
    /// Where it is on the list of pages out of step ([`super::listed`]); 0: it is not.
    place: AtomicU32,
    /// Of the pages out of step, those with numbers up to this are not below ([`super::sync`]).
    in_step_to: AtomicU64,
    /// 0: none.
    frame: AtomicU64,
    /// The host frame of the guest's table.
    guest: AtomicU64,
    /// What each entry that is present leads to: the number of the page below, or the frame that a leaf maps, its first one.
    /// Which of the two, the entry says; who reads both without the page's lock may read them of different times.
    targets: OnceBox<[AtomicU32; ENTRIES]>,
    links: LeafLock<Links>,
}

impl Page {
    fn new() -> Self {
        let zero = || AtomicU32::new(0);
        Self {
            life: zero(),
            gfn: zero(),
            role: zero(),
            epoch: zero(),
            marks: zero(),
            writes: zero(),
            patience: zero(),
            loads: zero(),
            place: zero(),
            in_step_to: AtomicU64::new(0),
            frame: AtomicU64::new(0),
            guest: AtomicU64::new(0),
            targets: OnceBox::new(),
            links: LeafLock::new(Links::default()),
        }
    }

    /// The life now; odd while the page is in use.
    #[inline]
    pub(super) fn life(&self) -> u32 {
        self.life.load(Ordering::Acquire)
    }

    /// Whether this is the life that `handle` means. Under the page's lock the answer stands.
    #[inline]
    pub(super) fn is(&self, handle: Handle) -> bool {
        self.life() == handle.life && handle.life & 1 == 1
    }

    #[inline]
    pub(super) fn identity(&self) -> Identity {
        Identity { gfn: self.gfn(), role: self.role() }
    }

    #[inline]
    pub(super) fn gfn(&self) -> Gfn {
        Gfn(u64::from(self.gfn.load(Ordering::Relaxed)))
    }

    #[inline]
    pub(super) fn role(&self) -> Role {
        Role::from_bits(self.role.load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// The host frame of the guest's table. To be read from while the page is alive, under its lock.
    pub(super) fn guest(&self) -> Hfn {
        Hfn(self.guest.load(Ordering::Relaxed))
    }

    /// The table's frame, which stays a table for as long as the caller is inside.
    #[inline]
    pub(super) fn frame<H: Host>(&self, _inside: &Shared<'_, H>) -> Option<Hfn> {
        let frame = self.frame.load(Ordering::Acquire);
        (frame != 0).then_some(Hfn(frame))
    }

    #[inline]
    pub(super) fn has(&self, mark: u32) -> bool {
        self.marks.load(Ordering::Acquire) & mark != 0
    }

    /// See the marks for who may.
    pub(super) fn set(&self, marks: u32) {
        self.marks.fetch_or(marks, Ordering::AcqRel);
    }

    /// See the marks for who may.
    pub(super) fn clear(&self, marks: u32) {
        self.marks.fetch_and(!marks, Ordering::AcqRel);
    }

    /// A fault goes through the page. Written only when there is news: upper pages are everybody's.
    #[inline]
    pub(super) fn touch(&self) {
        if self.marks.load(Ordering::Relaxed) & USED == 0 {
            self.marks.fetch_or(USED, Ordering::Relaxed);
        }
        if self.writes.load(Ordering::Relaxed) != 0 {
            self.writes.store(0, Ordering::Relaxed);
        }
    }

    /// Whether a fault went through the page since this was asked last.
    pub(super) fn take_used(&self) -> bool {
        self.marks.fetch_and(!USED, Ordering::Relaxed) & USED != 0
    }

    /// Counts one more time that the guest's table becomes writable; how often it was before.
    pub(super) fn count_write(&self) -> u32 {
        self.writes.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn writes(&self) -> u32 {
        self.writes.load(Ordering::Relaxed)
    }

    /// The guest's table becomes writable. Under its bucket lock.
    pub(super) fn note_open(&self) {
        let first = self.patience.load(Ordering::Relaxed) == 0;
        self.patience.store(if first { 1 } else { 1 + PATIENCE }, Ordering::Relaxed);
    }

    /// Whether it was opened again a short while ago.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        self.patience.load(Ordering::Relaxed) > 1
    }

    /// It is looked at and stays open, once more. (A count that is lost changes what a look costs, and nothing else.)
    pub(super) fn count_look(&self) {
        self.patience.store(self.patience.load(Ordering::Relaxed).saturating_sub(1).max(1), Ordering::Relaxed);
    }

    pub(super) fn loads(&self) -> u32 {
        self.loads.load(Ordering::Acquire)
    }

    pub(super) fn count_load(&self) {
        self.loads.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn count_unload(&self) {
        self.loads.fetch_sub(1, Ordering::AcqRel);
    }

    /// Where it is on the list of pages out of step; 0: it is not.
    pub(super) fn place(&self) -> u32 {
        self.place.load(Ordering::Relaxed)
    }

    /// Under the list's lock.
    pub(super) fn set_place(&self, place: u32) {
        self.place.store(place, Ordering::Relaxed);
    }

    /// Of the pages out of step, those with numbers up to this are not below.
    #[inline]
    pub(super) fn in_step_to(&self) -> u64 {
        self.in_step_to.load(Ordering::Acquire)
    }

    /// Says so. Under the page's lock, or before its life begins.
    pub(super) fn note_in_step_to(&self, number: u64) {
        self.in_step_to.fetch_max(number, Ordering::AcqRel);
    }

    /// What entry `entry` leads to, if it leads anywhere.
    #[inline]
    pub(super) fn target(&self, entry: usize) -> u32 {
        self.targets.get().map_or(0, |targets| targets[entry].load(Ordering::Relaxed))
    }

    /// What all entries lead to.
    pub(super) fn targets(&self) -> Option<&[AtomicU32; ENTRIES]> {
        self.targets.get()
    }

    /// Says what entry `entry`, which is absent, is about to lead to. Under the page's lock.
    pub(super) fn aim(&self, entry: usize, target: u32) {
        if let Some(targets) = self.targets.get() {
            targets[entry].store(target, Ordering::Relaxed);
        }
    }

    pub(super) fn links(&self) -> &LeafLock<Links> {
        &self.links
    }

    /// Begins a life. Under the bucket lock of the identity's frame; nobody knows the page yet.
    pub(super) fn begin(&self, identity: Identity, epoch: u32, guest: Option<Hfn>, frame: Hfn) -> u32 {
        self.gfn.store(identity.gfn.0 as u32, Ordering::Relaxed);
        self.role.store(identity.role.bits(), Ordering::Relaxed);
        self.epoch.store(epoch, Ordering::Relaxed);
        self.guest.store(guest.map_or(0, |guest| guest.0), Ordering::Relaxed);
        // A page without a guest's table behind it is never out of step.
        self.marks.store(if guest.is_some() { STALE | USED } else { USED }, Ordering::Relaxed);
        self.writes.store(0, Ordering::Relaxed);
        self.patience.store(0, Ordering::Relaxed);
        self.frame.store(frame.0, Ordering::Release);
        self.life.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Ends the life. Under the page's lock.
    pub(super) fn end(&self) {
        debug_assert!(self.life() & 1 == 1);
        self.life.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes the table's frame out of a page whose life has ended.
    pub(super) fn take_frame(&self) -> Hfn {
        Hfn(self.frame.swap(0, Ordering::AcqRel))
    }
}

#[derive(Debug)]
struct Chunk([Page; CHUNK as usize]);

#[derive(Debug)]
struct Free {
    indexes: Vec<u32>,
    /// Places from here on were never used.
    fresh: u32,
}

/// A place in the arena, and a frame for its table: what a page is made of. Not `Clone`: who has it owns both.
#[derive(Debug)]
pub(super) struct Blank {
    pub(super) index: u32,
    pub(super) frame: Hfn,
}

/// All pages.
#[derive(Debug)]
pub(super) struct Arena {
    chunks: Box<[OnceBox<Chunk>]>,
    free: LeafLock<Free>,
    limit: u32,
}

impl Arena {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            chunks: (0..limit.div_ceil(CHUNK)).map(|_| OnceBox::new()).collect(),
            free: LeafLock::new(Free { indexes: Vec::new(), fresh: 0 }),
            limit,
        }
    }

    /// The page at a place that was given out at some time.
    #[inline]
    pub(super) fn page(&self, index: u32) -> &Page {
        let chunk = self.chunks[(index / CHUNK) as usize].get().expect("a place that was given out has a chunk");
        &chunk.0[(index % CHUNK) as usize]
    }

    /// The page at a place that may never have been given out, or be none.
    #[inline]
    pub(super) fn known(&self, index: u32) -> Option<&Page> {
        Some(&self.chunks.get((index / CHUNK) as usize)?.get()?.0[(index % CHUNK) as usize])
    }

    /// Every page that ever was, with its place.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u32, &Page)> {
        let chunks = (0..).zip(&self.chunks).filter_map(|(number, chunk)| Some((number, chunk.get()?)));
        chunks.flat_map(|(number, chunk)| (number * CHUNK..).zip(&chunk.0))
    }

    pub(super) const fn limit(&self) -> u32 {
        self.limit
    }

    /// Places that are free.
    pub(super) fn free(&self, relax: impl Fn()) -> u32 {
        let free = self.free.lock(relax);
        free.indexes.len() as u32 + self.limit - free.fresh
    }

    /// A free place with books; `None` if there is none. Outside the MMU lock.
    pub(super) fn take(&self, relax: impl Fn()) -> Result<Option<u32>, OutOfMemory> {
        let index = {
            let mut free = self.free.lock(relax);
            match free.indexes.pop() {
                Some(index) => index,
                None if free.fresh == self.limit => return Ok(None),
                None => {
                    // Room for its return, so that giving back never allocates.
                    let fresh = free.fresh as usize + 1;
                    free.indexes.try_reserve(fresh)?;
                    free.fresh += 1;
                    free.fresh - 1
                }
            }
        };
        let chunk = &self.chunks[(index / CHUNK) as usize];
        if chunk.get().is_none() {
            chunk.set(Box::new(Chunk(core::array::from_fn(|_| Page::new()))));
        }
        let page = self.page(index);
        if page.targets.get().is_none() {
            page.targets.set(Box::new(core::array::from_fn(|_| AtomicU32::new(0))));
        }
        Ok(Some(index))
    }

    /// Gives a place back whose page has no life, no links and no frame.
    pub(super) fn put(&self, index: u32, relax: impl Fn()) {
        self.free.lock(relax).indexes.push(index);
    }

    /// Pages in use, and bytes of books.
    pub(super) fn usage(&self, relax: impl Fn()) -> (u64, u64) {
        let alive = self.pages().filter(|(_, page)| page.life() & 1 == 1).count();
        let chunks = self.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        let with_targets = self.pages().filter(|(_, page)| page.targets.get().is_some()).count();
        let parents: usize =
            self.pages().map(|(_, page)| page.links.lock(&relax).parents.capacity() * size_of::<Place>()).sum();
        let bytes = size_of_val(&*self.chunks)
            + chunks * size_of::<Chunk>()
            + with_targets * size_of::<[AtomicU32; ENTRIES]>()
            + parents
            + self.free.lock(relax).indexes.capacity() * size_of::<u32>();
        (alive as u64, bytes as u64)
    }

    /// All tables' frames, at the end of the MMU.
    pub(super) fn take_frames(&self, mut free: impl FnMut(Hfn)) {
        for (_, page) in self.pages() {
            let frame = page.take_frame();
            if frame.0 != 0 {
                free(frame);
            }
        }
    }
}
