//! Looking without touching: what the tables say of a frame, for reports, checks and the MMIO path.
//!
//! Inside the shared side like a fault, but nothing is changed. What is seen is true of the moment at which each entry
//! was read; another thread may change it before the caller looks at the answer.

use crate::addr::{Gfn, Gpa, Hpa, Level, PAGE_SHIFT};
use crate::format::{Format, Rights, State};
use crate::host::Host;
use crate::lock::Shared;
use crate::root::RootRef;
use crate::table::Table;

/// One entry read on a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalkStep {
    /// Level of the table that the entry is in.
    pub level: Level,
    /// Where the entry is.
    pub address: Hpa,
    /// What it holds.
    pub raw: u64,
    /// What that means.
    pub state: State,
}

/// The entries that translate one frame, root first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Walk {
    steps: [Option<WalkStep>; 5],
}

impl Walk {
    /// The entries in the order of the walk.
    pub fn steps(&self) -> impl Iterator<Item = &WalkStep> {
        self.steps.iter().flatten()
    }

    /// The entry that the walk ended at: anything but a table.
    pub fn last(&self) -> Option<&WalkStep> {
        self.steps().last()
    }
}

/// Walks to `gfn` under `root`.
pub(crate) fn walk<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gfn: Gfn) -> Walk {
    let mut walk = Walk::default();
    let (mut table, mut frame) = (Table::root(inside, root), root.frame());
    for step in &mut walk.steps {
        let raw = table.entry(gfn).read();
        let address = Hpa(frame.hpa().0 + 8 * table.level.index(gfn) as u64);
        *step = Some(WalkStep { level: table.level, address, raw, state: H::Format::decode(raw, table.level) });
        match (table.next(raw), H::Format::next_table(raw, table.level)) {
            (Some(next), Some(below)) => (table, frame) = (next, below),
            _ => break,
        }
    }
    walk
}

/// The host address that the tables under `root` give for `gpa`, if they let an access with `rights` through. Unlike
/// [`walk`], for frequent use.
#[inline]
pub(crate) fn translate<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gpa: Gpa, rights: Rights) -> Option<Hpa> {
    let Some(table) = Table::leaves(inside, root, gpa.gfn()) else { return translate_huge(inside, root, gpa, rights) };
    let raw = table.entry(gpa.gfn()).read();
    leaf_address::<H::Format>(raw, Level::K4, gpa, rights)
}

#[cold]
fn translate_huge<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gpa: Gpa, rights: Rights) -> Option<Hpa> {
    let walk = walk(inside, root, gpa.gfn());
    let last = walk.last()?;
    leaf_address::<H::Format>(last.raw, last.level, gpa, rights)
}

#[inline]
fn leaf_address<F: Format>(raw: u64, level: Level, gpa: Gpa, rights: Rights) -> Option<Hpa> {
    let State::Leaf(leaf) = F::decode(raw, level) else { return None };
    let offset = gpa.0 & ((level.pages() << PAGE_SHIFT) - 1);
    F::permits(raw, level, rights).then(|| Hpa(leaf.hfn.hpa().0 | offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hfn;
    use crate::format::{Leaf, MemoryType, Npt};

    #[test]
    fn an_address_keeps_its_place_in_the_leaf_and_needs_the_right() {
        let memory = MemoryType::WriteBack;
        for (level, hfn) in [(Level::K4, Hfn(0x12345)), (Level::M2, Hfn(0x12200)), (Level::G1, Hfn(0x80000))] {
            let (host_writable, mmu_writable, accessed, dirty) = (true, true, true, false);
            let rights = Rights::READ.union(Rights::EXECUTE);
            let raw = Npt::leaf(level, Leaf { hfn, rights, host_writable, mmu_writable, accessed, dirty, memory });
            let gpa = Gpa((7 << 30) + 0x3fff_fabc);
            let size = level.pages() << PAGE_SHIFT;
            let expected = Hpa((hfn.0 << PAGE_SHIFT) + gpa.0 % size);
            assert_eq!(leaf_address::<Npt>(raw, level, gpa, Rights::READ), Some(expected));
            assert_eq!(leaf_address::<Npt>(raw, level, gpa, Rights::EXECUTE), Some(expected));
            assert_eq!(leaf_address::<Npt>(raw, level, gpa, Rights::WRITE), None);
        }
        for raw in [Npt::ABSENT, Npt::FROZEN, Npt::DEAD, Npt::mmio(5), Npt::table(Hfn(3))] {
            assert_eq!(leaf_address::<Npt>(raw, Level::M2, Gpa(0), Rights::READ), None);
        }
    }
}
