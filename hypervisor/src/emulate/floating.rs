//! x87 and MMX state that is moved: MOVD, MOVQ and MOVNTQ of MMX registers, and the x87 unit's control and status words.
//! Nothing is computed here.
//!
//! The MMX registers are the mantissas of the x87 unit's, by their physical numbers. An MMX instruction makes that unit one
//! whose stack is full and begins at register 0 (APM vol. 1, 5.4); whoever holds its state does so when it takes over what
//! [`MmxUse`] says.

use iced_x86::{Instruction, OpKind, Register};
use nestling::Access;

use super::execute::{Machine, segment_index};
use super::operand::mask;
use super::{Bus, Exception, Stop};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
/// Exceptions: flags in the status word, masks in the control word.
const EXCEPTIONS: u16 = 0x3f;
/// An exception that is not masked is flagged; busy, which says the same.
const STATUS_ERROR: u16 = 1 << 7 | 1 << 15;
/// What the control word holds; its bit 6 reads 1 (APM vol. 1, 6.2.3).
const CONTROL_VALID: u16 = 0x1f3f;
const CONTROL_FIXED: u16 = 1 << 6;

/// What an instruction has done with MMX registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MmxUse {
    /// Nothing.
    #[default]
    None,
    /// It has read one.
    Read,
    /// It has written this one.
    Written(usize),
}

/// The x87 unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Floating {
    /// Its control word.
    pub control: u16,
    /// Its status word.
    pub status: u16,
    /// The mantissas of its registers: MM0 to MM7.
    pub mmx: [u64; 8],
    /// What was done with these.
    pub used: MmxUse,
}

/// A vCPU's x87 and SSE registers: left where they are by the instructions that have none of them, which are most. What is
/// set is the last that an instruction does.
pub trait Wide {
    /// The value of an XMM register, its lower half first.
    fn vector(&self, number: usize) -> [u64; 2];
    /// Sets it.
    fn set_vector(&mut self, number: usize, value: [u64; 2]);
    /// The x87 unit.
    fn floating(&self) -> Floating;
    /// Takes over what an instruction has made of it.
    fn set_floating(&mut self, floating: &Floating);
}

/// Such registers without a CPU, for what emulates instructions apart from any guest: tests and checks.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct WideRegisters {
    /// The XMM registers.
    pub vectors: [[u64; 2]; 16],
    /// The x87 unit.
    pub floating: Floating,
}

impl Wide for WideRegisters {
    fn vector(&self, number: usize) -> [u64; 2] {
        self.vectors[number]
    }

    fn set_vector(&mut self, number: usize, value: [u64; 2]) {
        self.vectors[number] = value;
    }

    fn floating(&self) -> Floating {
        self.floating
    }

    fn set_floating(&mut self, floating: &Floating) {
        self.floating = *floating;
    }
}

impl<B: Bus> Machine<'_, '_, B> {
    /// A move between an MMX register and memory.
    pub(super) fn move_mmx(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let cr0 = self.space.cpu.cr0;
        if cr0 & CR0_EM != 0 {
            return Err(Exception::InvalidOpcode.into());
        }
        self.floating_available(cr0 & CR0_TS != 0)?;
        let (memory, register) = match (instruction.op_kind(0), instruction.op_kind(1)) {
            (OpKind::Register, OpKind::Memory) => (1, instruction.op_register(0)),
            (OpKind::Memory, OpKind::Register) => (0, instruction.op_register(1)),
            // Between registers nothing meets a device.
            _ => return Err(Stop::Unsupported),
        };
        let bytes = instruction.memory_size().size();
        if !register.is_mm() || !matches!(bytes, 4 | 8) {
            return Err(Stop::Unsupported);
        }
        let index = register.number();
        let mut floating = self.space.bus.wide().floating();
        let offset = self.offset(instruction, memory)?;
        let segment = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        if memory == 1 {
            let place = self.space.place(segment, offset, bytes, Access::Read)?;
            // What is shorter clears the rest.
            floating.mmx[index] = self.space.load(place)?;
            floating.used = MmxUse::Written(index);
        } else {
            let place = self.space.place(segment, offset, bytes, Access::Write)?;
            self.space.store(place, floating.mmx[index] & mask(bytes))?;
            floating.used = MmxUse::Read;
        }
        self.space.bus.wide().set_floating(&floating);
        Ok(())
    }

    /// FNSTCW and FNSTSW, which wait for no exception.
    pub(super) fn store_floating(&mut self, instruction: &Instruction, status: bool) -> Result<(), Stop> {
        if self.space.cpu.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(Exception::DeviceNotAvailable.into());
        }
        let floating = self.space.bus.wide().floating();
        self.put(instruction, 0, u64::from(if status { floating.status } else { floating.control }))
    }

    /// FLDCW. An exception that is flagged, and masked no longer, is raised by the next instruction that waits.
    pub(super) fn load_control(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.floating_available(self.space.cpu.cr0 & (CR0_EM | CR0_TS) != 0)?;
        let control = self.source(instruction, 0, 2)? as u16 & CONTROL_VALID | CONTROL_FIXED;
        let mut floating = self.space.bus.wide().floating();
        floating.control = control;
        let raised = floating.status & !control & EXCEPTIONS != 0;
        floating.status = floating.status & !STATUS_ERROR | if raised { STATUS_ERROR } else { 0 };
        self.space.bus.wide().set_floating(&floating);
        Ok(())
    }

    /// Whether the unit may be used by an instruction that waits.
    fn floating_available(&mut self, kept: bool) -> Result<(), Stop> {
        if kept {
            return Err(Exception::DeviceNotAvailable.into());
        }
        if self.space.bus.wide().floating().status & STATUS_ERROR != 0 {
            return Err(Exception::FloatingPoint.into());
        }
        Ok(())
    }
}

/// Whether an operand is an MMX register.
pub(super) fn is_mmx(instruction: &Instruction) -> bool {
    let register = |index| match instruction.op_kind(index) {
        OpKind::Register => instruction.op_register(index),
        _ => Register::None,
    };
    register(0).is_mm() || register(1).is_mm()
}
