//! The two sides: the image on the emulated CPU alone, and as a guest.

use std::{fs, io::Read, ops::Range, path::PathBuf, process::Stdio, thread, time::Duration};

use clap::Parser;
use nestling_conformance::{Cpu, Digest, Line, Outcome, Paging};
use nestling_control::{config::StormKind, message::GuestExit};
use tempfile::TempDir;

use super::{ByNumber, Tried, image};
use crate::{
    accel::Acceleration,
    args::{Cli, ConformanceArgs},
    artifacts,
    console::Kept,
    error::Error,
    guest::plan::Seat,
    plan::Plan,
    progress::Progress,
    qemu,
    run::Prepared,
    session::Ending,
    setup,
};

/// Megabytes; the cases use the first 64.
const MEMORY_MIB: u64 = 64;
/// QEMU's status when the image has tried all: what it wrote to isa-debug-exit, shifted, and 1.
const GOOD: i32 = 1;

/// What a side is asked for.
#[derive(Clone, Debug)]
pub(super) struct Words {
    /// `None`: all cases, not a sample.
    pub(super) seed: Option<u64>,
    pub(super) pagings: Vec<Paging>,
    pub(super) cases: Range<u64>,
    pub(super) cpu: Cpu,
    /// Cases to be told of.
    pub(super) trace: Option<(Paging, Range<u64>)>,
}

impl Words {
    fn text(&self) -> String {
        let Range { start, end } = self.cases;
        let names: Vec<_> = self.pagings.iter().map(|paging| paging.name()).collect();
        let kind = self.seed.map_or("all".to_owned(), |seed| format!("sample seed={seed}"));
        let mut text =
            format!("conformance {kind} from={start} to={end} paging={} cpu={}", names.join(","), self.cpu.number());
        if let Some((paging, cases)) = &self.trace {
            text += &format!(" trace={}:{}..{}", paging.name(), cases.start, cases.end);
        }
        text
    }
}

/// What a side has told.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    pub(super) cpu: Option<Cpu>,
    pub(super) blocks: ByNumber<Digest>,
    pub(super) cases: ByNumber<Outcome>,
}

impl Report {
    fn read(console: &[u8]) -> Result<Self, Error> {
        let text = String::from_utf8_lossy(console);
        let (mut report, mut ended) = (Self::default(), false);
        for line in text.lines().filter_map(Line::parse) {
            match line {
                Line::Cpu(number) => report.cpu = Cpu::of_number(number),
                Line::Absent(_) => {}
                Line::Block(paging, number, digest) => {
                    report.blocks.insert((paging as u8, number), digest);
                }
                Line::Case(paging, number, outcome) => {
                    report.cases.insert((paging as u8, number), outcome);
                }
                Line::End => ended = true,
            }
        }
        if ended { Ok(report) } else { Err(unfinished("the image stopped without having tried all", console)) }
    }
}

/// The lines that say how far a side got.
const LAST_LINES: usize = 4;

fn unfinished(why: &str, console: &[u8]) -> Error {
    let text = String::from_utf8_lossy(console);
    let lines: Vec<_> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n  ");
    Error::Conformance(format!("{why}; the last that it said:\n  {last}"))
}

/// All that both sides need.
pub(super) struct Sides {
    qemu: PathBuf,
    image: PathBuf,
    /// The image for QEMU's own loader, and the directory that it is in.
    narrow: PathBuf,
    _directory: TempDir,
    hypervisor: PathBuf,
    options: [String; 4],
    storm: Vec<(StormKind, u32)>,
    limit: Duration,
    verbose: bool,
    progress: Progress,
}

impl Sides {
    /// Builds and installs what is needed.
    pub(super) fn prepare(args: &ConformanceArgs, progress: Progress) -> Result<Self, Error> {
        use clap::ValueEnum;
        let qemu = setup::qemu(progress)?;
        let hypervisor = match &args.hypervisor {
            Some(path) => path.clone(),
            None => artifacts::hypervisor(progress)?,
        };
        let image = artifacts::test_kernel(progress)?;
        let directory = tempfile::tempdir().map_err(Error::io("make a directory"))?;
        let narrow = directory.path().join("image");
        let content = fs::read(&image).map_err(Error::io(format!("read {}", image.display())))?;
        fs::write(&narrow, image::narrow(&content)?).map_err(Error::io(format!("write {}", narrow.display())))?;
        fn value(of: &impl ValueEnum) -> String {
            of.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
        }
        let options = ["--huge-pages".to_owned(), value(&args.huge_pages), "--mmu".to_owned(), value(&args.mmu)];
        let (storm, limit, verbose) = (args.storm.clone(), args.timeout, args.verbose);
        Ok(Self { qemu, image, narrow, _directory: directory, hypervisor, options, storm, limit, verbose, progress })
    }

    /// The CPU that a guest has: it may lack something that the CPU below has.
    pub(super) fn cpu(&self) -> Result<Cpu, Error> {
        let report = self.run_guest("conformance to=0")?;
        report.cpu.ok_or_else(|| Error::Conformance("the image does not say what CPU it has".into()))
    }

    fn run_guest(&self, words: &str) -> Result<Report, Error> {
        let memory = format!("{MEMORY_MIB}M");
        let mut options = vec!["nestling", "--vcpus", "1", "--memory", &memory];
        options.extend(self.options.iter().map(String::as_str));
        if self.verbose {
            options.push("--verbose");
        }
        let mut run = Cli::parse_from(options).run;
        run.accel = crate::args::Accel::Tcg;
        run.timeout = Some(self.limit);
        run.guest.multiboot = Some(self.image.clone());
        run.guest.hypervisor = Some(self.hypervisor.clone());
        run.guest.storm.clone_from(&self.storm);
        run.guest.append = words.to_owned();
        let prepared = Prepared::new(Plan::new(&run, Seat::Pipe)?, None, self.progress)?;
        let console = Kept::default();
        let output = console.clone();
        let outcome = prepared.run(|_| Ok(Box::new(output)))?;
        let said = console.bytes();
        match outcome.record.ending {
            Ending::Guest(GuestExit::DebugExit { value: 0 }) => Report::read(&said),
            _ => Err(unfinished(&format!("the guest did not finish: {}", outcome.sentence()), &said)),
        }
    }
}

impl Tried for Sides {
    fn guest(&self, words: &Words) -> Result<Report, Error> {
        self.run_guest(&words.text())
    }

    fn alone(&self, words: &Words) -> Result<Report, Error> {
        // With one CPU QEMU emulates a locked update by a read and a write, and a fault in it is a read's. This hypervisor's
        // machine has more, and so has this one; the second is never started.
        let mut command = qemu::machine(&self.qemu, Acceleration::Tcg, "max", 2, MEMORY_MIB);
        command.args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]);
        command.arg("-kernel").arg(&self.narrow).args(["-append", &words.text()]).stdout(Stdio::piped());
        if self.verbose {
            self.progress.note(&qemu::shown(&command));
        }
        let mut child = command.spawn().map_err(|cause| Error::Qemu(cause.to_string()))?;
        let output = child.stdout.take();
        let reader = thread::spawn(move || {
            let mut said = Vec::new();
            // What could not be read is missed from the report.
            let _ = output.map(|mut pipe| pipe.read_to_end(&mut said));
            said
        });
        let ended = qemu::wait(&mut child, self.limit);
        let said = reader.join().unwrap_or_default();
        match ended.and_then(|status| status.code()) {
            Some(GOOD) => Report::read(&said),
            _ => Err(unfinished("the image did not finish on the CPU alone", &said)),
        }
    }
}
