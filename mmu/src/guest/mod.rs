//! The guest's own page tables, as its CPU walks them (AMD APM vol. 2, chapter 5; Intel SDM vol. 3, chapter 4; F23).
//!
//! Two users: shadow paging, which makes of what a walk found the entry that the real CPU sees; and an embedder that
//! executes an instruction in software and must reach memory under the guest's rights.
//!
//! # Protocol
//! [`Mode`] is what the control registers say of paging; it is made anew when one of them is written, and is one word
//! of masks and flags otherwise. [`walk`] takes no lock and keeps no state. It reads the guest's tables through
//! [`Tables`], entry by entry, while other vCPUs may change them: what it returns was true of each entry at the moment
//! it was read, which is all that a CPU promises as well. Who builds on a translation that must *still* be true reads
//! the entries again ([`Translation::steps`]) once it has made sure to hear of changes.
//!
//! Accessed and dirty bits are set by compare-and-swap from the value that was judged: an entry that has changed in
//! between is never marked, and the walk starts over from the top.
//!
//! Canonical addresses and segments are the caller's business: their violations are no page faults.

mod entry;
mod mode;
mod walk;

#[cfg(test)]
mod tests;

pub(crate) use entry::Judged;
pub use mode::{Controls, CpuFeatures, Mode};
pub use walk::{FaultCode, Marked, PageFault, Privilege, Refused, Request, Step, Tables, Translation, Width, walk};

/// What all entries from the top to some level allow together. A guest's read right is its presence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rights {
    /// Ring 3 may.
    pub user: bool,
    /// Writes.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

impl Rights {
    /// Above the top entry nothing has been taken yet.
    pub const ALL: Self = Self { user: true, write: true, execute: true };
}
