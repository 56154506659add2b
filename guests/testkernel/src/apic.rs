//! The local APIC of the processor that calls, in whichever mode it is.

use crate::cpu::{rdmsr, wrmsr};
use crate::machine::{set_word, word};

pub(crate) const APIC_BASE: u32 = 0x1b;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
pub(crate) const ENABLE: u64 = 1 << 11;
pub(crate) const X2APIC: u64 = 1 << 10;
pub(crate) const WINDOW: u64 = 0xfee0_0000;

pub(crate) const ID: u32 = 0x20;
pub(crate) const VERSION: u32 = 0x30;
pub(crate) const TPR: u32 = 0x80;
pub(crate) const PPR: u32 = 0xa0;
pub(crate) const EOI: u32 = 0xb0;
pub(crate) const LDR: u32 = 0xd0;
pub(crate) const DFR: u32 = 0xe0;
pub(crate) const SVR: u32 = 0xf0;
pub(crate) const ICR: u32 = 0x300;
pub(crate) const ICR_HIGH: u32 = 0x310;
pub(crate) const LVT_TIMER: u32 = 0x320;
pub(crate) const LINT0: u32 = 0x350;
pub(crate) const TIMER_INITIAL: u32 = 0x380;
pub(crate) const TIMER_CURRENT: u32 = 0x390;
pub(crate) const TIMER_DIVIDE: u32 = 0x3e0;

pub(crate) const SELF: u32 = 1 << 18;
pub(crate) const OTHERS: u32 = 3 << 18;
pub(crate) const ASSERT: u32 = 1 << 14;
pub(crate) const NMI: u32 = 4 << 8;
pub(crate) const INIT: u32 = 5 << 8;
pub(crate) const STARTUP: u32 = 6 << 8;
pub(crate) const LOGICAL: u32 = 1 << 11;

/// Whether the APIC is in x2APIC mode.
pub(crate) fn is_x2apic() -> bool {
    rdmsr(APIC_BASE) & X2APIC != 0
}

/// Reads a register by its offset in the window.
pub(crate) fn read(register: u32) -> u32 {
    if is_x2apic() { rdmsr(0x800 + (register >> 4)) as u32 } else { word(WINDOW + u64::from(register)) }
}

/// Writes a register by its offset in the window.
pub(crate) fn write(register: u32, value: u32) {
    if is_x2apic() {
        wrmsr(0x800 + (register >> 4), u64::from(value));
    } else {
        set_word(WINDOW + u64::from(register), value);
    }
}

/// Enables the APIC by software, with the spurious vector 0xff.
pub(crate) fn enable() {
    write(SVR, 0x1ff);
    write(TPR, 0);
}

/// Sends a command to one processor, or wherever its shorthand says.
pub(crate) fn send(to: u32, command: u32) {
    if is_x2apic() {
        wrmsr(0x830, u64::from(to) << 32 | u64::from(command));
    } else {
        set_word(WINDOW + u64::from(ICR_HIGH), to << 24);
        set_word(WINDOW + u64::from(ICR), command);
    }
}
