//! What a run came to: one exit status, one verdict, one sentence.

use std::os::unix::process::ExitStatusExt;

use nestling_control::{
    message::{GuestExit, Report},
    verdict::{self, Expected},
    words::{Aftermath, Cost},
};

use crate::{
    accel::Acceleration,
    args::Mode,
    error::Status,
    session::{Ending, HypervisorFailure, Record},
};

/// A finished run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What the guest was to do.
    pub mode: Mode,
    /// How QEMU ran.
    pub acceleration: Acceleration,
    /// What was learned.
    pub record: Record,
}

impl Outcome {
    /// The exit status of the command. Only a good run gives 0.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        let judged = |exit: &GuestExit| {
            let frames_left = self.record.report.as_ref().map(Report::frames_left);
            verdict::judge(exit, self.expected(), self.record.console.verdict(), frames_left).status()
        };
        match &self.record.ending {
            Ending::Guest(exit) => judged(exit),
            Ending::Left => judged(&GuestExit::Stopped),
            Ending::Hypervisor(_) => Status::HypervisorFailed as u8,
            Ending::TimedOut(_) => Status::TimedOut as u8,
            Ending::Signal(number) => 128 + (*number as u8 & 0x7f),
        }
    }

    /// What the guest has to do.
    fn expected(&self) -> Expected {
        match self.mode {
            // The verdict of one that has left is given where it went.
            _ if self.record.ending == Ending::Guest(GuestExit::Migrated) => Expected::End,
            Mode::Check => Expected::Verdict,
            Mode::Shell => Expected::End,
        }
    }

    /// Whether the run was good.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.exit_status() == 0
    }

    /// How it ended, in a few words that scripts can compare.
    #[must_use]
    pub fn end_name(&self) -> &'static str {
        match &self.record.ending {
            Ending::Guest(GuestExit::PowerOff) => "power-off",
            Ending::Guest(GuestExit::Reset) => "reset",
            Ending::Guest(GuestExit::DebugExit { .. }) => "debug-exit",
            Ending::Guest(GuestExit::Died) => "died",
            Ending::Guest(GuestExit::Error { .. }) => "error",
            Ending::Guest(GuestExit::Stopped) | Ending::Left => "left",
            Ending::Guest(GuestExit::Migrated) => "migrated",
            Ending::TimedOut(_) => "timeout",
            Ending::Signal(_) => "signal",
            Ending::Hypervisor(_) => "hypervisor-failed",
        }
    }

    /// One sentence for people.
    #[must_use]
    pub fn sentence(&self) -> String {
        let record = &self.record;
        let end = match &record.ending {
            Ending::Guest(exit) => exit.to_string(),
            Ending::Left => GuestExit::Stopped.to_string(),
            Ending::TimedOut(after) => format!("no end within {} s (--timeout)", after.as_secs()),
            Ending::Signal(number) => format!("ended by signal {number}"),
            Ending::Hypervisor(HypervisorFailure::Died { status }) => match status {
                Some(status) if status.signal().is_some() => format!("QEMU itself died ({status})"),
                Some(status) => format!("the hypervisor died without a word (QEMU: {status})"),
                None => "the hypervisor stopped talking".into(),
            },
            Ending::Hypervisor(HypervisorFailure::Stuck { after }) => {
                format!("the hypervisor said nothing for {} s", after.as_secs())
            }
            Ending::Hypervisor(HypervisorFailure::Silent) => "the hypervisor did not come up".into(),
            Ending::Hypervisor(HypervisorFailure::Protocol { version }) => {
                format!("the hypervisor speaks protocol {version}: build it and the command from the same tree")
            }
        };
        let aftermath = Aftermath {
            expected: self.expected(),
            verdict: record.console.verdict(),
            frames_left: record.report.as_ref().map(Report::frames_left),
        };
        let unreported = match (&record.report, &record.ending) {
            (None, Ending::Guest(GuestExit::PowerOff | GuestExit::Reset)) => "; the hypervisor sent no report",
            _ => "",
        };
        format!("{end}{aftermath}{unreported}")
    }

    /// What the run cost, in one line.
    #[must_use]
    pub fn cost(&self) -> Option<String> {
        let report = self.record.report.as_ref()?;
        let booted = match self.record.boot_wall {
            Some(boot) => format!(" (booted in {:.1} s)", boot.as_secs_f64()),
            None => String::new(),
        };
        Some(format!("{:.1} s{booted}; {}", self.record.wall.as_secs_f64(), Cost(report)))
    }
}

#[cfg(test)]
mod tests {
    use std::{process::ExitStatus, time::Duration};

    use nestling_control::message::TableFrames;

    use super::*;
    use crate::console::Judge;

    fn outcome(mode: Mode, ending: Ending, console: &str, report: Option<Report>) -> Outcome {
        let mut judge = Judge::default();
        judge.read(console.as_bytes());
        let record = Record {
            ending,
            hello: None,
            report,
            series: None,
            seed: None,
            death: None,
            console: judge,
            boot_wall: None,
            wall: Duration::ZERO,
            qemu_output: String::new(),
        };
        Outcome { mode, acceleration: Acceleration::Tcg, record }
    }

    const PASS: &str = "nestling-selfcheck: PASS in 1 s\n";
    const FAIL: &str = "nestling-selfcheck: FAIL memory\n";

    #[test]
    fn only_a_run_in_which_everything_is_right_gives_0() {
        let off = || Ending::Guest(GuestExit::PowerOff);
        let whole = || Some(Report::default());
        let leak = || Some(Report { table_frames: TableFrames { peak: 9, left: 1 }, ..Report::default() });
        let leaked_guest = || Some(Report { guest_frames_left: 1, ..Report::default() });
        let status = |mode, ending, console, report| outcome(mode, ending, console, report).exit_status();
        assert_eq!(status(Mode::Check, off(), PASS, whole()), 0);
        assert_eq!(status(Mode::Check, Ending::Guest(GuestExit::Reset), PASS, whole()), 0);
        assert_eq!(status(Mode::Shell, off(), "", whole()), 0);
        assert_eq!(status(Mode::Shell, Ending::Left, "", None), 0);

        assert_eq!(status(Mode::Check, off(), "", whole()), 64);
        assert_eq!(status(Mode::Check, Ending::Left, PASS, whole()), 64);
        assert_eq!(status(Mode::Check, off(), FAIL, whole()), 66);
        assert_eq!(status(Mode::Check, off(), PASS, None), 72);
        assert_eq!(status(Mode::Check, off(), PASS, leak()), 72);
        assert_eq!(status(Mode::Shell, off(), "", leaked_guest()), 72);
        assert_eq!(status(Mode::Check, Ending::Guest(GuestExit::Died), PASS, whole()), 70);
        assert_eq!(status(Mode::Check, Ending::Guest(GuestExit::Error { text: String::new() }), PASS, whole()), 72);
        assert_eq!(status(Mode::Check, Ending::TimedOut(Duration::ZERO), PASS, whole()), 74);
        assert_eq!(status(Mode::Check, Ending::Signal(15), PASS, whole()), 143);
        let failures = [
            HypervisorFailure::Died { status: None },
            HypervisorFailure::Silent,
            HypervisorFailure::Protocol { version: 0 },
        ];
        for failure in failures {
            assert_eq!(status(Mode::Shell, Ending::Hypervisor(failure), PASS, whole()), 72);
        }
    }

    #[test]
    fn the_emulators_end_by_a_signal_is_not_called_the_hypervisors() {
        let died = |status| Ending::Hypervisor(HypervisorFailure::Died { status: Some(ExitStatus::from_raw(status)) });
        let sentence = |status| outcome(Mode::Shell, died(status), "", None).sentence();
        assert!(sentence(6).starts_with("QEMU itself died"), "{}", sentence(6));
        assert!(sentence(33 << 8).starts_with("the hypervisor died"), "{}", sentence(33 << 8));
    }

    #[test]
    fn a_guests_own_status_is_odd_whatever_it_writes() {
        for (value, expected) in [(0, 1), (1, 3), (0x7f, 0xff), (0x80, 1), (u32::MAX, 0xff)] {
            let ending = Ending::Guest(GuestExit::DebugExit { value });
            assert_eq!(outcome(Mode::Check, ending, PASS, None).exit_status(), expected, "value {value:#x}");
        }
    }
}
