//! `cargo bench -p nestling-bench`: all contenders, all operations, one run.
//!
//! Wall time is measured in rounds, in which each contender has its turn, so that what else the machine does hits all
//! of them alike. Without `--bench` (as `cargo test --benches` runs it) there are few rounds and few pages: enough to
//! see that it runs, too few to believe the figures.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nestling_bench::clock::{Operation, cpus, repetition};
use nestling_bench::contenders::{
    BareWalk, Contender, FullFences, Membarrier, Nestling, PAGES, PageTableMultiarch, X86_64,
};
use nestling_bench::figures::{Figure, Summary};
use nestling_bench::instructions::{self, count, counted_process};
use nestling_bench::plan::{Order, Plan};

/// A contender's entry points, with its type erased.
#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    repetition: fn(&Plan, &[usize]) -> [Duration; 3],
    counted_process: fn(Operation),
}

impl Entry {
    const fn of<C: Contender>() -> Self {
        Self { name: C::NAME, repetition: repetition::<C>, counted_process: counted_process::<C> }
    }
}

const FLOOR: &str = BareWalk::NAME;
const PEERS: [&str; 2] = [PageTableMultiarch::NAME, X86_64::NAME];

/// Rounds of wall time stop early when they have taken this long.
const WALL_BUDGET: Duration = Duration::from_secs(90);

fn main() -> ExitCode {
    let asymmetric = Membarrier::register();
    let nestling = if asymmetric { Entry::of::<Nestling<Membarrier>>() } else { Entry::of::<Nestling<FullFences>>() };
    let contenders = [nestling, Entry::of::<BareWalk>(), Entry::of::<PageTableMultiarch>(), Entry::of::<X86_64>()];

    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, contender, operation] = arguments.as_slice()
        && first == instructions::ARGUMENT
    {
        let entry = contenders.iter().find(|entry| entry.name == contender);
        let operation = Operation::ALL.into_iter().find(|known| known.name() == operation);
        let (Some(entry), Some(operation)) = (entry, operation) else { return ExitCode::FAILURE };
        (entry.counted_process)(operation);
        return ExitCode::SUCCESS;
    }

    let full = arguments.iter().any(|argument| argument == "--bench");
    let (pages, rounds) = if full { (PAGES, 61) } else { (8192, 3) };
    let fences = if asymmetric {
        "nestling's lock: compiler fences for readers, membarrier(2) for writers"
    } else {
        "nestling's lock: full fences on both sides, because the kernel refuses membarrier(2)"
    };
    println!("{} MiB in 4 KiB pages, {rounds} rounds; {fences}", pages >> 8);
    let mut figures = wall(&contenders, pages, rounds);
    figures.extend(counts(&contenders));
    println!();
    for figure in &figures {
        println!("{figure}");
    }
    ExitCode::SUCCESS
}

const THREADS: [(usize, &str); 2] = [(1, "one_thread"), (2, "two_threads")];

/// Measures wall time and prints its tables.
fn wall(contenders: &[Entry], pages: u64, rounds: usize) -> Vec<Figure> {
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

/// Counts instructions and prints their table; no figures when they can not be counted.
fn counts(contenders: &[Entry]) -> Vec<Figure> {
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
