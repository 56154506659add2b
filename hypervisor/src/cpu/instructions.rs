//! One function an instruction that Rust has no word for. Nothing here has a policy.

use core::arch::asm;

/// Reads a model-specific register.
///
/// # Safety
/// The register must exist on this CPU (else #GP, which ends the hypervisor).
#[inline]
pub unsafe fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for the register; reading one has no effect on memory.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist, take the value, and the change must not break what Rust code relies on.
#[inline]
pub unsafe fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the caller vouches for it. No `nomem`: the write may order or change memory accesses.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// Reads a byte from a port.
///
/// # Safety
/// The read's side effects on the device must be wanted.
#[inline]
pub unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to a port.
///
/// # Safety
/// As [`inb`].
#[inline]
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads 16 bits from a port.
///
/// # Safety
/// As [`inb`].
#[inline]
pub unsafe fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes 16 bits to a port.
///
/// # Safety
/// As [`inb`].
#[inline]
pub unsafe fn outw(port: u16, value: u16) {
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads 32 bits from a port.
///
/// # Safety
/// As [`inb`].
#[inline]
pub unsafe fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes 32 bits to a port.
///
/// # Safety
/// As [`inb`].
#[inline]
pub unsafe fn outl(port: u16, value: u32) {
    // SAFETY: the caller vouches for the port.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// The time-stamp counter, not ordered against other instructions.
#[inline]
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no effect but its result, and exists on every CPU that runs 64-bit code.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The address of the current top-level page table.
///
/// # Safety
/// Ring 0 only.
#[inline]
pub unsafe fn read_cr3() -> u64 {
    let value;
    // SAFETY: reading CR3 has no side effects in ring 0.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reloads CR3 with its own value: drops this CPU's non-global translations.
///
/// # Safety
/// Ring 0 only.
#[inline]
pub unsafe fn flush_tlb() {
    // SAFETY: the same tables stay in force.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// The faulting address of the last page fault.
///
/// # Safety
/// Ring 0 only.
#[inline]
pub unsafe fn read_cr2() -> u64 {
    let value;
    // SAFETY: reading CR2 has no side effects in ring 0.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Opens interrupts for the length of one instruction and closes them again: whatever is pending is taken now.
///
/// # Safety
/// Ring 0, interrupts off, IDT loaded; the caller must not hold what an interrupt handler takes.
#[inline]
pub unsafe fn interrupt_window() {
    // SAFETY: the handlers save no caller-saved register, so all of them are declared changed. STI holds interrupts off
    // for one instruction (NOP), they are taken before CLI.
    unsafe { asm!("sti", "nop", "cli", clobber_abi("C")) };
}

/// Halts until an interrupt or NMI, takes it, and returns with interrupts off again. An interrupt that became pending
/// before the call is not lost: STI takes effect only after HLT has begun.
///
/// # Safety
/// As [`interrupt_window`].
#[inline]
pub unsafe fn halt() {
    // SAFETY: as in `interrupt_window`.
    unsafe { asm!("sti", "hlt", "cli", clobber_abi("C")) };
}

/// Resets the machine by an exception that nothing can handle.
///
/// # Safety
/// Ring 0; the machine's end is wanted.
pub unsafe fn triple_fault() -> ! {
    #[repr(C, packed)]
    struct Empty(u16, u64);
    let empty = Empty(0, 0);
    // SAFETY: without an interrupt table the exception leads to shutdown.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const empty, options(noreturn)) }
}

/// Halts for ever with interrupts off.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: only called in ring 0; nothing follows.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Drops what this CPU's TLB has of a linear address under an ASID.
///
/// # Safety
/// Ring 0 only; EFER.SVME must be set. The ASID is not the host's.
#[inline]
pub unsafe fn invlpga(linear: u64, asid: u32) {
    // SAFETY: the caller vouches for SVM being on; a translation that is gone is found again in the tables.
    unsafe { asm!("invlpga rax, ecx", in("rax") linear, in("ecx") asid, options(nostack, preserves_flags)) };
}

/// Sets or clears the global interrupt flag of SVM.
///
/// # Safety
/// EFER.SVME must be set.
#[inline]
pub unsafe fn stgi() {
    // SAFETY: the caller vouches for SVM being on.
    unsafe { asm!("stgi", options(nostack, preserves_flags)) };
}
