//! A guest that runs while the test does something to it.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::nestling;

/// Seconds. A run takes a tenth of it on an idle machine.
pub(crate) const LIMIT: &str = "280";

/// A guest under way, and its console.
pub(crate) struct Running {
    child: Child,
    console: BufReader<ChildStdout>,
    seen: String,
}

impl Running {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut child = nestling()
            .args(["run", "--timeout", LIMIT])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command can be started");
        let console = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, console, seen: String::new() }
    }

    /// Reads the console up to a line that holds `wanted`.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, wanted: &str) {
        let mut line = String::new();
        while self.console.read_line(&mut line).expect("text") > 0 {
            self.seen += &line;
            if line.contains(wanted) {
                return;
            }
            line.clear();
        }
        panic!("no {wanted:?} in\n{}", self.seen);
    }

    /// The guest must find itself right once more, from the first to the last of its checks. Then it is ended.
    #[track_caller]
    pub(crate) fn expect_good(mut self) {
        self.wait_for("memory: round 1");
        self.wait_for(" times good");
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
        while self.console.read_line(&mut self.seen).expect("text") > 0 {}
        assert!(!self.seen.contains("FAIL"), "{}", self.seen);
        assert_eq!(self.child.wait().expect("ends").code(), Some(128 + 15), "{}", self.seen);
    }
}
