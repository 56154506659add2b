//! What came of a case, and how a guest reports it.

use core::fmt;

use crate::space::{Case, Cpu, LEVELS, Paging};
use crate::{NO_FAULT, PREFIX, UNTOUCHED};

/// What came of one shot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// The exception that ended the access, or [`NO_FAULT`].
    pub vector: u8,
    /// Its error code; 0 where it has none.
    pub error: u32,
    /// CR2, which was 0 before.
    pub cr2: u64,
    /// EAX: what was read, or what the code left that was called.
    pub value: u32,
    /// By level − 1, bits of the entry that are not as they were last written.
    pub changed: [u64; LEVELS],
    /// The fresh descriptor and the word of data in the pages that the first and the second shot's entries lead to.
    pub memory: [[u64; 2]; 2],
}

impl Default for Seen {
    fn default() -> Self {
        Self { vector: NO_FAULT, error: 0, cr2: 0, value: UNTOUCHED, changed: [0; LEVELS], memory: [[0; 2]; 2] }
    }
}

/// Words of a [`Seen`].
const WORDS: usize = 4 + LEVELS + 4;

/// Bits of a page fault's error code, and of an entry.
const PRESENT: u32 = 1 << 0;
const RESERVED: u32 = 1 << 3;
const ACCESSED: u64 = 1 << 5;
const PAGE_FAULT: u8 = 14;

impl Seen {
    fn words(&self) -> [u64; WORDS] {
        let [a, b, c, d, e] = self.changed;
        let [[f, g], [h, i]] = self.memory;
        [self.vector.into(), self.error.into(), self.cr2, self.value.into(), a, b, c, d, e, f, g, h, i]
    }

    fn of_words([vector, error, cr2, value, a, b, c, d, e, f, g, h, i]: [u64; WORDS]) -> Self {
        Self {
            vector: vector as u8,
            error: error as u32,
            cr2,
            value: value as u32,
            changed: [a, b, c, d, e],
            memory: [[f, g], [h, i]],
        }
    }
}

/// What came of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome(pub [Seen; 2]);

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.0.iter().flat_map(Seen::words) {
            write!(f, " {word:x}")?;
        }
        Ok(())
    }
}

impl Outcome {
    /// Takes out what QEMU's emulated CPU (7.2) does otherwise than any CPU has to, where a hypervisor that walks tables itself
    /// may do it as the manuals say. Each is one bit:
    ///
    /// - A page fault's error code has bit 3 only together with bit 0 (SDM vol. 3, 4.7). QEMU's has it alone.
    /// - PAE's four pointers have no accessed bit; bit 5 is reserved in them (SDM vol. 3, table 4-8; APM vol. 2, 5.2.3). QEMU
    ///   sets it at every walk.
    /// - An access that a leaf refuses does not mark it as accessed. QEMU marks leaves of 1 GiB before it looks at their
    ///   rights, and no others.
    #[must_use]
    pub fn without_flaws(mut self, case: &Case, cpu: Cpu) -> Self {
        for (number, seen) in self.0.iter_mut().enumerate() {
            let faulted = seen.vector == PAGE_FAULT;
            if faulted && seen.error & RESERVED != 0 {
                seen.error |= PRESENT;
            }
            let refused_gigantic = faulted && case.paging.is_long() && case.leaf(number, cpu) == 3;
            if refused_gigantic || case.paging.is_pointer(3) {
                seen.changed[2] &= !ACCESSED;
            }
        }
        self
    }

    fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut all = [0; 2 * WORDS];
        let mut found = 0;
        for word in words {
            *all.get_mut(found)? = u64::from_str_radix(word, 16).ok()?;
            found += 1;
        }
        let (first, second) = all.split_first_chunk::<WORDS>()?;
        let second = second.first_chunk::<WORDS>()?;
        (found == all.len()).then(|| Self([Seen::of_words(*first), Seen::of_words(*second)]))
    }
}

/// A number that stands for all outcomes of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digest(u64);

impl Digest {
    /// Turns a number into one that looks random (SplitMix64).
    pub(crate) const fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Takes an outcome in.
    pub fn add(&mut self, outcome: &Outcome) {
        for word in outcome.0.iter().flat_map(Seen::words) {
            self.0 = Self::mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ word);
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A line of a report, behind [`PREFIX`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line {
    /// `cpu N`: the CPU that cases are made for ([`Cpu::number`](crate::Cpu::number)).
    Cpu(u32),
    /// `absent PAGING`: the CPU has no such paging.
    Absent(Paging),
    /// `block PAGING N DIGEST`: what came of the block that begins with that case.
    Block(Paging, u64, Digest),
    /// `case PAGING N …`: what came of one case.
    Case(Paging, u64, Outcome),
    /// `end`: all that was asked for has been tried.
    End,
}

impl Line {
    /// Reads a line of a console; `None` for any that is not a report's.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim().strip_prefix(PREFIX)?.split_ascii_whitespace();
        let paging_and_number =
            |words: &mut dyn Iterator<Item = &str>| Some((Paging::named(words.next()?)?, words.next()?.parse().ok()?));
        let line = match words.next()? {
            "cpu" => Self::Cpu(words.next()?.parse().ok()?),
            "absent" => Self::Absent(Paging::named(words.next()?)?),
            "block" => {
                let (paging, number) = paging_and_number(&mut words)?;
                Self::Block(paging, number, Digest(u64::from_str_radix(words.next()?, 16).ok()?))
            }
            "case" => {
                let (paging, number) = paging_and_number(&mut words)?;
                Self::Case(paging, number, Outcome::parse(words.by_ref())?)
            }
            "end" => Self::End,
            _ => return None,
        };
        words.next().is_none().then_some(line)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX} ")?;
        match self {
            Self::Cpu(number) => write!(f, "cpu {number}"),
            Self::Absent(paging) => write!(f, "absent {}", paging.name()),
            Self::Block(paging, number, digest) => write!(f, "block {} {number} {digest}", paging.name()),
            Self::Case(paging, number, outcome) => write!(f, "case {} {number}{outcome}", paging.name()),
            Self::End => f.write_str("end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;
    use crate::space::{Entry, Features, Shot};
    use std::string::ToString;

    #[test]
    fn lines_come_back_as_they_were() {
        let seen = Seen { vector: 14, error: 7, cr2: !0, changed: [0x60, 0, 0x20, 0, 1 << 63], ..Seen::default() };
        let outcome = Outcome([seen, Seen { value: 9, memory: [[1, 2], [3, 4]], ..Seen::default() }]);
        let mut digest = Digest::default();
        digest.add(&outcome);
        for line in [
            Line::Cpu(0x28ff),
            Line::Absent(Paging::Long5),
            Line::Block(Paging::Pae, 256, digest),
            Line::Case(Paging::Legacy, 9, outcome),
            Line::End,
        ] {
            assert_eq!(Line::parse(&line.to_string()), Some(line));
        }
        for broken in
            ["", "conformance:", "conformance: end 1", "conformance: case pae 1 2", "conformance: block pae x"]
        {
            assert_eq!(Line::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn only_what_is_known_of_the_emulator_is_put_right() {
        let cpu = Cpu { features: Features::all(), physical_bits: 40 };
        let of = |paging, entries| {
            let case = Case { entries, ..sample(paging, cpu, 0, 0) };
            let unchanged = case.shots.map(|shot| Shot { change: None, ..shot });
            Case { shots: unchanged, ..case }
        };
        let small = [Entry::OPEN; LEVELS];
        let mut gigantic = small;
        gigantic[2] |= Entry::LARGE;
        let right = |case: Case, vector, error, changed| {
            let seen = Seen { vector, error, changed, ..Seen::default() };
            let Outcome([first, second]) = Outcome([seen; 2]).without_flaws(&case, cpu);
            assert_eq!(first, second);
            (first.vector, first.error, first.changed)
        };
        let marks = [0x60, 0x20, 0x60, 0x20, 0x20];
        let less = [0x60, 0x20, 0x40, 0x20, 0x20];
        assert_eq!(right(of(Paging::Long4, small), 14, 6, marks), (14, 6, marks));
        assert_eq!(right(of(Paging::Long4, gigantic), 14, 6, marks), (14, 6, less));
        assert_eq!(right(of(Paging::Long4, gigantic), NO_FAULT, 0, marks), (NO_FAULT, 0, marks));
        assert_eq!(right(of(Paging::Pae, small), NO_FAULT, 0, marks), (NO_FAULT, 0, less));
        assert_eq!(right(of(Paging::Legacy, small), 14, 10, marks), (14, 11, marks));
        assert_eq!(right(of(Paging::Legacy, small), 13, 10, marks), (13, 10, marks));
    }

    #[test]
    fn one_bit_of_one_outcome_changes_a_digest() {
        let of = |outcomes: &[Outcome]| {
            let mut digest = Digest::default();
            outcomes.iter().for_each(|outcome| digest.add(outcome));
            digest
        };
        let mut other = Outcome::default();
        other.0[1].changed[4] = 0x20;
        let plain = Outcome::default();
        let all = [of(&[plain, plain]), of(&[other, plain]), of(&[plain, other]), of(&[other]), of(&[plain])];
        for (index, digest) in all.iter().enumerate() {
            assert!(!all[index + 1..].contains(digest));
        }
    }
}
