//! `nestling doctor`: what is there, what is missing, and how to get it. Looks only: installs, fetches and builds nothing.

use std::{fmt, path::Path, process::Command};

use nestling_control::config::MIN_MEMORY_BYTES;

use crate::{
    accel,
    args::System,
    artifacts,
    error::Mebibytes,
    guest::{apt, packages},
    qemu,
    setup::{self, find_program, install_line, run_quietly},
};

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There.
    Ok,
    /// Not there yet; `nestling run` gets it by itself.
    OnDemand,
    /// Not there, and no run needs it.
    Optional,
    /// Not there, and somebody must act.
    Missing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::OnDemand => "on demand",
            Self::Optional => "optional",
            Self::Missing => "MISSING",
        })
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was looked for.
    pub what: &'static str,
    /// How it stands.
    pub state: State,
    /// Which one, or how to get it.
    pub detail: String,
}

/// Looks at everything a run needs.
#[must_use]
pub fn examine() -> Vec<Finding> {
    let finding = |what, state, detail| Finding { what, state, detail };
    let mut findings = Vec::new();

    findings.push(match find_program(setup::QEMU) {
        Some(path) => {
            let version = qemu::version(&path).unwrap_or_else(|| "it does not say its version".into());
            finding("QEMU", State::Ok, format!("{} ({version})", path.display()))
        }
        None if setup::may_install() => {
            finding("QEMU", State::OnDemand, format!("`nestling run` installs the package {}", setup::QEMU_PACKAGE))
        }
        None => finding("QEMU", State::Missing, install_line(&[setup::QEMU_PACKAGE])),
    });
    findings.push(match accel::nested_svm() {
        Ok(()) => finding("acceleration", State::Ok, "KVM with nested SVM".into()),
        Err(reason) => finding("acceleration", State::Ok, format!("emulation (TCG): {reason}")),
    });
    findings.push(match run_quietly(Command::new("cargo").arg("--version")) {
        Ok(version) => finding("cargo", State::Ok, version.trim().into()),
        Err(_) => finding("cargo", State::Missing, "install Rust, or give --hypervisor and --initrd".into()),
    });
    findings.push(match artifacts::source_tree() {
        Some(root) => finding("source tree", State::Ok, root.display().to_string()),
        None => {
            finding("source tree", State::Missing, "run from a source tree, or give --hypervisor and --initrd".into())
        }
    });
    let fetching = apt::is_here();
    let packages = [
        ("guest kernel", packages::cached_kernel(System::Amd64), "give one with --kernel"),
        ("guest busybox", packages::cached_busybox(System::Amd64), "give an initial RAM disk with --initrd"),
    ];
    for (what, cached, instead) in packages {
        findings.push(match cached {
            Some(path) => finding(what, State::Ok, path.display().to_string()),
            None if fetching => {
                finding(what, State::OnDemand, "`nestling run` fetches its package with apt-get".into())
            }
            None => finding(what, State::Missing, format!("apt-get and dpkg-deb are not here: {instead}")),
        });
    }
    let kernels = [System::I386, System::I386Pae].map(packages::cached_kernel);
    findings.push(match (kernels, packages::cached_busybox(System::I386)) {
        ([Some(kernel), Some(pae)], Some(_)) => {
            finding("32-bit guests", State::Ok, format!("{}, {}", kernel.display(), pae.display()))
        }
        _ if fetching => finding(
            "32-bit guests",
            State::OnDemand,
            "`nestling run --guest i386` fetches packages with apt-get".into(),
        ),
        _ => finding("32-bit guests", State::Optional, "for `nestling run --guest i386` only: needs apt-get".into()),
    });
    let missing = setup::missing_image_packages();
    findings.push(if missing.is_empty() {
        let firmware = if Path::new(setup::EFI_MODULES).exists() { "BIOS and EFI" } else { "BIOS" };
        finding("image tools", State::Ok, format!("`nestling image` makes images for {firmware}"))
    } else if setup::may_install() {
        finding("image tools", State::OnDemand, format!("`nestling image` installs {}", missing.join(", ")))
    } else {
        finding("image tools", State::Optional, format!("for `nestling image` only: {}", install_line(&missing)))
    });
    findings.push(match setup::available_memory_bytes() {
        Some(bytes) if bytes < 2 * MIN_MEMORY_BYTES + (256 << 20) => {
            finding("host memory", State::Missing, format!("{} available: too little for any guest", Mebibytes(bytes)))
        }
        Some(bytes) => finding("host memory", State::Ok, format!("{} available", Mebibytes(bytes))),
        None => finding("host memory", State::Ok, "unknown".into()),
    });
    findings
}

/// Prints the table. Whether nothing is missing comes back.
#[must_use]
pub fn print(findings: &[Finding]) -> bool {
    for Finding { what, state, detail } in findings {
        println!("{what:<14} {state:<10} {detail}");
    }
    let missing = findings.iter().filter(|finding| finding.state == State::Missing).count();
    match missing {
        0 => println!("nothing is missing: `nestling run` boots a guest"),
        count => println!("{count} missing: see above how to get it"),
    }
    missing == 0
}
