//! Going through what is mapped, without removing anything: the walk that protecting, splitting, collapsing and aging
//! share.
//!
//! # Protocol
//! Runs inside the shared side, beside faults and zaps, over the valid roots. A step is one table of level 1 or one larger
//! mapping; after each the hold may end, and a new one begins at the next frame: no table is remembered across holds, and
//! each hold does at least one step. What a visitor owes (a flush, as a rule) it keeps itself, across holds: a debt that
//! lived in the hold would be forgotten by its end.
//!
//! Tables that a step may need are allocated between two holds.

use crate::Mmu;
use crate::addr::{Gfn, GfnRange, Level};
use crate::events::{Counter, Event, Side};
use crate::format::Format;
use crate::host::Host;
use crate::lock::{Shared, Ticket};
use crate::root::{RootRef, RootSet, Spaces};
use crate::slots::AddressSpace;
use crate::table::Table;

/// How a visit to a mapping larger than 4 KiB ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Visited {
    /// Done with it.
    Done,
    /// Something else stands there now: to be looked at again.
    Again,
    /// A table is needed first.
    NeedsTable,
}

/// What a sweep does to what it meets.
pub(crate) trait Visitor<H: Host> {
    /// Whether `root` is to be gone through.
    fn enters(&mut self, _root: &RootRef) -> bool {
        true
    }

    /// The first frame from `from` on that is of interest.
    fn seek(&self, from: Gfn) -> Gfn {
        from
    }

    /// `table` is of level 1, `range` lies in its block.
    fn leaves(&mut self, inside: &Shared<'_, H>, table: &Table<'_, H>, range: GfnRange);

    /// The entry of `table`, above level 1, holds the mapping `raw` for `gfn`.
    fn huge(&mut self, inside: &Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn, raw: u64) -> Visited;

    /// Outside the lock: gets tables after [`Visited::NeedsTable`].
    fn refill(&mut self, _mmu: &Mmu<H>, _ticket: &Ticket) {}
}

/// Shows what is mapped in `range` of `space` to `visitor`.
pub(crate) fn sweep<H: Host>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    space: AddressSpace,
    range: GfnRange,
    visitor: &mut impl Visitor<H>,
) {
    let mut roots = Shared::enter(mmu, ticket).valid_roots(Spaces::One(space));
    while let Some(root) = roots.next(mmu) {
        let end = range.end.min(root.role().level().root_limit());
        let mut next = if visitor.enters(&root) { visitor.seek(range.start) } else { end };
        while next < end {
            let inside = Shared::enter(mmu, ticket);
            if H::TRACE {
                mmu.host.trace(Event::LockTaken { side: Side::Shared });
            }
            let (mut refill, mut steps) = (false, 0);
            while next < end && !refill {
                steps += 1;
                (next, refill) = step(&inside, &root, GfnRange { start: next, end }, visitor);
                if inside.should_yield() {
                    break;
                }
            }
            drop(inside);
            if H::TRACE {
                mmu.host.trace(Event::LockReleased { side: Side::Shared, steps });
            }
            if refill {
                visitor.refill(mmu, ticket);
            }
            if next < end {
                ticket.counters().add(Counter::Yield, u64::from(!refill));
                mmu.host.yield_now();
            }
        }
        root.put(&mmu.host, ticket.counters());
    }
}

/// What is at the start of `left`. Where to go on, and whether a table is needed first.
fn step<H: Host>(inside: &Shared<'_, H>, root: &RootRef, left: GfnRange, visitor: &mut impl Visitor<H>) -> (Gfn, bool) {
    let gfn = left.start;
    // What is met mostly, by the walk that is made for it.
    if let Some(table) = Table::leaves(inside, root, gfn) {
        let end = Level::M2.next_block(gfn).min(left.end);
        visitor.leaves(inside, &table, GfnRange { start: gfn, end });
        return (visitor.seek(end), false);
    }
    let mut table = Table::root(inside, root);
    let mut raw = table.entry(gfn).read();
    while let Some(next) = table.next(raw) {
        if next.level == Level::K4 {
            // A fault has put it there since the look for it.
            return (gfn, false);
        }
        table = next;
        raw = table.entry(gfn).read();
    }
    if H::Format::is_mapping(raw, table.level) {
        match visitor.huge(inside, &table, gfn, raw) {
            Visited::Done => {}
            Visited::Again => return (gfn, false),
            Visited::NeedsTable => return (gfn, true),
        }
    }
    (visitor.seek(table.level.next_block(gfn)), false)
}
