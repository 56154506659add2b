//! `nestling run`: from the options to the outcome.

use std::{
    fs::File,
    io::{BufReader, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nestling_control::{death, message::GuestExit};

use crate::{
    args::{Mode, RunArgs},
    artifacts,
    copy::{
        door::{self, Door, House},
        link::Address,
        migrate::{self, Arrival},
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

/// How long whoever brings a guest in may need to notice that its machine has ended.
const SETTLES_WITHIN: Duration = Duration::from_secs(1);

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
    /// The guest, if it does not boot.
    copy: Option<Coming>,
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
            (Plan::resumed(args, &header)?, Some(Coming::File(reader, path.clone())))
        }
        None => match &args.incoming {
            Some(address) => {
                // A guest that is to come does not wait for what can be had before.
                setup::qemu(progress)?;
                let hypervisor = match &args.guest.hypervisor {
                    Some(path) => path.clone(),
                    None if args.guest.ghost => artifacts::watched_hypervisor(progress)?,
                    None => artifacts::hypervisor(progress)?,
                };
                let arrival = wait(address, progress)?;
                match Plan::resumed(args, &arrival.header) {
                    Ok(mut plan) => {
                        plan.guest.hypervisor = Some(hypervisor);
                        (plan, Some(Coming::Guest(Box::new(arrival), address.clone())))
                    }
                    Err(cause) => {
                        arrival.refuse(cause.to_string());
                        return Err(cause);
                    }
                }
            }
            None => (Plan::new(args, seat)?, None),
        },
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

/// Waits for a guest.
fn wait(address: &Address, progress: Progress) -> Result<Arrival, Error> {
    let listener = address.listen().map_err(Error::io(format!("listen at {address}")))?;
    progress.note(&format!("waiting for a guest at {address}"));
    migrate::wait(listener).map_err(Error::io(format!("wait at {address}")))
}

/// A guest that does not boot.
#[derive(Debug)]
enum Coming {
    /// Out of a snapshot.
    File(Reader<BufReader<File>>, PathBuf),
    /// From another machine, by way of this address.
    Guest(Box<Arrival>, Address),
}

/// A guest that comes in beside the session that watches its machine.
struct Incoming {
    sink: Sink,
    coming: Coming,
}

/// Why it did not.
struct Failure {
    option: &'static str,
    path: PathBuf,
    cause: Receiver<SinkError>,
}

impl Failure {
    /// What is to be said of it. When the machine has ended: whoever brings the guest in notices that soon.
    fn into_error(self) -> Option<Error> {
        match self.cause.recv_timeout(SETTLES_WITHIN) {
            // The session knows why.
            Ok(SinkError::Ended) | Err(_) => None,
            Ok(cause) => Some(Error::Copy { option: self.option, path: self.path, cause: cause.to_string() }),
        }
    }
}

impl Incoming {
    /// Before the machine starts.
    fn new(window: &Arc<Window>, alive: &Alive, coming: Coming) -> Self {
        Self { sink: Sink::new(Arc::clone(window), Arc::clone(&alive.0)), coming }
    }

    /// When it has started.
    fn start(self) -> Failure {
        let Self { mut sink, coming } = self;
        // Dropped without a word when it has come in.
        let (tell, cause) = mpsc::channel();
        let (option, path) = match &coming {
            Coming::File(_, path) => ("--restore", path.clone()),
            Coming::Guest(_, address) => ("--incoming", address.to_string().into()),
        };
        thread::spawn(move || {
            let result = match coming {
                Coming::File(mut reader, _) => sink.fill(&mut reader).and_then(|()| sink.run()),
                Coming::Guest(arrival, _) => arrival.take(&mut sink),
            };
            if let Err(cause) = result {
                // Nobody may be listening any more.
                let _ = tell.send(cause);
            }
        });
        Failure { option, path, cause }
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
        let incoming = self.copy.take().map(|coming| Incoming::new(&window, &alive, coming));
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
        let incoming = incoming.map(Incoming::start);
        let mut output = console(queue.remote())?;
        let record = session::watch(machine, start, &self.plan, queue, &mut *output)?;
        // A terminal is put back before anything is said on it.
        drop(output);
        drop(alive);
        if let Some(failure) = incoming
            && let Some(error) = failure.into_error()
        {
            return Err(error);
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
