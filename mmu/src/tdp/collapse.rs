//! Collapsing: a table whose leaves say what one huge leaf could say becomes that leaf (F37).
//!
//! # Protocol
//! The backing is asked outside the lock, as for a fault, and the answer must still stand inside: no invalidation of the
//! block in progress or ended since, the root valid, the memslots held by whoever calls. The block must lie in slot and
//! extent, host frames congruent; every entry of the table is a leaf that the huge one agrees with (its frame in its
//! place, cache type, host and MMU rights), or absent, and not all are absent.
//!
//! In a hold of the shared side, as a zap works: the entry that leads to the table is frozen; the table's entries are
//! seized, which tells whether any was dirty or accessed up to the very moment from which no CPU can set a bit of it;
//! the hold's end flushes; and the entry is thawed as the huge leaf, with the dirty bit if any part had it. The table is
//! freed as zapped ones are. A fault that meets the frozen entry is retried.
//!
//! # Why a frozen entry may come back as a leaf
//! A zap takes a frozen entry for one that is on its way out, and does not come back to it. So it matters whom a collapse
//! can meet. An invalidation, and a zap of everything, begin under the exclusive lock, which waits for this hold to end,
//! and are seen by the next one. A memslot change waits for its caller. A [`crate::Worker::zap`] promises that what was
//! there when it was called is gone, which is so: the huge leaf is as new as one that a fault makes.

use crate::Mmu;
use crate::addr::{ENTRIES, Gfn, GfnRange, Hfn, Level};
use crate::entry::seize;
use crate::events::Counter;
use crate::format::{Format, Leaf, Rights, State};
use crate::host::{Access, Extent, Host};
use crate::lock::{Shared, Ticket};
use crate::notify::Snapshot;
use crate::reclaim::{Batch, Debts, Reach, hold};
use crate::root::{AdBits, RootRef, RootSet, Spaces};
use crate::slots::{Memslot, Slot};
use crate::table::Table;

/// What collapsing made. A leaf of 1 GiB is made of leaves of 2 MiB, which count as well if they were made for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Collapsed {
    /// Leaves of 2 MiB.
    pub leaves_2m: u64,
    /// Leaves of 1 GiB.
    pub leaves_1g: u64,
}

/// What the backing said of a run of frames, and when.
#[derive(Clone, Copy)]
struct Known {
    extent: Extent,
    snapshot: Snapshot,
}

impl Known {
    /// Asks about `gfn`; `None` if there is no good answer now.
    fn ask<H: Host>(mmu: &Mmu<H>, slot: &Slot, gfn: Gfn) -> Option<Self> {
        let snapshot = mmu.notify.snapshot(gfn)?;
        let extent = mmu.host.resolve(slot, gfn, Access::Read).ok()?;
        extent.gfns.contains(gfn).then_some(Self { extent, snapshot })
    }

    /// The first host frame of `block`, if a leaf of `level` may map it.
    fn backs(&self, slot: &Slot, block: GfnRange, level: Level) -> Option<Hfn> {
        let fits = slot.range().covers(block) && self.extent.gfns.covers(block);
        let first = fits.then(|| Hfn(self.extent.hfn.0 + (block.start.0 - self.extent.gfns.start.0)))?;
        first.0.is_multiple_of(level.pages()).then_some(first)
    }
}

/// Collapses what it can of `slot`, in the valid roots of its space, level by level. The caller keeps the memslots as
/// they are, and the slot has no log.
pub(crate) fn collapse<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, batch: &mut Batch, slot: &Memslot) -> Collapsed {
    let mut total = Collapsed::default();
    for (level, made) in [(Level::M2, &mut total.leaves_2m), (Level::G1, &mut total.leaves_1g)] {
        if level > mmu.config.largest {
            break;
        }
        let mut roots = Shared::enter(mmu, ticket).valid_roots(Spaces::One(slot.space()));
        while let Some(root) = roots.next(mmu) {
            *made += collapse_root(mmu, ticket, batch, slot, &root, level);
            root.put(&mmu.host, ticket.counters());
        }
    }
    total
}

fn collapse_root<H: Host>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    batch: &mut Batch,
    slot: &Memslot,
    root: &RootRef,
    level: Level,
) -> u64 {
    let end = slot.range().end.min(root.role().level().root_limit());
    let (mut next, mut made, mut known) = (slot.range().start, 0, None::<Known>);
    // The first block that lies in the slot as a whole.
    if level.align_down(next) != next {
        next = level.next_block(next);
    }
    while next < end {
        let block = GfnRange::block(level, next);
        let asked = known.is_none_or(|known| known.backs(slot, block, level).is_none()).then_some(block);
        if asked.is_some() {
            known = Known::ask(mmu, slot, next);
        }
        let watched = |block| slot.tracked().is_some_and(|pages| pages.touches(slot.range().start, block));
        let Some(sure) = known.filter(|known| known.backs(slot, block, level).is_some() && !watched(block)) else {
            next = block.end;
            continue;
        };
        let others_wait = hold(mmu, ticket, batch, Reach::Live, |hold| {
            while next < end && !hold.should_end() {
                let block = GfnRange::block(level, next);
                let Some(first) = sure.backs(slot, block, level).filter(|_| !watched(block)) else { break };
                let (inside, mut debts) = hold.step();
                if !root.is_valid(inside) {
                    next = end;
                } else if inside.mmu.notify.must_retry(sure.snapshot, block) {
                    known = None;
                    // Asked about again; what is still being invalidated then is passed over.
                    if asked == Some(block) {
                        next = block.end;
                    }
                    break;
                } else {
                    let want = Want { level, block, first, extent: sure.extent };
                    next = want.collapse(inside, &mut debts, root, &mut made);
                }
            }
            hold.others_wait()
        });
        if next < end && others_wait {
            ticket.counters().add(Counter::Yield, 1);
            mmu.host.yield_now();
        }
    }
    made
}

/// A leaf that could be.
struct Want {
    level: Level,
    block: GfnRange,
    /// Its host frame.
    first: Hfn,
    extent: Extent,
}

impl Want {
    /// Makes it, if a table stands in its place that says the same. Where to go on.
    fn collapse<H: Host>(&self, inside: &Shared<'_, H>, debts: &mut Debts<'_>, root: &RootRef, made: &mut u64) -> Gfn {
        let gfn = self.block.start;
        let mut table = Table::root(inside, root);
        while table.level > self.level {
            match table.next(table.entry(gfn).read()) {
                Some(next) => table = next,
                None => return table.level.next_block(gfn),
            }
        }
        let cell = table.entry(gfn);
        let raw = cell.read();
        let (Some(parts), Some(frame)) = (table.next(raw), H::Format::next_table(raw, self.level)) else {
            return self.block.end;
        };
        let Some(mut leaf) = self.agreed::<H>(&parts) else { return self.block.end };
        if debts.freeze_to_replace::<H>(cell, self.level, gfn, raw).is_err() {
            return self.block.end;
        }
        // From here on what the parts hold is nobody else's; what the CPU set in them until now is seen.
        let seized = seize::<H::Format>(parts.entries(), parts.level, debts.counters, debts.owed(), |_, _| {});
        leaf.dirty |= seized.any_dirty();
        // Without dirty bits a leaf counts as written while it may be.
        leaf.dirty |= root.role().ad_bits() == AdBits::Off && leaf.rights.contains(Rights::WRITE);
        debts.replace_by(H::Format::leaf(self.level, leaf));
        debts.unlinked(frame);
        *made += 1;
        self.block.end
    }

    /// The leaf that all entries of `parts` agree on.
    fn agreed<H: Host>(&self, parts: &Table<'_, H>) -> Option<Leaf> {
        let size = parts.level.pages();
        let ignored = H::Format::CPU_OWNED | H::Format::WRITE;
        let mut leaf = None::<Leaf>;
        let (mut expected, mut bits) = (0, 0);
        for (index, cell) in (0..ENTRIES as u64).zip(parts.entries()) {
            let raw = cell.read();
            if raw == H::Format::ABSENT {
                continue;
            }
            bits |= raw;
            let hfn = Hfn(self.first.0 + index * size);
            if leaf.is_some() {
                // Frames follow each other in the entries as they do in the numbers.
                let same = expected + (index * size << crate::addr::PAGE_SHIFT);
                if raw & !ignored != same || !H::Format::permits(raw, parts.level, Rights::READ) {
                    return None;
                }
                continue;
            }
            let State::Leaf(first) = H::Format::decode(raw, parts.level) else { return None };
            if first.hfn != hfn || first.memory != self.extent.memory || first.host_writable && !self.extent.writable {
                return None;
            }
            expected = (raw & !ignored) - (index * size << crate::addr::PAGE_SHIFT);
            leaf = Some(Leaf { hfn: self.first, dirty: false, ..first });
        }
        // What the log or its arming took of the write right is given back: nothing logs any more.
        leaf.map(|leaf| {
            let mut rights = leaf.rights;
            rights.set(Rights::WRITE, leaf.mmu_writable);
            Leaf { rights, accessed: bits & H::Format::ACCESSED != 0, ..leaf }
        })
    }
}
