//! Loading guests: what goes where in their memory, and in which state their first vCPU starts.
//!
//! Nothing here touches a CPU or a page table of the host. Guest memory is reached through [`GuestMemory`], and the state
//! of a vCPU is plain data ([`entry::VcpuInit`]) that the VM copies into whatever its CPU wants. All input (images,
//! command line, sizes) is checked before the first byte is written; an error names the cause and leaves nothing to undo
//! but the memory itself.

pub mod acpi;
pub mod boot_params;
pub mod bzimage;
pub mod entry;
pub mod firmware;
pub mod layout;
pub mod linux;
pub mod multiboot;

#[cfg(test)]
pub(crate) mod testing;

pub use entry::VcpuInit;
pub use linux::{LinuxConfig, LoadError, load_linux};
pub use multiboot::{MultibootConfig, MultibootError, load_multiboot, waking_vector};

use core::fmt;

/// The guest's memory by physical address.
///
/// An access may cover any number of pages, and need not be aligned. It does not race with the guest during loading; an
/// implementation that is also used while vCPUs run must be safe against their concurrent writes.
pub trait GuestMemory {
    /// Reads `into.len()` bytes at `gpa`.
    fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), GuestMemoryError>;
    /// Writes `bytes` at `gpa`.
    fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), GuestMemoryError>;
}

/// Why an access to guest memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMemoryError {
    /// Part of the range is not RAM of the guest.
    NotRam {
        /// Where the access began.
        gpa: u64,
        /// How long it was, in bytes.
        bytes: u64,
    },
    /// The host has no frame left to back it with.
    OutOfFrames {
        /// Where the access began.
        gpa: u64,
    },
}

impl fmt::Display for GuestMemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRam { gpa, bytes } => write!(f, "{bytes} bytes at guest address {gpa:#x} are not all guest RAM"),
            Self::OutOfFrames { gpa } => write!(f, "no host memory left to back guest address {gpa:#x}"),
        }
    }
}

impl core::error::Error for GuestMemoryError {}
