//! Tags: each root that a vCPU has at hand has a name of its own in the TLB, so that going from one to another need not
//! flush.
//!
//! # Who owns one
//! A vCPU has [`Tag::COUNT`] tags, one for each root that it can have at hand: the present one and its previous ones. A root
//! has the same tag from when it is loaded until the vCPU gives it up; then the tag is free, and *owes a flush before it is
//! used again*. A tag is used with its root and no other, on the CPU that the vCPU runs on, so nothing is in the TLB by a
//! tag but what was found below its root. Two vCPUs' tags have nothing to do with each other. What a tag is to the CPU is
//! the embedder's business: an ASID, a PCID, or all the same; one that has fewer of them than there are tags flushes when
//! the tag changes.
//!
//! What is owed is kept with the tag, and told when it is about to be used ([`super::vcpu::InShadow::take_flush`]): a tag that
//! is not used owes nothing to anybody. "All tags are flushed" means that each is before it is used next.
//!
//! # Removals by others
//! [`crate::tlb`] has one generation a VM; each tag notes the one that it last flushed for. At entry the tag of the root is
//! compared, and flushed if it is behind. What the vCPU says to others (`flushed` there) is then true of every tag: the one
//! that it runs with is up to date, and none of the others can be used before it is. So a flusher that has seen this vCPU
//! outside guest mode, or up to its generation, may free and reuse what it removed.
//!
//! # What the guest asks to forget
//! | the guest | the tag of the present root | the other tags |
//! |---|---|---|
//! | CR3 load, the same value or another; CR4 write; INVPCID of more than one address | flushed if anything was withdrawn since its last flush | nothing |
//! | CR3 load that keeps translations (PCID), another value | the same | nothing |
//! | CR3 load that keeps them, the same value | nothing | nothing |
//! | INVLPG, INVPCID of an address of the present PCID | the address, or all | nothing |
//!
//! *Why the present tag may stay as it is.* Pages that the root reaches were compared with the guest's tables just before,
//! and nothing was withdrawn since the tag's last flush ([`super::withdrawn`]): what the TLB has by this tag is what it would
//! get by walking now. The guest can not tell that from a flush.
//!
//! *Why the other tags owe nothing.* Whatever is asked to be forgotten, globally or for a PCID, was asked because the guest
//! has changed its tables; and no other root is turned to without the same question being asked of its tag then: of all that
//! was withdrawn since *its* last flush. That goes for loads that would keep translations, too. So PCIDs and global pages make
//! no difference here: no PCID's translations and no global ones outlive their entries in a tag, once it is loaded.
//!
//! # One address
//! INVLPG forgets every translation that a CPU may have for the page that holds the address. Where that is a page of 4 KiB,
//! the address goes. The guest's page may be larger, while our leaves below it are many, of which the TLB has some: the
//! guest may rely on all of them going, by INVLPG of any address in it. But all leaves of a larger page of the guest's are
//! below one entry of ours above level 1 (two for a page of 4 MiB, which are looked at together), which was removed when the
//! guest's entry became another one, or was found to have: by this INVLPG's own look or by an earlier one. So where nothing above level 1 has been withdrawn since the tag's last flush, each
//! larger page is what it was, and translations of it that stay are right; where something has, the tag is flushed. The same
//! holds of what a CPU caches of upper entries: those that stay are right.
//!
//! The address goes in any case, whatever was compared: another vCPU may have removed its leaf.

use super::withdrawn::Withdrawn;
use crate::mutants::{self, Mutant};

/// Names one of a vCPU's roots in its CPU's TLB. See the module head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag(u8);

/// Previous roots that a vCPU keeps at hand (KVM_MMU_NUM_PREV_ROOTS).
pub(super) const PREVIOUS: usize = 3;

impl Tag {
    /// Tags that a vCPU has: a power of two.
    pub const COUNT: usize = PREVIOUS + 1;

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u8).map(Self)
    }

    /// Its number, below [`Tag::COUNT`].
    #[inline]
    pub const fn number(self) -> usize {
        // Which the compiler is not to doubt at each use.
        self.0 as usize & (Self::COUNT - 1)
    }
}

const _: () = assert!(Tag::COUNT.is_power_of_two());

/// What the TLB must forget of what it has by the present tag, global translations too. More is always right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TagFlush {
    /// The translation of this linear address, as INVLPGA does.
    Address(u64),
    /// All of it.
    All,
}

#[derive(Clone, Copy, Debug)]
struct Book {
    /// The TLB generation that it last flushed for.
    generation: u64,
    /// What had been withdrawn when it last flushed.
    withdrawn: Withdrawn,
    owed: Option<TagFlush>,
}

impl Book {
    fn owe_all(&mut self, now: Withdrawn) {
        self.owed = Some(TagFlush::All);
        self.withdrawn = now;
    }
}

/// A vCPU's tags.
#[derive(Debug)]
pub(super) struct Tags([Book; Tag::COUNT]);

impl Tags {
    /// None has been used: this vCPU's number may have been another's, and the CPU another VM's.
    pub(super) fn new(now: Withdrawn) -> Self {
        Self([Book { generation: 0, withdrawn: now, owed: Some(TagFlush::All) }; Tag::COUNT])
    }

    #[inline]
    fn book(&mut self, tag: Tag) -> &mut Book {
        &mut self.0[tag.number()]
    }

    /// A tag for a root that is loaded: one that none of the roots at hand has.
    pub(super) fn give(&mut self, taken: impl Iterator<Item = Tag> + Clone, now: Withdrawn) -> Tag {
        let free = |tag: &Tag| !taken.clone().any(|other| other == *tag);
        let tag = Tag::all().find(free).expect("there is a tag for each root at hand");
        self.book(tag).owe_all(now);
        tag
    }

    /// The TLB generation of the tag's last flush, to be compared and renewed at entry.
    #[inline]
    pub(super) fn generation(&mut self, tag: Tag) -> &mut u64 {
        // As if it were the vCPU's.
        let tag = if mutants::is(Mutant::ShadowTagKeptBehind) { Tag(0) } else { tag };
        &mut self.book(tag).generation
    }

    /// The same, to be compared alone.
    #[inline]
    pub(super) fn flushed(&self, tag: Tag) -> u64 {
        self.0[tag.number()].generation
    }

    /// It was behind: all of it goes.
    pub(super) fn flush(&mut self, tag: Tag, now: Withdrawn) {
        self.book(tag).owe_all(now);
    }

    /// Each of them is flushed before it is used next.
    pub(super) fn flush_all(&mut self, now: Withdrawn) {
        self.0.iter_mut().for_each(|book| book.owe_all(now));
    }

    /// The guest has asked to forget everything, and what the tag's root reaches has been compared.
    #[inline]
    pub(super) fn forget(&mut self, tag: Tag, now: Withdrawn) {
        let book = self.book(tag);
        if now.is_more_than(book.withdrawn) {
            book.owe_all(now);
        }
    }

    /// Whether the guest may ask to forget everything, and the tag owes nothing for that.
    #[inline]
    pub(super) fn is_even(&self, tag: Tag, now: Withdrawn) -> bool {
        let book = &self.0[tag.number()];
        book.owed.is_none() && !now.is_more_than(book.withdrawn)
    }

    /// Whether it owes anything.
    #[inline]
    pub(super) fn owes(&self, tag: Tag) -> bool {
        self.0[tag.number()].owed.is_some()
    }

    /// The guest has asked to forget an address, and what leads to it has been compared.
    #[inline]
    pub(super) fn forget_address(&mut self, tag: Tag, linear: u64, now: Withdrawn) {
        let book = self.book(tag);
        match book.owed {
            None if !now.has_more_links_than(book.withdrawn) => book.owed = Some(TagFlush::Address(linear)),
            // Two addresses before one entry are rare.
            _ => book.owe_all(now),
        }
    }

    /// What the tag owes, taken over by whoever pays.
    #[inline]
    pub(super) fn take(&mut self, tag: Tag) -> Option<TagFlush> {
        self.book(tag).owed.take()
    }
}
