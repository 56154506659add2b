//! Where the instructions of the Linux guest's row go: the guest's own, and the hypervisor's by exit.
//!
//! A hypervisor that is built for it reads the instruction counter before and behind every run of the guest
//! (`hypervisor/src/seams`): nothing is sampled. Following single instructions, as the other profiles do, would take far too
//! long for a whole boot.

use std::fmt;

use nestling_control::message::{SeamCount, Seams};

/// A part of the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    name: String,
    /// How often, where that means anything.
    count: Option<u64>,
    instructions: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    total: u64,
    /// What counting took, which is not in the total.
    counting: u64,
    /// They sum up to the total.
    parts: Vec<Part>,
    /// Of the exits' parts.
    clearing: u64,
}

impl Shares {
    /// Of a run that took so many instructions in all, idling left out.
    pub(super) fn new(seams: &Seams, total: u64) -> Self {
        let Seams { runs, guest_ticks, shortest_ticks, exits, clearing_ticks, counting_inside, counting_outside } =
            seams;
        // In the shortest run the guest executes nothing, or one instruction: that is what a switch takes.
        let switch = shortest_ticks.saturating_sub(*counting_inside);
        let part = |name: &str, count, instructions| Part { name: name.to_owned(), count, instructions };
        let handled = |(name, &SeamCount { count, ticks }): (&String, &SeamCount)| {
            part(name, Some(count), ticks.saturating_sub(count.saturating_mul(*counting_outside)))
        };
        let mut ours: Vec<Part> = exits.iter().map(handled).collect();
        ours.push(part("world switches", Some(*runs), runs.saturating_mul(switch)));
        ours.sort_by_key(|part| std::cmp::Reverse(part.instructions));
        let mut parts =
            vec![part("the guest itself", None, guest_ticks.saturating_sub(runs.saturating_mul(*shortest_ticks)))];
        parts.append(&mut ours);
        let counting = runs.saturating_mul(counting_inside.saturating_add(*counting_outside));
        let total = total.saturating_sub(counting);
        let known = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.instructions));
        let rest = total.saturating_sub(known);
        parts.push(part("before the first run and behind the last", None, rest));
        Self { total, counting, parts, clearing: *clearing_ticks }
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} instructions; {} more were the counting's, and are left out", self.total, self.counting)?;
        writeln!(f, "{:>12} {:>8} {:>10} {:>10}", "instructions", "%", "count", "each")?;
        for Part { name, count, instructions } in &self.parts {
            let share = 100.0 * *instructions as f64 / self.total.max(1) as f64;
            let (count, each) = match *count {
                Some(count) if count > 0 => (count.to_string(), format!("{:.1}", *instructions as f64 / count as f64)),
                _ => ("-".to_owned(), "-".to_owned()),
            };
            writeln!(f, "{instructions:12} {share:8.3} {count:>10} {each:>10}  {name}")?;
        }
        write!(f, "of the exits' instructions, {} cleared memory for the guest", self.clearing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seams() -> Seams {
        let exits = [("cpuid", 10, 1100), ("npf", 30, 9300)];
        Seams {
            runs: 40,
            guest_ticks: 100_000,
            shortest_ticks: 60,
            exits: exits.map(|(name, count, ticks)| (name.to_owned(), SeamCount { count, ticks })).into(),
            clearing_ticks: 4000,
            counting_inside: 12,
            counting_outside: 10,
        }
    }

    #[test]
    fn the_parts_are_the_whole_without_the_counting() {
        let shares = Shares::new(&seams(), 111_000);
        let shown: Vec<_> = shares.parts.iter().map(|part| (&part.name[..], part.count, part.instructions)).collect();
        assert_eq!(
            shown,
            [
                ("the guest itself", None, 97_600),
                ("npf", Some(30), 9000),
                ("world switches", Some(40), 1920),
                ("cpuid", Some(10), 1000),
                ("before the first run and behind the last", None, 600),
            ]
        );
        assert_eq!((shares.counting, shares.total), (880, 110_120));
        assert_eq!(shares.parts.iter().map(|part| part.instructions).sum::<u64>(), shares.total);
    }

    /// The counts come from a machine that may be broken.
    #[test]
    fn counts_that_cannot_be_are_shown_all_the_same() {
        let broken = Seams { shortest_ticks: u64::MAX, guest_ticks: 0, counting_outside: u64::MAX, ..seams() };
        assert!(Shares::new(&broken, 0).to_string().contains("cpuid"));
    }
}
