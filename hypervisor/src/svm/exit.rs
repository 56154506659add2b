//! What an exit means: EXITCODE and its details (appendix C) in the VM's terms.

use nestling::guest::{FaultCode, PageFault};
use nestling::{Access, Cause, Fault, Gpa};

use crate::vm::exit::{Direction, Exit, Intercepted, PortAccess};

/// EXITCODE of a MOV from CR3.
pub const READ_CR3: u64 = 0x03;
/// EXITCODE of a MOV to CR3.
pub const WRITE_CR3: u64 = 0x13;
/// EXITCODE of an INVLPG.
pub const INVLPG: u64 = 0x79;
/// EXITCODE of a nested page fault.
pub const NESTED_FAULT: u64 = 0x400;

/// Reads an exit: EXITCODE, EXITINFO1, EXITINFO2.
#[inline]
#[must_use]
pub fn decode(code: u64, info1: u64, info2: u64) -> Exit {
    match code {
        0x00 | READ_CR3 | 0x04 => Exit::ReadControl,
        0x10 => Exit::WriteStatus,
        WRITE_CR3 | 0x14 => Exit::WriteControl,
        0x18 => Exit::WriteTaskPriority,
        0x41 => Exit::Exception(Intercepted::Debug),
        0x46 => Exit::InvalidOpcode,
        0x4e => Exit::PageFault(PageFault { code: FaultCode::from_bits_truncate(info1 as u32), address: info2 }),
        0x51 => Exit::Exception(Intercepted::AlignmentCheck),
        0x60 => Exit::Interrupt,
        0x61 => Exit::Nmi,
        0x64 => Exit::InterruptWindow,
        0x65 => Exit::WriteStatus,
        0x6f => Exit::NoCounters,
        0x72 => Exit::Cpuid,
        0x74 => Exit::NmiWindow,
        0x76 | 0x89 => Exit::CacheFlush,
        0x78 => Exit::Halt,
        INVLPG | 0xa2 => Exit::Invalidate,
        0x7b => decode_port(info1, info2).map_or(Exit::Unexpected, Exit::Port),
        0x7c if info1 & 1 != 0 => Exit::WriteMsr,
        0x7c => Exit::ReadMsr,
        0x7d => Exit::TaskSwitch,
        0x7f => Exit::Shutdown,
        0x81 => Exit::Hypercall,
        0x88 => Exit::Int1,
        // RSM outside SMM, INVLPGA, VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, MONITOR, MWAIT, RDPRU.
        0x73 | 0x7a | 0x80 | 0x82..=0x86 | 0x8a..=0x8c | 0x8e => Exit::Undefined,
        0x8d => Exit::SetExtendedControl,
        NESTED_FAULT => Exit::Fault(decode_fault(info1, info2)),
        // QEMU writes the low half only.
        0xffff_ffff_ffff_ffff | 0xffff_ffff => Exit::Invalid,
        _ => Exit::Unexpected,
    }
}

/// A nested page fault (15.25.6): the error code is that of #PF. Walks of the guest's tables count as writes, as they set
/// accessed and dirty bits there.
#[inline]
#[must_use]
pub fn decode_fault(info1: u64, gpa: u64) -> Fault {
    const WRITE: u64 = 1 << 1;
    const RESERVED: u64 = 1 << 3;
    const FETCH: u64 = 1 << 4;
    let access = match (info1 & FETCH != 0, info1 & WRITE != 0) {
        (true, _) => Access::Execute,
        (false, true) => Access::Write,
        (false, false) => Access::Read,
    };
    let cause = if info1 & RESERVED != 0 { Cause::Reserved } else { Cause::Translation };
    Fault { gpa: Gpa(gpa), access, cause }
}

/// A port access (15.10.2).
#[inline]
fn decode_port(info1: u64, next_rip: u64) -> Option<PortAccess> {
    let bytes = match info1 >> 4 & 7 {
        0b001 => 1,
        0b010 => 2,
        0b100 => 4,
        _ => return None,
    };
    let direction = if info1 & 1 != 0 { Direction::In } else { Direction::Out };
    Some(PortAccess { port: (info1 >> 16) as u16, bytes, direction, string: info1 & 1 << 2 != 0, next_rip })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_accesses_are_decoded() {
        // outb to 0x3f8; rep insw from 0x1f0; an access of three bytes does not exist.
        let out = decode_port(0x3f8 << 16 | 1 << 4, 0x1002).unwrap();
        assert_eq!((out.port, out.bytes, out.direction, out.string), (0x3f8, 1, Direction::Out, false));
        let ins = decode_port(0x1f0 << 16 | 1 << 5 | 1 << 3 | 1 << 2 | 1, 0).unwrap();
        assert_eq!((ins.port, ins.bytes, ins.direction, ins.string), (0x1f0, 2, Direction::In, true));
        assert_eq!(decode_port(3 << 4, 0), None);
        assert_eq!(decode(0x7b, 3 << 4, 0), Exit::Unexpected);
    }

    #[test]
    fn faults_are_decoded() {
        let fault = |info1| decode_fault(info1, 0x1234);
        assert_eq!(fault(1 << 32 | 0b100), Fault { gpa: Gpa(0x1234), access: Access::Read, cause: Cause::Translation });
        assert_eq!(fault(1 << 33 | 0b111).access, Access::Write);
        assert_eq!(fault(1 << 32 | 1 << 4).access, Access::Execute);
        assert_eq!(fault(1 << 32 | 1 << 3 | 1).cause, Cause::Reserved);
    }
}
