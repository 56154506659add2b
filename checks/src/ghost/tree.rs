//! The abstraction: what a tree of tables maps, read with the CPU's eyes, and whether the ghost allows it.
//!
//! To be used when nobody works on the tables.

use std::sync::atomic::Ordering;

use nestling::{AdBits, Counters, Gfn, GfnRange, Hfn, Level, Role, SlotId, State};

use super::Ghost;
use super::object::{Object, Page};
use crate::machine::arena::Arena;
use crate::machine::cpu::walk::root;
use crate::machine::cpu::{Allows, Cpu, Seen};

/// A leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// First frame of its block.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// First host frame.
    pub hfn: Hfn,
    /// Rights of the walk to it.
    pub allows: Allows,
    /// Its dirty bit.
    pub dirty: bool,
}

/// What a tree holds.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The role of its root.
    pub role: Role,
    /// All leaves in order.
    pub leaves: Vec<Leaf>,
    /// Tables, the root among them.
    pub tables: u64,
    /// Entries that fault with a reserved bit.
    pub reserved: u64,
    /// Frames that an entry led to although they are no table (any more).
    pub freed: Vec<Hfn>,
    /// Non-zero entries that the CPU takes for absent. There are none when no zap is under way.
    pub leftovers: Vec<(Level, u64)>,
}

impl Tree {
    /// Reads the tree of the root table `frame`.
    pub fn read<F: Cpu>(arena: &Arena, frame: Hfn, role: Role) -> Self {
        let (leaves, freed, leftovers) = (Vec::new(), Vec::new(), Vec::new());
        let mut tree = Self { role, leaves, tables: 0, reserved: 0, freed, leftovers };
        tree.descend::<F>(arena, frame, role.level(), Gfn(0), Allows::ALL);
        tree
    }

    fn descend<F: Cpu>(&mut self, arena: &Arena, frame: Hfn, level: Level, base: Gfn, above: Allows) {
        let Some(table) = root(arena, frame, level) else { return self.freed.push(frame) };
        self.tables += 1;
        for index in 0..512 {
            let Some(cell) = arena.entry(frame, table.life, index) else { return self.freed.push(frame) };
            let (raw, gfn) = (cell.load(Ordering::Acquire), Gfn(base.0 + index as u64 * level.pages()));
            match F::see(raw, level.number()) {
                Seen::Absent if raw == 0 => {}
                // The library's own way to say "mapped, but the next use faults"; it counts as a leaf.
                Seen::Absent if let State::AccessTracked(leaf) = F::decode(raw, level) => {
                    let allows = Allows { read: false, write: false, execute: false };
                    self.leaves.push(Leaf { gfn, level, hfn: leaf.hfn, allows, dirty: leaf.dirty });
                }
                Seen::Absent => self.leftovers.push((level, raw)),
                Seen::Reserved => self.reserved += 1,
                Seen::Leaf(hfn, allows) => {
                    let (allows, dirty) = (above.and(allows), raw & <F as Cpu>::DIRTY != 0);
                    self.leaves.push(Leaf { gfn, level, hfn, allows, dirty });
                }
                Seen::Table(next, allows) => {
                    let below = level.down().expect("an entry of level 1 is never a table");
                    self.descend::<F>(arena, next, below, gfn, above.and(allows));
                }
            }
        }
    }

    /// Leaves of `level`.
    pub fn leaves_of(&self, level: Level) -> u64 {
        self.leaves.iter().filter(|leaf| leaf.level == level).count() as u64
    }
}

/// Whether the pages of `object` behind a leaf's block are all at the frames that the leaf gives them.
fn backs(object: &Object, page: u64, leaf: &Leaf) -> bool {
    let (mut at, end) = (page, page + leaf.level.pages());
    while at < end {
        let run = object.run(at);
        if object.page(at) != Page::At(Hfn(leaf.hfn.0 + (at - page))) {
            return false;
        }
        at = run.end;
    }
    true
}

impl Ghost {
    fn check_leaf(&mut self, role: Role, leaf: &Leaf, largest: Level) {
        let block = GfnRange { start: leaf.gfn, end: Gfn(leaf.gfn.0 + leaf.level.pages()) };
        let place =
            self.placements.iter().find(|place| place.space == role.space() && place.range.covers(block)).copied();
        let object = place.and_then(|place| self.objects.get(&place.object).map(|object| (place, object)));
        let wrong = match object {
            None => Some("maps frames of no slot of its address space"),
            Some((place, object)) => {
                let page = leaf.gfn.0 - place.range.start.0 + object.shape.lead;
                if !backs(object, page, leaf) {
                    Some("maps a host frame that is not behind the slot")
                } else if leaf.allows.write && !self.may_write(&place) {
                    Some("lets the guest write what it may not")
                } else if role.ad_bits() == AdBits::Off && leaf.allows.write && !leaf.dirty {
                    Some("may be written without a trace")
                } else if leaf.allows.write && self.watches(place.id, block, place.range.start) {
                    Some("lets the guest write a page that is tracked")
                } else if leaf.level > largest {
                    Some("is larger than configured")
                } else {
                    None
                }
            }
        };
        if let Some(wrong) = wrong {
            self.violation(Some(leaf.gfn), format!("the leaf {leaf:?} {wrong}"));
        }
    }

    /// Whether any page of `block` of the slot that begins at `start` is watched.
    fn watches(&self, id: SlotId, block: GfnRange, start: Gfn) -> bool {
        let pages = (id, block.start.0 - start.0)..(id, block.end.0 - start.0);
        self.watchers.range(pages).next().is_some()
    }

    /// Holds the trees of all valid roots against what is allowed, and the counters against the trees.
    pub fn check_trees(&mut self, trees: &[Tree], largest: Level, counters: &Counters, arena: &Arena) {
        for tree in trees {
            tree.leaves.iter().for_each(|leaf| self.check_leaf(tree.role, leaf, largest));
            if !tree.freed.is_empty() {
                self.violation(None, format!("entries lead to freed tables: {:?}", tree.freed));
            }
            if !tree.leftovers.is_empty() {
                self.violation(None, format!("frozen or stray entries are left: {:x?}", tree.leftovers));
            }
        }
        let leaves = |level| trees.iter().map(|tree| tree.leaves_of(level)).sum();
        for (what, said, is) in [
            ("4 KiB leaves", counters.leaves_4k, leaves(Level::K4)),
            ("2 MiB leaves", counters.leaves_2m, leaves(Level::M2)),
            ("1 GiB leaves", counters.leaves_1g, leaves(Level::G1)),
            ("table frames", counters.table_frames, arena.live() as u64),
        ] {
            if said != is {
                self.violation(None, format!("the counters say {said} {what}, there are {is}"));
            }
        }
    }
}
