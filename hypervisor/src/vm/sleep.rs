//! A vCPU whose machine sleeps (ACPI S3), and wakes.
//!
//! The port devices know when ([`crate::devices::platform`]), [`super::shared`] posts it, and here a vCPU takes it in, in its
//! own turn. What a power loss leaves of a vCPU is nothing: it waits for a start-up IPI, as at the beginning. Its TSC goes on
//! as the machine's does. The first vCPU does what firmware does then: it goes on at the waking vector that the guest has left
//! in its tables (ACPI 6.5, 5.2.10 and 16.3.1), or, where there is none, boots the machine anew.

use nestling_control::message::GuestExit;

use super::guest_cpu::GuestCpu;
use super::handle::MSR_TSC_AUX;
use super::shared::End;
use super::vcpu::{Activity, Due, Vcpu, lapic_config};
use crate::cpu::{extended, instructions};
use crate::devices::lapic::Lapic;
use crate::guest::{VcpuInit, waking_vector};

impl<C: GuestCpu> Vcpu<C> {
    /// Everything of this vCPU is as after power-on.
    #[cold]
    pub(super) fn lose_power(&mut self) {
        self.lapic = Lapic::new(lapic_config(self.number, &self.vm)).in_xapic_mode();
        self.lapic.publish(&self.reach.lapic);
        self.policy.msrs.power_cycle();
        self.cpu.set_tsc_offset(self.policy.msrs.tsc_offset());
        if self.policy.tsc_aux {
            // SAFETY: the host has the register and does not use it.
            unsafe { instructions::wrmsr(MSR_TSC_AUX, u64::from(self.policy.msrs.tsc_aux())) };
        }
        extended::reset();
        self.activity = Activity::WaitingForStartup;
        self.nmis = 0;
        self.due = Due::all();
    }

    /// The machine wakes.
    #[cold]
    pub(super) fn resume(&mut self) {
        match waking_vector(self.vm.mmu.host().ram()) {
            Some(vector) => self.start(&VcpuInit::waking(vector)),
            None => self.vm.end(End::Exit(GuestExit::Reset)),
        }
    }
}
