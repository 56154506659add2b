//! What memory management costs, held against what it cost: the emulator counts instructions, so that a figure which has
//! become worse is the code's doing and not the machine's.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// The figures that are allowed, and how much more may come with a change before it brings figures of its own. To renew:
/// `nestling bench --only nestling --json bench/baseline.json`.
const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/baseline.json");
const TOLERANCE: &str = "5";

/// Fails with all that was printed, unless the measurement ends with this status and its words hold this. What was printed.
#[track_caller]
fn expect(arguments: &[&str], status: i32, words: &str) -> String {
    let command = env!("CARGO_BIN_EXE_nestling");
    let output = Command::new(command).arg("bench").args(arguments).stdin(Stdio::null()).output().expect("it starts");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains(words), "nothing of {words:?}\n{said}");
    said
}

#[test]
fn nothing_costs_more_than_it_did() {
    let arguments = ["--only", "nestling", "--baseline", BASELINE, "--tolerance", TOLERANCE];
    expect(&arguments, 0, "nothing costs more");
}

#[test]
fn a_baseline_that_cannot_be_used_is_refused_before_anything_is_measured() {
    expect(&["--baseline", "/nowhere/baseline.json"], 2, "/nowhere/baseline.json");
    expect(&["--baseline", BASELINE, "--pages", "64"], 2, "--pages 64");
    let garbled = Path::new(env!("CARGO_TARGET_TMPDIR")).join("garbled.json");
    fs::write(&garbled, "{\"pages\": 4096").expect("written");
    expect(&["--baseline", garbled.to_str().expect("a path in text")], 2, "garbled.json");
}

/// What functions took is what the guest or the hypervisor measured, but for what lies between the mark and their clock.
#[test]
fn where_instructions_go_is_said_by_function_and_adds_up() {
    for (mmu, figure) in [("npt", "zap_all"), ("npt", "vm_destroy"), ("shadow", "vm_destroy"), ("shadow", "invlpg")] {
        let said = expect(&["--profile", figure, "--mmu", mmu, "--pages", "512"], 0, "instructions each");
        let each = format!("{figure}: ");
        let each = said.lines().find_map(|line| line.strip_prefix(&each)?.split(' ').next()?.parse::<f64>().ok());
        let each = each.unwrap_or_else(|| panic!("no {figure}\n{said}"));
        let by_function = said.lines().filter(|line| line.starts_with(' '));
        let sum: f64 = by_function.filter_map(|line| line.split_whitespace().next()?.parse::<f64>().ok()).sum();
        assert!((sum / each - 1.0).abs() < 0.1, "{figure}: {sum} of {each}\n{said}");
    }
}

#[test]
fn what_is_not_measured_is_not_followed() {
    expect(&["--profile", "no-such-thing"], 2, "cr3_reload_unsync");
    expect(&["--profile", "split_2m", "--mmu", "shadow"], 2, "no such operation");
    expect(&["--profile", "book_bytes_per_gib"], 2, "no such operation");
}
