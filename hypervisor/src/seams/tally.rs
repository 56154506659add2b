//! The books of [`super`]: sums of what passed between stamps.

use alloc::string::ToString;

use nestling_control::message::{SeamCount, Seams};

use crate::vm::exit::{KINDS, NAMES};

/// Beside the kinds of exits: those that were handled without leaving guest mode, and what came before the first run.
const AT_ONCE: usize = KINDS;
const BEFORE: usize = KINDS + 1;
const ROWS: usize = KINDS + 2;

/// What they are called.
fn name(row: usize) -> &'static str {
    match row {
        AT_ONCE => "in guest mode",
        BEFORE => "before the first run",
        kind => NAMES[kind],
    }
}

/// What was counted on one CPU, or on several.
#[derive(Clone, Debug)]
pub struct Tally {
    /// The last stamp.
    at: u64,
    /// What the time from there to the next run is counted for.
    row: usize,
    runs: u64,
    guest: u64,
    shortest: u64,
    rows: [(u64, u64); ROWS],
    cleared: u64,
    /// What counting takes of each run, on the guest's side and on this one.
    inside: u64,
    outside: u64,
}

impl Tally {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            at: 0,
            row: BEFORE,
            runs: 0,
            guest: 0,
            shortest: u64::MAX,
            rows: [(0, 0); ROWS],
            cleared: 0,
            inside: 0,
            outside: 0,
        }
    }

    /// Takes over what counting costs, from one that counted nothing else.
    pub fn costs_as(&mut self, empty: &Self) {
        let outside: u64 = empty.rows.iter().map(|(_, ticks)| ticks).sum();
        self.inside = empty.guest / empty.runs.max(1);
        // The last round's was not closed.
        self.outside = outside / (empty.runs.max(2) - 1);
    }

    /// The guest is about to be run.
    pub fn entering(&mut self, now: u64) {
        // Whatever came before the first run is no part of it.
        if self.row != BEFORE {
            self.rows[self.row].1 += now - self.at;
        }
        self.at = now;
    }

    /// It was left.
    pub fn left(&mut self, now: u64) {
        let run = now - self.at;
        self.runs += 1;
        self.guest += run;
        self.shortest = self.shortest.min(run);
        self.at = now;
    }

    /// By an exit of this kind.
    pub fn exit(&mut self, kind: usize) {
        self.row = kind;
        self.rows[kind].0 += 1;
    }

    /// The last exit is handled without leaving guest mode.
    pub fn at_once(&mut self) {
        self.rows[self.row].0 -= 1;
        self.row = AT_ONCE;
        self.rows[AT_ONCE].0 += 1;
    }

    /// Nothing was executed for so long.
    pub fn idle(&mut self, ticks: u64) {
        self.at += ticks;
    }

    /// So much of what is counted cleared memory.
    pub fn cleared(&mut self, ticks: u64) {
        // A loader's is no part of the run.
        if self.row != BEFORE {
            self.cleared += ticks;
        }
    }

    /// Adds what another CPU counted.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.guest += other.guest;
        self.shortest = self.shortest.min(other.shortest);
        self.cleared += other.cleared;
        (self.inside, self.outside) = (other.inside, other.outside);
        for (row, (count, ticks)) in self.rows.iter_mut().zip(other.rows) {
            row.0 += count;
            row.1 += ticks;
        }
    }

    /// For the command.
    #[must_use]
    pub fn report(&self) -> Seams {
        let rows = self.rows.iter().enumerate().filter(|(_, (count, _))| *count > 0);
        let row = |(row, &(count, ticks))| (name(row).to_string(), SeamCount { count, ticks });
        Seams {
            runs: self.runs,
            guest_ticks: self.guest,
            shortest_ticks: self.shortest,
            exits: rows.map(row).collect(),
            clearing_ticks: self.cleared,
            counting_inside: self.inside,
            counting_outside: self.outside,
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every tick from the first run's beginning to the last one's end is in one place, but for those without a guest.
    #[test]
    fn what_passes_between_stamps_is_counted_once() {
        let mut tally = Tally::new();
        let (cpuid, fault, halt) = (4, 9, 5);
        tally.entering(1000);
        tally.left(1060);
        tally.exit(cpuid);
        tally.entering(1200);
        tally.left(1300);
        tally.exit(fault);
        tally.at_once();
        tally.entering(1350);
        tally.left(1450);
        tally.exit(fault);
        tally.cleared(300);
        tally.entering(2000);
        tally.left(2055);
        tally.exit(halt);
        tally.idle(5000);
        tally.entering(7100);
        tally.left(7200);
        tally.exit(cpuid);
        let mut all = Tally::new();
        all.add(&tally);
        all.add(&Tally::new());
        let report = all.report();
        let counted = |name: &str| report.exits.get(name).map(|row| (row.count, row.ticks));
        assert_eq!(counted("cpuid"), Some((2, 140)));
        assert_eq!(counted("in guest mode"), Some((1, 50)));
        assert_eq!(counted("npf"), Some((1, 550)));
        assert_eq!(counted("hlt"), Some((1, 45)));
        assert_eq!((report.runs, report.guest_ticks, report.shortest_ticks, report.clearing_ticks), (5, 415, 55, 300));
        let outside: u64 = report.exits.values().map(|row| row.ticks).sum();
        assert_eq!(report.guest_ticks + outside + 5000, 7200 - 1000);
    }

    #[test]
    fn counting_is_told_by_the_run() {
        let mut empty = Tally::new();
        for round in 0..100 {
            empty.entering(round * 30);
            empty.left(round * 30 + 12);
            empty.exit(0);
        }
        let mut tally = Tally::new();
        tally.costs_as(&empty);
        let Seams { runs, counting_inside, counting_outside, .. } = tally.report();
        assert_eq!((runs, counting_inside, counting_outside), (0, 12, 18));
    }
}
