//! Instructions that load a segment register from memory: MOV to one, far JMP, LLDT and LTR (AMD APM vol. 2, 4.5 to 4.10).
//!
//! Descriptors are read as the CPU reads them: with the supervisor's rights, whoever executes the instruction. What is
//! loaded goes into [`super::Registers::loaded`], at most one register an instruction. Far jumps are within a privilege
//! level; gates and tasks are not looked for.

use iced_x86::{Instruction, OpKind, Register};
use nestling::Access;

use super::execute::{Machine, segment_index};
use super::operand::Space;

use super::{Bus, CodeSize, Cpu, EFER_LMA, Exception, RFLAGS_AC, SEGMENT_BIG, SEGMENT_LONG, Stop, segment};
use crate::guest::entry::Segment;

/// A register with a hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentRegister {
    /// By its index in [`Cpu::segments`].
    Code(usize),
    /// LDTR.
    Ldtr,
    /// TR.
    Tr,
}

const TABLE_LDT: u16 = 1 << 2;
const PRESENT: u16 = 1 << 7;
/// A code or data segment, and not one of the system's.
const ORDINARY: u16 = 1 << 4;
const CODE: u16 = 1 << 3;
const CONFORMING: u16 = 1 << 2;
const ACCESS: u16 = 1 << 1;
const GRANULAR: u16 = 1 << 11;
const TYPE: u16 = 0x1f;
const LDT: u16 = 2;
const TSS_16: u16 = 1;
const TSS: u16 = 9;
const ACCESSED: u64 = 1 << 40;
const BUSY: u64 = 1 << 41;

/// A descriptor and where it is.
struct Descriptor {
    low: u64,
    high: u64,
    linear: u64,
}

impl Descriptor {
    fn hidden(&self, selector: u16) -> Segment {
        let attributes = (self.low >> 40 & 0xff) as u16 | (self.low >> 44 & 0xf00) as u16;
        let limit = (self.low & 0xffff) as u32 | (self.low >> 32 & 0xf_0000) as u32;
        let limit = if attributes & GRANULAR != 0 { limit << 12 | 0xfff } else { limit };
        let base = self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000 | self.high << 32;
        Segment { selector, attributes, limit, base }
    }
}

const fn privilege(attributes: u16) -> u8 {
    (attributes >> 5 & 3) as u8
}

/// #GP with a selector.
fn wrong(selector: u16) -> Stop {
    Exception::Selector(selector & !3).into()
}

fn missing(selector: u16) -> Stop {
    Exception::SegmentNotPresent(selector & !3).into()
}

impl<B: Bus> Machine<'_, '_, B> {
    fn long(&self) -> bool {
        self.space.cpu.efer & EFER_LMA != 0
    }

    /// Memory as descriptor tables are read.
    fn as_supervisor<R>(&mut self, work: impl FnOnce(&mut Space<'_, B>) -> R) -> R {
        let mut cpu: Cpu = *self.space.cpu;
        cpu.cpl = 0;
        cpu.registers.rflags &= !RFLAGS_AC;
        work(&mut Space::new(&cpu, self.space.bus))
    }

    /// Reads 8 bytes of a table.
    fn table_word(&mut self, linear: u64, access: Access) -> Result<(u64, u64), Stop> {
        let linear = if self.long() { linear } else { linear & 0xffff_ffff };
        // Tables begin at multiples of 8 where anybody cares for them.
        if linear & 0xfff > 0xff8 {
            return Err(Stop::Unsupported);
        }
        self.as_supervisor(|space| {
            let gpa = space.translate(linear, access)?;
            Ok((space.bus.read(gpa, 8)?, gpa))
        })
    }

    fn descriptor(&mut self, selector: u16, wide: bool) -> Result<Descriptor, Stop> {
        let cpu = self.space.cpu;
        let (base, limit) = if selector & TABLE_LDT == 0 {
            cpu.gdtr
        } else if cpu.ldtr.attributes & PRESENT != 0 {
            (cpu.ldtr.base, cpu.ldtr.limit)
        } else {
            return Err(wrong(selector));
        };
        let bytes = if wide { 16 } else { 8 };
        let offset = u32::from(selector & !7);
        if offset + bytes - 1 > limit {
            return Err(wrong(selector));
        }
        let linear = base.wrapping_add(u64::from(offset));
        let (low, _) = self.table_word(linear, Access::Read)?;
        let high = if wide { self.table_word(linear.wrapping_add(8), Access::Read)?.0 } else { 0 };
        Ok(Descriptor { low, high, linear })
    }

    /// Sets a bit of a descriptor that is as it was read.
    fn mark(&mut self, descriptor: &Descriptor, bit: u64) -> Result<(), Stop> {
        if descriptor.low & bit != 0 {
            return Ok(());
        }
        let (_, gpa) = self.table_word(descriptor.linear, Access::Write)?;
        let marked = self.space.bus.compare_exchange(gpa, 8, descriptor.low, descriptor.low | bit)?;
        if marked { Ok(()) } else { Err(Stop::Again) }
    }

    /// MOV to a segment register.
    pub(super) fn move_to_segment(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let which = match instruction.op_register(0) {
            Register::ES => segment::ES,
            Register::SS => segment::SS,
            Register::DS => segment::DS,
            Register::FS => segment::FS,
            Register::GS => segment::GS,
            _ => return Err(Exception::InvalidOpcode.into()),
        };
        let selector = self.source(instruction, 1, 2)? as u16;
        let loaded = self.data_segment(which, selector)?;
        self.registers.loaded = Some((SegmentRegister::Code(which), loaded));
        Ok(())
    }

    fn data_segment(&mut self, which: usize, selector: u16) -> Result<Segment, Stop> {
        let cpu = self.space.cpu;
        let (cpl, requested, stack) = (cpu.cpl, (selector & 3) as u8, which == segment::SS);
        if !cpu.protected() {
            return Ok(Segment { selector, base: u64::from(selector) << 4, ..cpu.segments[which] });
        }
        if selector & !3 == 0 {
            let allowed = !stack || cpu.code_size() == CodeSize::Bits64 && cpl < 3 && requested == cpl;
            let nothing = Segment { selector, attributes: 0, limit: 0, base: 0 };
            return if allowed { Ok(nothing) } else { Err(Exception::GeneralProtection.into()) };
        }
        let descriptor = self.descriptor(selector, false)?;
        let mut hidden = descriptor.hidden(selector);
        let (kind, level) = (hidden.attributes, privilege(hidden.attributes));
        let ordinary = kind & ORDINARY != 0;
        let fits = if stack {
            ordinary && kind & (CODE | ACCESS) == ACCESS && requested == cpl && level == cpl
        } else {
            let readable = kind & CODE == 0 || kind & ACCESS != 0;
            let free = kind & (CODE | CONFORMING) == CODE | CONFORMING;
            ordinary && readable && (free || level >= cpl.max(requested))
        };
        if !fits {
            return Err(wrong(selector));
        }
        if kind & PRESENT == 0 {
            return Err(if stack { Exception::StackSelector(selector & !3).into() } else { missing(selector) });
        }
        self.mark(&descriptor, ACCESSED)?;
        hidden.attributes |= 1;
        Ok(hidden)
    }

    /// JMP to another code segment, by a pointer in memory.
    pub(super) fn far_jump(mut self, instruction: &Instruction) -> Result<(), Stop> {
        if instruction.op_kind(0) != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let bytes = instruction.memory_size().size() - 2;
        let at = self.offset(instruction, 0)?;
        let from = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        let offset = self.space.place(from, at, bytes, Access::Read)?;
        let selector = self.space.place(from, at.wrapping_add(bytes as u64), 2, Access::Read)?;
        let (target, selector) = (self.space.load(offset)?, self.space.load(selector)? as u16);
        let hidden = self.code_segment(selector)?;
        let inside = if self.long() && hidden.attributes & SEGMENT_LONG != 0 {
            self.space.is_canonical(target)
        } else {
            target <= u64::from(hidden.limit)
        };
        if !inside {
            return Err(Exception::GeneralProtection.into());
        }
        self.registers.loaded = Some((SegmentRegister::Code(segment::CS), hidden));
        self.registers.rip = target;
        Ok(())
    }

    fn code_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        let cpu = self.space.cpu;
        if !cpu.protected() {
            return Ok(Segment { selector, base: u64::from(selector) << 4, ..cpu.segments[segment::CS] });
        }
        if selector & !3 == 0 {
            return Err(Exception::GeneralProtection.into());
        }
        let descriptor = self.descriptor(selector, false)?;
        let kind = descriptor.hidden(selector).attributes;
        if kind & ORDINARY == 0 {
            // A gate or a task, or nothing that can be jumped to.
            return Err(Stop::Unsupported);
        }
        let (level, requested) = (privilege(kind), (selector & 3) as u8);
        let allowed = if kind & CONFORMING != 0 { level <= cpu.cpl } else { level == cpu.cpl && requested <= cpu.cpl };
        let both = self.long() && kind & SEGMENT_LONG != 0 && kind & SEGMENT_BIG != 0;
        if kind & CODE == 0 || !allowed || both {
            return Err(wrong(selector));
        }
        if kind & PRESENT == 0 {
            return Err(missing(selector));
        }
        self.mark(&descriptor, ACCESSED)?;
        let mut hidden = descriptor.hidden(selector & !3 | u16::from(cpu.cpl));
        hidden.attributes |= 1;
        Ok(hidden)
    }

    /// LLDT and LTR.
    pub(super) fn load_system(&mut self, instruction: &Instruction, which: SegmentRegister) -> Result<(), Stop> {
        let cpu = self.space.cpu;
        if !cpu.protected() {
            return Err(Exception::InvalidOpcode.into());
        }
        if cpu.cpl != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        let selector = self.source(instruction, 0, 2)? as u16;
        let task = which == SegmentRegister::Tr;
        if selector & !3 == 0 && !task {
            let nothing = Segment { selector, attributes: 0, limit: 0, base: 0 };
            self.registers.loaded = Some((which, nothing));
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(Exception::GeneralProtection.into());
        }
        if selector & TABLE_LDT != 0 {
            return Err(wrong(selector));
        }
        let wide = self.long();
        let descriptor = self.descriptor(selector, wide)?;
        let mut hidden = descriptor.hidden(selector);
        let kind = hidden.attributes & TYPE;
        let fits = if task { kind == TSS || kind == TSS_16 && !wide } else { kind == LDT };
        // The upper half has a type too, which must be 0.
        if !fits || descriptor.high >> 40 & 0x1f != 0 {
            return Err(wrong(selector));
        }
        if hidden.attributes & PRESENT == 0 {
            return Err(missing(selector));
        }
        if task {
            self.mark(&descriptor, BUSY)?;
            hidden.attributes |= 2;
        }
        self.registers.loaded = Some((which, hidden));
        Ok(())
    }

    /// SMSW. The whole of CR0 goes to a register, 16 bits to memory.
    pub(super) fn store_status(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        const CR4_UMIP: u64 = 1 << 11;
        let cpu = self.space.cpu;
        if cpu.cr4 & CR4_UMIP != 0 && cpu.cpl != 0 {
            return Err(Exception::GeneralProtection.into());
        }
        self.put(instruction, 0, cpu.cr0)
    }
}
