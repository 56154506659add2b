//! The I/O APIC (82093AA with the EOI register of its successors): 24 inputs, each with a redirection entry.
//!
//! It has no wires to the local APICs; what it sends accumulates, one message an input at most, until
//! [`IoApic::take_message`]. The owner takes all messages after each call that can make one.
//!
//! An edge-triggered input sends when its line rises; a rise while it is masked is lost, as the data sheet says. A
//! level-triggered one sends when its line is high and its remote IRR is clear; sending sets remote IRR, and the EOI of
//! that vector clears it, upon which a line that is still high sends again. Polarity is kept and not looked at: a line is
//! "high" when its device asks for service.

use serde::{Deserialize, Serialize};

use super::saved::{BadState, require};

/// Guest-physical address of the window.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Length of the window in bytes.
pub const IOAPIC_BYTES: u64 = 0x1000;
/// Number of inputs.
pub const PINS: u8 = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const REGISTER_FIRST_ENTRY: u8 = 0x10;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const MODE_SHIFT: u32 = 8;
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, mode, destination mode, polarity, trigger, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// What a redirection entry has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Delivery mode as in ICR: 0 fixed, 1 lowest priority, 4 NMI, 5 INIT, 7 ExtINT.
    pub mode: u8,
    /// Vector, where the mode has one.
    pub vector: u8,
    /// Destination, eight bits.
    pub destination: u8,
    /// The destination is a logical one.
    pub logical: bool,
    /// Level-triggered: its EOI is to come back to [`IoApic::end_of_interrupt`].
    pub level: bool,
}

/// One I/O APIC.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IoApic {
    id: u8,
    select: u8,
    entries: [u64; PINS as usize],
    /// Levels of the inputs.
    lines: u32,
    /// Inputs that have something to send.
    pending: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// After reset: everything masked.
    pub const fn new() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; PINS as usize], lines: 0, pending: 0 }
    }

    /// Refuses what no I/O APIC was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("I/O APIC", "inputs", (self.lines | self.pending) >> PINS == 0)?;
        let valid = |entry: &u64| entry & !(WRITABLE | REMOTE_IRR | DELIVERY_STATUS) == 0;
        require("I/O APIC", "entry", self.entries.iter().all(valid))
    }

    /// Sets the level of an input; numbers beyond the last are ignored.
    pub fn set_line(&mut self, pin: u8, high: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rises = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        let entry = self.entries[usize::from(pin)];
        if entry & LEVEL != 0 {
            self.serve_level(pin);
        } else if rises && entry & MASKED == 0 {
            self.pending |= bit;
        }
    }

    /// Whether an input would do nothing if its line rose.
    pub fn is_masked(&self, pin: u8) -> bool {
        self.entries.get(usize::from(pin)).is_none_or(|entry| entry & MASKED != 0)
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.entries[usize::from(pin)];
            if *entry & LEVEL != 0 && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                self.serve_level(pin);
            }
        }
    }

    /// The next message, lowest input first.
    pub fn take_message(&mut self) -> Option<Message> {
        if self.pending == 0 {
            return None;
        }
        let pin = self.pending.trailing_zeros();
        self.pending &= self.pending - 1;
        let entry = self.entries[pin as usize];
        Some(Message {
            mode: (entry >> MODE_SHIFT & 7) as u8,
            vector: entry as u8,
            destination: (entry >> 56) as u8,
            logical: entry & LOGICAL != 0,
            level: entry & LEVEL != 0,
        })
    }

    /// Whether there is one.
    pub fn has_message(&self) -> bool {
        self.pending != 0
    }

    /// Reads at an offset of the window. Registers are 32 bits wide; anything but a whole one reads 0.
    pub fn read(&self, offset: u64, bytes: usize) -> u32 {
        match (offset, bytes) {
            (SELECT, _) => u32::from(self.select),
            (WINDOW, 4..) => self.register(),
            _ => 0,
        }
    }

    /// Writes at an offset of the window.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u32) {
        match (offset, bytes) {
            (SELECT, _) => self.select = value as u8,
            (WINDOW, 4..) => self.set_register(value),
            (EOI, _) => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    /// The redirection entry that is selected and whether its upper half is.
    fn selected(&self) -> Option<(u8, bool)> {
        let index = self.select.checked_sub(REGISTER_FIRST_ENTRY)?;
        (index < 2 * PINS).then_some((index / 2, index % 2 != 0))
    }

    fn register(&self) -> u32 {
        match (self.select, self.selected()) {
            (_, Some((pin, upper))) => {
                let entry = self.entries[usize::from(pin)];
                if upper { (entry >> 32) as u32 } else { entry as u32 }
            }
            (REGISTER_ID | REGISTER_ARBITRATION, _) => u32::from(self.id) << 24,
            (REGISTER_VERSION, _) => VERSION,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.select == REGISTER_ID {
            self.id = (value >> 24) as u8 & 0x0f;
        }
        let Some((pin, upper)) = self.selected() else { return };
        let entry = &mut self.entries[usize::from(pin)];
        let kept = *entry & (REMOTE_IRR | DELIVERY_STATUS);
        let written = if upper {
            *entry & 0xffff_ffff | u64::from(value) << 32
        } else {
            *entry & !0xffff_ffff | u64::from(value)
        };
        *entry = written & WRITABLE | kept;
        // An edge-triggered input has no remote IRR: software that lost an EOI gets rid of it by this.
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        self.serve_level(pin);
    }

    fn serve_level(&mut self, pin: u8) {
        let entry = &mut self.entries[usize::from(pin)];
        let ready = *entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        if ready && self.lines & 1 << pin != 0 {
            *entry |= REMOTE_IRR;
            self.pending |= 1 << pin;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    fn set(ioapic: &mut IoApic, pin: u8, entry: u64) {
        for half in [1, 0] {
            ioapic.write(SELECT, 4, u32::from(REGISTER_FIRST_ENTRY + 2 * pin + half));
            ioapic.write(WINDOW, 4, (entry >> (32 * half)) as u32);
        }
    }

    fn get(ioapic: &mut IoApic, pin: u8) -> u64 {
        let mut half = |half| {
            ioapic.write(SELECT, 4, u32::from(REGISTER_FIRST_ENTRY + 2 * pin + half));
            u64::from(ioapic.read(WINDOW, 4))
        };
        half(0) | half(1) << 32
    }

    #[test]
    fn registers() {
        let mut ioapic = IoApic::new();
        ioapic.write(SELECT, 4, 1);
        assert_eq!(ioapic.read(WINDOW, 4), 0x0017_0020);
        ioapic.write(SELECT, 4, 0);
        ioapic.write(WINDOW, 4, 0xff00_0000);
        assert_eq!(ioapic.read(WINDOW, 4), 0x0f00_0000);
        assert_eq!(get(&mut ioapic, 23), MASKED);
        set(&mut ioapic, 5, u64::MAX);
        assert_eq!(get(&mut ioapic, 5), WRITABLE);
        ioapic.write(SELECT, 4, 0x40);
        ioapic.write(WINDOW, 4, 1);
        assert_eq!(ioapic.read(WINDOW, 4), 0, "there is no 25th entry");
    }

    #[test]
    fn edges_send_once_and_are_lost_while_masked() {
        let mut ioapic = IoApic::new();
        set(&mut ioapic, 4, 0x0200_0000_0000_0831);
        ioapic.set_line(4, true);
        ioapic.set_line(4, true);
        let message = Message { mode: 0, vector: 0x31, destination: 2, logical: true, level: false };
        assert_eq!(ioapic.take_message(), Some(message));
        assert_eq!(ioapic.take_message(), None);
        set(&mut ioapic, 4, MASKED | 0x31);
        ioapic.set_line(4, false);
        ioapic.set_line(4, true);
        set(&mut ioapic, 4, 0x31);
        assert!(!ioapic.has_message());
    }

    #[test]
    fn levels_send_again_after_the_end_of_interrupt() {
        let mut ioapic = IoApic::new();
        set(&mut ioapic, 9, LEVEL | MASKED | 0x71);
        ioapic.set_line(9, true);
        assert!(!ioapic.has_message());
        set(&mut ioapic, 9, LEVEL | 0x71);
        assert_eq!(ioapic.take_message().map(|message| (message.vector, message.level)), Some((0x71, true)));
        assert_eq!(get(&mut ioapic, 9), LEVEL | REMOTE_IRR | 0x71);
        ioapic.set_line(9, false);
        ioapic.set_line(9, true);
        assert!(!ioapic.has_message(), "remote IRR holds it back");
        ioapic.end_of_interrupt(0x70);
        assert!(!ioapic.has_message(), "another vector's end");
        ioapic.end_of_interrupt(0x71);
        assert!(ioapic.take_message().is_some());
        ioapic.set_line(9, false);
        ioapic.write(EOI, 4, 0x71);
        assert!(!ioapic.has_message());
        assert_eq!(get(&mut ioapic, 9), LEVEL | 0x71);
    }

    #[test]
    fn becoming_edge_triggered_clears_remote_irr() {
        let mut ioapic = IoApic::new();
        set(&mut ioapic, 9, LEVEL | 0x71);
        ioapic.set_line(9, true);
        set(&mut ioapic, 9, 0x71);
        assert_eq!(get(&mut ioapic, 9), 0x71);
    }

    #[test]
    fn random_use_keeps_the_rules() {
        let mut random = Random::new(24);
        let mut ioapic = IoApic::new();
        for _ in 0..200_000 {
            match random.below(4) {
                0 => ioapic.set_line(random.below(32) as u8, random.below(2) == 0),
                1 => ioapic.write([0, 0x10, 0x40, 0x24][random.below(4) as usize], 4, random.of_any_length(33) as u32),
                2 => ioapic.end_of_interrupt(random.byte()),
                _ => {
                    ioapic.read(random.below(64), 1 << random.below(4));
                }
            }
            let mut messages = 0;
            while ioapic.take_message().is_some() {
                messages += 1;
            }
            assert!(messages <= PINS);
            for entry in ioapic.entries {
                assert!(entry & REMOTE_IRR == 0 || entry & LEVEL != 0);
            }
        }
    }
}
