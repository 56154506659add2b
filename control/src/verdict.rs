//! How a run is judged, and the number that says so: by the command, and by a hypervisor that runs without one.
//!
//! A guest's own status through the debug-exit port is `(value << 1) | 1`, always odd, as QEMU's `isa-debug-exit` gives
//! it. The statuses of the house are even, so that neither can be taken for the other, and none but a good run gives 0. A
//! hypervisor without a command has only that port to speak through, which makes every status odd: see [`Judged::value`].

use alloc::{borrow::ToOwned, string::String, vec::Vec};

use crate::message::GuestExit;

/// The command's own exit statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The guest powered off or reset and, where a verdict was expected, printed that it passed; or its user left it.
    Good = 0,
    /// The options or files that were given cannot be used. Nothing was started. (The status of clap as well.)
    Usage = 2,
    /// The guest ended by itself without the verdict that was expected.
    NoVerdict = 64,
    /// The guest's self-check failed and the guest then powered off instead of ending with a status of its own.
    CheckFailed = 66,
    /// The guest died.
    GuestDied = 70,
    /// QEMU or the hypervisor failed, or the hypervisor did not give back what the guest had.
    HypervisorFailed = 72,
    /// `--timeout` was over.
    TimedOut = 74,
    /// A tool or package is missing and could not be had.
    Missing = 76,
    /// A measurement found something that costs more than in its baseline.
    Worse = 80,
    /// Anything else on the command's side: building, reading, writing.
    Internal = 78,
}

/// What a guest has to do to be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// To end by itself.
    End,
    /// To print a verdict as well.
    Verdict,
}

/// What came of a guest that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// It wrote this to the debug-exit port, and nothing of it was left behind.
    Own {
        /// The value written; its low 7 bits reach a status.
        value: u32,
    },
    /// Anything else.
    Status(Status),
}

impl Judged {
    /// The command's exit status.
    #[must_use]
    pub const fn status(self) -> u8 {
        match self {
            Self::Own { value } => (value as u8) << 1 | 1,
            Self::Status(status) => status as u8,
        }
    }

    /// What a hypervisor without a command writes to the debug-exit port, so that QEMU ends with the same status, made
    /// odd: 1 for a good run.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.status() >> 1
    }
}

/// Judges how a guest ended, what it said of itself, and how much of it was left behind (`None`: nobody counted).
#[must_use]
pub fn judge(
    exit: &GuestExit,
    expected: Expected,
    verdict: Option<Result<&str, &str>>,
    frames_left: Option<u64>,
) -> Judged {
    Judged::Status(match (exit, expected, verdict) {
        (GuestExit::DebugExit { value }, ..) => match frames_left {
            Some(1..) => Status::HypervisorFailed,
            Some(0) | None => return Judged::Own { value: *value },
        },
        (GuestExit::PowerOff | GuestExit::Reset, Expected::Verdict, None) => Status::NoVerdict,
        (GuestExit::PowerOff | GuestExit::Reset, Expected::Verdict, Some(Err(_))) => Status::CheckFailed,
        (GuestExit::PowerOff | GuestExit::Reset | GuestExit::Migrated, ..) => match frames_left {
            Some(0) => Status::Good,
            // Not counted, or a leak: the guest did its part, the hypervisor did not.
            Some(1..) | None => Status::HypervisorFailed,
        },
        (GuestExit::Died, ..) => Status::GuestDied,
        (GuestExit::Error { .. }, ..) => Status::HypervisorFailed,
        (GuestExit::Stopped, Expected::End, _) => Status::Good,
        (GuestExit::Stopped, Expected::Verdict, _) => Status::NoVerdict,
    })
}

const LONGEST_LINE: usize = 400;

/// Cuts a console's output into lines, of which it keeps the first 400 bytes.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
}

impl Lines {
    /// Nothing printed yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { line: Vec::new() }
    }

    /// Takes what was printed, and passes every line on that has ended.
    pub fn read(&mut self, bytes: &[u8], mut ended: impl FnMut(&str)) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    ended(&String::from_utf8_lossy(&self.line));
                    self.line.clear();
                }
                b'\r' => {}
                _ if self.line.len() < LONGEST_LINE => self.line.push(byte),
                _ => {}
            }
        }
    }

    /// Bytes of the line that has not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.line.len()
    }
}

/// What a guest's check has said of itself.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    passed: Option<String>,
    failed: Option<String>,
}

impl Verdict {
    /// Nothing said yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { passed: None, failed: None }
    }

    /// Takes a line of the check's, without what marks it as one.
    pub fn line(&mut self, words: &str) {
        let words = words.trim();
        // The first verdict stands, and of the two failure outlasts success: a guest that says both is broken.
        if words.starts_with("PASS") && self.passed.is_none() {
            self.passed = Some(words.to_owned());
        } else if words.starts_with("FAIL") && self.failed.is_none() {
            self.failed = Some(words.to_owned());
        }
    }

    /// The verdict, `Err` for a failure; nothing if the check never ended.
    #[must_use]
    pub fn get(&self) -> Option<Result<&str, &str>> {
        match (&self.failed, &self.passed) {
            (Some(failed), _) => Some(Err(failed)),
            (None, Some(passed)) => Some(Ok(passed)),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_when_it_has_ended_and_is_bounded() {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for byte in b"one\r\ntwo" {
            lines.read(&[*byte], |line| seen.push(line.to_owned()));
        }
        assert_eq!((seen.as_slice(), lines.pending()), (&["one".to_owned()][..], 3));
        lines.read(&[b'x'; 10_000], |_| panic!("no line has ended"));
        assert_eq!(lines.pending(), LONGEST_LINE);
    }

    #[test]
    fn failure_outlasts_success() {
        let mut verdict = Verdict::default();
        verdict.line("memory: round 1");
        assert_eq!(verdict.get(), None);
        verdict.line(" PASS in 3 s");
        assert_eq!(verdict.get(), Some(Ok("PASS in 3 s")));
        verdict.line("FAIL memory");
        verdict.line("PASS");
        assert_eq!(verdict.get(), Some(Err("FAIL memory")));
    }

    #[test]
    fn without_a_command_every_status_is_odd_and_a_pass_is_one() {
        let off = |verdict, left| judge(&GuestExit::PowerOff, Expected::Verdict, verdict, left).value() << 1 | 1;
        assert_eq!(off(Some(Ok("PASS")), Some(0)), 1);
        assert_eq!(off(Some(Err("FAIL")), Some(0)), 67);
        assert_eq!((off(None, Some(0)), off(Some(Ok("PASS")), Some(2)), off(Some(Ok("PASS")), None)), (65, 73, 73));
        let own = |value, left| judge(&GuestExit::DebugExit { value }, Expected::End, None, left).value() << 1 | 1;
        assert_eq!((own(0, Some(0)), own(2, Some(0)), own(0xff, None), own(0, Some(1))), (1, 5, 0xff, 73));
    }
}
