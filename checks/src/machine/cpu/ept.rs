//! Extended page tables: Intel SDM vol 3, 30.3.2 (entries) and 30.3.3.1 (misconfigurations), with accessed and dirty
//! bits as EPTP bit 6 says, and execute-only not supported.

use nestling::format::Ept;

use super::{Allows, Cpu, Seen, TOO_HIGH, block_low_bits, frame};

impl Cpu for Ept {
    const ACCESSED: u64 = 1 << 8;
    const DIRTY: u64 = 1 << 9;
    const TAGGED_BY_ROOT: bool = true;
    const AD_IS_OPTIONAL: bool = true;

    fn see(raw: u64, level: u8) -> Seen {
        let rights = raw & 7;
        if rights == 0 {
            return Seen::Absent;
        }
        let allows = Allows { read: rights & 1 != 0, write: rights & 2 != 0, execute: rights & 4 != 0 };
        // Write without read, or execute without read on this machine.
        if !allows.read {
            return Seen::Reserved;
        }
        let large = raw & 1 << 7 != 0;
        let leaf = level == 1 || large && level <= 3;
        let must_be_zero = match (leaf, level) {
            (true, 1) => TOO_HIGH,
            (true, _) => TOO_HIGH | block_low_bits(level),
            // Bits 3 to 7 of an entry that leads to a table.
            (false, _) => TOO_HIGH | 0xf8,
        };
        if raw & must_be_zero != 0 || leaf && matches!(raw >> 3 & 7, 2 | 3 | 7) {
            Seen::Reserved
        } else if leaf {
            Seen::Leaf(frame(raw), allows)
        } else {
            Seen::Table(frame(raw), allows)
        }
    }
}
