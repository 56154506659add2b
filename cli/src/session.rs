//! Watches a running machine to its end.
//!
//! One loop takes events from a bounded queue: bytes of the guest's console and messages of the control channel, each
//! read by a thread, and keys, leaving and signals from whoever holds a [`Remote`]. A reader that finds the queue full
//! waits, and with it the machine: a slow terminal slows the guest, it does not fill memory. Keys are dropped when the
//! queue is full, as on any serial line.
//!
//! The loop ends in one of these ways, each with a bound of its own:
//! - the hypervisor says `Done`: then QEMU has [`END_GRACE`] to end by itself, from the last of the console's bytes that were
//!   written, which may have waited for a terminal;
//! - a guest of a series does not end within its slice and [`NEXT_GUEST_WITHIN`];
//! - the control channel closes, or nothing comes on it for [`HELLO_WITHIN`]: the hypervisor has failed;
//! - somebody leaves, a signal comes, or the time limit is over: the hypervisor is asked to stop, so that its report
//!   comes, and has [`STOP_GRACE`];
//! - a second signal comes: QEMU is killed.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::ExitStatus,
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread,
    time::{Duration, Instant},
};

use nestling_control::{
    PROTOCOL_VERSION,
    frame::{self, Decoder, FrameError},
    message::{DeathReport, GuestExit, Hello, LogLevel, Report, SeriesReport, ToCommand, ToHypervisor},
    words,
};

use crate::{console::Judge, error::Error, plan::Plan, qemu::Machine};

/// From the end of a guest's slice to the beginning of the series' next guest.
pub const NEXT_GUEST_WITHIN: Duration = Duration::from_secs(90);
/// From QEMU's start to the hypervisor's first message. It takes a fraction of a second; this is for a loaded emulator.
pub const HELLO_WITHIN: Duration = Duration::from_secs(60);
/// From the request to stop to the hypervisor's report.
pub const STOP_GRACE: Duration = Duration::from_secs(3);
/// From the hypervisor's last message, or the console's last bytes behind it, to QEMU's end.
pub const END_GRACE: Duration = Duration::from_secs(5);

const QUEUE: usize = 1024;
/// A damaged channel may produce any number of errors; people need the first few.
const SHOWN_FRAME_ERRORS: u32 = 3;

/// Something that happened.
#[derive(Debug)]
enum Event {
    Console(Vec<u8>),
    ConsoleClosed,
    Control(Result<ToCommand, FrameError>),
    ControlClosed,
    Keys(Vec<u8>),
    Leave,
    Signal(i32),
    Request(ToHypervisor),
}

/// Acts on a session from outside of its loop.
#[derive(Clone, Debug)]
pub struct Remote(SyncSender<Event>);

impl Remote {
    /// Types into the guest's console.
    pub fn send_keys(&self, keys: Vec<u8>) {
        // Full: dropped, as said above. Closed: the session is over.
        let _ = self.0.try_send(Event::Keys(keys));
    }

    /// Ends the session as its user's wish.
    pub fn leave(&self) {
        let _ = self.0.send(Event::Leave);
    }

    /// Sends the hypervisor a request.
    pub fn request(&self, request: ToHypervisor) {
        let _ = self.0.send(Event::Request(request));
    }

    /// Ends the session because of a signal.
    pub fn signal(&self, number: i32) {
        let _ = self.0.send(Event::Signal(number));
    }
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The hypervisor said how its guest ended.
    Guest(GuestExit),
    /// Its user left.
    Left,
    /// The time limit was over.
    TimedOut(Duration),
    /// A signal came.
    Signal(i32),
    /// The hypervisor failed.
    Hypervisor(HypervisorFailure),
}

/// How the hypervisor failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HypervisorFailure {
    /// The machine ended before the hypervisor said how its guest did.
    Died {
        /// QEMU's status, if it ended by itself.
        status: Option<ExitStatus>,
    },
    /// It never said a word.
    Silent,
    /// It said nothing of the next guest of a series.
    Stuck {
        /// For this long.
        after: Duration,
    },
    /// It speaks another protocol.
    Protocol {
        /// Its version.
        version: u32,
    },
}

/// All that a session has learned.
#[derive(Clone, Debug)]
pub struct Record {
    /// How it ended.
    pub ending: Ending,
    /// What the hypervisor said of itself.
    pub hello: Option<Hello>,
    /// What the run cost.
    pub report: Option<Report>,
    /// What came of a series of guests, the last that was said of it.
    pub series: Option<SeriesReport>,
    /// The seed of the series' last guest.
    pub seed: Option<u64>,
    /// How the guest died.
    pub death: Option<DeathReport>,
    /// The console.
    pub console: Judge,
    /// From QEMU's start to the first line of the default guest's init.
    pub boot_wall: Option<Duration>,
    /// From QEMU's start to the end.
    pub wall: Duration,
    /// What QEMU itself said, the end of it.
    pub qemu_output: String,
}

/// The queue's two ends.
#[derive(Debug)]
pub struct Queue {
    sender: SyncSender<Event>,
    receiver: Receiver<Event>,
}

impl Default for Queue {
    fn default() -> Self {
        let (sender, receiver) = mpsc::sync_channel(QUEUE);
        Self { sender, receiver }
    }
}

impl Queue {
    /// A handle for somebody outside.
    #[must_use]
    pub fn remote(&self) -> Remote {
        Remote(self.sender.clone())
    }
}

/// Watches `machine`, started at `start`, and copies its console to `output`.
///
/// # Errors
/// If the machine's streams cannot be shared between threads, or `output` cannot be written.
pub fn watch(
    machine: Machine,
    start: Instant,
    plan: &Plan,
    queue: Queue,
    output: &mut dyn Write,
) -> Result<Record, Error> {
    let share = |stream: &UnixStream| stream.try_clone().map_err(Error::io("share a serial line between threads"));
    spawn_reader(share(&machine.console)?, queue.sender.clone(), Event::ConsoleClosed, |bytes, events| {
        events.send(Event::Console(bytes.to_vec())).is_ok()
    });
    let mut decoder = Decoder::default();
    spawn_reader(share(&machine.control)?, queue.sender.clone(), Event::ControlClosed, move |bytes, events| {
        bytes.iter().all(|&byte| match decoder.push(byte) {
            Some(result) => events.send(Event::Control(result)).is_ok(),
            None => true,
        })
    });
    let keys = spawn_writer(share(&machine.console)?);
    let mut control = share(&machine.control)?;

    let mut session = Session {
        plan,
        keys,
        output,
        start,
        phase: Phase::Greeting,
        hello: None,
        report: None,
        series: None,
        seed: None,
        began: start,
        death: None,
        console: Judge::default(),
        boot_wall: None,
        frame_errors: 0,
        console_open: true,
        control_open: true,
    };
    let ending = session.watch_until_end(&queue.receiver, &mut control)?;
    let Session { hello, report, series, seed, death, console, boot_wall, .. } = session;
    // Whoever ended by itself is given time to leave, anything else is killed at once.
    let grace = match &ending {
        Ending::Guest(_) | Ending::Hypervisor(HypervisorFailure::Died { .. }) => END_GRACE,
        _ => Duration::ZERO,
    };
    let (status, qemu_output) = machine.finish(grace);
    let ending = match ending {
        Ending::Hypervisor(HypervisorFailure::Died { .. }) => Ending::Hypervisor(HypervisorFailure::Died { status }),
        ending => ending,
    };
    let wall = start.elapsed();
    Ok(Record { ending, hello, report, series, seed, death, console, boot_wall, wall, qemu_output })
}

struct Session<'a> {
    plan: &'a Plan,
    keys: SyncSender<Vec<u8>>,
    output: &'a mut dyn Write,
    start: Instant,
    phase: Phase,
    hello: Option<Hello>,
    report: Option<Report>,
    series: Option<SeriesReport>,
    seed: Option<u64>,
    /// When the last guest of a series began.
    began: Instant,
    death: Option<DeathReport>,
    console: Judge,
    boot_wall: Option<Duration>,
    frame_errors: u32,
    console_open: bool,
    control_open: bool,
}

/// There is nobody to be asked to stop.
const SILENT: Ending = Ending::Hypervisor(HypervisorFailure::Silent);

enum Phase {
    /// The hypervisor has not said hello.
    Greeting,
    /// It has.
    Running,
    /// It was asked to stop; whatever comes of that, the session ends so.
    Stopping { ending: Ending, until: Instant },
    /// How it ended is known; the streams have still to run dry.
    Ended { ending: Ending, until: Instant },
}

impl Session<'_> {
    fn watch_until_end(&mut self, events: &Receiver<Event>, control: &mut UnixStream) -> Result<Ending, Error> {
        loop {
            if let Phase::Ended { ending, .. } = &self.phase
                && !self.console_open
                && !self.control_open
            {
                return Ok(ending.clone());
            }
            let event = match self.deadline() {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((at, ending)) => match events.recv_timeout(at.saturating_duration_since(Instant::now())) {
                    Err(RecvTimeoutError::Timeout) if self.may_be_stopped() && ending != SILENT => {
                        self.stop(control, ending);
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => return Ok(ending),
                    event => event,
                },
            };
            match event {
                Ok(Event::Console(bytes)) => self.console(&bytes)?,
                Ok(Event::ConsoleClosed) => self.console_open = false,
                Ok(Event::Control(Ok(message))) => self.message(message),
                Ok(Event::Control(Err(damage))) => self.damaged(&damage),
                Ok(Event::ControlClosed) => {
                    self.control_open = false;
                    self.end(Ending::Hypervisor(HypervisorFailure::Died { status: None }));
                }
                Ok(Event::Keys(keys)) => {
                    // Full: dropped, as on a serial line.
                    let _ = self.keys.try_send(keys);
                }
                Ok(Event::Leave) => self.stop(control, Ending::Left),
                Ok(Event::Request(request)) => self.request(control, &request),
                // The guest is ended in order, with its report; whoever cannot wait for that sends another one.
                Ok(Event::Signal(number)) if self.may_be_stopped() => self.stop(control, Ending::Signal(number)),
                Ok(Event::Signal(number)) => return Ok(Ending::Signal(number)),
                // This side holds a sender itself: the queue cannot close. If it did there would be nothing to wait for.
                Err(_) => return Ok(Ending::Hypervisor(HypervisorFailure::Died { status: None })),
            }
        }
    }

    /// When the loop ends whatever happens, and how it has ended then.
    fn deadline(&self) -> Option<(Instant, Ending)> {
        let limit = self.plan.timeout.map(|timeout| (self.start + timeout, Ending::TimedOut(timeout)));
        let greeting = (self.start + HELLO_WITHIN, SILENT);
        match &self.phase {
            Phase::Greeting => limit.into_iter().chain([greeting]).min_by_key(|(at, _)| *at),
            Phase::Running => {
                let after = self
                    .plan
                    .guest
                    .config
                    .series
                    .map(|series| Duration::from_millis(series.slice_ms) + NEXT_GUEST_WITHIN);
                let stuck =
                    after.map(|after| (self.began + after, Ending::Hypervisor(HypervisorFailure::Stuck { after })));
                limit.into_iter().chain(stuck).min_by_key(|(at, _)| *at)
            }
            Phase::Stopping { ending, until } | Phase::Ended { ending, until } => Some((*until, ending.clone())),
        }
    }

    /// The first ending stands: what follows are its consequences.
    fn end(&mut self, ending: Ending) {
        let ending = match &self.phase {
            Phase::Ended { .. } => return,
            Phase::Stopping { ending, .. } => ending.clone(),
            Phase::Greeting | Phase::Running => ending,
        };
        self.phase = Phase::Ended { ending, until: Instant::now() + END_GRACE };
    }

    fn may_be_stopped(&self) -> bool {
        matches!(self.phase, Phase::Greeting | Phase::Running)
    }

    fn stop(&mut self, control: &mut UnixStream, ending: Ending) {
        if !self.may_be_stopped() {
            return;
        }
        let mut stop = Vec::new();
        let asked = frame::encode(&ToHypervisor::Stop, &mut stop).is_ok() && control.write_all(&stop).is_ok();
        let grace = if asked { STOP_GRACE } else { Duration::ZERO };
        self.phase = Phase::Stopping { ending, until: Instant::now() + grace };
    }

    /// Passes a request on. If that fails the channel is closed, which ends the session.
    fn request(&self, control: &mut UnixStream, request: &ToHypervisor) {
        let mut bytes = Vec::new();
        if frame::encode(request, &mut bytes).is_ok() {
            let _ = control.write_all(&bytes);
        }
    }

    fn console(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.console.read(bytes);
        if self.console.ready() && self.boot_wall.is_none() {
            self.boot_wall = Some(self.start.elapsed());
        }
        let written = self.output.write_all(bytes).and_then(|()| self.output.flush());
        if let Phase::Ended { until, .. } = &mut self.phase {
            *until = Instant::now() + END_GRACE;
        }
        written.map_err(Error::io("write the guest's console"))
    }

    fn message(&mut self, message: ToCommand) {
        if let Some((level, text)) = words::line(&message) {
            self.say(level, &text);
        }
        match message {
            ToCommand::Hello(hello) => {
                if hello.protocol == PROTOCOL_VERSION {
                    if matches!(self.phase, Phase::Greeting) {
                        self.phase = Phase::Running;
                    }
                } else {
                    self.end(Ending::Hypervisor(HypervisorFailure::Protocol { version: hello.protocol }));
                }
                self.hello = Some(hello);
            }
            ToCommand::Log { .. } | ToCommand::GuestStarted { .. } | ToCommand::GuestReady { .. } => {}
            ToCommand::GuestBegins { seed } => (self.seed, self.began) = (Some(seed), Instant::now()),
            ToCommand::Series(report) => self.series = Some(*report),
            ToCommand::Death(death) => self.death = Some(death),
            ToCommand::Report(report) => self.report = Some(*report),
            ToCommand::Done(exit) => self.end(Ending::Guest(exit)),
        }
    }

    fn damaged(&mut self, damage: &FrameError) {
        self.frame_errors += 1;
        if self.frame_errors <= SHOWN_FRAME_ERRORS {
            self.say(LogLevel::Warn, &format!("control channel: {damage}"));
        }
    }

    /// Says something on standard error. The carriage return is for a terminal in raw mode; it harms nowhere else.
    fn say(&self, level: LogLevel, text: &str) {
        if level <= LogLevel::Warn || self.plan.verbose {
            eprint!("hypervisor: {}\r\n", words::printable(text));
        }
    }
}

fn spawn_reader(
    mut stream: UnixStream,
    events: SyncSender<Event>,
    closed: Event,
    mut take: impl FnMut(&[u8], &SyncSender<Event>) -> bool + Send + 'static,
) {
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        // An error is an end as well: QEMU has gone.
        while let Ok(length @ 1..) = stream.read(&mut bytes) {
            if !take(&bytes[..length], &events) {
                return;
            }
        }
        // Nobody listens any more: the session is over.
        let _ = events.send(closed);
    });
}

/// A thread of its own writes keys, so that a guest that reads none cannot hold up the loop.
fn spawn_writer(mut stream: UnixStream) -> SyncSender<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel::<Vec<u8>>(64);
    thread::spawn(move || {
        for keys in receiver {
            if stream.write_all(&keys).is_err() {
                return;
            }
        }
    });
    sender
}

#[cfg(test)]
mod tests {
    use nestling_control::config::{HugePages, MmuKind, RunConfig};

    use super::*;
    use crate::{
        accel::Acceleration,
        args::{Mode, System},
        guest::plan::GuestPlan,
    };

    fn plan(timeout: Option<Duration>) -> Plan {
        let config = RunConfig {
            kind: nestling_control::config::GuestKind::Linux,
            origin: nestling_control::config::Origin::Boot,
            storm: None,
            series: None,
            meter_pages: 0,
            vcpus: 1,
            memory_bytes: 64 << 20,
            huge_pages: HugePages::M2,
            mmu: MmuKind::Nested,
            silence_timeout_ms: None,
            command_line: String::new(),
            ready_marker: String::new(),
        };
        let (mode, system) = (Mode::Check, System::Amd64);
        let guest = GuestPlan { config, mode, system, kernel: None, initrd: None, hypervisor: None, ghost: false };
        Plan { guest, acceleration: Acceleration::Tcg, timeout, verbose: false }
    }

    fn hello(protocol: u32) -> ToCommand {
        ToCommand::Hello(Hello {
            protocol,
            cpus: 2,
            memory_bytes: 1 << 30,
            cpu_name: "test".into(),
            svm_features: vec!["NP".into()],
        })
    }

    fn bytes(messages: &[ToCommand]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for message in messages {
            frame::encode(message, &mut bytes).expect("fits");
        }
        bytes
    }

    /// Runs a session against `hypervisor`, which has the far ends of console and control channel.
    fn session(
        timeout: Option<Duration>,
        hypervisor: impl FnOnce(UnixStream, UnixStream, Remote) + Send + 'static,
    ) -> (Record, String) {
        let (machine, console, control) = Machine::fake();
        let queue = Queue::default();
        let remote = queue.remote();
        let far = thread::spawn(move || hypervisor(console, control, remote));
        let mut output = Vec::new();
        let record = watch(machine, Instant::now(), &plan(timeout), queue, &mut output).expect("the streams work");
        far.join().expect("the hypervisor's side did not fail");
        (record, String::from_utf8(output).expect("text"))
    }

    #[test]
    fn a_good_run_is_recorded_whole() {
        let report = Report { vcpus: 1, kicks: 5, ..Report::default() };
        let sent = report.clone();
        let (record, output) = session(None, move |mut console, mut control, _| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            console.write_all(b"nestling-init: up\r\nnestling-selfcheck: PASS\r\n").expect("sent");
            control
                .write_all(&bytes(&[ToCommand::Report(sent.into()), ToCommand::Done(GuestExit::PowerOff)]))
                .expect("sent");
        });
        assert_eq!(record.ending, Ending::Guest(GuestExit::PowerOff));
        assert_eq!(record.report, Some(report));
        assert_eq!(record.console.verdict(), Some(Ok("PASS")));
        assert!(record.boot_wall.is_some() && record.hello.is_some());
        assert_eq!(output, "nestling-init: up\r\nnestling-selfcheck: PASS\r\n");
    }

    #[test]
    fn a_channel_that_closes_early_is_a_failure_whatever_the_console_says() {
        let (record, _) = session(None, |mut console, mut control, _| {
            console.write_all(b"nestling-selfcheck: PASS\n").expect("sent");
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
        });
        assert!(matches!(record.ending, Ending::Hypervisor(HypervisorFailure::Died { .. })), "{:?}", record.ending);
    }

    #[test]
    fn garbage_on_the_channel_costs_nothing_but_itself() {
        let (record, _) = session(None, |_console, mut control, _| {
            control.write_all(&[0xff; 200_000]).expect("sent");
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            control.write_all(b"\0garbage\0\0").expect("sent");
            control.write_all(&bytes(&[ToCommand::Done(GuestExit::Reset)])).expect("sent");
        });
        assert_eq!(record.ending, Ending::Guest(GuestExit::Reset));
    }

    #[test]
    fn a_report_that_comes_after_the_time_limit_is_kept() {
        let limit = Duration::from_millis(20);
        let (record, _) = session(Some(limit), |_console, mut control, _| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            let mut request = [0];
            control.read_exact(&mut request).expect("a request to stop comes");
            let end = [ToCommand::Report(Box::default()), ToCommand::Done(GuestExit::Stopped)];
            control.write_all(&bytes(&end)).expect("sent");
        });
        assert_eq!((record.ending, record.report), (Ending::TimedOut(limit), Some(Report::default())));
    }

    /// As for a terminal that was stopped: what waits for it is the end of the console, and may hold the verdict.
    #[test]
    fn a_console_that_goes_on_behind_the_end_is_read_to_its_own() {
        let pieces = 4;
        let (record, output) = session(None, move |mut console, mut control, _| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION), ToCommand::Done(GuestExit::PowerOff)])).expect("sent");
            for _ in 0..pieces {
                thread::sleep(END_GRACE / 3);
                console.write_all(b"more\n").expect("sent");
            }
        });
        assert_eq!(record.ending, Ending::Guest(GuestExit::PowerOff));
        assert_eq!(output, "more\n".repeat(pieces));
    }

    #[test]
    fn another_protocol_is_named() {
        let (record, _) = session(None, |_console, mut control, _| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION + 1)])).expect("sent");
        });
        let version = PROTOCOL_VERSION + 1;
        assert_eq!(record.ending, Ending::Hypervisor(HypervisorFailure::Protocol { version }));
    }

    #[test]
    fn the_time_limit_ends_a_machine_that_never_would() {
        let limit = Duration::from_millis(20);
        let (record, _) = session(Some(limit), |mut console, mut control, _| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            // Until the other side is gone.
            while console.write_all(b"still here\n").is_ok() {}
        });
        assert_eq!(record.ending, Ending::TimedOut(limit));
    }

    #[test]
    fn who_leaves_asks_the_hypervisor_to_stop_and_still_gets_its_report() {
        asks_for_its_report(Remote::leave, Ending::Left);
    }

    #[test]
    fn a_signal_asks_the_hypervisor_to_stop_and_still_gets_its_report() {
        asks_for_its_report(|remote| remote.signal(15), Ending::Signal(15));
    }

    #[test]
    fn a_second_signal_waits_for_nothing() {
        let (record, _) = session(None, |console, mut control, remote| {
            remote.signal(2);
            remote.signal(15);
            // Nothing more is said, and nothing closed, before the other side is gone.
            while control.read(&mut [0; 64]).is_ok_and(|length| length > 0) {}
            drop(console);
        });
        assert_eq!(record.ending, Ending::Signal(15));
    }

    fn asks_for_its_report(end: impl FnOnce(&Remote) + Send + 'static, expected: Ending) {
        let (record, _) = session(None, move |_console, mut control, remote| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            end(&remote);
            let mut decoder = Decoder::default();
            let mut byte = [0];
            let asked = loop {
                control.read_exact(&mut byte).expect("a request comes");
                if let Some(message) = decoder.push(byte[0]) {
                    break message;
                }
            };
            assert_eq!(asked, Ok(ToHypervisor::Stop));
            let end = [ToCommand::Report(Box::default()), ToCommand::Done(GuestExit::Stopped)];
            control.write_all(&bytes(&end)).expect("sent");
        });
        assert_eq!(record.ending, expected);
        assert!(record.report.is_some());
    }

    #[test]
    fn keys_reach_the_console() {
        let (record, _) = session(None, |mut console, mut control, remote| {
            control.write_all(&bytes(&[hello(PROTOCOL_VERSION)])).expect("sent");
            remote.send_keys(b"ls\r".to_vec());
            let mut keys = [0; 3];
            console.read_exact(&mut keys).expect("keys come");
            assert_eq!(&keys, b"ls\r");
            control.write_all(&bytes(&[ToCommand::Done(GuestExit::PowerOff)])).expect("sent");
        });
        assert_eq!(record.ending, Ending::Guest(GuestExit::PowerOff));
    }

    #[test]
    fn a_signal_ends_it() {
        let (record, _) = session(None, |console, control, remote| {
            remote.signal(15);
            drop((console, control));
        });
        assert_eq!(record.ending, Ending::Signal(15));
    }
}
