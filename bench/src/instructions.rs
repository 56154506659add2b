//! Instructions a page, counted by valgrind's callgrind.
//!
//! The benchmark runs itself: once for each contender and operation, in a process of its own, whose one thread does
//! the earlier phases uncounted. Counting starts and stops at one function, so a figure is everything between its entry and
//! its return, the loop included. Counts are deterministic: two runs differ by a few
//! instructions in all.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::arena::Claim;
use crate::clock::{Operation, work};
use crate::contenders::{Contender, Seat};
use crate::plan::{Order, Plan, Share};
use crate::zap_all::{COUNTED_FAULTS, Company, Size};

/// Argument that makes the benchmark one of the counted processes; the contender's and the operation's names follow.
pub const ARGUMENT: &str = "--count-instructions";
/// Argument that makes it one that counts the front half of a zap-all; how much is mapped follows.
pub const FRONT_HALF: &str = "--count-front-half";
/// Argument that makes it one that counts faults; what else goes on follows.
pub const FAULTS: &str = "--count-faults";
/// Pages that a counted process touches: 256 MiB.
pub const PAGES: u64 = 65_536;

/// Why there are no counts.
#[derive(Debug)]
pub enum CountError {
    /// There is no `valgrind` in the path.
    NoValgrind,
    /// It could not be started, or its output not read.
    Io(io::Error),
    /// It or the benchmark under it failed, with what it said last.
    Failed(String),
    /// Its output has no total.
    NoTotal(PathBuf),
}

impl std::fmt::Display for CountError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoValgrind => f.write_str("valgrind is not installed (Debian: apt install valgrind)"),
            Self::Io(error) => write!(f, "callgrind: {error}"),
            Self::Failed(last) => write!(f, "the benchmark failed under callgrind: {last}"),
            Self::NoTotal(path) => write!(f, "callgrind left no total in {}", path.display()),
        }
    }
}

impl std::error::Error for CountError {}

impl From<io::Error> for CountError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What a counted process does: everything up to `operation`, and that inside the counted function.
///
/// # Panics
/// When the contender did not do each page as it should.
pub fn counted_process<C: Contender>(operation: Operation) {
    let plan = Plan::new(Order::Sequential, 1, PAGES);
    let share = &plan.shares[0];
    let table = C::new(Claim::take());
    let mut seat = table.seat(0);
    for phase in Operation::ALL {
        let counts = phase == operation;
        let done = if counts { counted(phase, &mut seat, share) } else { work(phase, &mut seat, share) };
        assert_eq!(done, PAGES, "{}: {phase:?} of {PAGES} pages did {done}", C::NAME);
        if counts {
            return;
        }
    }
}

/// Where callgrind starts and stops counting: it finds the function by this name.
#[inline(never)]
fn counted<S: Seat>(operation: Operation, seat: &mut S, share: &Share) -> u64 {
    let done = work(operation, seat, share);
    // Nothing may be left to do after the loop but to return: a tail call would end the counting early.
    std::hint::black_box(done)
}

/// Counts `operation` of the contender of this name in a process of its own; instructions a page.
pub fn count(contender: &str, operation: Operation) -> Result<f64, CountError> {
    let total = run_counted(Some("nestling_bench::instructions::counted"), &[ARGUMENT, contender, operation.name()])?;
    Ok(total as f64 / PAGES as f64)
}

/// Counts the front half of a zap-all, in a process of its own; instructions.
pub fn count_front_half(size: Size) -> Result<u64, CountError> {
    run_counted(None, &[FRONT_HALF, size.name()])
}

/// Counts faults, in a process of its own; instructions each.
pub fn count_faults(company: Company) -> Result<f64, CountError> {
    let total = run_counted(None, &[FAULTS, company.name()])?;
    Ok(total as f64 / COUNTED_FAULTS as f64)
}

/// Runs the benchmark with `arguments` in a process of its own; the instructions between the entry and the return of the
/// function `counted`, or of what the process itself says.
pub(crate) fn run_counted(counted: Option<&str>, arguments: &[&str]) -> Result<u64, CountError> {
    let name = format!("nestling-bench-{}-{}", std::process::id(), arguments.join("-").replace('/', "-"));
    let output = std::env::temp_dir().join(name);
    let total = run(counted, arguments, &output).and_then(|()| {
        let text = std::fs::read_to_string(&output)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<u64>().ok());
        total.filter(|&total| total > 0).ok_or_else(|| CountError::NoTotal(output.clone()))
    });
    // It may never have been written, which the result says better.
    let _ = std::fs::remove_file(&output);
    total
}

fn run(counted: Option<&str>, arguments: &[&str], output: &Path) -> Result<(), CountError> {
    let mut command = Command::new("valgrind");
    // Where a process has several threads, they take turns.
    command.args(["--tool=callgrind", "--collect-atstart=no", "--fair-sched=try"]);
    command.args(counted.map(|counted| format!("--toggle-collect={counted}")));
    command.arg(format!("--callgrind-out-file={}", output.display()));
    command.arg(std::env::current_exe()?).args(arguments);
    let done = command.stdin(Stdio::null()).output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => CountError::NoValgrind,
        _ => CountError::Io(error),
    })?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(CountError::Failed(said.lines().last().unwrap_or("nothing").to_owned()))
}
