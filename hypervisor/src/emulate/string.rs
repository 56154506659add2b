//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, with and without REP.
//!
//! Registers are brought up to date after each element, as the CPU does, so a fault in the middle leaves the instruction
//! to go on where it was. No more than [`MOST_ELEMENTS`] elements are moved at a time: then the vCPU gets its interrupts,
//! and comes back, because RIP has not moved.

use iced_x86::{Instruction, Mnemonic, OpKind};
use nestling::Access;

use super::alu::{self, Binary};
use super::execute::{Machine, accumulator, segment_index};
use super::operand::{Place, mask};
use super::{Bus, Stop, segment};

const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;
const DIRECTION: u64 = 1 << 10;

/// Elements between two chances for an interrupt.
pub(super) const MOST_ELEMENTS: usize = 1024;

impl<B: Bus> Machine<'_, '_, B> {
    pub(super) fn movs(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        self.repeat(instruction, |machine, instruction, size| {
            let from = machine.source_place(instruction, bytes, size)?;
            let to = machine.destination_place(bytes, size)?;
            let value = machine.space.load(from)?;
            machine.space.store(to, value)?;
            machine.advance(RSI, bytes, size);
            machine.advance(RDI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn stos(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        self.repeat(instruction, |machine, _, size| {
            let to = machine.destination_place(bytes, size)?;
            machine.space.store(to, machine.register(accumulator(bytes)))?;
            machine.advance(RDI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn lods(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 1)?;
        self.repeat(instruction, |machine, instruction, size| {
            let from = machine.source_place(instruction, bytes, size)?;
            let value = machine.space.load(from)?;
            machine.set_register(accumulator(bytes), value);
            machine.advance(RSI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn ins(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        self.repeat(instruction, |machine, _, size| {
            // Where it goes is settled first: what a port gave can't be put back.
            let to = machine.destination_place(bytes, size)?;
            let port = machine.registers.general[RDX] as u16;
            let value = machine.space.bus.input(port, bytes);
            machine.space.store(to, u64::from(value))?;
            machine.advance(RDI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn outs(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 1)?;
        self.repeat(instruction, |machine, instruction, size| {
            let from = machine.source_place(instruction, bytes, size)?;
            let value = machine.space.load(from)?;
            let port = machine.registers.general[RDX] as u16;
            machine.space.bus.output(port, bytes, value as u32);
            machine.advance(RSI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn cmps(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        self.repeat(instruction, |machine, instruction, size| {
            let first = machine.source_place(instruction, bytes, size)?;
            let second = machine.compared_place(bytes, size)?;
            let (a, b) = (machine.space.load(first)?, machine.space.load(second)?);
            machine.registers.rflags = alu::binary(Binary::Sub, a, b, bytes, machine.registers.rflags).1;
            machine.advance(RSI, bytes, size);
            machine.advance(RDI, bytes, size);
            Ok(())
        })
    }

    pub(super) fn scas(self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 1)?;
        self.repeat(instruction, |machine, _, size| {
            let place = machine.compared_place(bytes, size)?;
            let (a, b) = (machine.register(accumulator(bytes)), machine.space.load(place)?);
            machine.registers.rflags = alu::binary(Binary::Sub, a, b, bytes, machine.registers.rflags).1;
            machine.advance(RDI, bytes, size);
            Ok(())
        })
    }

    /// Runs `element` as often as the prefix says; `element` gets the address size in bytes.
    fn repeat(
        mut self,
        instruction: &Instruction,
        element: impl Fn(&mut Self, &Instruction, usize) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let size = address_bytes(instruction).ok_or(Stop::Unsupported)?;
        // CMPS and SCAS stop when ZF is not as the prefix says; for the others REPNE counts as REP.
        let compares = matches!(
            instruction.mnemonic(),
            Mnemonic::Cmpsb
                | Mnemonic::Cmpsw
                | Mnemonic::Cmpsd
                | Mnemonic::Cmpsq
                | Mnemonic::Scasb
                | Mnemonic::Scasw
                | Mnemonic::Scasd
                | Mnemonic::Scasq
        );
        let wanted = if instruction.has_repne_prefix() { 0 } else { alu::ZF };
        if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
            element(&mut self, instruction, size)?;
            self.finish(instruction);
            return Ok(());
        }
        for _ in 0..MOST_ELEMENTS {
            let left = self.registers.general[RCX] & mask(size);
            if left == 0 {
                self.finish(instruction);
                return Ok(());
            }
            element(&mut self, instruction, size)?;
            self.set_address(RCX, left - 1, size);
            if compares && self.registers.rflags & alu::ZF != wanted {
                self.finish(instruction);
                return Ok(());
            }
        }
        if self.registers.general[RCX] & mask(size) == 0 {
            self.finish(instruction);
            return Ok(());
        }
        Err(Stop::Again)
    }

    fn source_place(&mut self, instruction: &Instruction, bytes: usize, size: usize) -> Result<Place, Stop> {
        let which = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        let offset = self.registers.general[RSI] & mask(size);
        self.space.place(which, offset, bytes, Access::Read)
    }

    /// Always by ES.
    fn destination_place(&mut self, bytes: usize, size: usize) -> Result<Place, Stop> {
        let offset = self.registers.general[RDI] & mask(size);
        self.space.place(segment::ES, offset, bytes, Access::Write)
    }

    /// As [`Self::destination_place`], to read.
    fn compared_place(&mut self, bytes: usize, size: usize) -> Result<Place, Stop> {
        let offset = self.registers.general[RDI] & mask(size);
        self.space.place(segment::ES, offset, bytes, Access::Read)
    }

    fn advance(&mut self, register: usize, bytes: usize, size: usize) {
        let value = self.registers.general[register];
        let down = self.registers.rflags & DIRECTION != 0;
        let moved = if down { value.wrapping_sub(bytes as u64) } else { value.wrapping_add(bytes as u64) };
        self.set_address(register, moved, size);
    }

    fn set_address(&mut self, register: usize, value: u64, size: usize) {
        let slot = &mut self.registers.general[register];
        *slot = match size {
            2 => *slot & !0xffff | value & 0xffff,
            size => value & mask(size),
        };
    }
}

/// The address size, which the implied operands carry.
fn address_bytes(instruction: &Instruction) -> Option<usize> {
    (0..instruction.op_count()).find_map(|index| match instruction.op_kind(index) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    })
}
