//! The code that a guest has just stopped at, as its CPU fetched it: by the shadow tables.
//!
//! # Protocol
//! Inside the shared side, from the vCPU's root down, as the CPU walks: no table is freed before the lock is left. The frame
//! of the leaf is the guest's memory as long if no invalidation is in progress, for none begins meanwhile; while one is, there
//! is no answer.
//!
//! The guest's own tables may say something else by now. So may its CPU have fetched something else than they say: what a
//! CPU knows of them it may use until it is told to forget it, and what it was told to forget is not in the tables.

use super::page::Handle;
use super::table::Inside;
use crate::addr::PAGE_SHIFT;
use crate::format::long_mode::{self, NO_EXECUTE};
use crate::guest::Width;
use crate::host::{GuestMemory, Host};

/// Bytes of one look.
const WORD: u64 = 8;

/// The eight bytes from `linear` on; `None` if they are not in one page that is mapped to be executed, or can't be told.
pub(super) fn eight_bytes<H: Host + GuestMemory>(inside: Inside<'_, H>, root: Handle, linear: u64) -> Option<u64> {
    let offset = linear & ((1 << PAGE_SHIFT) - 1);
    let first = offset & !(WORD - 1);
    if first + 2 * WORD > 1 << PAGE_SHIFT || inside.mmu.notify.quiet().is_none() {
        return None;
    }
    let page = inside.page(root.index);
    let raw = page.is(root).then(|| inside.leaf(page, linear))??;
    let hfn = long_mode::mapped(raw).filter(|_| raw & NO_EXECUTE == 0)?;
    let word = |at: u64| inside.mmu.host.load(hfn, at as u32, Width::Eight);
    let shift = 8 * (offset - first) as u32;
    let low = word(first) >> shift;
    Some(if shift == 0 { low } else { low | word(first + WORD) << (u64::BITS - shift) })
}
