//! Cases at random: every part of them is free.

use crate::space::{Access, Case, Change, Controls, Cpu, Entry, Flush, Kind, LEVELS, Paging, Shot};
use crate::{Digest, TABLE_SETS};

/// Numbers that look random, the same ones for the same case.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        Digest::mix(self.0)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Once in so many times.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn access(&mut self) -> Access {
        Access { kind: Kind::ALL[self.below(6) as usize], user: self.once_in(2), ac: self.once_in(4) }
    }

    fn controls(&mut self) -> Controls {
        Controls::from_bits_truncate(self.next() as u8)
    }

    /// A present entry most times, with most rights most times, so that enough accesses get to the end of the walk.
    fn entry(&mut self, level: u8) -> Entry {
        let large = match level {
            1 => 2,
            2 => 3,
            3 => 6,
            _ => 64,
        };
        let mut entry = Entry::empty();
        entry.set(Entry::PRESENT, !self.once_in(16));
        entry.set(Entry::WRITABLE, !self.once_in(4));
        entry.set(Entry::USER, !self.once_in(4));
        entry.set(Entry::ACCESSED, self.once_in(2));
        entry.set(Entry::DIRTY, self.once_in(2));
        entry.set(Entry::LARGE, self.once_in(large));
        entry.set(Entry::NO_EXECUTE, self.once_in(8));
        entry.set(Entry::HIGH, self.once_in(32));
        entry.set(Entry::LOW, self.once_in(16));
        entry.set(Entry::KEY, self.once_in(2));
        entry.set(Entry::IGNORED, self.once_in(4));
        entry.set(Entry::OTHER, self.once_in(4));
        entry
    }
}

/// The case of that number in the sample of that seed.
#[must_use]
pub fn sample(paging: Paging, cpu: Cpu, seed: u64, number: u64) -> Case {
    let mut random = Random(Digest::mix(Digest::mix(seed) ^ number << 2 ^ paging as u64));
    let levels = paging.levels();
    let mut entries = [Entry::empty(); LEVELS];
    for (level, entry) in (1..).zip(&mut entries) {
        *entry = random.entry(level);
        // Where not even NX may be set, few walks would get to their end.
        if paging == Paging::Pae && !random.once_in(8) {
            *entry -= Entry::KEY;
        }
    }
    let first = Shot {
        change: None,
        controls: random.controls(),
        keys: random.next() as u8 & 15,
        flush: Flush::All,
        access: random.access(),
    };
    let mut second = Shot { flush: [Flush::None, Flush::Page, Flush::All][random.below(3) as usize], ..first };
    match random.below(4) {
        // The same once more.
        0 => {}
        1 => second.access = random.access(),
        _ => {
            let level = 1 + random.below(u64::from(levels)) as u8;
            let was = entries[usize::from(level) - 1];
            // Some bits of it, or a new one, or what lets most accesses through.
            let entry = match random.below(4) {
                0 => random.entry(level),
                1 => was | Entry::OPEN,
                _ => was ^ Entry::from_bits_truncate(1 << random.below(12) | 1 << random.below(12)),
            };
            second.change = Some(Change { level, entry });
            if random.once_in(2) {
                second.access = random.access();
            }
        }
    }
    if random.once_in(4) {
        second.controls ^= Controls::WP;
    }
    if random.once_in(4) {
        second.keys = random.next() as u8 & 15;
    }
    if random.once_in(8) {
        second.controls = random.controls();
    }
    let tables = (number % u64::from(TABLE_SETS)) as u8;
    Case { paging, tables, entries, shots: [first, second] }.sound(cpu)
}
