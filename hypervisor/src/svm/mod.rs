//! AMD Secure Virtual Machine: whether it is there, turning it on, and (in the rooms below) the VMCB, guest entry and the
//! meaning of exits. Section numbers are of the AMD64 Architecture Programmer's Manual, volume 2.

pub mod entry;
pub mod exit;
pub mod permission;
mod vcpu;
pub mod vmcb;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid;

use nestling_control::config::MmuKind;

use crate::cpu::{extended, instructions};
use crate::memory::frames;
use crate::vm::policy::cpuid::{ThisCpu, emulated};

pub use vcpu::{Nested, Paging, Shadowed, Vcpu};

const MSR_EFER: u32 = 0xc000_0080;
const MSR_VM_CR: u32 = 0xc001_0114;
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;
/// SVM is on. Must be set in a guest's EFER too, and is hidden from it.
pub const EFER_SVME: u64 = 1 << 12;
const VM_CR_SVMDIS: u64 = 1 << 4;

/// What CPUID 0x8000_000a says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// Address-space identifiers, 0 (the host's) included.
    pub asids: u32,
    bits: u32,
    emulated: bool,
}

/// The feature bits in EDX that have names here (15.30 and appendix E of volume 3).
const NAMES: [(u32, &str); 14] = [
    (0, "np"),
    (1, "lbr-virt"),
    (2, "svm-lock"),
    (3, "nrip-save"),
    (4, "tsc-rate"),
    (5, "vmcb-clean"),
    (6, "flush-by-asid"),
    (7, "decode-assists"),
    (10, "pause-filter"),
    (12, "pause-filter-threshold"),
    (13, "avic"),
    (15, "v-vmsave-vmload"),
    (16, "vgif"),
    (28, "svme-addr-check"),
];

impl Features {
    /// A CPU without any, for tests.
    #[cfg(test)]
    pub(crate) const NONE: Self = Self { asids: 2, bits: 0, emulated: false };

    /// QEMU's emulation without any, for tests.
    #[cfg(test)]
    pub(crate) const EMULATED: Self = Self { emulated: true, ..Self::NONE };

    /// Reads them; `None` without SVM.
    #[must_use]
    pub fn read() -> Option<Self> {
        if __cpuid(0x8000_0000).eax < 0x8000_000a || __cpuid(0x8000_0001).ecx & 1 << 2 == 0 {
            return None;
        }
        let leaf = __cpuid(0x8000_000a);
        Some(Self { asids: leaf.ebx, bits: leaf.edx, emulated: emulated(&ThisCpu) })
    }

    /// Nested paging.
    #[must_use]
    pub const fn nested_paging(self) -> bool {
        self.bits & 1 != 0
    }

    /// The CPU stores the address of the next instruction.
    #[must_use]
    pub const fn next_rip(self) -> bool {
        self.bits & 1 << 3 != 0
    }

    /// The CPU is QEMU's emulation ([`emulated`]).
    #[must_use]
    pub const fn emulated(self) -> bool {
        self.emulated
    }

    /// TLB_CONTROL can flush one ASID.
    #[must_use]
    pub const fn flush_by_asid(self) -> bool {
        self.bits & 1 << 6 != 0
    }
}

/// The names of the features that this CPU has.
#[must_use]
pub fn feature_names() -> Vec<String> {
    let bits = Features::read().map_or(0, |f| f.bits);
    NAMES.iter().filter(|(bit, _)| bits & 1 << bit != 0).map(|(_, name)| (*name).to_string()).collect()
}

/// Why this machine cannot run guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unsupported {
    /// No SVM.
    NoSvm,
    /// The firmware has turned SVM off.
    Disabled,
    /// No nested paging.
    NoNestedPaging,
}

impl core::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NoSvm => "this CPU has no SVM (QEMU: -cpu max, or a host with nested SVM)",
            Self::Disabled => "the firmware has turned SVM off",
            Self::NoNestedPaging => "this CPU has SVM without nested paging (run with --mmu shadow)",
        })
    }
}

/// Whether guests can run here on tables of this kind.
///
/// # Errors
/// What is missing.
pub fn check(mmu: MmuKind) -> Result<Features, Unsupported> {
    let features = Features::read().ok_or(Unsupported::NoSvm)?;
    // SAFETY: the register exists where SVM does (15.30.1).
    if unsafe { instructions::rdmsr(MSR_VM_CR) } & VM_CR_SVMDIS != 0 {
        return Err(Unsupported::Disabled);
    }
    if features.nested_paging() || mmu == MmuKind::Shadow { Ok(features) } else { Err(Unsupported::NoNestedPaging) }
}

/// Turns SVM on for this CPU and gives it the page for the host's state (15.4, 15.30.4).
///
/// # Panics
/// Without SVM (see [`check`]), or without memory for a page.
pub fn enable() {
    let save = frames::alloc(0).expect("a host-save page a CPU");
    // SAFETY: `check` has found the registers; the page is this CPU's own for ever.
    unsafe {
        instructions::wrmsr(MSR_EFER, instructions::rdmsr(MSR_EFER) | EFER_SVME);
        instructions::wrmsr(MSR_VM_HSAVE_PA, save);
    }
    extended::enable();
}
