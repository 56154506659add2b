//! Patterns over most of the guest's memory, written and read by all CPUs.
//!
//! In each round every page is written by one CPU and, after a barrier, read by another; which ones moves on by one from
//! round to round. Neighbouring pages belong to different CPUs, so that all of them fault into the same page tables at
//! the same time. A word's value depends on its place and on the round and is never that of another place or round: a
//! page mapped to the wrong frame, two pages sharing one, a stale translation and a lost write each read as a wrong
//! value.
//!
//! To be quick on an emulated CPU, a page gets one word in each 64-byte line; every 16th page is filled completely.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use crate::{failure::Failure, sys};

const ROUNDS: u64 = 3;
const PAGE_WORDS: usize = 4096 / size_of::<u64>();
const LINE_WORDS: usize = 64 / size_of::<u64>();
const FULL_EVERY: usize = 16;

/// Checks `percent` of the memory that is available now.
pub(crate) fn check(cpus: &[usize], percent: u64) -> Result<(), Failure> {
    let bytes = sys::available_bytes()? / 100 * percent;
    let region = sys::Region::map((bytes as usize).next_multiple_of(4096))?;
    let words = region.words();
    let barrier = Barrier::new(cpus.len());

    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .enumerate()
            .map(|(share, &cpu)| {
                scope.spawn({
                    let barrier = &barrier;
                    move || rounds(words, barrier, Turn { share, shares: cpus.len(), cpu })
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a panic aborts")).collect()
    });
    results.into_iter().collect::<Result<(), _>>()?;
    println!("nestling-selfcheck: memory: {} MiB, {ROUNDS} rounds, {} CPUs: good", bytes >> 20, cpus.len());
    Ok(())
}

/// One CPU's place among all.
#[derive(Clone, Copy)]
struct Turn {
    share: usize,
    shares: usize,
    cpu: usize,
}

impl Turn {
    /// The pages of this CPU, when `step` barriers' worth of moving on has happened.
    fn pages(self, words: &[AtomicU64], step: usize) -> impl Iterator<Item = (usize, &[AtomicU64])> {
        let first = (self.share + step) % self.shares;
        words.chunks_exact(PAGE_WORDS).enumerate().skip(first).step_by(self.shares)
    }
}

/// All rounds on one CPU. After a failure it goes on to the end: the others wait for it at the barriers.
fn rounds(words: &[AtomicU64], barrier: &Barrier, turn: Turn) -> Result<(), Failure> {
    let mut result = sys::pin_to(turn.cpu);
    for round in 0..ROUNDS {
        let step = round as usize;
        for (page, words) in turn.pages(words, step) {
            for word in places(page) {
                words[word].store(pattern(page * PAGE_WORDS + word, round), Ordering::Relaxed);
            }
        }
        barrier.wait();
        result = result.and(verify(words, turn, step + 1, round));
        if barrier.wait().is_leader() {
            println!("nestling-selfcheck: memory: round {} of {ROUNDS}", round + 1);
        }
    }
    result
}

fn verify(words: &[AtomicU64], turn: Turn, step: usize, round: u64) -> Result<(), Failure> {
    for (page, words) in turn.pages(words, step) {
        for word in places(page) {
            let expected = pattern(page * PAGE_WORDS + word, round);
            let found = words[word].load(Ordering::Relaxed);
            if found != expected {
                return Err(Failure::Memory { cpu: turn.cpu, round, word: page * PAGE_WORDS + word, expected, found });
            }
        }
    }
    Ok(())
}

/// The words of a page that are used: all, or one in each line, at a place that differs from page to page.
fn places(page: usize) -> impl Iterator<Item = usize> {
    let (first, step) = if page.is_multiple_of(FULL_EVERY) { (0, 1) } else { (page % LINE_WORDS, LINE_WORDS) };
    (first..PAGE_WORDS).step_by(step)
}

/// Multiplication by an odd number is a bijection of 64-bit words, so no two (place, round) share a value; no
/// value is 0, which an untouched page would hold.
fn pattern(index: usize, round: u64) -> u64 {
    ((index as u64) | ((round + 1) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(pages: usize) -> Vec<AtomicU64> {
        (0..pages * PAGE_WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn alone() -> Turn {
        Turn { share: 0, shares: 1, cpu: 0 }
    }

    #[test]
    fn each_page_has_one_writer_and_another_reader_in_each_round() {
        const SHARES: usize = 3;
        let words = memory(10);
        for step in 0..5 {
            let mut owners = [None; 10];
            for share in 0..SHARES {
                for (page, _) in (Turn { share, shares: SHARES, cpu: share }).pages(&words, step) {
                    assert_eq!(owners[page].replace(share), None, "page {page} has two owners in step {step}");
                }
            }
            assert!(owners.iter().all(Option::is_some));
        }
        let writer: Vec<_> = alone_of(1, SHARES).pages(&words, 0).map(|(page, _)| page).collect();
        let reader: Vec<_> = alone_of(1, SHARES).pages(&words, 1).map(|(page, _)| page).collect();
        assert!(writer.iter().all(|page| !reader.contains(page)));
    }

    fn alone_of(share: usize, shares: usize) -> Turn {
        Turn { share, shares, cpu: 0 }
    }

    #[test]
    fn what_was_written_verifies_and_what_was_not_does_not() {
        let words = memory(40);
        let barrier = Barrier::new(1);
        rounds(&words, &barrier, alone()).expect("nobody else writes");
        verify(&words, alone(), 0, ROUNDS - 1).expect("the last round is there");
        assert!(verify(&words, alone(), 0, ROUNDS - 2).is_err(), "an older round is not");

        // Two pages in one frame: the second page's words show through the first.
        let stolen: Vec<u64> =
            words[PAGE_WORDS * 2..][..PAGE_WORDS].iter().map(|w| w.load(Ordering::Relaxed)).collect();
        for (word, value) in words[PAGE_WORDS * 10..][..PAGE_WORDS].iter().zip(stolen) {
            word.store(value, Ordering::Relaxed);
        }
        let found = verify(&words, alone(), 0, ROUNDS - 1);
        assert!(matches!(found, Err(Failure::Memory { word, .. }) if word / PAGE_WORDS == 10), "{found:?}");
    }
}
