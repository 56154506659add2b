//! Nested page tables: AMD64 APM vol 2, 5.3.3 to 5.4 (long-mode entries) and 15.25.5 (a nested walk is a user access,
//! so an entry without U denies everything).

use nestling::format::Npt;

use super::{Allows, Cpu, Seen, TOO_HIGH, block_low_bits, frame};

impl Cpu for Npt {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    const TAGGED_BY_ROOT: bool = false;
    const AD_IS_OPTIONAL: bool = false;

    fn see(raw: u64, level: u8) -> Seen {
        if raw & 1 == 0 {
            return Seen::Absent;
        }
        let large = raw & 1 << 7 != 0;
        let user = raw & 1 << 2 != 0;
        let allows = Allows { read: user, write: user && raw & 1 << 1 != 0, execute: user && raw & 1 << 63 == 0 };
        // PML4 and PML5 entries have bit 7 (and 8) reserved; a large entry's low address bits but PAT (12) too.
        let must_be_zero = match (level, large) {
            (4 | 5, _) => TOO_HIGH | 3 << 7,
            (2 | 3, true) => TOO_HIGH | block_low_bits(level) & !(1 << 12),
            _ => TOO_HIGH,
        };
        if raw & must_be_zero != 0 {
            Seen::Reserved
        } else if level == 1 || large {
            Seen::Leaf(frame(raw & !block_low_bits(level)), allows)
        } else {
            Seen::Table(frame(raw), allows)
        }
    }
}
