//! Fetches the default guest's kernel and busybox from the distribution's packages, once.
//!
//! `apt-get download` needs no rights and installs nothing; the one file that is wanted is unpacked into the cache. It gets
//! its name there by a rename, so that a fetch that was interrupted leaves nothing that looks whole. A lock on the cache
//! makes concurrent runs wait for each other.

use std::{
    cmp::Ordering,
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::Error,
    guest::{cache_dir, cache_path, kernel::KernelImage},
    progress::Progress,
    setup::{self, find_file, find_program, run_quietly},
};

/// The package with a busybox that needs no library.
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Kernel packages, best first: small cloud kernels of the series that is tested, of any series, and what Ubuntu has. The
/// unsigned packages hold the image itself.
const KERNEL_PACKAGES: [&str; 6] = [
    r"^linux-image-6\.12\.[0-9]+.*-cloud-amd64-unsigned$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-cloud-amd64-unsigned$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-cloud-amd64$",
    r"^linux-image-(unsigned-)?[0-9]+\.[0-9]+\.[0-9]+-[0-9]+-kvm$",
    r"^linux-image-unsigned-[0-9]+\.[0-9]+\.[0-9]+-[0-9]+-generic$",
    r"^linux-image-[0-9]+\.[0-9]+\.[0-9]+.*-amd64-unsigned$",
];

/// The default guest's kernel, fetched if it is not in the cache.
///
/// # Errors
/// If the cache cannot be written, or no package can be found or fetched.
pub fn kernel(progress: Progress) -> Result<PathBuf, Error> {
    let dir = cache_dir()?;
    let _lock = lock(&dir)?;
    if let Some(path) = cached_kernel() {
        return Ok(path);
    }
    need_apt("a kernel for the guest", "give one with --kernel")?;
    let package = newest_kernel_package(progress)?;
    let target = dir.join(format!("{package}.vmlinuz"));
    fetch(&dir, &package, &|name| name.as_encoded_bytes().starts_with(b"vmlinuz"), &target, progress)?;
    Ok(target)
}

/// Busybox, fetched if it is not in the cache.
///
/// # Errors
/// If the cache cannot be written, or the package cannot be fetched.
pub fn busybox(progress: Progress) -> Result<PathBuf, Error> {
    let dir = cache_dir()?;
    let _lock = lock(&dir)?;
    if let Some(path) = cached_busybox() {
        return Ok(path);
    }
    need_apt("busybox for the guest", "give an initial RAM disk with --initrd")?;
    let target = dir.join("busybox");
    fetch(&dir, BUSYBOX_PACKAGE, &|name| name == "busybox", &target, progress)?;
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
    let kernel = kernel(progress)?;
    let dir = cache_dir()?;
    let _lock = lock(&dir)?;
    let modules = kernel.with_extension("kvm");
    if !modules.is_dir() {
        let package = kernel.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        need_apt("KVM's modules", "measure without KVM: --only nestling")?;
        unpacked(&dir, &package, progress, |root| {
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

/// The newest kernel in the cache that is whole.
#[must_use]
pub fn cached_kernel() -> Option<PathBuf> {
    let mut kernels: Vec<_> = fs::read_dir(cache_path()?)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension() == Some(OsStr::new("vmlinuz")))
        .filter(|path| fs::read(path).is_ok_and(|file| KernelImage::parse(&file).is_ok()))
        .collect();
    kernels.sort_by(|a, b| compare_versions(&a.to_string_lossy(), &b.to_string_lossy()));
    kernels.pop()
}

/// Busybox in the cache.
#[must_use]
pub fn cached_busybox() -> Option<PathBuf> {
    let path = cache_path()?.join("busybox");
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
    if ["apt-get", "apt-cache", "dpkg-deb"].iter().all(|tool| find_program(tool).is_some()) {
        return Ok(());
    }
    Err(Error::Missing { what: format!("{what}, which is fetched with apt and dpkg,"), how: instead.into() })
}

fn newest_kernel_package(progress: Progress) -> Result<String, Error> {
    let find = || KERNEL_PACKAGES.iter().find_map(|pattern| newest_package(pattern));
    find()
        .or_else(|| {
            setup::update_package_lists(progress);
            find()
        })
        .ok_or_else(|| Error::Missing {
            what: "a kernel package in apt's lists".into(),
            how: "sudo apt-get update, or give a kernel with --kernel".into(),
        })
}

fn newest_package(pattern: &str) -> Option<String> {
    let listing = run_quietly(Command::new("apt-cache").args(["search", "--names-only", pattern])).ok()?;
    listing
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .max_by(|a, b| compare_versions(a, b))
        .map(str::to_owned)
}

/// Fetches `package` and puts the one file that is wanted of it to `target`.
fn fetch(
    cache: &Path,
    package: &str,
    wanted: &dyn Fn(&OsStr) -> bool,
    target: &Path,
    progress: Progress,
) -> Result<(), Error> {
    unpacked(cache, package, progress, |root| {
        let found = find_file(root, wanted).ok_or("the file that is wanted is not in it")?;
        fs::rename(&found, target).map_err(|cause| format!("{}: {cause}", target.display()))
    })
}

/// Fetches `package`, unpacks it, and lets `take` have what it wants of it.
fn unpacked(
    cache: &Path,
    package: &str,
    progress: Progress,
    take: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), Error> {
    let failed = |cause: String| Error::Fetch { what: format!("the package {package}"), cause };
    let work = tempfile::tempdir_in(cache).map_err(Error::io(format!("write to {}", cache.display())))?;
    let step = progress.step(&format!("fetching {package} (apt-get download {package})"));
    let download = || run_quietly(Command::new("apt-get").args(["-q", "download", package]).current_dir(work.path()));
    download()
        .or_else(|_| {
            setup::update_package_lists(progress);
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
