//! Copies of running guests: snapshots, and what is not one.
//!
//! A guest that keeps checking itself is copied while it does; it and its copy both have to find themselves right afterwards.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/running.rs"]
mod running;

use std::fs;

use common::{nestling, run};
use files::path;
use machine::one_machine_at_a_time;
use nestling_cli::copy::stream::{Reader, Record, Writer};
use nestling_control::config::GuestKind;
use running::{LIMIT, Running};

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
    for figure in ["total_s", "downtime_s", "pages", "bytes", "longest_vcpu_stall_s"] {
        assert!(figures[figure].as_f64().is_some_and(|value| value > 0.0), "{figure} in {report}");
    }
    // What was on huge pages is there again, and by being put there in place: no fault waited for it.
    let [before, after, made] =
        ["before", "after", "made"].map(|when| figures[format!("huge_bytes_{when}")].as_f64().expect("a figure"));
    assert!(before > 0.0 && after >= 0.99 * before && made >= 0.99 * before, "{report}");
    guest.expect_good();
    // Its log is off again, and what was split for it is whole.
    let figures: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(run_report).expect("written")).expect("JSON");
    let mapped = |size: &str| figures["mapped_bytes"][size].as_f64().unwrap_or_else(|| panic!("{size} in {figures}"));
    assert!(mapped("2M") > 99.0 * mapped("4K"), "{figures}");

    Running::start(&["--restore", file]).expect_good();

    refusals(&fs::read(file).expect("read"));
}

/// What is no good snapshot is an error with a name, whether that is seen at once or on the way.
fn refusals(good: &[u8]) {
    let refused_as = |status: i32, name: &str, bytes: Vec<u8>, expected: &str| {
        let file = path(name);
        fs::write(&file, bytes).expect("written");
        let restored = run(["--timeout", LIMIT, "--restore", file.to_str().expect("text")]);
        restored.expect_status(status).expect_stderr(expected);
        fs::remove_file(file).expect("removed");
    };
    let refused = |name: &str, bytes: Vec<u8>, expected: &str| refused_as(2, name, bytes, expected);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.to_vec();
        change(&mut bytes);
        bytes
    };
    refused("empty.snapshot", Vec::new(), "not a copy of a guest");
    refused("version.snapshot", changed(&|bytes| bytes[8] += 1), "a copy of version");
    refused("header.snapshot", changed(&|bytes| bytes[30] ^= 1), "damaged in record 0");
    let too_large = rewritten(good, &|record| {
        if let Record::Header(header) = record {
            header.config.memory_bytes = 256 << 30;
        }
    });
    refused_as(76, "too-large.snapshot", too_large, "of host memory");
    // These are met on the way, when a machine waits for the rest.
    refused("cut.snapshot", changed(&|bytes| bytes.truncate(bytes.len() / 2)), "cut off in record");
    let [near, far] = [good.len() / 3, good.len() - 100];
    refused("flipped.snapshot", changed(&|bytes| bytes[near] ^= 0x10), "damaged in record");
    refused("flipped-late.snapshot", changed(&|bytes| bytes[far] ^= 0x80), "damaged in record");
    refused("other-state.snapshot", rewritten(good, &in_state(&|state| state.version += 1)), "state of version");
    let other_cpu = in_state(&|state| {
        let [_, eax, ebx, ecx, edx] = &mut state.features[0];
        let feature = [edx, ecx, ebx, eax].into_iter().find(|features| **features > 1).expect("the CPU has features");
        *feature ^= 1;
    });
    refused("other-cpu.snapshot", rewritten(good, &other_cpu), "a CPU with other features");
}

/// A snapshot with its records changed, and whole again.
fn rewritten(good: &[u8], change: &dyn Fn(&mut Record)) -> Vec<u8> {
    let mut reader = Reader::new(good).expect("a copy");
    let mut writer = Writer::new(Vec::new()).expect("memory takes everything");
    loop {
        let mut record = reader.read().expect("a record");
        change(&mut record);
        writer.write(&record).expect("memory takes everything");
        if matches!(record, Record::End(_)) {
            return writer.into_inner();
        }
    }
}

/// What the state of a machine begins with.
#[derive(serde::Serialize, serde::Deserialize)]
struct StateHead {
    version: u32,
    kind: GuestKind,
    memory_bytes: u64,
    vcpus: u32,
    features: Vec<[u32; 5]>,
}

/// Changes what the state of the machine begins with, and not how long it is.
fn in_state(change: &dyn Fn(&mut StateHead)) -> impl Fn(&mut Record) {
    move |record| {
        let Record::State(bytes) = record else { return };
        let (mut head, rest) = postcard::take_from_bytes::<StateHead>(bytes).expect("a state's first piece");
        change(&mut head);
        let changed = [&postcard::to_allocvec(&head).expect("memory")[..], rest].concat();
        assert_eq!(changed.len(), bytes.len());
        *bytes = changed;
    }
}

/// A storm goes on around a copy, and the guest in it: only slots are left where they are.
#[test]
fn a_guest_in_a_storm_is_copied_behind_its_logs() {
    let _machine = one_machine_at_a_time();
    let [file, report] = ["storm.snapshot", "storm-snapshot.json"].map(|name| path(name).display().to_string());
    let name = format!("storm-snapshot-test-{}", std::process::id());
    let storm = ["zap-all", "slot-delete", "slot-move", "move-page", "take-page", "dirty-log", "split"];
    let storm = storm.map(|kind| format!("{kind}=5")).join(",");
    let what = ["--vcpus", "2", "--memory", "128M", "--append", "nestling.seconds=1000", "--storm", &storm];
    let mut guest = Running::start(&[&["--name", &name], &what[..]].concat());
    guest.wait_for("memory: round 1");
    for _ in 0..2 {
        let taken =
            nestling().args(["snapshot", &file, "--name", &name, "--report", &report]).output().expect("started");
        assert_eq!(taken.status.code(), Some(0), "{}", String::from_utf8_lossy(&taken.stderr));
        let report = fs::read_to_string(&report).expect("written");
        let figures: serde_json::Value = serde_json::from_str(&report).expect("JSON");
        let [rounds, pages, last] = ["rounds", "pages", "last_pages"].map(|name| figures[name].as_u64().expect(name));
        assert!(rounds > 0 && last < pages / 2, "the guest stood still for most of it: {report}");
        guest.wait_for("memory: round");
    }
    guest.expect_good();
    Running::start(&["--restore", &file]).expect_good();
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
