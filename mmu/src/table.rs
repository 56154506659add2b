//! Table pages as the walkers see them: borrowed from a guard, so that no table outlives the read-side mark.
//!
//! A table is reached from a root or from an entry of another table and in no other way; both keep what is reached
//! alive for as long as the mark stands (`reclaim` frees a table only after a grace period that began when no entry
//! led to it any more).

#![expect(unsafe_code, reason = "the one place that follows a frame number to a table")]

use crate::Mmu;
use crate::addr::{ENTRIES, Gfn, Hfn, Level};
use crate::entry::Entry;
use crate::format::Format;
use crate::host::Host;
use crate::lock::Shared;
use crate::root::RootRef;

/// One table page of `level`, borrowed from the guard of lifetime `'g`.
pub(crate) struct Table<'g, H: Host> {
    host: &'g H,
    entries: &'g [Entry; ENTRIES],
    pub(crate) level: Level,
}

impl<'g, H: Host> Clone for Table<'g, H> {
    #[inline]
    fn clone(&self) -> Self {
        *self
    }
}

impl<'g, H: Host> Copy for Table<'g, H> {}

impl<'g, H: Host> Table<'g, H> {
    /// The root table.
    #[inline]
    pub(crate) fn root(inside: &'g Shared<'_, H>, root: &RootRef) -> Self {
        Self::at(&inside.mmu.host, root.frame(), root.role().level())
    }

    /// The level-1 table for `gfn`; `None` where the walk ends before.
    ///
    /// The levels are constants here, so that this compiles to a straight line.
    #[inline]
    pub(crate) fn leaves(inside: &'g Shared<'_, H>, root: &RootRef, gfn: Gfn) -> Option<Self> {
        let mut table = Self::root(inside, root);
        if table.level == Level::L5 {
            table = table.next(table.entry(gfn).read())?;
        }
        for level in [Level::L4, Level::G1, Level::M2] {
            // A root's level is 4 or 5: `Config` is checked for that.
            debug_assert_eq!(table.level, level);
            table.level = level;
            table = table.next(table.entry(gfn).read())?;
        }
        Some(table)
    }

    #[inline]
    fn at(host: &'g H, frame: Hfn, level: Level) -> Self {
        let entries = host.table(frame).cast::<[Entry; ENTRIES]>();
        // SAFETY: `frame` is a root's frame or was read from a table entry under the guard of `'g`, so it is a table
        // frame that is not freed before the guard is dropped (module head); `TableFrames` promises a valid, aligned
        // pointer to 512 entries for it, which everyone accesses as atomics only; `Entry` is a transparent atomic.
        Self { host, entries: unsafe { entries.as_ref() }, level }
    }

    /// The table that `raw`, an entry of this table, leads to.
    #[inline]
    pub(crate) fn next(&self, raw: u64) -> Option<Self> {
        let level = self.level.down()?;
        H::Format::next_table(raw, self.level).map(|frame| Self::at(self.host, frame, level))
    }

    /// The entry for `gfn`.
    #[inline]
    pub(crate) fn entry(&self, gfn: Gfn) -> &'g Entry {
        &self.entries[self.level.index(gfn)]
    }

    /// All entries in order.
    pub(crate) fn entries(&self) -> &'g [Entry; ENTRIES] {
        self.entries
    }
}

/// Frees the tables below and including the root table in `frame`, of `level`, which nobody can reach any more: at the
/// end of the MMU, when no guard can exist, because each borrows the MMU that is borrowed mutably here.
pub(crate) fn free_tree<H: Host>(mmu: &mut Mmu<H>, frame: Hfn, level: Level) {
    fn free_below<H: Host>(table: Table<'_, H>) {
        if table.level == Level::K4 {
            return;
        }
        for cell in table.entries {
            let raw = cell.glance();
            if let (Some(next), Some(frame)) = (table.next(raw), H::Format::next_table(raw, table.level)) {
                free_below(next);
                table.host.free_table(frame);
            }
        }
    }
    free_below(Table::at(&mmu.host, frame, level));
    mmu.host.free_table(frame);
}
