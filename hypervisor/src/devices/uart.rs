//! A 16550A serial port (National Semiconductor PC16550D).
//!
//! The guest talks to eight registers; the host side takes transmitted bytes with [`Uart::take_output`] and queues typed
//! ones with [`Uart::push_input`]. The line is infinitely fast, with two exceptions that keep memory bounded without
//! losing a byte:
//!
//! * the output ring is bounded. When it is full, LSR.THRE and LSR.TEMT read 0, as if the line were slow; a driver waits.
//!   A byte written to THR regardless is lost, as it is on the real part, and is counted.
//! * the input queue is bounded. `push_input` says how many bytes it took; the receiver FIFO (16 bytes, or 1 with FIFOs
//!   off) is filled from it only as the guest reads, so an overrun can't happen.
//!
//! The interrupt output is a level, recomputed from the state: [`Uart::interrupt`]. The transmitter-empty interrupt is the
//! one that has memory of its own: it is raised by the holding register becoming empty or by setting IER.ETBEI while it
//! is, and cleared by reading it out of IIR or by writing THR.

use serde::{Deserialize, Serialize};

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::saved::{BadState, require};

/// IER: received data available.
const IER_RX: u8 = 1 << 0;
/// IER: transmitter holding register empty.
const IER_TX: u8 = 1 << 1;
/// IER: receiver line status.
const IER_LINE: u8 = 1 << 2;
/// IER: modem status.
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TX: u8 = 0x02;
const IIR_RX: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
/// IIR: FIFOs enabled.
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_THRE: u8 = 1 << 5;
const LSR_TEMT: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Depth of the receiver FIFO.
const FIFO: usize = 16;

/// The serial port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    /// Delta bits (3:0) of the modem status register; the level bits are computed.
    modem_delta: u8,
    overrun: bool,
    /// The transmitter-empty interrupt is pending.
    tx_pending: bool,
    receiver: VecDeque<u8>,
    input: VecDeque<u8>,
    input_limit: usize,
    output: VecDeque<u8>,
    output_limit: usize,
    lost: u64,
}

impl Uart {
    /// A port after reset. At most `output_limit` transmitted and `input_limit` typed bytes are kept, at least one of each.
    pub fn new(output_limit: usize, input_limit: usize) -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            divisor: 0x000c,
            modem_delta: 0,
            overrun: false,
            tx_pending: false,
            receiver: VecDeque::new(),
            input: VecDeque::new(),
            input_limit: input_limit.max(1),
            output: VecDeque::new(),
            output_limit: output_limit.max(1),
            lost: 0,
        }
    }

    /// The port loses its power and gets it back. What it has sent is sent; what was typed waits at the other end of the line.
    pub fn power_cycle(&mut self) {
        let (input, output) = (core::mem::take(&mut self.input), core::mem::take(&mut self.output));
        let fresh = Self::new(self.output_limit, self.input_limit);
        *self = Self { input, output, lost: self.lost, ..fresh };
        self.refill();
    }

    /// Refuses what no port made with these limits was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self, output_limit: usize, input_limit: usize) -> Result<(), BadState> {
        let limits = (self.output_limit, self.input_limit) == (output_limit.max(1), input_limit.max(1));
        require("serial port", "limits", limits)?;
        let full = self.output.len() > self.output_limit || self.input.len() > self.input_limit;
        require("serial port", "queues", !full && self.receiver.len() <= FIFO)?;
        require("serial port", "count", self.lost < u64::MAX / 2)
    }

    /// The level of the interrupt pin. OUT2 gates it, as it does on a PC's serial port.
    pub fn interrupt(&self) -> bool {
        // In loopback the OUT2 pin itself is inactive, but PC software expects to see loopback interrupts (the data sheet
        // says that they work) so the gate is left open there.
        self.mcr & (MCR_OUT2 | MCR_LOOP) != 0 && self.cause() != IIR_NONE
    }

    /// Reads register `offset` (0..=7).
    pub fn read(&mut self, offset: u8) -> u8 {
        match offset & 7 {
            0 if self.dlab() => self.divisor as u8,
            0 => self.read_receiver(),
            1 if self.dlab() => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => self.read_cause(),
            3 => self.lcr,
            4 => self.mcr,
            5 => self.read_line_status(),
            6 => {
                let status = self.modem_levels() | self.modem_delta;
                self.modem_delta = 0;
                status
            }
            _ => self.scratch,
        }
    }

    /// Writes register `offset` (0..=7).
    pub fn write(&mut self, offset: u8, value: u8) {
        match offset & 7 {
            0 if self.dlab() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value),
            1 if self.dlab() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            1 => self.write_enable(value),
            2 => self.write_fifo_control(value),
            3 => self.lcr = value,
            4 => self.write_modem_control(value),
            // LSR and MSR are read-only; writing them is a factory test of the real part.
            5 | 6 => {}
            _ => self.scratch = value,
        }
    }

    /// Queues typed bytes; returns how many were taken. The rest did not fit and stays the caller's.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let room = self.input_limit.saturating_sub(self.input.len());
        let taken = room.min(bytes.len());
        self.input.extend(&bytes[..taken]);
        self.refill();
        taken
    }

    /// Moves everything that the guest has sent to the end of `into`.
    pub fn take_output(&mut self, into: &mut Vec<u8>) {
        let was_full = self.output_full();
        into.extend(self.output.drain(..));
        if was_full {
            self.tx_pending = true;
        }
    }

    /// Whether [`Self::take_output`] would return anything.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// How many bytes the guest wrote although LSR.THRE was 0.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn receiver_depth(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    fn output_full(&self) -> bool {
        self.output.len() >= self.output_limit
    }

    fn holding_empty(&self) -> bool {
        self.looped() || !self.output_full()
    }

    /// In loopback the receiver is cut off from the line, so typed bytes wait.
    fn refill(&mut self) {
        while !self.looped() && self.receiver.len() < self.receiver_depth() {
            let Some(byte) = self.input.pop_front() else { break };
            self.receiver.push_back(byte);
        }
    }

    fn read_receiver(&mut self) -> u8 {
        let byte = self.receiver.pop_front().unwrap_or(0);
        self.refill();
        byte
    }

    fn transmit(&mut self, value: u8) {
        self.tx_pending = false;
        if self.looped() {
            if self.receiver.len() < self.receiver_depth() {
                self.receiver.push_back(value);
            } else {
                self.overrun = true;
            }
        } else if self.output_full() {
            self.lost += 1;
            return;
        } else {
            self.output.push_back(value);
        }
        // The line takes the byte at once, so the holding register is empty again unless the ring has filled up.
        self.tx_pending = self.holding_empty();
    }

    fn write_enable(&mut self, value: u8) {
        let newly = value & !self.ier;
        self.ier = value & 0x0f;
        if newly & IER_TX != 0 && self.holding_empty() {
            self.tx_pending = true;
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        // Turning the FIFOs on or off empties them; otherwise the reset bits do. The transmit FIFO is always empty.
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        if toggled || value & FCR_CLEAR_RX != 0 {
            self.receiver.clear();
        }
        // The other bits can be written only together with the enable bit.
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
        self.refill();
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_levels();
        self.mcr = value & MCR_MASK;
        let after = self.modem_levels();
        let changed = before ^ after;
        self.modem_delta |= (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4;
        // The ring indicator reports its trailing edge only.
        if changed & before & MSR_RI != 0 {
            self.modem_delta |= MSR_RI >> 4;
        }
        self.refill();
    }

    /// The peer is always there: CTS, DSR and DCD are on. In loopback the outputs are wired to the inputs.
    fn modem_levels(&self) -> u8 {
        if !self.looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let wire = |output: u8, input: u8| if self.mcr & output != 0 { input } else { 0 };
        wire(MCR_RTS, MSR_CTS) | wire(MCR_DTR, MSR_DSR) | wire(MCR_OUT1, MSR_RI) | wire(MCR_OUT2, MSR_DCD)
    }

    fn read_line_status(&mut self) -> u8 {
        let mut status = 0;
        if !self.receiver.is_empty() {
            status |= LSR_DATA;
        }
        if self.overrun {
            status |= LSR_OVERRUN;
            self.overrun = false;
        }
        if self.holding_empty() {
            status |= LSR_THRE | LSR_TEMT;
        }
        status
    }

    /// The interrupt of the highest priority that is enabled and pending, as IIR bits 3:0.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            return IIR_LINE;
        }
        if self.ier & IER_RX != 0 && !self.receiver.is_empty() {
            let trigger = match self.fcr >> 6 {
                0 => 1,
                1 => 4,
                2 => 8,
                _ => 14,
            };
            // Below the trigger level the character timeout speaks up, here at once: nothing else is on its way.
            return if self.receiver.len() >= trigger || !self.fifo_enabled() { IIR_RX } else { IIR_TIMEOUT };
        }
        if self.ier & IER_TX != 0 && self.tx_pending {
            return IIR_TX;
        }
        if self.ier & IER_MODEM != 0 && self.modem_delta != 0 {
            return IIR_MODEM;
        }
        IIR_NONE
    }

    fn read_cause(&mut self) -> u8 {
        let cause = self.cause();
        if cause == IIR_TX {
            self.tx_pending = false;
        }
        cause | if self.fifo_enabled() { IIR_FIFO } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;
    use alloc::vec;

    fn port() -> Uart {
        let mut uart = Uart::new(64, 64);
        uart.write(4, MCR_DTR | MCR_RTS | MCR_OUT2);
        uart
    }

    fn output(uart: &mut Uart) -> Vec<u8> {
        let mut bytes = Vec::new();
        uart.take_output(&mut bytes);
        bytes
    }

    #[test]
    fn bytes_come_out_in_order() {
        let mut uart = port();
        for byte in b"hello" {
            assert_eq!(uart.read(5) & LSR_THRE, LSR_THRE);
            uart.write(0, *byte);
        }
        assert_eq!(output(&mut uart), b"hello");
        assert!(!uart.has_output());
    }

    #[test]
    fn full_ring_pushes_back_and_draining_raises_the_interrupt() {
        let mut uart = Uart::new(4, 4);
        uart.write(4, MCR_OUT2);
        uart.write(1, IER_TX);
        assert_eq!(uart.read(2) & 0x0f, IIR_TX);
        for byte in 0..4 {
            uart.write(0, byte);
        }
        assert_eq!(uart.read(5) & (LSR_THRE | LSR_TEMT), 0);
        assert!(!uart.interrupt(), "a full transmitter must not ask for more");
        uart.write(0, 9);
        assert_eq!(uart.lost(), 1);
        assert_eq!(output(&mut uart), vec![0, 1, 2, 3]);
        assert!(uart.interrupt());
        assert_eq!(uart.read(5) & LSR_THRE, LSR_THRE);
    }

    #[test]
    fn transmitter_interrupt_is_cleared_by_reading_it_and_rearmed_by_enabling() {
        let mut uart = port();
        uart.write(1, IER_TX);
        assert!(uart.interrupt());
        assert_eq!(uart.read(2), IIR_TX);
        assert_eq!(uart.read(2), IIR_NONE);
        assert!(!uart.interrupt());
        uart.write(1, 0);
        uart.write(1, IER_TX);
        assert!(uart.interrupt(), "enabling while empty raises it again");
        uart.write(0, b'x');
        assert!(uart.interrupt());
    }

    #[test]
    fn out2_gates_the_pin() {
        let mut uart = Uart::new(4, 4);
        uart.write(1, IER_TX);
        assert!(!uart.interrupt());
        uart.write(4, MCR_OUT2);
        assert!(uart.interrupt());
    }

    #[test]
    fn input_is_bounded_and_arrives_in_order() {
        let mut uart = Uart::new(4, 8);
        uart.write(4, MCR_OUT2);
        uart.write(1, IER_RX);
        assert_eq!(uart.push_input(b"0123456789abcdef"), 8);
        assert_eq!(uart.push_input(b"ghijk"), 1, "one place was freed by the receiver");
        let mut got = Vec::new();
        while uart.read(5) & LSR_DATA != 0 {
            assert_eq!(uart.read(2), IIR_RX);
            got.push(uart.read(0));
        }
        assert_eq!(got, b"01234567g");
        assert!(!uart.interrupt());
        assert_eq!(uart.read(0), 0);
    }

    #[test]
    fn fifo_trigger_and_timeout() {
        let mut uart = port();
        uart.write(2, 0x81);
        uart.write(1, IER_RX);
        uart.push_input(b"abc");
        assert_eq!(uart.read(2), IIR_FIFO | IIR_TIMEOUT);
        uart.push_input(b"defgh");
        assert_eq!(uart.read(2), IIR_FIFO | IIR_RX);
        uart.write(2, 0x83);
        assert_eq!(uart.read(5) & LSR_DATA, 0, "the reset bit empties the receiver");
    }

    #[test]
    fn loopback_carries_data_modem_lines_and_overrun() {
        let mut uart = port();
        uart.write(4, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(uart.read(6) & 0xf0, MSR_CTS | MSR_DCD);
        assert_eq!(uart.read(6) & 0x0f, 0, "deltas are cleared by reading");
        uart.write(0, 0x5a);
        assert_eq!(uart.read(5) & LSR_DATA, LSR_DATA);
        uart.write(0, 0xa5);
        assert_eq!(uart.read(5) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(uart.read(5) & LSR_OVERRUN, 0);
        assert_eq!(uart.read(0), 0x5a);
        assert!(output(&mut uart).is_empty(), "nothing leaves the port in loopback");
        uart.push_input(b"k");
        assert_eq!(uart.read(5) & LSR_DATA, 0, "the line is cut off in loopback");
        uart.write(4, MCR_OUT2);
        assert_eq!(uart.read(0), b'k');
    }

    #[test]
    fn divisor_latch_hides_data_and_enable() {
        let mut uart = port();
        uart.write(3, 0x83);
        uart.write(0, 0x34);
        uart.write(1, 0x12);
        assert_eq!((uart.read(0), uart.read(1)), (0x34, 0x12));
        uart.write(3, 0x03);
        assert_eq!(uart.read(1), 0);
        assert!(output(&mut uart).is_empty());
    }

    #[test]
    fn drivers_probe_finds_a_16550a() {
        let mut uart = port();
        uart.write(1, 0xff);
        assert_eq!(uart.read(1), 0x0f);
        uart.write(2, 0x01);
        assert_eq!(uart.read(2) & 0xc0, 0xc0);
        uart.write(2, 0x21);
        assert_eq!(uart.read(2) & 0x20, 0, "not a 16750");
        uart.write(7, 0xae);
        assert_eq!(uart.read(7), 0xae);
    }

    #[test]
    fn random_access_stays_bounded_and_loses_nothing_it_accepted() {
        let mut random = Random::new(1);
        let mut uart = Uart::new(8, 8);
        for _ in 0..200_000 {
            match random.below(20) {
                0 => assert!(output(&mut uart).len() <= 8),
                1 => assert!(uart.push_input(&[1; 32]) <= 9),
                n if n & 1 == 0 => uart.write(random.byte(), random.byte()),
                _ => _ = uart.read(random.byte()),
            }
            assert!(uart.output.len() <= 8 && uart.input.len() <= 8 && uart.receiver.len() <= FIFO);
        }
    }
}
