//! The contenders behind one face.
//!
//! A [`Contender`] is one table; a [`Seat`] is what one thread needs to work on it. Every operation is one call that
//! is not inlined into the loop around it, for all contenders alike: a fault comes out of an exit from the guest, one
//! at a time, so nothing that the compiler could hoist out of a loop may be left out of the figure.

mod floor;
pub(crate) mod nestling;
mod offset_page_table;
mod page_table_multiarch;

pub use self::floor::BareWalk;
pub use self::nestling::{Asymmetry, FullFences, Membarrier, Nestling};
pub use self::offset_page_table::X86_64;
pub use self::page_table_multiarch::PageTableMultiarch;

use crate::arena::Claim;

/// First guest-physical address of the memory that is mapped: 1 GiB.
pub const FIRST: u64 = 1 << 30;
/// Host-physical address behind [`FIRST`]; the others follow it in order.
pub const FIRST_BACKING: u64 = 1 << 32;
/// Pages of the memory that is mapped: 1 GiB.
pub const PAGES: u64 = 1 << 18;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// The host-physical address behind `gpa`.
#[inline]
pub const fn backing(gpa: u64) -> u64 {
    gpa - FIRST + FIRST_BACKING
}

/// The addresses of `pages` pages from `first`.
#[inline]
pub fn pages_from(first: u64, pages: u64) -> impl Iterator<Item = u64> {
    (0..pages).map(move |page| first + page * PAGE)
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

/// One thread's way to a table. All addresses are guest-physical ones of pages, which is what an exit reports.
pub trait Seat {
    /// Maps the page at `gpa` to [`backing`] of it; whether that was done by this call.
    fn fault(&mut self, gpa: u64) -> bool;
    /// The host-physical address that the page at `gpa` is mapped to.
    fn look_up(&mut self, gpa: u64) -> Option<u64>;
    /// Unmaps the page at `gpa`; whether it was mapped.
    fn zap(&mut self, gpa: u64) -> bool;
    /// Unmaps `pages` pages from `first`, in the way that is the contender's best; how many were mapped.
    fn zap_range(&mut self, first: u64, pages: u64) -> u64;
}
