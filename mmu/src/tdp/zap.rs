//! Zapping a range: its mappings go, and the tables that only served it.
//!
//! # Protocol
//! Runs inside the shared side, beside faults and other zaps, in holds that are bounded. The unit is the *step*: it
//! removes what one level-1 table holds at most, or passes over the absent entries of one table. A hold ends (pays its
//! flush, thaws, leaves)
//! - after the step in which somebody has come to wait, for the lock or for this CPU;
//! - after [`HOLD_STEPS`] steps, whoever waits: a flush a step would cost more than it is worth;
//! - after each step where no flush is to be paid, in the roots of a zap of everything: letting go costs two stores there.
//!
//! A new hold begins at the next frame that was not done, with a walk from the root: no position outlives a hold. At least
//! one step is done in each, and each gets at least one frame further.
//!
//! An entry is frozen by compare-and-swap, flushed, then thawed. In between nobody can fill it: so no vCPU can use a
//! new translation of a frame while another still has the old one in its TLB.
//!
//! A table whose whole block lies in the range is unlinked: the entry that leads to it is frozen, then each of its
//! entries is seized, so that a fault that is still inside loses its compare-and-swap. Level-1 tables go first, one a
//! step; in the step after the last one of a block of 1 GiB (and then of 512 GiB), the emptied table above goes too. Should
//! faults have refilled it meanwhile, what they linked is removed with it.
//!
//! A huge leaf that reaches over the range's end is zapped whole: the rest comes back by faults. Root tables stay.

use core::marker::PhantomData;

use crate::Mmu;
use crate::addr::{ENTRIES, Gfn, GfnRange, Level};
use crate::entry::{Entry, seize};
use crate::events::{Counter, Event};
use crate::format::{Format, State};
use crate::host::Host;
use crate::lock::{Exclusive, Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::reclaim::{Batch, Debts, hand_over, hold, hold_alone};
use crate::root::{AllRoots, RootRef, RootSet, Spaces};
use crate::slots::AddressSpace;
use crate::table::Table;

/// Steps of one hold at most, where its end costs a flush.
pub(crate) const HOLD_STEPS: u32 = 64;

/// What a zap removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Zapped {
    /// Leaves of any size.
    pub leaves: u64,
    /// Table frames that were unlinked.
    pub tables: u64,
}

/// Proof that a range was removed from every root of a set. What may happen only then wants to see one, and of which set
/// is part of its type: valid roots are not enough for who gives memory back.
#[derive(Debug)]
pub(crate) struct Gone<S> {
    pub(crate) range: GfnRange,
    pub(crate) zapped: Zapped,
    roots: PhantomData<S>,
}

impl<S> Gone<S> {
    /// A proof that proves nothing, for mutants that are to go on without a zap.
    pub(crate) fn of_a_mutant(mutant: Mutant, range: GfnRange) -> Self {
        assert!(mutants::is(mutant), "a zap is proved by zapping");
        Self { range, zapped: Zapped::default(), roots: PhantomData }
    }
}

/// Removes every mapping of `range` from each root of `roots`. When it returns, no vCPU uses one any more.
///
/// Faults may fill the range again at any time unless the caller keeps them from it: a slot that is changing, an
/// invalidation in progress, roots that are defunct.
pub(crate) fn zap_range<H: Host, S: RootSet<H>>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    batch: &mut Batch,
    roots: &mut S,
    range: GfnRange,
) -> Gone<S> {
    let mut total = Zapped::default();
    while let Some(root) = roots.next(mmu) {
        let end = range.end.min(root.role().level().root_limit());
        let (mut next, space) = (range.start, root.role().space());
        while next < end {
            let others_wait = hold(mmu, ticket, batch, roots.reach(), |hold| {
                while next < end && !hold.should_end() {
                    let (inside, debts) = hold.step();
                    next = Step { inside, debts, space, range, zapped: &mut total }.run(&root, next);
                }
                hold.others_wait()
            });
            if next < end && others_wait {
                hand_over(mmu, ticket, batch, roots.reach());
                ticket.counters().add(Counter::Yield, 1);
                mmu.host.yield_now();
            }
        }
        root.put(&mmu.host, ticket.counters());
    }
    hand_over(mmu, ticket, batch, roots.reach());
    if H::TRACE {
        mmu.host.trace(Event::Zap { range, leaves: total.leaves, tables: total.tables });
    }
    Gone { range, zapped: total, roots: PhantomData }
}

/// As [`zap_range`] for who is alone inside the lock and may not let go of it: all of it in one hold, or nothing, and then
/// `None`.
///
/// What the range can be at most is counted before anything is touched.
pub(crate) fn zap_at_once<H: Host>(
    alone: &mut Exclusive<'_, H>,
    batch: &mut Batch,
    range: GfnRange,
) -> Option<Gone<AllRoots>> {
    let mmu = alone.mmu;
    let range = GfnRange { end: range.end.max(range.start), ..range };
    let mut roots = alone.all_roots(Spaces::All);
    let count = roots.count(mmu);
    // In each root: the entries of a table that is not covered wholly at either end, and tables that are.
    let first = Level::M2.align_down(Gfn(range.start.0 + Level::M2.pages() - 1));
    let whole = GfnRange { start: first, end: Level::M2.align_down(range.end) };
    let covered = if whole.is_empty() { 0 } else { whole.pages() };
    let (entries, tables) = (range.pages() - covered, covered / Level::M2.pages());
    // And one for each table above, where the walk passes over what is absent or finds it emptied.
    let steps = tables + 2 + u64::from(Level::L5.number());
    if count * steps > HOLD_STEPS.into() || !Batch::has_room_for(count * (entries + steps)) {
        return None;
    }
    let mut total = Zapped::default();
    hold_alone(alone, batch, |hold| {
        while let Some(root) = roots.next(mmu) {
            let (space, end) = (root.role().space(), range.end.min(root.role().level().root_limit()));
            let mut next = range.start;
            while next < end {
                let (inside, debts) = hold.step();
                next = Step { inside, debts, space, range, zapped: &mut total }.run(&root, next);
            }
            root.put(&mmu.host, hold.counters());
        }
    });
    if H::TRACE {
        mmu.host.trace(Event::Zap { range, leaves: total.leaves, tables: total.tables });
    }
    Some(Gone { range, zapped: total, roots: PhantomData })
}

struct Step<'s, 'a, H: Host> {
    inside: &'s Shared<'a, H>,
    debts: Debts<'s>,
    space: AddressSpace,
    range: GfnRange,
    zapped: &'s mut Zapped,
}

impl<H: Host> Step<'_, '_, H> {
    /// Removes what lies at `gfn`: one leaf, one level-1 table, or what is in the range of one. Returns where to go on,
    /// past `gfn`.
    fn run(&mut self, root: &RootRef, gfn: Gfn) -> Gfn {
        let mut table = Table::root(self.inside, root);
        let mut path = [None; 5];
        let after = loop {
            path[usize::from(table.level.number()) - 1] = Some(table);
            let cell = table.entry(gfn);
            let raw = cell.read();
            let Some(next) = table.next(raw) else {
                self.zap_entry(&table, gfn, raw);
                break self.skip_absent(&table, gfn);
            };
            if next.level == Level::K4 {
                let block = GfnRange::block(table.level, gfn);
                if self.range.covers(block) {
                    self.unlink(&table, gfn, raw);
                    let last = Gfn(block.end.0 - 1);
                    if table.level.index(last) == ENTRIES - 1 && gfn < last {
                        // The emptied table above is the next step's, which finds nothing else here.
                        return last;
                    }
                    break block.end;
                }
                let mut at = gfn;
                while at < block.end && at < self.range.end {
                    self.zap_entry(&next, at, next.entry(at).read());
                    at = Gfn(at.0 + 1);
                }
                break at;
            }
            table = next;
        };
        self.unlink_emptied(&path, gfn, after);
        after
    }

    /// The first frame after `gfn`, and after entries of the same table that are absent: nothing is zapped there, and a
    /// step for each would be a walk for each.
    fn skip_absent(&self, table: &Table<'_, H>, gfn: Gfn) -> Gfn {
        let mut after = table.level.next_block(gfn);
        while table.level.index(after) != 0 && after < self.range.end && table.entry(after).read() == H::Format::ABSENT
        {
            after = table.level.next_block(after);
        }
        after
    }

    /// Freezes the leaf or MMIO entry of `table` for `gfn`, whatever becomes of it meanwhile.
    fn zap_entry(&mut self, table: &Table<'_, H>, gfn: Gfn, mut raw: u64) {
        loop {
            match H::Format::decode(raw, table.level) {
                State::Leaf(_) | State::AccessTracked(_) | State::Mmio { .. } => {}
                // Another zap does it, and flushes before it ends; but it may end after this one, whose caller is
                // owed the promise that no TLB has the mapping any more. So this zap flushes as well.
                State::Frozen => return self.debts.owe_flush(table.level, gfn),
                // A fault put a table here since the walk looked: what is mapped after a zap began is not its to
                // remove (a caller who wants the range to stay empty keeps faults from it).
                State::Absent | State::Table(_) => return,
            }
            match self.debts.freeze::<H>(table.entry(gfn), table.level, gfn, raw) {
                Ok(()) => {
                    if raw & H::Format::DIRTY != 0 && H::Format::is_mapping(raw, table.level) {
                        self.were_dirty(GfnRange::block(table.level, gfn));
                    }
                    self.zapped.leaves += u64::from(!matches!(H::Format::decode(raw, table.level), State::Mmio { .. }));
                    return;
                }
                Err(now) => raw = now,
            }
        }
    }

    /// Unlinks the table that `raw`, the entry of `table` for `gfn`, leads to, with everything below it.
    fn unlink(&mut self, table: &Table<'_, H>, gfn: Gfn, raw: u64) {
        // The entry of a table changes only by zaps; losing means another zap unlinks it, and owes the flush.
        if self.debts.freeze::<H>(table.entry(gfn), table.level, gfn, raw).is_err() {
            self.debts.owe_flush(table.level, gfn);
            return;
        }
        self.bury(table, gfn, raw);
    }

    /// What was mapped in `range`, and is no more, was written through its leaves.
    ///
    /// After the entries changed and before the lock is left: `slots::dirty` says why.
    fn were_dirty(&self, range: GfnRange) {
        if !mutants::is(Mutant::DirtyBitDroppedByZap) {
            self.inside.mmu.slots.read(self.inside).mark_dirty(self.space, range);
        }
    }

    /// Takes the table that `raw`, the entry of `parent` for `gfn`, leads to apart: nothing leads to it any more.
    fn bury(&mut self, parent: &Table<'_, H>, gfn: Gfn, raw: u64) {
        let (Some(table), Some(frame)) = (parent.next(raw), H::Format::next_table(raw, parent.level)) else { return };
        let (counters, owed) = (self.debts.counters, self.debts.owed());
        if mutants::is(Mutant::UnlinkedTableNotSeized) {
            return self.debts.unlinked(frame);
        }
        let (first, each) = (parent.level.align_down(gfn).0, table.level.pages());
        let at = |index: usize| Gfn(first + index as u64 * each);
        let seized = seize::<H::Format>(table.entries(), table.level, counters, owed, |index, raw| {
            self.bury(&table, at(index), raw);
        });
        for run in seized.dirty() {
            self.were_dirty(GfnRange { start: at(run.start), end: at(run.end) });
        }
        self.zapped.leaves += seized.leaves;
        self.zapped.tables += 1;
        self.debts.unlinked(frame);
    }

    /// The walk is about to leave blocks of upper levels that lie wholly in the range: their tables go as well, if
    /// they are empty. One that faults have refilled is in use and stays.
    fn unlink_emptied(&mut self, path: &[Option<Table<'_, H>>; 5], gfn: Gfn, after: Gfn) {
        for level in [Level::G1, Level::L4, Level::L5] {
            let block = GfnRange::block(level, gfn);
            // Past the block's end: the walk ended above this level, whose tables are not on its path.
            if after < block.end || !self.range.covers(block) {
                return;
            }
            let Some(table) = path[usize::from(level.number()) - 1] else { continue };
            let raw = table.entry(gfn).read();
            if table.next(raw).is_some_and(|next| next.entries().iter().all(|cell| is_empty::<H>(cell, next.level))) {
                self.unlink(&table, gfn, raw);
            }
        }
    }
}

fn is_empty<H: Host>(cell: &Entry, level: Level) -> bool {
    let raw = cell.glance();
    // Frozen entries are those of level-1 tables that this very zap has unlinked and will thaw: overwritten by the
    // dead encoding when this table is buried, they stay so.
    raw == H::Format::ABSENT || matches!(H::Format::decode(raw, level), State::Frozen)
}
