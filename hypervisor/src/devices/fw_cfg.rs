//! QEMU's firmware configuration device, as far as test kernels ask it: a 16-bit selector at 0x510, and a byte at a time
//! of the selected item at 0x511. An item that does not exist is empty, and bytes behind an item's end read 0.

use serde::{Deserialize, Serialize};

use super::saved::{BadState, require};

/// The selector.
pub const FW_CFG_SELECT: u16 = 0x510;
/// The data.
pub const FW_CFG_DATA: u16 = 0x511;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_BYTES: u16 = 0x03;
const PROCESSORS: u16 = 0x05;
const MOST_PROCESSORS: u16 = 0x0f;

/// The traditional interface, without DMA.
const ID_TRADITIONAL: u64 = 1;

/// The device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FwCfg {
    ram_bytes: u64,
    processors: u16,
    selected: u16,
    /// Bytes of the item read so far.
    position: u32,
}

impl FwCfg {
    /// Tells of a machine with so much RAM and so many processors.
    pub const fn new(ram_bytes: u64, processors: u16) -> Self {
        Self { ram_bytes, processors, selected: SIGNATURE, position: 0 }
    }

    /// Refuses the state of a device that tells of another machine.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self, ram_bytes: u64, processors: u16) -> Result<(), BadState> {
        require("fw_cfg", "machine", (self.ram_bytes, self.processors) == (ram_bytes, processors))
    }

    /// Selects an item and starts it over.
    pub fn select(&mut self, key: u16) {
        (self.selected, self.position) = (key, 0);
    }

    /// The next byte.
    pub fn read(&mut self) -> u8 {
        let item = match self.selected {
            SIGNATURE => u64::from(u32::from_le_bytes(*b"QEMU")),
            ID => ID_TRADITIONAL,
            RAM_BYTES => self.ram_bytes,
            PROCESSORS | MOST_PROCESSORS => u64::from(self.processors),
            _ => 0,
        };
        // All items are numbers of up to eight bytes, little-endian; above them is nothing but zeros.
        let byte = item.checked_shr(self.position.saturating_mul(8)).unwrap_or(0) as u8;
        self.position = self.position.saturating_add(1);
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &mut FwCfg, key: u16) -> [u8; 10] {
        device.select(key);
        core::array::from_fn(|_| device.read())
    }

    #[test]
    fn items() {
        let mut device = FwCfg::new(0x1_2345_6000, 4);
        assert_eq!(item(&mut device, SIGNATURE), *b"QEMU\0\0\0\0\0\0");
        assert_eq!(item(&mut device, PROCESSORS), [4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(item(&mut device, RAM_BYTES), [0, 0x60, 0x45, 0x23, 1, 0, 0, 0, 0, 0]);
        assert_eq!(item(&mut device, 0x11), [0; 10]);
        assert_eq!(item(&mut device, 0xffff), [0; 10]);
    }

    #[test]
    fn reading_on_and_on_reads_zeros() {
        let mut device = FwCfg::new(u64::MAX, 1);
        device.select(RAM_BYTES);
        let sum: u32 = (0..100_000).map(|_| u32::from(device.read())).sum();
        assert_eq!(sum, 8 * 0xff);
    }
}
