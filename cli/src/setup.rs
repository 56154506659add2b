//! Finds the tools that must be installed, and installs them: QEMU for a run, GRUB's image maker and what it calls for an
//! image.
//!
//! As root, or where `sudo` asks for no password, it is installed with the distribution's package manager, and said so.
//! Otherwise the error holds the line to type.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{error::Error, progress::Progress};

/// QEMU's program for this kind of machine.
pub const QEMU: &str = "qemu-system-x86_64";
/// The package that holds it. Asked for alone: together with qemu-utils, apt finds versions of the two that conflict.
pub const QEMU_PACKAGE: &str = "qemu-system-x86";

/// What makes an image, and what it calls: the program or directory that shows it to be there, and its package.
pub const IMAGE_TOOLS: [(&str, &str); 4] = [
    ("grub-mkrescue", "grub-common"),
    (BIOS_MODULES, "grub-pc-bin"),
    ("xorriso", "xorriso"),
    // For the part that EFI firmware boots, which is made where GRUB's modules for it are.
    ("mformat", "mtools"),
];
/// GRUB for machines with a BIOS.
pub const BIOS_MODULES: &str = "/usr/lib/grub/i386-pc/multiboot2.mod";
/// GRUB for machines with EFI firmware; an image boots there too if this is here.
pub const EFI_MODULES: &str = "/usr/lib/grub/x86_64-efi/multiboot2.mod";

/// The packages of [`IMAGE_TOOLS`] that are not here.
#[must_use]
pub fn missing_image_packages() -> Vec<&'static str> {
    let missing = |&(tool, _): &(&str, &str)| match tool.starts_with('/') {
        true => !Path::new(tool).exists(),
        false => find_program(tool).is_none(),
    };
    IMAGE_TOOLS.into_iter().filter(missing).map(|(_, package)| package).collect()
}

/// GRUB's image maker, installed first with all that it needs if something of it is not there.
///
/// # Errors
/// [`Error::Missing`] with what to type, if something is not there and cannot be installed.
pub fn image_maker(progress: Progress) -> Result<PathBuf, Error> {
    let missing = missing_image_packages();
    if !missing.is_empty() {
        install(&missing, progress)?;
    }
    let still = missing_image_packages();
    find_program(IMAGE_TOOLS[0].0).filter(|_| still.is_empty()).ok_or_else(|| Error::Missing {
        what: IMAGE_TOOLS[0].0.into(),
        how: format!("the packages {} are installed but do not hold what is needed", still.join(", ")),
    })
}

/// The first file called `name` in `$PATH` that can be executed.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|path| fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0))
}

/// QEMU, installed first if it is not there.
///
/// # Errors
/// [`Error::Missing`] with what to type, if it is not there and cannot be installed.
pub fn qemu(progress: Progress) -> Result<PathBuf, Error> {
    if let Some(path) = find_program(QEMU) {
        return Ok(path);
    }
    install(&[QEMU_PACKAGE], progress)?;
    find_program(QEMU).ok_or_else(|| Error::Missing {
        what: QEMU.into(),
        how: format!("the package {QEMU_PACKAGE} is installed but does not hold it: install QEMU by hand"),
    })
}

/// How this process may run the package manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It is root.
    Root,
    /// `sudo -n` works.
    Sudo,
    /// Neither.
    None,
}

impl Privilege {
    /// Finds out.
    #[must_use]
    pub fn of_this_process() -> Self {
        if rustix::process::geteuid().is_root() {
            return Self::Root;
        }
        let sudo = Command::new("sudo").args(["-n", "true"]).stdin(Stdio::null()).output();
        if sudo.is_ok_and(|output| output.status.success()) { Self::Sudo } else { Self::None }
    }

    fn apt_get(self) -> Command {
        let mut command = match self {
            Self::Sudo => {
                let mut command = Command::new("sudo");
                command.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
                command
            }
            Self::Root | Self::None => Command::new("apt-get"),
        };
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
        command
    }
}

/// The line that installs the packages, for people.
#[must_use]
pub fn install_line(packages: &[&str]) -> String {
    let packages = packages.join(" ");
    if find_program("apt-get").is_some() {
        format!("sudo apt-get install --no-install-recommends {packages}")
    } else {
        format!("install what Debian calls {packages} with this system's package manager")
    }
}

/// Whether [`install_line`]'s line would be run here without asking.
#[must_use]
pub fn may_install() -> bool {
    find_program("apt-get").is_some() && Privilege::of_this_process() != Privilege::None
}

fn install(packages: &[&str], progress: Progress) -> Result<(), Error> {
    let all = packages.join(" ");
    if !may_install() {
        let what =
            if packages.len() == 1 { format!("the package {all}") } else { format!("one of the packages {all}") };
        return Err(Error::Missing { what, how: install_line(packages) });
    }
    let privilege = Privilege::of_this_process();
    let step = progress.step(&format!("installing {all} (apt-get install --no-install-recommends {all})"));
    let attempt = || run_quietly(privilege.apt_get().args(["-y", "--no-install-recommends", "install"]).args(packages));
    // A fresh machine has no package lists, or old ones.
    let result = attempt().or_else(|_| {
        step.detail("apt-get update");
        run_quietly(privilege.apt_get().arg("update"))?;
        attempt()
    });
    result.map_err(|cause| Error::Fetch { what: all, cause })?;
    step.done();
    Ok(())
}

/// Refreshes the package lists, if this process may.
pub(crate) fn update_package_lists(progress: Progress) {
    let privilege = Privilege::of_this_process();
    if privilege == Privilege::None {
        return;
    }
    let step = progress.step("refreshing the package lists (apt-get update)");
    // If it fails the next look at the lists says what is missing.
    let _ = run_quietly(privilege.apt_get().arg("update"));
    step.done();
}

/// Runs a command without input; its output comes back if it succeeds, the end of what it said if not.
pub(crate) fn run_quietly(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|cause| format!("{name}: {cause}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    Err(format!("{name}: {}: {}", output.status, lines[lines.len().saturating_sub(5)..].join("; ")))
}

/// Memory that the host could give to a new process, in bytes, where it can be told.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The first file below `dir` that `wanted` accepts by its name.
pub(crate) fn find_file(dir: &Path, wanted: &dyn Fn(&OsStr) -> bool) -> Option<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir).ok()?.filter_map(Result::ok).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    entries.into_iter().find_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => find_file(&entry.path(), wanted),
        Ok(kind) if kind.is_file() && wanted(&entry.file_name()) => Some(entry.path()),
        _ => None,
    })
}
