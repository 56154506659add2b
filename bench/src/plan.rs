//! Which page is touched when, and by which thread.
//!
//! Two threads share one table in different ways. In sequential order they take turns at blocks of 2 MiB, so that they
//! share the upper tables and race to make them, but not the tables of leaves. In random order each page of the GiB
//! belongs to one of them, so that they share every table down to the leaves' cache lines.

use crate::contenders::{FIRST, PAGE, PAGES, pages_from};

/// Pages of one block that a thread has to itself in sequential order: what one table of leaves maps.
const BLOCK: u64 = 512;

/// The order in which pages are touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Upwards.
    Sequential,
    /// In one fixed random order, the same for all contenders.
    Random,
    /// The same random order, with the processor waiting after each operation until all of it is done. Real faults are
    /// an exit and an entry apart; back to back, the processor would overlap the cache misses of several.
    Apart,
}

impl Order {
    /// All.
    pub const ALL: [Self; 3] = [Self::Sequential, Self::Random, Self::Apart];

    /// As it appears in names of figures.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "seq",
            Self::Random => "random",
            Self::Apart => "apart",
        }
    }
}

/// What one thread does in a repetition.
#[derive(Clone, Debug)]
pub struct Share {
    /// The addresses of the pages it touches, in order.
    pub gpas: Vec<u64>,
    /// The range it zaps in one call, as first address and pages; `None` if it zaps `gpas` one by one.
    pub range: Option<(u64, u64)>,
    /// Whether the processor waits after each operation.
    pub apart: bool,
}

/// The shares of all threads of a repetition.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One a thread.
    pub shares: Vec<Share>,
    /// Pages in all shares together.
    pub pages: u64,
}

impl Plan {
    /// `pages` pages (at most [`PAGES`], a multiple of 1024) among `threads` threads, 1 or 2.
    pub fn new(order: Order, threads: usize, pages: u64) -> Self {
        assert!(pages <= PAGES && pages.is_multiple_of(2 * BLOCK), "{pages} pages can not be shared out");
        let mut gpas: Vec<u64> = pages_from(FIRST, pages).collect();
        if order != Order::Sequential {
            shuffle(&mut gpas);
        }
        let each = pages / threads as u64;
        let share = |thread: usize| {
            // In random order the page's place in the shuffled list decides, which is as good as a coin.
            let mine = |(place, gpa): (usize, &u64)| {
                let turn = if order == Order::Sequential { gpa / (BLOCK * PAGE) } else { place as u64 };
                (turn % threads as u64 == thread as u64).then_some(*gpa)
            };
            let range = (order == Order::Sequential).then_some((FIRST + each * thread as u64 * PAGE, each));
            Share { gpas: gpas.iter().enumerate().filter_map(mine).collect(), range, apart: order == Order::Apart }
        };
        Self { shares: (0..threads).map(share).collect(), pages }
    }
}

/// Fisher and Yates, with a fixed seed: figures are compared across runs.
fn shuffle(gpas: &mut [u64]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for place in (1..gpas.len()).rev() {
        // xorshift64* (Vigna); its high half, scaled to 0..=place.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        gpas.swap(place, ((random * (place as u64 + 1)) >> 32) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_disjoint_and_complete() {
        for (order, threads) in [(Order::Sequential, 1), (Order::Sequential, 2), (Order::Random, 1), (Order::Apart, 2)]
        {
            let plan = Plan::new(order, threads, 8192);
            let mut all: Vec<u64> = plan.shares.iter().flat_map(|share| share.gpas.clone()).collect();
            assert!(plan.shares.iter().all(|share| share.gpas.len() == 8192 / threads));
            assert_eq!(all.is_sorted(), order == Order::Sequential && threads == 1);
            all.sort_unstable();
            assert!(all.into_iter().eq(pages_from(FIRST, 8192)), "{order:?} {threads}");
            let mut ranges: Vec<_> = plan.shares.iter().filter_map(|share| share.range).collect();
            ranges.sort_unstable();
            let zapped: Vec<u64> = ranges.iter().flat_map(|&(first, pages)| pages_from(first, pages)).collect();
            assert!(order != Order::Sequential || zapped.into_iter().eq(pages_from(FIRST, 8192)));
        }
    }
}
