//! PCI configuration space by mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2): the address register at 0xcf8 names a function and
//! one of its registers, which is then at 0xcfc to 0xcff, whole or in part.
//!
//! There is one bus with one function on it, the test device ([`super::pci_testdev`]), where QEMU's PC has it when it has
//! nothing else. Every other function reads all ones, which says that there is none.

use serde::{Deserialize, Serialize};

use super::Width;
use super::pci_testdev::PciTestDevice;
use super::saved::{BadState, require};

/// The address register, 32 bits.
pub const PCI_ADDRESS: u16 = 0xcf8;
/// First of the four data ports.
pub const PCI_DATA: u16 = 0xcfc;

/// Enable, bus, device, function and register.
const WRITABLE: u32 = 0x80ff_fffc;
const ENABLE: u32 = 1 << 31;
const REGISTER: u32 = 0xfc;
/// Bus 0, device 2, function 0.
const TEST_DEVICE: u32 = 2 << 11;

/// The configuration ports, and what is on the bus.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PciPorts {
    address: u32,
    /// The one function.
    pub device: PciTestDevice,
}

impl PciPorts {
    /// As firmware leaves them: the function has its addresses.
    pub const fn new() -> Self {
        Self { address: 0, device: PciTestDevice::new() }
    }

    /// Refuses what no such bus was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("PCI", "address", self.address & !WRITABLE == 0)?;
        self.device.check()
    }

    /// Reads the address register.
    pub const fn address(&self) -> u32 {
        self.address
    }

    /// Writes the address register.
    pub const fn set_address(&mut self, value: u32) {
        self.address = value & WRITABLE;
    }

    /// The register that the address names, if there is one.
    const fn selected(&self) -> Option<u8> {
        let selected = self.address & !REGISTER == ENABLE | TEST_DEVICE;
        if selected { Some((self.address & REGISTER) as u8) } else { None }
    }

    /// Reads at a data port, `lane` behind the first. What an access reaches beyond the register reads all ones.
    pub fn read(&self, lane: u8, width: Width) -> u32 {
        let Some(register) = self.selected() else { return width.mask() };
        let beyond = u64::MAX << 32;
        ((beyond | u64::from(self.device.config(register))) >> (8 * (lane & 3))) as u32 & width.mask()
    }

    /// Writes at a data port.
    pub fn write(&mut self, lane: u8, width: Width, value: u32) {
        let Some(register) = self.selected() else { return };
        let shift = 8 * (lane & 3);
        let (mask, value) = (width.mask() << shift, value << shift);
        let old = self.device.config(register);
        self.device.set_config(register, old & !mask | value & mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    #[test]
    fn the_address_is_kept_without_its_reserved_bits() {
        let mut ports = PciPorts::new();
        ports.set_address(0x8000_0000);
        assert_eq!(ports.address(), 0x8000_0000, "how software finds mechanism 1");
        ports.set_address(u32::MAX);
        assert_eq!(ports.address(), 0x80ff_fffc);
    }

    #[test]
    fn a_scan_finds_one_function() {
        let mut ports = PciPorts::new();
        let found: std::vec::Vec<_> = (0..0x1_0000u32)
            .filter(|function| {
                ports.set_address(ENABLE | function << 8);
                ports.read(0, Width::Dword) != u32::MAX
            })
            .collect();
        assert_eq!(found, [2 << 3]);
        ports.set_address(2 << 11);
        assert_eq!(ports.read(0, Width::Dword), u32::MAX, "not without the enable bit");
    }

    #[test]
    fn registers_are_reached_in_parts() {
        let mut ports = PciPorts::new();
        ports.set_address(ENABLE | TEST_DEVICE);
        assert_eq!((ports.read(0, Width::Word), ports.read(2, Width::Word)), (0x1b36, 0x0005));
        assert_eq!((ports.read(3, Width::Byte), ports.read(3, Width::Dword)), (0, 0xffff_ff00));
        ports.set_address(ENABLE | TEST_DEVICE | 0x10);
        ports.write(2, Width::Word, 0xabcd);
        assert_eq!(ports.read(0, Width::Dword) >> 16, 0xabcd);
        ports.write(1, Width::Byte, 0xff);
        assert_eq!(ports.read(0, Width::Word) & 0xfff, 0, "a BAR's low bits are not its address");
        // The interrupt line is a byte that software keeps.
        ports.set_address(ENABLE | TEST_DEVICE | 0x3c);
        ports.write(0, Width::Byte, 11);
        assert_eq!(ports.read(0, Width::Dword), 11);
    }

    #[test]
    fn random_accesses_never_panic() {
        let mut random = Random::new(8);
        let mut ports = PciPorts::new();
        for _ in 0..200_000 {
            let lane = random.byte();
            let width = [Width::Byte, Width::Word, Width::Dword][random.below(3) as usize];
            match random.below(3) {
                0 => ports.set_address(ENABLE | TEST_DEVICE | random.next() as u32 & 0xfc),
                1 => ports.write(lane, width, random.next() as u32),
                _ => assert_eq!(ports.read(lane, width) & !width.mask(), 0),
            }
            let _ = ports.device.memory(random.next(), 4);
        }
    }
}
