//! The command line.

use std::{path::PathBuf, time::Duration};

use crate::copy::link::Address;
use clap::{Args, Parser, Subcommand, ValueEnum};
use nestling_conformance::Paging;
use nestling_control::config::{HugePages, MmuKind, StormKind};

/// Boots unmodified Linux guests on a hypervisor whose guest memory is managed by the library `nestling`.
///
/// Without a subcommand: run.
#[derive(Clone, Debug, Parser)]
#[command(name = "nestling", version, args_conflicts_with_subcommands = true, args_override_self = true)]
#[command(after_help = STATUSES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The options of `run`, which may be left out.
    #[command(flatten)]
    pub run: RunArgs,
}

const STATUSES: &str = "\
Exit status: 0 the guest powered off or reset (in check mode: and passed); an odd number is the guest's own, \
(value << 1) | 1 for the value it wrote to port 0xf4; 2 options or files that cannot be used; 64 no verdict; \
66 self-check failed, or not what the CPU alone does; 70 the guest died; 72 QEMU or the hypervisor failed; 74 timeout; 76 something is missing; \
78 any other error; 80 worse than the baseline; 128 + n ended by signal n.";

/// The subcommands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Boot a guest. With a terminal: a shell in it, left with Ctrl-A x. Without: its self-check and a verdict.
    Run(Box<RunArgs>),
    /// Run random machine code, guest after guest, in one session of the hypervisor, and count what is not as before.
    Fuzz(FuzzArgs),
    /// Measure what memory management costs, in instructions, beside KVM on the same emulated machine.
    Bench(BenchArgs),
    /// Compare how a guest's CPU walks page tables with how the CPU alone does, case by case.
    Conformance(ConformanceArgs),
    /// Make an image that boots the guest on a machine of its own: by GRUB, from a CD or a USB stick.
    Image(Box<ImageArgs>),
    /// Say what is there, what is missing and how to get it.
    Doctor,
    /// Write a running guest to a file, from which `run --restore` lets it go on; the guest itself goes on as well.
    Snapshot(SnapshotArgs),
    /// Give a running guest to another machine, which waits for it with `run --incoming`.
    Migrate(MigrateArgs),
}

/// Which of the running guests is meant.
#[derive(Args, Clone, Debug, Default)]
pub struct Which {
    /// The guest's name, as `run --name` gave it [default: the only one that runs]
    #[arg(long, value_name = "NAME", conflicts_with = "socket")]
    pub name: Option<String>,
    /// The socket of the command that runs it, wherever that is
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// What can be said about a migration.
#[derive(Args, Clone, Debug)]
pub struct MigrateArgs {
    /// Where the other machine's command listens: HOST:PORT, or the path of a socket
    #[arg(long, value_name = "ADDRESS", value_parser = Address::parse)]
    pub to: Address,
    /// Which guest.
    #[command(flatten)]
    pub which: Which,
    /// Write what it cost as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How long the guest may stand still, in milliseconds; while it writes too much for that it is slowed down
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub downtime: u32,
    /// After so many rounds it is stopped, however long that takes
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
}

/// What can be said about a snapshot.
#[derive(Args, Clone, Debug)]
pub struct SnapshotArgs {
    /// Where to; an older file is replaced when the new one is complete
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Write what it cost as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Which guest.
    #[command(flatten)]
    pub which: Which,
}

/// What can be said about a guest, wherever it runs.
#[derive(Args, Clone, Debug)]
pub struct GuestArgs {
    /// What the guest is, where not said by files: its kernel and busybox are Debian's, fetched once by package name
    #[arg(long, value_name = "KIND", value_enum, default_value_t = System::Amd64)]
    pub guest: System,
    /// Guest kernel, a Linux bzImage, 64-bit or 32-bit [default: the one of --guest]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Instead of Linux, a Multiboot image on a machine as test kernels expect it; --initrd is its module
    #[arg(long, value_name = "FILE", conflicts_with_all = ["guest", "kernel", "mode"])]
    pub multiboot: Option<PathBuf>,
    /// Guest initial RAM disk [default: busybox and a self-check, put together here]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Words added to the guest's command line; where two contradict, Linux takes the later
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Guest memory: a number and M or G
    #[arg(long, short, value_name = "SIZE", default_value = "1G", value_parser = memory_bytes)]
    pub memory: u64,
    /// Virtual CPUs, each on a CPU of its own
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub vcpus: u32,
    /// The largest page with which guest memory is mapped
    #[arg(long, value_name = "SIZE", value_enum, default_value_t = PageSize::M2)]
    pub huge_pages: PageSize,
    /// What translates the guest's addresses
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Translation::Npt)]
    pub mmu: Translation,
    /// What the default guest does [default: shell at a terminal, otherwise check; no check with an initrd of one's own]
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// Fire operations at the guest's memory while it runs: zap-all, slot-delete, slot-move, move-page, take-page, each
    /// with =RATE a second or at its default rate
    #[arg(long, value_name = "KIND[=RATE],…", value_delimiter = ',', value_parser = storm_kind)]
    pub storm: Vec<(StormKind, u32)>,
    /// Where the storm's random choices begin [default: somewhere else each time]
    #[arg(long, value_name = "N", requires = "storm")]
    pub storm_seed: Option<u64>,
    /// Check every change of the guest's tables, and what its vCPUs' TLBs may hold, against a specification: slow
    #[arg(long, conflicts_with = "hypervisor")]
    pub ghost: bool,
    /// A hypervisor that is built already [default: built from this source tree]
    #[arg(long, value_name = "FILE")]
    pub hypervisor: Option<PathBuf>,
}

/// What can be said about a run.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Instead of a kernel, go on with the guest in this snapshot; memory, vCPUs and all else are as they were
    #[arg(long, value_name = "FILE", conflicts_with_all = BOOT_OPTIONS)]
    pub restore: Option<PathBuf>,
    /// Wait at this address (HOST:PORT, or the path of a socket) for a guest that another command gives away
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = BOOT_OPTIONS, conflicts_with = "restore", value_parser = Address::parse)]
    pub incoming: Option<Address>,
    /// The name by which other commands find this guest [default: guest- and the process's number]
    #[arg(long, value_name = "NAME", value_parser = guest_name)]
    pub name: Option<String>,
    /// End the run after this long and fail [default: 300 in check mode, none with a shell]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Write what the run cost as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How QEMU runs the hypervisor
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub accel: Accel,
    /// Show all that the hypervisor says, and QEMU's command line
    #[arg(long, short)]
    pub verbose: bool,
}

/// What can be said about random guests.
#[derive(Args, Clone, Debug)]
pub struct FuzzArgs {
    /// Begin no guest after this long
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub seconds: Duration,
    /// The first guest's seed; the next guests' follow it [default: another one each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// No more guests than this
    #[arg(long, value_name = "N")]
    pub guests: Option<u64>,
    /// Milliseconds that a guest has before it is ended from outside
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub slice: u64,
    /// Virtual CPUs, each on a CPU of its own
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub vcpus: u32,
    /// Guest memory: a number and M or G
    #[arg(long, short, value_name = "SIZE", default_value = "64M", value_parser = memory_bytes)]
    pub memory: u64,
    /// The largest page with which guest memory is mapped; every fourth guest has 4 KiB pages in any case
    #[arg(long, value_name = "SIZE", value_enum, default_value_t = PageSize::M2)]
    pub huge_pages: PageSize,
    /// What translates the guests' addresses
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Translation::Npt)]
    pub mmu: Translation,
    /// Write what came of it as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// How QEMU runs the hypervisor
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub accel: Accel,
    /// A hypervisor that is built already [default: built from this source tree]
    #[arg(long, value_name = "FILE")]
    pub hypervisor: Option<PathBuf>,
    /// Show all that the hypervisor says, and QEMU's command line
    #[arg(long, short)]
    pub verbose: bool,
}

/// What can be said about cases of paging.
#[derive(Args, Clone, Debug)]
pub struct ConformanceArgs {
    /// Cases of each kind of paging, taken at random
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub cases: u64,
    /// Where the random choices begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Instead of a sample, all combinations: millions of cases, in hours
    #[arg(long, conflicts_with_all = ["cases", "seed"])]
    pub all: bool,
    /// Of all, this part of so many
    #[arg(long, value_name = "I/N", default_value = "1/1", requires = "all", value_parser = part)]
    pub part: (u64, u64),
    /// How guest memory is translated
    #[arg(long, value_enum, default_value_t = Translation::Npt)]
    pub mmu: Translation,
    /// Kinds of paging: legacy, pae, long4, long5 [default: each]
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', value_parser = paging)]
    pub paging: Vec<Paging>,
    /// The largest page with which guest memory is mapped
    #[arg(long, value_name = "SIZE", value_enum, default_value_t = PageSize::M2)]
    pub huge_pages: PageSize,
    /// Fire operations at the guest's memory meanwhile, as `run` does: they must change nothing
    #[arg(long, value_name = "KIND[=RATE],…", value_delimiter = ',', value_parser = storm_kind)]
    pub storm: Vec<(StormKind, u32)>,
    /// A hypervisor that is built already [default: built from this source tree]
    #[arg(long, value_name = "FILE")]
    pub hypervisor: Option<PathBuf>,
    /// End a boot after this long and fail
    #[arg(long, value_name = "SECONDS", default_value = "1800", value_parser = seconds)]
    pub timeout: Duration,
    /// Show QEMU's command lines, and all that the hypervisor says
    #[arg(long, short)]
    pub verbose: bool,
}

fn paging(text: &str) -> Result<Paging, String> {
    Paging::named(text).ok_or_else(|| format!("there are {}", Paging::ALL.map(Paging::name).join(", ")))
}

/// A part of how many.
fn part(text: &str) -> Result<(u64, u64), String> {
    let numbers = text.split_once('/').and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)));
    numbers
        .filter(|(part, of)| (1..=*of).contains(part) && *of <= 1_000_000)
        .ok_or_else(|| "a part and how many there are are needed, as 1/8".into())
}

/// What can be said about an image.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// The image to write; what is there is replaced when the new one is whole
    #[arg(value_name = "FILE.iso")]
    pub file: PathBuf,
    /// The guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// What follows the guest's end
    #[arg(long, value_enum, default_value_t = AtEnd::PowerOff)]
    pub at_end: AtEnd,
    /// Let the hypervisor say all that it has to say, on the console
    #[arg(long, short)]
    pub verbose: bool,
}

/// What can be said about a measurement.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Pages of 4 KiB that the operations work on
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub pages: u32,
    /// Measure one side only
    #[arg(long, value_enum)]
    pub only: Option<Side>,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw them
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Say where the instructions of this operation of this hypervisor's go: by function, or by exit for `linux`
    #[arg(long, value_name = "OPERATION", conflicts_with_all = ["only", "json", "svg", "baseline"])]
    pub profile: Option<String>,
    /// On which tables that operation is done
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Translation::Npt, requires = "profile")]
    pub mmu: Translation,
    /// Compare with the JSON of an earlier run, name what has become worse, and fail if anything has
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// How much more than in the baseline is not worse
    #[arg(long, value_name = "PERCENT", default_value_t = 2, requires = "baseline")]
    pub tolerance: u16,
    /// Show all that the guests say
    #[arg(long, short)]
    pub verbose: bool,
}

/// `--only`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// This hypervisor
    Nestling,
    /// Linux KVM
    Kvm,
}

/// `--at-end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AtEnd {
    /// The machine is switched off
    PowerOff,
    /// It is reset
    Reset,
    /// It halts, and the console can still be read
    Halt,
    /// QEMU ends with the run's status, by its isa-debug-exit at port 0xf4: 1 for a pass
    DebugExit,
}

/// What is decided when a guest boots.
const BOOT_OPTIONS: [&str; 7] = ["guest", "kernel", "multiboot", "initrd", "append", "memory", "vcpus"];

/// A name that is a file name too.
fn guest_name(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fits { Ok(text.to_owned()) } else { Err("letters, digits, - _ and . make a name, up to 64 of them".into()) }
}

/// `--huge-pages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PageSize {
    /// 4 KiB pages only
    None,
    /// Up to 2 MiB
    #[value(name = "2M")]
    M2,
    /// Up to 1 GiB
    #[value(name = "1G")]
    G1,
}

impl From<PageSize> for HugePages {
    fn from(size: PageSize) -> Self {
        match size {
            PageSize::None => Self::None,
            PageSize::M2 => Self::M2,
            PageSize::G1 => Self::G1,
        }
    }
}

/// `--guest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum System {
    /// 64-bit: Debian's cloud kernel
    Amd64,
    /// 32-bit with two levels of page tables: Debian's kernel for CPUs without PAE
    I386,
    /// 32-bit with PAE
    I386Pae,
}

/// `--mmu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Translation {
    /// Nested page tables, walked by the CPU beside the guest's own
    Npt,
    /// Shadow page tables, made of the guest's own; for a CPU without nested paging
    Shadow,
}

impl From<Translation> for MmuKind {
    fn from(translation: Translation) -> Self {
        match translation {
            Translation::Npt => Self::Nested,
            Translation::Shadow => Self::Shadow,
        }
    }
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// An interactive shell
    Shell,
    /// Check itself, print a verdict, power off
    Check,
}

/// `--accel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// Hardware virtualisation where it can nest SVM, otherwise emulation
    Auto,
    /// Emulation
    Tcg,
    /// Hardware virtualisation or nothing
    Kvm,
    /// Emulation that counts instructions: slow, and time is what the CPUs execute
    Counted,
}

/// A size with its unit. A bare number is refused: tools differ in what they take it for.
fn memory_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (number, shift) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => return Err("a number and a unit are needed, as 512M or 2G".into()),
    };
    let number: u64 =
        number.parse().map_err(|_| "a whole number is needed before the unit, as 512M or 2G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "beyond 64 bits".into())
}

fn storm_kind(text: &str) -> Result<(StormKind, u32), String> {
    let (name, rate) = text.split_once('=').map_or((text, None), |(name, rate)| (name, Some(rate)));
    let kind = StormKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
        let names: Vec<_> = StormKind::ALL.map(StormKind::name).into();
        format!("a storm is made of {}", names.join(", "))
    })?;
    match rate.map(str::parse) {
        None => Ok((kind, kind.default_rate())),
        Some(Ok(rate @ 1..)) => Ok((kind, rate)),
        Some(_) => Err("a rate is a whole number of operations a second, at least 1".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(0) => Err("the guest needs some time: at least 1".into()),
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => Err("a whole number of seconds is needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_unit_and_do_not_overflow() {
        assert_eq!(memory_bytes("512M"), Ok(512 << 20));
        assert_eq!(memory_bytes("2g"), Ok(2 << 30));
        for bad in ["", "1", "1024", "G", "1.5G", "-1G", "1T", "99999999999999G", "1 G", "é"] {
            assert!(memory_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_storm_has_known_kinds_and_rates() {
        let storm = |text: &str| Cli::try_parse_from(["nestling", "run", "--storm", text]).map(|cli| cli.command);
        let Ok(Some(Command::Run(run))) = storm("zap-all,take-page=7") else { panic!("refused") };
        let default = StormKind::ZapAll.default_rate();
        assert_eq!(run.guest.storm, [(StormKind::ZapAll, default), (StormKind::TakePage, 7)]);
        for bad in ["", "zap", "zap-all=", "zap-all=0", "zap-all=-1", "zap-all=x", "zap-all,,", "zap-all=4294967296"] {
            assert!(storm(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_part_is_one_of_as_many_as_are_said() {
        assert_eq!((part("1/1"), part("8/8")), (Ok((1, 1)), Ok((8, 8))));
        for bad in ["", "1", "/", "0/1", "2/1", "1/0", "-1/2", "1/2/3", "1/1000001"] {
            assert!(part(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn run_is_the_default_and_takes_its_options_with_or_without_its_name() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let bare = Cli::parse_from(["nestling", "--vcpus", "2", "--huge-pages", "1G"]);
        assert!(bare.command.is_none());
        assert_eq!((bare.run.guest.vcpus, bare.run.guest.huge_pages), (2, PageSize::G1));
        let named = Cli::parse_from(["nestling", "run", "--append", "-x", "--memory", "64M"]);
        let Some(Command::Run(run)) = named.command else { panic!("not run: {named:?}") };
        assert_eq!((run.guest.append.as_str(), run.guest.memory), ("-x", 64 << 20));
    }
}
