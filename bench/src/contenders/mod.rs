//! The contenders behind one face.
//!
//! A [`Contender`] is one table; a [`Seat`] is what one thread needs to work on it. Every operation is one call that
//! is not inlined into the loop around it, for all contenders alike: a fault comes out of an exit from the guest, one
//! at a time, so nothing that the compiler could hoist out of a loop may be left out of the figure.

mod floor;
mod nestling;
mod offset_page_table;
mod page_table_multiarch;

pub use self::floor::BareWalk;
pub use self::nestling::{Asymmetry, FullFences, Membarrier, Nestling};
pub use self::offset_page_table::X86_64;
pub use self::page_table_multiarch::PageTableMultiarch;

use crate::arena::Claim;

/// First guest frame of the memory that is mapped: 1 GiB.
pub const FIRST_GFN: u64 = 1 << 18;
/// Host frame behind [`FIRST_GFN`]; the others follow it in order.
pub const FIRST_HFN: u64 = 1 << 20;
/// Frames of the memory that is mapped: 1 GiB.
pub const PAGES: u64 = 1 << 18;

/// The host frame behind `gfn`.
#[inline]
pub const fn backing(gfn: u64) -> u64 {
    gfn - FIRST_GFN + FIRST_HFN
}

/// One table that threads fill, read and empty.
pub trait Contender: Sized + Sync {
    /// As it appears in names of figures.
    const NAME: &'static str;
    /// What one thread works with.
    type Seat<'c>: Seat + Send
    where
        Self: 'c;

    /// An empty table.
    fn new(claim: Claim) -> Self;
    /// The seat of thread `number`, 0 or 1. To be called once for each.
    fn seat(&self, number: u16) -> Self::Seat<'_>;
    /// Address of the root table, for a walk that knows only the CPU's format.
    fn root(&self) -> u64;
}

/// One thread's way to a table. All frame numbers are the guest's.
pub trait Seat {
    /// Maps `gfn` to [`backing`] of it; whether that was done by this call.
    fn fault(&mut self, gfn: u64) -> bool;
    /// The host frame that `gfn` is mapped to.
    fn look_up(&mut self, gfn: u64) -> Option<u64>;
    /// Unmaps `gfn`; whether it was mapped.
    fn zap(&mut self, gfn: u64) -> bool;
    /// Unmaps `pages` frames from `first`, in the way that is the contender's best; how many were mapped.
    fn zap_range(&mut self, first: u64, pages: u64) -> u64;
}
