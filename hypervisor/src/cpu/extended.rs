//! What a guest has of its CPU that neither VMRUN nor the world switch exchanges: XCR0 and the state above x87 and SSE that
//! XSAVE manages (the upper halves of vector registers, the protection-key register), and the addresses of breakpoints.
//!
//! **It stays in the CPU.** A CPU that runs a vCPU runs no other until that one is gone ([`crate::vm`]), and between two
//! runs it executes the hypervisor, which uses none of this: Rust code is compiled for SSE alone, whose instructions leave
//! upper halves as they are; the hypervisor's pages are all supervisor pages, to which no protection key applies; and
//! #VMEXIT turns breakpoints off (DR7). So XCR0 *is* a vCPU's own without being switched, also where QEMU's emulation (7.2)
//! ignores the intercept of XSETBV: what the guest writes there reaches nobody else.
//!
//! What is due is that a guest finds nothing of the one before it, and leaves nothing: [`reset`] before its first run and
//! after its last.
//!
//! Whoever saves a vCPU has to save this too, on its CPU.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;
/// XCR0 after reset: x87.
pub const XCR0_RESET: u64 = 1;

/// Whether the CPU has XSAVE.
#[must_use]
pub fn has_xsave() -> bool {
    __cpuid(1).ecx & 1 << 26 != 0
}

/// Whether it has protection keys for user pages.
#[must_use]
pub fn has_protection_keys() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & 1 << 3 != 0
}

/// Lets this CPU's hypervisor read and reset what its guests have. Once a CPU.
pub fn enable() {
    let xsave = if has_xsave() { CR4_OSXSAVE } else { 0 };
    let keys = if has_protection_keys() { CR4_PKE } else { 0 };
    // SAFETY: ring 0; the CPU has what is turned on, and neither changes how the hypervisor's own code runs.
    unsafe { asm!("mov {s}, cr4", "or {s}, {on}", "mov cr4, {s}", s = out(reg) _, on = in(reg) xsave | keys) };
}

/// XCR0, the guest's. On a CPU with XSAVE.
#[must_use]
pub fn xcr0() -> u64 {
    // SAFETY: `enable` has set CR4.OSXSAVE where XSAVE is, and callers ask nowhere else.
    unsafe { read_xcr0() }
}

#[target_feature(enable = "xsave")]
fn read_xcr0() -> u64 {
    // SAFETY: register 0 exists wherever the instruction does.
    unsafe { _xgetbv(0) }
}

/// Sets XCR0 for the guest.
///
/// # Safety
/// On a CPU with XSAVE, which must take the value.
pub unsafe fn set_xcr0(value: u64) {
    // SAFETY: the caller vouches for the value; the hypervisor does not depend on it.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// The protection-key register, the guest's. On a CPU that has it.
#[must_use]
pub fn pkru() -> u32 {
    let value;
    // SAFETY: `enable` has set CR4.PKE. It only reads.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack, preserves_flags)) };
    value
}

/// An XSAVE area that says of every component that it is as after reset.
#[repr(C, align(64))]
struct Initial {
    legacy: [u32; 128],
    header: [u64; 8],
}

static INITIAL: Initial = {
    let mut legacy = [0; 128];
    // MXCSR is loaded all the same.
    legacy[6] = 0x1f80;
    Initial { legacy, header: [0; 8] }
};

/// Puts all of it in the state after reset. On a CPU that [`enable`] was called on, before a vCPU's first run and after its
/// last.
pub fn reset() {
    clear_breakpoints();
    if has_protection_keys() {
        // SAFETY: `enable` has set CR4.PKE; the hypervisor has no pages that keys apply to.
        unsafe { asm!("wrpkru", in("eax") 0, in("ecx") 0, in("edx") 0, options(nostack, preserves_flags)) };
    }
    if !has_xsave() {
        return;
    }
    let all = __cpuid_count(0xd, 0);
    // SAFETY: the CPU says that it takes these. Behind the header XRSTOR reads nothing, as no component is there, and what it
    // changes of vector registers is declared.
    unsafe {
        set_xcr0(u64::from(all.edx) << 32 | u64::from(all.eax));
        asm!("xrstor64 [{}]", in(reg) &raw const INITIAL, in("eax") all.eax, in("edx") all.edx, clobber_abi("C"));
        set_xcr0(XCR0_RESET);
    }
}

/// What INIT does to the addresses of breakpoints.
pub fn clear_breakpoints() {
    // SAFETY: ring 0; no breakpoint is on in the hypervisor.
    unsafe {
        asm!("mov dr0, {0}", "mov dr1, {0}", "mov dr2, {0}", "mov dr3, {0}", in(reg) 0u64, options(nomem, nostack));
    }
}
