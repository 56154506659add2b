//! What a machine for test kernels has beside the usual devices: an I/O APIC, fw_cfg, PCI configuration ports, the test
//! device, and the shutdown port.
//!
//! A [`Board`] belongs to a [`super::platform::Platform`], which calls it for the ports that [`decode`] claims and for the
//! three windows of memory. What an access means for anything else (a line, the end, a page to be forgotten) is returned
//! as a [`BoardEffect`].

use serde::{Deserialize, Serialize};

use super::Width;
use super::fw_cfg::{FW_CFG_DATA, FW_CFG_SELECT, FwCfg};
use super::ioapic::{IOAPIC_BASE, IOAPIC_BYTES, IoApic};
use super::pci::{PCI_ADDRESS, PCI_DATA, PciPorts};
use super::saved::BadState;
use super::shutdown::{SHUTDOWN, ShutdownPort};
use super::testdev::{self, TEST_RAM, TEST_RAM_BYTES, TestDevice};

/// How much of a machine the board is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoardConfig {
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
}

/// What a write asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardEffect {
    /// Nothing.
    None,
    /// An interrupt line takes this level.
    Line {
        /// Its number, below 24.
        line: u8,
        /// Its level.
        high: bool,
    },
    /// The host is to forget its mapping of the page at this guest-physical address.
    Flush(u64),
    /// The machine is to be switched off.
    PowerOff,
}

/// The devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Board {
    /// The I/O APIC; its lines are the platform's business.
    pub ioapic: IoApic,
    fw_cfg: FwCfg,
    pci: PciPorts,
    test: TestDevice,
    shutdown: ShutdownPort,
}

/// A device that answers at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardClaim {
    /// fw_cfg's selector.
    Select,
    /// fw_cfg's data.
    Data,
    /// The PCI address register, whole.
    PciAddress,
    /// PCI configuration data, from this byte of a register on.
    PciData(u8),
    /// A byte of the test device's latch.
    Latch(u8),
    /// The test device's page flush.
    Flush,
    /// A line of the test device.
    Line(u8),
    /// The shutdown port.
    Shutdown,
}

/// Which device of a board, if one does, answers an access.
pub const fn decode(port: u16, width: Width) -> Option<BoardClaim> {
    Some(match port {
        FW_CFG_SELECT => BoardClaim::Select,
        FW_CFG_DATA => BoardClaim::Data,
        PCI_ADDRESS if matches!(width, Width::Dword) => BoardClaim::PciAddress,
        PCI_DATA..=0xcff => BoardClaim::PciData((port - PCI_DATA) as u8),
        testdev::LATCH..=0xe3 => BoardClaim::Latch((port - testdev::LATCH) as u8),
        testdev::FLUSH..=0xe7 => BoardClaim::Flush,
        testdev::LINES..=0x2017 => BoardClaim::Line((port - testdev::LINES) as u8),
        SHUTDOWN => BoardClaim::Shutdown,
        _ => return None,
    })
}

const _: () = assert!(testdev::LINES + testdev::LINE_COUNT == 0x2018);

/// A place in one of the windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Window {
    IoApic(u64),
    TestRam(u64),
}

const fn window(gpa: u64) -> Option<Window> {
    match gpa {
        IOAPIC_BASE.. if gpa - IOAPIC_BASE < IOAPIC_BYTES => Some(Window::IoApic(gpa - IOAPIC_BASE)),
        TEST_RAM.. if gpa - TEST_RAM < TEST_RAM_BYTES => Some(Window::TestRam(gpa - TEST_RAM)),
        _ => None,
    }
}

/// The number of processors as fw_cfg tells it.
fn processors(config: BoardConfig) -> u16 {
    u16::try_from(config.vcpus).unwrap_or(u16::MAX)
}

impl Board {
    /// The devices after power-on.
    pub fn new(config: BoardConfig) -> Self {
        Self {
            ioapic: IoApic::new(),
            fw_cfg: FwCfg::new(config.ram_bytes, processors(config)),
            pci: PciPorts::new(),
            test: TestDevice::new(),
            shutdown: ShutdownPort::new(),
        }
    }

    /// The board loses its power and gets it back. Memory is kept, the test device's too.
    pub fn power_cycle(&mut self) {
        (self.ioapic, self.pci, self.shutdown) = (IoApic::new(), PciPorts::new(), ShutdownPort::new());
    }

    /// Refuses what no such board was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self, config: BoardConfig) -> Result<(), BadState> {
        self.ioapic.check()?;
        self.fw_cfg.check(config.ram_bytes, processors(config))?;
        self.pci.check()?;
        self.test.check()
    }

    /// Reads at a port that [`decode`] has claimed.
    pub fn input(&mut self, claim: BoardClaim, width: Width) -> u32 {
        let bytes = 0..width.bytes();
        match claim {
            BoardClaim::Data => bytes.fold(0, |value, lane| value | u32::from(self.fw_cfg.read()) << (8 * lane)),
            BoardClaim::Latch(first) => {
                bytes.fold(0, |value, lane| value | u32::from(self.test.latch(first + lane as u8)) << (8 * lane))
            }
            BoardClaim::PciAddress => self.pci.address(),
            BoardClaim::PciData(lane) => self.pci.read(lane, width),
            BoardClaim::Select | BoardClaim::Flush | BoardClaim::Line(_) | BoardClaim::Shutdown => 0,
        }
    }

    /// Writes at a port that [`decode`] has claimed.
    pub fn output(&mut self, claim: BoardClaim, width: Width, value: u32) -> BoardEffect {
        match claim {
            BoardClaim::Select => self.fw_cfg.select(value as u16),
            BoardClaim::PciAddress => self.pci.set_address(value),
            BoardClaim::Latch(first) => {
                for lane in 0..width.bytes() as u8 {
                    self.test.set_latch(first + lane, (value >> (8 * lane)) as u8);
                }
            }
            BoardClaim::Flush => return BoardEffect::Flush(u64::from(value)),
            BoardClaim::Line(line) => return BoardEffect::Line { line, high: value as u8 != 0 },
            BoardClaim::Shutdown => {
                if self.shutdown.write(value as u8) {
                    return BoardEffect::PowerOff;
                }
            }
            BoardClaim::PciData(lane) => self.pci.write(lane, width, value),
            BoardClaim::Data => {}
        }
        BoardEffect::None
    }

    /// Reads a port that no other device claims; `None` where no PCI device is either.
    pub fn bar_input(&self, port: u16, width: Width) -> Option<u32> {
        self.pci.device.port(port)?;
        let byte = |lane| u32::from(self.pci.device.port(port.wrapping_add(lane)).unwrap_or(u8::MAX));
        Some((0..width.bytes()).fold(0, |value, lane| value | byte(lane) << (8 * lane)))
    }

    /// Writes such a port; `false` where no PCI device is.
    pub fn bar_output(&mut self, port: u16, width: Width, value: u32) -> bool {
        let bytes = value.to_le_bytes();
        let lanes = (0..width.bytes()).zip(bytes);
        // All that answer are written, not the first alone.
        lanes.fold(false, |any, (lane, byte)| self.pci.device.set_port(port.wrapping_add(lane), byte) | any)
    }

    /// Reads memory; `None` where the board has none. `bytes` is 1, 2, 4 or 8.
    pub fn read(&self, gpa: u64, bytes: usize) -> Option<u64> {
        match window(gpa) {
            Some(Window::IoApic(offset)) => Some(u64::from(self.ioapic.read(offset, bytes))),
            Some(Window::TestRam(offset)) => self.test.read(offset, bytes),
            None => self.pci.device.memory(gpa, bytes),
        }
    }

    /// Writes memory; `false` where the board has none.
    pub fn write(&mut self, gpa: u64, bytes: usize, value: u64) -> bool {
        match window(gpa) {
            Some(Window::IoApic(offset)) => self.ioapic.write(offset, bytes, value as u32),
            Some(Window::TestRam(offset)) => self.test.write(offset, bytes, value),
            None => return self.pci.device.set_memory(gpa, bytes, value),
        }
        true
    }

    /// Replaces `old` in the test device's memory. `None`: no memory is there, only registers or nothing at all.
    pub fn compare_exchange(&mut self, gpa: u64, bytes: usize, old: u64, new: u64) -> Option<bool> {
        let Some(Window::TestRam(offset)) = window(gpa) else { return None };
        let same = self.test.read(offset, bytes)? == old;
        if same {
            self.test.write(offset, bytes, new);
        }
        Some(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board() -> Board {
        Board::new(BoardConfig { ram_bytes: 64 << 20, vcpus: 3 })
    }

    fn claim(port: u16, width: Width) -> BoardClaim {
        decode(port, width).expect("claimed")
    }

    #[test]
    fn latch_takes_every_width() {
        let mut board = board();
        let out = |board: &mut Board, port, width, value| board.output(claim(port, width), width, value);
        assert_eq!(out(&mut board, 0xe0, Width::Dword, 0x4433_2211), BoardEffect::None);
        assert_eq!(out(&mut board, 0xe1, Width::Byte, 0xaa), BoardEffect::None);
        assert_eq!(board.input(claim(0xe0, Width::Dword), Width::Dword), 0x4433_aa11);
        assert_eq!(board.input(claim(0xe2, Width::Word), Width::Word), 0x4433);
    }

    #[test]
    fn writes_have_their_effects() {
        let mut board = board();
        let mut out = |port, width, value| board.output(claim(port, width), width, value);
        assert_eq!(out(0xe4, Width::Dword, 0x1234_5000), BoardEffect::Flush(0x1234_5000));
        assert_eq!(out(0x2017, Width::Byte, 1), BoardEffect::Line { line: 23, high: true });
        assert_eq!(out(0x2000, Width::Byte, 0), BoardEffect::Line { line: 0, high: false });
        let effects: std::vec::Vec<_> = b"Shutdown".iter().map(|l| out(0x8900, Width::Byte, u32::from(*l))).collect();
        assert_eq!(effects.last(), Some(&BoardEffect::PowerOff));
        assert_eq!(decode(0x2018, Width::Byte), None);
    }

    #[test]
    fn pci_has_a_bus_with_the_test_device_on_it() {
        let mut board = board();
        let _ = board.output(claim(0xcf8, Width::Dword), Width::Dword, 0x8000_0000);
        assert_eq!(board.input(claim(0xcf8, Width::Dword), Width::Dword), 0x8000_0000);
        assert_eq!(board.input(claim(0xcfc, Width::Dword), Width::Dword), u32::MAX);
        let _ = board.output(claim(0xcf8, Width::Dword), Width::Dword, 0x8000_1000);
        assert_eq!(board.input(claim(0xcfe, Width::Word), Width::Word), 5);
        assert!(board.write(0xfebf_f000, 1, 0) && board.bar_output(0xc000, Width::Byte, 2));
        assert_eq!((board.read(0xfebf_f001, 1), board.bar_input(0xc000, Width::Word)), (Some(1), Some(0x105)));
        assert_eq!(board.bar_input(0xc0fe, Width::Dword), Some(0xffff_0000));
        assert_eq!((board.bar_input(0xc100, Width::Byte), board.bar_output(0xc100, Width::Dword, 0)), (None, false));
        assert_eq!(decode(0xcf9, Width::Byte), None, "the reset register's");
    }

    #[test]
    fn processors_are_told() {
        let mut board = board();
        let _ = board.output(claim(0x510, Width::Word), Width::Word, 5);
        assert_eq!(board.input(claim(0x511, Width::Byte), Width::Byte), 3);
    }

    #[test]
    fn windows() {
        let mut board = board();
        assert!(board.write(0xff00_fff8, 8, 7) && board.write(0xfec0_0000, 4, 1));
        assert_eq!((board.read(0xff00_fff8, 8), board.read(0xfec0_0010, 4)), (Some(7), Some(0x17_0020)));
        assert_eq!((board.read(0xff01_0000, 1), board.read(0xfec0_1000, 4), board.read(0, 8)), (None, None, None));
        assert_eq!(board.compare_exchange(0xff00_fff8, 8, 7, 9), Some(true));
        assert_eq!(board.compare_exchange(0xff00_fff8, 8, 7, 1), Some(false));
        assert_eq!(board.compare_exchange(0xfec0_0010, 4, 0, 0), None);
        assert!(!board.write(0xfee0_0000, 4, 0));
    }
}
