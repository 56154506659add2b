//! `cargo bench -p nestling-bench`: all contenders, all operations, one run.
//!
//! With the argument `zap_all` only the figures of a zap of everything. Without `--bench` (as `cargo test --benches` runs
//! it) there are few rounds and few pages: enough to see that it runs, too few to believe the figures.

use std::process::ExitCode;

use nestling_bench::clock::Operation;
use nestling_bench::contenders::PAGES;
use nestling_bench::report::{contenders, counts, fault_counts, front_half_counts, wall, zap_all};
use nestling_bench::zap_all::{Company, Size};
use nestling_bench::{dirty, instructions, shadow};

fn main() -> ExitCode {
    let (contenders, fences) = contenders();
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

    if let [first, case] = arguments.as_slice()
        && first == dirty::ARGUMENT
    {
        return if dirty::counted_process(case) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }

    if let [first, name] = arguments.as_slice()
        && first == shadow::ARGUMENT
    {
        return if shadow::counted_process(name) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }

    if let [first, size] = arguments.as_slice()
        && first == instructions::FRONT_HALF
    {
        let Some(size) = Size::ALL.into_iter().find(|known| known.name() == size) else { return ExitCode::FAILURE };
        (zap_all().counted_process)(size);
        return ExitCode::SUCCESS;
    }

    if let [first, name] = arguments.as_slice()
        && first == instructions::FAULTS
    {
        let Some(company) = Company::ALL.into_iter().find(|known| known.name() == name) else {
            return ExitCode::FAILURE;
        };
        (zap_all().counted_faults)(company);
        return ExitCode::SUCCESS;
    }

    let full = arguments.iter().any(|argument| argument == "--bench");
    let (pages, rounds) = if full { (PAGES, 61) } else { (8192, 3) };
    println!("{} MiB in 4 KiB pages, {rounds} rounds; nestling's lock: {fences}", pages >> 8);
    let mut figures = Vec::new();
    if !arguments.iter().any(|argument| argument == "zap_all") {
        figures = wall(&contenders, pages, rounds);
        figures.extend(counts(&contenders));
        if full {
            figures.extend(dirty::counts());
        }
        figures.extend(shadow::figures(rounds.min(15)));
        if full {
            figures.extend(shadow::counts());
        }
    }
    figures.extend((zap_all().figures)(full));
    figures.extend(front_half_counts());
    if full {
        figures.extend(fault_counts());
    }
    println!();
    for figure in &figures {
        println!("{figure}");
    }
    ExitCode::SUCCESS
}
