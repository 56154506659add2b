//! Why a guest was left, in no CPU vendor's numbers.

use nestling::Fault;
use nestling::guest::PageFault;

/// The direction of a port access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// IN, INS.
    In,
    /// OUT, OUTS.
    Out,
}

/// A port access.
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

/// An exception that is intercepted to keep the CPU in our hands, and given on to the guest.
///
/// A guest can make the delivery of either raise it again, for ever, without ever reaching an instruction boundary where
/// an interrupt would end its run. An exit in each round is such a boundary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intercepted {
    /// #DB.
    Debug,
    /// #AC.
    AlignmentCheck,
}

/// Something to raise in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Raised {
    /// #DE.
    Divide,
    /// #NM.
    DeviceNotAvailable,
    /// #UD.
    InvalidOpcode,
    /// #MF.
    FloatingPoint,
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
    /// One that was intercepted.
    Again(Intercepted),
}

/// Why a guest was left. In the order of [`Exit::index`], so that it is no table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// A physical interrupt waits.
    Interrupt,
    /// A physical NMI waits.
    Nmi,
    /// The guest can take an interrupt now; it was asked to say so.
    InterruptWindow,
    /// The guest has come nearer to where it can take an NMI; it was asked to say so.
    NmiWindow,
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
    /// A second-stage fault.
    Fault(Fault),
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
    /// An exception that is only watched.
    Exception(Intercepted),
    /// Shutdown: a triple fault.
    Shutdown,
    /// The CPU found the guest's state wrong.
    Invalid,
    /// Anything that was not asked for.
    Unexpected,
    /// INT1: the instruction, not yet executed, raises #DB behind itself.
    Int1,
    /// An instruction has raised #UD, which did not reach the guest.
    InvalidOpcode,
    /// A write to CR8 while an interrupt is offered to the guest, or held back by its priority.
    WriteTaskPriority,
    /// A write to CR0 (MOV, LMSW, CLTS) that the guest is not to make itself: one that changes more than TS and MP, or any.
    WriteStatus,
    /// A page fault in shadow tables; whether it is the guest's, its own tables say.
    PageFault(PageFault),
    /// MOV from CR0, CR3 or CR4, or SMSW, where the guest's is not the CPU's.
    ReadControl,
    /// MOV to CR3 or CR4.
    WriteControl,
    /// INVLPG or INVPCID.
    Invalidate,
    /// A task switch.
    TaskSwitch,
}

/// How many kinds there are.
pub const KINDS: usize = 28;

/// A name a kind, by [`Exit::index`].
pub const NAMES: [&str; KINDS] = [
    "interrupt",
    "nmi",
    "interrupt_window",
    "nmi_window",
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
    "exception",
    "shutdown",
    "invalid",
    "unexpected",
    "int1",
    "invalid_opcode",
    "cr8_write",
    "cr0_write",
    "page_fault",
    "cr_read",
    "cr_write",
    "invlpg",
    "task_switch",
];

impl Exit {
    /// The kind's number, for counting.
    #[inline]
    #[must_use]
    pub const fn index(&self) -> usize {
        match self {
            Self::Interrupt => 0,
            Self::Nmi => 1,
            Self::InterruptWindow => 2,
            Self::NmiWindow => 3,
            Self::Cpuid => 4,
            Self::Halt => 5,
            Self::ReadMsr => 6,
            Self::WriteMsr => 7,
            Self::Port(_) => 8,
            Self::Fault(_) => 9,
            Self::Hypercall => 10,
            Self::CacheFlush => 11,
            Self::Undefined => 12,
            Self::NoCounters => 13,
            Self::SetExtendedControl => 14,
            Self::Exception(_) => 15,
            Self::Shutdown => 16,
            Self::Invalid => 17,
            Self::Unexpected => 18,
            Self::Int1 => 19,
            Self::InvalidOpcode => 20,
            Self::WriteTaskPriority => 21,
            Self::WriteStatus => 22,
            Self::PageFault(_) => 23,
            Self::ReadControl => 24,
            Self::WriteControl => 25,
            Self::Invalidate => 26,
            Self::TaskSwitch => 27,
        }
    }
}

/// An exit about translation with which nothing else came: no event was on its way in, and the guest could go on as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Met {
    /// What it is: a second-stage fault; on shadow tables a move from or to a control register, or INVLPG.
    pub exit: Exit,
    /// As the CPU gave it.
    pub raw: RawExit,
    /// Where the guest is.
    pub rip: u64,
}

/// An exit as the CPU gave it, for reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawExit {
    /// The code.
    pub code: u64,
    /// First detail.
    pub info1: u64,
    /// Second detail.
    pub info2: u64,
}
