//! The CPU's page walk over the real tables.
//!
//! Runs in guest mode only. The library promises that no table is freed while a CPU in guest mode may still reach it,
//! so a table whose life is over, met by a walk, is a violation whatever else happens.

use std::sync::atomic::Ordering;

use nestling::{Access, AdBits, Cause, Gfn, Hfn, Level};

use super::tlb::{CachedLeaf, CachedTable};
use super::{Allows, Cpu, Seen};
use crate::machine::arena::Arena;

/// How a walk that did not fault ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Walked {
    /// A leaf that allows the access. `born` is for the caller to fill.
    Leaf(CachedLeaf),
    /// The fault that the access takes.
    Fault(Cause),
    /// The walk met a table that had been freed.
    Freed(Hfn),
}

/// The root as a table to begin at; `None` if it has been freed.
pub fn root(arena: &Arena, frame: Hfn, level: Level) -> Option<CachedTable> {
    let life = arena.life(frame)?;
    (life % 2 == 1).then_some(CachedTable { gfn: Gfn(0), level, frame, life, allows: Allows::ALL })
}

/// Walks from `table` to the leaf of `gfn`, under a root pointer that says `ad_bits`; `visit` sees each table on the way.
pub fn walk<F: Cpu>(
    arena: &Arena,
    mut table: CachedTable,
    gfn: Gfn,
    access: Access,
    ad_bits: AdBits,
    mut visit: impl FnMut(CachedTable),
) -> Walked {
    // Without them a CPU writes nothing to its tables, and has nothing to write before a first write either.
    let (accessed, dirty) = match ad_bits {
        AdBits::Off if F::AD_IS_OPTIONAL => (0, 0),
        _ => (<F as Cpu>::ACCESSED, <F as Cpu>::DIRTY),
    };
    loop {
        let Some(cell) = arena.entry(table.frame, table.life, table.level.index(gfn)) else {
            return Walked::Freed(table.frame);
        };
        let raw = cell.load(Ordering::Acquire);
        if arena.life(table.frame) != Some(table.life) {
            return Walked::Freed(table.frame);
        }
        match F::see(raw, table.level.number()) {
            Seen::Absent => return Walked::Fault(Cause::Translation),
            Seen::Reserved => return Walked::Fault(Cause::Reserved),
            Seen::Table(frame, allows) => {
                let wanted = raw | accessed;
                if wanted != raw && cell.compare_exchange(raw, wanted, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                let Some(life) = arena.life(frame).filter(|life| life % 2 == 1) else { return Walked::Freed(frame) };
                let level = table.level.down().expect("an entry of level 1 is never a table");
                let allows = table.allows.and(allows);
                table = CachedTable { gfn: table.level.align_down(gfn), level, frame, life, allows };
                visit(table);
            }
            Seen::Leaf(hfn, allows) => {
                let allows = table.allows.and(allows);
                if !allows.permits(access) {
                    return Walked::Fault(Cause::Translation);
                }
                let written = if access == Access::Write { dirty } else { 0 };
                let wanted = raw | accessed | written;
                if wanted != raw && cell.compare_exchange(raw, wanted, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                let (level, gfn) = (table.level, table.level.align_down(gfn));
                return Walked::Leaf(CachedLeaf { gfn, level, hfn, allows, dirty: wanted & dirty == dirty, born: 0 });
            }
        }
    }
}
