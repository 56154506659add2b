//! Runs whose report is looked at.

use std::fs;

use serde_json::Value;

use crate::common::{Finished, run};
use crate::files::path;
use crate::machine::one_machine_at_a_time;

/// Seconds. A run takes a tenth of it on an idle machine.
const LIMIT: &str = "280";

/// A run to its end, while no other test runs a machine, and its report, in a file of that name.
pub(crate) fn reported(name: &str, arguments: &[&str]) -> (Finished, Value) {
    let _machine = one_machine_at_a_time();
    let path = path(&format!("{name}.json"));
    let path = path.to_str().expect("a path in text");
    // What an earlier run left would pass for this one's.
    let _ = fs::remove_file(path);
    let finished = run([&["--timeout", LIMIT, "--report", path], arguments].concat());
    let text = fs::read_to_string(path).unwrap_or_default();
    let report = serde_json::from_str(&text).unwrap_or_else(|cause| panic!("report: {cause}: {text:?}\n{finished}"));
    (finished, report)
}

/// A count in a report.
#[track_caller]
pub(crate) fn number(report: &Value, pointer: &str) -> u64 {
    report.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no number {pointer} in {report:#}"))
}
