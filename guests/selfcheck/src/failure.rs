//! Why a check failed.

use std::{fmt, io, path::PathBuf};

/// One failed check, as the verdict prints it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The system refused something that a healthy guest grants.
    System {
        /// What was tried.
        doing: &'static str,
        /// What the kernel answered.
        cause: io::Error,
    },
    /// A file of `/proc` or `/sys` does not read as expected.
    Unreadable {
        /// The file.
        path: &'static str,
    },
    /// A word of memory does not hold what was written to it.
    Memory {
        /// The CPU that read it.
        cpu: usize,
        /// The round.
        round: u64,
        /// Its index in the region.
        word: usize,
        /// What was written.
        expected: u64,
        /// What was read.
        found: u64,
    },
    /// A process of the storm did not end as it should.
    Storm {
        /// The CPU it was bound to.
        cpu: usize,
        /// How it ended: its wait status.
        status: i32,
    },
    /// A file does not have the hash of what was written to it.
    Hash {
        /// The file.
        path: PathBuf,
        /// The hash of what was written.
        expected: String,
        /// What was computed from the file.
        found: String,
    },
    /// The clock went backwards from one CPU to another.
    ClockBackwards {
        /// The CPU that read the earlier time.
        cpu: usize,
        /// By how many nanoseconds.
        by_ns: u64,
    },
    /// A sleep took much less or much more than it should.
    Sleep {
        /// The CPU.
        cpu: usize,
        /// Asked for, in milliseconds.
        asked_ms: u64,
        /// Slept, in milliseconds.
        slept_ms: u64,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { doing, cause } => write!(f, "{doing}: {cause}"),
            Self::Unreadable { path } => write!(f, "{path} does not read as expected"),
            Self::Memory { cpu, round, word, expected, found } => write!(
                f,
                "memory: CPU {cpu} round {round}: word {word:#x} (page {:#x}) holds {found:#018x}, not {expected:#018x}",
                word / (4096 / 8)
            ),
            Self::Storm { cpu, status } => {
                write!(f, "storm: a process on CPU {cpu} ended with wait status {status:#x}")
            }
            Self::Hash { path, expected, found } => {
                write!(f, "files: {} hashes to {found}, not {expected}", path.display())
            }
            Self::ClockBackwards { cpu, by_ns } => write!(f, "clock: {by_ns} ns backwards, seen by CPU {cpu}"),
            Self::Sleep { cpu, asked_ms, slept_ms } => {
                write!(f, "clock: a sleep of {asked_ms} ms on CPU {cpu} took {slept_ms} ms")
            }
        }
    }
}

impl Failure {
    /// For `map_err`: the system refused what was being done.
    pub(crate) fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |cause| Self::System { doing, cause: cause.into() }
    }
}
