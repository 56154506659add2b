//! What can go wrong before a guest runs, and the command's exit statuses.
//!
//! A guest's own status through the debug-exit port is `(value << 1) | 1`, always odd. The command's own are even, so
//! that neither can be taken for the other, and none but a good run gives 0.

use std::{fmt, io, path::PathBuf};

use nestling_control::{bundle::BundleError, config::ConfigError};
use thiserror::Error;

use crate::guest::kernel::KernelError;

/// The command's own exit statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The guest powered off or reset and, in check mode, printed that it passed; or its user left it.
    Good = 0,
    /// The options or files that were given cannot be used. Nothing was started. (The status of clap as well.)
    Usage = 2,
    /// The guest ended by itself without the verdict that check mode waits for.
    NoVerdict = 64,
    /// The guest's self-check failed and the guest then powered off instead of ending with a status of its own.
    CheckFailed = 66,
    /// The guest died.
    GuestDied = 70,
    /// QEMU or the hypervisor failed, or the hypervisor did not give back what the guest had.
    HypervisorFailed = 72,
    /// `--timeout` was over.
    TimedOut = 74,
    /// A tool or package is missing and could not be had.
    Missing = 76,
    /// Anything else on this side: building, reading, writing.
    Internal = 78,
}

/// Why no guest was started.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration is out of bounds.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The kernel and initrd do not fit into the guest's memory.
    #[error("--memory {}: this kernel and initrd need at least {}", Mebibytes(*given), Mebibytes(*needed))]
    MemoryForKernel {
        /// Bytes asked for.
        given: u64,
        /// Bytes that the kernel's header and the initrd's size ask for.
        needed: u64,
    },
    /// The kernel refuses so long a command line.
    #[error("the guest's command line has {length} bytes: this kernel takes at most {most}")]
    CommandLineForKernel {
        /// Its length.
        length: usize,
        /// What the kernel's header allows.
        most: usize,
    },
    /// A file that was named cannot be used.
    #[error("{option} {}: {cause}", path.display())]
    File {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A file that was named is empty.
    #[error("{option} {}: the file is empty", path.display())]
    EmptyFile {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file is not a kernel that can be booted.
    #[error("{}: {cause}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KernelError,
    },
    /// The file has no Multiboot header.
    #[error("--multiboot {}: not a Multiboot image", path.display())]
    Multiboot {
        /// The file.
        path: PathBuf,
    },
    /// The file given as hypervisor is not one.
    #[error("--hypervisor {}: not a 64-bit x86 ELF executable", path.display())]
    Hypervisor {
        /// The file.
        path: PathBuf,
    },
    /// Hardware virtualisation was demanded where it cannot be had.
    #[error("--accel kvm: {0}")]
    NoKvm(String),
    /// The host has not enough memory for such a guest.
    #[error("the machine needs {} of host memory, {} are available: ask for less with --memory", Mebibytes(*needed), Mebibytes(*available))]
    HostMemory {
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// Something must be installed and could not be.
    #[error("{what} is missing; to get it: {how}")]
    Missing {
        /// What.
        what: String,
        /// A command line, or advice.
        how: String,
    },
    /// A package could not be fetched.
    #[error("cannot fetch {what}: {cause}")]
    Fetch {
        /// Which.
        what: String,
        /// What the tool said.
        cause: String,
    },
    /// A build failed.
    #[error("building {what} failed:\n{output}")]
    Build {
        /// Which program.
        what: &'static str,
        /// The end of what cargo said.
        output: String,
    },
    /// The bundle for the hypervisor cannot be made.
    #[error("{0}")]
    Bundle(#[from] BundleError),
    /// QEMU did not start.
    #[error("QEMU did not start: {0}")]
    Qemu(String),
    /// The system refused something.
    #[error("cannot {doing}: {cause}")]
    Io {
        /// What was tried.
        doing: String,
        /// What it answered.
        cause: io::Error,
    },
}

impl Error {
    /// For `map_err`: the system refused what was being done.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |cause| Self::Io { doing, cause }
    }

    /// The exit status of a command that ends with this error.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Config(_)
            | Self::MemoryForKernel { .. }
            | Self::CommandLineForKernel { .. }
            | Self::File { .. }
            | Self::EmptyFile { .. }
            | Self::Kernel { .. }
            | Self::Multiboot { .. }
            | Self::Hypervisor { .. }
            | Self::NoKvm(_) => Status::Usage,
            Self::HostMemory { .. } | Self::Missing { .. } | Self::Fetch { .. } => Status::Missing,
            Self::Qemu(_) => Status::HypervisorFailed,
            Self::Build { .. } | Self::Bundle(_) | Self::Io { .. } => Status::Internal,
        }
    }
}

/// A number of bytes as people read it.
#[derive(Clone, Copy, Debug)]
pub struct Mebibytes(pub u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0.div_ceil(1 << 20))
    }
}
