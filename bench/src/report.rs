//! The whole run: rounds of wall time and counts of instructions, as tables for people and figures for scripts.
//!
//! Wall time is measured in rounds, in which each contender has its turn at each case, so that what else the machine
//! does hits all of them alike.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::clock::{Operation, cpus, repetition};
use crate::contenders::{Asymmetry, BareWalk, Contender, FullFences, Membarrier, Nestling, PageTableMultiarch, X86_64};
use crate::figures::{Figure, Summary};
use crate::instructions::{self, count, counted_process};
use crate::plan::{Order, Plan};
use crate::zap_all::{self, Company, Size};

/// A contender's entry points, with its type erased.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// As it appears in names of figures.
    pub name: &'static str,
    repetition: fn(&Plan, &[usize]) -> [Duration; 3],
    /// See [`counted_process`].
    pub counted_process: fn(Operation),
}

impl Entry {
    /// Those of `C`.
    pub const fn of<C: Contender>() -> Self {
        Self { name: C::NAME, repetition: repetition::<C>, counted_process: counted_process::<C> }
    }
}

/// What a zap of everything costs, under the fences that the machine has: the measurement, and what a counted process does.
#[derive(Clone, Copy, Debug)]
pub struct ZapAll {
    /// See [`zap_all::figures`].
    pub figures: fn(bool) -> Vec<Figure>,
    /// See [`zap_all::counted_process`].
    pub counted_process: fn(Size),
    /// See [`zap_all::counted_faults`].
    pub counted_faults: fn(Company),
}

impl ZapAll {
    const fn of<A: Asymmetry>() -> Self {
        Self {
            figures: zap_all::figures::<A>,
            counted_process: zap_all::counted_process::<A>,
            counted_faults: zap_all::counted_faults::<A>,
        }
    }
}

/// Of `nestling`.
pub fn zap_all() -> ZapAll {
    if Membarrier::register() { ZapAll::of::<Membarrier>() } else { ZapAll::of::<FullFences>() }
}

/// Counts the instructions of faults beside a zap and without one, prints them and gives their figures.
pub fn fault_counts() -> Vec<Figure> {
    println!("\nzap of a range: instructions of a fault of another thread");
    let mut figures = Vec::new();
    for company in Company::ALL {
        match instructions::count_faults(company) {
            Ok(value) => {
                println!("  {:<6} {value:>8.1}", company.name());
                let name = format!("zap_range.fault_{}.instructions", company.name());
                figures.push(Figure { name, value });
            }
            Err(error) => {
                println!("  not counted: {error}");
                break;
            }
        }
    }
    figures
}

/// Counts the instructions of the front half of a zap-all, prints them and gives their figures.
pub fn front_half_counts() -> Vec<Figure> {
    println!("\nzap-all: instructions of the front half, by what is mapped");
    let mut figures = Vec::new();
    let mut counts = [0.0; 2];
    for (size, count) in Size::ALL.into_iter().zip(&mut counts) {
        match instructions::count_front_half(size) {
            Ok(counted) => *count = counted as f64,
            Err(error) => {
                println!("  not counted: {error}");
                return figures;
            }
        }
        println!("  {:<5} {count:>8}", size.name());
        let name = format!("zap_all.front_half.{}.instructions", size.name());
        figures.push(Figure { name, value: *count });
    }
    let name = "zap_all.front_half.instructions_ratio_1tib_to_1gib".into();
    figures.push(Figure { name, value: counts[1] / counts[0] });
    figures
}

const FLOOR: &str = BareWalk::NAME;
const PEERS: [&str; 2] = [PageTableMultiarch::NAME, X86_64::NAME];

/// Rounds of wall time stop early when they have taken this long.
const WALL_BUDGET: Duration = Duration::from_secs(90);

/// All contenders, `nestling` first; and how its lock does its fences.
pub fn contenders() -> ([Entry; 4], &'static str) {
    let (nestling, fences) = if Membarrier::register() {
        (Entry::of::<Nestling<Membarrier>>(), "compiler fences for readers, membarrier(2) for writers")
    } else {
        (Entry::of::<Nestling<FullFences>>(), "full fences on both sides, because the kernel refuses membarrier(2)")
    };
    let others = [Entry::of::<BareWalk>(), Entry::of::<PageTableMultiarch>(), Entry::of::<X86_64>()];
    ([nestling, others[0], others[1], others[2]], fences)
}

const THREADS: [(usize, &str); 2] = [(1, "one_thread"), (2, "two_threads")];

/// Measures `rounds` rounds of wall time over `pages` pages (see [`Plan::new`]), prints their tables and gives their
/// figures. The first of `contenders` is the one that the others are held against.
pub fn wall(contenders: &[Entry], pages: u64, rounds: usize) -> Vec<Figure> {
    let cpus = cpus();
    let threads = &THREADS[..THREADS.len().min(cpus.len())];
    if threads.len() < THREADS.len() {
        println!("this process may use one CPU only: there are no figures of two threads");
    }
    // Cases change slower than contenders, so that the contenders' turns lie close together.
    let cases: Vec<_> = threads
        .iter()
        .flat_map(|&(number, name)| Order::ALL.map(|order| (name, order, Plan::new(order, number, pages))))
        .collect();
    let mut samples: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let start = Instant::now();
    for round in 0..rounds {
        if start.elapsed() > WALL_BUDGET {
            println!("stopped after {round} rounds: the machine is slow or busy");
            break;
        }
        for (threads, order, plan) in &cases {
            for contender in contenders {
                let took = (contender.repetition)(plan, &cpus);
                for (operation, took) in Operation::ALL.into_iter().zip(took) {
                    let name = format!("{}.{threads}.{}.{}", operation.name(), order.name(), contender.name);
                    samples.entry(name).or_default().push(took.as_secs_f64() * 1e9 / pages as f64);
                }
            }
        }
    }
    let summaries = samples.into_iter().map(|(name, samples)| (name, Summary::of(&samples))).collect();
    summarise(contenders, threads, &summaries)
}

/// Prints a table for each operation and number of threads, and makes the figures of it.
fn summarise(contenders: &[Entry], threads: &[(usize, &str)], summaries: &BTreeMap<String, Summary>) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut figure = |name: String, value: f64| figures.push(Figure { name, value });
    for operation in Operation::ALL {
        for &(_, threads) in threads {
            println!("\n{} {threads}, wall ns a page: median (minimum)", operation.name());
            for order in Order::ALL {
                let general = format!("{}.{threads}", operation.name());
                let case = format!("{general}.{}", order.name());
                let of = |contender: &str| summaries[&format!("{case}.{contender}")];
                let own = of(contenders[0].name);
                for contender in contenders {
                    let Summary { median, min } = of(contender.name);
                    let relative = format!("{:.2} ({:.2})", median / own.median, min / own.min);
                    let columns = format!("{:<22} {median:>8.2} ({min:.2})", contender.name);
                    println!("  {:<8} {columns:<44} {relative} x nestling", order.name());
                    figure(format!("{case}.{}.ns_per_page", contender.name), median);
                    figure(format!("{case}.{}.min_ns_per_page", contender.name), min);
                }
                // A name without an order means the sequential one.
                let names = if order == Order::Sequential { vec![&general, &case] } else { vec![&case] };
                for name in names {
                    figure(format!("{name}.ratio_to_{FLOOR}"), own.median / of(FLOOR).median);
                    figure(format!("{name}.min_ratio_to_{FLOOR}"), own.min / of(FLOOR).min);
                    for peer in PEERS {
                        figure(format!("{name}.speedup_over_{peer}"), of(peer).median / own.median);
                    }
                }
            }
        }
    }
    figures
}

/// Counts instructions, prints their table and gives their figures; none when they can not be counted.
pub fn counts(contenders: &[Entry]) -> Vec<Figure> {
    println!("\ninstructions a page, one thread, sequential ({} MiB)", instructions::PAGES >> 8);
    let mut figures = Vec::new();
    for operation in Operation::ALL {
        let mut by_name = BTreeMap::new();
        for contender in contenders {
            match count(contender.name, operation) {
                Ok(count) => by_name.insert(contender.name, count),
                Err(error) => {
                    println!("  not counted: {error}");
                    return figures;
                }
            };
        }
        let case = format!("{}.one_thread", operation.name());
        let (own, floor) = (by_name[contenders[0].name], by_name[FLOOR]);
        for contender in contenders {
            let count = by_name[contender.name];
            println!("  {:<8} {:<22} {count:>8.1}   {:.2} x floor", operation.name(), contender.name, count / floor);
            figures.push(Figure { name: format!("{case}.{}.instructions_per_page", contender.name), value: count });
        }
        figures.push(Figure { name: format!("{case}.instructions_ratio_to_floor"), value: own / floor });
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_the_figures_that_scripts_look_for() {
        let (contenders, _) = contenders();
        let figures = wall(&contenders, 1024, 1);
        let lines: Vec<String> = figures.iter().map(Figure::to_string).collect();
        let parsed: Vec<Figure> = lines.iter().map(|line| Figure::parse(line).expect(line)).collect();
        let has = |name: &str| parsed.iter().filter(|figure| figure.name == name && figure.value > 0.0).count() == 1;
        assert!(has("fault.one_thread.random.floor.ns_per_page"), "{lines:?}");
        if cpus().len() > 1 {
            for what in ["ratio_to_floor", "speedup_over_page_table_multiarch", "speedup_over_x86_64"] {
                assert!(has(&format!("fault.two_threads.{what}")), "{what} {lines:?}");
                assert!(has(&format!("zap.two_threads.random.{what}")), "{what} {lines:?}");
            }
        }
    }
}
