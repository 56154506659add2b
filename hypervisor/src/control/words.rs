//! The words of the hypervisor's own command line, as a person gives them to GRUB.
//!
//! `end=` what follows the guest's end: `power-off`, `reset`, `halt`, or `debug-exit` (QEMU's port, for whoever wants the
//! status). `verdict=TEXT`: lines of the guest's console that start with it are its check's, and the guest is to say there
//! that it passed. `verbose`: all that the hypervisor has to say.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

/// What follows the guest's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum AtEnd {
    /// The machine is switched off.
    PowerOff,
    /// It is reset.
    Reset,
    /// Nothing any more: the console can still be read.
    #[default]
    Halt,
    /// The verdict goes to QEMU's debug-exit port.
    DebugExit,
}

/// What a person asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Words {
    pub(super) at_end: AtEnd,
    /// How the lines of the guest's check start, if it has one.
    pub(super) verdict: Option<String>,
    pub(super) verbose: bool,
}

impl Words {
    /// Reads the words, and gives back those that it does not know. Where two contradict, the later counts.
    pub(super) fn parse(line: &str) -> (Self, Vec<&str>) {
        let (mut words, mut unknown) = (Self::default(), Vec::new());
        for word in line.split_ascii_whitespace() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("end", "power-off") => words.at_end = AtEnd::PowerOff,
                ("end", "reset") => words.at_end = AtEnd::Reset,
                ("end", "halt") => words.at_end = AtEnd::Halt,
                ("end", "debug-exit") => words.at_end = AtEnd::DebugExit,
                ("verdict", text) if !text.is_empty() => words.verdict = Some(text.to_owned()),
                ("verbose", "") => words.verbose = true,
                _ => unknown.push(word),
            }
        }
        (words, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_the_unknown_are_named() {
        let (words, unknown) = Words::parse(" verbose end=halt  verdict=check: end=reset ");
        let expected = Words { at_end: AtEnd::Reset, verdict: Some("check:".to_owned()), verbose: true };
        assert_eq!((words, unknown), (expected, Vec::new()));
        let (words, unknown) = Words::parse("end= end=now verdict= quiet end");
        assert_eq!((words, unknown), (Words::default(), ["end=", "end=now", "verdict=", "quiet", "end"].to_vec()));
    }
}
