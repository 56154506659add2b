//! Instructions that are executed in software, and what they reach: this vCPU's local APIC, guest RAM, the memory of
//! devices, and ports.
//!
//! The local APIC's window comes first: a guest may move it over RAM. Memory that is nobody's reads all ones and swallows
//! writes on a machine whose bus floats, and is told of once; on others it ends the guest, as it is noted here and
//! reported.

use alloc::string::ToString;
use core::mem::size_of;

use nestling::Gpa;
use nestling::host::BackingError;
use nestling_control::message::{DeathReason, MAX_INSTRUCTION_BYTES};

use super::exit::{Intercepted, Raised};
use super::guest_cpu::GuestCpu;
use super::handle::Next;
use super::shared::Shared;
use super::vcpu::{Due, Vcpu};
use crate::devices::lapic::{Lapic, LapicEffect};
use crate::devices::platform::Platform;
use crate::devices::{Now, Width};
use crate::emulate::{
    self, Asked, Bus, End, Exception, HostFailure, Kept, Outcome, StatusWrite, TaskPriorityWrite, Wide,
};
use crate::memory::guest::GuestRam;

/// Guest RAM and ports, as one vCPU reaches them.
pub(super) struct GuestBus<'a> {
    vm: &'a Shared,
    lapic: &'a mut Lapic,
    wide: &'a mut dyn Wide,
    kept: &'a mut Kept,
    tsc_offset: u64,
    /// The APIC was used.
    lapic_used: bool,
    /// What the vCPU has to look at.
    due: Due,
    /// The first access that nothing answered: where, and whether it was a write.
    lost: Option<(u64, bool)>,
}

impl GuestBus<'_> {
    fn now(&self) -> Now {
        self.vm.clock.now_for(self.tsc_offset)
    }

    fn ram(&self) -> &GuestRam {
        self.vm.mmu.host().ram()
    }

    /// Reads where no RAM is.
    fn read_device(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure> {
        let answer = self.vm.with_ports(|platform, now| platform.memory_read(now, gpa, bytes));
        if answer.is_none() {
            self.float(gpa, false);
        }
        Ok(answer.unwrap_or(u64::MAX) & u64::MAX >> (64 - 8 * bytes))
    }

    /// Where nothing answered.
    fn float(&mut self, gpa: u64, write: bool) {
        if self.vm.floating {
            let what = if write { "wrote" } else { "read" };
            self.vm.surprise(format_args!("the guest {what} {gpa:#x}, where nothing is"));
        } else {
            self.lost.get_or_insert((gpa, write));
        }
    }

    /// Writes to the local APIC, if it is there.
    fn write_lapic(&mut self, gpa: u64, bytes: usize, value: u64) -> bool {
        let Some(offset) = self.lapic.window_offset(gpa) else { return false };
        self.lapic_used = true;
        let now = self.now();
        match self.lapic.window_write(now, offset, bytes, value) {
            LapicEffect::None => {}
            LapicEffect::Interrupts => self.due |= Due::EVENTS,
            LapicEffect::Timer => self.due |= Due::EVENTS | Due::TIMER,
            LapicEffect::Ipi(command) => self.vm.send(self.lapic.id(), &command),
        }
        true
    }
}

impl Bus for GuestBus<'_> {
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> bool {
        self.ram().read(Gpa(gpa), into).is_ok()
    }

    #[inline]
    fn read_code(&mut self, gpa: u64) -> Option<[u8; MAX_INSTRUCTION_BYTES]> {
        self.ram().read_within(Gpa(gpa)).ok()
    }

    fn read_entry(&mut self, gpa: u64, bytes: usize) -> Option<u64> {
        self.ram().read_entry(Gpa(gpa), bytes).ok()
    }

    fn read(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure> {
        if let Some(offset) = self.lapic.window_offset(gpa) {
            self.lapic_used = true;
            let now = self.now();
            return Ok(self.lapic.window_read(now, offset, bytes));
        }
        let mut value = [0; size_of::<u64>()];
        if !self.ram().contains(Gpa(gpa).gfn()) {
            return self.read_device(gpa, bytes);
        }
        match self.ram().read(Gpa(gpa), &mut value[..bytes]) {
            Ok(()) => return Ok(u64::from_le_bytes(value)),
            Err(BackingError::OutOfMemory) => return Err(HostFailure),
            Err(BackingError::NotBacked | BackingError::Poisoned) => {}
        }
        self.read_device(gpa, bytes)
    }

    fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> Result<(), HostFailure> {
        if self.write_lapic(gpa, bytes, value) {
            return Ok(());
        }
        match self.ram().write(Gpa(gpa), &value.to_le_bytes()[..bytes]) {
            Ok(()) => {
                self.vm.note_write(gpa, bytes);
                return Ok(());
            }
            Err(BackingError::OutOfMemory) => return Err(HostFailure),
            Err(BackingError::NotBacked | BackingError::Poisoned) => {}
        }
        let write = |platform: &mut Platform, now| platform.memory_write(now, gpa, bytes, value);
        if !self.vm.with_ports(write) {
            self.float(gpa, true);
        }
        Ok(())
    }

    fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        if self.lapic.window_offset(gpa).is_none() {
            match self.ram().compare_exchange(Gpa(gpa), bytes, old, new) {
                Ok(done) => {
                    self.vm.note_write(gpa, bytes);
                    return Ok(done);
                }
                Err(BackingError::OutOfMemory) => return Err(HostFailure),
                Err(BackingError::NotBacked | BackingError::Poisoned) => {}
            }
            let exchange = |platform: &mut Platform, _| platform.memory_exchange(gpa, bytes, old, new);
            if let Some(done) = self.vm.with_ports(exchange) {
                return Ok(done);
            }
        }
        self.write(gpa, bytes, new).map(|()| true)
    }

    // A mark changes nothing of what was made of the entry, so that nothing is forgotten for it.
    fn mark_entry(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        if self.lapic.window_offset(gpa).is_some() {
            return self.compare_exchange(gpa, bytes, old, new);
        }
        match self.ram().compare_exchange(Gpa(gpa), bytes, old, new) {
            Ok(done) => {
                self.vm.note_mark(gpa, bytes);
                Ok(done)
            }
            Err(BackingError::OutOfMemory) => Err(HostFailure),
            Err(BackingError::NotBacked | BackingError::Poisoned) => self.compare_exchange(gpa, bytes, old, new),
        }
    }

    fn wide(&mut self) -> &mut dyn Wide {
        self.wide
    }

    fn kept(&mut self) -> &mut Kept {
        self.kept
    }

    #[inline]
    fn page_again(&mut self, asked: &Asked, bytes: usize) -> Option<u64> {
        let ram = self.ram();
        self.kept.page(asked, |at| ram.read_entry(at, bytes).ok())
    }

    fn input(&mut self, port: u16, bytes: usize) -> u32 {
        let Some(width) = Width::from_bytes(bytes) else { return u32::MAX };
        self.vm.with_ports(|platform, now| platform.io_read(now, port, width))
    }

    fn output(&mut self, port: u16, bytes: usize, value: u32) {
        if let Some(width) = Width::from_bytes(bytes) {
            self.vm.with_ports(|platform, now| platform.io_write(now, port, width, value));
        }
    }
}

impl<C: GuestCpu> Vcpu<C> {
    /// This vCPU's memory and ports.
    pub(super) fn bus(&mut self) -> GuestBus<'_> {
        let (vm, lapic, kept) = (&*self.vm, &mut self.lapic, &mut self.kept);
        let (wide, tsc_offset) = (self.cpu.wide(), self.policy.msrs.tsc_offset());
        GuestBus { vm, lapic, wide, kept, tsc_offset, lapic_used: false, due: Due::empty(), lost: None }
    }

    /// What is at RIP, if it can be fetched and is an instruction.
    pub(super) fn see(&mut self) -> Option<emulate::Seen> {
        let state = self.cpu.emulated(self.policy.physical_bits);
        emulate::see(&state, &mut self.bus())
    }

    /// Executes the instruction at RIP in software.
    #[cold]
    pub(super) fn emulate(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        let mut bus = self.bus();
        let mut outcome = Outcome::before(&state);
        emulate::step_into(&state, &mut bus, &mut outcome);
        let GuestBus { due, lost, lapic_used, .. } = bus;
        self.due |= due;
        if lapic_used {
            self.settle_lapic();
        }
        if let Some((gpa, write)) = lost {
            return Next::Die(DeathReason::MmioWithoutDevice { gpa, write });
        }
        self.cpu.take_over(&outcome.registers);
        if outcome.end == End::Done {
            return Next::Continue;
        }
        self.end_instruction(outcome.end, outcome.instruction)
    }

    /// Writes CR8 in the guest's stead.
    #[cold]
    pub(super) fn write_task_priority(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        match emulate::task_priority_write(&state, &mut self.bus()) {
            Ok(TaskPriorityWrite { class, next_rip }) => {
                self.lapic.set_cr8(class);
                // Or the next look at the CPU's own would take the old one for the guest's.
                self.cpu.set_task_priority(class);
                self.due |= Due::EVENTS;
                self.cpu.advance_to(next_rip);
                Next::Continue
            }
            Err(end) => self.end_instruction(end, [0; MAX_INSTRUCTION_BYTES]),
        }
    }

    /// Writes CR0 in the guest's stead.
    #[cold]
    pub(super) fn write_status(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        match emulate::status_write(&state, &mut self.bus()) {
            Ok(StatusWrite { cr0, next_rip }) => {
                self.cpu.set_status(cr0);
                self.cpu.advance_to(next_rip);
                Next::Continue
            }
            Err(end) => self.end_instruction(end, [0; MAX_INSTRUCTION_BYTES]),
        }
    }

    /// What follows from how an instruction ended.
    pub(super) fn end_instruction(&mut self, end: End, instruction: [u8; MAX_INSTRUCTION_BYTES]) -> Next {
        match end {
            End::Done => Next::Continue,
            End::Raise(exception) => {
                self.cpu.raise(match exception {
                    Exception::Divide => Raised::Divide,
                    Exception::DeviceNotAvailable => Raised::DeviceNotAvailable,
                    Exception::InvalidOpcode => Raised::InvalidOpcode,
                    Exception::FloatingPoint => Raised::FloatingPoint,
                    Exception::Stack => Raised::Stack,
                    Exception::GeneralProtection => Raised::GeneralProtection,
                    Exception::Selector(selector) => Raised::Selector(selector),
                    Exception::SegmentNotPresent(selector) => Raised::SegmentNotPresent(selector),
                    Exception::StackSelector(selector) => Raised::StackSelector(selector),
                    Exception::PageFault { code, address } => Raised::PageFault { code, address },
                    Exception::AlignmentCheck => Raised::Again(Intercepted::AlignmentCheck),
                });
                Next::Continue
            }
            // As KVM does: user code may not end its guest.
            End::Unsupported if self.cpu.emulated(self.policy.physical_bits).cpl != 0 => {
                self.cpu.raise(Raised::InvalidOpcode);
                Next::Continue
            }
            End::Unsupported => Next::Die(DeathReason::NotEmulated { instruction }),
            End::Host(HostFailure) => Next::Die(DeathReason::Internal { text: BackingError::OutOfMemory.to_string() }),
        }
    }
}
