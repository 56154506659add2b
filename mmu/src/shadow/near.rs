//! A fault near the last one: in the same page of leaves, of a frame whose memory is at hand. Most are.
//!
//! # Protocol
//! Nothing is asked outside the lock, and the guest's upper tables are not read. What the last fault found out is used
//! again: the page of leaves, and the slot. That is right for these reasons:
//! - *The leaf.* It is made in a page that is alive and of this epoch, under its lock, of the guest's entry as it is read
//!   there: it is what that page's identity says that it is, whether or not anything leads there still. If nothing does,
//!   or the guest's upper entries have changed since, the guest faults again, finds this leaf in its place, and takes the
//!   longer way, which finds out. So no fault that is the guest's own is kept from it, and none goes round in a circle.
//! - *The access.* It must be allowed by the entry, read under the lock, and by what the page's role says of the entries
//!   above. Whatever is not plainly allowed, or would need a mark in the guest's entry, takes the longer way.
//! - *The backing.* It is asked inside the lock, as for neighbours of any fault (`memory`), under slots that are those of
//!   the last fault.
//! - *Writes that somebody watches* take the longer way, but for logged ones, which [`fill`] tells of.
//!
//! What is in the way here (no room in a bucket, a table to be opened that floods, a list that is full) is for the longer
//! way as well: it starts from the beginning, and nothing was done that it would not do.

use super::fault::{Step, fill, prefetch};
use super::leaves::Leaves;
use super::memory::Remembered;
use super::order::Order;
use super::page::Handle;
use super::table::Inside;
use crate::addr::{INDEX_BITS, PAGE_SHIFT};
use crate::format::long_mode::{ABSENT, KEY, NO_EXECUTE, USER, WRITE};
use crate::guest::{Mode, Request, Rights};
use crate::host::{Access, GuestMemory, Host};
use crate::sync::load_for_update;

/// Where the last fault ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Near {
    /// Under which root.
    pub(super) root: Handle,
    /// [`Near::table`] of its address.
    pub(super) table: u64,
    /// The page of leaves, and what its leaves are made of.
    pub(super) page: Handle,
    pub(super) leaves: Leaves,
}

impl Near {
    /// What addresses in one page of leaves have in common.
    pub(super) const fn table(linear: u64) -> u64 {
        linear >> (PAGE_SHIFT + INDEX_BITS)
    }

    /// Whether a fault is near.
    pub(super) fn holds(&self, root: Handle, linear: u64) -> bool {
        self.root == root && self.table == Self::table(linear)
    }
}

/// Maps what `request` is about in the page of `near`, if that is all that it takes; whether it was.
pub(super) fn map<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    near: &Near,
    mode: &Mode,
    request: &Request,
    remembered: &Remembered,
) -> bool {
    let Some(last) = remembered.target.as_ref() else { return false };
    let Some(neighbours) = last.near(inside, &remembered.target_slot) else { return false };
    let Some(mut guard) = order.alive(inside, near.page) else { return false };
    let (page, role) = (guard.page, guard.page.role());
    if page.epoch() != inside.shadow.epoch() || role.ignores_write_protection() {
        return false;
    }
    let entry = role.index(request.linear);
    let (Some(entries), Some(leaf)) = (inside.entries(page), near.leaves.leaf(inside, page, entry)) else {
        return false;
    };
    let (bits, writes) = (leaf.bits, request.access == Access::Write);
    let rights = Rights { user: bits & USER != 0, write: bits & WRITE != 0, execute: bits & NO_EXECUTE == 0 };
    let key = ((bits & KEY) >> KEY.trailing_zeros()) as u8;
    if load_for_update(&entries[entry]) != ABSENT || !mode.lets(rights, key, request) {
        return false;
    }
    let Some(target) = neighbours.target(leaf.gfn).filter(|target| target.page.writable || !writes) else {
        return false;
    };
    page.touch();
    let step = fill(inside, &mut guard, entry, request.access, &target, leaf);
    if step == Step::Fixed {
        prefetch(inside, &mut guard, entry, &neighbours, &near.leaves);
    }
    step == Step::Fixed
}
