//! Builds from this source tree what runs on the other side: the hypervisor and the guest's init.
//!
//! Both are built by a cargo of their own, into directories of their own: the hypervisor must not share features with
//! host programs (one that turns on `std` in a common dependency would break it), and the init is linked statically.
//! Flags that the environment holds for the host's programs are not passed on.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{error::Error, progress::Progress};

/// Said explicitly to cargo even where it is the host: otherwise flags would reach build scripts and macros too.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const KEPT_LINES: usize = 40;

/// The root of the source tree that this command was built from, if it is still there.
#[must_use]
pub fn source_tree() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    root.join("hypervisor/Cargo.toml").is_file().then(|| root.to_owned())
}

/// Builds the hypervisor and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn hypervisor(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the hypervisor", "nestling-hypervisor", "bare-metal", "bare-metal", |cargo| {
        cargo.args(["--features", "bare-metal"]);
    })
}

/// Builds the hypervisor with the ghost in it, which checks what it does, and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn watched_hypervisor(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the hypervisor with the ghost", "nestling-hypervisor", "bare-metal", "ghost", |cargo| {
        cargo.args(["--features", "bare-metal,ghost"]);
    })
}

/// Builds the hypervisor that counts where the instructions of a run go, and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn counting_hypervisor(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the hypervisor that counts", "nestling-hypervisor", "bare-metal", "seams", |cargo| {
        cargo.args(["--features", "bare-metal,seams"]);
    })
}

/// Builds the Multiboot test kernel and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn test_kernel(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the test kernel", "nestling-testkernel", "bare-metal", "test-kernel", |cargo| {
        cargo.args(["--features", "bare-metal"]);
    })
}

/// Builds the default guest's init and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn guest_init(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the guest's init", "nestling-selfcheck", "release", "guest", alone)
}

/// Builds the init of a KVM host and returns its file.
///
/// # Errors
/// If the source tree is gone or the build fails.
pub fn kvm_init(progress: Progress) -> Result<PathBuf, Error> {
    build(progress, "the KVM host's init", "nestling-kvmpeer", "release", "guest", alone)
}

/// A program that is alone in its file system.
fn alone(cargo: &mut Command) {
    cargo
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // It is copied into a guest's memory at each boot: no ballast.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
}

fn build(
    progress: Progress,
    what: &'static str,
    program: &str,
    profile: &str,
    subdirectory: &str,
    adjust: impl FnOnce(&mut Command),
) -> Result<PathBuf, Error> {
    let root = source_tree().ok_or_else(|| Error::Missing {
        what: format!("the source tree to build {what} from"),
        how: "run the command from a source tree, or give --hypervisor and --initrd".into(),
    })?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from).join(subdirectory);

    let step = progress.step(&format!("building {what}"));
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&root)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args([
            "build",
            "--profile",
            profile,
            "--target",
            TARGET,
            "--package",
            program,
            "--bin",
            program,
            "--target-dir",
        ])
        .arg(&target)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    adjust(&mut cargo);
    let mut child = cargo.spawn().map_err(|cause| Error::Missing {
        what: format!("cargo ({cause})"),
        how: "install Rust, or give --hypervisor and --initrd".into(),
    })?;

    let mut last_lines = Vec::new();
    for line in child.stderr.take().into_iter().flat_map(|stderr| BufReader::new(stderr).lines()).map_while(Result::ok)
    {
        step.detail(line.trim());
        if last_lines.len() == KEPT_LINES {
            last_lines.remove(0);
        }
        last_lines.push(line);
    }
    let status = child.wait().map_err(Error::io("wait for cargo"))?;
    if !status.success() {
        return Err(Error::Build { what, output: last_lines.join("\n") });
    }
    step.done();
    Ok(target.join(TARGET).join(profile).join(program))
}
