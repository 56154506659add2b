//! A vCPU's last exits, for the report of a guest that died.

use alloc::vec::Vec;

use nestling_control::message::ExitRecord;

/// How many are kept beside the newest: a power of two, for there is a division by it at most exits.
const OLDER: usize = 16;

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
    /// Beside the others, so that the next exit is compared with no look for it.
    newest: Record,
    older: [Record; OLDER],
    /// Position of the oldest among those.
    oldest: usize,
}

impl Ring {
    /// Notes an exit.
    #[inline]
    pub fn note(&mut self, code: u64, rip: u64, info1: u64) {
        let newest = &mut self.newest;
        if newest.rip == rip && newest.code == code && newest.info1 == info1 {
            newest.count += 1;
        } else {
            self.begin(Record { code, rip, info1, count: 1 });
        }
    }

    fn begin(&mut self, record: Record) {
        self.older[self.oldest] = core::mem::replace(&mut self.newest, record);
        self.oldest = (self.oldest + 1) % OLDER;
    }

    /// All that are kept, oldest first.
    #[must_use]
    pub fn to_vec(&self) -> Vec<ExitRecord> {
        let (newer, older) = self.older.split_at(self.oldest);
        let all = older.iter().chain(newer).chain([&self.newest]).filter(|record| record.count > 0);
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
    fn the_last_seventeen_with_repeats_counted() {
        let mut ring = Ring::default();
        assert!(ring.to_vec().is_empty());
        for rip in 0..20 {
            ring.note(0x72, rip, 0);
            ring.note(0x72, rip, 0);
        }
        let kept = ring.to_vec();
        assert_eq!(kept.len(), 17);
        assert_eq!((kept[0].rip, kept[16].rip), (3, 19));
        assert!(kept.iter().all(|record| record.count == 2));
    }
}
