//! The machine's end: off, by ACPI's soft-off state; again, by whatever resets; or nothing any more.
//!
//! Called once, by whoever ends the machine, with interrupts off; a CPU that panicked may be that one. So nothing here
//! takes a lock, and every wait is a number of tries. What a machine does not have is passed over; at the end the CPU halts.

use core::hint;

use spin::Once;

use super::instructions::{halt_forever, inb, inw, outb, outw};
use crate::boot::acpi::Power;

static POWER: Once<Power> = Once::new();

/// The registers belong to the system.
const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE: u16 = 0b111 << SLEEP_TYPE_SHIFT;
/// A read of a port takes half a microsecond at least: seconds, which is what firmware may take.
const TRIES: u32 = 5_000_000;

/// Says how this machine is switched off and reset.
pub fn set(power: Power) {
    POWER.call_once(|| power);
}

/// Switches the machine off, or halts this CPU for ever where the firmware did not say how.
pub fn off() -> ! {
    let Some(off) = POWER.get().and_then(|power| power.off) else { halt_forever() };
    let registers = || off.control.into_iter().flatten();
    // SAFETY: these are the registers for it, and the end of the machine is what is wanted.
    unsafe {
        let first = registers().next().map_or(0, |(port, _)| port);
        if let Some((port, value)) = off.enable
            && inw(first) & SCI_ENABLED == 0
        {
            outb(port, value);
            for _ in 0..TRIES {
                if inw(first) & SCI_ENABLED != 0 {
                    break;
                }
                hint::spin_loop();
            }
        }
        for (port, kind) in registers() {
            let rest = inw(port) & !(SLEEP_TYPE | SLEEP_ENABLE);
            outw(port, rest | u16::from(kind) << SLEEP_TYPE_SHIFT | SLEEP_ENABLE);
        }
    }
    halt_forever()
}

/// Resets the machine: by ACPI's register, by the chipset's, by the keyboard controller, by a triple fault.
pub fn reset() -> ! {
    const CHIPSET: u16 = 0xcf9;
    const KEYBOARD: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;
    let wait = || {
        for _ in 0..TRIES / 50 {
            // SAFETY: reading the keyboard controller's status has no side effect.
            unsafe { inb(KEYBOARD) };
        }
    };
    // SAFETY: a reset is what is wanted, and where a port is nobody's the write has no effect.
    unsafe {
        if let Some((port, value)) = POWER.get().and_then(|power| power.reset) {
            outb(port, value);
            wait();
        }
        outb(CHIPSET, 0x02);
        outb(CHIPSET, 0x06);
        wait();
        outb(KEYBOARD, PULSE_RESET);
        wait();
        super::instructions::triple_fault()
    }
}
