//! What is kept of an instruction for the next one: a driver's loop meets the same instruction at the same device again and
//! again.
//!
//! Nothing of it is believed without a look at all that it was made of:
//!
//! - An instruction is a function of its bytes, its address and the code's size. The bytes are fetched each time, under the
//!   guest's rights, and compared.
//! - A walk is a function of mode, CR3, request, and of the entries that it reads. They are read each time, in the walk's
//!   order and each in one piece, and compared. A walk that succeeded has left its accessed and dirty bits in them, so the
//!   same entries have nothing to be marked; one that could not leave them is not kept.
//! - A mode is a function of three registers and the CPU.
//!
//! So a change by another vCPU, of code or tables, is met or just missed as by a walk, and nobody has to be told of one.
//! What belongs to one vCPU stays with it.

use iced_x86::Instruction;
use nestling::Access;
use nestling::Gpa;
use nestling::guest::{Controls, CpuFeatures, Mode, Privilege, Request, Step, Translation};

use super::CodeSize;
use super::execute::Plain;

/// Deepest table.
const LEVELS: usize = 5;
/// How many instructions are kept.
const PLACES: usize = 4;
/// How many walks are kept of code, and how many of data: an instruction has one or two of each.
const WALKS: usize = 4;
const PAGE_SHIFT: u32 = 12;
/// The bit of a walk's rights that neither a read nor a write has.
const EXECUTES: u64 = 1 << 1;

/// What a walk was asked for, but for the place in the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    page: u64,
    cr3: u64,
    rights: u64,
}

impl Asked {
    #[inline]
    pub(super) fn new(cr3: u64, request: &Request) -> Self {
        let access = match request.access {
            Access::Read => 0,
            Access::Write => 1,
            Access::Execute => EXECUTES,
        };
        let privilege = match request.privilege {
            Privilege::User => 0,
            Privilege::Supervisor { ac: false } => 1 << 2,
            Privilege::Supervisor { ac: true } => 2 << 2,
            Privilege::Implicit => 3 << 2,
        };
        Self { page: request.linear >> PAGE_SHIFT, cr3, rights: u64::from(request.pkru) << 32 | access | privilege }
    }

    pub(super) fn cr3(&self) -> u64 {
        self.cr3
    }

    /// Code and data are apart: where an instruction is must not decide whether its operand's walk is kept.
    fn place(&self) -> usize {
        let first = (self.rights & EXECUTES) as usize * (WALKS / EXECUTES as usize);
        first + (self.page ^ (self.rights & 1)) as usize % WALKS
    }
}

/// A walk that succeeded.
#[derive(Clone, Copy, Debug)]
struct Walk {
    asked: Asked,
    /// Where it led: a page.
    page: u64,
    /// How many entries; 0: nothing is kept here.
    entries: usize,
    steps: [Step; LEVELS],
}

/// An instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decoded {
    bytes: u128,
    rip: u64,
    size: CodeSize,
    /// All of it.
    pub(super) instruction: Instruction,
    /// What it comes to, if it is of the usual kind.
    pub(super) plain: Option<Plain>,
}

impl Decoded {
    pub(super) fn new(bytes: u128, rip: u64, size: CodeSize, instruction: Instruction) -> Self {
        Self { bytes, rip, size, instruction, plain: Plain::of(&instruction, size) }
    }
}

/// See the module head.
#[derive(Debug)]
pub struct Kept {
    controls: Controls,
    features: CpuFeatures,
    mode: Mode,
    walks: [Walk; 2 * WALKS],
    decoded: [Option<Decoded>; PLACES],
}

impl Default for Kept {
    fn default() -> Self {
        let asked = Asked { page: 0, cr3: 0, rights: 0 };
        let nothing = Walk { asked, page: 0, entries: 0, steps: [Step::default(); LEVELS] };
        let (controls, features) =
            (Controls { cr0: 0, cr4: 0, efer: 0 }, CpuFeatures { physical_bits: 0, gigantic_pages: true });
        let mode = Mode::new(controls, features);
        Self { controls, features, mode, walks: [nothing; 2 * WALKS], decoded: [None; PLACES] }
    }
}

impl Kept {
    /// The mode of these registers. Walks are kept of one mode.
    #[inline]
    pub(super) fn mode(&mut self, controls: Controls, features: CpuFeatures) -> &Mode {
        if self.controls != controls || self.features != features {
            self.change_mode(controls, features);
        }
        &self.mode
    }

    #[cold]
    fn change_mode(&mut self, controls: Controls, features: CpuFeatures) {
        (self.controls, self.features, self.mode) = (controls, features, Mode::new(controls, features));
        self.walks.iter_mut().for_each(|walk| walk.entries = 0);
    }

    /// The page to which a walk that was asked for this led, if `read` finds the entries that it read.
    #[inline]
    pub fn page(&self, asked: &Asked, read: impl Fn(Gpa) -> Option<u64>) -> Option<u64> {
        let walk = &self.walks[asked.place()];
        if walk.entries == 0 || walk.asked != *asked {
            return None;
        }
        for step in walk.steps.iter().take(walk.entries) {
            if read(step.at)? != step.entry {
                return None;
            }
        }
        Some(walk.page)
    }

    /// Keeps a walk that has left all its marks.
    pub(super) fn keep_walk(&mut self, asked: Asked, translation: &Translation) {
        let walk = &mut self.walks[asked.place()];
        *walk = Walk { asked, page: translation.gpa.0 >> PAGE_SHIFT << PAGE_SHIFT, entries: 0, ..*walk };
        for (place, (_, step)) in walk.steps.iter_mut().zip(translation.steps()) {
            *place = *step;
            walk.entries += 1;
        }
    }

    fn place(rip: u64) -> usize {
        (rip ^ rip >> 3) as usize % PLACES
    }

    /// What these bytes are at this address.
    #[inline]
    pub(super) fn instruction(&self, bytes: u128, rip: u64, size: CodeSize) -> Option<&Decoded> {
        let decoded = self.decoded[Self::place(rip)].as_ref()?;
        (decoded.bytes == bytes && decoded.rip == rip && decoded.size == size).then_some(decoded)
    }

    pub(super) fn keep_instruction(&mut self, decoded: Decoded) {
        self.decoded[Self::place(decoded.rip)] = Some(decoded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_place_of_code_is_one_of_data() {
        let request = |page: u64, access| Request {
            linear: page << PAGE_SHIFT,
            access,
            privilege: Privilege::Supervisor { ac: false },
            pkru: 0,
        };
        let places = |access| (0..16).map(move |page| Asked::new(0x1000, &request(page, access)).place());
        let data = || places(Access::Read).chain(places(Access::Write));
        assert!(places(Access::Execute).all(|place| (WALKS..2 * WALKS).contains(&place)));
        assert!(data().all(|place| place < WALKS));
    }
}
