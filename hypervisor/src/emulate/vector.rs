//! Moves between XMM registers and memory: what memcpy and memset of real guests use, also where a buffer is a device's.
//!
//! An operand of 16 bytes moves as two of 8, the lower one first; devices have no registers that are wider. Both halves are
//! translated before the first one moves. Nothing is computed here: instructions that calculate are not executed.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use nestling::Access;

use super::execute::{Machine, segment_index};
use super::operand::{Place, mask};
use super::{Bus, Exception, Stop};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;

/// Whether an instruction only moves. (MOVSD is also a string instruction, which this does not tell.)
pub(super) const fn is_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movdqu
            | M::Movdqa
            | M::Movups
            | M::Movaps
            | M::Movupd
            | M::Movapd
            | M::Lddqu
            | M::Movntdq
            | M::Movntdqa
            | M::Movntps
            | M::Movntpd
            | M::Movd
            | M::Movq
            | M::Movss
            | M::Movsd
            | M::Movlps
            | M::Movlpd
            | M::Movhps
            | M::Movhpd
    )
}

const fn must_be_aligned(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Movdqa | M::Movaps | M::Movapd | M::Movntdq | M::Movntdqa | M::Movntps | M::Movntpd)
}

/// A memory operand, in parts of up to 8 bytes.
struct Parts {
    low: Place,
    high: Option<Place>,
    bytes: usize,
}

impl<B: Bus> Machine<'_, '_, B> {
    pub(super) fn move_vector(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let cpu = self.space.cpu;
        if cpu.cr0 & CR0_EM != 0 || cpu.cr4 & CR4_OSFXSR == 0 {
            return Err(Exception::InvalidOpcode.into());
        }
        if cpu.cr0 & CR0_TS != 0 {
            return Err(Exception::DeviceNotAvailable.into());
        }
        match (instruction.op_kind(0), instruction.op_kind(1)) {
            (OpKind::Register, OpKind::Memory) => self.load_vector(instruction, instruction.op_register(0)),
            (OpKind::Memory, OpKind::Register) => self.store_vector(instruction, instruction.op_register(1)),
            // Between registers nothing meets a device.
            _ => Err(Stop::Unsupported),
        }
    }

    fn load_vector(&mut self, instruction: &Instruction, register: Register) -> Result<(), Stop> {
        let index = xmm(register)?;
        let parts = self.parts(instruction, 1, Access::Read)?;
        let low = self.space.load(parts.low)?;
        let high = match parts.high {
            Some(place) => self.space.load(place)?,
            None => 0,
        };
        let [was_low, was_high] = self.space.bus.wide().vector(index);
        let value = match half(instruction.mnemonic()) {
            Some(Half::Low) => [low, was_high],
            Some(Half::High) => [was_low, low],
            // What is shorter clears the rest.
            None => [low, high],
        };
        self.space.bus.wide().set_vector(index, value);
        Ok(())
    }

    fn store_vector(&mut self, instruction: &Instruction, register: Register) -> Result<(), Stop> {
        let [low, high] = self.space.bus.wide().vector(xmm(register)?);
        let first = if half(instruction.mnemonic()) == Some(Half::High) { high } else { low };
        let parts = self.parts(instruction, 0, Access::Write)?;
        self.space.store(parts.low, first & mask(parts.bytes))?;
        if let Some(place) = parts.high {
            self.space.store(place, high)?;
        }
        Ok(())
    }

    fn parts(&mut self, instruction: &Instruction, index: u32, access: Access) -> Result<Parts, Stop> {
        let bytes = instruction.memory_size().size();
        let offset = self.offset(instruction, index)?;
        let segment = segment_index(instruction.memory_segment()).ok_or(Stop::Unsupported)?;
        match bytes {
            4 | 8 => Ok(Parts { low: self.space.place(segment, offset, bytes, access)?, high: None, bytes }),
            16 => {
                if must_be_aligned(instruction.mnemonic()) && !self.is_aligned(segment, offset) {
                    return Err(Exception::GeneralProtection.into());
                }
                let low = self.space.place(segment, offset, 8, access)?;
                let high = self.space.place(segment, offset.wrapping_add(8), 8, access)?;
                Ok(Parts { low, high: Some(high), bytes })
            }
            _ => Err(Stop::Unsupported),
        }
    }

    /// Whether an operand of 16 bytes has an address that is a multiple of it: the linear one counts.
    fn is_aligned(&self, segment: usize, offset: u64) -> bool {
        self.space.base(segment).wrapping_add(offset).is_multiple_of(16)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

/// The half of the register that an instruction moves without touching the other.
const fn half(mnemonic: Mnemonic) -> Option<Half> {
    match mnemonic {
        Mnemonic::Movlps | Mnemonic::Movlpd => Some(Half::Low),
        Mnemonic::Movhps | Mnemonic::Movhpd => Some(Half::High),
        _ => None,
    }
}

/// The number of an XMM register; MMX registers are not reached from here.
fn xmm(register: Register) -> Result<usize, Stop> {
    if register.is_xmm() && register.number() < 16 { Ok(register.number()) } else { Err(Stop::Unsupported) }
}
