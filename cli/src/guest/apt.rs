//! apt, for packages of this machine's architecture or of another one.
//!
//! Packages of another architecture are looked up in lists that are kept beside them, in the cache: the machine's own lists
//! and its package management stay as they are, and no rights are needed. Where packages come from and whose signatures
//! are trusted is as the machine has it.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    error::Error,
    progress::Progress,
    setup::{self, find_program, run_quietly},
};

/// What is called.
const TOOLS: [&str; 3] = ["apt-get", "apt-cache", "dpkg-deb"];

/// Whether packages can be fetched here at all.
#[must_use]
pub fn is_here() -> bool {
    TOOLS.iter().all(|tool| find_program(tool).is_some())
}

/// apt for one architecture.
#[derive(Clone, Debug)]
pub struct Apt {
    /// `None`: this machine's own lists.
    foreign: Option<Foreign>,
}

#[derive(Clone, Debug)]
struct Foreign {
    architecture: &'static str,
    lists: PathBuf,
}

impl Apt {
    /// For this machine's packages.
    #[must_use]
    pub const fn native() -> Self {
        Self { foreign: None }
    }

    /// For packages of another architecture, whose lists are kept in `dir`.
    ///
    /// # Errors
    /// If they cannot be.
    pub fn foreign(architecture: &'static str, dir: &Path) -> Result<Self, Error> {
        let lists = dir.join("apt");
        // apt wants a place for what is only partly there, and a list of installed packages, which is empty.
        let make =
            || fs::create_dir_all(lists.join("lists/partial")).and_then(|()| fs::write(lists.join("status"), ""));
        make().map_err(Error::io(format!("write to {}", lists.display())))?;
        Ok(Self { foreign: Some(Foreign { architecture, lists }) })
    }

    /// One of its tools, made to look for these packages.
    #[must_use]
    pub fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        if let Some(Foreign { architecture, lists }) = &self.foreign {
            let option = |name: &str, value: &OsStr| {
                let mut option = OsString::from(name);
                option.push("=");
                option.push(value);
                [OsString::from("-o"), option]
            };
            command
                .args(option("APT::Architecture", architecture.as_ref()))
                .args(option("APT::Architectures", architecture.as_ref()))
                .args(option("Dir::State", lists.as_ref()))
                .args(option("Dir::State::status", lists.join("status").as_ref()))
                .args(option("Dir::Cache", lists.as_ref()))
                // Files of the user's own, which the user that apt would change to cannot reach.
                .args(option("APT::Sandbox::User", "root".as_ref()))
                // Lists of names and descriptions in other languages, and copies made for a quicker start, are not needed.
                .args(option("Acquire::Languages", "none".as_ref()))
                .args(option("Acquire::GzipIndexes", "true".as_ref()))
                .args(option("Dir::Cache::pkgcache", "".as_ref()))
                .args(option("Dir::Cache::srcpkgcache", "".as_ref()));
        }
        command
    }

    /// Gets new lists: the machine's own if this process may, those of another architecture in any case.
    pub fn update(&self, progress: Progress) {
        let Some(Foreign { architecture, .. }) = &self.foreign else {
            return setup::update_package_lists(progress);
        };
        let step = progress.step(&format!("getting the package lists for {architecture} (apt-get update)"));
        // If it fails the next look at the lists says what is missing.
        let _ = run_quietly(self.tool("apt-get").args(["-q", "update"]));
        step.done();
    }

    /// In which lists it looks, for people.
    #[must_use]
    pub fn lists(&self) -> String {
        match &self.foreign {
            None => "apt's lists".into(),
            Some(Foreign { architecture, .. }) => format!("apt's lists for {architecture}"),
        }
    }
}
