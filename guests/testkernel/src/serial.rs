//! The first serial port: a line of text at a time, one processor at a time.

use core::fmt::{self, Arguments, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{inb, outb};

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(DATA, byte);
        }
        Ok(())
    }
}

static BUSY: AtomicBool = AtomicBool::new(false);

/// Prints. Not from handlers: the processor that they interrupted may be printing.
pub(crate) fn print(text: Arguments<'_>) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    // The port never fails.
    let _ = Port.write_fmt(text);
    BUSY.store(false, Ordering::Release);
}
