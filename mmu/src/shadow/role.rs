//! What a shadow page is: the role, and what becomes of a guest entry in a page of it.
//!
//! Identity is `(gfn, role)` compared as a whole, at every lookup and again at every link. The role is one word of
//! everything that the contents depend on: the level, whether the page stands for a table or for a run of frames, which
//! part of the guest's table it is, what the entries above allow together, and the registers that decide how entries
//! are read. That a page is dead or obsolete is *not* in it: a child's role is made from its parent's, and would inherit
//! that (CVE-2026-64561).
//!
//! There is one place that says what an entry of a page should be, [`Role::meaning`]. Faults make entries by it, links
//! are checked by it, and bringing a page in step compares by it; they can not disagree.

use crate::addr::{ENTRIES, Gfn, INDEX_BITS, PAGE_SHIFT};
use crate::format::long_mode::Top;
use crate::guest::{Controls, CpuFeatures, Judged, Mode, Rights, Width};
use crate::mutants::{self, Mutant};

/// See the module head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Role(u32);

const LEVEL: u32 = 7;
const DIRECT: u32 = 1 << 3;
/// Quadrant of a 4-byte table; place of a PAE top table in its page; protection key of a direct page, and [`CLEAN`].
const PART_SHIFT: u32 = 4;
const PART: u32 = 0x7f << PART_SHIFT;
const KEY: u32 = 15;
/// In the part of a direct page: the guest's page is not dirty. Only without CR0.WP, where a leaf may have become writable
/// although the rights say no: with a right to write, these are other rights; without one, nothing but this tells the page
/// apart that the supervisor has written to. The guest that clears the dirty bit must find it set again.
const CLEAN: u32 = 1 << 4;
const USER: u32 = 1 << 11;
const WRITE: u32 = 1 << 12;
const EXECUTE: u32 = 1 << 13;
const ACCESS: u32 = USER | WRITE | EXECUTE;
const PG: u32 = 1 << 14;
const WP: u32 = 1 << 15;
const PSE: u32 = 1 << 16;
const PAE: u32 = 1 << 17;
const LA57: u32 = 1 << 18;
const SMEP: u32 = 1 << 19;
const SMAP: u32 = 1 << 20;
const PKE: u32 = 1 << 21;
const LMA: u32 = 1 << 22;
const NXE: u32 = 1 << 23;

/// Which bit of which register each of the role's mode bits is.
const CR0_BITS: [(u32, u32); 2] = [(PG, 31), (WP, 16)];
const CR4_BITS: [(u32, u32); 6] = [(PSE, 4), (PAE, 5), (LA57, 12), (SMEP, 20), (SMAP, 21), (PKE, 22)];
const EFER_BITS: [(u32, u32); 2] = [(LMA, 10), (NXE, 11)];

/// Entries of a PAE top table.
const POINTERS: usize = if ENTRIES < 4 { ENTRIES } else { 4 };

/// What a page's entries are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Source {
    /// Entries of a guest's table.
    Guest(Width),
    /// The page's own identity.
    Identity,
}

/// A page that should be behind an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    pub(super) gfn: Gfn,
    pub(super) role: Role,
}

/// What an entry should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meaning {
    /// Absent.
    Nothing,
    /// A link.
    Child(Identity),
    /// A leaf, with the rights of all levels together; write only where the guest's dirty bit is set.
    Leaf { gfn: Gfn, rights: Rights, key: u8 },
}

const fn bits(from: &[(u32, u32)], role: u32) -> u64 {
    let (mut register, mut i) = (0, 0);
    while i < from.len() {
        if role & from[i].0 != 0 {
            register |= 1 << from[i].1;
        }
        i += 1;
    }
    register
}

const fn gather(from: &[(u32, u32)], register: u64) -> u32 {
    let (mut role, mut i) = (0, 0);
    while i < from.len() {
        if register >> from[i].1 & 1 != 0 {
            role |= from[i].0;
        }
        i += 1;
    }
    role
}

impl Identity {
    /// The root that `cr3` names under these registers.
    pub(super) fn root(controls: Controls, cr3: u64, cpu: CpuFeatures) -> Self {
        let mut mode =
            gather(&CR0_BITS, controls.cr0) | gather(&CR4_BITS, controls.cr4) | gather(&EFER_BITS, controls.efer);
        if mode & PG == 0 {
            // Nothing else matters: addresses are translated by nobody.
            return Self { gfn: Gfn(0), role: Role(ACCESS | DIRECT | 3) };
        }
        if mode & LMA != 0 {
            mode = mode & !PSE | PAE;
        } else {
            mode &= !(LA57 | PKE);
            mode &= if mode & PAE != 0 { !PSE } else { !NXE };
        }
        if mode & WP != 0 {
            // The CPU itself tells user pages from supervisor pages then, for the tables do so exactly.
            mode &= !(SMEP | SMAP);
        }
        let level = match (mode & LMA, mode & LA57) {
            (0, _) => 3,
            (_, 0) => 4,
            _ => 5,
        };
        let top = Mode::new(controls, cpu).root(cr3);
        let part = if mode & (LMA | PAE) == PAE { (top.0 & 0xfff) as u32 >> 5 } else { 0 };
        Self { gfn: top.gfn(), role: Role(mode | ACCESS | part << PART_SHIFT | level) }
    }
}

impl Identity {
    /// The root that another CR3 names under the registers of this one, which make `mode`.
    pub(super) fn with_cr3(self, mode: &Mode, cr3: u64) -> Self {
        if !mode.is_paging() {
            return self;
        }
        let top = mode.root(cr3);
        let part = if matches!(self.role.top(), Top::Pointers) && !self.role.is_legacy() {
            (top.0 & 0xfff) as u32 >> 5
        } else {
            0
        };
        Self { gfn: top.gfn(), role: Role(self.role.0 & !PART | part << PART_SHIFT) }
    }

    /// In the place of a root whose table is nowhere: a page of the same format that is made of nothing. (Its role is of no
    /// registers that a guest can have, so that no fault takes it for its own.)
    pub(super) const fn without_memory(self) -> Self {
        let level = self.role.0 & (LEVEL | LMA);
        Self { gfn: Gfn(0), role: Role(DIRECT | level | PSE) }
    }
}

impl Role {
    pub(super) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    #[inline]
    pub(super) const fn level(self) -> u8 {
        (self.0 & LEVEL) as u8
    }

    #[inline]
    pub(super) const fn is_direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    const fn part(self) -> u32 {
        (self.0 & PART) >> PART_SHIFT
    }

    /// What the entries above allow together.
    pub(super) const fn access(self) -> Rights {
        Rights { user: self.0 & USER != 0, write: self.0 & WRITE != 0, execute: self.0 & EXECUTE != 0 }
    }

    /// How the guest reads tables of this role's level.
    pub(super) fn mode(self, cpu: CpuFeatures) -> Mode {
        let (cr0, cr4, efer) = (bits(&CR0_BITS, self.0), bits(&CR4_BITS, self.0), bits(&EFER_BITS, self.0));
        Mode::of_level(Controls { cr0, cr4, efer }, cpu, self.level())
    }

    /// Whether the supervisor may write where the tables say that nobody may.
    pub(super) const fn ignores_write_protection(self) -> bool {
        self.0 & PG != 0 && self.0 & WP == 0
    }

    pub(super) const fn has_smep(self) -> bool {
        self.0 & SMEP != 0
    }

    /// Whether the supervisor's access to user pages depends on more than the entry.
    pub(super) const fn has_smap_or_keys(self) -> bool {
        self.0 & (SMAP | PKE) != 0
    }

    /// Whether entries are of 4 bytes: two levels of 1024.
    const fn is_legacy(self) -> bool {
        self.0 & (PG | PAE | LMA) == PG
    }

    /// Whether the page is the top table of what the CPU walks in PAE format.
    pub(super) const fn top(self) -> Top {
        if self.level() == 3 && self.0 & LMA == 0 { Top::Pointers } else { Top::Usual }
    }

    /// Entries in use.
    pub(super) const fn entries(self) -> usize {
        match self.top() {
            Top::Pointers => POINTERS,
            Top::Usual => ENTRIES,
        }
    }

    /// The entry for a linear address.
    #[inline]
    pub(super) const fn index(self, linear: u64) -> usize {
        (linear >> (PAGE_SHIFT + INDEX_BITS * (self.level() as u32 - 1))) as usize & (self.entries() - 1)
    }

    pub(super) const fn source(self) -> Source {
        if self.is_direct() || self.is_legacy() && self.level() == 3 {
            Source::Identity
        } else if self.is_legacy() {
            Source::Guest(Width::Four)
        } else {
            Source::Guest(Width::Eight)
        }
    }

    /// Where in its frame the guest's entry behind entry `index` is, in bytes.
    pub(super) const fn guest_offset(self, index: usize) -> u32 {
        let (index, part) = (index as u32, self.part());
        if self.is_legacy() {
            // A table of level 1 is two halves; one of level 2 is four quarters, of whose entries each stands for two.
            let place = if self.level() == 1 { part * 512 + index } else { part * 256 + index / 2 };
            place * 4
        } else if matches!(self.top(), Top::Pointers) {
            part * 32 + index * 8
        } else {
            index * 8
        }
    }

    /// The other entry that stands for the same entry of the guest's, where there are two: a page of 4 MiB is two of 2 MiB.
    pub(super) const fn twin(self, index: usize) -> Option<usize> {
        if self.is_legacy() && self.level() == 2 { Some(index ^ 1) } else { None }
    }

    /// The role of a page below one of this role.
    fn below(self, rights: Rights, part: u32, direct: bool) -> Self {
        let mut word = self.0 & !(LEVEL | PART | DIRECT) | (self.0 & LEVEL) - 1 | part << PART_SHIFT;
        let rights = if mutants::is(Mutant::ShadowAccessNotInherited) { Rights::ALL } else { rights };
        if !rights.user {
            word &= !USER;
        }
        if !rights.write {
            word &= !WRITE;
        }
        if !rights.execute {
            word &= !EXECUTE;
        }
        if direct {
            word |= DIRECT;
        }
        Self(word)
    }

    /// What entry `index` of the page `(gfn, self)` should be. `judged` is the guest's entry behind it; not looked at
    /// where there is none.
    pub(super) fn meaning(self, gfn: Gfn, index: usize, judged: Judged) -> Meaning {
        let level = u32::from(self.level());
        let pages = |level: u32| 1u64 << (INDEX_BITS * (level - 1));
        if self.is_direct() {
            let gfn = Gfn(gfn.0 + index as u64 * pages(level));
            if level == 1 {
                return Meaning::Leaf { gfn, rights: self.access(), key: (self.part() & KEY) as u8 };
            }
            return Meaning::Child(Identity { gfn, role: self.below(Rights::ALL, self.part(), true) });
        }
        if self.source() == Source::Identity {
            return Meaning::Child(Identity { gfn, role: self.below(Rights::ALL, index as u32, false) });
        }
        match judged {
            Judged::Nothing => Meaning::Nothing,
            Judged::Table { gfn, rights } => {
                let part = if self.is_legacy() { index as u32 & 1 } else { 0 };
                Meaning::Child(Identity { gfn, role: self.below(rights, part, false) })
            }
            Judged::Page { gfn, rights, key, dirty } => {
                let rights = Rights { write: rights.write && dirty, ..rights };
                if level == 1 {
                    let all = self.access();
                    let user = all.user && rights.user;
                    let write = all.write && rights.write;
                    return Meaning::Leaf {
                        gfn,
                        rights: Rights { user, write, execute: all.execute && rights.execute },
                        key,
                    };
                }
                // A large page: a run of frames. One of 4 MiB is two entries of ours.
                let part = if self.is_legacy() { index as u64 & 1 } else { 0 };
                let gfn = Gfn(gfn.0 + part * pages(level));
                let clean = if !dirty && self.ignores_write_protection() { CLEAN } else { 0 };
                Meaning::Child(Identity { gfn, role: self.below(rights, u32::from(key) & KEY | clean, true) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: CpuFeatures = CpuFeatures { physical_bits: 48, gigantic_pages: true };
    const LONG: Controls = Controls { cr0: 1 << 31 | 1 << 16, cr4: 1 << 5, efer: 1 << 10 | 1 << 11 };
    const PAE: Controls = Controls { cr0: 1 << 31 | 1 << 16, cr4: 1 << 5, efer: 1 << 11 };
    const LEGACY: Controls = Controls { cr0: 1 << 31 | 1 << 16, cr4: 1 << 4, efer: 0 };

    fn child(page: Identity, index: usize, judged: Judged) -> Identity {
        match page.role.meaning(page.gfn, index, judged) {
            Meaning::Child(child) => child,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_entries_above_take_away_tells_pages_apart() {
        let root = Identity::root(LONG, 0x1000, CPU);
        let table = |write| Judged::Table { gfn: Gfn(7), rights: Rights { write, ..Rights::ALL } };
        let (all, less) = (child(root, 0, table(true)), child(root, 0, table(false)));
        assert_eq!(all.gfn, less.gfn);
        assert_ne!(all.role, less.role);
        // It is not forgotten further down, whatever entries there allow.
        let leaf = Judged::Page { gfn: Gfn(9), rights: Rights::ALL, key: 0, dirty: true };
        let bottom = child(child(less, 0, table(true)), 0, table(true));
        let Meaning::Leaf { gfn, rights, .. } = bottom.role.meaning(bottom.gfn, 3, leaf) else { panic!() };
        assert_eq!((gfn, rights), (Gfn(9), Rights { write: false, ..Rights::ALL }));
    }

    #[test]
    fn a_large_page_and_a_table_in_the_same_frame_are_two_pages() {
        let root = Identity::root(LONG, 0x1000, CPU);
        let directory = child(child(root, 0, table()), 0, table());
        fn table() -> Judged {
            Judged::Table { gfn: Gfn(512), rights: Rights::ALL }
        }
        let large = Judged::Page { gfn: Gfn(512), rights: Rights::ALL, key: 5, dirty: true };
        let (direct, indirect) = (child(directory, 0, large), child(directory, 0, table()));
        assert_eq!(direct.gfn, indirect.gfn);
        assert_ne!(direct.role, indirect.role);
        let Meaning::Leaf { gfn, key, .. } = direct.role.meaning(direct.gfn, 3, Judged::Nothing) else { panic!() };
        assert_eq!((gfn, key), (Gfn(515), 5));
        // Not dirty yet: not writable, and another page.
        let clean = Judged::Page { gfn: Gfn(512), rights: Rights::ALL, key: 5, dirty: false };
        assert_ne!(child(directory, 0, clean).role, direct.role);
    }

    #[test]
    fn a_page_that_the_supervisor_has_dirtied_over_protection_is_another_once_it_is_clean() {
        let large =
            |write, dirty| Judged::Page { gfn: Gfn(512), rights: Rights { write, ..Rights::ALL }, key: 15, dirty };
        let below = |controls, judged| {
            let root = Identity::root(controls, 0x1000, CPU);
            let table = Judged::Table { gfn: Gfn(512), rights: Rights { write: false, ..Rights::ALL } };
            child(child(child(root, 0, table), 0, table), 0, judged)
        };
        let no_wp = Controls { cr0: 1 << 31, ..LONG };
        for write in [false, true] {
            let (clean, dirty) = (below(no_wp, large(write, false)), below(no_wp, large(write, true)));
            assert_ne!(clean, dirty);
            assert_eq!(clean.role.access(), dirty.role.access());
            for page in [clean, dirty] {
                let Meaning::Leaf { key, .. } = page.role.meaning(page.gfn, 3, Judged::Nothing) else { panic!() };
                assert_eq!(key, 15);
            }
            // With CR0.WP nobody writes there: one page is enough.
            assert_eq!(below(LONG, large(write, false)), below(LONG, large(write, true)));
        }
    }

    #[test]
    fn tables_of_four_byte_entries_are_cut_in_parts() {
        let root = Identity::root(LEGACY, 0x5000, CPU);
        assert_eq!((root.role.level(), root.role.entries(), root.gfn), (3, 4, Gfn(5)));
        // Linear address 0xc0c0_1000: entry 771 of the directory, entry 1 of the table.
        let linear = 0xc0c0_1000;
        let quarter = child(root, root.role.index(linear), Judged::Nothing);
        assert_eq!((quarter.gfn, quarter.role.guest_offset(quarter.role.index(linear))), (Gfn(5), 771 * 4));
        let table = Judged::Table { gfn: Gfn(8), rights: Rights::ALL };
        let half = child(quarter, quarter.role.index(linear), table);
        assert_eq!((half.gfn, half.role.guest_offset(half.role.index(linear))), (Gfn(8), 4));
        let (one, other) = (quarter.role.index(linear), quarter.role.index(linear + 0x20_0000));
        assert_eq!((quarter.role.twin(one), quarter.role.twin(other)), (Some(other), Some(one)));
        assert_eq!((root.role.twin(1), half.role.twin(1)), (None, None));
        let half = child(quarter, other, table);
        assert_eq!(half.role.guest_offset(half.role.index(linear + 0x20_0000)), 513 * 4);
        // A page of 4 MiB is two runs of 2 MiB.
        let large = Judged::Page { gfn: Gfn(1024), rights: Rights::ALL, key: 0, dirty: true };
        assert_eq!(child(quarter, 7, large).gfn, Gfn(1024 + 512));
    }

    #[test]
    fn pae_roots_in_one_frame_differ_and_tables_follow_their_place() {
        let (one, other) = (Identity::root(PAE, 0x1020, CPU), Identity::root(PAE, 0x1fe0, CPU));
        assert_eq!(one.gfn, other.gfn);
        assert_ne!(one.role, other.role);
        assert_eq!((one.role.guest_offset(1), other.role.guest_offset(3)), (0x28, 0xff8));
        assert_eq!(one.role.top(), Top::Pointers);
    }

    #[test]
    fn another_cr3_is_another_root_of_the_same_registers() {
        let none = Controls { cr0: 0, cr4: 0, efer: 0 };
        let five = Controls { cr4: LONG.cr4 | 1 << 12, ..LONG };
        for controls in [LONG, five, PAE, LEGACY, none] {
            for cr3 in [0, 0x1020, 0x1fe0, 0xf_ffff_ffff_ffff, u64::MAX] {
                let one = Identity::root(controls, 0x7_7777_7fe0, CPU);
                assert_eq!(one.with_cr3(&Mode::new(controls, CPU), cr3), Identity::root(controls, cr3, CPU));
            }
        }
    }

    #[test]
    fn registers_count_where_they_matter_and_nowhere_else() {
        let root = |controls| Identity::root(controls, 0x1000, CPU).role;
        let smap = Controls { cr4: LONG.cr4 | 1 << 21, ..LONG };
        assert_eq!(root(LONG), root(smap), "the CPU checks it with exact entries");
        let no_wp = |controls: Controls| Controls { cr0: controls.cr0 & !(1 << 16), ..controls };
        assert_ne!(root(LONG), root(no_wp(LONG)));
        assert_ne!(root(no_wp(LONG)), root(no_wp(smap)));
        assert_eq!(root(LONG), root(Controls { cr4: LONG.cr4 | 1 << 4, ..LONG }), "PSE means nothing in long mode");
        let off = Controls { cr0: 0, cr4: 0, efer: 0 };
        assert_eq!(Identity::root(off, 0x1000, CPU), Identity::root(off, 0x2000, CPU));
    }

    #[test]
    fn a_role_reads_its_own_level_as_the_registers_do_and_nothing_of_others() {
        let raws = [0x1067, 0x20_00e7, 0x4000_00e7, 0x1027, 1 << 63 | 0x1067, 0x1067 | 1 << 51, 0x1067 | 1 << 7, 0x66];
        let judged = |mode: Mode, level| raws.map(|raw| mode.judge(level, raw));
        for controls in [LONG, LEGACY, PAE] {
            let mut role = Identity::root(controls, 0x1000, CPU).role;
            if role.source() == Source::Identity {
                role = role.below(Rights::ALL, 0, false);
            }
            loop {
                let (mode, level) = (role.mode(CPU), role.level());
                assert_eq!(judged(mode, level), judged(Mode::new(controls, CPU), level), "{controls:x?} {level}");
                assert_eq!(judged(mode, level % 3 + 1), [Judged::Nothing; 8]);
                if level == 1 {
                    break;
                }
                role = role.below(Rights::ALL, 0, false);
            }
        }
    }
}
