//! A vCPU's last exits, for the report of a guest that died.

use alloc::vec::Vec;

use nestling_control::message::ExitRecord;

/// How many are kept.
const KEPT: usize = 16;

/// The last exits; equal neighbours count as one entry, so that a guest that spins does not push out how it came there.
#[derive(Debug)]
pub struct Ring {
    records: [ExitRecord; KEPT],
    /// Position of the newest.
    newest: usize,
}

impl Default for Ring {
    fn default() -> Self {
        Self { records: [ExitRecord { code: 0, rip: 0, info1: 0, count: 0 }; KEPT], newest: 0 }
    }
}

impl Ring {
    /// Notes an exit.
    #[inline]
    pub fn note(&mut self, code: u64, rip: u64, info1: u64) {
        let newest = &mut self.records[self.newest];
        if newest.rip == rip && newest.code == code && newest.info1 == info1 && newest.count > 0 {
            newest.count = newest.count.saturating_add(1);
            return;
        }
        self.newest = (self.newest + 1) % KEPT;
        self.records[self.newest] = ExitRecord { code, rip, info1, count: 1 };
    }

    /// All that are kept, oldest first.
    #[must_use]
    pub fn to_vec(&self) -> Vec<ExitRecord> {
        (1..=KEPT).map(|age| self.records[(self.newest + age) % KEPT]).filter(|record| record.count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_sixteen_with_repeats_counted() {
        let mut ring = Ring::default();
        assert!(ring.to_vec().is_empty());
        for rip in 0..20 {
            ring.note(0x72, rip, 0);
            ring.note(0x72, rip, 0);
        }
        let kept = ring.to_vec();
        assert_eq!(kept.len(), 16);
        assert_eq!((kept[0].rip, kept[15].rip), (4, 19));
        assert!(kept.iter().all(|record| record.count == 2));
    }
}
