//! The guest: its kernel, its initial RAM disk, its command line.
//!
//! Kernel and busybox come from the distribution's own packages, fetched by name with its own tools and unpacked into
//! a cache of the user's; nothing of them is installed on the host.

use std::{env, fs, path::PathBuf};

use crate::error::Error;

pub mod apt;
pub mod initramfs;
pub mod kernel;
pub mod load;
pub mod packages;
pub mod plan;

/// The console's line starts with this when the default guest's init starts: the guest has booted.
pub const READY_MARKER: &str = "nestling-init:";
/// Starts each line of the self-check.
pub const CHECK_PREFIX: &str = "nestling-selfcheck:";

/// Words of the kernel's command line that every guest gets: the console, and an end instead of a halt. `reboot=t` makes a
/// reset a triple fault, which needs no chipset.
pub const BASE_COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=t";

/// The directory for fetched packages: `$XDG_CACHE_HOME/nestling` or `~/.cache/nestling`, made if it is not there.
///
/// # Errors
/// If neither variable is set or the directory cannot be made.
pub fn cache_dir() -> Result<PathBuf, Error> {
    let dir = cache_path().ok_or_else(|| Error::Missing {
        what: "a directory for fetched packages".into(),
        how: "set HOME or XDG_CACHE_HOME".into(),
    })?;
    fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
    Ok(dir)
}

/// Where [`cache_dir`] is, without making it.
#[must_use]
pub fn cache_path() -> Option<PathBuf> {
    // A relative XDG_CACHE_HOME is to be ignored (XDG base directory specification).
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(env::var_os("HOME").filter(|home| !home.is_empty())?).join(".cache")))
        .map(|path| path.join("nestling"))
}
