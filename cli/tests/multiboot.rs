//! Multiboot guests: the test kernel's checks with one and with four vCPUs, and what is refused.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/kernel.rs"]
mod kernel;
#[path = "common/machine.rs"]
mod machine;

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::Duration,
};

use common::{Finished, nestling, run, subcommand};
use files::path;
use kernel::kernel;
use machine::one_machine_at_a_time;
use rustix::process::{Pid, Signal, kill_process};

/// Seconds. A check takes a hundredth of it on an idle machine.
const LIMIT: &str = "240";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The test kernel, built once.
fn test_kernel() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the command is in a source tree");
        let target = path("test-kernel");
        let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(root)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .args([
                "build",
                "--profile",
                "bare-metal",
                "--package",
                "nestling-testkernel",
                "--bin",
                "nestling-testkernel",
            ])
            .args(["--features", "bare-metal", "--target", TARGET, "--target-dir"])
            .arg(&target)
            .output()
            .expect("cargo can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        target.join(TARGET).join("bare-metal/nestling-testkernel")
    })
}

/// Runs an image on its own: other tests' machines wait.
fn boot(image: &Path, arguments: &[&str]) -> Finished {
    let _machine = one_machine_at_a_time();
    let image = image.to_str().expect("a path in text");
    run([&["--multiboot", image, "--memory", "64M", "--timeout", LIMIT], arguments].concat())
}

/// The suite, or the check, passes with one vCPU and with four, on nested and on shadow tables.
fn passes(check: &str) {
    for (vcpus, mmu) in [("1", "npt"), ("4", "npt"), ("1", "shadow"), ("4", "shadow")] {
        let words = if mmu == "shadow" { format!("{check} no-tasks") } else { check.to_owned() };
        let finished = boot(test_kernel(), &["--append", &words, "--vcpus", vcpus, "--mmu", mmu]);
        finished.expect_status(1);
        let lines: Vec<_> = finished.stdout.lines().collect();
        assert!(lines.contains(&format!("{check}: {vcpus} processors").as_str()), "{finished}");
        assert!(lines.contains(&format!("PASS: {check}").as_str()), "{finished}");
        assert!(!finished.stderr.contains("LEAK"), "{finished}");
    }
}

#[test]
fn what_a_loader_hands_over() {
    passes("image");
}

#[test]
fn devices() {
    passes("devices");
}

#[test]
fn modes_of_the_cpu() {
    passes("cpu");
}

#[test]
fn instructions_on_device_memory() {
    passes("emulation");
}

#[test]
fn delivery_of_events() {
    passes("delivery");
}

#[test]
fn sleep_and_wake() {
    passes("sleep");
}

/// Random machine code, guest after guest: the hypervisor ends them all, and nothing of them is left.
#[test]
fn random_guests_leave_nothing_behind() {
    let _machine = one_machine_at_a_time();
    let report = path("random.json");
    let text = report.to_str().expect("a path in text");
    let arguments = ["--seed", "1", "--guests", "40", "--seconds", "120", "--slice", "200", "--report", text];
    let finished = subcommand("fuzz", arguments);
    finished.expect_status(0);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).expect("a report")).expect("JSON");
    // Where QEMU died, its guests are counted no further than they were told of.
    let whole = report["emulator_deaths"].as_array().is_some_and(Vec::is_empty);
    assert!(report["guests"] == 40 || !whole, "{report}\n{finished}");
    assert_eq!(report["leaks"].as_array().map(Vec::len), Some(0), "{report}");
}

/// Cases of paging, on the CPU alone and as a guest: error codes, CR2, marks and data are the same, and the manuals'. So many
/// of each of four kinds of paging: the emulated CPU has all of them.
fn walks_as_the_cpu_alone_does(mmu: &str, cases: u64) {
    let _machine = one_machine_at_a_time();
    let finished = subcommand("conformance", ["--mmu", mmu, "--cases", &cases.to_string(), "--timeout", LIMIT]);
    finished.expect_status(0);
    assert!(finished.stdout.ends_with(&format!("{} cases, 0 differences\n", 4 * cases)), "{finished}");
}

#[test]
fn a_guest_walks_its_tables_as_the_cpu_alone_does() {
    walks_as_the_cpu_alone_does("npt", 20_000);
    subcommand("conformance", ["--paging", "long4,real"]).expect_status(2).expect_stderr("long5");
}

/// Nearly each of these cases is a few exits.
#[test]
fn shadow_tables_are_what_the_cpu_would_have_made_of_the_guests() {
    walks_as_the_cpu_alone_does("shadow", 2_000);
}

#[test]
fn a_module_arrives_whole() {
    let module = path("module.env");
    fs::write(&module, "NR_CPUS=4\nTEST_DEVICE=1\n").expect("a file");
    let module = module.to_str().expect("a path in text");
    boot(test_kernel(), &["--append", "platform module", "--initrd", module, "--vcpus", "1"]).expect_status(1);
}

#[test]
fn no_other_end_looks_like_a_pass() {
    let status = |words: &str| boot(test_kernel(), &["--append", words, "--vcpus", "2"]);
    status("fail").expect_status(3);
    status("no-such-check").expect_status(5);
    status("shutdown").expect_status(0);
    status("triple").expect_status(70).expect_stderr("triple fault");
}

#[test]
fn images_that_cannot_be_loaded_are_refused() {
    let file = |name: &str, content: &[u8]| {
        let path = path(name);
        fs::write(&path, content).expect("a file");
        path
    };
    boot(&file("linux.flat", &kernel(&[0xf4])), &[]).expect_status(2).expect_stderr("not a Multiboot image");
    boot(&file("empty.flat", b""), &[]).expect_status(2);
    boot(&path("none.flat"), &[]).expect_status(2);
    let video: Vec<u8> =
        [0x1bad_b002_u32, 4, 0u32.wrapping_sub(0x1bad_b002 + 4)].iter().flat_map(|word| word.to_le_bytes()).collect();
    boot(&file("video.flat", &video), &[]).expect_status(72).expect_stderr("demands what is not there");
    boot(test_kernel(), &["--kernel", "x"]).expect_status(2);
    boot(test_kernel(), &["--mode", "check"]).expect_status(2);
}

#[test]
fn whatever_a_guest_asks_the_machine_goes_on() {
    passes("hostile");
}

/// The machine has other work, or somebody stopped the terminal: for some seconds the command takes nothing, while the guest
/// comes to its end. Nothing of what is said then is lost, the last word least of all.
#[test]
fn a_command_that_stands_still_for_a_while_misses_nothing() {
    let _machine = one_machine_at_a_time();
    let image = test_kernel().to_str().expect("a path in text");
    let mut child = nestling()
        .args([
            "run",
            "--multiboot",
            image,
            "--memory",
            "64M",
            "--timeout",
            LIMIT,
            "--vcpus",
            "1",
            "--append",
            "hostile",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command can be started");
    let mut console = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut said = String::new();
    console.read_line(&mut said).expect("text");
    let command = Pid::from_child(&child);
    kill_process(command, Signal::STOP).expect("it runs");
    thread::sleep(Duration::from_secs(3));
    kill_process(command, Signal::CONT).expect("it is there");
    console.read_to_string(&mut said).expect("text");
    let finished = Finished { stdout: said, ..child.wait_with_output().expect("it ends").into() };
    finished.expect_status(1);
    assert!(finished.stdout.contains("PASS: hostile"), "{finished}");
}
