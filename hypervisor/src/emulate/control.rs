//! Instructions on the registers that say how addresses are translated, of a guest whose CPU has others loaded (APM vol. 3,
//! MOV CRn, CLTS, LMSW, SMSW, INVLPG, INVPCID). They are read here and carried out by the caller.
//!
//! As everywhere, it is the instruction at RIP that counts, and not the one that the CPU stopped at: if another vCPU has
//! written over it meanwhile, there is nothing to be done, and the vCPU goes on from where it is ([`End::Done`]).

use iced_x86::{Code, Register};
use nestling::Access;

use super::execute::{Machine, segment_index};
use super::operand::Space;
use super::{Bus, CR0_PE, Cpu, EFER_LMA, End, Exception, MAX_INSTRUCTION, Stop, fetch};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_SMEP: u64 = 1 << 20;
/// CR3 with PCIDs: translations are kept.
const CR3_KEEPS: u64 = 1 << 63;
/// The PCID's bits in CR3.
const CR3_PCID: u64 = 0xfff;

/// A move between a control register and a general one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlMove {
    /// The control register's number.
    pub control: u8,
    /// The general register, by its encoding.
    pub general: u8,
    /// Into the control register.
    pub write: bool,
    /// What the general register holds, as much of it as is moved.
    pub value: u64,
    /// RIP behind the instruction.
    pub next_rip: u64,
}

/// An instruction of 64-bit code at a glance: one of those that a guest on shadow tables stops at all the time, in the form
/// that compilers give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// What it does.
    pub what: Glanced,
    /// Its length in bytes.
    pub length: u64,
}

/// See [`Glance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glanced {
    /// MOV between a control register, by its number, and a general one, by its encoding.
    Move {
        /// The control register.
        control: u8,
        /// The general register.
        general: u8,
        /// Into the control register.
        write: bool,
    },
    /// INVLPG of the address in a general register.
    Invlpg {
        /// The general register.
        general: u8,
    },
}

/// Looks at the first bytes of an instruction, the lowest first; `None` if it is any other, which [`control_move`] and
/// [`invalidation`] know.
#[inline]
#[must_use]
pub const fn glance(bytes: u32) -> Option<Glance> {
    // MOV with CR3 and one of the first eight registers, as below.
    let moves = bytes & 0x38_fdff == 0x18_200f;
    if moves {
        let (general, write) = ((bytes >> 16) as u8 & 7, bytes & 0x200 != 0);
        return Some(Glance { what: Glanced::Move { control: 3, general, write }, length: 3 });
    }
    let (rex, prefixes) = if bytes & 0xf0 == 0x40 { (bytes as u8, 1) } else { (0, 0) };
    let bytes = bytes >> (8 * prefixes);
    let (escape, opcode, operands) = (bytes as u8, (bytes >> 8) as u8, (bytes >> 16) as u8);
    if escape != 0x0f {
        return None;
    }
    let (middle, low) = (operands >> 3 & 7, operands & 7);
    // REX.R and REX.B.
    let (register, general) = (middle | (rex & 4) << 1, low | (rex & 1) << 3);
    let what = match opcode {
        // Bits 7:6 of the operands are not looked at (APM vol. 3, MOV CRn).
        0x20 | 0x22 => Glanced::Move { control: register, general, write: opcode == 0x22 },
        // No displacement, no index, not relative to RIP.
        0x01 if operands >> 6 == 0 && middle == 7 && low != 4 && low != 5 => Glanced::Invlpg { general },
        _ => return None,
    };
    Some(Glance { what, length: prefixes + 3 })
}

/// What the guest wants to be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidated {
    /// The translation of one address, in the present address space.
    Address(u64),
    /// More than that.
    Everything,
}

/// Reads the move at RIP. `None`: it is SMSW, which the emulator executes.
///
/// # Errors
/// What is to be done instead.
pub fn control_move(cpu: &Cpu, bus: &mut impl Bus) -> Result<Option<ControlMove>, End> {
    let mut space = Space::new(cpu, bus);
    let instruction = fetch(&mut space, &mut [0; MAX_INSTRUCTION]).map_err(End::from)?;
    let (register, general, write) = match instruction.code() {
        Code::Mov_cr_r64 | Code::Mov_cr_r32 => (instruction.op_register(0), instruction.op_register(1), true),
        Code::Mov_r64_cr | Code::Mov_r32_cr => (instruction.op_register(1), instruction.op_register(0), false),
        Code::Smsw_rm16 | Code::Smsw_r32m16 | Code::Smsw_r64m16 => return Ok(None),
        _ => return Err(End::Done),
    };
    privileged(cpu)?;
    let mut registers = cpu.registers;
    let machine = Machine { space, registers: &mut registers };
    Ok(Some(ControlMove {
        control: (register as u32 - Register::CR0 as u32) as u8,
        general: general.number() as u8,
        write,
        value: machine.register(general),
        next_rip: cpu.wrap(instruction.next_ip()),
    }))
}

/// Reads the INVLPG or INVPCID at RIP; and where the next instruction begins.
///
/// # Errors
/// What is to be done instead.
pub fn invalidation(cpu: &Cpu, bus: &mut impl Bus) -> Result<(Invalidated, u64), End> {
    let mut space = Space::new(cpu, bus);
    let instruction = fetch(&mut space, &mut [0; MAX_INSTRUCTION]).map_err(End::from)?;
    let next_rip = cpu.wrap(instruction.next_ip());
    let mut registers = cpu.registers;
    let mut machine = Machine { space, registers: &mut registers };
    match instruction.code() {
        Code::Invlpg_m => {
            privileged(cpu)?;
            let offset = machine.offset(&instruction, 0).map_err(End::from)?;
            let which = segment_index(instruction.memory_segment()).ok_or(End::Unsupported)?;
            let linear = machine.space.base(which).wrapping_add(offset);
            let linear = if cpu.is_64_bit() { linear } else { linear & 0xffff_ffff };
            Ok((Invalidated::Address(linear), next_rip))
        }
        Code::Invpcid_r64_m128 | Code::Invpcid_r32_m128 => {
            privileged(cpu)?;
            let kind = machine.register(instruction.op_register(0));
            let offset = machine.offset(&instruction, 1).map_err(End::from)?;
            let which = segment_index(instruction.memory_segment()).ok_or(End::Unsupported)?;
            let mut word = |at: u64| {
                let place = machine.space.place(which, offset.wrapping_add(at), 8, Access::Read)?;
                machine.space.load(place)
            };
            let words = word(0).and_then(|low| Ok((low, word(8)?)));
            let (pcid, linear) = words.map_err(End::from)?;
            let what = forgotten(cpu, kind, pcid, linear, machine.space.is_canonical(linear));
            Ok((what.ok_or(End::Raise(Exception::GeneralProtection))?, next_rip))
        }
        _ => Err(End::Done),
    }
}

/// What INVPCID forgets; `None` if it faults.
fn forgotten(cpu: &Cpu, kind: u64, pcid: u64, linear: u64, canonical: bool) -> Option<Invalidated> {
    let names_one = kind < 2;
    let wrong = kind > 3 || pcid > CR3_PCID || names_one && pcid != 0 && cpu.cr4 & CR4_PCIDE == 0;
    match kind {
        _ if wrong => None,
        0 if !canonical => None,
        0 if cpu.cr4 & CR4_PCIDE == 0 || cpu.cr3 & CR3_PCID == pcid => Some(Invalidated::Address(linear)),
        _ => Some(Invalidated::Everything),
    }
}

/// What a write of `value` to CR3 puts there, and whether translations are kept; `None` if it faults (APM vol. 2, 3.1.2,
/// 5.3.2 and 5.5.1).
///
/// Of a PAE root the four entries are judged as well (5.2.3): they are what the CPU would load now.
pub fn cr3_write(cpu: &Cpu, bus: &mut impl Bus, value: u64) -> Option<(u64, bool)> {
    if cpu.efer & EFER_LMA == 0 {
        let cr3 = value & 0xffff_ffff;
        return pointers_fit(cpu, bus, cpu.cr0, cpu.cr4, cr3).then_some((cr3, false));
    }
    cr3_write_in_long_mode(cpu.cr4, cpu.physical_bits, value)
}

/// The same in long mode.
#[must_use]
pub const fn cr3_write_in_long_mode(cr4: u64, physical_bits: u32, value: u64) -> Option<(u64, bool)> {
    let pcids = cr4 & CR4_PCIDE != 0;
    let keeps = pcids && value & CR3_KEEPS != 0;
    let cr3 = if pcids { value & !CR3_KEEPS } else { value };
    if cr3 >> physical_bits == 0 { Some((cr3, keeps)) } else { None }
}

/// What a write of `value` to CR4 puts there; `None` if it faults (3.1.3). `offered`: the bits that the guest's CPU has.
pub fn cr4_write(cpu: &Cpu, bus: &mut impl Bus, value: u64, offered: u64) -> Option<u64> {
    let changed = cpu.cr4 ^ value;
    let long = cpu.efer & EFER_LMA != 0;
    let refused = value & !offered != 0
        || long && changed & (CR4_PAE | CR4_LA57) != 0
        || changed & value & CR4_PCIDE != 0 && (!long || cpu.cr3 & CR3_PCID != 0);
    let reloads = changed & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP) != 0;
    let fits = !reloads || pointers_fit(cpu, bus, cpu.cr0, value, cpu.cr3);
    (!refused && fits).then_some(value)
}

/// Whether a write of `cr0` finds pointers that it may load, if it makes the CPU load them.
pub(super) fn cr0_fits(cpu: &Cpu, bus: &mut impl Bus, cr0: u64) -> bool {
    const EFER_LME: u64 = 1 << 8;
    let turned_on = cr0 & !cpu.cr0 & CR0_PG != 0;
    !turned_on || cpu.efer & EFER_LME != 0 || pointers_fit(cpu, bus, cr0, cpu.cr4, cpu.cr3)
}

/// Whether the four entries at the top of a PAE root may be loaded; of any other root there is nothing to be said.
fn pointers_fit(cpu: &Cpu, bus: &mut impl Bus, cr0: u64, cr4: u64, cr3: u64) -> bool {
    if cr0 & CR0_PG == 0 || cr0 & CR0_PE == 0 || cr4 & CR4_PAE == 0 || cpu.efer & EFER_LMA != 0 {
        return true;
    }
    // Bits 8:5 and 2:1, but for the one that is the accessed bit elsewhere: QEMU's emulation (7.2) sets it here too when it
    // walks, and a guest that pages again would be refused the pointers that it paged with before.
    let reserved = u64::MAX << cpu.physical_bits.clamp(32, 52) | 0x1c6;
    (0..4).all(|index| match bus.read_entry((cr3 & 0xffff_ffe0) + index * 8, 8) {
        Some(pointer) => pointer & 1 == 0 || pointer & reserved == 0,
        // What is there is found out when it is used.
        None => true,
    })
}

pub(super) fn privileged(cpu: &Cpu) -> Result<(), End> {
    if cpu.cpl == 0 { Ok(()) } else { Err(End::from(Stop::from(Exception::GeneralProtection))) }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Instruction};

    use super::*;

    fn decoded(bytes: u64) -> Instruction {
        Decoder::new(64, &bytes.to_le_bytes(), DecoderOptions::AMD).decode()
    }

    /// A glance at every such instruction sees what the decoder does, and sees each in the forms that it knows.
    #[test]
    fn a_glance_agrees_with_the_decoder() {
        let prefixes = (0x40..0x50).map(Some).chain([None]);
        for (rex, opcode, operands) in prefixes.flat_map(|rex| {
            [0x00, 0x01, 0x20, 0x21, 0x22].into_iter().flat_map(move |code| (0..=255).map(move |rm| (rex, code, rm)))
        }) {
            let mut all = [0x11; 8];
            let instruction = rex.into_iter().chain([0x0f, opcode, operands]);
            all.iter_mut().zip(instruction).for_each(|(place, byte)| *place = byte);
            let (bytes, decoded) = (u64::from_le_bytes(all), decoded(u64::from_le_bytes(all)));
            let Some(Glance { what, length }) = glance(bytes as u32) else {
                assert!(!matches!(decoded.code(), Code::Mov_cr_r64 | Code::Mov_r64_cr), "{decoded:?}");
                continue;
            };
            match what {
                // There are registers 0, 2, 3, 4 and 8: the others are no instruction, which no CPU stops at.
                Glanced::Move { .. } if decoded.code() == Code::INVALID => {}
                Glanced::Move { control, general, write } => {
                    let (to, from) = (decoded.op_register(0), decoded.op_register(1));
                    let (register, other) = if write { (to, from) } else { (from, to) };
                    assert_eq!(u32::from(control), register as u32 - Register::CR0 as u32, "{decoded:?}");
                    assert_eq!((usize::from(general), length as usize), (other.number(), decoded.len()), "{decoded:?}");
                }
                Glanced::Invlpg { general } => {
                    assert_eq!(decoded.code(), Code::Invlpg_m);
                    assert_eq!(usize::from(general), decoded.memory_base().number(), "{decoded:?}");
                    assert_eq!((decoded.memory_index(), decoded.memory_displacement64()), (Register::None, 0));
                    assert_eq!(length as usize, decoded.len(), "{decoded:?}");
                }
            }
        }
    }

    #[test]
    fn what_has_other_prefixes_or_operands_is_not_for_a_glance() {
        // LOCK MOV CR0 (CR8), INVLPG in GS, with a displacement, relative to RIP, by SIB; SWAPGS; INVLPG's neighbour.
        for instruction in [
            &[0xf0, 0x0f, 0x22, 0xc0][..],
            &[0x65, 0x0f, 0x01, 0x38],
            &[0x0f, 0x01, 0x78, 0x08],
            &[0x0f, 0x01, 0x3d],
            &[0x0f, 0x01, 0x3c, 0x24],
            &[0x0f, 0x01, 0xf8],
            &[0x0f, 0x01, 0x30],
        ] {
            let mut bytes = [0; 8];
            bytes[..instruction.len()].copy_from_slice(instruction);
            assert_eq!(glance(u64::from_le_bytes(bytes) as u32), None, "{instruction:x?}");
        }
        let write = glance(0x00d8_220f).expect("MOV CR3, RAX");
        assert_eq!(write, Glance { what: Glanced::Move { control: 3, general: 0, write: true }, length: 3 });
        let forgets = glance(0x003f_010f).expect("INVLPG [RDI]");
        assert_eq!(forgets, Glance { what: Glanced::Invlpg { general: 7 }, length: 3 });
    }
}
