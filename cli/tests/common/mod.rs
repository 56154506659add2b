//! What the tests share: running the command as its users do, and small kernels of our own.

use std::{
    ffi::OsStr,
    process::{Command, ExitStatus, Output, Stdio},
};

/// A finished command.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Fails with all that was printed, unless the exit status is `expected`.
    #[track_caller]
    pub(crate) fn expect_status(&self, expected: i32) -> &Self {
        assert_eq!(self.status.code(), Some(expected), "exit status\n{self}");
        self
    }

    /// Fails with all that was printed, unless standard error holds `text`.
    #[track_caller]
    pub(crate) fn expect_stderr(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error holds no {text:?}\n{self}");
        self
    }
}

impl From<Output> for Finished {
    fn from(Output { status, stdout, stderr }: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { status, stdout: text(stdout), stderr: text(stderr) }
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}\n---", self.status, self.stdout, self.stderr)
    }
}

/// The command.
pub(crate) fn nestling() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
    command.stdin(Stdio::null());
    command
}

/// `nestling run` with these arguments, to its end. The command itself keeps a time limit.
pub(crate) fn run<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Finished {
    subcommand("run", arguments)
}

/// A subcommand with these arguments, to its end.
pub(crate) fn subcommand<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Finished {
    nestling().arg(name).args(arguments).output().expect("the command can be started").into()
}
