//! QEMU's `pc-testdev`: what test kernels use to poke at a hypervisor.
//!
//! * 0xe0–0xe3: a latch of four bytes, for accesses of every width.
//! * 0xe4–0xe7: a page's guest-physical address is written, and the host forgets its mapping of that page.
//! * 0x2000 + n, n below 24: the level of interrupt line n.
//! * [`TEST_RAM`]: 64 KiB of memory that is a device's, so that every access to it is emulated.

use serde::{Deserialize, Serialize};

use alloc::vec;
use alloc::vec::Vec;

use super::saved::{BadState, bytes, require};

/// First port of the latch.
pub const LATCH: u16 = 0xe0;
/// First port of the page flush.
pub const FLUSH: u16 = 0xe4;
/// Port of line 0.
pub const LINES: u16 = 0x2000;
/// Number of lines.
pub const LINE_COUNT: u16 = 24;
/// Guest-physical address of the memory.
pub const TEST_RAM: u64 = 0xff00_0000;
/// Its length in bytes.
pub const TEST_RAM_BYTES: u64 = 64 << 10;

/// The latch and the memory; the rest is the platform's business.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TestDevice {
    latch: [u8; 4],
    #[serde(with = "bytes")]
    ram: Vec<u8>,
}

impl Default for TestDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl TestDevice {
    /// All zeros.
    pub fn new() -> Self {
        Self { latch: [0; 4], ram: vec![0; TEST_RAM_BYTES as usize] }
    }

    /// Refuses memory of another size.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("test device", "memory", self.ram.len() as u64 == TEST_RAM_BYTES)
    }

    /// Reads a byte of the latch, by its port's distance from [`LATCH`].
    pub fn latch(&self, index: u8) -> u8 {
        self.latch[usize::from(index & 3)]
    }

    /// Writes a byte of the latch.
    pub fn set_latch(&mut self, index: u8, value: u8) {
        self.latch[usize::from(index & 3)] = value;
    }

    /// Reads the memory, little-endian; `None` beyond its end. `bytes` is at most 8.
    pub fn read(&self, offset: u64, bytes: usize) -> Option<u64> {
        let at = usize::try_from(offset).ok()?;
        let from = self.ram.get(at..at.checked_add(bytes)?)?;
        let mut raw = [0; 8];
        raw.get_mut(..bytes)?.copy_from_slice(from);
        Some(u64::from_le_bytes(raw))
    }

    /// Writes the memory; nothing happens beyond its end.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u64) {
        let Ok(at) = usize::try_from(offset) else { return };
        let range = at..at.saturating_add(bytes);
        if let (Some(to), Some(from)) = (self.ram.get_mut(range), value.to_le_bytes().get(..bytes)) {
            to.copy_from_slice(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_ends() {
        let mut device = TestDevice::new();
        device.write(8, 8, 0x1122_3344_5566_7788);
        assert_eq!((device.read(10, 2), device.read(15, 1)), (Some(0x5566), Some(0x11)));
        let last = TEST_RAM_BYTES - 4;
        device.write(last, 4, 0xdead_beef);
        device.write(last + 1, 4, 0);
        assert_eq!(device.read(last, 4), Some(0xdead_beef));
        assert_eq!((device.read(last + 1, 4), device.read(u64::MAX, 8), device.read(0, 9)), (None, None, None));
    }

    #[test]
    fn latch_is_four_bytes() {
        let mut device = TestDevice::new();
        for index in 0..4 {
            device.set_latch(index, 0xa0 + index);
        }
        assert_eq!([0, 1, 2, 3, 4].map(|index| device.latch(index)), [0xa0, 0xa1, 0xa2, 0xa3, 0xa0]);
    }
}
