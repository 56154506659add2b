//! A vCPU on shadow tables: what it tells the library, and what its exits mean ([`nestling::shadow::vcpu`]).
//!
//! # Protocol
//! The guest's registers are the CPU's to keep ([`ShadowCpu::paging`]); whoever changes them (an exit that is handled here, a
//! write to EFER, INIT, a state that is restored) changes them there and nowhere else. The library is told *at entry*, if any
//! was set there since the last one, where they are compared with what it was told last; so none of the ways in which they
//! change can be forgotten. What a comparison can not see is kept beside: that CR3 was loaded with the value that it had, and
//! that a write of CR4 flushes.
//!
//! A fault is handled under the registers that the guest had when it ran, which are those of the last entry.
//!
//! # A page fault's way
//! ```text
//!   exit ─► ShadowVcpu::fault ─► mapped ······················ the guest tries again
//!                            ├─► its own ···················· #PF, or what it makes with an event that was on its way in
//!                            └─► no memory, ROM, not to be said in an entry ··· executed in software, if it was an
//!                                instruction that met it and no event's delivery
//! ```
//!
//! # At a glance
//! Moves from and to CR3, and INVLPG, are looked at by eye before they are fetched as any other instruction: the bytes at
//! RIP by the tables by which the CPU has just fetched them ([`ShadowVcpu::code`]), if it runs 64-bit code of ring 0. Whatever
//! is not one of them in its usual form goes the longer way.
//!
//! That is done in guest mode already, if nothing is to be compared under the present root, and then so is the instruction, if
//! the library does not refuse it: the guest was not left ([`super::vcpu`]). If it does, what was seen is kept for the exit that
//! follows at once, and is of the same instruction.

use alloc::sync::Arc;

use nestling::guest::{Controls, FaultCode, PageFault, Request};
use nestling::shadow::tags::TagFlush;
use nestling::shadow::vcpu::at_once::LoadedAtOnce;
use nestling::shadow::vcpu::{InShadow, ShadowOutcome, ShadowVcpu};
use nestling::{Access, FaultError, Gpa, Hpa, Mmu, VcpuId};
use nestling_control::message::DeathReason;

use super::exit::{Exit, Met, Raised};
use super::guest_cpu::{PageFaultTaken, ShadowCpu};
use super::handle::Next;
use super::translation::{AtOnce, Inside, VcpuMemory};
use super::vcpu::{Due, Vcpu};
use super::walk::PagingRegisters;
use crate::cpu::extended;
use crate::emulate::{self, ControlMove, Glance, Glanced, Invalidated};
use crate::memory::embedder::Machine;

/// CR0.PG and CR0.WP, on which translation depends.
const CR0_PAGING: u64 = 1 << 31 | 1 << 16;
/// PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE.
const CR4_PAGING: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 12 | 1 << 17 | 1 << 20 | 1 << 21 | 1 << 22;
const CR4_PKE: u64 = 1 << 22;
/// LMA, NXE.
const EFER_PAGING: u64 = 1 << 10 | 1 << 11;

/// The library's part, and what it was told.
#[derive(Debug)]
pub struct ShadowMemory {
    vcpu: ShadowVcpu<Machine>,
    told: Controls,
    /// CR3 was loaded since, and whether that keeps translations.
    loaded: Option<bool>,
}

impl ShadowMemory {
    /// Tells the library what has changed since the last entry, where a register was set.
    fn tell(&mut self, PagingRegisters { cr0, cr3, cr4, efer }: PagingRegisters) {
        let loaded = self.loaded.take();
        if cr3 != self.vcpu.cr3() || loaded.is_some() {
            self.vcpu.load_cr3(cr3, loaded.unwrap_or(false));
        }
        // What translation depends on.
        let controls = Controls { cr0: cr0 & CR0_PAGING, cr4: cr4 & CR4_PAGING, efer: efer & EFER_PAGING };
        if controls != self.told {
            self.vcpu.set_controls(controls);
            self.told = controls;
        }
    }
}

impl<C: ShadowCpu<Memory = Self>> VcpuMemory<C> for ShadowMemory {
    type Inside<'a> = InShadow<'a, Machine>;

    fn new(mmu: &Arc<Mmu<Machine>>, id: VcpuId) -> Option<Self> {
        let vcpu = mmu.shadow_vcpu(id).ok()??;
        let told = Controls { cr0: 0, cr4: 0, efer: 0 };
        Some(Self { vcpu, told, loaded: None })
    }

    #[inline]
    fn enter(&mut self, cpu: &mut C) -> Result<InShadow<'_, Machine>, FaultError> {
        if cpu.take_paging_set() {
            self.tell(cpu.paging());
        }
        self.vcpu.enter()
    }

    fn translate(vcpu: &mut Vcpu<C>, exit: Exit) -> Result<Next, FaultError> {
        match exit {
            Exit::PageFault(fault) => vcpu.page_fault(fault),
            Exit::ReadControl | Exit::WriteControl => Ok(vcpu.move_control()),
            Exit::Invalidate => Ok(vcpu.invalidate()),
            Exit::TaskSwitch => {
                Ok(Next::Die(DeathReason::Internal { text: "a task switch of a guest on shadow tables".into() }))
            }
            _ => Ok(vcpu.unexpected()),
        }
    }
}

impl<C: ShadowCpu> Inside<C> for InShadow<'_, Machine> {
    #[inline]
    fn root(&self) -> Hpa {
        InShadow::root(self)
    }

    #[inline]
    fn load(&self, cpu: &mut C) {
        cpu.load_root(InShadow::root(self), self.format(), InShadow::tag(self));
    }

    #[inline]
    fn tag(&self) -> usize {
        InShadow::tag(self).number()
    }

    #[inline]
    fn flush(&mut self, cpu: &mut C) -> bool {
        match self.take_flush() {
            None => false,
            Some(TagFlush::Address(linear)) => {
                cpu.forget_address(linear);
                false
            }
            Some(TagFlush::All) => {
                cpu.forget_tag();
                true
            }
        }
    }

    // Apart: other exits are not to pay for the registers that this needs.
    #[inline(never)]
    fn fix_at_once(&mut self, cpu: &mut C, met: &Met, physical_bits: u32) -> AtOnce {
        if !cpu.runs_64_bit_kernel() {
            return AtOnce::No;
        }
        if met.exit == Exit::ReadControl {
            return read_cr3_at_once(self, cpu, met.rip);
        }
        // A look first, for what is most likely in the way.
        let in_step = if met.exit == Exit::WriteControl { self.in_step_for_load() } else { self.in_step() };
        let Some(in_step) = in_step else { return AtOnce::No };
        let Some(Glance { what, length }) = self.code(met.rip).and_then(emulate::glance) else { return AtOnce::No };
        let next_rip = met.rip.wrapping_add(length);
        match what {
            Glanced::Move { control: 3, general, write: true } => {
                let value = cpu.register(usize::from(general));
                let loaded = emulate::cr3_write_in_long_mode(cpu.cr4(), physical_bits, value);
                let Some((cr3, keeps)) = loaded else { return AtOnce::No };
                match self.load_cr3_at_once(in_step, cr3, keeps) {
                    LoadedAtOnce::No => {
                        cpu.keep_seen((what, next_rip));
                        return AtOnce::No;
                    }
                    LoadedAtOnce::AsItWas => {
                        cpu.advance_to(next_rip);
                        return AtOnce::Fixed;
                    }
                    LoadedAtOnce::Turned => {}
                }
                cpu.set_cr3(cr3);
                // The library knows of it; of all others it was told at entry.
                cpu.take_paging_set();
                self.load(cpu);
            }
            Glanced::Invlpg { general } => self.invlpg_at_once(in_step, cpu.register(usize::from(general))),
            Glanced::Move { .. } => return AtOnce::No,
        }
        cpu.advance_to(next_rip);
        if self.flush(cpu) { AtOnce::Flushed } else { AtOnce::Turned }
    }
}

/// Does a MOV from CR3 at `rip`, if it is one.
#[inline]
fn read_cr3_at_once<C: ShadowCpu>(inside: &mut InShadow<'_, Machine>, cpu: &mut C, rip: u64) -> AtOnce {
    match inside.code(rip).and_then(emulate::glance) {
        Some(Glance { what: Glanced::Move { control: 3, general, write: false }, length }) => {
            cpu.set_register(usize::from(general), inside.cr3());
            cpu.advance_to(rip.wrapping_add(length));
            AtOnce::Fixed
        }
        _ => AtOnce::No,
    }
}

impl<C: ShadowCpu<Memory = ShadowMemory>> Vcpu<C> {
    fn page_fault(&mut self, fault: PageFault) -> Result<Next, FaultError> {
        let PageFault { code, address } = fault;
        let access = match (code.contains(FaultCode::FETCH), code.contains(FaultCode::WRITE)) {
            (true, _) => Access::Execute,
            (false, true) => Access::Write,
            (false, false) => Access::Read,
        };
        let request = Request {
            linear: address,
            access,
            privilege: self.cpu.privilege(code.contains(FaultCode::USER)),
            pkru: if self.cpu.cr4() & CR4_PKE != 0 { extended::pkru() } else { 0 },
        };
        Ok(match self.memory.vcpu.fault(&request)? {
            ShadowOutcome::Fixed | ShadowOutcome::Spurious => Next::Continue,
            ShadowOutcome::Retry => self.try_again(),
            ShadowOutcome::Inject(fault) => self.take_page_fault(fault),
            ShadowOutcome::Mmio { gpa } | ShadowOutcome::NoTable { at: gpa }
                if self.vm.storm.may_have_taken(&self.vm, gpa) =>
            {
                self.try_again()
            }
            ShadowOutcome::Mmio { gpa }
            | ShadowOutcome::NoTable { at: gpa }
            | ShadowOutcome::ReadOnly { gpa }
            | ShadowOutcome::Tracked { gpa }
            | ShadowOutcome::Emulate { gpa } => self.execute_or_die(gpa, access),
        })
    }

    /// The access that met a page fault is to be made in software. The instruction at RIP is not what made it if an event
    /// was on its way in.
    fn execute_or_die(&mut self, gpa: Gpa, access: Access) -> Next {
        if self.cpu.was_delivering() {
            return Next::Die(DeathReason::MmioWithoutDevice { gpa: gpa.0, write: access == Access::Write });
        }
        self.emulate()
    }

    fn take_page_fault(&mut self, fault: PageFault) -> Next {
        match self.cpu.take_page_fault(fault) {
            PageFaultTaken::Raised => {}
            PageFaultTaken::BeforeNmi => {
                self.nmis = (self.nmis + 1).min(2);
                self.due |= Due::EVENTS;
            }
            PageFaultTaken::Shutdown => return Next::Die(DeathReason::TripleFault),
        }
        Next::Continue
    }

    /// What is at RIP, if it is one of the instructions that can be told at a glance; and where the next begins.
    #[inline]
    fn glance(&mut self) -> Option<(Glanced, u64)> {
        self.cpu.take_seen().or_else(|| self.look())
    }

    /// The same, where nobody has looked yet.
    fn look(&mut self) -> Option<(Glanced, u64)> {
        let rip = self.cpu.rip();
        let Glance { what, length } =
            self.cpu.runs_64_bit_kernel().then(|| self.memory.vcpu.code(rip))?.and_then(emulate::glance)?;
        Some((what, rip.wrapping_add(length)))
    }

    /// MOV from and to CR0, CR3 and CR4, and SMSW.
    fn move_control(&mut self) -> Next {
        match self.glance() {
            Some((Glanced::Move { control: 3, general, write: false }, next_rip)) => {
                let value = self.cpu.paging().cr3;
                self.cpu.set_register(usize::from(general), value);
                self.cpu.advance_to(next_rip);
                Next::Continue
            }
            Some((Glanced::Move { control: 3, general, write: true }, next_rip)) => {
                let value = self.cpu.register(usize::from(general));
                let loaded = emulate::cr3_write_in_long_mode(self.cpu.cr4(), self.policy.physical_bits, value);
                match loaded {
                    Some((cr3, keeps)) => {
                        self.load_cr3(cr3, keeps);
                        self.cpu.advance_to(next_rip);
                    }
                    None => self.cpu.raise(Raised::GeneralProtection),
                }
                Next::Continue
            }
            _ => self.move_other_control(),
        }
    }

    /// The same, of any kind.
    #[cold]
    fn move_other_control(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        let moved = match emulate::control_move(&state, &mut self.bus()) {
            Ok(Some(moved)) => moved,
            Ok(None) => return self.emulate(),
            Err(end) => return self.end_instruction(end, Default::default()),
        };
        let now = self.cpu.paging();
        let ControlMove { control, general, write, value, next_rip } = moved;
        let done = match (control, write) {
            (0, false) => self.read_control(general, now.cr0),
            (3, false) => self.read_control(general, now.cr3),
            (4, false) => self.read_control(general, now.cr4),
            // As it is at RIP by now.
            (0, true) => return self.write_status(),
            (3, true) => self.write_cr3(&state, value),
            (4, true) => self.write_cr4(&state, value),
            _ => return Next::Continue,
        };
        match done {
            Some(()) => self.cpu.advance_to(next_rip),
            None => self.cpu.raise(Raised::GeneralProtection),
        }
        Next::Continue
    }

    fn read_control(&mut self, general: u8, value: u64) -> Option<()> {
        self.cpu.set_register(usize::from(general), value);
        Some(())
    }

    fn write_cr3(&mut self, state: &emulate::Cpu, value: u64) -> Option<()> {
        let (cr3, keeps) = emulate::cr3_write(state, &mut self.bus(), value)?;
        self.load_cr3(cr3, keeps);
        Some(())
    }

    fn load_cr3(&mut self, cr3: u64, keeps: bool) {
        self.cpu.set_cr3(cr3);
        // Two loads in a row without an entry between them: what either of them forgets is forgotten.
        self.memory.loaded = Some(keeps && self.memory.loaded.unwrap_or(true));
    }

    fn write_cr4(&mut self, state: &emulate::Cpu, value: u64) -> Option<()> {
        let offered = self.policy.cpuid.cr4_bits();
        let cr4 = emulate::cr4_write(state, &mut self.bus(), value, offered)?;
        let now = self.cpu.paging();
        self.cpu.set_paging(PagingRegisters { cr4, ..now });
        Some(())
    }

    /// INVLPG and INVPCID.
    fn invalidate(&mut self) -> Next {
        if let Some((Glanced::Invlpg { general }, next_rip)) = self.glance() {
            let linear = self.cpu.register(usize::from(general));
            self.memory.vcpu.invlpg(linear);
            self.cpu.advance_to(next_rip);
            return Next::Continue;
        }
        self.invalidate_other()
    }

    /// The same, of any form.
    #[cold]
    fn invalidate_other(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        match emulate::invalidation(&state, &mut self.bus()) {
            Ok((what, next_rip)) => {
                match what {
                    Invalidated::Address(linear) => self.memory.vcpu.invlpg(linear),
                    Invalidated::Everything => self.memory.vcpu.flush(),
                }
                self.cpu.advance_to(next_rip);
                Next::Continue
            }
            Err(end) => self.end_instruction(end, Default::default()),
        }
    }
}
