//! The guest's console: what its output says about the run, and what its user's keys mean.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Mutex},
};

use nestling_control::verdict::{Lines, Verdict};

use crate::guest::{CHECK_PREFIX, READY_MARKER};

const KEPT_BYTES: usize = 16 << 10;

/// Reads along with the console.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    lines: Lines,
    tail: VecDeque<u8>,
    ready: bool,
    verdict: Verdict,
}

impl Judge {
    /// Takes what was printed. A line counts when it has ended.
    pub fn read(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(KEPT_BYTES);
        self.tail.drain(..excess);
        let Self { lines, ready, verdict, .. } = self;
        lines.read(bytes, |line| {
            *ready |= line.starts_with(READY_MARKER);
            if let Some(words) = line.strip_prefix(CHECK_PREFIX) {
                verdict.line(words);
            }
        });
    }

    /// Whether the default guest's init has said its first line.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// What the self-check said, `Err` for a failure; nothing if it never ended.
    #[must_use]
    pub fn verdict(&self) -> Option<Result<&str, &str>> {
        self.verdict.get()
    }

    /// The last lines, without control characters that would act on a terminal.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..]
            .iter()
            .map(|line| line.chars().filter(|character| !character.is_control()).collect())
            .collect()
    }
}

/// What typed bytes ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// These go to the guest.
    Keys(Vec<u8>),
    /// The user wants to leave.
    Leave,
}

/// Finds Ctrl-A in what is typed: Ctrl-A x leaves, Ctrl-A a (or twice Ctrl-A) sends one, anything else is sent as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Escape {
    pending: bool,
}

const CTRL_A: u8 = 1;

impl Escape {
    /// Takes typed bytes. What follows a leave is dropped.
    pub fn typed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut keys = Vec::new();
        for &byte in bytes {
            if std::mem::take(&mut self.pending) {
                match byte {
                    b'x' | b'X' => {
                        let before = (!keys.is_empty()).then_some(Typed::Keys(keys));
                        return before.into_iter().chain([Typed::Leave]).collect();
                    }
                    b'a' | CTRL_A => keys.push(CTRL_A),
                    _ => keys.extend([CTRL_A, byte]),
                }
            } else if byte == CTRL_A {
                self.pending = true;
            } else {
                keys.push(byte);
            }
        }
        if keys.is_empty() { Vec::new() } else { vec![Typed::Keys(keys)] }
    }
}

/// A console that is read when all is over.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    /// What was printed.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().map(|bytes| bytes.clone()).unwrap_or_default()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Ok(mut kept) = self.0.lock() {
            kept.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str) -> Judge {
        let mut judge = Judge::default();
        // Byte by byte, as a serial line may bring it.
        for byte in text.bytes() {
            judge.read(&[byte]);
        }
        judge
    }

    #[test]
    fn only_whole_lines_that_start_so_are_a_verdict() {
        assert_eq!(judged("nestling-selfcheck: PASS in 3 s\r\n").verdict(), Some(Ok("PASS in 3 s")));
        assert_eq!(judged("nestling-selfcheck: PASS in 3 s").verdict(), None, "the line has not ended");
        assert_eq!(judged("echo nestling-selfcheck: PASS\n").verdict(), None);
        assert_eq!(judged("nestling-selfcheck: memory: round 1\n").verdict(), None);
    }

    #[test]
    fn failure_outlasts_success() {
        let both = "nestling-selfcheck: PASS\nnestling-selfcheck: FAIL memory\nnestling-selfcheck: PASS\n";
        assert_eq!(judged(both).verdict(), Some(Err("FAIL memory")));
    }

    #[test]
    fn an_endless_line_is_bounded_and_the_tail_is_the_end() {
        let mut judge = Judge::default();
        for _ in 0..1000 {
            judge.read(&[b'x'; 1000]);
        }
        judge.read(b"\nthe \x1b[31mend\n\n");
        assert!(judge.lines.pending() < 4096 && judge.tail.len() <= KEPT_BYTES);
        assert_eq!(judge.last_lines(1), ["the [31mend"]);
    }

    #[test]
    fn ctrl_a_is_found_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.typed(b"ls\x01"), [Typed::Keys(b"ls".to_vec())]);
        assert_eq!(escape.typed(b"a\r"), [Typed::Keys(b"\x01\r".to_vec())]);
        assert_eq!(escape.typed(b"\x01"), []);
        assert_eq!(escape.typed(b"q"), [Typed::Keys(b"\x01q".to_vec())]);
        assert_eq!(escape.typed(b"k\x01xrest"), [Typed::Keys(b"k".to_vec()), Typed::Leave]);
    }
}
