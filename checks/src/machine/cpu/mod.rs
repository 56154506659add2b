//! What a CPU makes of an entry: written from the manuals, not from the library's formats, so that it can disagree.
//!
//! The machine has 46 physical address bits, execute-disable, 1 GiB pages and accessed and dirty bits in both formats.

mod ept;
mod npt;
pub mod tlb;
pub mod walk;

use nestling::format::Format;
use nestling::{Access, Hfn};

/// Physical address bits of the machine: frames at or above 2^(46 - 12) set reserved bits.
pub const ADDRESS_BITS: u32 = 46;
/// Bits of an entry between the machine's address bits and bit 51: reserved in both formats.
const TOO_HIGH: u64 = (1 << 52) - (1 << ADDRESS_BITS);

/// Rights of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allows {
    /// Data reads.
    pub read: bool,
    /// Data writes.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Allows {
    /// What a walk starts with: everything, until an entry takes it away.
    pub const ALL: Self = Self { read: true, write: true, execute: true };

    /// What two entries of one walk allow together.
    pub const fn and(self, other: Self) -> Self {
        Self { read: self.read && other.read, write: self.write && other.write, execute: self.execute && other.execute }
    }

    /// Whether `access` is allowed.
    pub const fn permits(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Execute => self.execute,
        }
    }
}

/// What an entry means to the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Not present: NPF or EPT violation.
    Absent,
    /// A reserved bit or a misconfiguration.
    Reserved,
    /// The next table.
    Table(Hfn, Allows),
    /// A mapping of a block that begins at this frame.
    Leaf(Hfn, Allows),
}

/// A format as the CPU knows it.
pub trait Cpu: Format {
    /// The accessed bit.
    const ACCESSED: u64;
    /// The dirty bit of a leaf.
    const DIRTY: u64;
    /// Whether its TLB knows entries of one root from those of another (SDM vol 3, 30.4.1: by EP4TA), or has one tag for
    /// the guest (APM vol 2, 15.16: by ASID).
    const TAGGED_BY_ROOT: bool;
    /// Whether it can be told not to set them.
    const AD_IS_OPTIONAL: bool;
    /// What `raw`, in a table of `level`, means to the CPU. Software bits are not looked at.
    fn see(raw: u64, level: u8) -> Seen;
}

/// Bits 12 to 51 as a frame number.
const fn frame(raw: u64) -> Hfn {
    Hfn((raw & ((1 << 52) - 1)) >> 12)
}

/// Bits of a block's address below its size.
const fn block_low_bits(level: u8) -> u64 {
    ((1u64 << (12 + 9 * (level as u32 - 1))) - 1) & !0xfff
}
