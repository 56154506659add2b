//! Bad options, bad images, too little memory: each is refused before anything is started, with its reason and status 2.

mod common;
#[path = "common/kernel.rs"]
mod kernel;

use std::{fs, path::PathBuf};

use common::{nestling, run};
use kernel::kernel;

/// `hlt` in a loop; these tests never get to run it.
const CODE: &[u8] = &[0xf4, 0xeb, 0xfd];

/// A file for one test.
fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, content).expect("a file can be written");
    path
}

#[test]
fn bad_options_are_refused_by_name() {
    for (arguments, reason) in [
        (&["--vcpus", "0"][..], "0 vCPUs"),
        (&["--vcpus", "33"], "33 vCPUs"),
        (&["--vcpus=-1"], "--vcpus"),
        (&["--memory", "1024"], "a number and a unit"),
        (&["--memory", "2M"], "at least 64 MiB"),
        (&["--memory", "65M"], "not a multiple of 2 MiB"),
        (&["--memory", "1024G"], "at most 512 GiB"),
        (&["--huge-pages", "4M"], "--huge-pages"),
        (&["--timeout", "0"], "at least 1"),
        (&["--timeout", "soon"], "whole number of seconds"),
        (&["--mode", "fast"], "--mode"),
        (&["--guest", "i286"], "--guest"),
        (&["--guest", "i386", "--multiboot", "x"], "cannot be used with"),
        (&["--guest", "i386", "--restore", "x"], "cannot be used with"),
        (&["--append", "a\nb"], "control character"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--report", "/no/such/directory/report.json"], "--report /no/such/directory/report.json"),
    ] {
        run(arguments).expect_status(2).expect_stderr(reason);
    }
}

#[test]
fn a_command_line_that_no_kernel_takes_is_refused() {
    run(["--append", &"x".repeat(2048)]).expect_status(2).expect_stderr("command line");
    let mut short = kernel(CODE);
    short[0x238..0x23c].copy_from_slice(&20u32.to_le_bytes());
    let short = file("short-command-line", &short);
    let initrd = file("some-initrd", b"anything");
    run(["--kernel".as_ref(), short.as_os_str(), "--initrd".as_ref(), initrd.as_os_str()])
        .expect_status(2)
        .expect_stderr("this kernel takes at most 20");
}

#[test]
fn bad_kernels_are_refused_by_what_is_wrong() {
    let good = kernel(CODE);
    let changed = |change: fn(&mut Vec<u8>)| {
        let mut file = good.clone();
        change(&mut file);
        file
    };
    for (name, content, reason) in [
        ("empty", vec![], "empty"),
        ("short", good[..0x200].to_vec(), "too few"),
        ("text", vec![b'x'; 4096], "not a Linux bzImage"),
        ("elf", [&b"\x7fELF\x02\x01\x01"[..], &[0; 2000]].concat(), "not a Linux bzImage"),
        ("old", changed(|file| file[0x206] = 0x0a), "boot protocol 2.10"),
        ("thirty-two-bit", changed(|file| file[0x236] = 0), "a 32-bit kernel: the default initial RAM disk"),
        ("zimage", changed(|file| file[0x211] = 0), "zImage"),
        ("cut-off", changed(|file| file[0x1f6] = 0xff), "cut off"),
    ] {
        let path = file(&format!("kernel-{name}"), &content);
        run(["--kernel".as_ref(), path.as_os_str()]).expect_status(2).expect_stderr(reason);
    }
}

#[test]
fn files_that_cannot_be_read_are_named_with_their_option() {
    for option in ["--kernel", "--initrd", "--hypervisor"] {
        run([option, "/no/such/file"]).expect_status(2).expect_stderr(&format!("{option} /no/such/file: No such file"));
        run([option, "/"]).expect_status(2).expect_stderr("not a regular file");
        run([option, "/dev/zero"]).expect_status(2).expect_stderr("not a regular file");
    }
    let empty = file("empty-initrd", b"");
    run(["--initrd".as_ref(), empty.as_os_str()]).expect_status(2).expect_stderr("the file is empty");
    let text = file("not-a-hypervisor", b"#!/bin/sh\n");
    run(["--hypervisor".as_ref(), text.as_os_str()]).expect_status(2).expect_stderr("not a 64-bit x86 ELF");
}

#[test]
fn a_kernel_that_does_not_fit_is_refused_with_what_it_needs() {
    let mut large = kernel(CODE);
    large[0x260..0x264].copy_from_slice(&(200u32 << 20).to_le_bytes());
    let large = file("large-kernel", &large);
    let initrd = file("fitting-initrd", b"anything");
    run([
        "--memory".as_ref(),
        "128M".as_ref(),
        "--kernel".as_ref(),
        large.as_os_str(),
        "--initrd".as_ref(),
        initrd.as_os_str(),
    ])
    .expect_status(2)
    .expect_stderr("need at least 217 MiB");
}

#[test]
fn help_tells_the_exit_statuses() {
    let output = nestling().arg("--help").output().expect("runs");
    let help = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && help.contains("Exit status"), "{help}");
}

#[test]
fn the_doctors_status_is_what_its_table_says() {
    let output = nestling().arg("doctor").output().expect("runs");
    let table = String::from_utf8_lossy(&output.stdout);
    for row in ["QEMU", "acceleration", "cargo", "guest kernel", "guest busybox", "host memory"] {
        assert!(table.lines().any(|line| line.starts_with(row)), "no {row} in\n{table}");
    }
    assert_eq!(output.status.code(), Some(i32::from(table.contains("MISSING"))), "{table}");
    // Without any tool in reach, it still answers, with what is missing.
    let output = nestling().arg("doctor").env("PATH", "").env_remove("HOME").output().expect("runs");
    let table = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{table}");
    assert!(table.contains("QEMU           MISSING"), "{table}");
}
