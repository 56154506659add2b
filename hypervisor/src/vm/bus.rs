//! Instructions that are executed in software, and what they reach: guest RAM and the port devices.
//!
//! Today these are INS and OUTS. Memory that is neither RAM nor a device's ends the guest, as it does when the CPU meets
//! it: an access that nothing answers is noted here and reported, with the value of all ones that a bus would float at.

use alloc::string::ToString;
use core::mem::size_of;

use nestling::Gpa;
use nestling::host::BackingError;
use nestling_control::message::DeathReason;

use super::exit::{Intercepted, Raised};
use super::guest_cpu::GuestCpu;
use super::handle::Next;
use super::shared::Shared;
use super::vcpu::Vcpu;
use crate::devices::Width;
use crate::emulate::{self, Bus, End, Exception, HostFailure};
use crate::memory::guest::GuestRam;

/// Guest RAM and ports, as one vCPU reaches them.
struct GuestBus<'a> {
    vm: &'a Shared,
    vcpu: usize,
    /// The first access that nothing answered: where, and whether it was a write.
    lost: Option<(u64, bool)>,
}

impl GuestBus<'_> {
    fn ram(&self) -> &GuestRam {
        self.vm.mmu.host().ram()
    }

    fn settle(&mut self, result: Result<(), BackingError>, gpa: u64, write: bool) -> Result<(), HostFailure> {
        match result {
            Err(BackingError::OutOfMemory) => Err(HostFailure),
            Err(BackingError::NotBacked | BackingError::Poisoned) => {
                self.lost.get_or_insert((gpa, write));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

impl Bus for GuestBus<'_> {
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> bool {
        self.ram().read(Gpa(gpa), into).is_ok()
    }

    fn read(&mut self, gpa: u64, bytes: usize) -> Result<u64, HostFailure> {
        let mut value = [0xff; size_of::<u64>()];
        let result = self.ram().read(Gpa(gpa), &mut value[..bytes]);
        self.settle(result, gpa, false)?;
        value[bytes..].fill(0);
        Ok(u64::from_le_bytes(value))
    }

    fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> Result<(), HostFailure> {
        let result = self.ram().write(Gpa(gpa), &value.to_le_bytes()[..bytes]);
        self.settle(result, gpa, true)
    }

    fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Result<bool, HostFailure> {
        match self.ram().compare_exchange(Gpa(gpa), bytes, old, new) {
            Ok(done) => Ok(done),
            Err(error) => self.settle(Err(error), gpa, true).map(|()| true),
        }
    }

    fn input(&mut self, port: u16, bytes: usize) -> u32 {
        let Some(width) = Width::from_bytes(bytes) else { return u32::MAX };
        self.vm.with_ports(Some(self.vcpu), |platform, now| platform.io_read(now, port, width))
    }

    fn output(&mut self, port: u16, bytes: usize, value: u32) {
        if let Some(width) = Width::from_bytes(bytes) {
            self.vm.with_ports(Some(self.vcpu), |platform, now| platform.io_write(now, port, width, value));
        }
    }
}

impl<C: GuestCpu> Vcpu<C> {
    /// Executes the instruction at RIP in software.
    #[cold]
    pub(super) fn emulate(&mut self) -> Next {
        let state = self.cpu.emulated(self.policy.physical_bits);
        let mut bus = GuestBus { vm: &self.vm, vcpu: self.number, lost: None };
        let outcome = emulate::step(&state, &mut bus);
        if let Some((gpa, write)) = bus.lost {
            return Next::Die(DeathReason::MmioWithoutDevice { gpa, write });
        }
        self.cpu.take_over(&outcome.registers);
        match outcome.end {
            End::Done => Next::Continue,
            End::Raise(exception) => {
                self.cpu.raise(match exception {
                    Exception::InvalidOpcode => Raised::InvalidOpcode,
                    Exception::Stack => Raised::Stack,
                    Exception::GeneralProtection => Raised::GeneralProtection,
                    Exception::PageFault { code, address } => Raised::PageFault { code, address },
                    Exception::AlignmentCheck => Raised::Again(Intercepted::AlignmentCheck),
                });
                Next::Continue
            }
            End::Unsupported => self.unexpected(),
            End::Host(HostFailure) => Next::Die(DeathReason::Internal { text: BackingError::OutOfMemory.to_string() }),
        }
    }
}
