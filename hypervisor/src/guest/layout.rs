//! Where everything goes in a guest's physical memory.
//!
//! RAM is where a PC has it: 640 KiB from 0, from 1 MiB to the end or to 3 GiB, and the rest from 4 GiB. The holes belong
//! to devices. Below 640 KiB lie the small things that the loader makes; the kernel goes where it prefers to be; the
//! initrd goes to the end of low RAM, as far from the kernel as possible.

use core::fmt;

/// Unit of RAM sizes.
pub const PAGE_BYTES: u64 = 4096;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// End of conventional memory.
pub const LOW_END: u64 = 640 * KIB;
/// Start of extended memory.
pub const HIGH_START: u64 = MIB;
/// Where RAM below 4 GiB ends at the latest.
pub const HOLE_START: u64 = 3 * GIB;
/// Where RAM goes on above the hole.
pub const HOLE_END: u64 = 4 * GIB;
/// Least RAM that a guest can have.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// Most RAM that a guest can have: it must fit in the 40 address bits that the smallest supported CPU has.
pub const MAX_MEMORY: u64 = 512 * GIB;

/// The global descriptor table of the first vCPU.
pub const GDT: u64 = 0x1000;
/// Its page tables, [`PAGE_TABLES_BYTES`] long: the top table first.
pub const PAGE_TABLES: u64 = 0x2000;
/// A top table, one table below it, and four tables of 2 MiB pages: the first 4 GiB.
pub const PAGE_TABLES_BYTES: u64 = 6 * PAGE_BYTES;
/// Top of a stack of a page, for a kernel that pushes before it has one of its own.
pub const STACK_TOP: u64 = 0x9000;
/// The boot parameters ("zero page"), a page.
pub const BOOT_PARAMS: u64 = 0x1_0000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its terminating zero.
pub const COMMAND_LINE_ROOM: u64 = 64 * KIB;
/// The ACPI tables; the guest may reuse the memory after it has read them.
pub const ACPI: u64 = 0x9_0000;
/// Room for the ACPI tables.
pub const ACPI_ROOM: u64 = LOW_END - ACPI;

const _: () = {
    assert!(GDT + PAGE_BYTES <= PAGE_TABLES);
    assert!(PAGE_TABLES + PAGE_TABLES_BYTES <= STACK_TOP - PAGE_BYTES);
    assert!(STACK_TOP <= BOOT_PARAMS);
    assert!(BOOT_PARAMS + PAGE_BYTES <= COMMAND_LINE);
    assert!(COMMAND_LINE + COMMAND_LINE_ROOM <= ACPI);
    assert!(HIGH_START < MIN_MEMORY && MIN_MEMORY < HOLE_START);
    assert!(HOLE_END + MAX_MEMORY - HOLE_START <= 1 << 40);
};

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl RamRange {
    /// The address after its last byte.
    pub const fn end(&self) -> u64 {
        self.gpa + self.bytes
    }
}

/// Why a guest can't have this much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemorySizeError {
    /// Not a multiple of [`PAGE_BYTES`].
    Unaligned {
        /// The size asked for, in bytes.
        bytes: u64,
    },
    /// Below [`MIN_MEMORY`] or above [`MAX_MEMORY`].
    OutOfRange {
        /// The size asked for, in bytes.
        bytes: u64,
    },
}

impl fmt::Display for MemorySizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned { bytes } => {
                write!(f, "guest memory of {bytes} bytes is not a multiple of {PAGE_BYTES} bytes")
            }
            Self::OutOfRange { bytes } => write!(
                f,
                "guest memory of {} MiB is not between {} and {} MiB",
                bytes / MIB,
                MIN_MEMORY / MIB,
                MAX_MEMORY / MIB
            ),
        }
    }
}

impl core::error::Error for MemorySizeError {}

/// The RAM of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: [RamRange; 3],
    used: usize,
}

impl RamLayout {
    /// The layout of a machine with `bytes` of memory. As on a PC, what the hole between 640 KiB and 1 MiB covers counts
    /// but can't be used.
    pub const fn new(bytes: u64) -> Result<Self, MemorySizeError> {
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemorySizeError::Unaligned { bytes });
        }
        if bytes < MIN_MEMORY || bytes > MAX_MEMORY {
            return Err(MemorySizeError::OutOfRange { bytes });
        }
        let low_end = if bytes < HOLE_START { bytes } else { HOLE_START };
        let above = bytes - low_end;
        Ok(Self {
            ranges: [
                RamRange { gpa: 0, bytes: LOW_END },
                RamRange { gpa: HIGH_START, bytes: low_end - HIGH_START },
                RamRange { gpa: HOLE_END, bytes: above },
            ],
            used: if above == 0 { 2 } else { 3 },
        })
    }

    /// The pieces, in ascending order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges[..self.used]
    }

    /// Where RAM below the hole ends.
    pub const fn low_end(&self) -> u64 {
        self.ranges[1].end()
    }

    /// All bytes of RAM that can be used.
    pub fn usable_bytes(&self) -> u64 {
        self.ranges().iter().map(|range| range.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_guests_have_two_pieces_and_large_ones_three() {
        let small = RamLayout::new(256 * MIB).expect("legal");
        assert_eq!(small.ranges(), [RamRange { gpa: 0, bytes: LOW_END }, RamRange { gpa: MIB, bytes: 255 * MIB }]);
        let edge = RamLayout::new(3 * GIB).expect("legal");
        assert_eq!((edge.ranges().len(), edge.low_end()), (2, 3 * GIB));
        let large = RamLayout::new(8 * GIB).expect("legal");
        assert_eq!(large.ranges()[2], RamRange { gpa: 4 * GIB, bytes: 5 * GIB });
        assert_eq!(large.usable_bytes(), 8 * GIB - 384 * KIB);
    }

    #[test]
    fn bad_sizes_are_refused() {
        for bytes in [0, MIB, MIN_MEMORY - 4096, MAX_MEMORY + 4096, !0xfff] {
            assert_eq!(RamLayout::new(bytes), Err(MemorySizeError::OutOfRange { bytes }));
        }
        assert_eq!(RamLayout::new(MIN_MEMORY + 1), Err(MemorySizeError::Unaligned { bytes: MIN_MEMORY + 1 }));
        assert!(RamLayout::new(MIN_MEMORY).is_ok() && RamLayout::new(MAX_MEMORY).is_ok());
    }
}
