//! What the leaves of one page should be: [`Role::meaning`] for level 1, with everything that is the same for all
//! entries of a table worked out once.
//!
//! A fault looks at eight entries, and bringing a table in step at 512: here an entry is judged by masks, in the bits of
//! the leaf that it makes. That is right because the guest's entries of 8 bytes and our leaves have P, W, U, A, D, the
//! protection key and NX in the same places. A property test holds it against [`Role::meaning`], which stays the one
//! place that says what is meant.

use super::page::Page;
use super::role::{Meaning, Role, Source};
use super::table::Inside;
use crate::addr::{Gfn, Hfn};
use crate::format::long_mode::{self, KEY, NO_EXECUTE, PRESENT_AND_ACCESSED, USER, WRITE};
use crate::guest::{Judged, Mode, Width};
use crate::host::{GuestMemory, Host};

/// log2 of the distance of a guest's dirty bit from its writable bit.
const DIRTY_TO_WRITE: u32 = 5;

/// What a leaf should be: the frame, and the bits that the guest decides ([`long_mode::rights`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    pub(super) gfn: Gfn,
    pub(super) bits: u64,
}

/// How a table of the guest's is read that has only leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// Size of an entry, and where the first one is in the guest's table.
    pub(super) width: Width,
    base: u32,
    /// Bits of the address.
    frame: u64,
    /// Bits that must be as in [`PRESENT_AND_ACCESSED`], and those that must be 0.
    fixed: u64,
    /// Bits that are taken over.
    kept: u64,
    /// NX, if it is set in any case.
    closed: u64,
    /// W, if entries above allow it.
    write: u64,
}

/// A quicker look than [`Reading::gives`] for entries that are as they were, which most are.
///
/// It leaves out what entries above forbid: a leaf was never made against that, but by the supervisor that writes over
/// protection without CR0.WP. Such a leaf may stay if the entry itself is writable and dirty: to take it would be to make
/// it again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Glance {
    /// Bits that a leaf has from its entry.
    same: u64,
    /// These, and what else tells of an entry.
    all: u64,
    /// Of those that tell, the ones that must be set.
    set: u64,
}

impl Glance {
    /// How `raw` differs from what gives exactly what the leaf `there`, made for frame `target`, does: for
    /// [`Glance::is_change`], which may be asked of several differences at once.
    #[inline]
    pub(super) fn difference(self, raw: u64, there: u64, target: u32) -> u64 {
        raw ^ u64::from(target) << 12 ^ there & self.same ^ self.set
    }

    /// Whether any of the differences that `difference` was put together of counts. `true` says nothing: a leaf may give less
    /// than its entry.
    #[inline]
    pub(super) fn is_change(self, difference: u64) -> bool {
        difference & self.all != 0
    }
}

/// What the leaves of one page are made of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Leaves {
    /// Of the guest's table.
    Guest(Reading),
    /// Frames from here on, all with the same bits.
    Run(Leaf),
}

impl Reading {
    fn new(role: Role, width: Width, mode: &Mode) -> Self {
        let (frame, reserved) = mode.bits_of_leaves();
        let all = role.access();
        let (key, wide) = (if mode.has_keys() { KEY } else { 0 }, width == Width::Eight);
        Self {
            width,
            base: role.guest_offset(0),
            frame,
            fixed: PRESENT_AND_ACCESSED | reserved,
            kept: key | if all.user { USER } else { 0 } | if wide { NO_EXECUTE } else { 0 },
            closed: if all.execute { 0 } else { NO_EXECUTE },
            write: if all.write { WRITE } else { 0 },
        }
    }

    /// What the guest's entry `raw` makes; `None` if nothing.
    #[inline]
    pub(super) fn leaf(&self, raw: u64) -> Option<Leaf> {
        if (raw ^ PRESENT_AND_ACCESSED) & self.fixed != 0 {
            return None;
        }
        let bits = raw & self.kept | self.closed | raw & raw >> DIRTY_TO_WRITE & self.write;
        Some(Leaf { gfn: Gfn((raw & self.frame) >> 12), bits })
    }

    /// The guest's entry behind entry `entry`, of the table in `guest`.
    #[inline]
    pub(super) fn load<H: Host + GuestMemory>(&self, inside: Inside<'_, H>, guest: Hfn, entry: usize) -> u64 {
        self.load_as(inside, guest, entry, self.width)
    }

    /// The same, where the caller knows the width.
    #[inline]
    pub(super) fn load_as<H: Host + GuestMemory>(
        &self,
        inside: Inside<'_, H>,
        guest: Hfn,
        entry: usize,
        width: Width,
    ) -> u64 {
        let size = if width == Width::Eight { 8 } else { 4 };
        inside.mmu.host.load(guest, self.base + entry as u32 * size, width)
    }

    /// What tells at a glance that an entry has not changed.
    pub(super) fn glance(&self) -> Glance {
        let same = self.kept & !self.closed | WRITE | WRITE << DIRTY_TO_WRITE;
        let all = same | self.fixed | self.frame;
        Glance { same, all, set: PRESENT_AND_ACCESSED & all }
    }

    /// Whether `raw` gives all that the leaf `there`, made for frame `target`, does.
    ///
    /// Not only rights that are too many: a supervisor page that has become a user page is closed to the supervisor by
    /// SMEP and SMAP.
    #[inline]
    pub(super) fn gives(&self, raw: u64, there: u64, target: u32) -> bool {
        self.leaf(raw).is_some_and(|Leaf { gfn, bits }| {
            let taken = there & !bits & WRITE | !there & bits & NO_EXECUTE;
            gfn.0 == u64::from(target) && (bits ^ there) & (USER | KEY) | taken == 0
        })
    }
}

impl Leaves {
    /// Those of `page`, which is of level 1.
    pub(super) fn of(page: &Page, mode: &Mode) -> Self {
        let (gfn, role) = (page.gfn(), page.role());
        match role.source() {
            Source::Guest(width) => Self::Guest(Reading::new(role, width, mode)),
            Source::Identity => Self::Run(match role.meaning(gfn, 0, Judged::Nothing) {
                Meaning::Leaf { gfn, rights, key } => Leaf { gfn, bits: long_mode::rights(rights, key) },
                // Level 1 has nothing else.
                _ => Leaf { gfn, bits: NO_EXECUTE },
            }),
        }
    }

    /// What entry `entry` of `page` should be now. Under the page's lock.
    #[inline]
    pub(super) fn leaf<H: Host + GuestMemory>(&self, inside: Inside<'_, H>, page: &Page, entry: usize) -> Option<Leaf> {
        match self {
            Self::Guest(reading) => reading.leaf(reading.load(inside, page.guest(), entry)),
            Self::Run(first) => Some(Leaf { gfn: Gfn(first.gfn.0 + entry as u64), ..*first }),
        }
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;
    use crate::format::MemoryType::WriteBack as WB;
    use crate::guest::{Controls, CpuFeatures, Rights};
    use crate::shadow::role::Identity;
    use proptest::prelude::*;

    const CPU: CpuFeatures = CpuFeatures { physical_bits: 40, gigantic_pages: true };

    /// A role of level 1 under random registers, below entries of random rights.
    fn below(controls: Controls, rights: u8) -> Role {
        let root = Identity::root(controls, 0x1000, CPU);
        let (mut gfn, mut role) = (root.gfn, root.role);
        let bit = |bit: u8| rights >> bit & 1 != 0;
        let rights = Rights { user: bit(0), write: bit(1), execute: bit(2) };
        while role.level() > 1 {
            let Meaning::Child(child) = role.meaning(gfn, 0, Judged::Table { gfn: Gfn(7), rights }) else { panic!() };
            (gfn, role) = (child.gfn, child.role);
        }
        role
    }

    proptest! {
        #[test]
        fn entries_are_judged_as_meaning_has_it(
            long in any::<bool>(), pae in any::<bool>(), nxe in any::<bool>(), pke in any::<bool>(), wp in any::<bool>(),
            rights in 0u8..8, raw in any::<u64>(), plain in any::<bool>(),
        ) {
            let bit = |set: bool, at: u32| u64::from(set) << at;
            let controls = Controls {
                cr0: 1 << 31 | bit(wp, 16),
                cr4: bit(pae || long, 5) | bit(pke, 22),
                efer: bit(long, 10) | bit(nxe, 11),
            };
            let role = below(controls, rights);
            let mode = role.mode(CPU);
            let Source::Guest(width) = role.source() else { panic!() };
            // Most entries are good ones.
            let raw = if plain { raw & 0x8000_00ff_ffff_ffff | 0x21 } else { raw };
            let raw = if width == Width::Four { raw & 0xffff_ffff } else { raw };
            let reading = Reading::new(role, width, &mode);
            let expected = match role.meaning(Gfn(7), 3, mode.judge(1, raw)) {
                Meaning::Leaf { gfn, rights, key } => Some(Leaf { gfn, bits: long_mode::rights(rights, key) }),
                _ => None,
            };
            prop_assert_eq!(reading.leaf(raw), expected);
        }

        /// Against what was asked of a leaf in words.
        #[test]
        fn a_leaf_stays_if_it_gives_no_more(
            rights in 0u8..8, raw in any::<u64>(), same in any::<bool>(),
            user in any::<bool>(), write in any::<bool>(), execute in any::<bool>(), key in 0u8..3,
        ) {
            let controls = Controls { cr0: 1 << 31, cr4: 1 << 5 | 1 << 22, efer: 1 << 10 | 1 << 11 };
            let role = below(controls, rights);
            let reading = Reading::new(role, Width::Eight, &role.mode(CPU));
            let raw = raw & !(0xf << 59) & 0xf800_00ff_ffff_ffff | 0x21 | u64::from(key & 1) << 59;
            let gfn = (raw & 0xf_ffff_ffff_f000) >> 12;
            let target = if same { gfn as u32 } else { 9 };
            let there = long_mode::leaf(long_mode::rights(Rights { user, write, execute }, key), Hfn(5), true, WB);
            let expected = match role.meaning(Gfn(7), 3, role.mode(CPU).judge(1, raw)) {
                Meaning::Leaf { gfn, rights, key: now } => {
                    gfn == Gfn(u64::from(target)) && now == key && rights.user == user
                        && (rights.write || !write) && (rights.execute || !execute)
                }
                _ => false,
            };
            prop_assert_eq!(reading.gives(raw, there, target), expected);
            let glance = reading.glance();
            let unchanged = !glance.is_change(glance.difference(raw, there, target));
            let above = role.access();
            let possible = (above.user || !user) && (above.write || !write) && (above.execute || !execute);
            prop_assert!(expected || !unchanged || !possible, "a glance is no look");
            // Of what was just made of an entry it sees that, unless it became dirty and may not be written.
            if let Some(leaf) = reading.leaf(raw) {
                let made = long_mode::leaf(leaf.bits, Hfn(5), true, WB);
                let plain = leaf.bits & WRITE != 0 || raw & (WRITE | WRITE << DIRTY_TO_WRITE) == 0;
                prop_assert!(!plain || !glance.is_change(glance.difference(raw, made, leaf.gfn.0 as u32)));
            }
        }
    }
}
