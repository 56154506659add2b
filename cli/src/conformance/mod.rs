//! `nestling conformance`: whether a guest's CPU walks page tables exactly as the CPU below does.
//!
//! One image tries cases of paging (`nestling-conformance` says how they are made) on the emulated CPU alone and as a guest
//! of this hypervisor. It judges nothing: what it found it reports, a line a block of cases. The two reports must be the same.
//! Where a block differs, both sides try it again, with all that came before it, and tell of each case in it. A third opinion
//! is the model of the manuals: it says which of the two is wrong, and what neither of them does as written.
//!
//! The sample takes all kinds of paging in one boot; the whole is cut into pieces, a boot each.

mod image;
mod side;

use std::{collections::BTreeMap, ops::Range};

use nestling_conformance::{BLOCK, Case, Cpu, Digest, Outcome, Paging, count, every, model, sample};

use crate::{args::ConformanceArgs, error::Error, progress::Progress};
use side::{Report, Sides, Words};

/// Cases that are tried in one boot, at most, where all are.
const PIECE: u64 = 1 << 18;
/// Blocks that are looked at closely, and cases that are shown; of more there is no more to learn.
const BLOCKS_SHOWN: usize = 4;
const CASES_SHOWN: usize = 8;

/// What was compared, and how it came out.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    cases: u64,
    /// Blocks, and cases in the first of them, that differ between the guest and the CPU alone.
    blocks: usize,
    differences: u64,
    /// Blocks in which the CPU alone is not as the manuals say.
    unlike_manuals: usize,
}

/// Who tries cases.
trait Tried {
    /// The image on this hypervisor.
    fn guest(&self, words: &Words) -> Result<Report, Error>;
    /// The image without any.
    fn alone(&self, words: &Words) -> Result<Report, Error>;
}

/// Compares what was asked for.
///
/// # Errors
/// The first thing that cannot be done; or that something differs.
pub fn run(args: &ConformanceArgs, progress: Progress) -> Result<(), Error> {
    let sides = Sides::prepare(args, progress)?;
    let cpu = sides.cpu()?;
    let asked = |paging: &Paging| args.paging.is_empty() || args.paging.contains(paging);
    let pagings: Vec<_> = Paging::ALL.into_iter().filter(asked).collect();
    progress.note(&format!("cases for a CPU with {} address bits and {:?}", cpu.physical_bits, cpu.features));
    let mut tally = Tally::default();
    if args.all {
        for paging in pagings.into_iter().filter(|paging| cpu.has(*paging)) {
            let all = count(paging, cpu);
            let part = args.part.0 - 1..args.part.0;
            let bound = |part: u64| (all / args.part.1 * part).next_multiple_of(BLOCK);
            let range = bound(part.start)..if part.end == args.part.1 { all } else { bound(part.end) };
            for start in range.clone().step_by(PIECE as usize) {
                let cases = start..range.end.min(start + PIECE);
                progress.note(&format!("{} {} to {} of {all}", paging.name(), cases.start, cases.end));
                compare(
                    &sides,
                    cpu,
                    &Words { seed: None, pagings: vec![paging], cases, cpu, trace: None },
                    &mut tally,
                )?;
            }
        }
    } else {
        let cases = 0..args.cases;
        compare(&sides, cpu, &Words { seed: Some(args.seed), pagings, cases, cpu, trace: None }, &mut tally)?;
    }
    let Tally { cases, blocks, differences, unlike_manuals } = tally;
    if blocks == 0 && unlike_manuals == 0 {
        println!("{cases} cases, 0 differences");
        return Ok(());
    }
    Err(Error::Differences { cases, blocks, differences, unlike_manuals })
}

/// The case that a number means.
fn case(words: &Words, paging: Paging, number: u64) -> Case {
    match words.seed {
        Some(seed) => sample(paging, words.cpu, seed, number),
        None => every(paging, words.cpu, number),
    }
}

/// A block of cases.
type Block = (Paging, u64);

fn cases_of(words: &Words, (_, start): Block) -> Range<u64> {
    start..words.cases.end.min(start + BLOCK)
}

fn compare(sides: &impl Tried, cpu: Cpu, words: &Words, tally: &mut Tally) -> Result<(), Error> {
    let (guest, alone) = (sides.guest(words)?, sides.alone(words)?);
    let expected: Vec<Block> = words
        .pagings
        .iter()
        .filter(|paging| cpu.has(**paging))
        .flat_map(|paging| words.cases.clone().step_by(BLOCK as usize).map(|start| (*paging, start)))
        .collect();
    for report in [&guest, &alone] {
        if report.cpu != Some(cpu)
            || !report.blocks.keys().copied().eq(expected.iter().map(|(paging, start)| (*paging as u8, *start)))
        {
            return Err(Error::Conformance("a report has other blocks than were asked for".into()));
        }
    }
    let key = |(paging, start): Block| (paging as u8, start);
    let unlike: Vec<Block> =
        expected.iter().copied().filter(|block| guest.blocks[&key(*block)] != alone.blocks[&key(*block)]).collect();
    let manuals: Vec<Block> =
        expected.iter().copied().filter(|block| alone.blocks[&key(*block)] != manual_block(words, *block)).collect();
    tally.cases +=
        expected.iter().map(|block| cases_of(words, *block)).map(|cases| cases.end - cases.start).sum::<u64>();
    tally.blocks += unlike.len();
    tally.unlike_manuals += manuals.len();
    for block in unlike.iter().take(BLOCKS_SHOWN) {
        let again = traced(words, *block);
        let (guest, alone) = (sides.guest(&again)?, sides.alone(&again)?);
        tally.differences += show(words, *block, &alone, Some(&guest));
    }
    for block in manuals.iter().take(BLOCKS_SHOWN).filter(|block| !unlike.contains(block)) {
        show(words, *block, &sides.alone(&traced(words, *block))?, None);
    }
    Ok(())
}

/// The same once more, up to a block, whose cases are told of.
fn traced(words: &Words, (paging, start): Block) -> Words {
    // What came before leaves its traces in a hypervisor's tables, that of other pagings too.
    let pagings: Vec<_> = words.pagings.iter().copied().take_while(|other| *other != paging).chain([paging]).collect();
    let traced = cases_of(words, (paging, start));
    let end = if pagings.len() == 1 { traced.end } else { words.cases.end };
    Words { trace: Some((paging, traced)), pagings, cases: words.cases.start..end, ..words.clone() }
}

/// What the manuals say comes of a case.
fn manual(cpu: Cpu, case: &Case) -> Outcome {
    model::expect(case, cpu).without_flaws(case, cpu)
}

/// And of a block.
fn manual_block(words: &Words, block: Block) -> Digest {
    let mut digest = Digest::default();
    for number in cases_of(words, block) {
        digest.add(&manual(words.cpu, &case(words, block.0, number)));
    }
    digest
}

/// Prints the cases of a block in which the reports, or the CPU alone and the manuals, differ; how many there are.
fn show(words: &Words, block: Block, alone: &Report, guest: Option<&Report>) -> u64 {
    let (paging, _) = block;
    let mut found = 0;
    for number in cases_of(words, block) {
        let case = case(words, paging, number);
        let manual = manual(words.cpu, &case);
        let of = |report: &Report| report.cases.get(&(paging as u8, number)).copied();
        let on_cpu = of(alone);
        let same = match guest {
            Some(guest) => of(guest) == on_cpu,
            None => on_cpu == Some(manual),
        };
        if same {
            continue;
        }
        found += 1;
        if found > CASES_SHOWN as u64 {
            continue;
        }
        println!("{} case {number}: {case}", paging.name());
        let said = |who: &str, outcome: Option<Outcome>| match outcome {
            Some(outcome) => println!("  {who}: {}", outcome.in_words(paging)),
            None => println!("  {who}: nothing was reported"),
        };
        said("CPU alone", on_cpu);
        if let Some(guest) = guest {
            said("guest    ", of(guest));
        }
        said("manuals  ", Some(manual));
    }
    if found > CASES_SHOWN as u64 {
        println!("and {} more cases of this block", found - CASES_SHOWN as u64);
    }
    found
}

/// Reports by paging and number.
type ByNumber<T> = BTreeMap<(u8, u64), T>;

#[cfg(test)]
mod tests {
    use super::*;
    use nestling_conformance::Features;

    const CPU: Cpu = Cpu { features: Features::all(), physical_bits: 40 };

    /// Two CPUs that do what the manuals say, but for one case each.
    struct Wrong {
        guest: Option<(Paging, u64)>,
        alone: Option<(Paging, u64)>,
    }

    fn report(words: &Words, wrong: Option<(Paging, u64)>) -> Report {
        let mut report = Report { cpu: Some(words.cpu), ..Report::default() };
        for &paging in &words.pagings {
            for start in words.cases.clone().step_by(BLOCK as usize) {
                let mut digest = Digest::default();
                for number in cases_of(words, (paging, start)) {
                    let mut outcome = manual(words.cpu, &case(words, paging, number));
                    if wrong == Some((paging, number)) {
                        outcome.0[1].changed[0] ^= 0x20;
                    }
                    digest.add(&outcome);
                    if words.trace.as_ref().is_some_and(|(traced, cases)| *traced == paging && cases.contains(&number))
                    {
                        report.cases.insert((paging as u8, number), outcome);
                    }
                }
                report.blocks.insert((paging as u8, start), digest);
            }
        }
        report
    }

    impl Tried for Wrong {
        fn guest(&self, words: &Words) -> Result<Report, Error> {
            Ok(report(words, self.guest))
        }

        fn alone(&self, words: &Words) -> Result<Report, Error> {
            Ok(report(words, self.alone))
        }
    }

    fn tally(seed: Option<u64>, guest: Option<(Paging, u64)>, alone: Option<(Paging, u64)>) -> Tally {
        let words = Words { seed, pagings: Paging::ALL.to_vec(), cases: 0..700, cpu: CPU, trace: None };
        let mut tally = Tally::default();
        compare(&Wrong { guest, alone }, CPU, &words, &mut tally).expect("complete reports");
        tally
    }

    #[test]
    fn one_mark_in_one_case_is_found_and_it_is_said_whose() {
        for seed in [Some(7), None] {
            let none = tally(seed, None, None);
            assert_eq!((none.cases, none.blocks, none.differences, none.unlike_manuals), (2800, 0, 0, 0));
            for wrong in [(Paging::Legacy, 0), (Paging::Pae, 256), (Paging::Long5, 699)] {
                let guest = tally(seed, Some(wrong), None);
                assert_eq!((guest.blocks, guest.differences, guest.unlike_manuals), (1, 1, 0));
                let alone = tally(seed, None, Some(wrong));
                assert_eq!((alone.blocks, alone.differences, alone.unlike_manuals), (1, 1, 1));
                let both = tally(seed, Some(wrong), Some(wrong));
                assert_eq!((both.blocks, both.differences, both.unlike_manuals), (0, 0, 1));
            }
        }
    }

    #[test]
    fn reports_of_other_cases_are_not_compared() {
        struct Short;
        impl Tried for Short {
            fn guest(&self, words: &Words) -> Result<Report, Error> {
                Ok(report(&Words { cases: 0..256, ..words.clone() }, None))
            }

            fn alone(&self, words: &Words) -> Result<Report, Error> {
                Ok(report(words, None))
            }
        }
        let words = Words { seed: Some(1), pagings: vec![Paging::Pae], cases: 0..512, cpu: CPU, trace: None };
        assert!(compare(&Short, CPU, &words, &mut Tally::default()).is_err());
    }
}
