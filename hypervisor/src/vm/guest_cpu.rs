//! What a VM asks of the CPU's virtualisation extension: the one thing that [`crate::svm`] implements, and that another
//! vendor's would implement beside it.
//!
//! A value of such a type is one virtual CPU: its state while it does not run, the events on their way into it, and the
//! means to run it. It is owned by the CPU that runs it. Exits come in the terms of [`super::exit`].

use core::fmt::Debug;

use nestling::guest::{PageFault, Privilege};
use nestling::shadow::tags::Tag;
use nestling::shadow::vcpu::ShadowFormat;
use nestling::{Fault, Hpa};
use nestling_control::message::Registers;
use serde::{Deserialize, Serialize};

use super::exit::{Exit, Met, Raised, RawExit};
use super::policy::msr::VmcbMsrs;
use super::translation::VcpuMemory;
use super::walk::PagingRegisters;
use crate::devices::saved::{BadState, bytes};
use crate::emulate::{self, Glanced};
use crate::guest::VcpuInit;

/// How an exit comes about when an NMI can be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NmiWindow {
    /// The CPU sees to it: there will be an [`Exit::NmiWindow`].
    Watched,
    /// It can be taken behind the next instruction, and nothing tells when that is: whoever runs the vCPU looks again soon.
    BehindInstruction,
    /// Another event goes first, and when it is in an NMI can be taken: whoever runs the vCPU has it interrupted as soon
    /// as it enters.
    BehindEvent,
}

/// All that a virtual CPU is while it does not run, and that is not its APIC's or its MSRs' in software, nor stays in the
/// CPU that runs it ([`crate::cpu::extended`]).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers, control registers, segments.
    pub registers: Registers,
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// PAT, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    pub msrs: [u64; 9],
    /// x87 and SSE state, as FXSAVE stores it.
    #[serde(with = "bytes")]
    pub fx: [u8; 512],
    /// The next instruction is in an interrupt shadow.
    pub shadow: bool,
    /// An external interrupt that has left its controller and was not taken yet.
    pub latched: Option<u8>,
    /// An exception or NMI on its way in, as EVENTINJ has it; 0: none.
    pub event: u64,
    /// The guest is handling an NMI.
    pub nmis_masked: bool,
}

/// One virtual CPU.
pub trait GuestCpu: VmcbMsrs + Debug + Send + Sized + 'static {
    /// The library's part of it, by the tables that the CPU walks.
    type Memory: VcpuMemory<Self>;

    /// Takes the calling CPU for this vCPU. Once, before the first [`GuestCpu::run`], which is then called there only.
    fn bind(&mut self);

    /// Its state. What is under way between two runs is taken back first.
    fn export(&mut self) -> CpuState;

    /// Puts it into a state that was saved. What was never one, and would not be survived, is refused.
    ///
    /// # Errors
    /// What is impossible.
    fn import(&mut self, state: &CpuState) -> Result<(), BadState>;

    /// Runs the guest until it exits. Interrupts are off before and after; one that ended the run is still pending.
    ///
    /// An exit about translation is shown to `fix` first, if nothing else comes with it. Where that says that it is fixed, there
    /// was no exit, and the guest runs on.
    fn run(&mut self, fix: impl FnMut(&mut Self, &Met) -> bool) -> Exit;

    /// The last exit in the CPU's own numbers.
    fn raw_exit(&self) -> RawExit;

    /// The last exit, if it was a second-stage fault.
    fn last_fault(&self) -> Option<Fault>;

    /// Whether the last exit came while an event was being delivered, and not from the instruction at RIP.
    fn was_delivering(&self) -> bool;

    /// Puts the vCPU in a starting state. Everything that `init` does not name is as after reset, events are forgotten.
    fn load(&mut self, init: &VcpuInit);

    /// All registers, for a report.
    fn registers(&self) -> Registers;

    /// A general register by its encoding.
    fn register(&self, index: usize) -> u64;

    /// Sets a general register by its encoding.
    fn set_register(&mut self, index: usize, value: u64);

    /// What executing an instruction in software depends on; `physical_bits` is not the CPU's to know.
    fn emulated(&self, physical_bits: u32) -> emulate::Cpu;

    /// Its x87 and SSE registers.
    fn wide(&mut self) -> &mut dyn emulate::Wide;

    /// Takes over what that left, an instruction further or within a repeated one.
    fn take_over(&mut self, registers: &emulate::Registers);

    /// Instruction pointer.
    fn rip(&self) -> u64;

    /// CR4.
    fn cr4(&self) -> u64;

    /// Moves behind an instruction that was handled; its length, in bytes, is used where the CPU does not tell.
    fn advance(&mut self, length: u64);

    /// Moves to `rip`, behind an instruction that was handled.
    fn advance_to(&mut self, rip: u64);

    /// Moves to `rip`, behind INT1: the trap of which DR6 says nothing. If the guest steps, it is the step's as well.
    fn trap_behind(&mut self, rip: u64);

    /// Drops the guest's translations before its next instruction.
    fn flush(&mut self);

    /// Sets what is added to the TSC while the guest runs.
    fn set_tsc_offset(&mut self, offset: u64);

    /// The guest's task priority as CR8 has it (0 to 15).
    fn task_priority(&self) -> u8;

    /// Sets CR8.
    fn set_task_priority(&mut self, priority: u8);

    /// Has each write to CR8 exit from here on ([`Exit::WriteTaskPriority`]), or not any more.
    fn watch_task_priority(&mut self, watch: bool);

    /// Sets CR0 to what a write was found to put there, and with it what of EFER follows from paging being on.
    fn set_status(&mut self, cr0: u64);

    /// Whether an external interrupt given now would be taken before the next instruction.
    fn can_take_interrupt(&self) -> bool;

    /// Gives an external interrupt. Only when [`GuestCpu::can_take_interrupt`].
    fn interrupt(&mut self, vector: u8);

    /// Asks for an [`Exit::InterruptWindow`] when an interrupt can be taken.
    fn open_interrupt_window(&mut self);

    /// Takes that wish back, or ends it when it was answered.
    fn close_interrupt_window(&mut self);

    /// Whether an NMI can be taken now.
    fn can_take_nmi(&self) -> bool;

    /// Whether the next instruction is in an interrupt shadow, and nothing else goes first: neither NMIs nor interrupts can be
    /// taken before it was executed.
    fn in_shadow(&self) -> bool;

    /// Whether the guest is handling an NMI: it takes the next one behind its IRET.
    fn nmis_masked(&self) -> bool;

    /// Gives an NMI. Only when [`GuestCpu::can_take_nmi`]. No other can be taken before the guest's IRET.
    fn nmi(&mut self);

    /// Asks for an exit when an NMI can be taken. Only when not [`GuestCpu::can_take_nmi`].
    fn open_nmi_window(&mut self) -> NmiWindow;

    /// Raises an exception at the current instruction.
    fn raise(&mut self, raised: Raised);

    /// Whether an event is on its way in.
    fn has_event(&self) -> bool;
}

/// One that walks the guest's tables, and second-stage tables for each address in them.
pub trait NestedCpu: GuestCpu {
    /// Sets the root of the second-stage table. Another one than before starts with no translation cached.
    fn set_root(&mut self, root: Hpa);
}

/// What became of a page fault of the guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageFaultTaken {
    /// The guest gets it, or the double fault that it is.
    Raised,
    /// The guest gets it, and an NMI whose delivery met it has to be given again.
    BeforeNmi,
    /// It met the delivery of a double fault: there is nothing more to deliver.
    Shutdown,
}

/// One that walks shadow tables, and whose paging registers are not the guest's.
pub trait ShadowCpu: GuestCpu {
    /// The guest's paging registers.
    fn paging(&self) -> PagingRegisters;

    /// Sets them.
    fn set_paging(&mut self, registers: PagingRegisters);

    /// Sets CR3 alone.
    fn set_cr3(&mut self, cr3: u64);

    /// Whether any of them was set since this was asked last, to whatever value.
    fn take_paging_set(&mut self) -> bool;

    /// Keeps what was seen at RIP for the exit that is being looked at, and where the next instruction begins.
    fn keep_seen(&mut self, seen: (Glanced, u64));

    /// Takes that, if anybody has looked.
    fn take_seen(&mut self) -> Option<(Glanced, u64)>;

    /// Whether it runs 64-bit code in ring 0.
    fn runs_64_bit_kernel(&self) -> bool;

    /// Sets the root of the shadow tables, and with it all that the CPU must know to walk them; `tag` is what the TLB is to know
    /// it by.
    fn load_root(&mut self, root: Hpa, format: ShadowFormat, tag: Tag);

    /// Drops the translations of the tag that is loaded before the guest's next instruction.
    fn forget_tag(&mut self);

    /// Drops that of one linear address at once. On the CPU that runs it.
    fn forget_address(&mut self, linear: u64);

    /// On whose behalf the access was that met a page fault; `user` is what the error code says.
    fn privilege(&self, user: bool) -> Privilege;

    /// Gives the guest a page fault that is its own, met at the last exit, with respect to an event that was being
    /// delivered.
    fn take_page_fault(&mut self, fault: PageFault) -> PageFaultTaken;
}
