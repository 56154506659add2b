//! 32-bit Linux guests: Debian's i386 kernels, with two levels of page tables and with PAE, on nested and on shadow tables.
//!
//! Kernels and busybox are packages of another architecture, which the command fetches by itself.

mod common;
#[path = "common/files.rs"]
mod files;
#[path = "common/kernel.rs"]
mod kernel;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/report.rs"]
mod report;

use std::fs;

use common::{Finished, nestling};
use files::path;
use kernel::kernel;
use report::{number, reported};
use serde_json::Value;

/// Seconds. A boot takes a tenth of it on an idle machine.
const LIMIT: &str = "280";

/// The guest finds itself right, on so many CPUs, and leaves nothing behind.
fn passes(guest: &str, mmu: &str, vcpus: &str) {
    let what = ["--guest", guest, "--mmu", mmu, "--vcpus", vcpus, "--memory", "192M", "--append", "nestling.ram=10"];
    let (finished, report) = reported(&format!("linux32-{guest}-{mmu}"), &what);
    finished.expect_status(0);
    let says = |text: &str| assert!(finished.stdout.contains(text), "no {text:?}\n{finished}");
    says("nestling-selfcheck: PASS");
    says(&format!("nestling-selfcheck: {vcpus} CPUs"));
    says(if guest == "i386" { "-686 is up" } else { "-686-pae is up" });
    assert_eq!((&report["verdict"], &report["mmu"]), (&Value::from("pass"), &Value::from(mmu)), "{report:#}");
    for left in ["/table_frames/left", "/guest_frames_left", "/kept_pages_left"] {
        assert_eq!(number(&report, left), 0, "{left}: {report:#}");
    }
}

#[test]
fn a_kernel_with_two_levels_of_tables_runs_on_shadow_tables() {
    passes("i386", "shadow", "1");
}

#[test]
fn a_kernel_with_pae_runs_on_nested_tables() {
    passes("i386-pae", "npt", "2");
}

#[test]
fn a_32_bit_kernel_is_entered_at_its_start_with_the_boot_parameters_in_esi() {
    // The parameters have the header's magic; what increments EAX in protected mode is a prefix in long mode.
    // xor eax, eax; cmp dword [esi + 0x202], "HdrS"; sete al; inc eax; nop; lea eax, [eax * 2 + 5]; mov dx, 0xf4;
    // out dx, eax; hlt
    let code = [
        &[0x31, 0xc0, 0x81, 0xbe, 0x02, 0x02, 0, 0, b'H', b'd', b'r', b'S', 0x0f, 0x94, 0xc0, 0x40, 0x90][..],
        &[0x8d, 0x04, 0x45, 5, 0, 0, 0, 0x66, 0xba, 0xf4, 0, 0xef, 0xf4],
    ]
    .concat();
    let mut image = kernel(&code);
    // The code begins where the kernel is loaded, and not at the 64-bit entry point.
    image.copy_within(0x600..0x600 + code.len(), 0x400);
    image[0x600..].fill(0xcc);
    image[0x236] = 0;
    let (kernel_path, initrd_path) = (path("linux32.bzImage"), path("linux32.initrd"));
    fs::write(&kernel_path, image).expect("written");
    fs::write(&initrd_path, b"no archive").expect("written");
    let files = ["--kernel", kernel_path.to_str().expect("text"), "--initrd", initrd_path.to_str().expect("text")];
    for mmu in ["npt", "shadow"] {
        let what = [&["--memory", "64M", "--vcpus", "1", "--mmu", mmu][..], &files].concat();
        let (finished, report) = reported("linux32-entry", &what);
        finished.expect_status(9 << 1 | 1);
        assert_eq!(report["end"], "debug-exit", "{report:#}");
    }
}

#[test]
fn where_there_is_no_32_bit_kernel_it_is_said_so() {
    let (cache, config) = (path("linux32-cache"), path("linux32-apt.conf"));
    let _ = fs::remove_dir_all(&cache);
    // A distribution without packages.
    fs::write(&config, "Dir::Etc::sourcelist \"/dev/null\"; Dir::Etc::sourceparts \"/dev/null\";").expect("written");
    let finished = Finished::from(
        nestling()
            .args(["run", "--guest", "i386-pae", "--timeout", LIMIT])
            .env("XDG_CACHE_HOME", &cache)
            .env("APT_CONFIG", &config)
            .output()
            .expect("the command can be started"),
    );
    finished.expect_status(76);
    for text in ["a kernel package in apt's lists for i386 is missing", "later ones and Ubuntu do not", "--kernel"] {
        finished.expect_stderr(text);
    }
}
