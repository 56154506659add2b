//! The MSRs that the control block holds, as the guest has them.

use super::Vcpu;
use super::paging::Paging;
use crate::vm::policy::msr::VmcbMsrs;
use crate::vm::policy::msr_list::VmcbField;

impl<P: Paging> VmcbMsrs for Vcpu<P> {
    fn get(&self, field: VmcbField) -> u64 {
        let save = self.save();
        match field {
            VmcbField::Cr0 => P::registers(self).cr0,
            VmcbField::Efer => P::registers(self).efer,
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
            VmcbField::Efer => {
                // What no-execute bits mean may be another, of translations too that were made before.
                self.set_efer(value);
                self.owe_flush();
            }
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

/// The MSRs of [`CpuState`], in its order.
pub(super) const MSRS: [VmcbField; 9] = [
    VmcbField::Pat,
    VmcbField::Star,
    VmcbField::Lstar,
    VmcbField::Cstar,
    VmcbField::Sfmask,
    VmcbField::KernelGsBase,
    VmcbField::SysenterCs,
    VmcbField::SysenterEsp,
    VmcbField::SysenterEip,
];
