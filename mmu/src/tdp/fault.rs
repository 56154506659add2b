//! The walk of a fault: down from the root, tables made where they are missing, a leaf at the end.
//!
//! # Protocol
//! The caller is inside the shared side, has checked there that slot, backing and root are still what it asked about,
//! and brings enough table frames for the whole walk. Any number of vCPUs do this at once on the same tables.
//!
//! - An absent entry becomes a table or leaf by compare-and-swap. The loser goes on from what the winner wrote: into
//!   the winner's table, or finds the winner's leaf (spurious).
//! - A leaf that is there but denies the access gets the rights that slot and backing allow, in place: rights only
//!   grow here, so nothing is flushed.
//! - A table where the mapping would like a huge leaf stays: the fault maps a smaller leaf below it. Making it huge
//!   again is collapsing, not faulting.
//! - A frozen entry is being zapped: the fault is retried by the guest, the zap will have ended soon.

use crate::addr::{Gfn, Hfn, Level};
use crate::entry::{Books, change};
use crate::format::{Format, Leaf, Rights, State};
use crate::host::{Access, Extent, Host};
use crate::lock::Shared;
use crate::root::RootRef;
use crate::slots::Slot;
use crate::sync::{AtomicU64, Ordering};
use crate::table::Table;
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
    gfn: Gfn,
    level: Level,
    access: Access,
    extent: Extent,
    writable: bool,
}

impl Mapping {
    /// The largest mapping that slot, backing, alignment and `largest` allow.
    #[inline]
    pub(crate) fn new(slot: &Slot, gfn: Gfn, access: Access, extent: Extent, largest: Level, writable: bool) -> Self {
        let fits = |level: Level| {
            let (first, end) = (level.align_down(gfn), level.next_block(gfn));
            let range = slot.range();
            first >= range.start
                && end <= range.end
                && first >= extent.gfns.start
                && end <= extent.gfns.end
                // Guest and host frames must be congruent in the block's size.
                && (extent.hfn.0 + (first.0 - extent.gfns.start.0)).is_multiple_of(level.pages())
        };
        let mut level = Level::K4;
        if largest >= Level::M2 && fits(Level::M2) {
            level = if largest >= Level::G1 && fits(Level::G1) { Level::G1 } else { Level::M2 };
        }
        Self { gfn, level, access, extent, writable }
    }

    #[inline]
    fn hfn(&self, level: Level) -> Hfn {
        // In this order: the block may begin before the extent when the entry met is larger than the mapping wanted.
        Hfn(self.extent.hfn.0 + (self.gfn.0 - self.extent.gfns.start.0) - (self.gfn.0 & (level.pages() - 1)))
    }

    #[inline]
    fn leaf(&self, level: Level) -> Leaf {
        let mut rights = Rights::READ.union(Rights::EXECUTE);
        if self.writable {
            rights = rights.union(Rights::WRITE);
        }
        Leaf {
            hfn: self.hfn(level),
            rights,
            host_writable: self.writable,
            mmu_writable: self.writable,
            accessed: true,
            // On a write the CPU would set it at once; on a read it stays clear, so that the dirty bit means written.
            dirty: matches!(self.access, Access::Write),
            memory: self.extent.memory,
        }
    }
}

/// Maps `want` under `root`.
#[inline]
pub(crate) fn map<H: Host>(
    inside: &Shared<'_, H>,
    root: &RootRef,
    want: Mapping,
    cache: &mut TableCache,
) -> Result<Outcome, FaultError> {
    let mut table = Table::root(inside, root);
    loop {
        let cell = table.entry(want.gfn);
        let raw = cell.load(Ordering::Acquire);
        if let Some(next) = table.next(raw) {
            table = next;
        } else if table.level > want.level {
            match grow(inside, &table, cell, raw, &want, cache) {
                Step::Into(next) => table = next,
                Step::Done(outcome) => return outcome,
            }
        } else {
            match fill(inside, &table, cell, raw, &want) {
                Step::Into(next) => table = next,
                Step::Done(outcome) => return outcome,
            }
        }
    }
}

enum Step<'g, H: Host> {
    Into(Table<'g, H>),
    Done(Result<Outcome, FaultError>),
}

/// `cell`, above the level that is wanted, leads to no table yet.
#[cold]
fn grow<'g, H: Host>(
    inside: &Shared<'_, H>,
    table: &Table<'g, H>,
    cell: &AtomicU64,
    mut raw: u64,
    want: &Mapping,
    cache: &mut TableCache,
) -> Step<'g, H> {
    loop {
        if let Some(next) = table.next(raw) {
            return Step::Into(next);
        }
        match H::Format::decode(raw, table.level) {
            State::Absent | State::Mmio { .. } => {
                // The cache was topped up for the worst walk, and a lost race puts its frame back.
                let Some(frame) = cache.take() else { return Step::Done(Err(FaultError::OutOfTables)) };
                let new = H::Format::table(frame);
                match change::<H::Format>(cell, table.level, raw, new, Books::None, inside.counters()) {
                    Ok(()) => raw = new,
                    Err(now) => {
                        cache.put(frame);
                        raw = now;
                    }
                }
            }
            // A huge leaf larger than what is wanted now.
            _ => return fill(inside, table, cell, raw, want),
        }
    }
}

/// `cell` is where the leaf belongs, or holds a larger one already.
#[inline]
fn fill<'g, H: Host>(
    inside: &Shared<'_, H>,
    table: &Table<'g, H>,
    cell: &AtomicU64,
    mut raw: u64,
    want: &Mapping,
) -> Step<'g, H> {
    let level = table.level;
    loop {
        let (new, book) = if raw == H::Format::ABSENT {
            (H::Format::leaf(level, want.leaf(level)), Books::LeafAdded)
        } else {
            match meet(table, raw, want) {
                Met::Replace(new, book) => (new, book),
                Met::Step(step) => return step,
            }
        };
        match change::<H::Format>(cell, level, raw, new, book, inside.counters()) {
            Ok(()) => return Step::Done(Ok(Outcome::Fixed { level })),
            Err(now) => raw = now,
        }
    }
}

enum Met<'g, H: Host> {
    Replace(u64, Books),
    Step(Step<'g, H>),
}

/// What to do about an entry that is not absent.
#[cold]
fn meet<'g, H: Host>(table: &Table<'g, H>, raw: u64, want: &Mapping) -> Met<'g, H> {
    let level = table.level;
    if let Some(next) = table.next(raw) {
        return Met::Step(Step::Into(next));
    }
    if H::Format::permits(raw, level, needed(want.access)) {
        return Met::Step(Step::Done(Ok(Outcome::Spurious)));
    }
    match H::Format::decode(raw, level) {
        // An MMIO entry of an older memslot generation, or one that raced with us: there is memory now.
        State::Absent | State::Mmio { .. } => Met::Replace(H::Format::leaf(level, want.leaf(level)), Books::LeafAdded),
        State::Leaf(old) | State::AccessTracked(old) => {
            let new = want.leaf(level);
            if old.hfn != new.hfn || old.memory != new.memory {
                return Met::Step(Step::Done(Err(FaultError::BackingChanged)));
            }
            let leaf = Leaf { dirty: old.dirty || new.dirty, ..new };
            Met::Replace(H::Format::leaf(level, leaf), Books::None)
        }
        State::Frozen => Met::Step(Step::Done(Ok(Outcome::Retry))),
        State::Table(_) => unreachable!("tables were followed above"),
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
        let raw = cell.load(Ordering::Acquire);
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
