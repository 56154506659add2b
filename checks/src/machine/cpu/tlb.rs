//! The adversarial TLB: forgets nothing that it need not forget.
//!
//! It keeps leaves and, like a paging-structure cache, pointers to tables of every level, from the moment a walk saw
//! them until a flush. Of several that match it takes the oldest. What a CPU must do it does too: a fault removes
//! what was cached for the faulting address (SDM vol 3, 30.4.3.1: an EPT violation invalidates the guest-physical
//! mappings that would translate it), or a guest could fault on a stale entry for ever; and a write through an entry
//! that is not known to be dirty walks again, because the dirty bit has to be set in memory.

use std::collections::BTreeMap;

use nestling::{Access, Gfn, GfnRange, Hfn, Level};

use super::Allows;

/// A cached leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CachedLeaf {
    /// First frame of the block.
    pub gfn: Gfn,
    /// The leaf's level.
    pub level: Level,
    /// First host frame of the block.
    pub hfn: Hfn,
    /// Rights of the whole walk.
    pub allows: Allows,
    /// The dirty bit was set in memory when this was cached.
    pub dirty: bool,
    /// Ghost time just after the leaf was read.
    pub born: u64,
}

impl CachedLeaf {
    /// Whether it translates `gfn`.
    pub fn covers(&self, gfn: Gfn) -> bool {
        self.level.align_down(gfn) == self.gfn
    }

    /// The host frame of `gfn`.
    pub fn translate(&self, gfn: Gfn) -> Hfn {
        Hfn(self.hfn.0 + (gfn.0 - self.gfn.0))
    }
}

/// A cached pointer to a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CachedTable {
    /// First frame of the block that the table translates.
    pub gfn: Gfn,
    /// Level of the table's entries.
    pub level: Level,
    /// The table.
    pub frame: Hfn,
    /// The life of the frame in which it was a table.
    pub life: u32,
    /// Rights of the walk so far.
    pub allows: Allows,
}

impl CachedTable {
    fn covers(&self, gfn: Gfn) -> bool {
        Level::from_number(self.level.number() + 1).is_some_and(|above| above.align_down(gfn) == self.gfn)
    }
}

type Parked = (Vec<CachedLeaf>, Vec<CachedTable>);

/// See the module head.
#[derive(Clone, Debug, Default)]
pub struct Tlb {
    leaves: Vec<CachedLeaf>,
    tables: Vec<CachedTable>,
    /// The root that they were filled through, on a CPU that tags them so.
    root: Hfn,
    /// What was filled through others, and is there when they are loaded again.
    parked: BTreeMap<Hfn, Parked>,
    /// Times that it was told to flush.
    pub flushes: u64,
    /// Accesses that it translated without a walk.
    pub hits: u64,
}

/// What the TLB says of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// The stalest leaf that allows it.
    Leaf(CachedLeaf),
    /// There are leaves, none allows it.
    Denied,
    /// Nothing: walk.
    Nothing,
}

impl Tlb {
    /// Entries of either kind at most; a full one keeps what it has, which is the staler.
    const ROOM: usize = 2048;

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.parked.clear();
        self.flush_current();
    }

    /// Forgets what was filled through the root that is loaded.
    pub fn flush_current(&mut self) {
        self.leaves.clear();
        self.tables.clear();
        self.flushes += 1;
    }

    /// Another root is loaded; what is tagged with it is found again.
    pub fn switch(&mut self, root: Hfn) {
        if root != self.root {
            let (leaves, tables) = self.parked.remove(&root).unwrap_or_default();
            let old = (std::mem::replace(&mut self.leaves, leaves), std::mem::replace(&mut self.tables, tables));
            self.parked.insert(std::mem::replace(&mut self.root, root), old);
        }
    }

    /// Forgets what translates frames of `range`, and every table that a walk for one of them may begin at.
    pub fn forget(&mut self, range: GfnRange) {
        let block = |gfn: Gfn, level: Level| range.overlaps(GfnRange::block(level, gfn));
        let all = self.parked.values_mut().map(|(leaves, tables)| (leaves, tables));
        for (leaves, tables) in all.chain([(&mut self.leaves, &mut self.tables)]) {
            leaves.retain(|leaf| !block(leaf.gfn, leaf.level));
            tables.retain(|table| !Level::from_number(table.level.number() + 1).is_some_and(|up| block(table.gfn, up)));
        }
    }

    /// What is cached for an access.
    pub fn find(&mut self, gfn: Gfn, access: Access) -> Found {
        let mut found = Found::Nothing;
        for leaf in self.leaves.iter().filter(|leaf| leaf.covers(gfn)) {
            if !leaf.allows.permits(access) {
                found = Found::Denied;
            } else if access != Access::Write || leaf.dirty {
                self.hits += 1;
                return Found::Leaf(*leaf);
            }
        }
        found
    }

    /// The lowest and then oldest table that a walk for `gfn` may begin at.
    pub fn find_table(&self, gfn: Gfn) -> Option<CachedTable> {
        // `min_by_key` returns the first of equals, which is the oldest.
        self.tables.iter().filter(|table| table.covers(gfn)).min_by_key(|table| table.level).copied()
    }

    /// Remembers a leaf, unless the same is there with an older birth.
    pub fn learn(&mut self, leaf: CachedLeaf) {
        let same = |old: &CachedLeaf| CachedLeaf { born: 0, ..*old } == CachedLeaf { born: 0, ..leaf };
        if self.leaves.len() < Self::ROOM && !self.leaves.iter().any(same) {
            self.leaves.push(leaf);
        }
    }

    /// Remembers a table.
    pub fn learn_table(&mut self, table: CachedTable) {
        if self.tables.len() < Self::ROOM && !self.tables.contains(&table) {
            self.tables.push(table);
        }
    }

    /// A fault on `gfn` was taken: what would translate it goes.
    pub fn faulted(&mut self, gfn: Gfn) {
        self.leaves.retain(|leaf| !leaf.covers(gfn));
        self.tables.retain(|table| !table.covers(gfn));
    }

    /// Cached leaves, oldest first.
    pub fn leaves(&self) -> &[CachedLeaf] {
        &self.leaves
    }
}
