//! A 16550 of the machine, polled: no interrupts, FIFO on, 115200 8N1.
//!
//! Behind an emulated one is a socket or a terminal, and whoever reads there may stand still for any time: the machine that
//! it runs on has other work, or somebody has stopped the terminal. A port that is [patient](Port::be_patient) waits for them.

use crate::cpu::clock;
use crate::cpu::instructions::{inb, outb, rdtsc};

/// Bytes that the transmitter takes at once when it is empty.
pub(super) const FIFO_BYTES: usize = 16;
const RECEIVED: u8 = 1 << 0;
/// The FIFO takes [`FIFO_BYTES`]; the byte before them may still be on its way.
const FIFO_EMPTY: u8 = 1 << 5;
/// The last byte is gone as well.
const ALL_SENT: u8 = 1 << 6;
/// How long a transmitter may stay busy before nobody counts as listening. 16 bytes take 1.4 ms at 115200 baud.
const GIVE_UP_US: u64 = 1_000_000;
/// The same in polls, for when there is no clock (yet, or any more). A poll takes at least half a microsecond on a bus.
const GIVE_UP_POLLS: u32 = 2_000_000;

/// One port.
#[derive(Debug)]
pub(super) struct Port {
    base: u16,
    present: bool,
    patient: bool,
    busy_since: Option<u64>,
}

impl Port {
    /// The port at that address, not touched yet.
    pub(super) const fn new(base: u16) -> Self {
        Self { base, present: true, patient: false, busy_since: None }
    }

    /// From here on it waits for whoever reads, however long that takes.
    pub(super) fn be_patient(&mut self) {
        self.patient = true;
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

    /// Sends up to [`FIFO_BYTES`] bytes if they have room; says whether they are gone. Bytes for a port that does not exist
    /// are gone at once, and so are those for an impatient one that has taken none for a second.
    pub(super) fn write(&mut self, bytes: &[u8]) -> bool {
        if !self.ready(FIFO_EMPTY) {
            return self.given_up();
        }
        for &byte in bytes.iter().filter(|_| self.present) {
            // SAFETY: the FIFO is empty and takes 16 bytes.
            unsafe { outb(self.base, byte) };
        }
        true
    }

    /// Whether nothing is on its way any more: the machine may be switched off.
    pub(super) fn all_sent(&mut self) -> bool {
        self.ready(ALL_SENT) || self.given_up()
    }

    fn ready(&mut self, wanted: u8) -> bool {
        let ready = !self.present || self.status() & wanted != 0;
        if ready {
            self.busy_since = None;
        }
        ready
    }

    /// Of a port that is not ready.
    fn given_up(&mut self) -> bool {
        let since = *self.busy_since.get_or_insert_with(rdtsc);
        !self.patient && clock::us_from_tsc(rdtsc() - since) >= GIVE_UP_US
    }

    /// Sends all bytes, one at a time, without a clock, and gives up when the port does not take them.
    pub(super) fn write_blocking(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if !self.wait_for(FIFO_EMPTY) {
                return;
            }
            // SAFETY: the transmitter is empty.
            unsafe { outb(self.base, byte) };
        }
        self.wait_for(ALL_SENT);
    }

    fn wait_for(&self, wanted: u8) -> bool {
        (0..GIVE_UP_POLLS).any(|_| self.status() & wanted != 0)
    }
}
