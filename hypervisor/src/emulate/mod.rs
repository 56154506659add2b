//! Executing one guest instruction in software: those that touch device memory, and string I/O.
//!
//! Protocol. The caller has a vCPU that stopped *before* an instruction (a nested fault on device memory, or an
//! intercepted INS or OUTS). It describes the vCPU in a [`Cpu`], lends a [`Bus`], and calls [`step`]. The answer is a
//! register file to take over **in every case**, and what to do besides ([`End`]): nothing, raise an exception, or give up.
//! A repeated string instruction that is not through has its registers where it got to and RIP still at it, so that the
//! vCPU can take interrupts in between; the caller just lets the vCPU run again.
//!
//! What is executed is what the guest's own tables say is at RIP *now*, under the guest's own rights: the fetch and every
//! operand are walked ([`nestling::guest`]) and segments are checked ([`operand`]). Another vCPU may have changed instruction or
//! tables since the exit. That is the same race that the guest has with a real CPU, and nothing here depends on it having
//! gone one way: neither the address nor the direction of the exit is used.
//!
//! All checks of an instruction come before its first effect. A device is read at most once for each element that an
//! instruction moves, and never for an instruction that faults.
//!
//! Nothing here touches a CPU; everything is tested on the host.

mod alu;
mod control;
mod descriptor;
mod execute;
mod floating;
mod kept;
mod operand;
mod shift;
mod stack;
mod status;
mod string;
mod vector;

#[cfg(test)]
mod tests;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, Register};

use nestling::Access;

use crate::guest::entry::Segment;
pub use control::{
    ControlMove, Glance, Glanced, Invalidated, control_move, cr3_write, cr3_write_in_long_mode, cr4_write, glance,
    invalidation,
};
pub use descriptor::SegmentRegister;
pub use floating::{Floating, MmxUse, Wide, WideRegisters};
use kept::Decoded;
pub use kept::{Asked, Kept};
use operand::Space;
pub use status::{StatusWrite, status_write};

/// Longest instruction (APM vol. 3, 1.1).
pub const MAX_INSTRUCTION: usize = 15;

const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
const CR0_PE: u64 = 1 << 0;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;
const SEGMENT_LONG: u16 = 1 << 9;
const SEGMENT_BIG: u16 = 1 << 10;

/// Segments in the order of their encoding, the indices of [`Cpu::segments`].
pub(crate) mod segment {
    pub(crate) const ES: usize = 0;
    pub(crate) const CS: usize = 1;
    pub(crate) const SS: usize = 2;
    pub(crate) const DS: usize = 3;
    pub(crate) const FS: usize = 4;
    pub(crate) const GS: usize = 5;
}

/// The registers that an emulated instruction can change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// By encoding: rax rcx rdx rbx rsp rbp rsi rdi r8 … r15.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// A segment register that was loaded, with its hidden part: beside the others, for it is none of an image to put back.
    pub loaded: Option<(SegmentRegister, Segment)>,
}

/// A vCPU as far as one instruction depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// What may change.
    pub registers: Registers,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Base and limit of the global descriptor table.
    pub gdtr: (u64, u32),
    /// The local descriptor table.
    pub ldtr: Segment,
    /// Physical address bits of the guest's CPU.
    pub physical_bits: u32,
    /// Rights to pages by their protection keys.
    pub pkru: u32,
}

/// Operand, address and instruction sizes by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, 16-bit segments.
    Bits16,
    /// 32-bit segments.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl Cpu {
    /// The mode of the code segment.
    #[must_use]
    pub const fn code_size(&self) -> CodeSize {
        let cs = self.segments[segment::CS].attributes;
        if self.efer & EFER_LMA != 0 && cs & SEGMENT_LONG != 0 {
            CodeSize::Bits64
        } else if self.cr0 & CR0_PE != 0 && self.registers.rflags & RFLAGS_VM == 0 && cs & SEGMENT_BIG != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    /// Registers are 64 bits wide.
    #[must_use]
    pub fn is_64_bit(&self) -> bool {
        self.code_size() == CodeSize::Bits64
    }

    /// An instruction pointer as wide as it is here.
    const fn wrap(&self, rip: u64) -> u64 {
        match self.code_size() {
            CodeSize::Bits64 => rip,
            CodeSize::Bits32 => rip & 0xffff_ffff,
            CodeSize::Bits16 => rip & 0xffff,
        }
    }

    /// Segments are descriptors, not paragraphs.
    const fn protected(&self) -> bool {
        self.cr0 & CR0_PE != 0 && self.registers.rflags & RFLAGS_VM == 0
    }
}

/// The host could not carry out an access: it has no memory left for guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFailure;

/// Guest-physical memory and ports, as one vCPU reaches them.
///
/// No access crosses a page. `bytes` is 1, 2, 4 or 8 for memory and 1, 2 or 4 for ports.
pub trait Bus {
    /// Reads RAM, for instructions and page tables. `false`: not all of it is RAM.
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> bool;
    /// The bytes of an instruction, in one page. `None`: that is not RAM.
    fn read_code(&mut self, gpa: u64) -> Option<[u8; MAX_INSTRUCTION]>;
    /// A page-table entry of 4 or 8 bytes, in one piece. `None`: that is not RAM.
    fn read_entry(&mut self, gpa: u64, bytes: usize) -> Option<u64>;
    /// Reads RAM or a device.
    ///
    /// # Errors
    /// The host's, not the guest's: where nothing is, a bus has an answer too.
    fn read(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure>;
    /// Writes RAM or a device.
    ///
    /// # Errors
    /// As [`Bus::read`].
    fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> Result<(), HostFailure>;
    /// Replaces `old` by `new` in one step. `false`: something else is there now. A device register, which has no such
    /// step, is written.
    ///
    /// # Errors
    /// As [`Bus::read`].
    fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure>;
    /// As [`Bus::compare_exchange`], to mark an entry of a page table as accessed or dirty.
    ///
    /// # Errors
    /// As [`Bus::read`].
    fn mark_entry(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        self.compare_exchange(gpa, bytes, old, new)
    }
    /// The vCPU's x87 and SSE registers.
    fn wide(&mut self) -> &mut dyn Wide;
    /// What this vCPU keeps from instruction to instruction.
    fn kept(&mut self) -> &mut Kept;
    /// [`Kept::page`], with the page tables' entries of so many bytes read as by [`Bus::read_entry`].
    fn page_again(&mut self, asked: &Asked, bytes: usize) -> Option<u64>;
    /// Reads a port.
    fn input(&mut self, port: u16, bytes: usize) -> u32;
    /// Writes a port.
    fn output(&mut self, port: u16, bytes: usize, value: u32);
}

/// An exception for the guest, RIP at the instruction that caused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #DE.
    Divide,
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
    /// #SS(0).
    Stack,
    /// #GP(0).
    GeneralProtection,
    /// #GP with a selector.
    Selector(u16),
    /// #NP with a selector.
    SegmentNotPresent(u16),
    /// #SS with a selector.
    StackSelector(u16),
    /// #PF.
    PageFault {
        /// The error code.
        code: u32,
        /// For CR2.
        address: u64,
    },
    /// #AC(0).
    AlignmentCheck,
    /// #MF.
    FloatingPoint,
}

/// What to do after [`step`], beside taking over the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing: the instruction was executed, or a part of a repeated one.
    Done,
    /// The guest takes this exception.
    Raise(Exception),
    /// This is not an instruction that is emulated, or its code or a page table is not in RAM.
    Unsupported,
    /// The host could not carry it out.
    Host(HostFailure),
}

/// Why an instruction stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Raise(Exception),
    Unsupported,
    Host(HostFailure),
    /// Others change the same memory all the time: let the vCPU take its interrupts and try again.
    Again,
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Raise(exception)
    }
}

impl From<Stop> for End {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Again => Self::Done,
            Stop::Raise(exception) => Self::Raise(exception),
            Stop::Unsupported => Self::Unsupported,
            Stop::Host(failure) => Self::Host(failure),
        }
    }
}

impl From<HostFailure> for Stop {
    fn from(failure: HostFailure) -> Self {
        Self::Host(failure)
    }
}

/// What [`step`] leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// The registers from here on.
    pub registers: Registers,
    /// What else to do.
    pub end: End,
    /// Bytes of the instruction; none if it could not be fetched.
    pub instruction: [u8; MAX_INSTRUCTION],
}

impl Outcome {
    /// Nothing has been done yet.
    #[inline]
    pub fn before(cpu: &Cpu) -> Self {
        Self { registers: cpu.registers, end: End::Done, instruction: [0; MAX_INSTRUCTION] }
    }
}

/// A write to CR8 that is to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskPriorityWrite {
    /// The new priority class, 0 to 15.
    pub class: u8,
    /// RIP behind the instruction.
    pub next_rip: u64,
}

/// Reads the write to CR8 at RIP, which the CPU has stopped at. It is RIP's instruction that counts: if another vCPU has
/// changed it meanwhile, there is nothing to be done, and the vCPU runs on from where it is ([`End::Done`]).
///
/// # Errors
/// What is to be done instead: an exception, or [`End::Unsupported`] if the code is not in RAM.
pub fn task_priority_write(cpu: &Cpu, bus: &mut impl Bus) -> Result<TaskPriorityWrite, End> {
    let mut space = Space::new(cpu, bus);
    let mut bytes = [0; MAX_INSTRUCTION];
    let instruction = fetch(&mut space, &mut bytes).map_err(End::from)?;
    if !matches!(instruction.code(), Code::Mov_cr_r64 | Code::Mov_cr_r32)
        || instruction.op_register(0) != iced_x86::Register::CR8
    {
        return Err(End::Done);
    }
    let mut registers = cpu.registers;
    let value = execute::Machine { space, registers: &mut registers }.register(instruction.op_register(1));
    // Bits 63:4 must be zero (APM vol. 2, 3.1.5).
    match u8::try_from(value) {
        Ok(class @ 0..=15) => Ok(TaskPriorityWrite { class, next_rip: instruction.next_ip() }),
        _ => Err(End::Raise(Exception::GeneralProtection)),
    }
}

/// Makes the decoder's tables, a third of a megabyte that the first decoder would make. For who counts memory.
pub fn prepare() {
    let _ = Decoder::new(64, &[0x90], DecoderOptions::AMD).decode();
}

/// Executes the instruction at RIP.
pub fn step(cpu: &Cpu, bus: &mut impl Bus) -> Outcome {
    let mut outcome = Outcome::before(cpu);
    step_into(cpu, bus, &mut outcome);
    outcome
}

/// The same, for whoever has the place already ([`Outcome::before`]).
pub fn step_into(cpu: &Cpu, bus: &mut impl Bus, outcome: &mut Outcome) {
    let mut space = Space::new(cpu, bus);
    let what = |decoded: &Decoded| decoded.plain.ok_or(decoded.instruction);
    let done = fetch_as(&mut space, &mut outcome.instruction, what).and_then(|decoded| {
        let machine = execute::Machine { space, registers: &mut outcome.registers };
        match decoded {
            Ok(plain) => machine.move_plain(&plain),
            Err(instruction) => machine.execute(&instruction),
        }
    });
    match done {
        Ok(()) => outcome.registers.rflags &= !RFLAGS_RF,
        Err(stop) => outcome.end = End::from(stop),
    }
}

/// An instruction that somebody else executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which it is.
    pub what: Kind,
    /// Where the next begins.
    pub next_rip: u64,
}

/// Instructions that are told apart by [`see`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VMCALL.
    Vmcall,
    /// INT1.
    Int1,
    /// MOV to CR3 or CR4.
    WriteControl,
    /// Any other.
    Other,
}

/// Looks at the instruction at RIP. `None`: it can't be fetched, or is none.
#[must_use]
pub fn see(cpu: &Cpu, bus: &mut impl Bus) -> Option<Seen> {
    let decoded = fetch(&mut Space::new(cpu, bus), &mut [0; MAX_INSTRUCTION]).ok()?;
    let what = match decoded.mnemonic() {
        Mnemonic::Vmcall => Kind::Vmcall,
        Mnemonic::Int1 => Kind::Int1,
        Mnemonic::Mov if matches!(decoded.op_register(0), Register::CR3 | Register::CR4) => Kind::WriteControl,
        _ => Kind::Other,
    };
    Some(Seen { what, next_rip: cpu.wrap(decoded.next_ip()) })
}

/// Fetches and decodes.
fn fetch<B: Bus>(space: &mut Space<'_, B>, bytes: &mut [u8; MAX_INSTRUCTION]) -> Result<Instruction, Stop> {
    fetch_as(space, bytes, |decoded| decoded.instruction)
}

/// The same, for who wants something else of what is kept of it.
fn fetch_as<B: Bus, T>(
    space: &mut Space<'_, B>,
    bytes: &mut [u8; MAX_INSTRUCTION],
    wanted: impl Fn(&Decoded) -> T,
) -> Result<T, Stop> {
    let cpu = space.cpu;
    let size = cpu.code_size();
    let rip = cpu.wrap(cpu.registers.rip);
    let first = match size {
        CodeSize::Bits64 => rip,
        _ => cpu.segments[segment::CS].base.wrapping_add(rip) & 0xffff_ffff,
    };
    let on_first = (4096 - (first & 0xfff) as usize).min(MAX_INSTRUCTION);
    if on_first < MAX_INSTRUCTION {
        return fetch_from_two(space, first, on_first, bytes).map(|i| wanted(&Decoded::new(0, rip, size, i)));
    }
    let gpa = space.translate(first, Access::Execute)?;
    *bytes = space.bus.read_code(gpa).ok_or(Stop::Unsupported)?;
    let mut padded = [0; 16];
    padded[..MAX_INSTRUCTION].copy_from_slice(bytes);
    let padded = u128::from_le_bytes(padded);
    if let Some(decoded) = space.bus.kept().instruction(padded, rip, size) {
        return Ok(wanted(decoded));
    }
    let decoded = Decoded::new(padded, rip, size, decode(size, rip, bytes, None)?);
    space.bus.kept().keep_instruction(decoded);
    Ok(wanted(&decoded))
}

/// Fetches and decodes near a page's end. What lies on the second page counts only if the instruction reaches so far.
#[cold]
fn fetch_from_two<B: Bus>(
    space: &mut Space<'_, B>,
    first: u64,
    on_first: usize,
    bytes: &mut [u8; MAX_INSTRUCTION],
) -> Result<Instruction, Stop> {
    let cpu = space.cpu;
    let (mut have, mut missing) = (0, None);
    for (from, to) in [(0, on_first), (on_first, MAX_INSTRUCTION)] {
        let part = space.translate(first.wrapping_add(from as u64), Access::Execute);
        match part {
            Ok(gpa) if space.bus.read_ram(gpa, &mut bytes[from..to]) => have = to,
            Ok(_) => missing = Some(Stop::Unsupported),
            Err(stop) => missing = Some(stop),
        }
        if missing.is_some() {
            break;
        }
    }
    decode(cpu.code_size(), cpu.wrap(cpu.registers.rip), &bytes[..have], missing)
}

/// Decodes bytes from `rip` on, behind which something is missing.
fn decode(size: CodeSize, rip: u64, bytes: &[u8], missing: Option<Stop>) -> Result<Instruction, Stop> {
    let bits = match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::AMD);
    let mut decoded = decoder.decode();
    if decoded.is_jmp_far_indirect() {
        // With REX.W a pointer of 64 bits and a selector, as test kernels take it to be, and as QEMU and KVM do; a CPU of
        // AMD's reads 32 bits.
        decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
        decoded = decoder.decode();
    }
    match (decoder.last_error(), missing) {
        (DecoderError::NoMoreBytes, Some(stop)) => Err(stop),
        // Fifteen bytes and no end.
        (DecoderError::NoMoreBytes, None) => Err(Exception::GeneralProtection.into()),
        (DecoderError::InvalidInstruction, _) => Err(Exception::InvalidOpcode.into()),
        _ if decoded.code() == Code::INVALID => Err(Exception::InvalidOpcode.into()),
        _ => Ok(decoded),
    }
}
