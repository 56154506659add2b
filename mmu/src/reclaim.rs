//! What a zap owes, and how table frames go back.
//!
//! # Protocol
//! A [`Batch`] collects, during one hold of the shared side, the entries that were frozen and the tables that were
//! unlinked. [`hold`] binds the two together: it runs a closure inside the lock, and when that is over (or panics) it
//! pays in this order:
//! 1. flush all vCPUs (still inside the lock: nobody may conclude "absent, so in no TLB" before);
//! 2. thaw the frozen entries: from now on a fault may fill them, possibly with another host frame;
//! 3. leave the lock;
//! 4. hand the unlinked tables to [`Reclaim`].
//!
//! A table that was unlinked may still be walked by readers that entered before, so it is freed after a grace period:
//! every mark that was odd after the unlinking has changed. The flush of step 1 came before, so the TLBs and
//! paging-structure caches have forgotten it too; `Reclaim::defer` takes the [`Flushed`] proof to say so.
//!
//! A closure, because a guard that the caller owned could be forgotten, and its debts with it. The closure is lent the
//! hold and can end it in no other way than by returning; what it borrowed (tables, entries, its place in a walk) ends
//! there too. Freezing and seizing entries takes [`Owed`], which is to be had in a hold only.
//!
//! Two zaps at once: each entry has one freezer (compare-and-swap), each table one unlinker. If a zap unlinks the
//! table in which another one froze an entry, the first overwrites it with the dead encoding and the other's thaw
//! finds that and leaves it alone.

#![expect(unsafe_code, reason = "frozen entries are remembered by pointer for the length of one hold of the lock")]

use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::addr::{Gfn, GfnRange, Hfn, Level};
use crate::entry::{self, Entry, Thaw};
use crate::events::{Counter, Event, SeatCounters, Side};
use crate::format::Format;
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::lock::{Exclusive, Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU32, Ordering};
use crate::tdp::zap::HOLD_STEPS;
use crate::tlb::Flushed;
use crate::{Mmu, OutOfMemory};

/// Entries frozen in one hold at most: the worst step freezes the 512 entries of one table.
const FROZEN_CAPACITY: usize = 1024;
/// Tables unlinked in one hold at most.
const TABLE_CAPACITY: usize = 1024;
/// What one step of a zap may add to either list: the entries of one table and one for each table above it.
const STEP: usize = 512 + 4;

/// Room for what one hold of the lock freezes and unlinks. Allocated before the lock is taken, used again and again.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Each with what it becomes.
    frozen: Vec<(NonNull<Entry>, Thaw)>,
    tables: Vec<Hfn>,
    /// A flush is owed although nothing was frozen in this hold.
    flush: bool,
    /// The frames that the flush is owed for.
    touched: Option<GfnRange>,
}

// SAFETY: the pointers are present only while a `Zapping` exists, which is not `Send`; an idle batch holds none.
unsafe impl Send for Batch {}

impl Batch {
    pub(crate) fn new() -> Result<Self, OutOfMemory> {
        let (mut frozen, mut tables) = (Vec::new(), Vec::new());
        frozen.try_reserve_exact(FROZEN_CAPACITY)?;
        tables.try_reserve_exact(TABLE_CAPACITY)?;
        Ok(Self { frozen, tables, flush: false, touched: None })
    }

    /// Whether so many entries can be frozen in one hold.
    pub(crate) const fn has_room_for(entries: u64) -> bool {
        entries <= FROZEN_CAPACITY as u64
    }

    /// Whether the next step finds room.
    fn has_room(&self) -> bool {
        self.frozen.len() + STEP <= FROZEN_CAPACITY && self.tables.len() + STEP <= TABLE_CAPACITY
    }
}

/// Who may have what is zapped in its TLB.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reach<'r> {
    /// vCPUs may be running on it: the hold ends with a flush.
    Live,
    /// No vCPU can reach it since this flush, nor will one: nothing is left to flush. (The tables of defunct roots.)
    Unreachable(&'r Flushed),
}

/// Runs `work` in one hold of the shared side in which entries may be frozen and tables unlinked, then pays what it owes.
/// Only the tables of a reach that is unreachable stay in the batch, until there are many or [`hand_over`] is called.
pub(crate) fn hold<H: Host, R>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    batch: &mut Batch,
    reach: Reach<'_>,
    work: impl FnOnce(&mut Zapping<'_, H>) -> R,
) -> R {
    work(&mut Zapping::enter(mmu, ticket, batch, reach))
}

/// As [`hold`], for who is alone inside the lock and may not let go of it. `work` has made sure that the batch has room.
pub(crate) fn hold_alone<H: Host, R>(
    alone: &mut Exclusive<'_, H>,
    batch: &mut Batch,
    work: impl FnOnce(&mut Zapping<'_, H>) -> R,
) -> R {
    let mmu = alone.mmu;
    work(&mut Zapping::inside(mmu, alone.walking(), batch, Reach::Live, Side::Exclusive))
}

/// One hold, as its work sees it; dropping it, which [`hold`] does, pays.
pub(crate) struct Zapping<'a, H: Host> {
    reach: Reach<'a>,
    // Dropped in `Drop` between step 2 and step 4.
    inside: Option<Shared<'a, H>>,
    mmu: &'a Mmu<H>,
    batch: &'a mut Batch,
    counters: &'a SeatCounters,
    /// Of which side of the lock it is a hold; that of the exclusive side is told by whoever took it.
    side: Side,
    /// Steps that were done.
    steps: u32,
    /// Somebody was found to wait.
    others_wait: bool,
}

impl<'a, H: Host> Zapping<'a, H> {
    fn enter(mmu: &'a Mmu<H>, ticket: &'a mut Ticket, batch: &'a mut Batch, reach: Reach<'a>) -> Self {
        let inside = Shared::enter(mmu, ticket);
        if H::TRACE {
            mmu.host.trace(Event::LockTaken { side: Side::Shared });
        }
        Self::inside(mmu, inside, batch, reach, Side::Shared)
    }

    fn inside(mmu: &'a Mmu<H>, inside: Shared<'a, H>, batch: &'a mut Batch, reach: Reach<'a>, side: Side) -> Self {
        debug_assert!(batch.frozen.is_empty(), "each hold thaws what it froze");
        let counters = inside.counters();
        Self { reach, inside: Some(inside), mmu, batch, counters, side, steps: 0, others_wait: false }
    }

    pub(crate) fn counters(&self) -> &'a SeatCounters {
        self.counters
    }

    /// Begins a step: the guard that it walks with, and the debts that it runs up.
    pub(crate) fn step(&mut self) -> (&Shared<'a, H>, Debts<'_>) {
        self.steps += 1;
        let inside = self.inside.as_ref().expect("the guard is there until drop");
        (inside, Debts { batch: self.batch, counters: self.counters, owed: Owed(PhantomData) })
    }

    fn leave(&mut self) {
        drop(self.inside.take());
        if H::TRACE && self.side == Side::Shared {
            self.mmu.host.trace(Event::LockReleased { side: Side::Shared, steps: self.steps });
        }
    }

    fn thaw(&mut self, flushed: &Flushed) {
        debug_assert!(self.inside.is_some());
        for (cell, becomes) in self.batch.frozen.drain(..) {
            // SAFETY: the pointer was made from a reference into a table during this hold of the shared side, which
            // has not ended yet, so the table has not been freed.
            entry::thaw::<H::Format>(unsafe { cell.as_ref() }, becomes, flushed, self.counters);
        }
    }

    /// Whether there is no next step in this hold.
    pub(crate) fn should_end(&mut self) -> bool {
        if self.steps == 0 {
            return false;
        }
        self.others_wait = self.inside.as_ref().is_some_and(Shared::should_yield);
        self.others_wait || self.is_full()
    }

    fn is_full(&self) -> bool {
        match self.reach {
            Reach::Live => self.steps >= HOLD_STEPS || !self.batch.has_room(),
            Reach::Unreachable(_) => true,
        }
    }

    /// Whether the hold ended because others wait.
    pub(crate) fn others_wait(&self) -> bool {
        self.others_wait
    }
}

/// Proof that a hold is open, at whose end a flush is paid for: what takes something away wants to see one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owed<'z>(PhantomData<&'z ()>);

#[cfg(test)]
impl Owed<'_> {
    /// For unit tests of what wants to see one.
    pub(crate) const fn in_a_test() -> Self {
        Self(PhantomData)
    }
}

/// Where a zap step writes down what it owes. Borrowed from the hold, so nothing can be owed outside one.
pub(crate) struct Debts<'z> {
    batch: &'z mut Batch,
    pub(crate) counters: &'z SeatCounters,
    owed: Owed<'z>,
}

impl<'z> Debts<'z> {
    /// What seizing an unlinked table wants to see.
    pub(crate) fn owed(&self) -> Owed<'z> {
        self.owed
    }

    /// Freezes `cell`, the entry of `level` for `gfn`, if it still holds `old`, and remembers to flush and thaw it.
    pub(crate) fn freeze<H: Host>(&mut self, cell: &Entry, level: Level, gfn: Gfn, old: u64) -> Result<(), u64> {
        debug_assert!(self.batch.frozen.len() < FROZEN_CAPACITY, "a zap step outgrew its room");
        entry::freeze::<H::Format>(cell, level, old, self.counters, self.owed)?;
        self.batch.frozen.push((NonNull::from(cell), Thaw::Absent));
        self.touch(level, gfn);
        Ok(())
    }

    /// As [`Debts::freeze`], for an entry that leads to a table; what takes the table's place is to be told before the
    /// hold's next step, by [`Debts::replace_by`].
    pub(crate) fn freeze_to_replace<H: Host>(
        &mut self,
        cell: &Entry,
        level: Level,
        gfn: Gfn,
        old: u64,
    ) -> Result<(), u64> {
        self.freeze::<H>(cell, level, gfn, old)?;
        if let Some((_, becomes)) = self.batch.frozen.last_mut() {
            *becomes = Thaw::Leaf(level, H::Format::ABSENT);
        }
        Ok(())
    }

    /// The entry that was frozen last becomes `leaf`, when this hold's flush is done.
    pub(crate) fn replace_by(&mut self, leaf: u64) {
        if let Some((_, Thaw::Leaf(_, becomes))) = self.batch.frozen.last_mut() {
            *becomes = leaf;
        }
    }

    /// Takes the right to write from the mapping in `cell` for good, if it still holds `old`.
    pub(crate) fn restrict<H: Host>(&mut self, cell: &Entry, level: Level, gfn: Gfn, old: u64) -> Result<(), u64> {
        entry::restrict::<H::Format>(cell, level, old, self.owed)?;
        self.owe_flush(level, gfn);
        Ok(())
    }

    /// The hold flushes at its end the block of `level` that holds `gfn`, whether or not it froze anything.
    pub(crate) fn owe_flush(&mut self, level: Level, gfn: Gfn) {
        self.batch.flush = !mutants::is(Mutant::FrozenByAnotherNotFlushed);
        self.touch(level, gfn);
    }

    fn touch(&mut self, level: Level, gfn: Gfn) {
        let block = GfnRange::block(level, gfn);
        self.batch.touched = Some(self.batch.touched.map_or(block, |touched| touched.union(block)));
    }

    /// Remembers a table that no entry leads to any more and whose entries are all seized.
    pub(crate) fn unlinked(&mut self, table: Hfn) {
        if mutants::is(Mutant::UnlinkedTableLeaked) {
            return;
        }
        // Room was made before the lock was taken. A step can outgrow it only if faults refill an upper table with
        // hundreds of tables between a look at it and its unlinking; then, and only then, this allocates.
        self.batch.tables.push(table);
    }
}

impl<H: Host> Drop for Zapping<'_, H> {
    fn drop(&mut self) {
        if self.batch.frozen.is_empty() && !core::mem::take(&mut self.batch.flush) {
            // Tables are unlinked by freezing the entry that led to them, so there is none of this hold either: nothing is
            // owed.
            self.leave();
            return;
        }
        self.batch.flush = false;
        let touched = self.batch.touched.take();
        if mutants::is(Mutant::FreeBeforeFlush) {
            free(self.mmu, &self.batch.tables, self.counters);
            self.batch.tables.clear();
        }
        if mutants::is(Mutant::ThawBeforeFlush) {
            self.thaw(&Flushed::of_a_mutant(Mutant::ThawBeforeFlush));
        }
        let own;
        let flushed = match self.reach {
            Reach::Live => {
                // A flush is owed, so something was touched.
                let touched = touched.unwrap_or(GfnRange { start: Gfn(0), end: Level::L5.root_limit() });
                own = self.mmu.tlb.flush_range(&self.mmu.host, self.counters, touched);
                &own
            }
            Reach::Unreachable(flushed) => flushed,
        };
        self.thaw(flushed);
        self.leave();
        if matches!(self.reach, Reach::Live) || !self.batch.has_room() {
            self.mmu.reclaim.take_over(self.mmu, self.batch, flushed, self.counters);
        }
    }
}

/// Hands the tables that holds of an unreachable reach have left in the batch over to be freed: at the end of the zap, and
/// before this CPU is given away, so that memory does not wait for it.
pub(crate) fn hand_over<H: Host>(mmu: &Mmu<H>, ticket: &Ticket, batch: &mut Batch, reach: Reach<'_>) {
    if let Reach::Unreachable(flushed) = reach {
        mmu.reclaim.take_over(mmu, batch, flushed, ticket.counters());
    }
}

/// Tables that wait for readers to leave.
#[derive(Debug)]
struct Pending {
    tables: Vec<Hfn>,
    /// The readers that were inside when the tables had been unlinked.
    readers: Vec<(usize, u64)>,
}

/// The list of tables that wait for readers to leave.
#[derive(Debug)]
pub(crate) struct Reclaim {
    pending: LeafLock<Vec<Pending>>,
    /// Lists that are not freed yet, on `pending` or not any more.
    waiting: AtomicU32,
    /// Lists that were freed.
    freed: AtomicU32,
}

impl Reclaim {
    pub(crate) fn new() -> Self {
        Self { pending: LeafLock::new(Vec::new()), waiting: AtomicU32::new(0), freed: AtomicU32::new(0) }
    }

    /// Takes the tables of `batch`, which were unlinked before the flush of `flushed` or by whom it leaves alone.
    fn take_over<H: Host>(&self, mmu: &Mmu<H>, batch: &mut Batch, flushed: &Flushed, counters: &SeatCounters) {
        if !batch.tables.is_empty() {
            self.defer(mmu, &batch.tables, flushed, counters);
            batch.tables.clear();
        }
    }

    /// Frees `tables` when every reader that may be walking them has left; the caller is not inside the lock, and has
    /// flushed the TLBs since it unlinked them, which `_flushed` is the proof of.
    pub(crate) fn defer<H: Host>(&self, mmu: &Mmu<H>, tables: &[Hfn], _flushed: &Flushed, counters: &SeatCounters) {
        mmu.host.heavy_fence();
        if self.remember(mmu, tables).is_err() {
            // No memory to remember them: wait instead, which a caller outside the lock can always do.
            synchronize(mmu);
            free(mmu, tables, counters);
        }
        self.collect(mmu, counters);
    }

    fn remember<H: Host>(&self, mmu: &Mmu<H>, tables: &[Hfn]) -> Result<(), OutOfMemory> {
        let mut pending = Pending { tables: Vec::new(), readers: Vec::new() };
        pending.tables.try_reserve_exact(tables.len())?;
        pending.tables.extend_from_slice(tables);
        pending.readers.try_reserve_exact(mmu.lock.seats().count())?;
        pending.readers.extend(mmu.lock.readers().filter(|_| !mutants::is(Mutant::FreeWithoutGracePeriod)));
        let mut lists = self.pending.lock(|| mmu.host.relax());
        lists.try_reserve(1)?;
        lists.push(pending);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Frees what has waited long enough. Called outside the lock.
    pub(crate) fn collect<H: Host>(&self, mmu: &Mmu<H>, counters: &SeatCounters) {
        loop {
            let mut lists = self.pending.lock(|| mmu.host.relax());
            let over = |pending: &Pending| pending.readers.iter().all(|&(seat, mark)| mmu.lock.has_left(seat, mark));
            let Some(index) = lists.iter().position(over) else { return };
            let ready = lists.swap_remove(index);
            drop(lists);
            free(mmu, &ready.tables, counters);
            self.freed.fetch_add(1, Ordering::AcqRel);
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Everything that still waits, for the end of the MMU, when there are no readers.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Hfn> {
        self.pending.get_mut().drain(..).flat_map(|pending| pending.tables)
    }
}

/// A frame that `alloc` gets from the host. If that has none, those that wait for readers are waited for and given back to it;
/// `None` if none waits.
///
/// Outside the lock, by who is not in guest mode: a reader may be waiting for vCPUs to leave that, and is waited for here.
pub(crate) fn alloc<H: Host>(mmu: &Mmu<H>, counters: &SeatCounters, alloc: impl Fn(&H) -> Option<Hfn>) -> Option<Hfn> {
    let Reclaim { waiting, freed, .. } = &mmu.reclaim;
    loop {
        let before = freed.load(Ordering::Acquire);
        if let Some(frame) = alloc(&mmu.host) {
            return Some(frame);
        }
        // In this order: those that waited a moment ago were freed before they were counted off.
        if waiting.load(Ordering::Acquire) == 0 && freed.load(Ordering::Acquire) == before {
            return None;
        }
        synchronize(mmu);
        mmu.reclaim.collect(mmu, counters);
    }
}

fn free<H: Host>(mmu: &Mmu<H>, tables: &[Hfn], counters: &SeatCounters) {
    counters.add(Counter::TableFrames, (tables.len() as u64).wrapping_neg());
    for &table in tables {
        mmu.host.free_table(table);
    }
}

/// Proof that a grace period has passed: every reader that was inside when it began has left.
#[derive(Debug)]
pub(crate) struct GracePeriod(());

/// Waits until every reader that is inside now has left. The caller is not inside.
pub(crate) fn synchronize<H: Host>(mmu: &Mmu<H>) -> GracePeriod {
    mmu.host.heavy_fence();
    for (seat, mark) in mmu.lock.readers().filter(|_| !mutants::is(Mutant::SlotWithoutGracePeriod)) {
        while !mmu.lock.has_left(seat, mark) {
            mmu.host.relax();
        }
    }
    GracePeriod(())
}
