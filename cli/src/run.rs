//! `nestling run`: from the options to the outcome.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use nestling_control::{death, message::GuestExit};

use crate::{
    args::RunArgs,
    error::Error,
    guest::{load::Loaded, plan::Seat},
    outcome::Outcome,
    plan::Plan,
    progress::Progress,
    qemu::{self, Machine, Trace},
    report::JsonReport,
    session::{self, Ending, Queue, Remote},
    setup,
};

/// Console lines that are shown after an end that needs explaining.
const EXPLAINING_LINES: usize = 25;

/// Everything a machine needs, on this disk and in memory.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    report: Option<PathBuf>,
    qemu: PathBuf,
    loaded: Loaded,
    progress: Progress,
    trace: Option<Trace>,
}

/// Checks the options, then installs, fetches and builds what is needed and not there.
///
/// # Errors
/// The first thing that cannot be done, with its reason.
pub fn prepare(args: &RunArgs, seat: Seat, progress: Progress) -> Result<Prepared, Error> {
    let plan = Plan::new(args, seat)?;
    if let Some(path) = &args.report {
        // Better now than after the run; a report of an earlier run must not be taken for this one's.
        File::create(path).map_err(|cause| Error::File { option: "--report", path: path.clone(), cause })?;
    }
    Prepared::new(plan, args.report.clone(), progress)
}

impl Prepared {
    /// Installs, fetches and builds what a checked run needs.
    ///
    /// # Errors
    /// The first thing that cannot be done, with its reason.
    pub fn new(plan: Plan, report: Option<PathBuf>, progress: Progress) -> Result<Self, Error> {
        let qemu = setup::qemu(progress)?;
        let loaded = plan.guest.load(progress)?;
        Ok(Self { plan, report, qemu, loaded, progress, trace: None })
    }

    /// Has QEMU tell of the instructions that it executes. Slow.
    #[must_use]
    pub fn traced(self, trace: Trace) -> Self {
        Self { trace: Some(trace), ..self }
    }

    /// The hypervisor's file.
    #[must_use]
    pub fn hypervisor(&self) -> &Path {
        &self.loaded.hypervisor
    }

    /// Starts the machine and watches it to its end, writes the report, and says on standard error how it went.
    ///
    /// `console` makes the writer that gets the guest's console; the [`Remote`] it is given types, leaves and signals.
    ///
    /// # Errors
    /// If the machine cannot be started or the console or the report not be written.
    pub fn run(self, console: impl FnOnce(Remote) -> Result<Box<dyn Write>, Error>) -> Result<Outcome, Error> {
        let memory_bytes = self.plan.guest.machine_memory_bytes(self.loaded.bundle.len() as u64);
        let queue = Queue::default();
        let start = Instant::now();
        let machine = Machine::start(
            &qemu::Start {
                qemu: &self.qemu,
                hypervisor: &self.loaded.hypervisor,
                bundle: &self.loaded.bundle,
                cpus: self.plan.guest.config.cpus(),
                random: false,
                memory_bytes,
                acceleration: self.plan.acceleration,
                trace: self.trace.as_ref(),
            },
            |command| {
                if self.plan.verbose {
                    self.progress.note(&qemu::shown(command));
                }
            },
        )?;
        let mut output = console(queue.remote())?;
        let record = session::watch(machine, start, &self.plan, queue, &mut *output)?;
        // A terminal is put back before anything is said on it.
        drop(output);

        let outcome = Outcome { mode: self.plan.guest.mode, acceleration: self.plan.acceleration, record };
        self.explain(&outcome);
        if let Some(path) = &self.report {
            JsonReport::new(&self.plan, &outcome).write(path)?;
        }
        Ok(outcome)
    }

    fn explain(&self, outcome: &Outcome) {
        let record = &outcome.record;
        if let Some(death) = &record.death {
            eprintln!("{}", death::Shown(death));
        }
        let lines = record.console.last_lines(EXPLAINING_LINES);
        let by_itself = matches!(record.ending, Ending::Signal(_) | Ending::Guest(GuestExit::DebugExit { .. }));
        if !outcome.passed() && !by_itself && !lines.is_empty() {
            eprintln!("nestling: the last lines of the console:");
            for line in lines {
                eprintln!("  | {line}");
            }
        }
        if !record.qemu_output.trim().is_empty() {
            eprintln!("nestling: QEMU said: {}", record.qemu_output.trim());
        }
        if let Some(cost) = outcome.cost() {
            self.progress.note(&cost);
        }
        self.progress.note(&outcome.sentence());
    }
}
