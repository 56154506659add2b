//! This hypervisor's side.

use std::{thread, time::Duration};

use clap::Parser;
use nestling_control::message::Report;
use rustix::fs::{CWD, Mode, mkfifoat};

use super::{
    Figures, Pages, Paging, figures, is_of_large,
    profile::{self, Counts, Places},
    seams::Shares,
    stub,
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

/// What the hypervisor measures itself: the guest is gone.
pub(super) const VM_DESTROY: &str = "vm_destroy";
/// How often a Linux guest forks.
const FORKS: u32 = 200;
/// Of a Linux guest; it takes less than a minute.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs the measuring guest here, on small pages and, where they are mapped as such, on large ones.
pub(super) fn measure(args: &BenchArgs, paging: Paging, progress: Progress) -> Result<Figures, Error> {
    let mut figures = run_meter(prepare(args, paging, Pages::Small, "", progress)?)?;
    if paging == Paging::Npt {
        let large = run_meter(prepare(args, paging, Pages::Large, "", progress)?)?;
        figures.extend(large.into_iter().filter(is_of_large));
    }
    Ok(figures)
}

fn run_meter(prepared: Prepared) -> Result<Figures, Error> {
    let (mut figures, report) = run(prepared)?;
    figures.insert(VM_DESTROY.into(), (1, report.teardown.ticks));
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
    let Places { mark, filter } = profile::places(&hypervisor, operation)?;
    let debugger = work.path().join("stub");
    let follower = stub::follow(&debugger, mark).map_err(Error::io("make a socket"))?;
    let prepared = prepared.traced(Trace { log: log.clone(), filter, stub: debugger });
    let step = progress.step(&format!("following the instructions of {operation}"));
    let reader = thread::spawn(move || Counts::read(&log, mark));
    let figures = run_meter(prepared)?;
    let followed = follower.join().map_err(|_| Error::Qemu("it could not be followed".into()))?;
    followed.map_err(Error::io("follow QEMU's instructions"))?;
    step.done();
    let trace = reader.join().map_err(|_| Error::Qemu("its log could not be read".into()))?;
    let trace = trace.map_err(Error::io("read QEMU's log"))?;
    let &(count, ticks) =
        figures.get(operation).ok_or_else(|| Error::NoSuchOperation { known: figures.keys().cloned().collect() })?;
    let each = |total: u64| total as f64 / count as f64;
    let functions = trace.by_function(&hypervisor)?;
    Ok((functions.into_iter().map(|(name, total)| (name, each(total))).collect(), each(ticks)))
}

/// A Linux guest that boots, forks [`FORKS`] times and switches itself off. Nothing in its memory is where chance puts it, and
/// it is told that there is no I/O APIC: otherwise its kernel closes the line from the 8259s when it starts the local APIC.
pub(super) fn linux(paging: Paging) -> Result<Plan, Error> {
    let words = format!("noapic nokaslr norandmaps nestling.mode=forks nestling.forks={FORKS}");
    let mut run = Cli::parse_from([
        "nestling",
        "--vcpus",
        "1",
        "--memory",
        "256M",
        "--huge-pages",
        "2M",
        "--mmu",
        paging.name(),
        "--mode",
        "shell",
        "--append",
        &words,
    ])
    .run;
    run.accel = crate::args::Accel::Counted;
    run.timeout = Some(LIMIT);
    let mut plan = Plan::new(&run, Seat::Pipe)?;
    // For the meter's sake alone.
    plan.guest.config.meter_pages = 1;
    Ok(plan)
}

/// Runs it.
pub(super) fn run_linux(paging: Paging, progress: Progress) -> Result<Figures, Error> {
    let step = progress.step(&format!("running Linux with {}", paging.words()));
    let (mut figures, report) = run(Prepared::new(linux(paging)?, None, progress)?)?;
    figures.insert("linux".into(), (1, report.run_guest.ticks.saturating_sub(report.idle.ticks)));
    step.done();
    Ok(figures)
}

/// Runs it on a hypervisor that counts at its seams, and says where its instructions go.
pub(super) fn profile_linux(paging: Paging, progress: Progress) -> Result<Shares, Error> {
    let mut plan = linux(paging)?;
    plan.guest.hypervisor = Some(artifacts::counting_hypervisor(progress)?);
    let step = progress.step(&format!("running Linux with {}", paging.words()));
    let (_, report) = run(Prepared::new(plan, None, progress)?)?;
    step.done();
    let seams = report.seams.ok_or_else(|| Error::Measuring { said: "the hypervisor did not count".into() })?;
    Ok(Shares::new(&seams, report.run_guest.ticks.saturating_sub(report.idle.ticks)))
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

fn run(prepared: Prepared) -> Result<(Figures, Report), Error> {
    let console = Kept::default();
    let output = console.clone();
    let outcome = prepared.run(|_| Ok(Box::new(output)))?;
    let figures = figures(&console.bytes())?;
    let said = || String::from_utf8_lossy(&console.bytes()).into_owned();
    let report = outcome.record.report.ok_or_else(|| Error::Measuring { said: said() })?;
    Ok((figures, report))
}
