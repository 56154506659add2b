//! What a second-stage fault is, and how it ends.

use core::fmt;

use crate::OutOfMemory;
use crate::addr::{Gpa, Level};
use crate::host::{Access, BackingError};

/// Why the CPU reported a second-stage fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// Nothing mapped, or the mapping denies the access.
    Translation,
    /// A reserved bit (NPT, error code bit 3) or a misconfiguration (EPT): the sign of an MMIO entry.
    Reserved,
}

/// A second-stage fault, as the exit reported it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Where.
    pub gpa: Gpa,
    /// What the guest was doing.
    pub access: Access,
    /// Why the CPU stopped it.
    pub cause: Cause,
}

/// How a fault ended. In all cases but the last two the guest tries its access again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A mapping was made, or given rights.
    Fixed {
        /// The size of its leaf.
        level: Level,
    },
    /// The mapping was there already.
    Spurious,
    /// Slots, backing or entry were changing.
    Retry,
    /// No memory there: the access is a device's.
    Mmio,
    /// A write to read-only memory: not carried out.
    ReadOnly,
    /// A write to a page that is tracked ([`crate::Worker::track_page`]): the embedder carries it out, says so with
    /// [`crate::Vcpu::mark_dirty`], and tells whoever watches.
    Tracked,
}

/// Why a fault could not be handled. Nothing was mapped; the same fault may be handed in again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultError {
    /// The embedder has no frame for a table.
    OutOfTables,
    /// The embedder's backing has no frame for the guest.
    Backing(BackingError),
    /// The backing's answer does not hold the frame that was asked for.
    BadExtent,
    /// The backing gave another host frame than is mapped, without an invalidation in between.
    BackingChanged,
    /// The vCPU has no root: [`crate::Vcpu::enter`] was never called.
    NoRoot,
    /// The vCPU's dirty ring is nearly full: it must not enter before that was emptied.
    DirtyRingFull,
}

impl fmt::Display for FaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTables => f.write_str("no frame for a second-stage page table"),
            Self::Backing(error) => error.fmt(f),
            Self::BadExtent => f.write_str("the backing's extent does not hold the frame that was asked for"),
            Self::BackingChanged => f.write_str("the backing changed a host frame without an invalidation"),
            Self::DirtyRingFull => f.write_str("the vCPU's dirty ring must be emptied first"),
            Self::NoRoot => f.write_str("the vCPU has no root loaded"),
        }
    }
}

impl core::error::Error for FaultError {}

impl From<OutOfMemory> for FaultError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfTables
    }
}
