//! The bitmap of a dirty log: one bit a page of the slot, set by many, taken by one.
//!
//! # Who may do what
//! Anyone inside the MMU lock sets bits, whoever holds the memslot update lock takes them. Both are single
//! read-modify-writes of a word, so a bit is taken exactly once, and a taker that misses one leaves it to the next.
//!
//! # All set for nothing
//! A log may begin with every page dirty. Words are kept *inverted* then: fresh memory is zero, which already says so,
//! and nothing is written or walked, whatever the slot's size. The last word's bits past the slot's end are cut off
//! where words are read, and not where they are kept.

use alloc::boxed::Box;

use crate::OutOfMemory;
use crate::sync::{AtomicU64, Ordering};

/// Pages of one word.
pub(crate) const WORD: u64 = u64::BITS as u64;

/// See the module head.
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
    /// What a word without dirty pages holds: 0, or all ones where words are inverted.
    clean: u64,
}

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
fn zeroed(words: usize) -> Result<Box<[AtomicU64]>, OutOfMemory> {
    zerocopy::FromZeros::new_box_zeroed_with_elems(words).map_err(|_| OutOfMemory)
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
fn zeroed(words: usize) -> Result<Box<[AtomicU64]>, OutOfMemory> {
    Ok((0..words).map(|_| AtomicU64::new(0)).collect())
}

impl Bitmap {
    /// For a slot of so many pages: none dirty, or all of them.
    pub(crate) fn new(pages: u64, all: bool) -> Result<Self, OutOfMemory> {
        let words = usize::try_from(pages.div_ceil(WORD)).map_err(|_| OutOfMemory)?;
        Ok(Self { words: zeroed(words)?, pages, clean: if all { u64::MAX } else { 0 } })
    }

    /// Words that it has.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// The bits of `word` that stand for pages of the slot.
    fn valid(&self, word: usize) -> u64 {
        let left = self.pages - word as u64 * WORD;
        if left >= WORD { u64::MAX } else { (1 << left) - 1 }
    }

    /// Sets the bits of `mask`; returns those of them that were clear.
    #[inline]
    pub(crate) fn set(&self, word: usize, mask: u64) -> u64 {
        let cell = &self.words[word];
        // Acquire and release: a taker that finds the bit sees what was done before it was set, and what is done after
        // it (nothing here relies on that) stays after.
        let old = if self.clean == 0 {
            cell.fetch_or(mask, Ordering::AcqRel)
        } else {
            cell.fetch_and(!mask, Ordering::AcqRel)
        };
        !(old ^ self.clean) & mask
    }

    /// As [`Bitmap::set`] for who does not ask which were clear, which costs a loop where the CPU sets bits blindly in one
    /// instruction.
    #[inline]
    pub(crate) fn note(&self, word: usize, mask: u64) {
        let cell = &self.words[word];
        if self.clean == 0 {
            cell.fetch_or(mask, Ordering::AcqRel);
        } else {
            cell.fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// Sets the bits of the pages from `start` to `end`, the latter not included.
    pub(crate) fn set_range(&self, start: u64, end: u64) {
        let end = end.min(self.pages);
        let mut page = start;
        while page < end {
            let (bit, next) = (page % WORD, (page / WORD + 1) * WORD);
            let cut = next.saturating_sub(end);
            self.note((page / WORD) as usize, u64::MAX << bit & u64::MAX >> cut);
            page = next;
        }
    }

    /// The bits of `word`.
    #[inline]
    pub(crate) fn get(&self, word: usize) -> u64 {
        (self.words[word].load(Ordering::Acquire) ^ self.clean) & self.valid(word)
    }

    /// Takes all bits of as many words as `out` has, from `first` on; returns how many were set.
    pub(crate) fn take_words(&self, first: usize, out: &mut [u64]) -> u64 {
        let (mut pages, last, clean) = (0, self.words.len() - 1, self.clean);
        let cells = &self.words[first..][..out.len()];
        for (index, out) in out.iter_mut().enumerate() {
            let cell = &cells[index];
            // A word without dirty pages, which is what most are, is not written.
            if cell.load(Ordering::Acquire) == clean && !cfg!(feature = "loom") {
                *out = 0;
                continue;
            }
            // What lies past the slot's end is clean for good then, if it was not.
            *out = cell.swap(clean, Ordering::AcqRel) ^ clean;
            if first + index == last {
                *out &= self.valid(last);
            }
            // The usual word of a busy guest is not worth adding up, which takes a CPU that may not be asked to count long.
            pages += if *out == u64::MAX { WORD } else { u64::from(out.count_ones()) };
        }
        pages
    }

    /// Clears the bits of `mask`; returns those of them that were set.
    #[inline]
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        let (cell, mask) = (&self.words[word], mask & self.valid(word));
        // A word without dirty pages, which is what most are, is not written.
        if (cell.load(Ordering::Acquire) ^ self.clean) & mask == 0 && !cfg!(feature = "loom") {
            return 0;
        }
        let old = if self.clean == 0 {
            cell.fetch_and(!mask, Ordering::AcqRel)
        } else {
            cell.fetch_or(mask, Ordering::AcqRel)
        };
        (old ^ self.clean) & mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::vec;
    use proptest::prelude::*;

    fn dirty(bitmap: &Bitmap) -> BTreeSet<u64> {
        let bits = (0..bitmap.words()).flat_map(|word| (0..WORD).map(move |bit| (word, bit)));
        bits.filter(|(word, bit)| bitmap.get(*word) >> bit & 1 != 0)
            .map(|(word, bit)| word as u64 * WORD + bit)
            .collect()
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(
            pages in 1u64..300,
            all: bool,
            ops in prop::collection::vec((0..4, 0u64..300, 0u64..300, any::<u64>()), 0..40),
        ) {
            let bitmap = Bitmap::new(pages, all).unwrap();
            let mut set: BTreeSet<u64> = if all { (0..pages).collect() } else { BTreeSet::new() };
            for (op, start, end, mask) in ops {
                let word = (start / WORD) as usize % bitmap.words();
                let bits = |mask: u64| (0..WORD).filter(move |bit| mask >> bit & 1 != 0).map(move |bit| word as u64 * WORD + bit);
                match op {
                    0 => {
                        let taken = bitmap.take(word, mask);
                        for page in bits(mask) {
                            prop_assert_eq!(set.remove(&page), taken >> (page % WORD) & 1 != 0);
                        }
                    }
                    1 => {
                        let mut out = vec![1; (bitmap.words() - word).min(2)];
                        let count = bitmap.take_words(word, &mut out);
                        let kept = set.len();
                        for (number, taken) in (word..).zip(out) {
                            for bit in 0..WORD {
                                prop_assert_eq!(set.remove(&(number as u64 * WORD + bit)), taken >> bit & 1 != 0);
                            }
                        }
                        prop_assert_eq!(count, (kept - set.len()) as u64);
                    }
                    2 => {
                        bitmap.note(word, mask & bitmap.valid(word));
                        set.extend(bits(mask & bitmap.valid(word)));
                    }
                    _ => {
                        bitmap.set_range(start, end);
                        set.extend(start..end.min(pages));
                    }
                }
                prop_assert_eq!(&dirty(&bitmap), &set);
            }
        }
    }
}
