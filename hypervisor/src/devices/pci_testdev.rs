//! QEMU's `pci-testdev`: a PCI function with a BAR of memory and a BAR of ports, to measure accesses to either.
//!
//! Both begin with a header. Software writes a test's number into its first byte and reads there how the test is done:
//! width, offset and value of an access. A number beyond the last says so by a width of 0. There are three tests a BAR: one
//! counts its writes in the header; the writes of the other two end, in QEMU, at an event that nobody waits for here.
//!
//! A wide access to a BAR is that many accesses of a byte, as in QEMU. Firmware has given the function its addresses and
//! turned it on. Software may move it; what lies under a BAR answers first.

use serde::{Deserialize, Serialize};

use super::saved::{BadState, require};

/// What lies at offset 0 of both BARs.
mod header {
    pub(super) const TEST: usize = 0;
    pub(super) const WIDTH: usize = 1;
    pub(super) const OFFSET: usize = 4;
    pub(super) const DATA: usize = 8;
    pub(super) const COUNT: usize = 12;
    pub(super) const NAME: usize = 16;
}

const ID: u32 = 0x0005_1b36;
/// Class 0, subclass 0xff; revision 0.
const CLASS: u32 = 0x00ff_0000;
const SUBSYSTEM: u32 = 0x1100_1af4;

/// Answers at its port BAR, at its memory BAR; the other bits that software may set have no effect.
const COMMAND_PORTS: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_WRITABLE: u16 = 0x0507;

const MEMORY_BYTES: u32 = 4096;
const PORTS: u32 = 256;
const PORT_BAR: u32 = 1;

/// The only width of an access: a byte.
const WIDTH: u8 = 1;
const MATCHED: u8 = 0xfa;
const ANY: u8 = 0xce;

/// Which BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Bar {
    Memory,
    Ports,
}

/// What a test does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Test {
    Counted,
    AnyValue,
    OneValue,
}

const TESTS: [Test; 3] = [Test::Counted, Test::AnyValue, Test::OneValue];

/// The test that software has started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Running {
    bar: Bar,
    test: Test,
    count: u32,
}

/// The function.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PciTestDevice {
    command: u16,
    memory: u32,
    ports: u32,
    /// Cache line size and latency timer, and the interrupt line: software keeps them there.
    noted: [u8; 3],
    running: Option<Running>,
}

impl Default for PciTestDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl Running {
    const fn number(self) -> u8 {
        self.test as u8 + if matches!(self.bar, Bar::Memory) { 0 } else { TESTS.len() as u8 }
    }

    /// Where the test's access goes: in the second half of the BAR.
    const fn offset(self) -> u32 {
        let half = match self.bar {
            Bar::Memory => MEMORY_BYTES / 2,
            Bar::Ports => PORTS / 2,
        };
        half + self.number() as u32
    }

    const fn data(self) -> u8 {
        match self.test {
            Test::AnyValue => ANY,
            Test::Counted | Test::OneValue => MATCHED,
        }
    }

    const fn name(self) -> &'static [u8] {
        match (self.bar, self.test) {
            (Bar::Memory, Test::Counted) => b"mmio-no-eventfd",
            (Bar::Memory, Test::AnyValue) => b"mmio-wildcard-eventfd",
            (Bar::Memory, Test::OneValue) => b"mmio-datamatch-eventfd",
            (Bar::Ports, Test::Counted) => b"portio-no-eventfd",
            (Bar::Ports, Test::AnyValue) => b"portio-wildcard-eventfd",
            (Bar::Ports, Test::OneValue) => b"portio-datamatch-eventfd",
        }
    }

    /// A byte of the header.
    fn byte(self, at: usize) -> u8 {
        let of = |word: u32, first: usize| word.to_le_bytes()[at - first];
        match at {
            header::TEST => self.number(),
            header::WIDTH => WIDTH,
            header::OFFSET..header::DATA => of(self.offset(), header::OFFSET),
            header::DATA => self.data(),
            header::COUNT..header::NAME => of(self.count, header::COUNT),
            header::NAME.. => self.name().get(at - header::NAME).copied().unwrap_or(0),
            _ => 0,
        }
    }
}

impl PciTestDevice {
    /// As firmware leaves it.
    pub const fn new() -> Self {
        let command = COMMAND_PORTS | COMMAND_MEMORY;
        Self { command, memory: 0xfebf_f000, ports: 0xc000, noted: [0; 3], running: None }
    }

    /// Refuses what no such function was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("PCI test device", "command", self.command & !COMMAND_WRITABLE == 0)?;
        let aligned = self.memory.is_multiple_of(MEMORY_BYTES) && self.ports.is_multiple_of(PORTS);
        require("PCI test device", "addresses", aligned)
    }

    /// A register of its configuration space; `register` is a multiple of 4.
    pub const fn config(&self, register: u8) -> u32 {
        let [line_size, latency, interrupt_line] = self.noted;
        match register {
            0x00 => ID,
            0x04 => self.command as u32,
            0x08 => CLASS,
            0x0c => line_size as u32 | (latency as u32) << 8,
            0x10 => self.memory,
            0x14 => self.ports | PORT_BAR,
            0x2c => SUBSYSTEM,
            // No pin.
            0x3c => interrupt_line as u32,
            _ => 0,
        }
    }

    /// Writes a whole register of its configuration space. What can't be written stays.
    pub const fn set_config(&mut self, register: u8, value: u32) {
        match register {
            0x04 => self.command = value as u16 & COMMAND_WRITABLE,
            0x0c => (self.noted[0], self.noted[1]) = (value as u8, (value >> 8) as u8),
            0x10 => self.memory = value & !(MEMORY_BYTES - 1),
            0x14 => self.ports = value & !(PORTS - 1),
            0x3c => self.noted[2] = value as u8,
            _ => {}
        }
    }

    fn byte(&self, at: u32) -> u8 {
        self.running.map_or(0, |running| running.byte(at as usize))
    }

    fn set_byte(&mut self, bar: Bar, at: u32, value: u8) {
        if at as usize == header::TEST {
            let test = TESTS.get(usize::from(value));
            self.running = test.map(|test| Running { bar, test: *test, count: 0 });
        } else if let Some(running) = &mut self.running
            && at == running.offset()
            && running.test == Test::Counted
            && value == running.data()
        {
            running.count = running.count.wrapping_add(1);
        }
    }

    /// Where `gpa` is in the memory BAR, if the function answers there to all `bytes`.
    fn in_memory(&self, gpa: u64, bytes: usize) -> Option<u32> {
        let offset = gpa.checked_sub(u64::from(self.memory)).filter(|_| self.command & COMMAND_MEMORY != 0)?;
        let inside = offset.checked_add(bytes as u64).is_some_and(|end| end <= u64::from(MEMORY_BYTES));
        inside.then_some(offset as u32)
    }

    fn in_ports(&self, port: u16) -> Option<u32> {
        let offset = u32::from(port).checked_sub(self.ports).filter(|_| self.command & COMMAND_PORTS != 0)?;
        (offset < PORTS).then_some(offset)
    }

    /// Reads memory; `None` where the function does not answer. `bytes` is 1, 2, 4 or 8.
    pub fn memory(&self, gpa: u64, bytes: usize) -> Option<u64> {
        let first = self.in_memory(gpa, bytes)?;
        Some((0..bytes as u32).fold(0, |value, lane| value | u64::from(self.byte(first + lane)) << (8 * lane)))
    }

    /// Writes memory; `false` where the function does not answer.
    pub fn set_memory(&mut self, gpa: u64, bytes: usize, value: u64) -> bool {
        let Some(first) = self.in_memory(gpa, bytes) else { return false };
        for (at, byte) in (first..).zip(value.to_le_bytes().into_iter().take(bytes)) {
            self.set_byte(Bar::Memory, at, byte);
        }
        true
    }

    /// Reads a port, one byte; `None` where the function does not answer.
    pub fn port(&self, port: u16) -> Option<u8> {
        self.in_ports(port).map(|at| self.byte(at))
    }

    /// Writes a port, one byte; `false` where the function does not answer.
    pub fn set_port(&mut self, port: u16, value: u8) -> bool {
        let Some(at) = self.in_ports(port) else { return false };
        self.set_byte(Bar::Ports, at, value);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 0xfebf_f000;

    /// What software reads of a test before it does it: width, offset, value, name.
    fn start(device: &mut PciTestDevice, number: u8) -> (u64, u64, u64, std::string::String) {
        assert!(device.set_memory(MEMORY, 1, u64::from(number)));
        let word = |at: u64, bytes| device.memory(MEMORY + at, bytes).expect("in the BAR");
        let name = (16..).map(|at| word(at, 1) as u8).take_while(|letter| *letter != 0).map(char::from).collect();
        (word(1, 1), word(4, 4), word(8, 4), name)
    }

    #[test]
    fn tests_are_found_until_there_is_no_width() {
        let mut device = PciTestDevice::new();
        assert_eq!(device.memory(MEMORY, 8), Some(0), "nothing has been started");
        assert_eq!(start(&mut device, 0), (1, 2048, 0xfa, "mmio-no-eventfd".into()));
        assert_eq!(start(&mut device, 1), (1, 2049, 0xce, "mmio-wildcard-eventfd".into()));
        assert_eq!(start(&mut device, 2), (1, 2050, 0xfa, "mmio-datamatch-eventfd".into()));
        assert_eq!(start(&mut device, 3), (0, 0, 0, "".into()));
        assert!(device.set_port(0xc000, 1));
        let name: std::string::String =
            (0xc010..).map_while(|port| device.port(port)).take_while(|l| *l != 0).map(char::from).collect();
        assert_eq!(
            (device.port(0xc001), device.port(0xc004), name.as_str()),
            (Some(1), Some(132), "portio-wildcard-eventfd")
        );
    }

    #[test]
    fn writes_of_the_counted_test_are_counted() {
        let mut device = PciTestDevice::new();
        let (_, offset, data, _) = start(&mut device, 0);
        for value in [data, data, 0x11] {
            assert!(device.set_memory(MEMORY + offset, 1, value));
        }
        assert!(device.set_memory(MEMORY + offset + 1, 1, data));
        assert!(device.set_memory(MEMORY + offset - 1, 4, 0xffff_0000 | data << 8), "a byte of a wide access");
        assert_eq!(device.memory(MEMORY + 12, 4), Some(3));
        assert_eq!(start(&mut device, 0).1, offset);
        assert_eq!(device.memory(MEMORY + 12, 4), Some(0), "a test that is started again");
    }

    #[test]
    fn bars_have_sizes_and_can_be_moved() {
        let mut device = PciTestDevice::new();
        let size = |device: &mut PciTestDevice, register| {
            let before = device.config(register);
            device.set_config(register, u32::MAX);
            let sized = device.config(register);
            device.set_config(register, before);
            assert_eq!(device.config(register), before);
            sized
        };
        assert_eq!((size(&mut device, 0x10), size(&mut device, 0x14)), (0xffff_f000, 0xffff_ff01));
        assert!([0x18, 0x1c, 0x20, 0x24, 0x30, 0x34].into_iter().all(|register| size(&mut device, register) == 0));
        device.set_config(0x10, 0xe000_0123);
        assert_eq!((device.memory(MEMORY, 1), device.memory(0xe000_0ffc, 4)), (None, Some(0)));
        assert_eq!((device.memory(0xe000_0ffd, 4), device.memory(u64::MAX, 8)), (None, None));
        device.set_config(0x14, 0x1_c000);
        assert_eq!(device.port(0xc000), None, "beyond the last port");
        device.set_config(0x14, 0xd000);
        assert_eq!(device.port(0xd0ff), Some(0));
        device.set_config(0x04, 0);
        assert_eq!((device.port(0xd000), device.memory(0xe000_0000, 4)), (None, None), "turned off");
        assert!(!device.set_port(0xd000, 0) && !device.set_memory(0xe000_0000, 1, 0));
    }
}
