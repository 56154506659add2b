//! The stack and near branches: PUSH, POP, CALL, RET, JMP, ENTER, LEAVE. They come here with an operand in device memory, or
//! when the stack is there.
//!
//! The stack pointer changes last: an instruction whose store or load faults leaves it, and the target of a branch is checked
//! before anything is stored.

use iced_x86::{Code, Instruction, OpKind, Register};
use nestling::Access;

use super::execute::{Machine, Operand};
use super::operand::mask;
use super::{Bus, CodeSize, Exception, SEGMENT_BIG, Stop, segment};

const RSP: usize = 4;
const RBP: usize = 5;

impl<B: Bus> Machine<'_, '_, B> {
    /// Puts a value on the stack, wherever that is; returns the new stack pointer, which is not set.
    fn store_on_stack(&mut self, value: u64, bytes: usize) -> Result<u64, Stop> {
        let top = self.registers.general[RSP].wrapping_sub(bytes as u64);
        let place = self.space.place(segment::SS, top & self.stack_mask(), bytes, Access::Write)?;
        self.space.store(place, value)?;
        Ok(top)
    }

    /// A near target: operand 0.
    fn target(&mut self, instruction: &Instruction) -> Result<u64, Stop> {
        let target = match instruction.op_kind(0) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => instruction.near_branch_target(),
            _ if instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect() => {
                let bytes = Self::bytes(instruction, 0)?;
                self.source(instruction, 0, bytes)?
            }
            _ => return Err(Stop::Unsupported),
        };
        self.may_jump(target).map(|()| target)
    }

    /// Whether code can be at an address (APM vol. 2, 4.12.1 and 5.3.1).
    fn may_jump(&self, target: u64) -> Result<(), Stop> {
        let inside = match self.space.cpu.code_size() {
            CodeSize::Bits64 => self.space.is_canonical(target),
            _ => target <= u64::from(self.space.cpu.segments[segment::CS].limit),
        };
        if inside { Ok(()) } else { Err(Exception::GeneralProtection.into()) }
    }

    pub(super) fn call(mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
        let target = self.target(instruction)?;
        let top = self.store_on_stack(instruction.next_ip(), bytes)?;
        self.set_stack(top);
        self.registers.rip = target;
        Ok(())
    }

    pub(super) fn jump(mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.registers.rip = self.target(instruction)?;
        Ok(())
    }

    /// A near return, and the bytes of arguments that it takes from the stack.
    pub(super) fn ret(mut self, instruction: &Instruction) -> Result<(), Stop> {
        let arguments = if instruction.op_count() == 1 { u64::from(instruction.immediate16()) } else { 0 };
        let bytes = (i64::from(instruction.stack_pointer_increment()) - arguments as i64) as usize;
        if !matches!(bytes, 2 | 4 | 8) {
            return Err(Stop::Unsupported);
        }
        let top = self.registers.general[RSP];
        let place = self.space.place(segment::SS, top & self.stack_mask(), bytes, Access::Read)?;
        let target = self.space.load(place)?;
        self.may_jump(target)?;
        self.set_stack(top.wrapping_add(bytes as u64).wrapping_add(arguments));
        self.registers.rip = target;
        Ok(())
    }

    /// ENTER without nested frames, which nobody has used since Pascal.
    pub(super) fn enter(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = match instruction.code() {
            Code::Enterw_imm16_imm8 => Register::BP,
            Code::Enterd_imm16_imm8 => Register::EBP,
            _ => Register::RBP,
        };
        if instruction.immediate8_2nd() & 31 != 0 {
            return Err(Stop::Unsupported);
        }
        let top = self.store_on_stack(self.register(register), register.size())?;
        self.set_register(register, top);
        self.set_stack(top.wrapping_sub(u64::from(instruction.immediate16())));
        Ok(())
    }

    /// LEAVE: the stack pointer from the frame pointer, and that from the stack.
    pub(super) fn leave(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = match instruction.code() {
            Code::Leavew => Register::BP,
            Code::Leaved => Register::EBP,
            _ => Register::RBP,
        };
        let bytes = register.size();
        let top = self.registers.general[RBP];
        let place = self.space.place(segment::SS, top & self.stack_mask(), bytes, Access::Read)?;
        let value = self.space.load(place)?;
        self.set_stack(top.wrapping_add(bytes as u64));
        self.set_register(register, value);
        Ok(())
    }

    /// PUSH of a memory operand, or of a register or immediate onto a stack in device memory.
    pub(super) fn push(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
        if instruction.op_kind(0) == OpKind::Register && !instruction.op_register(0).is_gpr() {
            return Err(Stop::Unsupported);
        }
        let value = self.source(instruction, 0, bytes)?;
        let top = self.store_on_stack(value, bytes)?;
        self.set_stack(top);
        Ok(())
    }

    /// POP. A destination that is addressed by the stack pointer is addressed by it as it is afterwards.
    pub(super) fn pop(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
        let top = self.registers.general[RSP];
        let place = self.space.place(segment::SS, top & self.stack_mask(), bytes, Access::Read)?;
        let value = self.space.load(place)?;
        let before = *self.registers;
        self.set_stack(top.wrapping_add(bytes as u64));
        let moved = match self.operand(instruction, 0, Access::Write) {
            Ok(Operand::Register(register)) => {
                self.set_register(register, value);
                Ok(())
            }
            Ok(Operand::Memory(place)) => self.space.store(place, value),
            Err(stop) => Err(stop),
        };
        if moved.is_err() {
            *self.registers = before;
        }
        moved
    }

    /// The part of the stack pointer that counts: the stack segment's size says (APM vol. 2, 4.5.3).
    fn stack_mask(&self) -> u64 {
        let big = self.space.cpu.segments[segment::SS].attributes & SEGMENT_BIG != 0;
        match self.space.cpu.code_size() {
            CodeSize::Bits64 => u64::MAX,
            _ if big && self.space.cpu.protected() => mask(4),
            _ => mask(2),
        }
    }

    fn set_stack(&mut self, value: u64) {
        let mask = self.stack_mask();
        let slot = &mut self.registers.general[RSP];
        *slot = if mask == 0xffff { *slot & !mask | value & mask } else { value & mask };
    }
}
