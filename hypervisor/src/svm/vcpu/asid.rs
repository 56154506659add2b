//! Which ASID each of a vCPU's tags is in the TLB ([`nestling::shadow::tags`]).
//!
//! # Protocol
//! A vCPU has its CPU for itself, and so all of the CPU's ASIDs but 0, which is the host's. To flush a tag is to give it an
//! ASID that has not been used since the CPU's TLB was last flushed as a whole: nothing is in the TLB by that, and what was
//! there by the old one is reached by nobody. Nothing is told the CPU for it, and the entry stays a plain one. When they have
//! run out, or nobody knows what was done with them before, the next entry flushes the whole TLB, and they are given anew from
//! the first on: *all* tags have lost theirs by then, for the numbers will be others'.
//!
//! So a tag has an ASID as long as what the TLB has by it may be used; one that has none gets one when its root is loaded.

use nestling::shadow::tags::Tag;

/// No ASID: the host's.
const NONE: u32 = 0;

/// See the module head.
#[derive(Debug)]
pub(super) struct Asids {
    of: [u32; Tag::COUNT],
    /// The next one that has not been used.
    next: u32,
    /// How many there are, with the host's.
    end: u32,
}

/// An ASID that nothing is in the TLB by, once the entry has done what it must.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Renewed {
    pub(super) asid: u32,
    /// The next entry flushes the whole TLB.
    pub(super) flush_all: bool,
}

impl Asids {
    /// Nobody knows what is in the TLB. `count` is what the CPU says it has (at least 2: 15.5.1 wants one that is not 0).
    pub(super) const fn new(count: u32) -> Self {
        Self { of: [NONE; Tag::COUNT], next: count, end: count }
    }

    /// Forgets everything: what is in the TLB may be anything.
    pub(super) const fn forget(&mut self) {
        *self = Self::new(self.end);
    }

    /// The ASID of a tag, if it has one.
    pub(super) fn get(&self, tag: Tag) -> Option<u32> {
        Some(self.of[tag.number()]).filter(|asid| *asid != NONE)
    }

    /// Another ASID for a tag.
    pub(super) fn renew(&mut self, tag: Tag) -> Renewed {
        let flush_all = self.next >= self.end;
        if flush_all {
            (self.of, self.next) = ([NONE; Tag::COUNT], NONE + 1);
        }
        let asid = self.next;
        (self.of[tag.number()], self.next) = (asid, asid + 1);
        Renewed { asid, flush_all }
    }
}
