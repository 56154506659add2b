//! What can go wrong before a guest runs. The exit statuses are [`nestling_control::verdict`]'s.

use std::{fmt, io, path::PathBuf};

use nestling_control::{bundle::BundleError, config::ConfigError};
use thiserror::Error;

pub use nestling_control::verdict::Status;
pub use nestling_control::words::Mebibytes;

use crate::guest::kernel::KernelError;

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
    /// A measuring guest did not get to its end.
    #[error("the measuring guest did not finish; it said:\n{said}")]
    Measuring {
        /// Its console.
        said: String,
    },
    /// Figures on different numbers of pages are not compared.
    #[error("--baseline was measured on {earlier} pages, which --pages {now} can't be compared with")]
    OtherPages {
        /// Of the baseline.
        earlier: u32,
        /// Of this run.
        now: u32,
    },
    /// The image that tries cases of paging did not do what it was asked for.
    #[error("{0}")]
    Conformance(String),
    /// What cases of paging came to is not the same everywhere.
    #[error("{cases} cases: {}", Unlike(*.blocks, *.differences, *.unlike_manuals))]
    Differences {
        /// Cases tried.
        cases: u64,
        /// Blocks of them that differ between a guest and the CPU alone.
        blocks: usize,
        /// Cases that do, in the first of these blocks.
        differences: u64,
        /// Blocks in which the CPU alone is not as the manuals say.
        unlike_manuals: usize,
    },
    /// An operation that is not measured here.
    #[error("--profile: no such operation; there are {}", known.join(", "))]
    NoSuchOperation {
        /// Those that are.
        known: Vec<String>,
    },
    /// Something costs more than it did.
    #[error("worse than the baseline:\n  {named}")]
    Worse {
        /// What, a line each.
        named: String,
    },
    /// The file is not a kernel that can be booted.
    #[error("{}: {cause}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: KernelError,
    },
    /// The file is a 32-bit kernel, and the init that it would get is not for one.
    #[error("{}: a 32-bit kernel: the default initial RAM disk for one comes with --guest i386 (or i386-pae), or give one with --initrd", path.display())]
    InitrdForKernel {
        /// The file.
        path: PathBuf,
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
    /// The image could not be made.
    #[error("{}: the image could not be made: {cause}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What the tool said, or why it was not taken.
        cause: String,
    },
    /// The bundle for the hypervisor cannot be made.
    #[error("{0}")]
    Bundle(#[from] BundleError),
    /// A copy of a guest cannot be run.
    #[error("{} {}: {cause}", option, path.display())]
    Copy {
        /// The option that named it.
        option: &'static str,
        /// Where it comes from.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// A running guest does not do what it was asked for.
    #[error("{0}")]
    Refused(String),
    /// No guest, or not just one, can be meant.
    #[error("{0}")]
    WhichGuest(String),
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

/// What is to be said of cases of paging that differ.
struct Unlike(usize, u64, usize);

impl fmt::Display for Unlike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(blocks, differences, unlike_manuals) = *self;
        write!(
            f,
            "{blocks} blocks differ from the CPU alone ({differences} differences in those that were looked at)"
        )?;
        if unlike_manuals > 0 {
            write!(f, "; in {unlike_manuals} blocks the CPU alone is not as the manuals say")?;
        }
        Ok(())
    }
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
            | Self::InitrdForKernel { .. }
            | Self::Multiboot { .. }
            | Self::Hypervisor { .. }
            | Self::OtherPages { .. }
            | Self::NoSuchOperation { .. }
            | Self::Copy { .. }
            | Self::WhichGuest(_)
            | Self::NoKvm(_) => Status::Usage,
            Self::Worse { .. } => Status::Worse,
            Self::Differences { .. } => Status::CheckFailed,
            Self::HostMemory { .. } | Self::Missing { .. } | Self::Fetch { .. } => Status::Missing,
            Self::Qemu(_) | Self::Conformance(_) => Status::HypervisorFailed,
            Self::Measuring { .. }
            | Self::Refused(_)
            | Self::Build { .. }
            | Self::Image { .. }
            | Self::Bundle(_)
            | Self::Io { .. } => Status::Internal,
        }
    }
}
