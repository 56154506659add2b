//! The walk of a fault: down from the root, tables made where they are missing, a leaf at the end.
//!
//! # Protocol
//! The caller is inside the shared side, has checked there that slot, backing and root are still what it asked about,
//! and brings enough table frames for the whole walk. Any number of vCPUs do this at once on the same tables.
//!
//! - An absent entry of a level-1 table is what a fault meets nearly always, so [`map_page`] tries that first, without
//!   a look: on a line that another vCPU wrote last, the look would cost as much again as the compare-and-swap. Where
//!   anything else is in the way, the fault is handled from its start, and a [`Walk`] goes down from the root.
//! - An absent entry becomes a table or leaf by compare-and-swap. The loser goes on from what the winner wrote: into
//!   the winner's table, or finds the winner's leaf (spurious).
//! - A leaf that is there but denies the access gets the rights that slot and backing allow, in place: rights only
//!   grow here, so nothing is flushed.
//! - A table where the mapping would like a huge leaf stays: the fault maps a smaller leaf below it. Making it huge
//!   again is collapsing, not faulting.
//! - In a slot whose writes are logged, an entry becomes writable when it is written, and the log is told after that; a
//!   leaf larger than the log wants is split by its first write. What was only armed again is fixed by
//!   [`fix_protected`], one compare-and-swap.
//! - A frozen entry is being zapped: the fault is retried by the guest, the zap will have ended soon.

use crate::addr::{Gfn, GfnRange, Hfn, Level};
use crate::entry::{self, Books, Entry, change};
use crate::events::Counter;
use crate::format::{Format, Leaf, Rights, State};
use crate::host::{Access, Extent, Host, Page};
use crate::lock::Shared;
use crate::mutants::{self, Mutant};
use crate::notify::Snapshot;
use crate::root::{AdBits, RootRef};
use crate::slots::track::Tracked;
use crate::table::Table;
use crate::tdp::protect::Logged;
use crate::tdp::split::split;
use crate::vcpu::{FaultError, Outcome};

/// Table frames in hand, so that nothing is allocated inside the lock (I19).
#[derive(Debug, Default)]
pub(crate) struct TableCache {
    frames: [Hfn; TableCache::ROOM],
    count: usize,
}

impl TableCache {
    /// Tables that one walk may have to make: those of levels 4 to 1 under a root of level 5.
    pub(crate) const ROOM: usize = 4;

    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.count == Self::ROOM
    }

    pub(crate) fn put(&mut self, frame: Hfn) {
        self.frames[self.count] = frame;
        self.count += 1;
    }

    pub(crate) fn take(&mut self) -> Option<Hfn> {
        self.count = self.count.checked_sub(1)?;
        Some(self.frames[self.count])
    }
}

/// Rights that an access needs in the leaf.
#[inline]
pub(crate) const fn needed(access: Access) -> Rights {
    match access {
        Access::Read => Rights::READ,
        Access::Write => Rights::WRITE,
        Access::Execute => Rights::EXECUTE,
    }
}

/// What a fault wants mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    slot: GfnRange,
    gfn: Gfn,
    access: Access,
    extent: Extent,
    writable: bool,
}

impl Mapping {
    /// The mapping of `gfn` in a slot of frames `slot`.
    #[inline]
    pub(crate) fn new(slot: GfnRange, gfn: Gfn, access: Access, extent: Extent, writable: bool) -> Self {
        Self { slot, gfn, access, extent, writable }
    }

    /// The largest leaf that slot, backing, alignment and `largest` allow.
    fn level(&self, largest: Level) -> Level {
        let fits = |level: Level| {
            let block = GfnRange::block(level, self.gfn);
            largest >= level
                && self.slot.covers(block)
                && self.extent.gfns.covers(block)
                // Guest and host frames must be congruent in the block's size.
                && (self.extent.hfn.0 + (block.start.0 - self.extent.gfns.start.0)).is_multiple_of(level.pages())
        };
        if !fits(Level::M2) {
            Level::K4
        } else if !fits(Level::G1) {
            Level::M2
        } else {
            Level::G1
        }
    }

    #[inline]
    fn hfn(&self, level: Level) -> Hfn {
        // In this order: the block may begin before the extent when the entry met is larger than the mapping wanted.
        // Wrapping: it may then even begin "before" host frame 0, which is no frame that the entry can hold, so that
        // the change of the backing is noticed.
        let hfn = self.extent.hfn.0 + (self.gfn.0 - self.extent.gfns.start.0);
        Hfn(hfn.wrapping_sub(self.gfn.0 & (level.pages() - 1)))
    }

    /// Whether the access that faulted writes. On a write the CPU would set the dirty bit at once; on a read it stays
    /// clear, so that it means written.
    #[inline]
    fn writes(&self) -> bool {
        matches!(self.access, Access::Write)
    }

    /// The leaf, whose dirty bit says whether the guest may have written.
    #[inline]
    fn leaf(&self, level: Level, dirty: bool) -> Leaf {
        leaf(Page { hfn: self.hfn(level), writable: self.writable, memory: self.extent.memory }, dirty)
    }
}

/// A leaf, of any size, with all the rights that its backing gives; `page` says so of its first page.
#[inline]
fn leaf(page: Page, dirty: bool) -> Leaf {
    let mut rights = Rights::READ.union(Rights::EXECUTE);
    if page.writable {
        rights = rights.union(Rights::WRITE);
    }
    Leaf {
        hfn: page.hfn,
        rights,
        host_writable: page.writable,
        mmu_writable: page.writable,
        accessed: true,
        dirty,
        memory: page.memory,
    }
}

/// Maps `page` at `gfn` for a fault that writes or not, under `root`, which is a usual one ([`RootRef::is_usual`]), if that
/// takes one absent entry of a level-1 table; whether it did.
#[inline]
pub(crate) fn map_page<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gfn: Gfn, page: Page, writes: bool) -> bool {
    // Where there is a table of level 1, nothing larger can be mapped, whatever would fit.
    let Some(table) = Table::leaves(inside, root, gfn) else { return false };
    let leaf = H::Format::leaf(Level::K4, leaf(page, writes));
    entry::fill::<H::Format>(table.entry(gfn), Level::K4, leaf, inside.counters()).is_ok()
}

/// A fault whose page could not be mapped just like that. Something is in the way, or has overtaken it: what, this
/// finds out.
pub(crate) struct Obstructed<'a, H: Host> {
    pub(crate) inside: Shared<'a, H>,
    pub(crate) want: Mapping,
    /// Of the memslots that the slot was found in.
    pub(crate) generation: u64,
    pub(crate) snapshot: Snapshot,
    /// What stands in the way of writes to the slot, if anything.
    pub(crate) watch: Option<&'a Watch<'a>>,
}

/// What stands in the way of writes to a slot, besides its being read-only.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'l> {
    /// Its log.
    pub(crate) logged: Option<Logged<'l>>,
    /// Its tracked pages.
    pub(crate) tracked: Option<&'l Tracked>,
    /// Its first frame.
    pub(crate) first: Gfn,
}

impl Watch<'_> {
    /// The largest leaf for `gfn`, `level` if nothing is in the way, and whether somebody watches writes to the page.
    fn level(&self, gfn: Gfn, mut level: Level) -> (Level, bool) {
        if self.logged.is_some_and(|logged| logged.by_page()) {
            level = Level::K4;
        }
        let touches = |level| self.tracked.is_some_and(|pages| pages.touches(self.first, GfnRange::block(level, gfn)));
        while touches(level) {
            match level.down() {
                Some(smaller) => level = smaller,
                None => return (level, true),
            }
        }
        (level, false)
    }
}

/// The same, for one root and one page.
struct Special<'l> {
    log: Option<Log<'l>>,
    /// Somebody watches writes to the page: it is not mapped writable, and its leaf says that a fault must ask.
    watched: bool,
}

impl<H: Host> Obstructed<'_, H> {
    /// Maps what is wanted under `root`, or says why not. Leaves the lock.
    #[cold]
    #[inline(never)]
    pub(crate) fn map(self, root: &RootRef, cache: &mut TableCache) -> Result<Outcome, FaultError> {
        let Self { inside, want, generation, snapshot, watch } = self;
        let (mut level, mut watched) = (want.level(inside.mmu.config.largest), false);
        if let Some(watch) = watch {
            // Inside the lock, which is what the tracker's grace period waits for.
            (level, watched) = watch.level(want.gfn, level);
        }
        let block = GfnRange::block(level, want.gfn);
        let stale = inside.mmu.slots.generation() != generation && !mutants::is(Mutant::SlotsTestedBeforeTheLockOnly);
        let overtaken = stale || inside.mmu.notify.must_retry(snapshot, block);
        if overtaken || !root.is_valid(&inside) {
            return Ok(Outcome::Retry);
        }
        let special;
        let special = match watch {
            None => None,
            Some(_) if watched && want.writes() => return Ok(Outcome::Tracked),
            Some(watch) => {
                let log = watch.logged.map(|logged| Log { by_dirty_bit: logged.by_dirty_bit(root), logged });
                special = Special { log, watched };
                Some(&special)
            }
        };
        let without_ad = root.role().ad_bits() == AdBits::Off;
        Walk { inside: &inside, cache, want, without_ad, special }.map(root, level)
    }
}

/// The log of the slot, for one root.
#[derive(Clone, Copy)]
struct Log<'l> {
    logged: Logged<'l>,
    /// The CPU notices writes; otherwise an entry becomes writable when it is written first, and is marked then.
    by_dirty_bit: bool,
}

impl Log<'_> {
    /// Whether nobody may write through a leaf of `level` without a fault that tells the log.
    fn protects(&self, level: Level) -> bool {
        !self.by_dirty_bit || self.is_too_large(level)
    }

    /// Whether leaves of `level` must not be written through at all.
    fn is_too_large(&self, level: Level) -> bool {
        level > Level::K4 && self.logged.by_page()
    }
}

/// Makes the leaf of 4 KiB for `gfn` writable, if nothing but the log keeps it from being so, and tells the log. `None`
/// where there is anything else.
#[inline]
pub(crate) fn fix_protected<H: Host>(
    inside: &Shared<'_, H>,
    root: &RootRef,
    gfn: Gfn,
    logged: &Logged<'_>,
) -> Option<Outcome> {
    let table = Table::leaves(inside, root, gfn)?;
    let cell = table.entry(gfn);
    let mut raw = cell.read();
    loop {
        let readable = H::Format::permits(raw, Level::K4, Rights::READ);
        if !(readable && raw & H::Format::MMU_WRITABLE != 0 && raw & H::Format::WRITE == 0) {
            return H::Format::permits(raw, Level::K4, Rights::WRITE).then_some(Outcome::Spurious);
        }
        let new = raw | H::Format::WRITE | H::Format::CPU_OWNED;
        if mutants::is(Mutant::DirtyBeforeWritable) {
            logged.mark(Level::K4, gfn);
        }
        match change::<H::Format>(cell, Level::K4, raw, new, Books::None, inside.counters()) {
            Ok(()) => {
                // After it: `slots::dirty` says why. (The dirty bit says the same, where it counts.)
                if !logged.by_dirty_bit(root) && !mutants::is(Mutant::DirtyBeforeWritable) {
                    logged.mark(Level::K4, gfn);
                }
                return Some(Outcome::Fixed { level: Level::K4 });
            }
            Err(now) => raw = now,
        }
    }
}

/// A walk that maps `want`, whatever it meets.
struct Walk<'w, 'a, H: Host> {
    inside: &'w Shared<'a, H>,
    cache: &'w mut TableCache,
    want: Mapping,
    /// Where nobody looks at dirty bits, or none are set, a leaf counts as written as soon as it may be.
    without_ad: bool,
    /// What writes to the slot are held back for.
    special: Option<&'w Special<'w>>,
}

enum Step<'g, H: Host> {
    Into(Table<'g, H>),
    Done(Result<Outcome, FaultError>),
}

enum Met<'g, H: Host> {
    Replace(u64, Books),
    /// A leaf that must not be written through as a whole.
    Split,
    Step(Step<'g, H>),
}

impl<'w, H: Host> Walk<'w, '_, H> {
    fn log(&self) -> Option<&'w Log<'w>> {
        self.special.and_then(|special| special.log.as_ref())
    }

    /// Walks from `root` down to a leaf of `level`, or less where there are tables already.
    fn map(mut self, root: &RootRef, level: Level) -> Result<Outcome, FaultError> {
        let mut table = Table::root(self.inside, root);
        loop {
            let cell = table.entry(self.want.gfn);
            let raw = cell.read();
            let step = if let Some(next) = table.next(raw) {
                Step::Into(next)
            } else if table.level > level {
                self.grow(&table, cell, raw)
            } else {
                self.fill(&table, cell, raw)
            };
            match step {
                Step::Into(next) => table = next,
                Step::Done(outcome) => return outcome,
            }
        }
    }

    /// `cell`, above the level that is wanted, leads to no table yet.
    fn grow(&mut self, table: &Table<'w, H>, cell: &Entry, mut raw: u64) -> Step<'w, H> {
        loop {
            if let Some(next) = table.next(raw) {
                return Step::Into(next);
            }
            match H::Format::decode(raw, table.level) {
                State::Absent | State::Mmio { .. } => {
                    // The cache was topped up for the worst walk, and a lost race puts its frame back.
                    let Some(frame) = self.cache.take() else { return Step::Done(Err(FaultError::OutOfTables)) };
                    let new = H::Format::table(frame);
                    match change::<H::Format>(cell, table.level, raw, new, Books::None, self.inside.counters()) {
                        Ok(()) => raw = new,
                        Err(now) => {
                            self.cache.put(frame);
                            raw = now;
                        }
                    }
                }
                // A huge leaf larger than what is wanted now.
                _ => return self.fill(table, cell, raw),
            }
        }
    }

    /// `cell` is where the leaf belongs, or holds a larger one already.
    fn fill(&mut self, table: &Table<'w, H>, cell: &Entry, mut raw: u64) -> Step<'w, H> {
        let level = table.level;
        loop {
            let (new, book) = match self.meet(table, raw) {
                Met::Replace(new, book) => (new, book),
                Met::Split => {
                    let Some(frame) = self.cache.take() else { return Step::Done(Err(FaultError::OutOfTables)) };
                    match split(self.inside, table, cell, raw, frame) {
                        Ok(next) => {
                            self.inside.counters().add(Counter::LeafSplit, 1);
                            return Step::Into(next);
                        }
                        Err(now) => {
                            self.cache.put(frame);
                            raw = now;
                            continue;
                        }
                    }
                }
                Met::Step(step) => return step,
            };
            let marks = self.log().filter(|log| !log.by_dirty_bit && new & H::Format::WRITE != 0);
            if let Some(log) = marks.filter(|_| mutants::is(Mutant::DirtyBeforeWritable)) {
                log.logged.mark(level, self.want.gfn);
            }
            match change::<H::Format>(cell, level, raw, new, book, self.inside.counters()) {
                Ok(()) => {
                    // After the entry became writable, and before the lock is left: `slots::dirty` says why.
                    if let Some(log) = marks.filter(|_| !mutants::is(Mutant::DirtyBeforeWritable)) {
                        log.logged.mark(level, self.want.gfn);
                    }
                    return Step::Done(Ok(Outcome::Fixed { level }));
                }
                Err(now) => raw = now,
            }
        }
    }

    /// The leaf of `level` for what is wanted. A log lets it be written through only if it is written now, or the CPU
    /// notices.
    fn leaf(&self, level: Level) -> Leaf {
        let writes = self.want.writes();
        let mut leaf = self.want.leaf(level, writes);
        if self.log().is_some_and(|log| log.is_too_large(level) || log.protects(level) && !writes) {
            leaf.rights -= Rights::WRITE;
        }
        if self.special.is_some_and(|special| special.watched) {
            leaf.rights -= Rights::WRITE;
            leaf.mmu_writable = false;
        }
        leaf.dirty |= self.without_ad && leaf.rights.contains(Rights::WRITE);
        leaf
    }

    /// What to do about an entry that holds `raw`.
    fn meet(&self, table: &Table<'w, H>, raw: u64) -> Met<'w, H> {
        let (level, want) = (table.level, &self.want);
        if let Some(next) = table.next(raw) {
            return Met::Step(Step::Into(next));
        }
        if H::Format::permits(raw, level, needed(want.access)) {
            return Met::Step(Step::Done(Ok(Outcome::Spurious)));
        }
        match H::Format::decode(raw, level) {
            // An MMIO entry of an older memslot generation, or one that raced with us: there is memory now.
            State::Absent | State::Mmio { .. } => {
                Met::Replace(H::Format::leaf(level, self.leaf(level)), Books::LeafAdded)
            }
            State::Leaf(_) | State::AccessTracked(_)
                if want.writes() && self.log().is_some_and(|log| log.is_too_large(level)) =>
            {
                Met::Split
            }
            State::Leaf(old) | State::AccessTracked(old) => {
                let new = self.leaf(level);
                let moved = old.hfn != new.hfn && !mutants::is(Mutant::LeafChangedInPlace);
                if moved || old.memory != new.memory {
                    return Met::Step(Step::Done(Err(FaultError::BackingChanged)));
                }
                let leaf = Leaf { dirty: old.dirty || new.dirty, ..new };
                Met::Replace(H::Format::leaf(level, leaf), Books::None)
            }
            State::Frozen if mutants::is(Mutant::FrozenFilled) => {
                Met::Replace(H::Format::leaf(level, self.leaf(level)), Books::LeafAdded)
            }
            State::Frozen => Met::Step(Step::Done(Ok(Outcome::Retry))),
            State::Table(_) => unreachable!("tables were followed above"),
        }
    }
}

/// Leaves an MMIO entry for a frame without memory, so that the next access is known for what it is from the tables
/// alone (F8). Best effort: whatever is in the way stays.
pub(crate) fn map_mmio<H: Host>(
    inside: &Shared<'_, H>,
    root: &RootRef,
    gfn: Gfn,
    generation: u64,
    cache: &mut TableCache,
) {
    let mut table = Table::root(inside, root);
    loop {
        let cell = table.entry(gfn);
        let raw = cell.read();
        if let Some(next) = table.next(raw) {
            table = next;
            continue;
        }
        if !matches!(H::Format::decode(raw, table.level), State::Absent | State::Mmio { .. }) {
            return;
        }
        if table.level == Level::K4 {
            // Losing the race is as good as winning it: the entry has been given a meaning.
            let new = H::Format::mmio(generation as u32);
            let _ = change::<H::Format>(cell, table.level, raw, new, Books::None, inside.counters());
            return;
        }
        let Some(frame) = cache.take() else { return };
        let new = H::Format::table(frame);
        if change::<H::Format>(cell, table.level, raw, new, Books::None, inside.counters()).is_err() {
            cache.put(frame);
        }
    }
}
