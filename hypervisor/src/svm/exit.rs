//! What an exit means: EXITCODE and its details (appendix C) as a typed value.

use super::vmcb::Control;

/// The direction of a port access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// IN, INS.
    In,
    /// OUT, OUTS.
    Out,
}

/// A port access (15.10.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub bytes: u8,
    /// Which way.
    pub direction: Direction,
    /// INS or OUTS: memory is the other side, not RAX.
    pub string: bool,
    /// Address of the instruction behind.
    pub next_rip: u64,
}

/// The cause of a nested page fault (15.25.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NestedFault {
    /// The guest physical address.
    pub gpa: u64,
    /// The error code, as of #PF; bits 32 and 33 tell a final access from a walk.
    pub code: u64,
}

impl NestedFault {
    /// The entry was present: a right is missing, or (also) [`NestedFault::reserved`].
    #[must_use]
    pub const fn present(self) -> bool {
        self.code & 1 << 0 != 0
    }

    /// A write, or a walk: walks count as writes, as they set accessed and dirty bits.
    #[must_use]
    pub const fn write(self) -> bool {
        self.code & 1 << 1 != 0
    }

    /// A reserved bit was set in an entry.
    #[must_use]
    pub const fn reserved(self) -> bool {
        self.code & 1 << 3 != 0
    }

    /// An instruction fetch.
    #[must_use]
    pub const fn fetch(self) -> bool {
        self.code & 1 << 4 != 0
    }

    /// The guest's own page tables were being read.
    #[must_use]
    pub const fn guest_walk(self) -> bool {
        self.code & 1 << 33 != 0
    }
}

/// Why a guest was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// A physical interrupt waits.
    Interrupt,
    /// A physical NMI waits.
    Nmi,
    /// The guest can take an interrupt now; it was asked to say so.
    InterruptWindow,
    /// The guest is about to execute IRET; it was asked to say so.
    Iret,
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// A port access.
    Port(PortAccess),
    /// A nested page fault.
    NestedFault(NestedFault),
    /// VMMCALL.
    Hypercall,
    /// INVD or WBINVD: the guest's caches are coherent without it.
    CacheFlush,
    /// An instruction that this guest's CPU does not have.
    Undefined,
    /// RDPMC: the guest has no counters.
    NoCounters,
    /// XSETBV.
    SetExtendedControl,
    /// Shutdown: a triple fault.
    Shutdown,
    /// VMRUN found the state wrong.
    Invalid,
    /// Anything that was not asked for.
    Unexpected,
}

/// Reads the exit of a control block.
#[must_use]
#[inline]
pub fn decode(control: &Control) -> Exit {
    decode_raw(control.exit_code, control.exit_info_1, control.exit_info_2)
}

/// As [`decode`], of the three words themselves.
#[must_use]
#[inline]
pub fn decode_raw(code: u64, info1: u64, info2: u64) -> Exit {
    match code {
        0x60 => Exit::Interrupt,
        0x61 => Exit::Nmi,
        0x64 => Exit::InterruptWindow,
        0x6f => Exit::NoCounters,
        0x72 => Exit::Cpuid,
        0x74 => Exit::Iret,
        0x76 | 0x89 => Exit::CacheFlush,
        0x78 => Exit::Halt,
        0x7b => decode_port(info1, info2).map_or(Exit::Unexpected, Exit::Port),
        0x7c if info1 & 1 != 0 => Exit::WriteMsr,
        0x7c => Exit::ReadMsr,
        0x7f => Exit::Shutdown,
        0x81 => Exit::Hypercall,
        // RSM outside SMM, INVLPGA, VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, MONITOR, MWAIT, RDPRU.
        0x73 | 0x7a | 0x80 | 0x82..=0x86 | 0x8a..=0x8c | 0x8e => Exit::Undefined,
        0x8d => Exit::SetExtendedControl,
        0x400 => Exit::NestedFault(NestedFault { gpa: info2, code: info1 }),
        // QEMU writes the low half only.
        0xffff_ffff_ffff_ffff | 0xffff_ffff => Exit::Invalid,
        _ => Exit::Unexpected,
    }
}

/// A port access from EXITINFO1 and 2.
fn decode_port(info: u64, next_rip: u64) -> Option<PortAccess> {
    let bytes = match info >> 4 & 7 {
        0b001 => 1,
        0b010 => 2,
        0b100 => 4,
        _ => return None,
    };
    let direction = if info & 1 != 0 { Direction::In } else { Direction::Out };
    Some(PortAccess { port: (info >> 16) as u16, bytes, direction, string: info & 1 << 2 != 0, next_rip })
}

/// A name for counting, one a kind of exit.
#[must_use]
pub const fn name(exit: &Exit) -> &'static str {
    NAMES[index(exit)]
}

/// How many kinds there are.
pub const KINDS: usize = 18;

/// The names, by [`index`].
pub const NAMES: [&str; KINDS] = [
    "interrupt",
    "nmi",
    "interrupt_window",
    "iret",
    "cpuid",
    "hlt",
    "rdmsr",
    "wrmsr",
    "io",
    "npf",
    "vmmcall",
    "cache_flush",
    "undefined",
    "rdpmc",
    "xsetbv",
    "shutdown",
    "invalid",
    "unexpected",
];

/// The kind's number.
#[must_use]
pub const fn index(exit: &Exit) -> usize {
    match exit {
        Exit::Interrupt => 0,
        Exit::Nmi => 1,
        Exit::InterruptWindow => 2,
        Exit::Iret => 3,
        Exit::Cpuid => 4,
        Exit::Halt => 5,
        Exit::ReadMsr => 6,
        Exit::WriteMsr => 7,
        Exit::Port(_) => 8,
        Exit::NestedFault(_) => 9,
        Exit::Hypercall => 10,
        Exit::CacheFlush => 11,
        Exit::Undefined => 12,
        Exit::NoCounters => 13,
        Exit::SetExtendedControl => 14,
        Exit::Shutdown => 15,
        Exit::Invalid => 16,
        Exit::Unexpected => 17,
    }
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
    }

    #[test]
    fn fault_codes_are_told_apart() {
        let walk = NestedFault { gpa: 0x1000, code: 1 << 33 | 0b111 };
        assert!(walk.guest_walk() && walk.present() && walk.write() && !walk.fetch() && !walk.reserved());
    }
}
