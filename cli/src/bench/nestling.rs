//! This hypervisor's side.

use std::thread;

use clap::Parser;
use rustix::fs::{CWD, Mode, mkfifoat};

use super::{
    Figures, Pages, Paging, figures, is_of_large,
    profile::{self, Counts, Places},
};
use crate::{
    args::{BenchArgs, Cli},
    artifacts,
    console::Kept,
    error::Error,
    guest::plan::Seat,
    plan::Plan,
    progress::Progress,
    qemu::Trace,
    run::Prepared,
};

/// Runs the measuring guest here, on small pages and, where they are mapped as such, on large ones.
pub(super) fn measure(args: &BenchArgs, paging: Paging, progress: Progress) -> Result<Figures, Error> {
    let mut figures = run(prepare(args, paging, Pages::Small, "", progress)?)?;
    if paging == Paging::Npt {
        let large = run(prepare(args, paging, Pages::Large, "", progress)?)?;
        figures.extend(large.into_iter().filter(is_of_large));
    }
    Ok(figures)
}

/// Runs it and says where the instructions of one operation went: by function, for one page or exit. The emulator's log is
/// read as it is written; it would fill a disk.
pub(super) fn profile(
    args: &BenchArgs,
    operation: &str,
    progress: Progress,
) -> Result<(Vec<(String, f64)>, f64), Error> {
    let work = tempfile::tempdir().map_err(Error::io("make a directory"))?;
    let log = work.path().join("log");
    mkfifoat(CWD, &log, Mode::RUSR | Mode::WUSR).map_err(|cause| Error::io("make a pipe")(cause.into()))?;
    let prepared = prepare(args, args.mmu.into(), Pages::of(operation), operation, progress)?;
    let hypervisor = prepared.hypervisor().to_owned();
    let Places { mark, filter } = profile::places(&hypervisor)?;
    let prepared = prepared.traced(Trace { log: log.clone(), filter });
    let reader = thread::spawn(move || Counts::read(&log, mark));
    let figures = run(prepared)?;
    let trace = reader.join().map_err(|_| Error::Qemu("its log could not be read".into()))?;
    let trace = trace.map_err(Error::io("read QEMU's log"))?;
    let &(count, ticks) =
        figures.get(operation).ok_or_else(|| Error::NoSuchOperation { known: figures.keys().cloned().collect() })?;
    let each = |total: u64| total as f64 / count as f64;
    let functions = trace.by_function(&hypervisor)?;
    Ok((functions.into_iter().map(|(name, total)| (name, each(total))).collect(), each(ticks)))
}

fn prepare(
    args: &BenchArgs,
    paging: Paging,
    pages: Pages,
    marked: &str,
    progress: Progress,
) -> Result<Prepared, Error> {
    let image = artifacts::test_kernel(progress)?;
    let words = format!("meter {} {} {marked}", args.pages, pages.word());
    let largest = if pages == Pages::Large { "2M" } else { "none" };
    let mut run = Cli::parse_from([
        "nestling",
        "--vcpus",
        "1",
        "--memory",
        "64M",
        "--huge-pages",
        largest,
        "--mmu",
        paging.name(),
    ])
    .run;
    run.accel = crate::args::Accel::Counted;
    run.guest.multiboot = Some(image);
    run.guest.append = words;
    let mut plan = Plan::new(&run, Seat::Pipe)?;
    plan.guest.config.meter_pages = args.pages;
    Prepared::new(plan, None, progress)
}

fn run(prepared: Prepared) -> Result<Figures, Error> {
    let console = Kept::default();
    let output = console.clone();
    let outcome = prepared.run(|_| Ok(Box::new(output)))?;
    let mut figures = figures(&console.bytes())?;
    if let Some(report) = &outcome.record.report {
        figures.insert("vm_destroy".into(), (1, report.teardown.ticks));
    }
    Ok(figures)
}
