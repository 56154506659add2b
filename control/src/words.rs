//! Messages in words: the command prints them, and a hypervisor that runs without one prints them itself.

use core::fmt::{self, Display};

use crate::message::{GuestExit, Report};

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

impl Report {
    /// Frames that were not given back, of any kind. Anything but 0 is a leak.
    #[must_use]
    pub fn frames_left(&self) -> u64 {
        [self.table_frames.left, self.guest_frames_left, self.kept_pages_left].into_iter().fold(0, u64::saturating_add)
    }
}
