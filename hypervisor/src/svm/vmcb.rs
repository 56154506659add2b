//! The virtual machine control block (appendix B): one 4 KiB page the CPU reads at VMRUN and writes at #VMEXIT.
//!
//! The page is the CPU's while a guest runs and ours otherwise; both never at once, so plain fields do. Offsets are
//! checked at the end of the file.

use core::mem::{offset_of, size_of};

use bitflags::bitflags;

bitflags! {
    /// First word of instruction intercepts, offset 0x00c.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Intercepts1: u32 {
        /// Physical interrupts.
        const INTR = 1 << 0;
        /// Physical NMIs.
        const NMI = 1 << 1;
        /// Physical SMIs.
        const SMI = 1 << 2;
        /// Physical INIT.
        const INIT = 1 << 3;
        /// A virtual interrupt is about to be taken.
        const VINTR = 1 << 4;
        /// Writes to CR0 that change more than TS and MP (15.8.1).
        const SELECTIVE_CR0 = 1 << 5;
        /// RDPMC.
        const RDPMC = 1 << 15;
        /// CPUID.
        const CPUID = 1 << 18;
        /// RSM.
        const RSM = 1 << 19;
        /// IRET.
        const IRET = 1 << 20;
        /// INVD.
        const INVD = 1 << 22;
        /// HLT.
        const HLT = 1 << 24;
        /// INVLPG.
        const INVLPG = 1 << 25;
        /// INVLPGA.
        const INVLPGA = 1 << 26;
        /// Port accesses marked in the I/O permission map.
        const IO = 1 << 27;
        /// MSR accesses marked in the MSR permission map.
        const MSR = 1 << 28;
        /// Task switches.
        const TASK_SWITCH = 1 << 29;
        /// Shutdown.
        const SHUTDOWN = 1 << 31;
    }
}

bitflags! {
    /// Second word of instruction intercepts, offset 0x010.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Intercepts2: u32 {
        /// VMRUN. Must be set, else VMRUN fails.
        const VMRUN = 1 << 0;
        /// VMMCALL.
        const VMMCALL = 1 << 1;
        /// VMLOAD.
        const VMLOAD = 1 << 2;
        /// VMSAVE.
        const VMSAVE = 1 << 3;
        /// STGI.
        const STGI = 1 << 4;
        /// CLGI.
        const CLGI = 1 << 5;
        /// SKINIT.
        const SKINIT = 1 << 6;
        /// INT1, also called ICEBP.
        const INT1 = 1 << 8;
        /// WBINVD and WBNOINVD.
        const WBINVD = 1 << 9;
        /// MONITOR.
        const MONITOR = 1 << 10;
        /// MWAIT.
        const MWAIT = 1 << 11;
        /// MWAIT when the monitor is armed.
        const MWAIT_ARMED = 1 << 12;
        /// XSETBV.
        const XSETBV = 1 << 13;
        /// RDPRU.
        const RDPRU = 1 << 14;
    }
}

bitflags! {
    /// Third word of instruction intercepts, offset 0x014.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Intercepts3: u32 {
        /// INVPCID.
        const INVPCID = 1 << 2;
    }
}

/// Bits of the virtual-interrupt word, offset 0x060 (15.21).
pub mod virtual_interrupt {
    /// The virtual task-priority register.
    pub const TPR: u64 = 0xff;
    /// A virtual interrupt is pending.
    pub const REQUEST: u64 = 1 << 8;
    /// It is taken whatever the virtual TPR says.
    pub const IGNORE_TPR: u64 = 1 << 20;
    /// The guest's IF holds back virtual interrupts only; physical ones follow the host's.
    pub const MASKING: u64 = 1 << 24;
    /// Where its vector is.
    pub const VECTOR_SHIFT: u32 = 32;
}

/// What TLB_CONTROL asks of the next VMRUN (15.16.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum TlbControl {
    /// Nothing.
    Keep = 0,
    /// Every ASID's translations on this CPU.
    FlushAll = 1,
    /// This ASID's translations.
    FlushAsid = 3,
}

/// Bit 0 of the nested-paging word, offset 0x090.
pub const NESTED_PAGING: u64 = 1;

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40 in twelve.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// The control area.
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// CR reads that exit.
    pub cr_reads: u16,
    /// CR writes that exit.
    pub cr_writes: u16,
    /// DR reads that exit.
    pub dr_reads: u16,
    /// DR writes that exit.
    pub dr_writes: u16,
    /// Exceptions that exit.
    pub exceptions: u32,
    /// See [`Intercepts1`].
    pub intercepts_1: u32,
    /// See [`Intercepts2`].
    pub intercepts_2: u32,
    /// See [`Intercepts3`].
    pub intercepts_3: u32,
    reserved_1: [u8; 0x03c - 0x018],
    /// Threshold of the pause filter.
    pub pause_threshold: u16,
    /// Count of the pause filter.
    pub pause_count: u16,
    /// Address of the I/O permission map.
    pub io_map: u64,
    /// Address of the MSR permission map.
    pub msr_map: u64,
    /// Added to the TSC.
    pub tsc_offset: u64,
    /// Address-space identifier.
    pub asid: u32,
    /// See [`TlbControl`].
    pub tlb_control: u32,
    /// See [`virtual_interrupt`].
    pub virtual_interrupt: u64,
    /// Bit 0: the next instruction is in an interrupt shadow.
    pub shadow: u64,
    /// Why the guest was left.
    pub exit_code: u64,
    /// First detail.
    pub exit_info_1: u64,
    /// Second detail.
    pub exit_info_2: u64,
    /// The event whose delivery was interrupted by the exit.
    pub exit_event: u64,
    /// See [`NESTED_PAGING`].
    pub nested: u64,
    reserved_2: [u8; 0x0a8 - 0x098],
    /// The event to deliver first.
    pub event: u64,
    /// The nested page table's root.
    pub nested_root: u64,
    /// Bit 0: virtualise the last-branch records.
    pub last_branch: u64,
    /// What of the block is unchanged since the last VMRUN: a set bit lets the CPU use its copy.
    pub clean: u64,
    /// Address of the next instruction, where the CPU has next-RIP save.
    pub next_rip: u64,
    reserved_3: [u8; 0x400 - 0x0d0],
}

/// The state-save area.
#[derive(Debug)]
#[repr(C)]
pub struct Save {
    /// ES.
    pub es: Segment,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// DS.
    pub ds: Segment,
    /// FS, by VMLOAD and VMSAVE.
    pub fs: Segment,
    /// GS, by VMLOAD and VMSAVE.
    pub gs: Segment,
    /// GDTR: base and limit.
    pub gdtr: Segment,
    /// LDTR, by VMLOAD and VMSAVE.
    pub ldtr: Segment,
    /// IDTR: base and limit.
    pub idtr: Segment,
    /// TR, by VMLOAD and VMSAVE.
    pub tr: Segment,
    reserved_1: [u8; 0x0cb - 0x0a0],
    /// Privilege level.
    pub cpl: u8,
    reserved_2: u32,
    /// EFER.
    pub efer: u64,
    reserved_3: [u8; 0x148 - 0x0d8],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    reserved_4: [u8; 0x1d8 - 0x180],
    /// RSP.
    pub rsp: u64,
    reserved_5: [u8; 0x1f8 - 0x1e0],
    /// RAX.
    pub rax: u64,
    /// STAR, by VMLOAD and VMSAVE, as are all down to SYSENTER_EIP.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// CR2.
    pub cr2: u64,
    reserved_6: [u8; 0x268 - 0x248],
    /// The guest's PAT, with nested paging.
    pub pat: u64,
    /// DEBUGCTL.
    pub debug_control: u64,
    reserved_7: [u8; 0xc00 - 0x278],
}

/// The whole block.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// Control area.
    pub control: Control,
    /// State-save area.
    pub save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Control, pause_threshold) == 0x03c);
    assert!(offset_of!(Control, io_map) == 0x040);
    assert!(offset_of!(Control, asid) == 0x058);
    assert!(offset_of!(Control, virtual_interrupt) == 0x060);
    assert!(offset_of!(Control, exit_code) == 0x070);
    assert!(offset_of!(Control, exit_event) == 0x088);
    assert!(offset_of!(Control, nested) == 0x090);
    assert!(offset_of!(Control, event) == 0x0a8);
    assert!(offset_of!(Control, nested_root) == 0x0b0);
    assert!(offset_of!(Control, clean) == 0x0c0);
    assert!(offset_of!(Control, next_rip) == 0x0c8);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Save, tr) == 0x090);
    assert!(offset_of!(Save, cpl) == 0x0cb);
    assert!(offset_of!(Save, efer) == 0x0d0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1d8);
    assert!(offset_of!(Save, rax) == 0x1f8);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, pat) == 0x268);
    assert!(offset_of!(Save, debug_control) == 0x270);
};
