//! Guests on shadow tables, with nested paging off: they boot, find themselves right under a storm and as copies, and
//! leave nothing behind.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/report.rs"]
mod report;
#[path = "common/running.rs"]
mod running;

use common::{Finished, nestling, run};
use files::path;
use machine::one_machine_at_a_time;
use report::{number, reported};
use running::Running;
use serde_json::Value;

/// A run on shadow tables, which passes.
fn passes(name: &str, arguments: &[&str]) -> (Finished, Value) {
    let (finished, report) = reported(&format!("shadow-{name}"), &[&["--mmu", "shadow"], arguments].concat());
    finished.expect_status(0);
    assert!(finished.stdout.contains("nestling-selfcheck: PASS"), "no PASS line\n{finished}");
    (finished, report)
}

/// It was shadow paging that ran the guest, and no page, mapping, handle or frame of it is left.
#[track_caller]
fn shadowed(report: &Value) {
    assert_eq!(report["mmu"], "shadow", "{report:#}");
    assert!(report["exits"]["npf"].is_null(), "nested paging is off: {report:#}");
    for counted in ["/exits/page_fault", "/exits/cr_write", "/exits/invlpg", "/table_frames/peak", "/shadow/book_bytes"]
    {
        assert!(number(report, counted) > 0, "no {counted}: {report:#}");
    }
    let left = ["/shadow/pages_left", "/shadow/mappings_left", "/shadow/handles_left"];
    for left in left.into_iter().chain(["/table_frames/left", "/guest_frames_left", "/kept_pages_left"]) {
        assert_eq!(number(report, left), 0, "{left}: {report:#}");
    }
}

#[test]
fn linux_boots_on_shadow_tables() {
    for vcpus in ["1", "4"] {
        let (finished, report) = passes("boot", &["--vcpus", vcpus, "--memory", "192M"]);
        assert!(finished.stdout.contains(&format!("nestling-selfcheck: {vcpus} CPUs")), "{finished}");
        shadowed(&report);
        // (Of a storm's guest, the last zap-all may have come when it had switched itself off.)
        assert!(number(&report, "/shadow/pages") > 0, "{report:#}");
        let touched = number(&report, "/touched_bytes");
        let [small, large] = ["/mapped_bytes/4K", "/mapped_bytes/2M"].map(|size| number(&report, size));
        assert!(touched > 0 && large > 0 && small + large >= touched, "{report:#}");
    }
}

const STORM: [&str; 7] = ["zap-all", "slot-delete", "slot-move", "move-page", "take-page", "dirty-log", "split"];

#[test]
fn linux_on_shadow_tables_survives_a_storm() {
    // Each takes back what the guest has just faulted in: the rates are those at which it still gets on. How long one
    // check takes is the machine's affair, so the guest repeats it for long enough that each kind comes up often.
    let storm = STORM.map(|kind| format!("{kind}=2")).join(",");
    let arguments = ["--vcpus", "2", "--memory", "128M", "--append", "nestling.ram=20 nestling.seconds=10"];
    let (_, report) = passes("storm", &[&arguments[..], &["--storm", &storm, "--storm-seed", "3"]].concat());
    shadowed(&report);
    for kind in STORM.iter().filter(|kind| **kind != "split") {
        assert!(number(&report, &format!("/storm/{kind}")) >= 8, "hardly any {kind}: {report:#}");
    }
    for counted in ["/roots_freed", "/retries", "/tlb_flushes", "/kicks"] {
        assert!(number(&report, counted) > 0, "no {counted}: {report:#}");
    }
}

/// A guest on shadow tables is copied while it checks itself; both go on, the copy on tables of either kind.
#[test]
fn a_copy_goes_on_whatever_tables_it_gets() {
    let _machine = one_machine_at_a_time();
    let (file, name) = (path("shadow.snapshot"), format!("shadow-test-{}", std::process::id()));
    let file = file.to_str().expect("a path in text");
    let what = ["--vcpus", "2", "--memory", "128M", "--append", "nestling.seconds=1000"];
    let mut guest = Running::start(&[&["--mmu", "shadow", "--name", &name], &what[..]].concat());
    guest.wait_for("memory: round 1");
    let taken = nestling().args(["snapshot", file, "--name", &name]).output().expect("started");
    assert_eq!(taken.status.code(), Some(0), "{}", String::from_utf8_lossy(&taken.stderr));
    guest.expect_good();
    for mmu in ["shadow", "npt"] {
        Running::start(&["--restore", file, "--mmu", mmu]).expect_good();
    }
}

#[test]
fn what_is_no_kind_of_tables_is_refused() {
    run(["--mmu", "ept"]).expect_status(2).expect_stderr("--mmu");
}
