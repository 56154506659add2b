//! Boots, judged as a user judges them: by what the command prints, returns and reports.
//!
//! One machine runs at a time, each with a time limit; whatever fails shows the console. What a boot needs and is not
//! there, the command installs, fetches and builds by itself.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/kernel.rs"]
mod kernel;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/report.rs"]
mod report;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    process::Stdio,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use common::{Finished, nestling, run};
use files::path;
use kernel::kernel;
use machine::one_machine_at_a_time;
use report::{number, reported};
use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, tcgetattr},
};
use serde_json::Value;

/// Seconds. A boot takes a tenth of it on an idle machine.
const LIMIT: &str = "240";

fn sum(report: &Value, table: &str) -> u64 {
    report[table].as_object().into_iter().flatten().filter_map(|(_, count)| count.as_u64()).sum()
}

/// The default guest passes its self-check, and everything it had is given back.
fn boots(name: &str, vcpus: u64, mebibytes: u64, huge_pages: &str) -> Value {
    let (finished, report) = reported(
        name,
        &["--vcpus", &vcpus.to_string(), "--memory", &format!("{mebibytes}M"), "--huge-pages", huge_pages],
    );
    finished.expect_status(0);
    let lines: Vec<_> = finished.stdout.lines().collect();
    assert!(lines.iter().any(|line| line.starts_with("nestling-selfcheck: PASS")), "no PASS line\n{finished}");
    let cpus = format!("nestling-selfcheck: {vcpus} CPUs");
    assert!(lines.iter().any(|line| line.starts_with(&cpus)), "not {vcpus} CPUs\n{finished}");

    assert_eq!((&report["verdict"], &report["exit_status"]), (&Value::from("pass"), &Value::from(0)), "{report:#}");
    assert_eq!((number(&report, "/vcpus"), number(&report, "/memory_bytes")), (vcpus, mebibytes << 20));
    assert_eq!(number(&report, "/table_frames/left"), 0, "{report:#}");
    assert_eq!(number(&report, "/guest_frames_left"), 0, "{report:#}");
    assert!(number(&report, "/table_frames/peak") > 0 && number(&report, "/touched_bytes") > 0, "{report:#}");
    assert!(sum(&report, "exits") > sum(&report, "faults") && sum(&report, "faults") > 0, "{report:#}");
    for time in ["boot_guest_s", "boot_wall_s"] {
        assert!(report[time].as_f64().is_some_and(|seconds| seconds > 0.0), "no {time} in {report:#}");
    }
    let mapped = sum(&report, "mapped_bytes");
    let touched = number(&report, "/touched_bytes");
    assert!(mapped <= mebibytes << 20 && touched <= mapped, "more than there is: {report:#}");
    report
}

#[test]
fn linux_boots_with_one_vcpu_on_small_pages() {
    let report = boots("one", 1, 256, "none");
    let mapped = &report["mapped_bytes"];
    assert_eq!((number(mapped, "/2M"), number(mapped, "/1G")), (0, 0), "huge pages were off: {report:#}");
}

#[test]
fn linux_boots_with_two_vcpus() {
    boots("two", 2, 512, "2M");
}

#[test]
fn linux_boots_with_four_vcpus_almost_wholly_on_huge_pages() {
    let report = boots("four", 4, 1024, "2M");
    let huge = number(&report, "/mapped_bytes/2M");
    let all = sum(&report, "mapped_bytes");
    assert!(huge * 10 >= all * 9, "{huge} of {all} bytes are mapped by huge pages: {report:#}");
    assert_eq!(number(&report, "/mapped_bytes/1G"), 0, "1 GiB pages were off: {report:#}");
}

#[test]
fn linux_boots_on_gibibyte_pages() {
    let report = boots("gibibyte", 2, 2048, "1G");
    assert!(number(&report, "/mapped_bytes/1G") > 0, "no 1 GiB page: {report:#}");
}

/// The local APIC is handed over as firmware does it: a kernel that must do without it, or without x2APIC mode, can.
#[test]
fn linux_boots_without_its_apic_and_without_x2apic() {
    for (word, vcpus) in [("nolapic", "1"), ("nox2apic", "2")] {
        let (finished, report) = reported(word, &["--vcpus", vcpus, "--memory", "256M", "--append", word]);
        finished.expect_status(0);
        assert_eq!(report["verdict"], "pass", "{report:#}");
    }
}

const STORM: [&str; 5] = ["zap-all", "slot-delete", "slot-move", "move-page", "take-page"];

/// A storm of all kinds while the guest boots and checks itself: the guest does not notice, and all is accounted for.
fn survives(name: &str, seed: &str, huge_pages: &str) {
    // Some hundred operations in the seconds for which the guest repeats its check: far below what would slow it down.
    let storm = STORM.map(|kind| format!("{kind}=8")).join(",");
    let (finished, report) = reported(
        name,
        &[
            "--memory",
            "512M",
            "--huge-pages",
            huge_pages,
            "--storm",
            &storm,
            "--storm-seed",
            seed,
            "--append",
            "nestling.ram=40 nestling.seconds=6",
        ],
    );
    finished.expect_status(0);
    assert_eq!(report["verdict"], "pass", "{report:#}");
    for kind in STORM {
        assert!(number(&report, &format!("/storm/{kind}")) >= 20, "hardly any {kind}: {report:#}");
    }
    assert_eq!(report["storm_seed"].to_string(), seed);
    let zap_alls = number(&report, "/storm/zap-all");
    let freed = number(&report, "/roots_freed");
    assert!(freed >= zap_alls / 2 && freed <= zap_alls * 4, "a root a vCPU and zap at most: {report:#}");
    for counted in ["/retries", "/tlb_flushes", "/kicks", "/longest_lock_hold/ns", "/longest_vcpu_stall/ns"] {
        assert!(number(&report, counted) > 0, "no {counted}: {report:#}");
    }
    for left in ["/table_frames/left", "/guest_frames_left", "/kept_pages_left"] {
        assert_eq!(number(&report, left), 0, "{left}: {report:#}");
    }
}

#[test]
fn linux_survives_a_storm_on_huge_pages() {
    survives("storm-huge", "1", "2M");
}

#[test]
fn linux_survives_a_storm_on_small_pages() {
    survives("storm-small", "2", "none");
}

/// Kernels of a few instructions, each ended by the hypervisor in its own way.
fn small(name: &str, code: &[u8], extra: &[&str]) -> (Finished, Value) {
    let (kernel_path, initrd_path) = (path(&format!("{name}.bzImage")), path(&format!("{name}.initrd")));
    fs::write(&kernel_path, kernel(code)).expect("written");
    fs::write(&initrd_path, b"no archive").expect("written");
    let mut arguments = vec!["--memory", "64M", "--vcpus", "1", "--kernel"];
    arguments.extend([kernel_path.to_str().expect("text"), "--initrd", initrd_path.to_str().expect("text")]);
    arguments.extend(extra);
    reported(name, &arguments)
}

#[test]
fn a_guests_own_status_is_passed_on() {
    // mov eax, 21; mov dx, 0xf4; out dx, eax; hlt
    let (finished, report) = small("status", &[0xb8, 21, 0, 0, 0, 0x66, 0xba, 0xf4, 0, 0xef, 0xf4, 0xeb, 0xfd], &[]);
    finished.expect_status(43);
    assert_eq!((&report["end"], &report["verdict"]), (&Value::from("debug-exit"), &Value::from("fail")));
    assert_eq!(number(&report, "/guest_frames_left") + number(&report, "/table_frames/left"), 0, "{report:#}");
}

#[test]
fn a_guest_that_dies_leaves_a_clear_report() {
    // lidt of an empty table (limit 0 on the stack); ud2: no handler, no handler for that, triple fault.
    // push 0; push 0; lidt [rsp]; ud2
    let (finished, report) = small("dies", &[0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b], &[]);
    finished.expect_status(70);
    for text in ["the guest died", "rip", "cr3", "nested walk", "last exits"] {
        finished.expect_stderr(text);
    }
    assert_eq!(report["end"], "died");
    let state = &report["death"]["vcpus"][0];
    assert!(number(state, "/registers/cr3") > 0, "{report:#}");
    assert_eq!(number(&report, "/guest_frames_left") + number(&report, "/table_frames/left"), 0, "{report:#}");
}

#[test]
fn a_guest_that_says_nothing_fails_the_check() {
    // cli; jmp $: neither an end nor a word.
    let (finished, report) = small("silent", &[0xfa, 0xeb, 0xfe], &["--mode", "check", "--timeout", "5"]);
    finished.expect_status(74).expect_stderr("no end within 5 s");
    assert_eq!((&report["end"], &report["verdict"]), (&Value::from("timeout"), &Value::from("fail")));
}

#[test]
fn a_guest_that_resets_without_a_verdict_fails_the_check_only() {
    // mov al, 0xfe; out 0x64, al: the keyboard controller's reset line; hlt
    let code = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    small("resets-in-check", code, &["--mode", "check"]).0.expect_status(64);
    small("resets", code, &["--mode", "shell"]).0.expect_status(0);
}

#[test]
fn a_machine_that_is_no_hypervisor_is_an_error_of_its_own() {
    let _machine = one_machine_at_a_time();
    // An ELF program for this machine without the note QEMU wants.
    let finished = run(["--hypervisor", env!("CARGO_BIN_EXE_nestling"), "--timeout", LIMIT]);
    finished.expect_status(72).expect_stderr("PVH");
}

#[test]
fn a_person_gets_a_shell_and_ctrl_a_x_leaves_it() {
    let _machine = one_machine_at_a_time();
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
    grantpt(&controller).expect("granted");
    unlockpt(&controller).expect("unlocked");
    let name = ptsname(&controller, Vec::new()).expect("a name").into_string().expect("text");
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NOCTTY.bits().cast_signed())
        .open(name)
        .expect("opens");
    let before = tcgetattr(&terminal).expect("a terminal");
    assert!(before.local_modes.contains(LocalModes::ECHO | LocalModes::ICANON));
    let share = |file: &File| Stdio::from(file.try_clone().expect("shared"));
    let mut child = nestling()
        .args(["run", "--vcpus", "2", "--memory", "256M", "--timeout", LIMIT])
        .stdin(share(&terminal))
        .stdout(share(&terminal))
        .stderr(Stdio::inherit())
        .spawn()
        .expect("starts");

    let mut keyboard = File::from(controller);
    let mut screen = Screen::new(keyboard.try_clone().expect("shared"));
    screen.wait_for("guest:/# ");
    // Written so that the echo of what is typed is not the answer.
    keyboard.write_all(b"echo $((6*7))-$(nproc)\r").expect("typed");
    screen.wait_for("42-2");
    assert!(!tcgetattr(&terminal).expect("a terminal").local_modes.contains(LocalModes::ECHO), "raw while it runs");
    keyboard.write_all(b"\x01x").expect("typed");
    let status = child.wait().expect("ends");
    let after = tcgetattr(&terminal).expect("a terminal");
    assert_eq!(status.code(), Some(0), "{}", screen.text);
    assert_eq!(after.local_modes, before.local_modes, "the terminal is as it was");
    assert_eq!((after.input_modes, after.output_modes), (before.input_modes, before.output_modes));
}

/// What a terminal has shown.
struct Screen {
    bytes: mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Screen {
    fn new(mut from: File) -> Self {
        let (sender, bytes) = mpsc::channel();
        thread::spawn(move || {
            let mut chunk = [0; 1024];
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                if sender.send(chunk[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { bytes, text: String::new() }
    }

    #[track_caller]
    fn wait_for(&mut self, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(LIMIT.parse().expect("a number"));
        while !self.text.contains(wanted) {
            match self.bytes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(cause) => panic!("{cause}: no {wanted:?} in\n{}", self.text),
            }
        }
    }
}
