//! Long mode, kept from QEMU's emulation while the guest does not page.
//!
//! Where a #VMEXIT loads the host's CR0, the emulation (7.2) looks at EFER and CR4 as it would for a write by the guest:
//! with EFER.LME set, paging off and CR4.PAE clear it leaves CR0 as the guest has it, and the host goes on with paging
//! off. Any guest can do that, in three instructions. On a CPU nothing of the kind happens (15.6), and nothing of this
//! file is in force.
//!
//! **What holds at each entry:** the control block has EFER.LME only together with CR0.PG. A guest's LME without paging is
//! *held*: everybody who asks for the guest's EFER gets it with the bit, and writes to CR0 are made here (the selective
//! intercept), so that the bit arrives with PG, and goes with it. The guest may do with CR4 what it likes.

use super::paging::{Nested, Paging};
use super::{EFER_SVME, Vcpu};
use crate::vm::walk::PagingRegisters;

const CR0_PG: u64 = 1 << 31;
const CR0_WP: u64 = 1 << 16;
const CR0_PE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

impl Vcpu<Nested> {
    /// EFER as the guest has it.
    pub(super) fn held_efer(&self) -> u64 {
        let held = if self.long_mode_held { EFER_LME } else { 0 };
        self.save().efer & !EFER_SVME | held
    }

    /// Sets EFER as the guest has it. CR0 is to be in place.
    pub(super) fn hold_efer(&mut self, efer: u64) {
        let paging = self.save().cr0 & CR0_PG != 0;
        self.long_mode_held = self.features.emulated() && !paging && efer & EFER_LME != 0;
        let held = if self.long_mode_held { EFER_LME } else { 0 };
        self.save_mut().efer = efer & !held | EFER_SVME;
    }
}

impl<P: Paging> Vcpu<P> {
    /// Sets EFER as the guest has it. CR0 is to be in place.
    pub(super) fn set_efer(&mut self, efer: u64) {
        P::set_registers(self, PagingRegisters { efer, ..P::registers(self) });
    }

    /// Sets CR0, which has changed by a write of the guest's, and EFER.LMA after it (14.6.1).
    pub(super) fn write_cr0(&mut self, cr0: u64) {
        let before = P::registers(self);
        let (changed, efer) = (before.cr0 ^ cr0, before.efer);
        let active = cr0 & CR0_PG != 0 && efer & EFER_LME != 0;
        let efer = if active { efer | EFER_LMA } else { efer & !EFER_LMA };
        P::set_registers(self, PagingRegisters { cr0, efer, ..before });
        // What translations depend on.
        if changed & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.owe_flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::TlbControl;
    use super::super::tests::vcpu_of;
    use super::*;
    use crate::svm::Features;
    use crate::vm::policy::msr::VmcbMsrs;
    use crate::vm::policy::msr_list::VmcbField;

    /// What the CPU sees of it.
    fn seen(vcpu: &Vcpu) -> (bool, bool) {
        let efer = vcpu.save().efer;
        (efer & EFER_LME != 0, efer & EFER_LMA != 0)
    }

    #[test]
    fn an_emulated_cpu_has_long_mode_only_with_paging() {
        let mut vcpu = vcpu_of(Features::EMULATED);
        vcpu.set(VmcbField::Efer, EFER_LME);
        assert_eq!((seen(&vcpu), vcpu.get(VmcbField::Efer)), ((false, false), EFER_LME));
        vcpu.write_cr0(CR0_PG | CR0_PE);
        assert_eq!((seen(&vcpu), vcpu.get(VmcbField::Efer)), ((true, true), EFER_LME | EFER_LMA));
        assert_ne!(vcpu.flush, TlbControl::Keep);
        vcpu.write_cr0(CR0_PE);
        assert_eq!((seen(&vcpu), vcpu.get(VmcbField::Efer)), ((false, false), EFER_LME));
        vcpu.set(VmcbField::Efer, 0);
        vcpu.write_cr0(CR0_PG | CR0_PE);
        assert_eq!((seen(&vcpu), vcpu.get(VmcbField::Efer)), ((false, false), 0), "it has let go of it");
    }

    #[test]
    fn a_cpu_has_what_the_guest_has() {
        let mut vcpu = vcpu_of(Features::NONE);
        vcpu.set(VmcbField::Efer, EFER_LME);
        assert_eq!((seen(&vcpu), vcpu.get(VmcbField::Efer)), ((true, false), EFER_LME));
    }
}
