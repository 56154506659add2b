//! What each exit means for the guest.

use alloc::sync::Arc;

use nestling::{Access, Cause, Fault, FaultError, Gpa, Outcome};
use nestling_control::message::DeathReason;

use super::policy;
use super::policy::cpuid::{CpuidContext, CpuidPolicy};
use super::policy::kvmclock::write_wall_clock;
use super::policy::msr::{MsrEffect, MsrState, UnknownMsr, VmcbMsrs};
use super::policy::msr_list::VmcbField;
use super::vcpu::Vcpu;
use crate::cpu::instructions;
use crate::devices::{Gp, Now, Width};
use crate::svm::exit::{Direction, Exit, NestedFault, PortAccess};
use crate::svm::{self, EFER_SVME, Event};

/// Lengths of instructions that have no prefixes worth the name; used where the CPU does not give the next RIP.
mod length {
    pub(super) const CPUID: u64 = 2;
    pub(super) const MSR: u64 = 2;
    pub(super) const HLT: u64 = 1;
    pub(super) const INVD_WBINVD: u64 = 2;
}

pub(super) const MSR_TSC_AUX: u32 = 0xc000_0103;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

/// What happens after an exit was handled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// The guest goes on.
    Continue,
    /// The vCPU sleeps until something comes.
    Halt,
    /// The guest can't go on.
    Die(DeathReason),
}

/// What a vCPU's guest sees of its CPU.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) cpuid: Arc<CpuidPolicy>,
    pub(super) msrs: MsrState,
    /// TSC_AUX is the guest's.
    pub(super) tsc_aux: bool,
    /// Unix seconds at VM time 0.
    pub(super) wall_clock_s: u64,
}

impl VmcbMsrs for svm::Vcpu {
    fn get(&self, field: VmcbField) -> u64 {
        let save = self.save();
        match field {
            VmcbField::Cr0 => save.cr0,
            VmcbField::Efer => save.efer & !EFER_SVME,
            VmcbField::Pat => save.pat,
            VmcbField::Star => save.star,
            VmcbField::Lstar => save.lstar,
            VmcbField::Cstar => save.cstar,
            VmcbField::Sfmask => save.sfmask,
            VmcbField::KernelGsBase => save.kernel_gs_base,
            VmcbField::FsBase => save.fs.base,
            VmcbField::GsBase => save.gs.base,
            VmcbField::SysenterCs => save.sysenter_cs,
            VmcbField::SysenterEsp => save.sysenter_esp,
            VmcbField::SysenterEip => save.sysenter_eip,
        }
    }

    fn set(&mut self, field: VmcbField, value: u64) {
        let save = self.save_mut();
        match field {
            VmcbField::Cr0 => {}
            VmcbField::Efer => save.efer = value | EFER_SVME,
            VmcbField::Pat => save.pat = value,
            VmcbField::Star => save.star = value,
            VmcbField::Lstar => save.lstar = value,
            VmcbField::Cstar => save.cstar = value,
            VmcbField::Sfmask => save.sfmask = value,
            VmcbField::KernelGsBase => save.kernel_gs_base = value,
            VmcbField::FsBase => save.fs.base = value,
            VmcbField::GsBase => save.gs.base = value,
            VmcbField::SysenterCs => save.sysenter_cs = value,
            VmcbField::SysenterEsp => save.sysenter_esp = value,
            VmcbField::SysenterEip => save.sysenter_eip = value,
        }
    }
}

impl Vcpu {
    /// Handles an exit other than a physical interrupt.
    #[inline]
    pub(super) fn handle(&mut self, exit: Exit) -> Result<Next, FaultError> {
        match exit {
            Exit::NestedFault(fault) => return self.nested_fault(fault),
            Exit::Port(access) => return Ok(self.port(access)),
            Exit::WriteMsr => self.write_msr(),
            Exit::ReadMsr => self.read_msr(),
            Exit::Cpuid => self.cpuid(),
            Exit::Halt => {
                self.cpu.advance(length::HLT);
                return Ok(Next::Halt);
            }
            Exit::InterruptWindow => self.cpu.close_interrupt_window(),
            Exit::Iret => self.cpu.nmi_done(),
            // Both came for the host; an NMI was taken when the exit set GIF again.
            Exit::Interrupt | Exit::Nmi => {}
            Exit::CacheFlush => self.cpu.advance(length::INVD_WBINVD),
            Exit::Undefined | Exit::Hypercall | Exit::SetExtendedControl => self.cpu.raise(Event::InvalidOpcode),
            Exit::NoCounters => self.cpu.raise(Event::GeneralProtection),
            Exit::Shutdown => return Ok(Next::Die(DeathReason::TripleFault)),
            Exit::Invalid | Exit::Unexpected => {
                let (code, info1, info2) = self.cpu.raw_exit();
                return Ok(Next::Die(DeathReason::UnexpectedExit { code, info1, info2 }));
            }
        }
        Ok(Next::Continue)
    }

    #[inline]
    fn nested_fault(&mut self, fault: NestedFault) -> Result<Next, FaultError> {
        let access = match (fault.fetch(), fault.write()) {
            (true, _) => Access::Execute,
            (_, true) => Access::Write,
            _ => Access::Read,
        };
        let cause = if fault.reserved() { Cause::Reserved } else { Cause::Translation };
        let outcome = self.memory.fault(Fault { gpa: Gpa(fault.gpa), access, cause })?;
        Ok(match outcome {
            Outcome::Fixed { .. } | Outcome::Spurious | Outcome::Retry => Next::Continue,
            Outcome::Mmio | Outcome::ReadOnly => {
                Next::Die(DeathReason::MmioWithoutDevice { gpa: fault.gpa, write: fault.write() })
            }
        })
    }

    #[inline]
    fn port(&mut self, access: PortAccess) -> Next {
        let Some(width) = Width::from_bytes(usize::from(access.bytes)).filter(|_| !access.string) else {
            let (code, info1, info2) = self.cpu.raw_exit();
            return Next::Die(DeathReason::UnexpectedExit { code, info1, info2 });
        };
        let rax = self.cpu.rax();
        let port = access.port;
        match access.direction {
            Direction::Out => {
                self.vm.with_ports(Some(self.number), |p, now| p.io_write(now, port, width, rax as u32));
            }
            Direction::In => {
                let value = self.vm.with_ports(Some(self.number), |p, now| p.io_read(now, port, width));
                // A 32-bit result clears the upper half, smaller ones leave the rest alone.
                let kept = if width == Width::Dword { 0 } else { rax & !u64::from(width.mask()) };
                self.cpu.set_register(RAX, kept | u64::from(value & width.mask()));
            }
        }
        self.cpu.advance_to(access.next_rip);
        Next::Continue
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) = (self.cpu.rax() as u32, self.cpu.register(RCX) as u32);
        // XSAVE is not offered, so XCR0 is what it is after reset: x87 only.
        let context = CpuidContext { apic_id: self.lapic.id(), cr4: self.cpu.save().cr4, xcr0: 1 };
        let regs = self.policy.cpuid.query(leaf, subleaf, context);
        for (register, value) in [(RAX, regs.eax), (RBX, regs.ebx), (RCX, regs.ecx), (RDX, regs.edx)] {
            self.cpu.set_register(register, u64::from(value));
        }
        self.cpu.advance(length::CPUID);
    }

    fn read_msr(&mut self) {
        let msr = self.cpu.register(RCX) as u32;
        let now = self.now();
        match policy::msr::rdmsr(&mut self.policy.msrs, &mut self.lapic, &self.cpu, now, msr) {
            Ok(value) => {
                self.cpu.set_register(RAX, value & 0xffff_ffff);
                self.cpu.set_register(RDX, value >> 32);
                self.cpu.advance(length::MSR);
            }
            Err(Gp) => self.refuse_msr(),
        }
    }

    fn write_msr(&mut self) {
        let msr = self.cpu.register(RCX) as u32;
        let value = self.cpu.rax() & 0xffff_ffff | self.cpu.register(RDX) << 32;
        let now = self.now();
        match policy::msr::wrmsr(&mut self.policy.msrs, &mut self.lapic, &mut self.cpu, now, msr, value) {
            Ok(effect) => {
                self.cpu.advance(length::MSR);
                self.msr_effect(effect);
            }
            Err(Gp) => self.refuse_msr(),
        }
    }

    fn refuse_msr(&mut self) {
        self.cpu.raise(Event::GeneralProtection);
        if let Some(unknown) = self.policy.msrs.take_unknown() {
            let rip = self.cpu.save().rip;
            let UnknownMsr { msr, direction } = unknown;
            self.vm.surprise(format_args!(
                "the guest used MSR {msr:#x}, which it does not have: {direction:?} at {rip:#x}"
            ));
        }
    }

    /// Carries on what a write to an MSR began.
    fn msr_effect(&mut self, effect: MsrEffect) {
        match effect {
            MsrEffect::None | MsrEffect::Interrupts => {}
            MsrEffect::Timer => self.timer_changed = true,
            MsrEffect::Ipi(command) => self.vm.send(self.lapic.id(), &command),
            MsrEffect::TscOffset => {
                self.cpu.set_tsc_offset(self.policy.msrs.tsc_offset());
                self.timer_changed = true;
                self.publish_clock();
            }
            // SAFETY: RDTSCP is offered only where the host has it, and with it the register; the host does not use it.
            MsrEffect::TscAux => unsafe { instructions::wrmsr(MSR_TSC_AUX, u64::from(self.policy.msrs.tsc_aux())) },
            MsrEffect::KvmClock => self.publish_clock(),
            MsrEffect::WallClock { gpa } => {
                if let Err(error) = write_wall_clock(self.vm.mmu.host().ram(), gpa, self.policy.wall_clock_s) {
                    self.vm.surprise(format_args!("the guest's wall clock: {error}"));
                }
            }
        }
    }

    /// Writes the paravirtual clock where the guest wants it. A place that is no RAM is the guest's own loss.
    fn publish_clock(&mut self) {
        let tsc_at_start = self.vm.clock.started().wrapping_add(self.policy.msrs.tsc_offset());
        if let Err(error) = self.policy.msrs.clock.publish(self.vm.mmu.host().ram(), tsc_at_start) {
            self.vm.surprise(format_args!("the guest's clock: {error}"));
        }
    }

    /// Now, with the TSC as this vCPU reads it.
    #[inline]
    pub(super) fn now(&self) -> Now {
        let now = self.vm.clock.now();
        Now { ns: now.ns, tsc: now.tsc.wrapping_add(self.policy.msrs.tsc_offset()) }
    }
}
