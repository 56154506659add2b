//! A person at the console of a machine of their own, where no command listens.
//!
//! The hypervisor's words stand between the guest's lines, each on a line of its own that starts with `nestling: `; a line
//! that the guest has begun is ended for it. The guest is judged by the same rules as the command's ([`verdict`]), and the
//! last line is the verdict: `nestling: PASS: …` or `nestling: FAIL: …`, with the status that QEMU would end with.
//!
//! **Locks.** `state` is taken before the console's queue, and nothing is waited for under either. A line that must arrive
//! and finds no room makes room by moving bytes out, which only CPU 0 does, and everything that must arrive is said by CPU 0;
//! but not under a lock, because what moves the bytes may have something to say itself.
//!
//! **Room.** The guest's output is written in pieces for which the queue had room before ([`super::console_room`]). That
//! room stays: a line leaves as much as a piece takes.

use alloc::format;
use alloc::string::{String, ToString};
use core::sync::atomic::{AtomicU8, Ordering};

use nestling_control::message::{GuestExit, LogLevel, ToCommand, ToHypervisor};
use nestling_control::verdict::{self, Expected, Judged, Lines, Status, Verdict};
use nestling_control::{death, words as said};
use spin::{Mutex, Once};

use super::serial::Port;
use super::words::{AtEnd, Words};
use super::{CONSOLE, CONSOLE_PORT, EndStatus, Hears, Urgency, log};
use crate::cpu::{instructions, power};
use crate::vm::shared::CONSOLE_PIECE;

/// The most that one line takes of the console's queue; the rest of a longer one is cut.
const LINE_BYTES: usize = 1024;
const PREFIX: &str = "nestling: ";

/// What was told and heard.
#[derive(Debug)]
struct State {
    /// The console's last byte ended a line, or was none.
    at_line_start: bool,
    lines: Lines,
    verdict: Verdict,
    frames_left: Option<u64>,
}

/// The person.
#[derive(Debug)]
pub(super) struct Person {
    words: Once<Words>,
    state: Mutex<State>,
    /// For the debug-exit port.
    value: AtomicU8,
}

/// The one there is.
pub(super) static PERSON: Person = Person {
    words: Once::new(),
    state: Mutex::new(State { at_line_start: true, lines: Lines::new(), verdict: Verdict::new(), frames_left: None }),
    value: AtomicU8::new(Judged::Status(Status::HypervisorFailed).value()),
};

impl Person {
    /// Takes the words of the command line.
    pub(super) fn obey(&self, line: &str) {
        let (words, unknown) = Words::parse(line);
        self.words.call_once(|| words);
        for word in unknown {
            log::warning!("the hypervisor's command line has a word that means nothing: {}", said::printable(word));
        }
    }

    /// Puts one line on the console, if there is room.
    fn print(&self, line: &str) -> bool {
        let mut state = self.state.lock();
        let mut text = String::new();
        if !state.at_line_start {
            text.push_str("\r\n");
        }
        text.push_str(PREFIX);
        let room = LINE_BYTES - text.len() - 2;
        text.push_str(&line[..line.floor_char_boundary(room)]);
        text.push_str("\r\n");
        let printed = CONSOLE.lock().push_all(text.as_bytes(), CONSOLE_PIECE);
        state.at_line_start |= printed;
        printed
    }

    /// Puts lines on the console that must be read there. CPU 0 only.
    fn print_all(&self, lines: &str) -> bool {
        lines.lines().all(|line| {
            self.print(line) || {
                super::flush();
                self.print(line)
            }
        })
    }

    /// Judges the guest and says so.
    fn conclude(&self, exit: &GuestExit) -> String {
        let state = self.state.lock();
        let expected = match self.words.get().and_then(|words| words.verdict.as_ref()) {
            Some(_) => Expected::Verdict,
            None => Expected::End,
        };
        let (verdict, frames_left) = (state.verdict.get(), state.frames_left);
        let judged = verdict::judge(exit, expected, verdict, frames_left);
        self.value.store(judged.value(), Ordering::Relaxed);
        let word = if judged.value() == 0 { "PASS" } else { "FAIL" };
        let aftermath = said::Aftermath { expected, verdict, frames_left };
        format!("{word}: {exit}{aftermath} (status {})", judged.value() << 1 | 1)
    }
}

impl Hears for Person {
    fn init(&self) {}

    fn reserve(&self) {}

    fn tell(&self, message: &ToCommand, _urgency: Urgency) -> bool {
        match message {
            ToCommand::Death(report) => self.print_all(&death::Shown(report).to_string()),
            ToCommand::Report(report) => {
                self.state.lock().frames_left = Some(report.frames_left());
                self.print_all(&said::Cost(report).to_string())
            }
            ToCommand::Series(report) => {
                self.state.lock().frames_left = Some(report.frames_left());
                self.print_all(&format!("{} guests run", report.guests))
            }
            ToCommand::Done(exit) => {
                let verdict = self.conclude(exit);
                self.print_all(&said::printable(&verdict))
            }
            ToCommand::Hello(_)
            | ToCommand::GuestStarted { .. }
            | ToCommand::GuestReady { .. }
            | ToCommand::GuestBegins { .. }
            | ToCommand::Log { .. } => {
                let Some((level, text)) = said::line(message) else { return true };
                // That the guest is ready is news in the middle of the line that says so; a series has any number of guests.
                let landmark = matches!(message, ToCommand::Hello(_) | ToCommand::GuestStarted { .. });
                let verbose = self.words.get().is_some_and(|words| words.verbose);
                let wanted = landmark || verbose || level <= LogLevel::Warn;
                !wanted || self.print(&said::printable(&text))
            }
        }
    }

    fn tell_now(&self, message: &ToCommand) {
        // The line before it, a log line, has the same text.
        if let ToCommand::Done(exit) = message {
            Port::new(CONSOLE_PORT).write_blocking(format!("\r\n{PREFIX}FAIL: {exit}\r\n").as_bytes());
        }
    }

    fn console(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        CONSOLE.lock().push_all(bytes, 0);
        if let Some(last) = bytes.last() {
            state.at_line_start = *last == b'\n';
        }
        if let Some(prefix) = self.words.get().and_then(|words| words.verdict.as_deref()) {
            let State { lines, verdict, .. } = &mut *state;
            lines.read(bytes, |line| {
                if let Some(words) = line.strip_prefix(prefix) {
                    verdict.line(words);
                }
            });
        }
    }

    fn request(&self) -> Option<ToHypervisor> {
        None
    }

    fn stays(&self) -> bool {
        false
    }

    fn pump(&self) -> bool {
        // The console is all there is.
        true
    }

    fn end(&self, status: EndStatus) -> ! {
        let value = match status {
            EndStatus::Done => self.value.load(Ordering::Relaxed),
            EndStatus::HypervisorFailed => Judged::Status(Status::HypervisorFailed).value(),
        };
        match self.words.get().map_or(AtEnd::default(), |words| words.at_end) {
            AtEnd::PowerOff => power::off(),
            AtEnd::Reset => power::reset(),
            AtEnd::Halt => instructions::halt_forever(),
            AtEnd::DebugExit => super::debug_exit(value),
        }
    }
}
