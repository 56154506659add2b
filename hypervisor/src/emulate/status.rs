//! Writes to CR0 that the CPU is not to make itself: MOV, LMSW and CLTS (APM vol. 3; what may be written: vol. 2, 3.1.1 and
//! 14.6). The caller puts the value in place and does what follows from it.

use iced_x86::{Code, Register};

use super::control::{cr0_fits, privileged};
use super::execute::Machine;
use super::operand::Space;
use super::{Bus, CR0_PE, Cpu, EFER_LMA, End, Exception, MAX_INSTRUCTION, SEGMENT_LONG, Stop, fetch, segment};

const CR0_TS: u64 = 1 << 3;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG; what is written to the others is lost.
const CR0_BITS: u64 = 0xe005_003f;
/// Always set.
const CR0_ET: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PCIDE: u64 = 1 << 17;
const EFER_LME: u64 = 1 << 8;

/// A write to CR0 that is to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusWrite {
    /// The new value.
    pub cr0: u64,
    /// RIP behind the instruction.
    pub next_rip: u64,
}

/// Reads the write to CR0 at RIP, which the CPU has stopped at. As with CR8, it is RIP's instruction that counts: another one
/// is executed by the vCPU itself ([`End::Done`]).
///
/// # Errors
/// What is to be done instead: an exception, or [`End::Unsupported`] if the code is not in RAM.
pub fn status_write(cpu: &Cpu, bus: &mut impl Bus) -> Result<StatusWrite, End> {
    let mut space = Space::new(cpu, bus);
    let mut bytes = [0; MAX_INSTRUCTION];
    let instruction = fetch(&mut space, &mut bytes).map_err(End::from)?;
    let mut registers = cpu.registers;
    let mut machine = Machine { space, registers: &mut registers };
    let value = match instruction.code() {
        Code::Mov_cr_r64 | Code::Mov_cr_r32 if instruction.op_register(0) == Register::CR0 => {
            privileged(cpu)?;
            machine.register(instruction.op_register(1))
        }
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 => {
            privileged(cpu)?;
            let source = machine.source(&instruction, 0, 2);
            // PE to TS; PE can be set so, and not cleared.
            cpu.cr0 & !0xe | source.map_err(End::from)? & 0xf
        }
        Code::Clts => {
            privileged(cpu)?;
            cpu.cr0 & !CR0_TS
        }
        _ => return Err(End::Done),
    };
    let next_rip = cpu.wrap(instruction.next_ip());
    match allowed(cpu, value).filter(|cr0| cr0_fits(cpu, machine.space.bus, *cr0)) {
        Some(cr0) => Ok(StatusWrite { cr0, next_rip }),
        None => Err(End::from(Stop::from(Exception::GeneralProtection))),
    }
}

/// What CR0 is after a write of `value`; `None` if it may not be written.
fn allowed(cpu: &Cpu, value: u64) -> Option<u64> {
    let (paging, protected) = (value & CR0_PG != 0, value & CR0_PE != 0);
    let long = cpu.segments[segment::CS].attributes & SEGMENT_LONG != 0;
    let refused = value >> 32 != 0
        || paging && !protected
        || value & CR0_NW != 0 && value & CR0_CD == 0
        // Into long mode: only with PAE, and not from code that would be 64-bit code at once.
        || paging && cpu.cr0 & CR0_PG == 0 && cpu.efer & EFER_LME != 0 && (cpu.cr4 & CR4_PAE == 0 || long)
        // Out of it: not from 64-bit code, and not with PCIDs.
        || !paging && cpu.efer & EFER_LMA != 0 && (long || cpu.cr4 & CR4_PCIDE != 0);
    (!refused).then_some(value & CR0_BITS | CR0_ET)
}
