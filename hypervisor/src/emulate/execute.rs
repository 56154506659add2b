//! What instructions do.
//!
//! One match from mnemonic to meaning; operands are resolved by what the decoder says of them, so a form is either all
//! here or not at all. Order within an instruction: read what is read, translate for what is written, write, and only
//! then change registers. So whatever stops it stops it whole.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};
use nestling::Access;

use super::alu::{self, Binary};
use super::descriptor::SegmentRegister;
use super::floating::is_mmx;
use super::operand::{Place, Space, mask};
use super::shift::{self, Count, Shift};
use super::{Bus, CodeSize, Exception, Registers, Stop, segment, vector};

const RAX: usize = 0;

/// One instruction under way.
pub(super) struct Machine<'a, 'b, B> {
    pub(super) space: Space<'a, B>,
    pub(super) registers: &'b mut Registers,
}

/// Where an operand is.
#[derive(Clone, Copy)]
pub(super) enum Operand {
    Register(Register),
    Memory(Place),
}

/// A move between a register and memory at a register and a number, in 64-bit mode. Taken apart once, when it is decoded:
/// device registers are hardly ever reached by anything else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plain {
    next_rip: u64,
    displacement: u64,
    base: u8,
    segment: u8,
    register: u8,
    bytes: u8,
    store: bool,
}

impl Plain {
    /// `None`: it is something else.
    pub(super) fn of(instruction: &Instruction, size: CodeSize) -> Option<Self> {
        use Code as C;
        let store = match instruction.code() {
            C::Mov_r8_rm8 | C::Mov_r16_rm16 | C::Mov_r32_rm32 | C::Mov_r64_rm64 => false,
            C::Mov_rm8_r8 | C::Mov_rm16_r16 | C::Mov_rm32_r32 | C::Mov_rm64_r64 => true,
            _ => return None,
        };
        let (memory, register) = if store { (0, 1) } else { (1, 0) };
        let (register, base) = (instruction.op_register(register), instruction.memory_base());
        let based = base.is_gpr64() && instruction.memory_index() == Register::None;
        let plain = size == CodeSize::Bits64 && instruction.op_kind(memory) == OpKind::Memory && based;
        (plain && !is_high_byte(register)).then_some(Self {
            next_rip: instruction.next_ip(),
            displacement: instruction.memory_displacement64(),
            base: full(base) as u8,
            segment: segment_index(instruction.memory_segment())? as u8,
            register: full(register) as u8,
            bytes: register.size() as u8,
            store,
        })
    }
}

impl<B: Bus> Machine<'_, '_, B> {
    /// As [`Machine::execute`].
    #[inline]
    pub(super) fn move_plain(self, plain: &Plain) -> Result<(), Stop> {
        let Plain { next_rip, displacement, base, segment, register, bytes, store } = *plain;
        let Self { mut space, registers } = self;
        let offset = registers.general[usize::from(base & 15)].wrapping_add(displacement);
        let bytes = usize::from(bytes);
        let access = if store { Access::Write } else { Access::Read };
        let place = space.place(segment.into(), offset, bytes, access)?;
        let register = &mut registers.general[usize::from(register & 15)];
        if store {
            space.store(place, *register & mask(bytes))?;
        } else {
            let value = space.load(place)? & mask(bytes);
            // A 32-bit result clears the upper half, smaller ones leave the rest alone.
            *register = if bytes >= 4 { value } else { *register & !mask(bytes) | value };
        }
        registers.rip = next_rip;
        Ok(())
    }

    pub(super) fn execute(mut self, instruction: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Mov if instruction.op_register(0).is_segment_register() => self.move_to_segment(instruction)?,
            M::Mov | M::Movnti => self.copy(instruction, |value, _| value)?,
            M::Movzx => self.copy(instruction, |value, _| value)?,
            M::Movsx | M::Movsxd => self.copy(instruction, sign_extend)?,
            M::Movbe => self.copy(instruction, |value, bytes| value.swap_bytes() >> (64 - 8 * bytes))?,
            M::Add => self.binary(instruction, Binary::Add)?,
            M::Adc => self.binary(instruction, Binary::Adc)?,
            M::Sub => self.binary(instruction, Binary::Sub)?,
            M::Sbb => self.binary(instruction, Binary::Sbb)?,
            M::And => self.binary(instruction, Binary::And)?,
            M::Or => self.binary(instruction, Binary::Or)?,
            M::Xor => self.binary(instruction, Binary::Xor)?,
            M::Cmp => self.compare(instruction, Binary::Sub)?,
            M::Test => self.compare(instruction, Binary::And)?,
            M::Inc => self.unary(instruction, |a, bytes, flags| alu::step(Binary::Add, a, bytes, flags))?,
            M::Dec => self.unary(instruction, |a, bytes, flags| alu::step(Binary::Sub, a, bytes, flags))?,
            M::Neg => self.unary(instruction, |a, bytes, flags| alu::binary(Binary::Sub, 0, a, bytes, flags))?,
            M::Not => self.unary(instruction, |a, _, flags| (!a, flags))?,
            M::Xchg => self.exchange(instruction)?,
            M::Xadd => self.exchange_add(instruction)?,
            M::Cmpxchg => self.compare_exchange(instruction)?,
            M::Bt => self.bit(instruction, |_, _| None)?,
            M::Bts => self.bit(instruction, |value, bit| Some(value | bit))?,
            M::Btr => self.bit(instruction, |value, bit| Some(value & !bit))?,
            M::Btc => self.bit(instruction, |value, bit| Some(value ^ bit))?,
            M::Shl | M::Sal => self.shift(instruction, Shift::Left)?,
            M::Shr => self.shift(instruction, Shift::Right)?,
            M::Sar => self.shift(instruction, Shift::Arithmetic)?,
            M::Rol => self.shift(instruction, Shift::RotateLeft)?,
            M::Ror => self.shift(instruction, Shift::RotateRight)?,
            M::Rcl => self.shift(instruction, Shift::RotateCarryLeft)?,
            M::Rcr => self.shift(instruction, Shift::RotateCarryRight)?,
            M::Shld => self.double_shift(instruction, true)?,
            M::Shrd => self.double_shift(instruction, false)?,
            M::Mul => self.multiply(instruction, false)?,
            M::Imul if instruction.op_count() == 1 => self.multiply(instruction, true)?,
            M::Imul => self.multiply_into(instruction)?,
            M::Div => self.divide(instruction, false)?,
            M::Idiv => self.divide(instruction, true)?,
            M::Bsf => self.count(instruction, Count::ScanForward)?,
            M::Bsr => self.count(instruction, Count::ScanReverse)?,
            M::Tzcnt => self.count(instruction, Count::Trailing)?,
            M::Lzcnt => self.count(instruction, Count::Leading)?,
            M::Popcnt => self.count(instruction, Count::Ones)?,
            M::Cmpxchg8b => self.compare_exchange_8(instruction)?,
            // Nothing of the guest's is in a cache of ours.
            M::Clflush | M::Clflushopt | M::Clwb => {}
            M::Call => return self.call(instruction),
            M::Jmp if instruction.is_jmp_far_indirect() => return self.far_jump(instruction),
            M::Jmp => return self.jump(instruction),
            M::Ret => return self.ret(instruction),
            M::Enter => self.enter(instruction)?,
            M::Leave => self.leave(instruction)?,
            M::Xlatb => self.translate_byte(instruction)?,
            M::Smsw => self.store_status(instruction)?,
            M::Lldt => self.load_system(instruction, SegmentRegister::Ldtr)?,
            M::Ltr => self.load_system(instruction, SegmentRegister::Tr)?,
            M::Movd | M::Movq | M::Movntq if is_mmx(instruction) => self.move_mmx(instruction)?,
            M::Fnstcw => self.store_floating(instruction, false)?,
            M::Fnstsw => self.store_floating(instruction, true)?,
            M::Fldcw => self.load_control(instruction)?,
            _ if vector::is_move(instruction.mnemonic()) && !instruction.is_string_instruction() => {
                self.move_vector(instruction)?;
            }
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => return self.movs(instruction),
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => return self.stos(instruction),
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => return self.lods(instruction),
            M::Insb | M::Insw | M::Insd => return self.ins(instruction),
            M::Outsb | M::Outsw | M::Outsd => return self.outs(instruction),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => return self.cmps(instruction),
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => return self.scas(instruction),
            M::Push => self.push(instruction)?,
            M::Pop => self.pop(instruction)?,
            // With a condition there are jumps beside these two, which have no operand of either kind.
            _ if instruction.condition_code() != ConditionCode::None => match instruction.op_count() {
                2 => self.copy_if(instruction)?,
                _ => self.set_byte(instruction)?,
            },
            _ => return Err(Stop::Unsupported),
        }
        self.finish(instruction);
        Ok(())
    }

    /// Moves RIP behind the instruction.
    pub(super) fn finish(&mut self, instruction: &Instruction) {
        self.registers.rip = self.space.cpu.wrap(instruction.next_ip());
    }

    /// Bytes of operand `index`.
    pub(super) fn bytes(instruction: &Instruction, index: u32) -> Result<usize, Stop> {
        let bytes = match instruction.op_kind(index) {
            OpKind::Register => instruction.op_register(index).size(),
            _ => instruction.memory_size().size(),
        };
        if matches!(bytes, 1 | 2 | 4 | 8) { Ok(bytes) } else { Err(Stop::Unsupported) }
    }

    pub(super) fn operand(&mut self, instruction: &Instruction, index: u32, access: Access) -> Result<Operand, Stop> {
        match instruction.op_kind(index) {
            OpKind::Register if instruction.op_register(index).is_gpr() => {
                Ok(Operand::Register(instruction.op_register(index)))
            }
            OpKind::Memory => {
                let offset = self.offset(instruction, index)?;
                let bytes = Self::bytes(instruction, index)?;
                let which = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
                Ok(Operand::Memory(self.space.place(which, offset, bytes, access)?))
            }
            _ => Err(Stop::Unsupported),
        }
    }

    /// The offset of a memory operand in its segment.
    pub(super) fn offset(&self, instruction: &Instruction, index: u32) -> Result<u64, Stop> {
        let value = |register: Register, _, _| {
            if register.is_segment_register() { Some(0) } else { register.is_gpr().then(|| self.register(register)) }
        };
        instruction.try_virtual_address(index, 0, value).ok_or(Stop::Unsupported)
    }

    fn read(&mut self, operand: Operand) -> Result<u64, Stop> {
        match operand {
            Operand::Register(register) => Ok(self.register(register)),
            Operand::Memory(place) => self.space.load(place),
        }
    }

    /// The value of a source operand, an immediate too, cut to `bytes`.
    pub(super) fn source(&mut self, instruction: &Instruction, index: u32, bytes: usize) -> Result<u64, Stop> {
        let value = match instruction.op_kind(index) {
            OpKind::Register if instruction.op_register(index).is_segment_register() => {
                let which = segment_index(instruction.op_register(index)).ok_or(Stop::Unsupported)?;
                u64::from(self.space.cpu.segments[which].selector)
            }
            OpKind::Register | OpKind::Memory => {
                let operand = self.operand(instruction, index, Access::Read)?;
                self.read(operand)?
            }
            _ => instruction.try_immediate(index).map_err(|_| Stop::Unsupported)?,
        };
        Ok(value & mask(bytes))
    }

    fn copy(&mut self, instruction: &Instruction, convert: impl Fn(u64, usize) -> u64) -> Result<(), Stop> {
        let to = Self::bytes(instruction, 0)?;
        let from = match instruction.op_kind(1) {
            OpKind::Register | OpKind::Memory => Self::bytes(instruction, 1)?,
            _ => to,
        };
        let value = self.source(instruction, 1, from)?;
        let value = convert(value, from);
        match self.operand(instruction, 0, Access::Write)? {
            Operand::Register(register) => self.set_register(register, value),
            Operand::Memory(place) => self.space.store(place, value)?,
        }
        Ok(())
    }

    /// Replaces operand 0 by what `change` makes of it; returns what it was.
    fn update(&mut self, instruction: &Instruction, change: impl Fn(u64) -> u64) -> Result<u64, Stop> {
        match self.operand(instruction, 0, Access::Write)? {
            Operand::Memory(place) => self.space.update(place, change),
            Operand::Register(register) => {
                let old = self.register(register);
                self.set_register(register, change(old));
                Ok(old)
            }
        }
    }

    fn binary(&mut self, instruction: &Instruction, operation: Binary) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let operand = self.source(instruction, 1, bytes)?;
        let flags = self.registers.rflags;
        let old = self.update(instruction, |value| alu::binary(operation, value, operand, bytes, flags).0)?;
        self.registers.rflags = alu::binary(operation, old, operand, bytes, flags).1;
        Ok(())
    }

    fn unary(&mut self, instruction: &Instruction, f: impl Fn(u64, usize, u64) -> (u64, u64)) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let flags = self.registers.rflags;
        let old = self.update(instruction, |value| f(value, bytes, flags).0)?;
        self.registers.rflags = f(old, bytes, flags).1;
        Ok(())
    }

    fn compare(&mut self, instruction: &Instruction, operation: Binary) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let (a, b) = (self.source(instruction, 0, bytes)?, self.source(instruction, 1, bytes)?);
        self.registers.rflags = alu::binary(operation, a, b, bytes, self.registers.rflags).1;
        Ok(())
    }

    fn exchange(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        // Either operand may be the memory.
        let (memory, register) = if instruction.op_kind(0) == OpKind::Memory { (0, 1) } else { (1, 0) };
        let register = instruction.op_register(register);
        let value = self.register(register);
        let Operand::Memory(place) = self.operand(instruction, memory, Access::Write)? else {
            return Err(Stop::Unsupported);
        };
        let old = self.space.update(place, |_| value)?;
        self.set_register(register, old);
        Ok(())
    }

    fn exchange_add(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = instruction.op_register(1);
        let addend = self.register(register);
        let bytes = Self::bytes(instruction, 0)?;
        let old = self.update(instruction, |value| value.wrapping_add(addend))?;
        self.registers.rflags = alu::binary(Binary::Add, old, addend, bytes, self.registers.rflags).1;
        self.set_register(register, old);
        if instruction.op_kind(0) == OpKind::Register {
            // Of a register with itself, the sum stays.
            self.set_register(instruction.op_register(0), old.wrapping_add(addend));
        }
        Ok(())
    }

    fn compare_exchange(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let new = self.source(instruction, 1, bytes)?;
        let expected = self.registers.general[RAX] & mask(bytes);
        // A write of the old value is what the CPU does too when the comparison fails.
        let old = self.update(instruction, |value| if value == expected { new } else { value })?;
        self.registers.rflags = alu::binary(Binary::Sub, expected, old, bytes, self.registers.rflags).1;
        if old != expected {
            self.set_register(accumulator(bytes), old);
        }
        Ok(())
    }

    fn set_byte(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let value = u64::from(alu::holds(instruction.condition_code(), self.registers.rflags));
        self.put(instruction, 0, value)
    }

    /// Writes an operand, as much of the value as it takes.
    pub(super) fn put(&mut self, instruction: &Instruction, index: u32, value: u64) -> Result<(), Stop> {
        match self.operand(instruction, index, Access::Write)? {
            Operand::Register(register) => self.set_register(register, value),
            Operand::Memory(place) => self.space.store(place, value)?,
        }
        Ok(())
    }

    /// CMOVcc reads its source whether it moves or not, and clears the upper half of a 32-bit register in either case.
    fn copy_if(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let source = self.source(instruction, 1, bytes)?;
        let register = instruction.op_register(0);
        let moved = alu::holds(instruction.condition_code(), self.registers.rflags);
        let value = if moved { source } else { self.register(register) };
        self.set_register(register, value);
        Ok(())
    }

    fn shift(&mut self, instruction: &Instruction, kind: Shift) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let count = self.source(instruction, 1, 1)?;
        self.unary(instruction, |value, _, flags| shift::shift(kind, value, count, bytes, flags))
    }

    fn double_shift(&mut self, instruction: &Instruction, left: bool) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let (other, count) = (self.source(instruction, 1, bytes)?, self.source(instruction, 2, 1)?);
        self.unary(instruction, |value, _, flags| shift::double(left, value, other, count, bytes, flags))
    }

    /// The upper half of the double-sized accumulator: AH of a byte's, else (E/R)DX.
    const fn upper(bytes: usize) -> Register {
        match bytes {
            1 => Register::AH,
            2 => Register::DX,
            4 => Register::EDX,
            _ => Register::RDX,
        }
    }

    fn multiply(&mut self, instruction: &Instruction, signed: bool) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let factor = self.source(instruction, 0, bytes)?;
        let other = self.register(accumulator(bytes));
        let (low, high, flags) = shift::multiply(signed, other, factor, bytes, self.registers.rflags);
        self.set_register(accumulator(bytes), low);
        self.set_register(Self::upper(bytes), high);
        self.registers.rflags = flags;
        Ok(())
    }

    /// IMUL with two or three operands.
    fn multiply_into(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let last = instruction.op_count() - 1;
        let (a, b) = (self.source(instruction, last - 1, bytes)?, self.source(instruction, last, bytes)?);
        let (low, _, flags) = shift::multiply(true, a, b, bytes, self.registers.rflags);
        self.set_register(instruction.op_register(0), low);
        self.registers.rflags = flags;
        Ok(())
    }

    fn divide(&mut self, instruction: &Instruction, signed: bool) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let by = self.source(instruction, 0, bytes)?;
        let (high, low) = (self.register(Self::upper(bytes)), self.register(accumulator(bytes)));
        let (quotient, remainder) = shift::divide(signed, high, low, by, bytes).ok_or(Exception::Divide)?;
        self.set_register(accumulator(bytes), quotient);
        self.set_register(Self::upper(bytes), remainder);
        Ok(())
    }

    fn count(&mut self, instruction: &Instruction, kind: Count) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let value = self.source(instruction, 1, bytes)?;
        let (count, flags) = shift::count(kind, value, bytes, self.registers.rflags);
        if let Some(count) = count {
            self.set_register(instruction.op_register(0), count);
        }
        self.registers.rflags = flags;
        Ok(())
    }

    /// CMPXCHG8B: EDX:EAX is compared, ECX:EBX goes in.
    fn compare_exchange_8(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let pair = |machine: &Self, high, low| machine.register(high) << 32 | machine.register(low);
        let expected = pair(self, Register::EDX, Register::EAX);
        let new = pair(self, Register::ECX, Register::EBX);
        let old = self.update(instruction, |value| if value == expected { new } else { value })?;
        if old == expected {
            self.registers.rflags |= alu::ZF;
        } else {
            self.registers.rflags &= !alu::ZF;
            self.set_register(Register::EAX, old);
            self.set_register(Register::EDX, old >> 32);
        }
        Ok(())
    }

    /// XLAT: AL from a table.
    fn translate_byte(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let offset = self.offset(instruction, 0)?;
        let which = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        let place = self.space.place(which, offset, 1, Access::Read)?;
        let value = self.space.load(place)?;
        self.set_register(Register::AL, value);
        Ok(())
    }

    /// BT and its relatives. With a register for the number the memory operand is a bit string of any length.
    fn bit(&mut self, instruction: &Instruction, change: impl Fn(u64, u64) -> Option<u64>) -> Result<(), Stop> {
        let bytes = Self::bytes(instruction, 0)?;
        let bits = 8 * bytes as u64;
        if instruction.op_kind(0) != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let mut offset = self.offset(instruction, 0)?;
        let number = match instruction.op_kind(1) {
            OpKind::Register => {
                let number = sign_extend(self.register(instruction.op_register(1)), bytes) as i64;
                let words = number >> bits.trailing_zeros();
                offset = offset.wrapping_add(words.wrapping_mul(bytes as i64) as u64) & self.address_mask(instruction);
                number as u64
            }
            _ => self.source(instruction, 1, 1)?,
        };
        let bit = 1 << (number % bits);
        let writes = change(0, bit).is_some();
        let which = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        let access = if writes { Access::Write } else { Access::Read };
        let place = self.space.place(which, offset, bytes, access)?;
        let old = if writes {
            self.space.update(place, |value| change(value, bit).unwrap_or(value))?
        } else {
            self.space.load(place)?
        };
        let carry = if old & bit != 0 { alu::CF } else { 0 };
        self.registers.rflags = self.registers.rflags & !alu::CF | carry;
        Ok(())
    }

    /// The address size of a memory operand, as a mask.
    fn address_mask(&self, instruction: &Instruction) -> u64 {
        let by_register = [instruction.memory_base(), instruction.memory_index()]
            .into_iter()
            .find(|register| *register != Register::None)
            .map(|register| register.size());
        let by_mode = match self.space.cpu.code_size() {
            CodeSize::Bits64 => 8,
            CodeSize::Bits32 => 4,
            CodeSize::Bits16 => 2,
        };
        mask(by_register.unwrap_or(by_mode))
    }

    pub(super) fn register(&self, register: Register) -> u64 {
        let value = self.registers.general[full(register)];
        if is_high_byte(register) { value >> 8 & 0xff } else { value & mask(register.size()) }
    }

    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let slot = &mut self.registers.general[full(register)];
        *slot = match register.size() {
            1 if is_high_byte(register) => *slot & !0xff00 | (value & 0xff) << 8,
            // A 32-bit result clears the upper half, smaller ones leave the rest alone.
            4 => value & mask(4),
            bytes => *slot & !mask(bytes) | value & mask(bytes),
        };
    }
}

pub(super) const fn accumulator(bytes: usize) -> Register {
    match bytes {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Index of the general register that `register` is a part of.
fn full(register: Register) -> usize {
    register.full_register().number() & 15
}

pub(super) fn segment_index(register: Register) -> Option<usize> {
    Some(match register {
        Register::ES => segment::ES,
        Register::CS => segment::CS,
        Register::SS => segment::SS,
        Register::DS => segment::DS,
        Register::FS => segment::FS,
        Register::GS => segment::GS,
        _ => return None,
    })
}

fn sign_extend(value: u64, bytes: usize) -> u64 {
    let unused = 64 - 8 * bytes as u32;
    ((value << unused) as i64 >> unused) as u64
}
