//! The code that a guest has just stopped at, as its CPU fetched it: by the shadow tables.
//!
//! # Protocol
//! Inside the shared side, from the vCPU's root down, as the CPU walks: no table is freed before the lock is left. The frame
//! of the leaf is the guest's memory as long if no invalidation is in progress, for none begins meanwhile; while one is, there
//! is no answer.
//!
//! Or from the root on which the vCPU runs down, while it is in guest mode, as the CPU walks, and by what keeps the CPU safe: a
//! table and a frame that the entries lead to are given back after they were unlinked and a flush that began later, which waits
//! until this vCPU has left. Such a flush is one of all vCPUs by the generation, never one by range ([`super::hold`]).
//!
//! The guest's own tables may say something else by now. So may its CPU have fetched something else than they say: what a
//! CPU knows of them it may use until it is told to forget it, and what it was told to forget is not in the tables.

use super::page::Handle;
use super::table::Inside;
use super::vcpu::InShadow;
use crate::addr::{Hfn, PAGE_SHIFT};
use crate::format::long_mode::{self, NO_EXECUTE};
use crate::guest::Width;
use crate::host::{GuestMemory, Host};

/// Bytes of one look.
const WORD: u64 = 8;

/// The four bytes from `linear` on; `None` if they are not in one page that is mapped to be executed, or can't be told.
pub(super) fn four_bytes<H: Host + GuestMemory>(inside: Inside<'_, H>, root: Handle, linear: u64) -> Option<u32> {
    inside.mmu.notify.quiet()?;
    let page = inside.page(root.index);
    let hfn = frame(page.is(root).then(|| inside.leaf(page, linear))??)?;
    read(&inside.mmu.host, hfn, linear)
}

/// The frame of the code at `linear`, for a vCPU in guest mode, and as long as it is.
pub(super) fn frame_in_guest<H: Host + GuestMemory>(guest: &InShadow<'_, H>, linear: u64) -> Option<Hfn> {
    frame(guest.leaf(linear)?)
}

/// The frame that a leaf maps to be executed.
fn frame(leaf: u64) -> Option<Hfn> {
    long_mode::mapped(leaf).filter(|_| leaf & NO_EXECUTE == 0)
}

/// The four bytes at the offset of `linear` in a frame of the guest's.
#[inline]
pub(super) fn read<H: GuestMemory>(host: &H, hfn: Hfn, linear: u64) -> Option<u32> {
    let offset = linear & ((1 << PAGE_SHIFT) - 1);
    let first = offset & !(WORD - 1);
    let shift = 8 * (offset - first) as u32;
    let low = host.load(hfn, first as u32, Width::Eight) >> shift;
    if shift <= u32::BITS {
        return Some(low as u32);
    }
    let second = Some(first + WORD).filter(|second| second + WORD <= 1 << PAGE_SHIFT)?;
    Some((low | host.load(hfn, second as u32, Width::Eight) << (u64::BITS - shift)) as u32)
}
