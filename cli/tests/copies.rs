//! Copies of running guests: snapshots, and what is not one.
//!
//! A guest that keeps checking itself is copied while it does; it and its copy both have to find themselves right afterwards.

mod common;
#[path = "common/machine.rs"]
mod machine;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, ChildStdout, Stdio},
};

use common::{nestling, run};
use machine::one_machine_at_a_time;
use rustix::process::{Pid, Signal, kill_process};

/// Seconds. A run takes a tenth of it on an idle machine.
const LIMIT: &str = "240";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// A guest under way, and its console.
struct Running {
    child: Child,
    console: BufReader<ChildStdout>,
    seen: String,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
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
    fn wait_for(&mut self, wanted: &str) {
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
    fn expect_good(mut self) {
        self.wait_for("memory: round 1");
        self.wait_for(" times good");
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
        while self.console.read_line(&mut self.seen).expect("text") > 0 {}
        assert!(!self.seen.contains("FAIL"), "{}", self.seen);
        assert_eq!(self.child.wait().expect("ends").code(), Some(128 + 15), "{}", self.seen);
    }
}

#[test]
fn a_guest_and_its_snapshot_both_go_on() {
    let _machine = one_machine_at_a_time();
    let file = path("guest.snapshot");
    let file = file.to_str().expect("text");
    let name = format!("snapshot-test-{}", std::process::id());
    let run_report = path("snapshot-run.json");
    let run_report = run_report.to_str().expect("text");
    let what = ["--vcpus", "2", "--memory", "128M", "--append", "nestling.seconds=1000"];
    let mut guest = Running::start(&[&["--name", &name, "--report", run_report], &what[..]].concat());
    guest.wait_for("memory: round 1");
    let twice = nestling().args(["run", "--name", &name, "--vcpus", "1"]).output().expect("started");
    assert_eq!(twice.status.code(), Some(2), "a name that is taken: {twice:?}");
    let report = path("snapshot.json");
    let report = report.to_str().expect("text");
    let taken = nestling().args(["snapshot", file, "--name", &name, "--report", report]).output().expect("started");
    let said = String::from_utf8_lossy(&taken.stderr);
    assert_eq!(taken.status.code(), Some(0), "{said}");
    assert!(said.contains("the guest stood still for"), "{said}");
    let report = fs::read_to_string(report).expect("written");
    let figures: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    for figure in ["total_s", "downtime_s", "pages", "bytes"] {
        assert!(figures[figure].as_f64().is_some_and(|value| value > 0.0), "{figure} in {report}");
    }
    guest.expect_good();
    // Its log is off again, and what was split for it is whole.
    let figures: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(run_report).expect("written")).expect("JSON");
    let mapped = |size: &str| figures["mapped_bytes"][size].as_f64().unwrap_or_else(|| panic!("{size} in {figures}"));
    assert!(mapped("2M") > 99.0 * mapped("4K"), "{figures}");

    Running::start(&["--restore", file]).expect_good();

    // What is no good snapshot is an error with a name, whether that is seen at once or on the way.
    let good = fs::read(file).expect("read");
    let refused = |name: &str, change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let file = path(name);
        fs::write(&file, bytes).expect("written");
        run(["--timeout", LIMIT, "--restore", file.to_str().expect("text")]).expect_status(2).expect_stderr(expected);
    };
    refused("empty.snapshot", &|bytes| bytes.clear(), "not a copy of a guest");
    refused("version.snapshot", &|bytes| bytes[8] += 1, "a copy of version");
    refused("header.snapshot", &|bytes| bytes[30] ^= 1, "damaged in record 0");
    // This is met on the way, when a machine waits for the rest.
    refused("cut.snapshot", &|bytes| bytes.truncate(bytes.len() / 2), "cut off in record");
}

#[test]
fn what_nobody_runs_cannot_be_copied() {
    let nobody = |arguments: &[&str]| nestling().args(arguments).output().expect("started");
    let output = nobody(&["snapshot", "x", "--name", "nobody-has-this-name"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no guest at"), "{output:?}");
    let both = run(["--restore", "x", "--vcpus", "2"]);
    both.expect_status(2).expect_stderr("cannot be used with");
    run(["--restore", "/dev/null"]).expect_status(2).expect_stderr("not a copy of a guest");
    run(["--name", "a/b"]).expect_status(2);
}
