//! Messages in words: the command prints them, and a hypervisor that runs without one prints them itself.

use alloc::{borrow::ToOwned, format, string::String};
use core::fmt::{self, Display};

use crate::{
    message::{GuestExit, Leak, LogLevel, Report, SeriesReport, ToCommand},
    verdict::Expected,
};

/// A number of bytes as people read it.
#[derive(Clone, Copy, Debug)]
pub struct Mebibytes(pub u64);

impl Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}

impl Display for GuestExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::DebugExit { value } => write!(f, "the guest ended with the value {value}"),
            Self::Stopped => f.write_str("left"),
            Self::Migrated => f.write_str("the guest goes on elsewhere"),
            Self::Died => f.write_str("the guest died"),
            Self::Error { text } => write!(f, "the hypervisor gave up: {text}"),
        }
    }
}

/// What a run cost, in one line.
#[derive(Clone, Copy, Debug)]
pub struct Cost<'a>(pub &'a Report);

impl Display for Cost<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(report) = self;
        let sum = |counts: &alloc::collections::BTreeMap<_, u64>| counts.values().copied().fold(0, u64::saturating_add);
        let mapped = &report.mapped_bytes;
        write!(
            f,
            "{} exits, {} faults; mapped {} by 4K, {} by 2M, {} by 1G pages with {} tables; {} flushes, {} kicks",
            sum(&report.exits),
            sum(&report.faults),
            Mebibytes(mapped.size_4k),
            Mebibytes(mapped.size_2m),
            Mebibytes(mapped.size_1g),
            report.table_frames.peak,
            report.tlb_flushes,
            report.kicks
        )
    }
}

/// A message that is one line, and how much it matters; nothing for the messages of the end, which are judged together.
#[must_use]
pub fn line(message: &ToCommand) -> Option<(LogLevel, String)> {
    match message {
        ToCommand::Hello(hello) => {
            let (cpus, memory, features) = (hello.cpus, hello.memory_bytes >> 20, hello.svm_features.join(" "));
            let text = format!("{cpus} CPUs, {memory} MiB, {}, SVM features: {features}", hello.cpu_name.trim());
            Some((LogLevel::Info, text))
        }
        ToCommand::Log { level, text } => Some((*level, text.clone())),
        ToCommand::GuestStarted { vcpus, memory_bytes, huge_pages, mmu } => {
            let memory = memory_bytes >> 20;
            Some((
                LogLevel::Info,
                format!("guest started: {vcpus} vCPUs, {memory} MiB, huge pages {huge_pages:?}, {}", mmu.name()),
            ))
        }
        ToCommand::GuestReady { guest_ns } => {
            Some((LogLevel::Info, format!("guest ready after {:.2} s of its time", *guest_ns as f64 / 1e9)))
        }
        ToCommand::GuestBegins { seed } => Some((LogLevel::Debug, format!("guest {seed}"))),
        ToCommand::Series(_) | ToCommand::Death(_) | ToCommand::Report(_) | ToCommand::Done(_) => None,
    }
}

/// What follows the guest's end in a sentence about it: its verdict, and what it left behind.
#[derive(Clone, Copy, Debug)]
pub struct Aftermath<'a> {
    /// What the guest had to do.
    pub expected: Expected,
    /// What it said of itself.
    pub verdict: Option<Result<&'a str, &'a str>>,
    /// Frames not given back, if somebody counted.
    pub frames_left: Option<u64>,
}

impl Display for Aftermath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.expected, self.verdict) {
            (_, Some(Ok(words) | Err(words))) => write!(f, "; self-check: {words}")?,
            (Expected::Verdict, None) => f.write_str("; self-check: no verdict")?,
            (Expected::End, None) => {}
        }
        match self.frames_left {
            Some(left @ 1..) => write!(f, "; LEAK: {left} frames not given back"),
            Some(0) | None => Ok(()),
        }
    }
}

/// The words without what would act on a terminal.
#[must_use]
pub fn printable(words: &str) -> String {
    if words.contains(char::is_control) {
        words.chars().filter(|character| !character.is_control()).collect()
    } else {
        words.to_owned()
    }
}

impl Report {
    /// Frames that were not given back, of any kind. Anything but 0 is a leak.
    #[must_use]
    pub fn frames_left(&self) -> u64 {
        [self.table_frames.left, self.guest_frames_left, self.kept_pages_left].into_iter().fold(0, u64::saturating_add)
    }
}

impl SeriesReport {
    /// Frames that were not given back, of any kind, over all guests that left some. Anything but 0 is a leak.
    #[must_use]
    pub fn frames_left(&self) -> u64 {
        let left = |leak: &Leak| leak.table_frames.saturating_add(leak.guest_frames).saturating_add(leak.kept_pages);
        // A leak of bytes alone counts as a frame of them.
        self.leaks.iter().map(|leak| left(leak).max(1)).fold(0, u64::saturating_add)
    }
}
