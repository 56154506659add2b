//! What a CPU may know of the guest's tables.
//!
//! A CPU that has flushed at tick *t* may since have walked from the top down at any time: it has read each entry at
//! some time after *t*, and each not before the one above. Everything that such a walk leads to it may still use. A
//! translation that no such walk leads to is wrong: it is made of something that the guest had changed before it
//! flushed, or put an old lower entry under an upper one that is newer.
//!
//! INVLPG forgets the page that holds an address, of whatever size it is. So what a larger page says is to have been read
//! after the last INVLPG of any address in it, while a page of 4 KiB in the same place may be older than that.
//!
//! The rules are written down here a second time, on purpose, and not shared with the library.

use nestling::guest::{Controls, Privilege, Width};
use nestling::{Access, Hfn};

use super::machine::Record;

/// What the control registers of a CPU say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    /// The registers.
    pub controls: Controls,
    /// CR3.
    pub cr3: u64,
}

/// An access, as the oracle is asked about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// Where.
    pub linear: u64,
    /// What.
    pub access: Access,
    /// For whom.
    pub privilege: Privilege,
}

#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    write: bool,
    execute: bool,
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

impl Paging {
    fn bit(self, register: u64, bit: u32) -> bool {
        register >> bit & 1 != 0
    }

    /// Whether paging is on at all.
    pub fn is_on(self) -> bool {
        self.bit(self.controls.cr0, 31)
    }

    fn is_long(self) -> bool {
        self.bit(self.controls.efer, 10)
    }

    fn is_pae(self) -> bool {
        self.bit(self.controls.cr4, 5)
    }

    fn write_protects(self) -> bool {
        self.bit(self.controls.cr0, 16)
    }

    fn smep(self) -> bool {
        self.bit(self.controls.cr4, 20)
    }

    fn smap(self) -> bool {
        self.bit(self.controls.cr4, 21)
    }

    /// Levels, bits of an index, width of an entry.
    pub fn shape(self) -> (u32, u32, Width) {
        match (self.is_long(), self.is_pae()) {
            (true, _) if self.bit(self.controls.cr4, 12) => (5, 9, Width::Eight),
            (true, _) => (4, 9, Width::Eight),
            (_, true) => (3, 9, Width::Eight),
            _ => (2, 10, Width::Four),
        }
    }

    fn allows(self, rights: Rights, question: Question) -> bool {
        let write = rights.write || !self.write_protects();
        match (question.privilege, question.access) {
            (Privilege::User, Access::Read) => rights.user,
            (Privilege::User, Access::Write) => rights.user && rights.write,
            (Privilege::User, Access::Execute) => rights.user && rights.execute,
            (_, Access::Execute) => rights.execute && !(rights.user && self.smep()),
            (privilege, access) => {
                let open = privilege == Privilege::Supervisor { ac: true };
                (access == Access::Read || write) && (!rights.user || !self.smap() || open)
            }
        }
    }

    /// log2 of what an entry of this level maps.
    pub fn page_shift(self, level: u32) -> u32 {
        let (_, bits, _) = self.shape();
        12 + bits * (level - 1)
    }

    /// Whether a CPU may reach `hfn` by this access that has forgotten pages of each level, in this place, at the tick that
    /// `since` says.
    pub fn may(self, record: &Record, since: impl Fn(u32) -> u64, question: Question, hfn: Hfn) -> bool {
        let Some(wanted) = record.owner(hfn) else { return false };
        (1..=3).any(|level| self.any(record, since(level), question, false, Some(level), |gfn| gfn == wanted))
    }

    /// Whether a CPU that begins a walk now finds something.
    pub fn succeeds_now(self, record: &mut Record, question: Question) -> bool {
        let from = record.tick();
        self.any(record, from, question, true, None, |_| true)
    }

    /// What a CPU that flushed at `from` may have read on its way, for a report: the values of the first entry of each
    /// table that it may have met.
    pub fn describe(self, record: &Record, from: u64, linear: u64) -> String {
        let (levels, bits, width) = self.shape();
        let size = if width == Width::Four { 4 } else { 8 };
        let mut text = String::new();
        let mut tables = vec![self.cr3 >> 12];
        for level in (1..=levels).rev() {
            let index = linear >> (12 + bits * (level - 1)) & ((1 << bits) - 1);
            let mut next = Vec::new();
            for table in tables {
                let values: Vec<_> =
                    record.values(table, (index * size) as u32, from).map(|(value, _)| value).collect();
                text += &format!("\n  level {level}, table {table:#x}, entry {index}: {values:x?}");
                next.extend(values.iter().map(|value| (value.value & 0xf_ffff_ffff_f000) >> 12));
            }
            next.sort_unstable();
            next.dedup();
            tables = next;
        }
        text
    }

    /// Whether a walk of entries that were read at `from` or later finds what is wanted, in a page of that size.
    fn any(
        self,
        record: &Record,
        from: u64,
        question: Question,
        marks: bool,
        size: Option<u32>,
        is: impl Fn(u64) -> bool,
    ) -> bool {
        if !self.is_on() {
            return is((question.linear & 0xffff_ffff) >> 12);
        }
        let (levels, ..) = self.shape();
        let top = if levels == 3 { self.cr3 & 0xffff_ffe0 } else { self.cr3 & 0xf_ffff_ffff_f000 };
        let all = Rights { user: true, write: true, execute: true };
        Walk { paging: self, record, question, is: &is, marks, size }.below(levels, top, from, all)
    }
}

struct Walk<'a> {
    paging: Paging,
    record: &'a Record,
    question: Question,
    is: &'a dyn Fn(u64) -> bool,
    /// A walk that sets the marks it needs, and not one that was made of entries that have them.
    marks: bool,
    /// The level of the entry at its end, if it is to be a certain one.
    size: Option<u32>,
}

impl Walk<'_> {
    fn below(&self, level: u32, table: u64, from: u64, above: Rights) -> bool {
        let (_, bits, width) = self.paging.shape();
        let size = if width == Width::Four { 4 } else { 8 };
        let shift = 12 + bits * (level - 1);
        let at = table + (self.question.linear >> shift & ((1 << bits) - 1)) * size;
        let pointer = level == 3 && !self.paging.is_long();
        // (In the top table of PAE, two bits of the address count; the others of these nine are not there.)
        let at = if pointer { table + (self.question.linear >> 30 & 3) * 8 } else { at };
        self.record.values(at >> 12, (at & 0xfff) as u32, from).any(|(value, _)| {
            let entry = value.value;
            if entry & P == 0 {
                return false;
            }
            // The earliest moment at which it could be read: later ones allow less below.
            let read = value.since.max(from);
            let mut rights = above;
            if !pointer {
                rights.user &= entry & U != 0;
                rights.write &= entry & W != 0;
                rights.execute &= width == Width::Four || entry & NX == 0;
            }
            let large = match (width, level) {
                (_, 1) => true,
                (Width::Four, 2) => entry & PS != 0 && self.paging.bit(self.paging.controls.cr4, 4),
                (Width::Eight, 2) => entry & PS != 0,
                (Width::Eight, 3) if !pointer => entry & PS != 0,
                _ => false,
            };
            if self.is_reserved(level, entry, large) {
                return false;
            }
            let frame = if width == Width::Four { entry & 0xffff_f000 } else { entry & 0xf_ffff_ffff_f000 };
            if !large {
                return (pointer || self.marks || entry & A != 0) && self.below(level - 1, frame, read, rights);
            }
            if self.size.is_some_and(|size| size != level) {
                return false;
            }
            let marked = entry & A != 0 && (self.question.access != Access::Write || entry & D != 0);
            let offset = self.question.linear & ((1 << shift) - 1);
            let gfn = ((frame & !((1 << shift) - 1)) | offset) >> 12;
            (marked || self.marks) && self.paging.allows(rights, self.question) && (self.is)(gfn)
        })
    }

    /// Whether a bit is set that must not be; of those that the programs here ever set.
    fn is_reserved(&self, level: u32, entry: u64, large: bool) -> bool {
        let (long, pointer) = (self.paging.is_long(), level == 3 && !self.paging.is_long());
        if !long && !self.paging.is_pae() {
            return large && level == 2 && entry & 1 << 21 != 0;
        }
        if pointer {
            // The low bits count when CR3 is loaded, and these guests do not go by that.
            return entry & NX != 0;
        }
        // Below the size of a large page only the bits of a small entry and PAT mean something.
        large && level > 1 && entry & ((1 << (12 + 9 * (level - 1))) - (1 << 13)) != 0 || level > 3 && entry & PS != 0
    }
}
