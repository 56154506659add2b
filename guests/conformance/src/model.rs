//! What the manuals say comes of a case (AMD APM vol. 2, chapters 5 and 8.4.2; Intel SDM vol. 3, chapter 4).
//!
//! Where they leave a choice it is that of the CPU that the cases are tried on: entries above the one that a walk ends at are
//! marked as accessed, that one is only if the access is allowed; a CPU reads the whole of a descriptor and then writes its
//! second word.

use crate::outcome::{Outcome, Seen};
use crate::space::{Case, Controls, Cpu, Entry, Kind, LEVELS, Paging, Shot, frame_mark, written};
use crate::{DATA, FRESH_DESCRIPTOR, KEY, NO_FAULT};

const PAGE_FAULT: u8 = 14;

const PRESENT: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const USER: u32 = 1 << 2;
const RESERVED: u32 = 1 << 3;
const FETCH: u32 = 1 << 4;
const PROTECTION_KEY: u32 = 1 << 5;

const ACCESSED_BIT: u64 = 1 << 5;
const DIRTY_BIT: u64 = 1 << 6;

/// A descriptor of data that ring 3 may write, marked as used; its spare bits tell the page that it is in.
#[must_use]
pub const fn used_descriptor(mark: u32) -> u64 {
    let spare = (mark as u64 & 1) << 52 | (mark as u64 >> 1 & 1) << 54;
    0x0000_f300_0000_ffff | spare
}

/// The same, not marked.
#[must_use]
pub const fn fresh_descriptor(mark: u32) -> u64 {
    used_descriptor(mark) & !DESCRIPTOR_USED
}

const DESCRIPTOR_USED: u64 = 1 << 40;

/// The word of data in a page.
#[must_use]
pub const fn data(mark: u32) -> u32 {
    0xda7a_0000 | mark
}

/// What the code in a page leaves in EAX.
#[must_use]
pub const fn code_mark(mark: u32) -> u32 {
    0xc0de_0000 | mark
}

/// An access as the tables see it.
#[derive(Clone, Copy)]
struct Part {
    write: bool,
    fetch: bool,
    user: bool,
    /// The CPU's own: AC does not open user pages for it.
    implicit: bool,
}

/// The state that a case's two shots share.
struct State<'a> {
    case: &'a Case,
    cpu: Cpu,
    entries: [Entry; LEVELS],
    changed: [u64; LEVELS],
    frames: [u64; 2],
    memory: [[u64; 2]; 2],
}

/// What comes of a case.
#[must_use]
pub fn expect(case: &Case, cpu: Cpu) -> Outcome {
    let frames = [case.frame(0, cpu), case.frame(1, cpu)];
    let memory = frames.map(|frame| {
        let mark = frame_mark(frame);
        [fresh_descriptor(mark), data(mark).into()]
    });
    let mut state = State { case, cpu, entries: case.entries, changed: [0; LEVELS], frames, memory };
    Outcome([0, 1].map(|number| state.shot(number)))
}

impl State<'_> {
    fn shot(&mut self, number: usize) -> Seen {
        let shot = self.case.shots[number];
        if let Some(change) = shot.change {
            let at = usize::from(change.level) - 1;
            (self.entries[at], self.changed[at]) = (change.entry, 0);
        }
        let mut seen = Seen::default();
        if let Err((error, offset)) = self.access(number, &shot, &mut seen) {
            let linear = shot.linear(self.case.paging) + offset;
            (seen.vector, seen.error, seen.cr2) = (PAGE_FAULT, error, linear);
        }
        (seen.changed, seen.memory) = (self.changed, self.memory);
        seen
    }

    /// The access: nothing, or a page fault's error code and where from the access's beginning it came up.
    fn access(&mut self, number: usize, shot: &Shot, seen: &mut Seen) -> Result<(), (u32, u64)> {
        let user = shot.access.user;
        let own = Part { write: false, fetch: false, user, implicit: false };
        let system = Part { user: false, implicit: true, ..own };
        let first = match shot.access.kind {
            Kind::Read => own,
            Kind::Write | Kind::Update => Part { write: true, ..own },
            Kind::Fetch => Part { fetch: true, ..own },
            Kind::ReadDescriptor | Kind::MarkDescriptor => system,
        };
        self.walk(shot, first).map_err(|error| (error, 0))?;
        seen.vector = NO_FAULT;
        let frame = self.frames[number];
        let mark = frame_mark(frame);
        let [mut descriptor, mut word] = self.memory[number];
        match shot.access.kind {
            Kind::Read => seen.value = word as u32,
            Kind::Write => word = word & !0xffff_ffff | u64::from(written(number)),
            Kind::Update => {
                seen.value = word as u32;
                word = word & !0xffff_ffff | u64::from((word as u32).wrapping_add(written(number)));
            }
            Kind::Fetch => seen.value = code_mark(mark),
            Kind::ReadDescriptor => seen.value = (used_descriptor(mark) >> 32) as u32 & 0x00ff_ff00,
            Kind::MarkDescriptor => {
                if descriptor & DESCRIPTOR_USED == 0 {
                    self.walk(shot, Part { write: true, ..system }).map_err(|error| (error, 4))?;
                    descriptor |= DESCRIPTOR_USED;
                }
            }
        }
        for (known, memory) in self.frames.iter().zip(&mut self.memory) {
            if *known == frame {
                *memory = [descriptor, word];
            }
        }
        Ok(())
    }

    fn walk(&mut self, shot: &Shot, part: Part) -> Result<(), u32> {
        let paging = self.case.paging;
        let on = |bit| shot.controls.contains(bit);
        let no_execute = on(Controls::NXE) && paging != Paging::Legacy;
        let mut base = if part.write { WRITE } else { 0 };
        base |= if part.user { USER } else { 0 };
        base |= if part.fetch && (no_execute || on(Controls::SMEP)) { FETCH } else { 0 };
        let mut rights = Entry::OPEN;
        let mut never_executed = false;
        for level in (1..=paging.levels()).rev() {
            let at = usize::from(level) - 1;
            let entry = self.entries[at];
            if !entry.contains(Entry::PRESENT) {
                return Err(base);
            }
            if self.is_reserved(level, entry, shot.controls) {
                return Err(base | PRESENT | RESERVED);
            }
            if !paging.is_pointer(level) {
                rights &= entry;
                never_executed |= entry.contains(Entry::NO_EXECUTE) && no_execute;
            }
            if !self.case.is_leaf(level, entry, self.cpu, shot.controls) {
                if !paging.is_pointer(level) {
                    self.mark(at, false);
                }
                continue;
            }
            let keys = on(Controls::PKE) && paging.is_long();
            let key = if entry.contains(Entry::KEY) { KEY } else { 0 };
            let forbidden = shot.pkru() >> (2 * key) & 3;
            let writable_for_it = rights.contains(Entry::WRITABLE) || !part.user && !on(Controls::WP);
            if keys && rights.contains(Entry::USER) && !part.fetch {
                let writes_count = part.user || on(Controls::WP);
                if forbidden & 1 != 0 || forbidden & 2 != 0 && part.write && writes_count {
                    return Err(base | PRESENT | PROTECTION_KEY);
                }
            }
            let of_user = rights.contains(Entry::USER);
            let opened = shot.access.ac && !part.implicit;
            let allowed = match (part.user, part.fetch) {
                (true, _) if !of_user => false,
                (_, true) => !(never_executed || !part.user && of_user && on(Controls::SMEP)),
                (true, false) => !part.write || writable_for_it,
                (false, false) => (!part.write || writable_for_it) && !(of_user && on(Controls::SMAP) && !opened),
            };
            if !allowed {
                return Err(base | PRESENT);
            }
            self.mark(at, part.write);
            return Ok(());
        }
        Ok(())
    }

    fn is_reserved(&self, level: u8, entry: Entry, controls: Controls) -> bool {
        let paging = self.case.paging;
        let may_be_large = self.case.may_be_large(level, self.cpu, controls);
        let large = may_be_large && entry.contains(Entry::LARGE);
        if large && entry.contains(Entry::LOW) {
            return true;
        }
        if paging == Paging::Legacy {
            return false;
        }
        let no_execute = entry.contains(Entry::NO_EXECUTE) && !controls.contains(Controls::NXE);
        let large_is_reserved = level > 1 && !may_be_large && entry.contains(Entry::LARGE);
        let key_is_reserved = paging == Paging::Pae && entry.contains(Entry::KEY);
        entry.contains(Entry::HIGH) || no_execute || large_is_reserved || key_is_reserved
    }

    fn mark(&mut self, at: usize, dirty: bool) {
        let entry = &mut self.entries[at];
        if !entry.contains(Entry::ACCESSED) {
            *entry |= Entry::ACCESSED;
            self.changed[at] |= ACCESSED_BIT;
        }
        if dirty && !entry.contains(Entry::DIRTY) {
            *entry |= Entry::DIRTY;
            self.changed[at] |= DIRTY_BIT;
        }
    }
}

// The descriptors and the word lie where a shot looks for them.
const _: () = assert!(FRESH_DESCRIPTOR + 8 == DATA);
