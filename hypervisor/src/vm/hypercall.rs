//! Calls of the guest to its hypervisor, by the interface of KVM, whose signature CPUID shows: the number in RAX, arguments
//! in RBX, RCX, RDX and RSI, the answer in RAX.
//!
//! VMMCALL exits. VMCALL, the other vendor's instruction, raises #UD here; guests that were told of a hypervisor and not of
//! its vendor use either, so #UD exits too and this looks at what raised it. The guest's code stays as it is.

use super::exit::{Exit, Raised};
use super::guest_cpu::GuestCpu;
use super::handle::{Next, RAX, RBX, RCX, RDX};
use super::vcpu::Vcpu;
use crate::devices::lapic::{Destination, IpiCommand, IpiKind};
use crate::emulate::{Kind, Seen};

const RSI: usize = 6;
const VMMCALL_BYTES: u64 = 3;

const POLL_INTERRUPTS: u64 = 1;
const SEND_IPI: u64 = 10;

const NO_SUCH_CALL: u64 = 1000u64.wrapping_neg();
const NOT_PERMITTED: u64 = 1u64.wrapping_neg();
const INVALID: u64 = 22u64.wrapping_neg();

impl<C: GuestCpu> Vcpu<C> {
    /// The guest is at VMMCALL.
    pub(super) fn hypercall(&mut self) {
        self.answer();
        self.cpu.advance(VMMCALL_BYTES);
    }

    /// An instruction was met that the CPU does not execute as it is: it raised #UD, or is INT1, which exits; where it is
    /// emulated by QEMU (7.2) that raises #UD too.
    #[cold]
    pub(super) fn met(&mut self, exit: Exit) -> Next {
        match self.see() {
            Some(Seen { what: Kind::Int1, next_rip }) => {
                self.cpu.trap_behind(next_rip);
                Next::Continue
            }
            // Another CPU has taken it away since: the guest meets by itself what is there now.
            _ if exit == Exit::Int1 => Next::Continue,
            Some(Seen { what: Kind::Vmcall, next_rip }) => {
                self.answer();
                self.cpu.advance_to(next_rip);
                Next::Continue
            }
            _ => self.undefined(),
        }
    }

    fn undefined(&mut self) -> Next {
        self.cpu.raise(Raised::InvalidOpcode);
        Next::Continue
    }

    fn answer(&mut self) {
        let state = self.cpu.emulated(self.policy.physical_bits);
        // Registers are as wide as the mode.
        let mask = if state.is_64_bit() { u64::MAX } else { u64::from(u32::MAX) };
        let register = |index: usize| state.registers.general[index] & mask;
        let answer = match register(RAX) {
            _ if state.cpl != 0 => NOT_PERMITTED,
            POLL_INTERRUPTS => 0,
            SEND_IPI => {
                let (low, high) = (register(RBX), register(RCX));
                self.send_to_set([low, high], mask.count_ones(), register(RDX), register(RSI))
            }
            _ => NO_SUCH_CALL,
        };
        self.cpu.set_register(RAX, answer & mask);
    }

    /// Sends what `icr` says to the APIC IDs `first + n` of all bits n that are set; returns how many there are.
    fn send_to_set(&mut self, sets: [u64; 2], width: u32, first: u64, icr: u64) -> u64 {
        let kind = match icr >> 8 & 7 {
            0 => IpiKind::Fixed(icr as u8),
            4 => IpiKind::Nmi,
            _ => return INVALID,
        };
        let mut sent = 0;
        for (index, mut set) in (0..).zip(sets) {
            while set != 0 {
                let id = first + u64::from(index * width + set.trailing_zeros());
                set &= set - 1;
                // Beyond the last vCPU there is nobody, and beyond 32 bits no ID.
                if let Ok(id) = u32::try_from(id)
                    && (id as usize) < self.vm.vcpus.len()
                {
                    self.vm.send(self.lapic.id(), &IpiCommand { kind, destination: Destination::Physical(id) });
                    sent += 1;
                }
            }
        }
        sent
    }
}
