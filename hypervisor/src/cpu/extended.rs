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
//! Whoever saves a vCPU has to save this too, on its CPU: [`save`], and [`load`] behind the [`reset`] before the first run.

use alloc::vec::Vec;
use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use serde::{Deserialize, Serialize};

use crate::devices::saved::{BadState, require};

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

/// x87 and SSE, which the world switch exchanges.
const SWITCHED: u64 = 3;
/// Room for every component that guests are offered, where XSAVE puts it in the standard form; AVX-512 and the tiles, which
/// they are not, may lie before those.
const AREA_BYTES: usize = 16 << 10;
const HEADER: usize = 512;

/// Memory for XSAVE.
#[repr(C, align(64))]
struct Area([u8; AREA_BYTES]);

/// What a guest has in its CPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct State {
    /// DR0 to DR3.
    pub debug_addresses: [u64; 4],
    /// XCR0.
    pub xcr0: u64,
    /// Components that are not as after reset, by number.
    components: Vec<(u8, Vec<u8>)>,
}

/// Where components lie in the standard form: number, offset, bytes. `features`: what the guest is offered of XCR0.
fn components(features: u64) -> impl Iterator<Item = (u8, usize, usize)> {
    (2..63).filter(move |number| features & !SWITCHED & 1 << number != 0).filter_map(|number: u8| {
        let leaf = __cpuid_count(0xd, u32::from(number));
        let (offset, bytes) = (leaf.ebx as usize, leaf.eax as usize);
        (bytes > 0 && offset >= HEADER + 64 && offset + bytes <= AREA_BYTES).then_some((number, offset, bytes))
    })
}

/// What the guest of this CPU has, whose XCR0 may have `features`. On its CPU, while it does not run.
#[must_use]
pub fn save(features: u64) -> State {
    let (dr0, dr1, dr2, dr3): (u64, u64, u64, u64);
    // SAFETY: ring 0; reading has no effect, as DR7.GD is 0 in the hypervisor.
    unsafe {
        asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
            out(reg) dr0, out(reg) dr1, out(reg) dr2, out(reg) dr3, options(nomem, nostack, preserves_flags));
    }
    let debug_addresses = [dr0, dr1, dr2, dr3];
    if !has_xsave() || features == 0 {
        return State { debug_addresses, xcr0: XCR0_RESET, components: Vec::new() };
    }
    let mut area = Area([0; AREA_BYTES]);
    let (xcr0, wanted) = (xcr0(), features & !SWITCHED);
    // SAFETY: the CPU takes what a guest may be offered. XSAVE writes the components that are asked for, which lie within
    // the area, and the header, which is zero as it has to be.
    unsafe {
        set_xcr0(features);
        asm!("xsave64 [{}]", in(reg) &raw mut area, in("eax") wanted as u32, in("edx") (wanted >> 32) as u32, options(nostack));
        set_xcr0(xcr0);
    }
    let header = &area.0[HEADER..HEADER + 8];
    let present = header.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
    let components = components(features & present);
    let components = components.map(|(number, offset, bytes)| (number, area.0[offset..offset + bytes].to_vec()));
    State { debug_addresses, xcr0, components: components.collect() }
}

impl State {
    /// Refuses what a guest whose XCR0 may have `features` could not have. Whether it may have this XCR0 is not its business.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self, features: u64) -> Result<(), BadState> {
        let known = |(number, content): &(u8, Vec<u8>)| {
            components(features).any(|(known, _, bytes)| known == *number && bytes == content.len())
        };
        require("vCPU", "extended state", self.components.iter().all(known))
    }
}

/// Puts a guest's own into its CPU, which [`reset`] was called on. On its CPU, before its first run.
///
/// # Safety
/// [`State::check`] has passed on this machine, and its guest may have that XCR0.
pub unsafe fn load(state: &State) {
    let [dr0, dr1, dr2, dr3] = state.debug_addresses;
    // SAFETY: ring 0; no breakpoint is on in the hypervisor.
    unsafe {
        asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
            in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, options(nomem, nostack, preserves_flags));
    }
    if !has_xsave() {
        return;
    }
    let mut area = Area([0; AREA_BYTES]);
    area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let mut present = 0u64;
    for (number, content) in &state.components {
        // Those that the guest is offered are those that were checked.
        let Some((_, offset, bytes)) = components(1 << number).next() else { continue };
        if bytes == content.len() {
            area.0[offset..offset + bytes].copy_from_slice(content);
            present |= 1 << number;
        }
    }
    area.0[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    let all = __cpuid_count(0xd, 0);
    // SAFETY: as in `reset`: the CPU takes all features and this form; the components that are there lie where it says.
    unsafe {
        set_xcr0(u64::from(all.edx) << 32 | u64::from(all.eax));
        asm!("xrstor64 [{}]", in(reg) &raw const area, in("eax") present as u32, in("edx") (present >> 32) as u32,
            clobber_abi("C"));
        set_xcr0(state.xcr0);
    }
}
