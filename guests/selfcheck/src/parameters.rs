//! What the kernel command line says to this program. What it does not say, or says wrongly, has its default: a guest
//! with a mistyped word must still come up to where its user can see it.

use std::fs;

/// What process 1 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The self-check, then the end.
    Check,
    /// A shell for a person.
    Shell,
    /// Processes, counted, then the end.
    Forks,
}

/// The words of the command line that are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) mode: Mode,
    /// How much of the available memory the memory check uses, in percent.
    pub(crate) ram_percent: u64,
    /// The check is repeated until this much time has gone, in seconds; it is done once at least.
    pub(crate) seconds: u64,
    /// How many processes are counted.
    pub(crate) forks: u64,
    /// Rows and columns of the console, where the other end has told.
    pub(crate) terminal: Option<(u16, u16)>,
}

impl Parameters {
    pub(crate) fn of_this_boot() -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// Later words win, as they do in the kernel.
    fn parse(command_line: &str) -> Self {
        let mut parameters = Self { mode: Mode::Shell, ram_percent: 75, seconds: 0, forks: 200, terminal: None };
        for word in command_line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("nestling.mode", "check")) => parameters.mode = Mode::Check,
                Some(("nestling.mode", "shell")) => parameters.mode = Mode::Shell,
                Some(("nestling.mode", "forks")) => parameters.mode = Mode::Forks,
                Some(("nestling.ram", percent)) => {
                    if let Ok(percent @ 1..=95) = percent.parse() {
                        parameters.ram_percent = percent;
                    }
                }
                Some(("nestling.seconds", seconds)) => {
                    if let Ok(seconds) = seconds.parse() {
                        parameters.seconds = seconds;
                    }
                }
                Some(("nestling.forks", forks)) => {
                    if let Ok(forks) = forks.parse() {
                        parameters.forks = forks;
                    }
                }
                Some(("nestling.tty", size)) => {
                    parameters.terminal = size
                        .split_once('x')
                        .and_then(|(rows, columns)| Some((rows.parse().ok()?, columns.parse().ok()?)));
                }
                _ => {}
            }
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_is_the_default() {
        let parameters = Parameters::parse("console=ttyS0 quiet");
        assert_eq!(
            parameters,
            Parameters { mode: Mode::Shell, ram_percent: 75, seconds: 0, forks: 200, terminal: None }
        );
    }

    #[test]
    fn words_are_understood_and_later_ones_win() {
        let parameters = Parameters::parse(
            "nestling.mode=shell nestling.ram=50 nestling.forks=7 nestling.seconds=90 nestling.tty=24x80 nestling.mode=check\n",
        );
        assert_eq!(
            parameters,
            Parameters { mode: Mode::Check, ram_percent: 50, seconds: 90, forks: 7, terminal: Some((24, 80)) }
        );
    }

    #[test]
    fn nonsense_leaves_the_defaults() {
        let parameters = Parameters::parse(
            "nestling.mode=chekc nestling.ram=0 nestling.ram=96 nestling.seconds=-1 nestling.forks=x nestling.tty=x nestling.ram",
        );
        assert_eq!(
            parameters,
            Parameters { mode: Mode::Shell, ram_percent: 75, seconds: 0, forks: 200, terminal: None }
        );
    }
}
