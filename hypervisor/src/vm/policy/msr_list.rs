//! The list of the guest's MSRs: for each, where its value lives and what an access does.
//!
//! Numbers are those of AMD APM vol. 2, appendix A, and of KVM's paravirtual interface.

use super::mtrr::Mtrrs;
use crate::devices::lapic::{X2APIC_FIRST, X2APIC_LAST};

/// A register that lives in the VMCB's state save area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmcbField {
    /// CR0; the policy only reads it.
    Cr0,
    /// EFER without SVME, which is the hypervisor's.
    Efer,
    /// G_PAT.
    Pat,
    /// STAR.
    Star,
    /// LSTAR.
    Lstar,
    /// CSTAR.
    Cstar,
    /// SFMASK.
    Sfmask,
    /// KernelGsBase.
    KernelGsBase,
    /// FS.base.
    FsBase,
    /// GS.base.
    GsBase,
    /// SYSENTER_CS.
    SysenterCs,
    /// SYSENTER_ESP.
    SysenterEsp,
    /// SYSENTER_EIP.
    SysenterEip,
}

/// A register that the hypervisor keeps in software.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftMsr {
    /// Time stamp counter.
    Tsc,
    /// TSC_ADJUST.
    TscAdjust,
    /// TSC_AUX, for RDTSCP.
    TscAux,
    /// TSC deadline of the local APIC's timer.
    TscDeadline,
    /// APIC_BASE.
    ApicBase,
    /// A register of the local APIC.
    X2Apic,
    /// A memory type range register.
    Mtrr,
    /// MISC_ENABLE, of Intel.
    MiscEnable,
    /// Microcode revision.
    MicrocodeRevision,
    /// MCG_STATUS.
    McgStatus,
    /// HWCR.
    Hwcr,
    /// DE_CFG, whose bit 1 makes LFENCE serializing.
    DeCfg,
    /// The paravirtual clock's address.
    KvmSystemTime,
    /// The paravirtual wall clock's address.
    KvmWallClock,
}

/// What an MSR is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrClass {
    /// In the VMCB. Those of [`PASS_THROUGH`] need not be intercepted.
    Vmcb(VmcbField),
    /// In software.
    Soft(SoftMsr),
    /// Reads 0, writes are ignored: kernels use it without asking whether it exists.
    Zero,
    /// Raises #GP, as it does where the feature is missing. Kernels probe for it and expect that; it is not reported.
    Absent,
    /// Not on the list: raises #GP and is reported.
    Unknown,
}

/// MSRs that have no condition worth checking and no effect outside the guest: they are switched by VMLOAD and VMSAVE
/// (APM vol. 2, 15.5.2), and the permission map may let the guest access them directly.
pub const PASS_THROUGH: [u32; 10] = [
    MSR_SYSENTER_CS,
    MSR_SYSENTER_ESP,
    MSR_SYSENTER_EIP,
    MSR_STAR,
    MSR_LSTAR,
    MSR_CSTAR,
    MSR_SFMASK,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_KERNEL_GS_BASE,
];

const MSR_TSC: u32 = 0x10;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_ADJUST: u32 = 0x3b;
const MSR_MICROCODE_REVISION: u32 = 0x8b;
const MSR_SYSENTER_CS: u32 = 0x174;
const MSR_SYSENTER_ESP: u32 = 0x175;
const MSR_SYSENTER_EIP: u32 = 0x176;
const MSR_MCG_CAP: u32 = 0x179;
const MSR_MCG_STATUS: u32 = 0x17a;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_DEBUGCTL: u32 = 0x1d9;
const MSR_PAT: u32 = 0x277;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// The same two by the numbers that the interface had first.
const MSR_KVM_WALL_CLOCK_OLD: u32 = 0x11;
const MSR_KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const MSR_KVM_ASYNC_FAULTS: u32 = 0x4b56_4d02;
const MSR_EFER: u32 = 0xc000_0080;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SFMASK: u32 = 0xc000_0084;
const MSR_FS_BASE: u32 = 0xc000_0100;
const MSR_GS_BASE: u32 = 0xc000_0101;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
const MSR_TSC_AUX: u32 = 0xc000_0103;
const MSR_HWCR: u32 = 0xc001_0015;
const MSR_DE_CFG: u32 = 0xc001_1029;

/// What `msr` is to the guest.
pub const fn classify(msr: u32) -> MsrClass {
    use MsrClass::{Absent, Soft, Unknown, Vmcb, Zero};
    match msr {
        MSR_EFER => Vmcb(VmcbField::Efer),
        MSR_PAT => Vmcb(VmcbField::Pat),
        MSR_STAR => Vmcb(VmcbField::Star),
        MSR_LSTAR => Vmcb(VmcbField::Lstar),
        MSR_CSTAR => Vmcb(VmcbField::Cstar),
        MSR_SFMASK => Vmcb(VmcbField::Sfmask),
        MSR_FS_BASE => Vmcb(VmcbField::FsBase),
        MSR_GS_BASE => Vmcb(VmcbField::GsBase),
        MSR_KERNEL_GS_BASE => Vmcb(VmcbField::KernelGsBase),
        MSR_SYSENTER_CS => Vmcb(VmcbField::SysenterCs),
        MSR_SYSENTER_ESP => Vmcb(VmcbField::SysenterEsp),
        MSR_SYSENTER_EIP => Vmcb(VmcbField::SysenterEip),

        MSR_TSC => Soft(SoftMsr::Tsc),
        MSR_TSC_ADJUST => Soft(SoftMsr::TscAdjust),
        MSR_TSC_AUX => Soft(SoftMsr::TscAux),
        MSR_TSC_DEADLINE => Soft(SoftMsr::TscDeadline),
        MSR_APIC_BASE => Soft(SoftMsr::ApicBase),
        X2APIC_FIRST..=X2APIC_LAST => Soft(SoftMsr::X2Apic),
        MSR_MISC_ENABLE => Soft(SoftMsr::MiscEnable),
        MSR_MICROCODE_REVISION => Soft(SoftMsr::MicrocodeRevision),
        MSR_MCG_STATUS => Soft(SoftMsr::McgStatus),
        MSR_HWCR => Soft(SoftMsr::Hwcr),
        MSR_DE_CFG => Soft(SoftMsr::DeCfg),
        MSR_KVM_SYSTEM_TIME | MSR_KVM_SYSTEM_TIME_OLD => Soft(SoftMsr::KvmSystemTime),
        MSR_KVM_WALL_CLOCK | MSR_KVM_WALL_CLOCK_OLD => Soft(SoftMsr::KvmWallClock),
        // Asynchronous page faults, which are not offered: a guest that turns them on all the same is sent none.
        MSR_KVM_ASYNC_FAULTS => Zero,

        // MCG_CAP: no banks, so no bank registers either. DEBUGCTL: no branch records.
        MSR_MCG_CAP | MSR_DEBUGCTL => Zero,
        // Platform ID, microcode update trigger, performance control of Intel.
        0x17 | 0x79 | 0x199 => Zero,
        // Machine check addresses of the P5, which a kernel reads when it has no MCA.
        0x00 | 0x01 => Zero,
        // SYSCFG, CLK_CTL, NB_CFG, interrupt pending message, MMIO configuration base, SMM base, address and mask.
        0xc001_0010 | 0xc001_001b | 0xc001_001f | 0xc001_0055 | 0xc001_0058 | 0xc001_0111..=0xc001_0113 => Zero,
        // IC_CFG, DC_CFG, TW_CFG, BU_CFG2 and EX_CFG: chicken bits. LS_CFG and FP_CFG are not among them: a kernel that
        // could write those would believe that it has turned something off.
        0xc001_1021..=0xc001_1023 | 0xc001_102a | 0xc001_102c => Zero,

        // The four performance counters that no CPUID bit tells of, and their selectors: they never count, and kernels
        // that stop them as a matter of course may.
        0xc001_0000..=0xc001_0007 => Zero,
        // Other performance counters, of Intel and AMD.
        0xc1..=0xc8 | 0x186..=0x18d | 0x345 | 0x38d..=0x390 | 0xc001_0200..=0xc001_020b => Absent,
        // Banks of machine checks: there are none.
        0x400..=0x47f => Absent,
        // Speculation controls, platform information, SMI count, energy counters and limits, IBS, SVM, SEV and the rest
        // of what kernels probe for behind an exception handler.
        0x34 | 0x48 | 0x49 | 0xce | 0x10a | 0x140 | 0x1b0 | 0x606 | 0x60f..=0x64f => Absent,
        0xc000_0104 | 0xc001_0114 | 0xc001_0117 | 0xc001_0130..=0xc001_0131 | 0xc001_0299..=0xc001_029b => Absent,
        0xc001_1020 | 0xc001_1028 | 0xc001_1030..=0xc001_103b => Absent,
        _ if Mtrrs::owns(msr) => Soft(SoftMsr::Mtrr),
        _ => Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_passed_through_lives_in_the_vmcb() {
        for msr in PASS_THROUGH {
            assert!(matches!(classify(msr), MsrClass::Vmcb(_)), "{msr:#x}");
        }
        assert!(!PASS_THROUGH.contains(&MSR_EFER) && !PASS_THROUGH.contains(&MSR_PAT), "these are checked");
    }

    #[test]
    fn what_is_not_listed_is_unknown() {
        for msr in [0x2, 0x3a, 0x480, 0x7ff, 0x900, 0x4b56_4d03, 0xc000_0105, 0xc001_0118, u32::MAX] {
            assert_eq!(classify(msr), MsrClass::Unknown, "{msr:#x}");
        }
    }

    #[test]
    fn the_list_is_finite() {
        let listed = (0..=u16::MAX as u32).filter(|msr| classify(*msr) != MsrClass::Unknown).count();
        assert!(listed < 768, "{listed}");
    }
}
