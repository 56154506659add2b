//! `nestling run`: from the options to the outcome.

use std::{
    fs::File,
    io::{BufReader, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use nestling_control::{death, message::GuestExit};

use crate::{
    args::{Mode, RunArgs},
    copy::{
        door::{self, Door, House},
        sink::{Sink, SinkError},
        source::Source,
        stream::{Header, Reader},
        window::Window,
    },
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
    name: Option<String>,
    /// The guest, if it does not boot, and where it comes from.
    copy: Option<(Reader<BufReader<File>>, PathBuf)>,
}

/// Checks the options, then installs, fetches and builds what is needed and not there.
///
/// # Errors
/// The first thing that cannot be done, with its reason.
pub fn prepare(args: &RunArgs, seat: Seat, progress: Progress) -> Result<Prepared, Error> {
    args.name.as_deref().map_or(Ok(()), door::refuse_taken)?;
    let (plan, copy) = match &args.restore {
        Some(path) => {
            let (reader, header) = door::open_copy(path)?;
            (Plan::resumed(args, &header)?, Some((reader, path.clone())))
        }
        None => (Plan::new(args, seat)?, None),
    };
    if let Some(path) = &args.report {
        // Better now than after the run; a report of an earlier run must not be taken for this one's.
        File::create(path).map_err(|cause| Error::File { option: "--report", path: path.clone(), cause })?;
    }
    let prepared = Prepared::new(plan, args.report.clone(), progress)?;
    Ok(Prepared { name: args.name.clone(), copy, ..prepared })
}

/// Says that a machine runs, until it is dropped.
struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// A guest that comes in beside the session that watches its machine.
struct Incoming {
    sink: Sink,
    reader: Reader<BufReader<File>>,
}

/// Why it did not.
type Failure = Arc<Mutex<Option<SinkError>>>;

impl Incoming {
    /// Before the machine starts.
    fn new(window: &Arc<Window>, alive: &Alive, reader: Reader<BufReader<File>>) -> Self {
        Self { sink: Sink::new(Arc::clone(window), Arc::clone(&alive.0)), reader }
    }

    /// When it has started.
    fn start(mut self) -> Failure {
        let failure = Failure::default();
        let result = Arc::clone(&failure);
        thread::spawn(move || {
            if let Err(cause) = self.sink.fill(&mut self.reader).and_then(|()| self.sink.run()) {
                *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
            }
        });
        failure
    }
}

impl Prepared {
    /// Installs, fetches and builds what a checked run needs.
    ///
    /// # Errors
    /// The first thing that cannot be done, with its reason.
    pub fn new(plan: Plan, report: Option<PathBuf>, progress: Progress) -> Result<Self, Error> {
        let qemu = setup::qemu(progress)?;
        let loaded = plan.guest.load(progress)?;
        Ok(Self { plan, report, qemu, loaded, progress, trace: None, name: None, copy: None })
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
    pub fn run(mut self, console: impl FnOnce(Remote) -> Result<Box<dyn Write>, Error>) -> Result<Outcome, Error> {
        let memory_bytes = self.plan.guest.machine_memory_bytes(self.loaded.bundle.len() as u64);
        let queue = Queue::default();
        let window = Arc::new(Window::new().map_err(Error::io("make memory to share with the hypervisor"))?);
        let alive = Alive(Arc::new(AtomicBool::new(true)));
        let _door = self.open_door(&window, &alive, queue.remote())?;
        let incoming = self.copy.take().map(|(reader, path)| (Incoming::new(&window, &alive, reader), path));
        let start = Instant::now();
        let machine = Machine::start(
            &qemu::Start {
                qemu: &self.qemu,
                hypervisor: &self.loaded.hypervisor,
                bundle: &self.loaded.bundle,
                // Whoever copies the guest has a CPU of its own, which sleeps until then.
                cpus: self.plan.guest.config.cpus() + 1,
                random: false,
                memory_bytes,
                window: Some(&window),
                acceleration: self.plan.acceleration,
                trace: self.trace.as_ref(),
            },
            |command| {
                if self.plan.verbose {
                    self.progress.note(&qemu::shown(command));
                }
            },
        )?;
        let incoming = incoming.map(|(incoming, path)| (incoming.start(), path));
        let mut output = console(queue.remote())?;
        let record = session::watch(machine, start, &self.plan, queue, &mut *output)?;
        // A terminal is put back before anything is said on it.
        drop(output);
        drop(alive);
        if let Some((failure, path)) = incoming
            && let Some(cause) = failure.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            return Err(Error::Copy { option: "--restore", path, cause: cause.to_string() });
        }

        let outcome = Outcome { mode: self.plan.guest.mode, acceleration: self.plan.acceleration, record };
        self.explain(&outcome);
        if let Some(path) = &self.report {
            JsonReport::new(&self.plan, &outcome).write(path)?;
        }
        Ok(outcome)
    }

    /// Lets other commands of this user find the guest. One that nobody has named may do without.
    fn open_door(&self, window: &Arc<Window>, alive: &Alive, remote: Remote) -> Result<Option<Door>, Error> {
        let source = Source { window: Arc::clone(window), remote, alive: Arc::clone(&alive.0) };
        let number = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let header =
            Header { config: self.plan.guest.config.clone(), check: self.plan.guest.mode == Mode::Check, number };
        let house = House { source, header, busy: Arc::new(Mutex::new(())) };
        let name = self.name.clone().unwrap_or_else(|| format!("guest-{}", std::process::id()));
        match Door::open(&name, house) {
            Err(cause) if self.name.is_none() => {
                self.progress.note(&format!("other commands will not find this guest: {cause}"));
                Ok(None)
            }
            door => door.map(Some),
        }
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
