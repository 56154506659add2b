//! Instructions.

use core::arch::asm;
use core::arch::x86_64::__cpuid;

macro_rules! port {
    ($in:ident, $out:ident, $type:ty, $register:tt) => {
        /// Reads a port.
        pub(crate) fn $in(port: u16) -> $type {
            let value;
            // SAFETY: the machine's ports do nothing to this kernel's memory.
            unsafe { asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nostack)) };
            value
        }

        /// Writes a port.
        pub(crate) fn $out(port: u16, value: $type) {
            // SAFETY: as above; the page flush leaves contents as they are.
            unsafe { asm!(concat!("out dx, ", $register), in($register) value, in("dx") port, options(nostack)) };
        }
    };
}

port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");

/// Reads an MSR that exists.
pub(crate) fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading has no effect; one that does not exist ends in the handler that fails the check.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR of the local APIC or its base.
pub(crate) fn wrmsr(msr: u32, value: u64) {
    // SAFETY: these MSRs have no effect on memory.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack)) };
}

/// The time stamp counter.
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: it only reads.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Lets interrupts in.
pub(crate) fn sti() {
    // SAFETY: handlers have stacks of their own and keep all registers.
    unsafe { asm!("sti", options(nostack)) };
}

/// Keeps interrupts out.
pub(crate) fn cli() {
    // SAFETY: see `sti`.
    unsafe { asm!("cli", options(nostack)) };
}

/// Sleeps until an interrupt has been handled; interrupts are off before and after.
pub(crate) fn sleep() {
    // SAFETY: see `sti`. Nothing can come between STI and HLT.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Drops the translation of a linear address.
pub(crate) fn invlpg(address: u64) {
    // SAFETY: dropping translations is always right.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack)) };
}

/// Drops all translations.
pub(crate) fn reload_cr3() {
    // SAFETY: as `invlpg`; the tables stay the same.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) };
}

/// The local APIC's ID, as CPUID tells it.
pub(crate) fn initial_apic_id() -> u32 {
    __cpuid(1).ebx >> 24
}
