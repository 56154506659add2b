//! The specification: which guest frame is at which host frame, under which root, and what each vCPU's TLB may hold.
//!
//! # What it knows
//! - Every change of an entry, in the order in which it happened. From the entries that lead to tables it knows where a
//!   table hangs, so of each leaf the guest frame and the root.
//! - Of each vCPU: whether it is in guest mode, on which root, and when it last flushed. What its TLB holds can not be read,
//!   so it counts as holding everything that it *may* hold: each translation under its root that was there at any moment
//!   since it last flushed. All of that by tag, where its TLB tells roots apart: one that enters on another root than the
//!   one before by the same tag flushes, so there is one root of each tag to think of.
//!
//! # What it checks
//! When memory has been taken from the guest, and before anybody else gets it ([`Ghost::gave_away`], [`Ghost::gone`]):
//! no leaf leads there, under any root; no vCPU in guest mode may hold a translation that did; and none enters later
//! without a flush that is younger than the translation's end. When a table is freed ([`Ghost::table_freed`]): no vCPU
//! runs on it as its root, and none in guest mode may have it in a paging-structure cache.
//!
//! # Time
//! Counts changes. A change is told after it was made, and before the flush that it owes begins; a flush is told before it is
//! made, with no guest instruction in between. So a translation whose end is told after a vCPU's flush may be in that
//! vCPU's TLB, and the library will have it flushed again.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use nestling::format::{Format, Npt, State};
use nestling::shadow::tags::Tag;
use nestling::{Gfn, GfnRange, Level};

const INDEX_BITS: u32 = 9;
const FRAME_SHIFT: u32 = 12;
/// Translations that have ended are looked through, and forgotten where nobody may hold them, when so many are known.
const SWEEP: usize = 16 * 1024;

/// A leaf that is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Leaf {
    gfn: u64,
    level: Level,
    hfn: u64,
    root: u64,
}

/// A translation that has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ended {
    leaf: Leaf,
    at: u64,
}

/// What is known of a vCPU, or of one of its tags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Vcpu {
    in_guest: bool,
    /// Frame of the root that it entered on last; 0 before.
    root: u64,
    flushed: u64,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct Ghost {
    now: u64,
    /// Where a table hangs: the entry that leads to it, by the table's frame.
    parents: BTreeMap<u64, u64>,
    /// Where a table hung, and until when: (root, time).
    unlinked: BTreeMap<u64, (u64, u64)>,
    /// Leaves, by the address of their entry.
    leaves: BTreeMap<u64, Leaf>,
    /// How many leaves lead to a block, by level and first host frame.
    blocks: BTreeMap<(u8, u64), u32>,
    ended: Vec<Ended>,
    /// The youngest end of a translation to memory that was taken, by root: who enters must have flushed since.
    taken: BTreeMap<u64, u64>,
    /// Each as often as it may have tags.
    vcpus: Vec<[Vcpu; Tag::COUNT]>,
    sweep_at: usize,
    checks: u64,
}

/// A contradiction.
pub type Violation = String;

impl Ghost {
    /// One that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            now: 0,
            parents: BTreeMap::new(),
            unlinked: BTreeMap::new(),
            leaves: BTreeMap::new(),
            blocks: BTreeMap::new(),
            ended: Vec::new(),
            taken: BTreeMap::new(),
            vcpus: Vec::new(),
            sweep_at: SWEEP,
            checks: 0,
        }
    }

    /// Changes that were seen, and checks that were made.
    #[must_use]
    pub const fn counts(&self) -> (u64, u64) {
        (self.now, self.checks)
    }

    /// The entry at `cell`, of a table of `level`, was changed.
    pub fn changed(&mut self, cell: u64, level: Level, old: u64, new: u64) {
        self.now += 1;
        match Npt::decode(old, level) {
            State::Table(table) => {
                let place = (self.root_of(cell), self.now);
                if self.parents.remove(&table.0).is_some() {
                    // Its own entries are still to be taken apart, and belong to that root.
                    self.unlinked.insert(table.0, place);
                }
            }
            State::Leaf(leaf) | State::AccessTracked(leaf) => {
                self.end(cell);
                if let (State::Table(table), Some(down)) = (Npt::decode(new, level), level.down()) {
                    // Split: the table was filled before it was linked, with the same frames in smaller pieces.
                    self.parents.insert(table.0, cell);
                    for index in 0..1 << INDEX_BITS {
                        self.begin((table.0 << FRAME_SHIFT) + 8 * index, down, leaf.hfn.0 + index * down.pages());
                    }
                }
            }
            _ => {}
        }
        match Npt::decode(new, level) {
            State::Table(table) => {
                self.unlinked.remove(&table.0);
                self.parents.insert(table.0, cell);
            }
            State::Leaf(leaf) | State::AccessTracked(leaf) => {
                self.begin(cell, level, leaf.hfn.0);
            }
            _ => {}
        }
    }

    /// There is a leaf at `cell`.
    fn begin(&mut self, cell: u64, level: Level, hfn: u64) {
        let leaf = Leaf { gfn: self.gfn_of(cell, level), level, hfn, root: self.root_of(cell) };
        self.leaves.insert(cell, leaf);
        *self.blocks.entry((level.number(), hfn)).or_default() += 1;
    }

    /// The leaf at `cell` is no more.
    fn end(&mut self, cell: u64) {
        let Some(leaf) = self.leaves.remove(&cell) else { return };
        if let Some(count) = self.blocks.get_mut(&(leaf.level.number(), leaf.hfn)) {
            *count -= 1;
            if *count == 0 {
                self.blocks.remove(&(leaf.level.number(), leaf.hfn));
            }
        }
        if self.ended.len() >= self.sweep_at {
            let vcpus = &self.vcpus;
            self.ended
                .retain(|ended| vcpus.as_flattened().iter().any(|vcpu| may_hold(vcpu, ended.leaf.root, ended.at)));
            self.sweep_at = (2 * self.ended.len()).max(SWEEP);
        }
        self.ended.push(Ended { leaf, at: self.now });
    }

    /// The root above an entry.
    fn root_of(&self, cell: u64) -> u64 {
        let mut frame = cell >> FRAME_SHIFT;
        loop {
            match (self.parents.get(&frame), self.unlinked.get(&frame)) {
                (Some(parent), _) => frame = parent >> FRAME_SHIFT,
                (None, Some(&(root, _))) => return root,
                (None, None) => return frame,
            }
        }
    }

    /// The first guest frame that an entry of a table of `level` is for.
    fn gfn_of(&self, cell: u64, level: Level) -> u64 {
        let (mut cell, mut shift, mut gfn) = (cell, INDEX_BITS * (u32::from(level.number()) - 1), 0);
        loop {
            gfn |= (cell >> 3 & ((1 << INDEX_BITS) - 1)) << shift;
            match self.parents.get(&(cell >> FRAME_SHIFT)) {
                Some(&parent) => (cell, shift) = (parent, shift + INDEX_BITS),
                None => return gfn,
            }
        }
    }

    /// A vCPU is about to run guest code on the root in frame `root`, and flushes first or not.
    ///
    /// # Errors
    /// It should have flushed.
    pub fn entering(&mut self, vcpu: usize, tag: usize, root: u64, flushes: bool) -> Result<(), Violation> {
        if self.vcpus.len() <= vcpu {
            self.vcpus.resize(vcpu + 1, Default::default());
        }
        self.checks += 1;
        let before = self.vcpus[vcpu][tag];
        let flushed = if flushes { self.now } else { before.flushed };
        self.vcpus[vcpu][tag] = Vcpu { in_guest: true, root, flushed };
        if flushes {
            return Ok(());
        }
        if before.root != root {
            return Err(format!("vCPU {vcpu} enters on root {root:#x} after {:#x} without a flush", before.root));
        }
        match self.taken.get(&root) {
            Some(&at) if at > flushed => Err(format!(
                "vCPU {vcpu} enters on root {root:#x} without a flush since {flushed}, and memory that it may reach was \
                 taken: its mapping ended at {at}"
            )),
            _ => Ok(()),
        }
    }

    /// A vCPU has stopped running guest code.
    pub fn left(&mut self, vcpu: usize) {
        for tag in self.vcpus.get_mut(vcpu).into_iter().flatten() {
            tag.in_guest = false;
        }
    }

    /// `frames` host frames from `hfn` on were taken from the guest, and somebody else is about to have them.
    ///
    /// # Errors
    /// The guest may still reach them.
    pub fn gave_away(&mut self, hfn: u64, frames: u64) -> Result<(), Violation> {
        self.checks += 1;
        for level in [Level::K4, Level::M2, Level::G1] {
            // Blocks of this size that begin in the frames, or before them and reach into them.
            let first = level.align_down(Gfn(hfn)).0;
            let keys = (level.number(), first)..(level.number(), hfn + frames);
            if let Some((&(_, at), _)) = self.blocks.range(keys).next() {
                return Err(format!("host frame {hfn:#x} (+{frames}) is given away, and {level:?} maps {at:#x}"));
            }
        }
        self.ended_all(&format!("host frame {hfn:#x} (+{frames})"), |leaf| {
            leaf.hfn < hfn + frames && hfn < leaf.hfn + leaf.level.pages()
        })
    }

    /// A memslot's frames were taken from the guest.
    ///
    /// # Errors
    /// The guest may still reach their memory.
    pub fn gone(&mut self, range: GfnRange) -> Result<(), Violation> {
        self.checks += 1;
        let within = |leaf: &Leaf| leaf.gfn < range.end.0 && range.start.0 < leaf.gfn + leaf.level.pages();
        if let Some(leaf) = self.leaves.values().find(|leaf| within(leaf)) {
            return Err(format!("the slot at {:#x} is gone, and {leaf:x?} is mapped", range.start.0));
        }
        self.ended_all(&format!("the slot at {:#x}", range.start.0), within)
    }

    /// No vCPU in guest mode may hold a translation that is `wanted`, and none will enter with one.
    fn ended_all(&mut self, what: &str, wanted: impl Fn(&Leaf) -> bool) -> Result<(), Violation> {
        for ended in self.ended.iter().filter(|ended| wanted(&ended.leaf)) {
            let youngest = self.taken.entry(ended.leaf.root).or_default();
            *youngest = ended.at.max(*youngest);
            for (number, vcpu) in in_guest(&self.vcpus) {
                if may_hold(vcpu, ended.leaf.root, ended.at) {
                    return Err(format!(
                        "{what} is taken from the guest, and vCPU {number}, in guest mode, has not flushed since {}: it may \
                         hold {:x?}, which ended at {}",
                        vcpu.flushed, ended.leaf, ended.at
                    ));
                }
            }
        }
        Ok(())
    }

    /// A table frame goes back.
    ///
    /// # Errors
    /// A vCPU may still walk it.
    pub fn table_freed(&mut self, frame: u64) -> Result<(), Violation> {
        self.checks += 1;
        self.parents.remove(&frame);
        self.taken.remove(&frame);
        let unlinked = self.unlinked.remove(&frame);
        for (number, vcpu) in in_guest(&self.vcpus) {
            if vcpu.root == frame {
                return Err(format!("table {frame:#x} is freed, and vCPU {number} runs on it as its root"));
            }
            if let Some((root, at)) = unlinked
                && may_hold(vcpu, root, at)
            {
                return Err(format!(
                    "table {frame:#x}, unlinked at {at}, is freed, and vCPU {number}, in guest mode, has not flushed since {}",
                    vcpu.flushed
                ));
            }
        }
        Ok(())
    }
}

/// Those in guest mode, each by the tag that it runs by.
fn in_guest(vcpus: &[[Vcpu; Tag::COUNT]]) -> impl Iterator<Item = (usize, &Vcpu)> {
    let numbered = vcpus.iter().enumerate();
    numbered.flat_map(|(number, tags)| tags.iter().filter(|vcpu| vcpu.in_guest).map(move |vcpu| (number, vcpu)))
}

/// Whether a vCPU's TLB may hold what there was under `root` until `at`.
const fn may_hold(vcpu: &Vcpu, root: u64, at: u64) -> bool {
    vcpu.root == root && vcpu.flushed < at
}

#[cfg(test)]
mod tests {
    use super::*;
    use nestling::Hfn;
    use nestling::format::{Leaf as Entry, MemoryType, Rights};

    const ROOT: u64 = 0x10;

    fn leaf(hfn: u64) -> u64 {
        let (host_writable, mmu_writable, accessed, dirty) = (true, true, true, false);
        let (rights, memory) = (Rights::all(), MemoryType::WriteBack);
        Npt::leaf(Level::K4, Entry { hfn: Hfn(hfn), rights, host_writable, mmu_writable, accessed, dirty, memory })
    }

    fn cell(table: u64, index: u64) -> u64 {
        (table << FRAME_SHIFT) + 8 * index
    }

    /// A root with a path to a level-1 table in frame 0x13, which maps guest frame 5 to host frame 0x500.
    fn mapped() -> Ghost {
        let mut ghost = Ghost::new();
        ghost.changed(cell(ROOT, 0), Level::L4, Npt::ABSENT, Npt::table(Hfn(0x11)));
        ghost.changed(cell(0x11, 0), Level::G1, Npt::ABSENT, Npt::table(Hfn(0x12)));
        ghost.changed(cell(0x12, 0), Level::M2, Npt::ABSENT, Npt::table(Hfn(0x13)));
        ghost.changed(cell(0x13, 5), Level::K4, Npt::ABSENT, leaf(0x500));
        ghost
    }

    fn zap(ghost: &mut Ghost) {
        ghost.changed(cell(0x13, 5), Level::K4, leaf(0x500), Npt::FROZEN);
    }

    #[test]
    fn memory_is_taken_after_a_flush() {
        let mut ghost = mapped();
        ghost.entering(0, 0, ROOT, true).unwrap();
        ghost.left(0);
        zap(&mut ghost);
        ghost.entering(0, 0, ROOT, true).unwrap();
        ghost.gave_away(0x500, 1).unwrap();
        ghost.gone(GfnRange { start: Gfn(0), end: Gfn(512) }).unwrap();
        ghost.left(0);
        ghost.entering(0, 0, ROOT, false).unwrap();
    }

    #[test]
    fn a_leaf_that_is_left_is_found() {
        let mut ghost = mapped();
        assert!(ghost.gave_away(0x500, 1).unwrap_err().contains("maps 0x500"));
        assert!(ghost.gave_away(0x400, 512).is_err(), "it is one of them");
        ghost.gave_away(0x501, 1).unwrap();
        assert!(ghost.gone(GfnRange { start: Gfn(5), end: Gfn(6) }).is_err());
        ghost.gone(GfnRange { start: Gfn(6), end: Gfn(512) }).unwrap();
        let huge = leaf(0x600) | 1 << 7;
        ghost.changed(cell(0x12, 3), Level::M2, Npt::ABSENT, huge);
        assert!(ghost.gave_away(0x7ff, 1).is_err(), "a huge leaf reaches it");
        assert!(ghost.gone(GfnRange { start: Gfn(3 * 512 + 9), end: Gfn(3 * 512 + 10) }).is_err());
    }

    #[test]
    fn a_vcpu_that_was_not_flushed_is_found() {
        let mut ghost = mapped();
        ghost.entering(1, 0, ROOT, true).unwrap();
        zap(&mut ghost);
        assert!(ghost.gave_away(0x500, 1).unwrap_err().contains("vCPU 1"));
        assert!(ghost.gone(GfnRange { start: Gfn(5), end: Gfn(6) }).unwrap_err().contains("vCPU 1"));
    }

    #[test]
    fn a_vcpu_that_enters_without_a_flush_is_found() {
        let mut ghost = mapped();
        ghost.entering(1, 0, ROOT, true).unwrap();
        ghost.left(1);
        zap(&mut ghost);
        // Nothing was promised yet: it may go on.
        ghost.entering(1, 0, ROOT, false).unwrap();
        ghost.left(1);
        ghost.gave_away(0x500, 1).unwrap();
        assert!(ghost.entering(1, 0, ROOT, false).unwrap_err().contains("without a flush"));
        ghost.left(1);
        ghost.entering(1, 0, ROOT, true).unwrap();
        assert!(ghost.entering(1, 0, ROOT + 1, false).is_err(), "another root, and no flush");
    }

    #[test]
    fn each_tag_is_flushed_by_itself() {
        let mut ghost = mapped();
        ghost.entering(0, 0, ROOT, true).unwrap();
        ghost.left(0);
        ghost.entering(0, 1, 0x90, true).unwrap();
        // No flush for going back, as long as nothing was taken.
        ghost.left(0);
        ghost.entering(0, 0, ROOT, false).unwrap();
        ghost.left(0);
        zap(&mut ghost);
        ghost.gave_away(0x500, 1).unwrap();
        ghost.entering(0, 1, 0x90, true).unwrap();
        ghost.left(0);
        assert!(ghost.entering(0, 0, ROOT, false).unwrap_err().contains("without a flush"));
    }

    #[test]
    fn a_vcpu_on_another_root_does_not_count() {
        let mut ghost = mapped();
        ghost.entering(0, 0, 0x90, true).unwrap();
        zap(&mut ghost);
        ghost.gave_away(0x500, 1).unwrap();
    }

    #[test]
    fn tables_are_freed_when_no_vcpu_walks_them() {
        let mut ghost = mapped();
        ghost.entering(0, 0, ROOT, true).unwrap();
        ghost.changed(cell(0x12, 0), Level::M2, Npt::table(Hfn(0x13)), Npt::FROZEN);
        ghost.changed(cell(0x13, 5), Level::K4, leaf(0x500), Npt::DEAD);
        assert_eq!(ghost.ended.last().map(|ended| ended.leaf.root), Some(ROOT), "it was that root's");
        let mut flushed = Ghost { vcpus: ghost.vcpus.clone(), unlinked: ghost.unlinked.clone(), ..Ghost::new() };
        assert!(ghost.table_freed(0x13).unwrap_err().contains("unlinked"));
        assert!(ghost.table_freed(ROOT).unwrap_err().contains("root"));
        flushed.now = ghost.now;
        flushed.entering(0, 0, ROOT, true).unwrap();
        flushed.table_freed(0x13).unwrap();
    }

    #[test]
    fn a_leaf_that_was_split_is_known_in_pieces() {
        let mut ghost = mapped();
        let huge = leaf(0x600) | 1 << 7;
        ghost.changed(cell(0x12, 3), Level::M2, Npt::ABSENT, huge);
        ghost.changed(cell(0x12, 3), Level::M2, huge, Npt::table(Hfn(0x14)));
        assert!(ghost.gave_away(0x7ff, 1).unwrap_err().contains("L1 maps 0x7ff"));
        assert!(ghost.gone(GfnRange { start: Gfn(3 * 512 + 9), end: Gfn(3 * 512 + 10) }).is_err());
        ghost.changed(cell(0x14, 511), Level::K4, leaf(0x7ff), Npt::FROZEN);
        ghost.gave_away(0x7ff, 1).unwrap();
    }

    #[test]
    fn what_nobody_may_hold_is_forgotten() {
        let mut ghost = mapped();
        ghost.entering(0, 0, ROOT, true).unwrap();
        for _ in 0..2 * SWEEP {
            zap(&mut ghost);
            ghost.entering(0, 0, ROOT, true).unwrap();
            ghost.changed(cell(0x13, 5), Level::K4, Npt::ABSENT, leaf(0x500));
        }
        assert!(ghost.ended.len() <= SWEEP, "{}", ghost.ended.len());
    }
}
