//! A vCPU's last exits, for the report of a guest that died.

use alloc::vec::Vec;

use nestling_control::message::ExitRecord;

/// How many are kept: a power of two, for there is a division by it at every exit.
const KEPT: usize = 16;

/// An exit as often as it came in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    code: u64,
    rip: u64,
    info1: u64,
    /// 0: none.
    count: u64,
}

/// The last exits; equal neighbours count as one entry, so that a guest that spins does not push out how it came there.
#[derive(Debug, Default)]
pub struct Ring {
    records: [Record; KEPT],
    /// Position of the newest among those; the next one is the oldest.
    newest: usize,
}

impl Ring {
    /// Notes an exit.
    #[inline]
    pub fn note(&mut self, code: u64, rip: u64, info1: u64) {
        let newest = &mut self.records[self.newest % KEPT];
        if newest.rip == rip && newest.code == code && newest.info1 == info1 {
            newest.count += 1;
        } else {
            self.newest = (self.newest + 1) % KEPT;
            self.records[self.newest] = Record { code, rip, info1, count: 1 };
        }
    }

    /// All that are kept, oldest first.
    #[must_use]
    pub fn to_vec(&self) -> Vec<ExitRecord> {
        let (newer, older) = self.records.split_at(self.newest + 1);
        let all = older.iter().chain(newer).filter(|record| record.count > 0);
        let shown = |record: &Record| {
            let Record { code, rip, info1, count } = *record;
            ExitRecord { code, rip, info1, count: u32::try_from(count).unwrap_or(u32::MAX) }
        };
        all.map(shown).collect()
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
