//! Fetches the default guests' kernels and busybox from the distribution's packages, once.
//!
//! `apt-get download` needs no rights and installs nothing; the one file that is wanted is unpacked into the cache. It gets
//! its name there by a rename, so that a fetch that was interrupted leaves nothing that looks whole. A lock on the cache
//! makes concurrent runs wait for each other. What 32-bit guests need is packages of another architecture ([`Apt`]), and
//! has a directory of its own in the cache.

use std::{
    cmp::Ordering,
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    args::System,
    error::Error,
    guest::{
        apt::{self, Apt},
        cache_dir, cache_path,
        kernel::KernelImage,
    },
    progress::Progress,
    setup::{find_file, run_quietly},
};

/// The package with a busybox that needs no library.
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Kernel packages for 64-bit guests, best first: small cloud kernels of the series that is tested, of any series, and what
/// Ubuntu has. The unsigned packages hold the image itself.
const KERNEL_PACKAGES: [&str; 6] = [
    r"^linux-image-6\.12\.[0-9]+.*-cloud-amd64-unsigned$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-cloud-amd64-unsigned$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-cloud-amd64$",
    r"^linux-image-(unsigned-)?[0-9]+\.[0-9]+\.[0-9]+-[0-9]+-kvm$",
    r"^linux-image-unsigned-[0-9]+\.[0-9]+\.[0-9]+-[0-9]+-generic$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-amd64-unsigned$",
];

/// The architecture of packages for 32-bit guests, and their part of the cache.
const I386: &str = "i386";

impl System {
    /// Kernel packages for it, best first.
    const fn kernel_packages(self) -> &'static [&'static str] {
        match self {
            Self::Amd64 => &KERNEL_PACKAGES,
            // Of kernels with other extras (real-time ones) the names have more parts.
            Self::I386 => &[r"^linux-image-[0-9][0-9a-z.+~]*(-[0-9]+)?-686(-unsigned)?$"],
            Self::I386Pae => &[r"^linux-image-[0-9][0-9a-z.+~]*(-[0-9]+)?-686-pae(-unsigned)?$"],
        }
    }

    /// What a kernel of its in the cache is called.
    fn is_kernel(self, path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(package) = name.strip_suffix(".vmlinuz") else { return false };
        let is_pae = package.trim_end_matches("-unsigned").ends_with("-pae");
        match self {
            Self::Amd64 => true,
            Self::I386 => !is_pae,
            Self::I386Pae => is_pae,
        }
    }

    /// What is to be done where no package can be had.
    const fn without_kernel(self) -> &'static str {
        match self {
            Self::Amd64 => "sudo apt-get update, or give a kernel with --kernel",
            Self::I386 | Self::I386Pae => {
                "Debian 12 and earlier ones have 32-bit kernels, later ones and Ubuntu do not: give one with --kernel"
            }
        }
    }

    /// Its part of the cache, in the whole.
    fn part(self, cache: PathBuf) -> PathBuf {
        match self {
            Self::Amd64 => cache,
            Self::I386 | Self::I386Pae => cache.join(I386),
        }
    }

    /// Its part of the cache, made if it is not there.
    fn dir(self) -> Result<PathBuf, Error> {
        let dir = self.part(cache_dir()?);
        fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
        Ok(dir)
    }

    fn apt(self, dir: &Path) -> Result<Apt, Error> {
        match self {
            Self::Amd64 => Ok(Apt::native()),
            Self::I386 | Self::I386Pae => Apt::foreign(I386, dir),
        }
    }
}

/// The default guest's kernel, fetched if it is not in the cache.
///
/// # Errors
/// If the cache cannot be written, or no package can be found or fetched.
pub fn kernel(system: System, progress: Progress) -> Result<PathBuf, Error> {
    let dir = system.dir()?;
    let _lock = lock(&dir)?;
    if let Some(path) = cached_kernel(system) {
        return Ok(path);
    }
    need_apt("a kernel for the guest", "give one with --kernel")?;
    let apt = system.apt(&dir)?;
    let package = newest_kernel_package(&apt, system, progress)?;
    let target = dir.join(format!("{package}.vmlinuz"));
    fetch(&apt, &dir, &package, &|name| name.as_encoded_bytes().starts_with(b"vmlinuz"), &target, progress)?;
    Ok(target)
}

/// Busybox, fetched if it is not in the cache.
///
/// # Errors
/// If the cache cannot be written, or the package cannot be fetched.
pub fn busybox(system: System, progress: Progress) -> Result<PathBuf, Error> {
    let dir = system.dir()?;
    let _lock = lock(&dir)?;
    if let Some(path) = cached_busybox(system) {
        return Ok(path);
    }
    need_apt("busybox for the guest", "give an initial RAM disk with --initrd")?;
    let target = dir.join("busybox");
    fetch(&system.apt(&dir)?, &dir, BUSYBOX_PACKAGE, &|name| name == "busybox", &target, progress)?;
    Ok(target)
}

/// KVM for AMD, in the order in which its modules are loaded.
pub const KVM_MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];

/// A kernel and, as its package has them, KVM's modules for it.
#[derive(Clone, Debug)]
pub struct KvmHost {
    /// The kernel.
    pub kernel: PathBuf,
    /// Files of [`KVM_MODULES`].
    pub modules: Vec<PathBuf>,
}

/// A Linux that can be a KVM host, fetched if it is not in the cache.
///
/// # Errors
/// If the cache cannot be written, no package can be found or fetched, or the kernel's has no modules in it.
pub fn kvm_host(progress: Progress) -> Result<KvmHost, Error> {
    let kernel = kernel(System::Amd64, progress)?;
    let dir = cache_dir()?;
    let _lock = lock(&dir)?;
    let modules = kernel.with_extension("kvm");
    if !modules.is_dir() {
        let package = kernel.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        need_apt("KVM's modules", "measure without KVM: --only nestling")?;
        unpacked(&Apt::native(), &dir, &package, progress, |root| {
            let shown = |cause| format!("{}: {cause}", modules.display());
            let taken = tempfile::tempdir_in(&dir).map_err(shown)?;
            for module in KVM_MODULES {
                let start = format!("{module}.ko");
                let found = find_file(root, &|name| name.to_string_lossy().starts_with(&start))
                    .ok_or_else(|| format!("{start} is not in it"))?;
                fs::rename(&found, taken.path().join(found.file_name().unwrap_or_default())).map_err(shown)?;
            }
            fs::rename(taken.keep(), &modules).map_err(shown)
        })?;
    }
    let module = |name: &str| {
        let start = format!("{name}.ko");
        find_file(&modules, &|name| name.to_string_lossy().starts_with(&start)).ok_or_else(|| Error::Missing {
            what: format!("{start} in {}", modules.display()),
            how: "remove that directory: it is fetched again".into(),
        })
    };
    let modules = KVM_MODULES.iter().map(|name| module(name)).collect::<Result<_, _>>()?;
    Ok(KvmHost { kernel, modules })
}

/// The newest kernel of a system's in the cache that is whole.
#[must_use]
pub fn cached_kernel(system: System) -> Option<PathBuf> {
    let mut kernels: Vec<_> = fs::read_dir(system.part(cache_path()?))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| system.is_kernel(path))
        .filter(|path| fs::read(path).is_ok_and(|file| KernelImage::parse(&file).is_ok()))
        .collect();
    kernels.sort_by(|a, b| compare_versions(&a.to_string_lossy(), &b.to_string_lossy()));
    kernels.pop()
}

/// A system's busybox in the cache.
#[must_use]
pub fn cached_busybox(system: System) -> Option<PathBuf> {
    let path = system.part(cache_path()?).join("busybox");
    fs::read(&path).is_ok_and(|file| file.starts_with(b"\x7fELF")).then_some(path)
}

/// Held while the cache is looked at and changed.
fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(Error::io(format!("create {}", path.display())))?;
    file.lock().map_err(Error::io(format!("lock {}", path.display())))?;
    Ok(file)
}

fn need_apt(what: &str, instead: &str) -> Result<(), Error> {
    if apt::is_here() {
        return Ok(());
    }
    Err(Error::Missing { what: format!("{what}, which is fetched with apt and dpkg,"), how: instead.into() })
}

fn newest_kernel_package(apt: &Apt, system: System, progress: Progress) -> Result<String, Error> {
    let find = || system.kernel_packages().iter().find_map(|pattern| newest_package(apt, pattern));
    find()
        .or_else(|| {
            apt.update(progress);
            find()
        })
        .ok_or_else(|| Error::Missing {
            what: format!("a kernel package in {}", apt.lists()),
            how: system.without_kernel().into(),
        })
}

fn newest_package(apt: &Apt, pattern: &str) -> Option<String> {
    let listing = run_quietly(apt.tool("apt-cache").args(["search", "--names-only", pattern])).ok()?;
    listing
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .max_by(|a, b| compare_versions(a, b))
        .map(str::to_owned)
}

/// Fetches `package` and puts the one file that is wanted of it to `target`.
fn fetch(
    apt: &Apt,
    cache: &Path,
    package: &str,
    wanted: &dyn Fn(&OsStr) -> bool,
    target: &Path,
    progress: Progress,
) -> Result<(), Error> {
    unpacked(apt, cache, package, progress, |root| {
        let found = find_file(root, wanted).ok_or("the file that is wanted is not in it")?;
        fs::rename(&found, target).map_err(|cause| format!("{}: {cause}", target.display()))
    })
}

/// Fetches `package`, unpacks it, and lets `take` have what it wants of it.
fn unpacked(
    apt: &Apt,
    cache: &Path,
    package: &str,
    progress: Progress,
    take: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), Error> {
    let failed = |cause: String| Error::Fetch { what: format!("the package {package}"), cause };
    let work = tempfile::tempdir_in(cache).map_err(Error::io(format!("write to {}", cache.display())))?;
    let step = progress.step(&format!("fetching {package} (apt-get download {package})"));
    let download = || run_quietly(apt.tool("apt-get").args(["-q", "download", package]).current_dir(work.path()));
    download()
        .or_else(|_| {
            apt.update(progress);
            download()
        })
        .map_err(failed)?;
    let package_file = find_file(work.path(), &|name| name.as_encoded_bytes().ends_with(b".deb"))
        .ok_or_else(|| failed("apt-get left no package file".into()))?;
    step.detail("unpacking");
    let root = work.path().join("root");
    run_quietly(Command::new("dpkg-deb").arg("-x").arg(&package_file).arg(&root)).map_err(failed)?;
    take(&root).map_err(failed)?;
    step.done();
    Ok(())
}

/// Compares names piece by piece, runs of digits as numbers: 6.12.9 is before 6.12.117.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (number_a, number_b) = (leading_digits(&mut a), leading_digits(&mut b));
        let by_number = number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b));
        let by_text = match (a.split_first(), b.split_first()) {
            (None, None) => return by_number,
            (first_a, first_b) => first_a.map(|(byte, _)| byte).cmp(&first_b.map(|(byte, _)| byte)),
        };
        match by_number.then(by_text) {
            Ordering::Equal => (a, b) = (&a[1..], &b[1..]),
            different => return different,
        }
    }
}

/// Takes the digits off the front, leading zeros dropped.
fn leading_digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|&&byte| byte == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        let mut names = ["i-6.12.117+deb12", "i-6.1.0-47", "i-6.12.9+deb13", "i-6.12.117+deb13", "i-10.0.1", "i-6.12"];
        names.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(
            names,
            ["i-6.1.0-47", "i-6.12", "i-6.12.9+deb13", "i-6.12.117+deb12", "i-6.12.117+deb13", "i-10.0.1"]
        );
        assert_eq!(compare_versions("a007", "a7"), Ordering::Equal);
        assert_eq!(compare_versions("", "a"), Ordering::Less);
    }
}
