//! Images: booted by GRUB on a machine of their own, judged by what that machine's first serial port and QEMU's status say;
//! and what is refused, with nothing left behind.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/kernel.rs"]
mod kernel;
#[path = "common/machine.rs"]
mod machine;

use std::{
    env, fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Finished, nestling, run};
use files::path;
use kernel::kernel;
use machine::one_machine_at_a_time;
use nestling_cli::{progress::Progress, setup};

/// A boot takes a twentieth of it on an idle machine.
const LIMIT: Duration = Duration::from_secs(240);
/// mov al, 0xfe; out 0x64, al: the keyboard controller's reset line; hlt
const RESETS: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// A program for this machine, and no hypervisor: for images that are never booted.
const SOME_PROGRAM: &str = env!("CARGO_BIN_EXE_nestling");

/// `nestling image` with these arguments, to its end.
fn image(file: &Path, arguments: &[&str], search: Option<&str>) -> Finished {
    let mut command = nestling();
    command.arg("image").arg(file).args(arguments);
    if let Some(search) = search {
        command.env("PATH", search);
    }
    command.output().expect("the command can be started").into()
}

/// Files of a guest of a few instructions.
fn small_guest(name: &str, code: &[u8]) -> [String; 2] {
    [("bzImage", kernel(code)), ("initrd", b"no archive".to_vec())].map(|(kind, content)| {
        let file = path(&format!("image-{name}.{kind}"));
        fs::write(&file, content).expect("a file");
        file.to_str().expect("a path in text").to_owned()
    })
}

/// Boots an image as a CD in a machine with as many CPUs, to its end. The console is what standard output holds.
fn boot(image: &Path, cpus: u32, mebibytes: u64, firmware: &[&str]) -> Finished {
    let _machine = one_machine_at_a_time();
    let qemu = setup::qemu(Progress::Lines).expect("QEMU");
    let mut machine = Command::new(qemu)
        .args(["-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-serial", "stdio"])
        .args(["-smp", &cpus.to_string(), "-m", &format!("{mebibytes}M")])
        .args(firmware)
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-cdrom"])
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("QEMU starts");
    fn text(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).replace('\r', "")
        })
    }
    let console = text(machine.stdout.take().expect("a pipe"));
    let errors = text(machine.stderr.take().expect("a pipe"));
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match machine.try_wait().expect("a status") {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                machine.kill().expect("killed");
                machine.wait().expect("ended");
                break None;
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    };
    let [stdout, stderr] = [console, errors].map(|reader| reader.join().expect("read"));
    let Some(status) = status else {
        panic!("no end within {LIMIT:?}\n--- console\n{stdout}\n--- QEMU\n{stderr}\n---")
    };
    Finished { status, stdout, stderr }
}

#[track_caller]
fn expect_line(booted: &Finished, start: &str) {
    assert!(booted.stdout.lines().any(|line| line.starts_with(start)), "no line starts with {start:?}\n{booted}");
}

#[test]
fn the_image_boots_to_the_guests_verdict() {
    let file = path("default.iso");
    image(&file, &["--vcpus", "2", "--memory", "256M", "--at-end", "debug-exit"], None).expect_status(0);
    let booted = boot(&file, 3, 448, &[]);
    booted.expect_status(1);
    for line in [
        "nestling: 3 CPUs",
        "nestling: guest started: 2 vCPUs, 256 MiB",
        "nestling-selfcheck: 2 CPUs",
        "nestling-selfcheck: PASS",
        "nestling: PASS: the guest switched itself off; self-check: PASS",
    ] {
        expect_line(&booted, line);
    }
    assert!(!booted.stdout.contains("LEAK"), "{booted}");

    // The same image where there are too few CPUs, or too little memory.
    let few = boot(&file, 2, 448, &[]);
    few.expect_status(73);
    expect_line(
        &few,
        "nestling: FAIL: the hypervisor gave up: 2 vCPUs need 3 CPUs (one keeps house), this machine has 2",
    );
    let small = boot(&file, 3, 256, &[]);
    small.expect_status(73);
    expect_line(&small, "nestling: FAIL: the hypervisor gave up: the guest needs 272 MiB");
}

/// An image with a guest of a few instructions, and what comes of booting it.
fn small(name: &str, code: &[u8], arguments: &[&str], firmware: &[&str]) -> Finished {
    let [kernel, initrd] = small_guest(name, code);
    let guest = ["--kernel", &kernel, "--initrd", &initrd, "--vcpus", "1", "--memory", "64M"];
    let file = path(&format!("{name}.iso"));
    image(&file, &[&guest[..], arguments].concat(), None).expect_status(0);
    boot(&file, 2, 256, firmware)
}

#[test]
fn the_machine_ends_as_it_was_asked_to() {
    for (at_end, mode, status, verdict) in [
        ("power-off", "shell", 0, "PASS: the guest asked for a reset (status 1)"),
        ("reset", "shell", 0, "PASS: the guest asked for a reset (status 1)"),
        ("debug-exit", "check", 65, "FAIL: the guest asked for a reset; self-check: no verdict (status 65)"),
    ] {
        let booted = small(at_end, RESETS, &["--at-end", at_end, "--mode", mode], &[]);
        booted.expect_status(status);
        expect_line(&booted, &format!("nestling: {verdict}"));
    }
}

#[test]
fn a_guest_that_dies_is_told_of_on_the_console() {
    // push 0; push 0; lidt [rsp]; ud2: no handler for anything.
    let dies = [0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];
    let booted = small("image-dies", &dies, &["--at-end", "debug-exit"], &[]);
    booted.expect_status(71);
    for line in ["the guest died after", "vCPU 0:", "  rip ", "  nested walk:", "  last exits", "FAIL: the guest died"]
    {
        expect_line(&booted, &format!("nestling: {line}"));
    }
}

/// Where both GRUB's part for it and a firmware for QEMU are installed; neither is needed for anything else.
#[test]
fn efi_firmware_boots_it_too() {
    const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
    if !Path::new(FIRMWARE).exists() || !Path::new(setup::EFI_MODULES).exists() {
        eprintln!("skipped: the packages ovmf and grub-efi-amd64-bin are not installed");
        return;
    }
    let booted = small("efi", RESETS, &["--mode", "shell"], &["-bios", FIRMWARE]);
    booted.expect_status(0);
    expect_line(&booted, "nestling: PASS: the guest asked for a reset (status 1)");
}

/// A directory of its own, and the names in it.
fn directory(name: &str) -> (PathBuf, impl Fn() -> Vec<String>) {
    let directory = path(name);
    // There from an earlier run, or not.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("a directory");
    let listed = directory.clone();
    let names = move || {
        let entries = fs::read_dir(&listed).expect("listed").map(|entry| entry.expect("an entry").file_name());
        entries.map(|name| name.to_string_lossy().into_owned()).collect()
    };
    (directory, names)
}

#[test]
fn what_cannot_be_written_is_refused_and_nothing_is_left() {
    let [kernel, initrd] = small_guest("refused", RESETS);
    let guest = ["--kernel", &kernel, "--initrd", &initrd, "--memory", "64M", "--hypervisor", SOME_PROGRAM];
    let (place, names) = directory("image-refused");
    image(&place.join("no/such/directory.iso"), &guest, None).expect_status(2).expect_stderr("No such file");
    image(&place, &guest, None).expect_status(2).expect_stderr("directory");
    image(Path::new("/proc/image.iso"), &guest, None).expect_status(2).expect_stderr("image /proc/image.iso");
    // What is refused of a run's guest is refused of an image's.
    for (arguments, reason) in [(["--vcpus", "0"], "0 vCPUs"), (["--kernel", SOME_PROGRAM], "not a Linux bzImage")] {
        run(arguments).expect_status(2).expect_stderr(reason);
        image(&place.join("x.iso"), &arguments, None).expect_status(2).expect_stderr(reason);
    }
    image(&place.join("x.iso"), &["--timeout", "5"], None).expect_status(2).expect_stderr("--timeout");
    image(&place.join("x.iso"), &["--at-end", "explode"], None).expect_status(2).expect_stderr("power-off");
    assert_eq!(names(), [""; 0]);
}

#[test]
fn a_tool_that_is_missing_or_fails_leaves_what_was_there() {
    let [kernel, initrd] = small_guest("tools", RESETS);
    let guest = ["--kernel", &kernel, "--initrd", &initrd, "--memory", "64M", "--hypervisor", SOME_PROGRAM];
    let (place, names) = directory("image-tools");
    let (programs, _) = directory("image-programs");
    let file = place.join("there.iso");
    fs::write(&file, "what was there").expect("written");
    let unharmed = || {
        assert_eq!(names(), ["there.iso"]);
        assert_eq!(fs::read_to_string(&file).expect("read"), "what was there");
    };

    let nowhere = programs.to_str().expect("a path in text");
    image(&file, &guest, Some(nowhere)).expect_status(76).expect_stderr("grub-common");
    unharmed();

    let search = format!("{nowhere}:{}", env::var("PATH").expect("a search path"));
    let tool = |name: &str, script: &str| {
        let program = programs.join(name);
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("made a program");
    };
    for name in ["xorriso", "mformat"] {
        tool(name, "exit 1");
    }
    tool("grub-mkrescue", "echo half >$2; echo no room is left >&2; exit 3");
    image(&file, &guest, Some(&search)).expect_status(78).expect_stderr("no room is left");
    unharmed();
    tool("grub-mkrescue", "echo half >$2");
    image(&file, &guest, Some(&search)).expect_status(78).expect_stderr("has written no image");
    unharmed();
}
