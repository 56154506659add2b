//! What memory management costs, held against what it cost: the emulator counts instructions, so that a figure which has
//! become worse is the code's doing and not the machine's.

mod common;

use std::{env, fs, path::Path};

use common::subcommand;

/// The figures that are allowed, and how much more may come with a change before it brings figures of its own. To renew:
/// `nestling bench --only nestling --json bench/baseline.json`.
const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/baseline.json");
const TOLERANCE: &str = "5";

#[test]
fn nothing_costs_more_than_it_did() {
    let finished = subcommand("bench", ["--only", "nestling", "--baseline", BASELINE, "--tolerance", TOLERANCE]);
    finished.expect_status(0);
    assert!(finished.stdout.contains("write_fault"), "{finished}");
}

#[test]
fn a_baseline_that_cannot_be_used_is_refused_before_anything_is_measured() {
    let missing = subcommand("bench", ["--baseline", "/nowhere/baseline.json"]);
    missing.expect_status(2).expect_stderr("/nowhere/baseline.json");
    let other = subcommand("bench", ["--baseline", BASELINE, "--pages", "64"]);
    other.expect_status(2).expect_stderr("--pages 64");
    let garbled = Path::new(env!("CARGO_TARGET_TMPDIR")).join("garbled.json");
    fs::write(&garbled, "{\"pages\": 4096").expect("written");
    subcommand("bench", ["--baseline".as_ref(), garbled.as_os_str()]).expect_status(2);
}
