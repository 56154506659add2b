//! The local APIC, in xAPIC (memory-mapped) mode: the mode that every machine starts in and that QEMU's emulated CPUs
//! have. Its page is identity mapped; the firmware's MTRRs make it uncached.
//!
//! Each function acts on the calling CPU's own APIC. The interrupt command register is two halves, written high then
//! low; nothing comes between, because interrupts are off and the NMI handler sends nothing.

use core::hint::spin_loop;
use core::ptr;

use super::{instructions, vector};

const BASE: usize = 0xfee0_0000;
/// The end-of-interrupt register, for the handlers.
pub(super) const EOI: usize = BASE + register::EOI;

mod register {
    pub(super) const ID: usize = 0x20;
    pub(super) const TASK_PRIORITY: usize = 0x80;
    pub(super) const EOI: usize = 0xb0;
    pub(super) const SPURIOUS: usize = 0xf0;
    pub(super) const COMMAND_LOW: usize = 0x300;
    pub(super) const COMMAND_HIGH: usize = 0x310;
    pub(super) const LVT_TIMER: usize = 0x320;
    pub(super) const LVT_THERMAL: usize = 0x330;
    pub(super) const LVT_PERFORMANCE: usize = 0x340;
    pub(super) const LVT_LINT0: usize = 0x350;
    pub(super) const LVT_LINT1: usize = 0x360;
    pub(super) const LVT_ERROR: usize = 0x370;
    pub(super) const TIMER_INITIAL: usize = 0x380;
    pub(super) const TIMER_CURRENT: usize = 0x390;
    pub(super) const TIMER_DIVIDE: usize = 0x3e0;
}

const MASKED: u32 = 1 << 16;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const DIVIDE_BY_1: u32 = 0b1011;
const DELIVERY_PENDING: u32 = 1 << 12;
const MSR_APIC_BASE: u32 = 0x1b;

/// What an interrupt command does at its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// An ordinary interrupt.
    Fixed(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// Resets the CPU into waiting for a start-up command.
    Init,
    /// Starts a waiting CPU at the page of that number.
    Startup(u8),
}

impl Command {
    fn bits(self) -> u32 {
        const LEVEL_ASSERT: u32 = 1 << 14;
        match self {
            Self::Fixed(vector) => u32::from(vector) | LEVEL_ASSERT,
            Self::Nmi => 0x400 | LEVEL_ASSERT,
            Self::Init => 0x500 | LEVEL_ASSERT,
            Self::Startup(page) => 0x600 | u32::from(page) | LEVEL_ASSERT,
        }
    }
}

fn read(register: usize) -> u32 {
    // SAFETY: the APIC's page is mapped and has the registers that this module names.
    unsafe { ptr::with_exposed_provenance::<u32>(BASE + register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as in `read`; what is written is decided in this module.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(BASE + register).write_volatile(value) };
}

/// This CPU's APIC id.
#[must_use]
pub fn id() -> u32 {
    read(register::ID) >> 24
}

/// Turns this CPU's APIC on, with everything masked but what other CPUs send.
///
/// # Safety
/// Ring 0, once a CPU. The APIC must be at its architectural address.
pub unsafe fn enable() {
    const GLOBAL_ENABLE: u64 = 1 << 11;
    const X2APIC: u64 = 1 << 10;
    // SAFETY: every 64-bit CPU has the register.
    let base = unsafe { instructions::rdmsr(MSR_APIC_BASE) };
    assert!(base & X2APIC == 0, "the firmware left the APIC in x2APIC mode, which is not driven here");
    assert!(base & 0xf_ffff_f000 == BASE as u64, "the firmware moved the APIC");
    // SAFETY: as above.
    unsafe { instructions::wrmsr(MSR_APIC_BASE, base | GLOBAL_ENABLE) };
    for lvt in [
        register::LVT_TIMER,
        register::LVT_THERMAL,
        register::LVT_PERFORMANCE,
        register::LVT_LINT0,
        register::LVT_LINT1,
        register::LVT_ERROR,
    ] {
        write(lvt, MASKED);
    }
    write(register::TASK_PRIORITY, 0);
    write(register::SPURIOUS, SOFTWARE_ENABLE | u32::from(vector::SPURIOUS));
    write(register::TIMER_DIVIDE, DIVIDE_BY_1);
    write(register::LVT_TIMER, u32::from(vector::TIMER));
}

/// Sends a command to the CPU with that APIC id.
pub fn send(apic_id: u32, command: Command) {
    while read(register::COMMAND_LOW) & DELIVERY_PENDING != 0 {
        spin_loop();
    }
    write(register::COMMAND_HIGH, apic_id << 24);
    write(register::COMMAND_LOW, command.bits());
}

/// Starts the one-shot timer; 0 stops it.
pub fn set_timer(ticks: u32) {
    write(register::TIMER_INITIAL, ticks);
}

/// What is left of the timer's ticks.
#[must_use]
pub fn timer_ticks() -> u32 {
    read(register::TIMER_CURRENT)
}

/// Masks both 8259s: nothing of the old interrupt controllers is used, and their lines must not find an open window.
///
/// # Safety
/// Ring 0, a machine with 8259s or nothing at those ports.
pub unsafe fn mask_legacy_controllers() {
    // SAFETY: writing the mask registers only keeps interrupts away.
    unsafe {
        instructions::outb(0x21, 0xff);
        instructions::outb(0xa1, 0xff);
    }
}
