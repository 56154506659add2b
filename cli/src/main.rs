//! The `nestling` command.

use std::{
    fs,
    io::{self, Write},
    path::{self, Path},
    process::ExitCode,
    sync::{Arc, Mutex},
    thread,
};

use clap::Parser;
use nestling_cli::{
    args::{Cli, Command, FuzzArgs, MigrateArgs, RunArgs, SnapshotArgs},
    bench, conformance,
    copy::{
        door::{Figures, Request},
        knock,
        link::Address,
    },
    doctor,
    error::Error,
    fuzz,
    guest::plan::Seat,
    image,
    progress::{Progress, Step},
    run,
    session::Remote,
    terminal::{self, Terminal},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Doctor) => ExitCode::from(u8::from(!doctor::print(&doctor::examine()))),
        Some(Command::Image(args)) => ended(image::make(&args, Progress::for_stderr())),
        Some(Command::Run(args)) => run_guest(&args),
        Some(Command::Fuzz(args)) => fuzz_guests(&args),
        Some(Command::Bench(args)) => ended(bench::run(&args, Progress::for_stderr())),
        Some(Command::Conformance(args)) => ended(conformance::run(&args, Progress::for_stderr())),
        Some(Command::Snapshot(args)) => snapshot(&args),
        Some(Command::Migrate(args)) => migrate(&args),
        None => run_guest(&cli.run),
    }
}

fn migrate(args: &MigrateArgs) -> ExitCode {
    let progress = Progress::for_stderr();
    let to = match &args.to {
        // The command that runs the guest has a directory of its own.
        Address::Unix(path) => path::absolute(path).map(|path| path.display().to_string()),
        Address::Tcp(address) => Ok(address.clone()),
    };
    let asked = to.map_err(Error::io("find the current directory")).and_then(|to| {
        let request = Request::Migrate { to, downtime_ms: args.downtime, rounds: args.rounds };
        knock::ask(&args.which, &request, progress, "giving the guest away")
    });
    done(asked, args.report.as_deref(), progress)
}

fn snapshot(args: &SnapshotArgs) -> ExitCode {
    let progress = Progress::for_stderr();
    // The command that runs the guest writes the file, and has a directory of its own.
    let asked = path::absolute(&args.file)
        .map_err(Error::io("find the current directory"))
        .and_then(|file| knock::ask(&args.which, &Request::Snapshot { file }, progress, "taking a snapshot"));
    done(asked, args.report.as_deref(), progress)
}

/// The status of a command that has no guest's to give.
fn ended(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nestling: {error}");
            ExitCode::from(error.status() as u8)
        }
    }
}

/// Says what became of a request.
fn done(asked: Result<(String, Figures), Error>, report: Option<&Path>, progress: Progress) -> ExitCode {
    let reported = asked.and_then(|(text, figures)| {
        let Some(path) = report else { return Ok(text) };
        let doing = || format!("write the report to {}", path.display());
        let mut bytes = serde_json::to_vec_pretty(&figures).map_err(|cause| Error::io(doing())(cause.into()))?;
        bytes.push(b'\n');
        fs::write(path, bytes).map_err(Error::io(doing())).map(|()| text)
    });
    match reported {
        Ok(text) => {
            progress.note(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nestling: {error}");
            ExitCode::from(error.status() as u8)
        }
    }
}

fn run_guest(args: &RunArgs) -> ExitCode {
    let seat = terminal::seat();
    let progress = Progress::for_stderr();
    let outcome =
        run::prepare(args, seat, progress).and_then(|prepared| prepared.run(|remote| console(remote, seat, progress)));
    match outcome {
        Ok(outcome) => ExitCode::from(outcome.exit_status()),
        Err(error) => {
            eprintln!("nestling: {error}");
            ExitCode::from(error.status() as u8)
        }
    }
}

fn fuzz_guests(args: &FuzzArgs) -> ExitCode {
    let outcome = fuzz::prepare(args, Progress::for_stderr()).and_then(|prepared| {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(Error::io("listen for signals"))?;
        let machine: Arc<Mutex<Option<Remote>>> = Arc::default();
        let signalled = Arc::clone(&machine);
        thread::spawn(move || {
            for number in signals.forever() {
                if let Ok(Some(remote)) = signalled.lock().as_deref() {
                    remote.signal(number);
                }
            }
        });
        prepared.run(|remote| {
            if let Ok(mut machine) = machine.lock() {
                *machine = Some(remote);
            }
        })
    });
    match outcome {
        Ok(summary) => ExitCode::from(summary.status()),
        Err(error) => {
            eprintln!("nestling: {error}");
            ExitCode::from(error.status() as u8)
        }
    }
}

/// Where the guest's console goes: to the terminal as it is, to a pipe without the carriage returns.
fn console(remote: Remote, seat: Seat, progress: Progress) -> Result<Box<dyn Write>, Error> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(Error::io("listen for signals"))?;
    let signalled = remote.clone();
    thread::spawn(move || signals.forever().for_each(|number| signalled.signal(number)));
    match seat {
        Seat::Terminal(..) => {
            let booting = progress.step("booting the guest; Ctrl-A x leaves it");
            let terminal = Terminal::enter(remote).map_err(Error::io("put the terminal into raw mode"))?;
            Ok(Box::new(FirstWord { booting: Some(booting), console: terminal }))
        }
        Seat::Pipe => {
            progress.note("starting the guest");
            Ok(Box::new(WithoutCarriageReturns(io::stdout())))
        }
    }
}

/// Ends the progress display with the console's first output, so that the two do not write over each other.
struct FirstWord {
    booting: Option<Step>,
    console: Terminal,
}

impl Write for FirstWord {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.booting = None;
        self.console.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.console.flush()
    }
}

struct WithoutCarriageReturns<W>(W);

impl<W: Write> Write for WithoutCarriageReturns<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.split(|&byte| byte == b'\r') {
            self.0.write_all(part)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
