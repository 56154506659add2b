//! A 16550 of the machine, polled: no interrupts, FIFO on, 115200 8N1.

use crate::cpu::clock;
use crate::cpu::instructions::{inb, outb, rdtsc};

/// Bytes that the transmitter takes at once when it is empty.
pub(super) const FIFO_BYTES: usize = 16;
const RECEIVED: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// How long a transmitter may stay busy before it counts as gone. 16 bytes take 1.4 ms at 115200 baud.
const GIVE_UP_US: u64 = 1_000_000;
/// The same in polls, for when there is no clock (yet, or any more). A poll takes at least half a microsecond on a bus.
const GIVE_UP_POLLS: u32 = 2_000_000;

/// One port.
#[derive(Debug)]
pub(super) struct Port {
    base: u16,
    present: bool,
    busy_since: Option<u64>,
}

impl Port {
    /// The port at that address, not touched yet.
    pub(super) const fn new(base: u16) -> Self {
        Self { base, present: true, busy_since: None }
    }

    /// Sets the port up, and finds out by its scratch register whether it exists.
    pub(super) fn init(&mut self) {
        const SCRATCH: u8 = 0x5a;
        // SAFETY: these are serial ports of a PC, or nothing; no other driver uses them.
        unsafe {
            outb(self.base + 7, SCRATCH);
            self.present = inb(self.base + 7) == SCRATCH;
            outb(self.base + 1, 0);
            outb(self.base + 3, 0x80);
            outb(self.base, 1);
            outb(self.base + 1, 0);
            outb(self.base + 3, 0x03);
            outb(self.base + 2, 0x07);
            outb(self.base + 4, 0x03);
        }
    }

    fn status(&self) -> u8 {
        // SAFETY: reading the line status has no side effect that matters: errors are not looked at.
        unsafe { inb(self.base + 5) }
    }

    /// A received byte.
    pub(super) fn read(&mut self) -> Option<u8> {
        // SAFETY: reading the receiver takes the byte, which is what is wanted.
        (self.present && self.status() & RECEIVED != 0).then(|| unsafe { inb(self.base) })
    }

    /// Sends up to [`FIFO_BYTES`] bytes if the transmitter is empty; says whether they are gone. Bytes for a port that
    /// does not exist, or that took none for a second, are gone at once.
    pub(super) fn write(&mut self, bytes: &[u8]) -> bool {
        if !self.present {
            return true;
        }
        if self.status() & TRANSMITTER_EMPTY == 0 {
            let since = *self.busy_since.get_or_insert_with(rdtsc);
            self.present = clock::us_from_tsc(rdtsc() - since) < GIVE_UP_US;
            return false;
        }
        self.busy_since = None;
        for &byte in bytes {
            // SAFETY: the FIFO is empty and takes 16 bytes.
            unsafe { outb(self.base, byte) };
        }
        true
    }

    /// Sends all bytes, one at a time, without a clock, and gives up when the port does not take them.
    pub(super) fn write_blocking(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if !self.wait_until_empty() {
                return;
            }
            // SAFETY: the transmitter is empty.
            unsafe { outb(self.base, byte) };
        }
        self.wait_until_empty();
    }

    fn wait_until_empty(&self) -> bool {
        (0..GIVE_UP_POLLS).any(|_| self.status() & TRANSMITTER_EMPTY != 0)
    }
}
