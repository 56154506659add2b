//! `nestling fuzz`: guests that run random machine code, one after the other.
//!
//! The guests are the test kernel with the words `random seed=N`; the hypervisor makes, ends and forgets them in one session
//! and reports on all together ([`SeriesReport`]). What may end a session early is a defect, of the hypervisor or of the
//! emulator below it: it is shown with the seed of the guest that ran, and the next session goes on behind that seed.
//! So a whole series is good only if there was one session.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nestling_control::{
    bundle::Bundle,
    config::{GuestKind, RunConfig, Series},
    message::{GuestExit, Leak, SeriesReport},
};
use serde::Serialize;

use crate::{
    args::{FuzzArgs, Mode, System},
    artifacts,
    error::{Error, Status},
    guest::plan::{GuestPlan, checked_hypervisor},
    outcome::Outcome,
    plan::{Plan, acceleration},
    progress::Progress,
    qemu::{self, Machine},
    session::{self, Ending, HypervisorFailure, Queue, Record, Remote},
    setup,
};

/// After so many failures there is enough to look at.
const MOST_FAILURES: usize = 20;

/// A session that did not end well.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// The guest that ran: `nestling fuzz --seed N --guests 1` runs it again.
    pub seed: u64,
    /// What happened.
    pub what: String,
}

/// What came of all sessions, as `--report` writes it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// The first guest's seed.
    pub seed: u64,
    /// Seconds on this machine's clock, from the start of the first machine to the end of the last.
    pub wall_s: f64,
    /// Sessions of the hypervisor: 1 if nothing went wrong.
    pub sessions: u64,
    /// Guests run.
    pub guests: u64,
    /// Exits, all together.
    pub exits_total: u64,
    /// Exits by reason.
    pub exits: BTreeMap<String, u64>,
    /// Nested page faults by outcome.
    pub faults: BTreeMap<String, u64>,
    /// Guests by how they ended.
    pub ends: BTreeMap<String, u64>,
    /// The most page-table frames at one time.
    pub table_frames_peak: u64,
    /// Guests behind which something was left: seed and what.
    pub leaks: Vec<String>,
    /// Sessions that did not end well by the hypervisor's fault.
    pub failures: Vec<Failure>,
    /// Sessions in which the emulator itself died of a signal.
    pub emulator_deaths: Vec<Failure>,
    /// A signal that ended it all.
    #[serde(skip)]
    pub signal: Option<i32>,
}

impl Summary {
    fn add(&mut self, report: &SeriesReport) {
        let sum = |into: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>| {
            from.iter().for_each(|(name, count)| *into.entry(name.clone()).or_default() += count);
        };
        self.guests += report.guests;
        sum(&mut self.exits, &report.exits);
        sum(&mut self.faults, &report.faults);
        sum(&mut self.ends, &report.ends);
        self.exits_total = self.exits.values().sum();
        self.table_frames_peak = self.table_frames_peak.max(report.table_frames_peak);
        self.leaks.extend(report.leaks.iter().map(shown));
    }

    /// The command's exit status.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self.signal {
            Some(number) => 128 + (number as u8 & 0x7f),
            None if self.failures.is_empty() && self.leaks.is_empty() => Status::Good as u8,
            None => Status::HypervisorFailed as u8,
        }
    }

    /// What QEMU died of, each with its seeds.
    fn deaths(&self) -> Vec<String> {
        let mut by_cause: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for Failure { seed, what } in &self.emulator_deaths {
            by_cause.entry(what).or_default().push(seed.to_string());
        }
        let shown = by_cause.iter().map(|(what, seeds)| {
            format!("no failure of the hypervisor, {} times, with seeds {}: {what}", seeds.len(), seeds.join(", "))
        });
        shown.collect()
    }

    fn say(&self, progress: Progress) {
        let list = |counts: &BTreeMap<String, u64>| {
            let all: Vec<_> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
            if all.is_empty() { "none".to_owned() } else { all.join(", ") }
        };
        progress.note(&format!(
            "{} guests from seed {} on in {:.1} s and {} session(s): {} exits, at most {} table frames",
            self.guests, self.seed, self.wall_s, self.sessions, self.exits_total, self.table_frames_peak
        ));
        progress.note(&format!("ends: {}", list(&self.ends)));
        progress.note(&format!("exits: {}", list(&self.exits)));
        progress.note(&format!("faults: {}", list(&self.faults)));
        self.leaks.iter().for_each(|leak| progress.note(&format!("LEAK: {leak}")));
        for Failure { seed, what } in &self.failures {
            progress.note(&format!("FAILED with seed {seed}: {what}"));
        }
        self.deaths().iter().for_each(|death| progress.note(death));
        let (leaks, failures) = (self.leaks.len(), self.failures.len());
        progress
            .note(&format!("{leaks} leaks, {failures} failures: {}", if self.status() == 0 { "good" } else { "BAD" }));
    }
}

/// What QEMU said before the session ended: the first line says what, the rest is registers.
fn last_words(record: &Record) -> Option<&str> {
    record.qemu_output.lines().find(|line| line.len() > 3)
}

/// Whether the machine's process was killed by what it did itself.
fn died_of_signal(ending: &Ending) -> bool {
    matches!(ending, Ending::Hypervisor(HypervisorFailure::Died { status: Some(status) }) if status.signal().is_some())
}

fn shown(leak: &Leak) -> String {
    let Leak { seed, table_frames, guest_frames, kept_pages, frames, heap_bytes } = leak;
    format!(
        "seed {seed}: {table_frames} table frames, {guest_frames} guest frames, {kept_pages} kept pages, {frames} frames \
         of the allocator, {heap_bytes} bytes of the heap"
    )
}

/// A series that may be run.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    image: Vec<u8>,
    qemu: PathBuf,
    hypervisor: PathBuf,
    seed: u64,
    duration: Duration,
    guests: u64,
    slice_ms: u64,
    report: Option<PathBuf>,
    progress: Progress,
}

/// Checks the options, then builds and installs what is needed.
///
/// # Errors
/// The first thing that cannot be done.
pub fn prepare(args: &FuzzArgs, progress: Progress) -> Result<Prepared, Error> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let config = RunConfig {
        kind: GuestKind::Multiboot,
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        huge_pages: args.huge_pages.into(),
        mmu: args.mmu.into(),
        silence_timeout_ms: None,
        command_line: "testkernel random".to_owned(),
        ready_marker: String::new(),
        origin: nestling_control::config::Origin::Boot,
        storm: None,
        meter_pages: 0,
        series: None,
    };
    config.validate()?;
    let hypervisor = args.hypervisor.as_deref().map(checked_hypervisor).transpose()?;
    let (mode, system) = (Mode::Shell, System::Amd64);
    let guest = GuestPlan { config, mode, system, kernel: None, initrd: None, hypervisor, ghost: false };
    let plan = Plan { guest, acceleration: acceleration(args.accel)?, timeout: None, verbose: args.verbose };
    plan.check_host_memory()?;
    if let Some(path) = &args.report {
        fs::File::create(path).map_err(|cause| Error::File { option: "--report", path: path.clone(), cause })?;
    }
    let qemu = setup::qemu(progress)?;
    let hypervisor = match &plan.guest.hypervisor {
        Some(path) => path.clone(),
        None => artifacts::hypervisor(progress)?,
    };
    let kernel = artifacts::test_kernel(progress)?;
    let image = fs::read(&kernel).map_err(Error::io(format!("read {}", kernel.display())))?;
    Ok(Prepared {
        plan,
        image,
        qemu,
        hypervisor,
        seed: args.seed.unwrap_or_else(now),
        duration: args.seconds,
        guests: args.guests.unwrap_or(u64::MAX),
        slice_ms: args.slice,
        report: args.report.clone(),
        progress,
    })
}

impl Prepared {
    /// Runs the series, says how it went, and writes the report.
    ///
    /// `watch` is told of each session's [`Remote`].
    ///
    /// # Errors
    /// If a machine cannot be started or the report not be written.
    pub fn run(mut self, mut watch: impl FnMut(Remote)) -> Result<Summary, Error> {
        let start = Instant::now();
        let mut summary = Summary { seed: self.seed, ..Summary::default() };
        let end = self.seed.saturating_add(self.guests);
        let mut next = self.seed;
        self.progress.note(&format!("random guests from seed {next}"));
        while next < end && start.elapsed() < self.duration && summary.failures.len() < MOST_FAILURES {
            let left = self.duration.saturating_sub(start.elapsed());
            let series = Series {
                seed: next,
                duration_ms: left.as_millis() as u64,
                guests: end - next,
                slice_ms: self.slice_ms,
            };
            self.plan.guest.config.series = Some(series);
            let outcome = self.session(&mut watch)?;
            summary.sessions += 1;
            let record = &outcome.record;
            if let Some(report) = &record.series {
                summary.add(report);
            }
            let last = record.seed.unwrap_or(next);
            match &record.ending {
                Ending::Guest(GuestExit::PowerOff) if record.series.is_some() => break,
                Ending::Guest(GuestExit::Stopped) | Ending::Left => break,
                Ending::Signal(number) => {
                    summary.signal = Some(*number);
                    break;
                }
                _ => {
                    let said = last_words(record).map(str::to_owned);
                    let what: Vec<_> = [outcome.sentence()].into_iter().chain(said).collect();
                    let failure = Failure { seed: last, what: what.join("; it said: ") };
                    if died_of_signal(&record.ending) {
                        self.progress
                            .note(&format!("with seed {last}, no failure of the hypervisor: {}", failure.what));
                        summary.emulator_deaths.push(failure);
                    } else {
                        self.progress.note(&format!("FAILED with seed {last}: {}", failure.what));
                        summary.failures.push(failure);
                    }
                }
            }
            next = last.saturating_add(1);
        }
        summary.wall_s = start.elapsed().as_secs_f64();
        summary.say(self.progress);
        if let Some(path) = &self.report {
            let doing = || format!("write the report to {}", path.display());
            let mut text = serde_json::to_vec_pretty(&summary).map_err(|cause| Error::io(doing())(cause.into()))?;
            text.push(b'\n');
            fs::write(path, text).map_err(Error::io(doing()))?;
        }
        Ok(summary)
    }

    fn session(&self, watch: &mut impl FnMut(Remote)) -> Result<Outcome, Error> {
        let bundle = Bundle { config: self.plan.guest.config.clone(), kernel: &self.image, initrd: None }.to_bytes()?;
        let queue = Queue::default();
        let start = Instant::now();
        let machine = Machine::start(
            &qemu::Start {
                qemu: &self.qemu,
                hypervisor: &self.hypervisor,
                bundle: &bundle,
                cpus: self.plan.guest.config.cpus(),
                window: None,
                random: true,
                memory_bytes: self.plan.guest.machine_memory_bytes(bundle.len() as u64),
                acceleration: self.plan.acceleration,
                trace: None,
            },
            |command| {
                if self.plan.verbose {
                    self.progress.note(&qemu::shown(command));
                }
            },
        )?;
        watch(queue.remote());
        let record = session::watch(machine, start, &self.plan, queue, &mut io::sink())?;
        Ok(Outcome { mode: self.plan.guest.mode, acceleration: self.plan.acceleration, record })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaks_and_failures_are_no_pass() {
        let report = SeriesReport { guests: 3, exits: [("hlt".to_owned(), 4)].into(), ..SeriesReport::default() };
        let mut summary = Summary::default();
        summary.add(&report);
        summary.add(&report);
        assert_eq!((summary.guests, summary.exits_total, summary.status()), (6, 8, 0));
        let leaky = SeriesReport { leaks: vec![Leak { seed: 9, frames: 1, ..Leak::default() }], ..report };
        summary.add(&leaky);
        assert_eq!(summary.status(), 72);
        assert!(summary.leaks[0].starts_with("seed 9: "), "{:?}", summary.leaks);
        let failure = Failure { seed: 1, what: String::new() };
        assert_eq!(Summary { failures: vec![failure], ..Summary::default() }.status(), 72);
        assert_eq!(Summary { signal: Some(15), ..Summary::default() }.status(), 143);
    }

    #[test]
    fn deaths_of_the_emulator_are_told_by_cause_and_are_no_failures() {
        let death = |seed, what: &str| Failure { seed, what: what.to_owned() };
        let deaths = vec![death(5, "abort"), death(7, "fault"), death(9, "abort")];
        let summary = Summary { emulator_deaths: deaths, ..Summary::default() };
        assert_eq!(summary.status(), 0);
        let told = summary.deaths();
        assert_eq!(told.len(), 2);
        assert!(told[0].contains("2 times, with seeds 5, 9: abort"), "{told:?}");
    }
}
