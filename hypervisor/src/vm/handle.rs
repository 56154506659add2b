//! What each exit means for the guest.

use alloc::sync::Arc;

use nestling::{Access, Fault, FaultError, Outcome};
use nestling_control::message::DeathReason;

use super::exit::{Direction, Exit, PortAccess, Raised, RawExit};
use super::guest_cpu::{GuestCpu, NestedCpu};
use super::policy;
use super::policy::cpuid::{CpuidContext, CpuidPolicy};
use super::policy::kvmclock::{CLOCK_BYTES, WALL_CLOCK_BYTES, write_wall_clock};
use super::policy::msr::{MsrEffect, MsrState, UnknownMsr};
use super::translation::VcpuMemory;
use super::vcpu::{Due, Vcpu};
use crate::cpu::extended::{self, XCR0_RESET};
use crate::cpu::instructions;
use crate::devices::{Gp, Now, Width};
use crate::memory::embedder::Machine;

/// Lengths of instructions that have no prefixes worth the name; used where the CPU does not give the next RIP.
mod length {
    pub(super) const CPUID: u64 = 2;
    pub(super) const MSR: u64 = 2;
    pub(super) const HLT: u64 = 1;
    pub(super) const INVD_WBINVD: u64 = 2;
    pub(super) const XSETBV: u64 = 3;
}

pub(super) const MSR_TSC_AUX: u32 = 0xc000_0103;

const CPUID_XSAVE: u32 = 0xd;
const CR4_OSXSAVE: u64 = 1 << 18;

/// CPUID 1, EDX: there is a local APIC, and it is enabled.
const CPUID_APIC: u32 = 1 << 9;

pub(super) const RAX: usize = 0;
pub(super) const RCX: usize = 1;
pub(super) const RDX: usize = 2;
pub(super) const RBX: usize = 3;

/// What happens after an exit was handled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
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
    /// Bits of a guest physical address.
    pub(super) physical_bits: u32,
    /// Unix seconds at VM time 0.
    pub(super) wall_clock_s: u64,
}

impl<C: GuestCpu> Vcpu<C> {
    /// Handles an exit other than a physical interrupt.
    #[inline]
    pub(super) fn handle(&mut self, exit: &Exit) -> Result<Next, FaultError> {
        let exit = *exit;
        match exit {
            Exit::Fault(_) => return C::Memory::translate(self, exit),
            Exit::Port(access) => return Ok(self.port(access)),
            Exit::WriteMsr => self.write_msr(),
            Exit::ReadMsr => self.read_msr(),
            Exit::Cpuid => self.cpuid(),
            Exit::Halt => {
                self.cpu.advance(length::HLT);
                return Ok(Next::Halt);
            }
            Exit::InterruptWindow => {
                self.cpu.close_interrupt_window();
                self.due |= Due::EVENTS;
            }
            Exit::NmiWindow => self.due |= Due::EVENTS,
            // Both came for the host; an NMI was taken when the exit set GIF again.
            Exit::Interrupt | Exit::Nmi => {}
            Exit::CacheFlush => self.cpu.advance(length::INVD_WBINVD),
            Exit::Hypercall => self.hypercall(),
            Exit::InvalidOpcode | Exit::Int1 => return Ok(self.met(exit)),
            Exit::Undefined => self.cpu.raise(Raised::InvalidOpcode),
            Exit::SetExtendedControl => self.set_extended_control(),
            Exit::WriteTaskPriority => return Ok(self.write_task_priority()),
            Exit::WriteStatus => return Ok(self.write_status()),
            Exit::PageFault(_) | Exit::ReadControl | Exit::WriteControl | Exit::Invalidate | Exit::TaskSwitch => {
                return C::Memory::translate(self, exit);
            }
            Exit::Exception(exception) => self.cpu.raise(Raised::Again(exception)),
            Exit::NoCounters => self.cpu.raise(Raised::GeneralProtection),
            Exit::Shutdown => return Ok(Next::Die(DeathReason::TripleFault)),
            Exit::Invalid => return Ok(self.refused()),
            Exit::Unexpected => return Ok(self.unexpected()),
        }
        Ok(Next::Continue)
    }

    #[cold]
    pub(super) fn unexpected(&self) -> Next {
        let RawExit { code, info1, info2 } = self.cpu.raw_exit();
        Next::Die(DeathReason::UnexpectedExit { code, info1, info2 })
    }

    /// The guest will most likely fault again: a hint to the CPU (or the emulator) to let others go on with what this waits
    /// for.
    #[cold]
    pub(super) fn try_again(&self) -> Next {
        core::hint::spin_loop();
        Next::Continue
    }

    #[inline]
    fn port(&mut self, access: PortAccess) -> Next {
        let Some(width) = Width::from_bytes(usize::from(access.bytes)) else {
            return self.unexpected();
        };
        if access.string {
            return self.emulate();
        }
        let rax = self.cpu.register(RAX);
        let port = access.port;
        if nestling_meter::PORTS.contains(&port) && self.use_meter(access) {
            self.cpu.advance_to(access.next_rip);
            return Next::Continue;
        }
        match access.direction {
            Direction::Out => {
                self.vm.with_ports(|p, now| p.io_write(now, port, width, rax as u32));
            }
            Direction::In => {
                let value = self.vm.with_ports(|p, now| p.io_read(now, port, width));
                // A 32-bit result clears the upper half, smaller ones leave the rest alone.
                let kept = if width == Width::Dword { 0 } else { rax & !u64::from(width.mask()) };
                self.cpu.set_register(RAX, kept | u64::from(value & width.mask()));
            }
        }
        self.cpu.advance_to(access.next_rip);
        Next::Continue
    }

    /// The meter is no port device: what it does waits for vCPUs, which may wait for those. Whether there is one.
    #[cold]
    fn use_meter(&mut self, access: PortAccess) -> bool {
        let Some(meter) = &self.vm.meter else { return false };
        match access.direction {
            Direction::Out => {
                let exits = self.exits.iter().sum();
                meter.lock().write(access.port, self.cpu.register(RAX) as u32, exits);
            }
            Direction::In => {
                let value = meter.lock().read(access.port);
                self.cpu.set_register(RAX, u64::from(value));
            }
        }
        true
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) = (self.cpu.register(RAX) as u32, self.cpu.register(RCX) as u32);
        let xcr0 = if leaf == CPUID_XSAVE && self.policy.cpuid.has_xsave() { extended::xcr0() } else { XCR0_RESET };
        let context = CpuidContext { apic_id: self.lapic.id(), cr4: self.cpu.cr4(), xcr0 };
        let mut regs = self.policy.cpuid.query(leaf, subleaf, context);
        if leaf == 1 && !self.lapic.is_enabled() {
            regs.edx &= !CPUID_APIC;
        }
        for (register, value) in [(RAX, regs.eax), (RBX, regs.ebx), (RCX, regs.ecx), (RDX, regs.edx)] {
            self.cpu.set_register(register, u64::from(value));
        }
        self.cpu.advance(length::CPUID);
    }

    /// XSETBV (APM vol. 4). Where the hypervisor offers no XSAVE, CR4.OSXSAVE can be set all the same if the CPU has it.
    fn set_extended_control(&mut self) {
        if !self.policy.cpuid.has_xsave() || self.cpu.cr4() & CR4_OSXSAVE == 0 {
            return self.cpu.raise(Raised::InvalidOpcode);
        }
        let value = self.cpu.register(RAX) & 0xffff_ffff | self.cpu.register(RDX) << 32;
        let privileged = self.cpu.emulated(self.policy.physical_bits).cpl == 0;
        if !privileged || self.cpu.register(RCX) as u32 != 0 || !self.policy.cpuid.allows_xcr0(value) {
            return self.cpu.raise(Raised::GeneralProtection);
        }
        // SAFETY: what the guest is offered the CPU has.
        unsafe { extended::set_xcr0(value) };
        self.cpu.advance(length::XSETBV);
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
        let value = self.cpu.register(RAX) & 0xffff_ffff | self.cpu.register(RDX) << 32;
        let now = self.now();
        match policy::msr::wrmsr(&mut self.policy.msrs, &mut self.lapic, &mut self.cpu, now, msr, value) {
            Ok(effect) => {
                self.cpu.advance(length::MSR);
                self.msr_effect(effect);
                self.settle_lapic();
            }
            Err(Gp) => self.refuse_msr(),
        }
    }

    /// After a write to a register of the local APIC: who else must know.
    #[inline]
    pub(super) fn settle_lapic(&mut self) {
        self.lapic.publish(&self.reach.lapic);
        if let Some(vector) = self.lapic.take_ended() {
            self.vm.with_ports(|platform, _| platform.end_of_interrupt(vector));
        }
    }

    fn refuse_msr(&mut self) {
        self.cpu.raise(Raised::GeneralProtection);
        if let Some(unknown) = self.policy.msrs.take_unknown() {
            let rip = self.cpu.rip();
            let UnknownMsr { msr, direction } = unknown;
            self.vm.surprise(format_args!(
                "the guest used MSR {msr:#x}, which it does not have: {direction:?} at {rip:#x}"
            ));
        }
    }

    /// Carries on what a write to an MSR began.
    fn msr_effect(&mut self, effect: MsrEffect) {
        match effect {
            MsrEffect::None => {}
            MsrEffect::Interrupts => self.due |= Due::EVENTS,
            MsrEffect::Timer => self.due |= Due::EVENTS | Due::TIMER,
            MsrEffect::Ipi(command) => self.vm.send(self.lapic.id(), &command),
            MsrEffect::TscOffset => {
                self.cpu.set_tsc_offset(self.policy.msrs.tsc_offset());
                self.due |= Due::TIMER;
                self.publish_clock();
            }
            // SAFETY: RDTSCP is offered only where the host has it, and with it the register; the host does not use it.
            MsrEffect::TscAux => unsafe { instructions::wrmsr(MSR_TSC_AUX, u64::from(self.policy.msrs.tsc_aux())) },
            MsrEffect::KvmClock => self.publish_clock(),
            MsrEffect::WallClock { gpa } => {
                if let Err(error) = write_wall_clock(self.vm.mmu.host().ram(), gpa, self.policy.wall_clock_s) {
                    self.vm.surprise(format_args!("the guest's wall clock: {error}"));
                }
                self.vm.note_write(gpa, WALL_CLOCK_BYTES);
            }
        }
    }

    /// Writes the paravirtual clock where the guest wants it. A place that is no RAM is the guest's own loss.
    fn publish_clock(&mut self) {
        let tsc_at_start = self.vm.clock.started().wrapping_add(self.policy.msrs.tsc_offset());
        if let Err(error) = self.policy.msrs.clock.publish(self.vm.mmu.host().ram(), tsc_at_start) {
            self.vm.surprise(format_args!("the guest's clock: {error}"));
        }
        if let Some(gpa) = self.policy.msrs.clock.address() {
            self.vm.note_write(gpa, CLOCK_BYTES);
        }
    }

    /// Now, with the TSC as this vCPU reads it.
    #[inline]
    pub(super) fn now(&self) -> Now {
        self.vm.clock.now_for(self.policy.msrs.tsc_offset())
    }
}

impl<C: NestedCpu<Memory = nestling::Vcpu<Machine>>> Vcpu<C> {
    #[inline]
    pub(super) fn second_stage_fault(&mut self, fault: Fault) -> Result<Next, FaultError> {
        Ok(match self.memory.fault(fault)? {
            Outcome::Fixed { .. } | Outcome::Spurious => Next::Continue,
            Outcome::Retry => self.try_again(),
            Outcome::Mmio if self.vm.storm.may_have_taken(&self.vm, fault.gpa) => self.try_again(),
            // The instruction at RIP is not what met the device if an event was on its way in: its tables did.
            Outcome::Mmio | Outcome::ReadOnly | Outcome::Tracked if !self.cpu.was_delivering() => self.emulate(),
            Outcome::Mmio | Outcome::ReadOnly | Outcome::Tracked => {
                let write = fault.access == Access::Write;
                Next::Die(DeathReason::MmioWithoutDevice { gpa: fault.gpa.0, write })
            }
        })
    }
}
