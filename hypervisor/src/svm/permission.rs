//! The permission maps: which ports (15.10) and which MSRs (15.11) a guest touches without an exit.
//!
//! Every port exits. Of the MSRs those pass that live in the VMCB and are switched with it: they cost nothing and can
//! harm nobody else. All maps are the same for all vCPUs and never change, so there is one of each.

use crate::memory::frames;

/// Bytes of the I/O map: 12 KiB and 3 bits.
const IO_ORDER: u32 = 2;
/// Bytes of the MSR map: 8 KiB.
const MSR_ORDER: u32 = 1;

/// MSRs that pass: SYSENTER_CS, ESP, EIP; STAR, LSTAR, CSTAR, SFMASK; FS, GS and kernel GS base.
const PASSED: [u32; 10] =
    [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0100, 0xc000_0101, 0xc000_0102];

/// Where an MSR's two bits are: byte and shift.
const fn msr_position(msr: u32) -> Option<(usize, u32)> {
    let base = match msr {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x800,
        0xc001_0000..=0xc001_1fff => 0x1000,
        _ => return None,
    };
    let index = (msr & 0x1fff) as usize;
    Some((base + index / 4, (index % 4 * 2) as u32))
}

/// The physical addresses of both maps, which live as long as a VM.
#[derive(Debug)]
pub struct Maps {
    io: u64,
    msr: u64,
}

impl Maps {
    /// Both maps, or `None` without memory.
    #[must_use]
    pub fn new() -> Option<Self> {
        let io = frames::alloc(IO_ORDER)?;
        let Some(msr) = frames::alloc(MSR_ORDER) else {
            frames::free(io, IO_ORDER);
            return None;
        };
        // SAFETY: both blocks were just allocated.
        let (io_map, map) = unsafe { (frames::block(io, IO_ORDER), frames::block(msr, MSR_ORDER)) };
        io_map.fill(0xff);
        map.fill(0xff);
        for passed in PASSED {
            if let Some((byte, shift)) = msr_position(passed) {
                map[byte] &= !(0b11 << shift);
            }
        }
        Some(Self { io, msr })
    }

    /// Address of the I/O map.
    #[must_use]
    pub const fn io(&self) -> u64 {
        self.io
    }

    /// Address of the MSR map.
    #[must_use]
    pub const fn msr(&self) -> u64 {
        self.msr
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        frames::free(self.io, IO_ORDER);
        frames::free(self.msr, MSR_ORDER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_an_msr() {
        assert_eq!(msr_position(0x176), Some((0x176 / 4, 4)));
        assert_eq!(msr_position(0xc000_0080), Some((0x800 + 0x20, 0)));
        assert_eq!(msr_position(0xc001_1fff), Some((0x17ff, 6)));
        assert_eq!(msr_position(0x4000_0000), None);
    }
}
