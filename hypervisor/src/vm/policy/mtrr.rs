//! The memory type range registers (AMD APM vol. 2, 7.7), as storage.
//!
//! With nested paging the guest's MTRRs have no effect on the memory types in use: guest RAM is ordinary memory whatever
//! they say. A kernel reads them all the same, to learn what firmware set up, and writes them back on each CPU; so they
//! start as firmware leaves them (everything write-back) and keep what is written. Illegal values raise #GP as on
//! hardware.

use serde::{Deserialize, Serialize};

use crate::devices::Gp;

/// Capabilities: 8 variable ranges, fixed ranges, write-combining.
pub const MTRR_CAP: u64 = 0x508;

/// MTRRcap, read-only.
pub const MSR_MTRR_CAP: u32 = 0xfe;
const VARIABLE_FIRST: u32 = 0x200;
const VARIABLE_LAST: u32 = 0x20f;
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const DEFAULT_TYPE: u32 = 0x2ff;

const WRITE_BACK: u64 = 6;
/// Default type: type in 7:0, fixed ranges enable in 10, enable in 11.
const DEFAULT_TYPE_VALID: u64 = 0xcff;
const DEFAULT_TYPE_RESET: u64 = 0xc00 | WRITE_BACK;
const MASK_ENABLE: u64 = 1 << 11;

/// The registers of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mtrrs {
    variable: [u64; 16],
    fixed: [u64; 11],
    default_type: u64,
    /// Address bits that a range may have.
    address_mask: u64,
}

impl Mtrrs {
    /// As firmware leaves them, for `physical_bits` (36..=52) of guest physical address.
    pub fn new(physical_bits: u32) -> Self {
        Self {
            variable: [0; 16],
            fixed: [WRITE_BACK * 0x0101_0101_0101_0101; 11],
            default_type: DEFAULT_TYPE_RESET,
            address_mask: (1 << physical_bits.clamp(36, 52)) - 1,
        }
    }

    /// Whether these are registers of a guest with as many address bits.
    pub fn fits(&self, physical_bits: u32) -> bool {
        self.address_mask == Self::new(physical_bits).address_mask
    }

    /// Whether `msr` is one of them.
    pub const fn owns(msr: u32) -> bool {
        matches!(msr, MSR_MTRR_CAP | VARIABLE_FIRST..=VARIABLE_LAST | 0x250 | 0x258 | 0x259 | 0x268..=0x26f | DEFAULT_TYPE)
    }

    /// Reads a register.
    pub fn read(&self, msr: u32) -> Result<u64, Gp> {
        match msr {
            MSR_MTRR_CAP => Ok(MTRR_CAP),
            VARIABLE_FIRST..=VARIABLE_LAST => Ok(self.variable[(msr - VARIABLE_FIRST) as usize]),
            DEFAULT_TYPE => Ok(self.default_type),
            _ => fixed_index(msr).map(|index| self.fixed[index]),
        }
    }

    /// Writes a register.
    pub fn write(&mut self, msr: u32, value: u64) -> Result<(), Gp> {
        match msr {
            VARIABLE_FIRST..=VARIABLE_LAST => {
                let is_mask = msr & 1 == 1;
                let low = if is_mask { MASK_ENABLE } else { 0xff };
                if value & !(self.address_mask & !0xfff | low) != 0 || !is_mask && !is_type(value as u8) {
                    return Err(Gp);
                }
                self.variable[(msr - VARIABLE_FIRST) as usize] = value;
            }
            DEFAULT_TYPE => {
                if value & !DEFAULT_TYPE_VALID != 0 || !is_type(value as u8) {
                    return Err(Gp);
                }
                self.default_type = value;
            }
            _ => {
                let index = fixed_index(msr)?;
                if !value.to_le_bytes().iter().all(|kind| is_type(*kind)) {
                    return Err(Gp);
                }
                self.fixed[index] = value;
            }
        }
        Ok(())
    }
}

fn fixed_index(msr: u32) -> Result<usize, Gp> {
    FIXED.iter().position(|fixed| *fixed == msr).ok_or(Gp)
}

/// Uncacheable, write-combining, write-through, write-protect, write-back.
const fn is_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_made_everything_write_back() {
        let mtrrs = Mtrrs::new(40);
        assert_eq!(mtrrs.read(0x2ff), Ok(0xc06));
        assert_eq!(mtrrs.read(0x26f), Ok(0x0606_0606_0606_0606));
        assert_eq!(mtrrs.read(0x200), Ok(0));
    }

    #[test]
    fn legal_values_are_kept_and_others_fault() {
        let mut mtrrs = Mtrrs::new(40);
        for (msr, value) in
            [(0x200, 0xc000_0000), (0x201, 0xff_c000_0800), (0x2ff, 0x800), (0x250, 0x0506_0401_0000_0606)]
        {
            assert_eq!(mtrrs.write(msr, value), Ok(()));
            assert_eq!(mtrrs.read(msr), Ok(value));
        }
        for (msr, value) in [
            (0x200, 2),
            (0x200, 1 << 40),
            (0x200, 0x100),
            (0x201, 1),
            (0x2ff, 7),
            (0x2ff, 1 << 12),
            (0x250, 3),
            (0xfe, 0),
        ] {
            assert_eq!(mtrrs.write(msr, value), Err(Gp), "{msr:#x} {value:#x}");
        }
    }

    #[test]
    fn ownership_and_registers_agree() {
        let mtrrs = Mtrrs::new(40);
        for msr in 0..0x400 {
            assert_eq!(Mtrrs::owns(msr), mtrrs.read(msr).is_ok(), "{msr:#x}");
        }
    }
}
