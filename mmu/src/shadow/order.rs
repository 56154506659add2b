//! The order of locks, in types.
//!
//! [`Order`] is the right to lock, made once a hold. Locking borrows it mutably, so whoever holds a page's lock can lock
//! no unrelated page: only what the guard offers, a child of that page, and then one bucket. A bucket's guard offers
//! nothing. What a borrow can not say, that a child's level is lower, is asserted. Any page may be locked out of order if that
//! needs no waiting ([`Looks`]).

use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use super::bucket::Bucket;
use super::page::{Handle, Links, Page};
use super::table::Inside;
use crate::addr::Gfn;
use crate::host::Host;
use crate::leaf_lock::LeafGuard;

/// Times that a lock is tried that may not be waited for: its holder works on one entry, or on a few.
const LOOKS: usize = if cfg!(any(feature = "loom", feature = "shuttle")) { 1 } else { 256 };

/// The right to lock from the top. See the module head.
#[derive(Debug)]
pub(crate) struct Order<'h>(PhantomData<&'h mut ()>);

/// Who may look at who leads to a page, of any level: waiting for its lock, or only if that is free.
pub(super) trait Looks {
    /// Locks the page at a place, whatever it is now; `None` if it is locked, and may not be waited for.
    fn look<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, index: u32) -> Option<PageGuard<'g, 's>>;
}

/// Holds a page's lock.
pub(crate) struct PageGuard<'g, 'o> {
    pub(super) page: &'g Page,
    pub(super) index: u32,
    pub(super) links: LeafGuard<'g, Links>,
    order: PhantomData<&'o mut ()>,
}

/// Holds a bucket's lock.
pub(crate) struct BucketGuard<'g, 'o> {
    bucket: LeafGuard<'g, Bucket>,
    order: PhantomData<&'o mut ()>,
}

fn page<'g, 'o, H: Host>(inside: Inside<'g, H>, index: u32) -> PageGuard<'g, 'o> {
    let page = inside.page(index);
    PageGuard { page, index, links: page.links().lock(inside.relax()), order: PhantomData }
}

fn bucket<'g, 'o, H: Host>(inside: Inside<'g, H>, number: usize) -> BucketGuard<'g, 'o> {
    BucketGuard { bucket: inside.shadow.buckets.numbered(number).lock(inside.relax()), order: PhantomData }
}

impl Order<'_> {
    /// For the hold that begins: one, or what the types say is not true.
    pub(super) const fn of_this_hold() -> Self {
        Self(PhantomData)
    }

    /// Locks the page at a place, whatever it is now.
    pub(crate) fn page<'g, H: Host>(&mut self, inside: Inside<'g, H>, index: u32) -> PageGuard<'g, '_> {
        page(inside, index)
    }

    /// Locks a page if it still is in the life that `handle` means.
    pub(crate) fn alive<'g, H: Host>(&mut self, inside: Inside<'g, H>, handle: Handle) -> Option<PageGuard<'g, '_>> {
        Some(page(inside, handle.index)).filter(|guard| guard.page.is(handle))
    }

    /// Locks the bucket of `gfn`.
    pub(crate) fn bucket<'g, H: Host>(&mut self, inside: Inside<'g, H>, gfn: Gfn) -> BucketGuard<'g, '_> {
        bucket(inside, inside.shadow.buckets.number(gfn))
    }

    /// Locks the bucket of that number.
    pub(super) fn numbered<'g, H: Host>(&mut self, inside: Inside<'g, H>, number: usize) -> BucketGuard<'g, '_> {
        bucket(inside, number)
    }
}

impl Looks for Order<'_> {
    fn look<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, index: u32) -> Option<PageGuard<'g, 's>> {
        Some(page(inside, index))
    }
}

/// Who holds a page waits for none that may be above it.
impl Looks for PageGuard<'_, '_> {
    fn look<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, index: u32) -> Option<PageGuard<'g, 's>> {
        let page = inside.page(index);
        let links = (0..LOOKS).find_map(|_| {
            let links = page.links().try_lock();
            if links.is_none() {
                inside.mmu.host.relax();
            }
            links
        })?;
        Some(PageGuard { page, index, links, order: PhantomData })
    }
}

impl PageGuard<'_, '_> {
    /// Locks the page at a place that an entry of this page leads to, or led to until a moment ago under this guard: it
    /// can be dying, but its place is not another page's before this one has been asked to forget it.
    pub(super) fn child<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, index: u32) -> PageGuard<'g, 's> {
        let below = page(inside, index);
        debug_assert!(below.page.role().level() < self.page.role().level(), "locks go from the top down");
        below
    }

    /// Locks a page that is to become a child of this one, if it still is in the life that `handle` means.
    ///
    /// It is waited for only while it is: in its next life the page might be of a higher level than this one, and its
    /// holder wait for us.
    pub(super) fn future_child<'g, 's, H: Host>(
        &'s mut self,
        inside: Inside<'g, H>,
        handle: Handle,
    ) -> Option<PageGuard<'g, 's>> {
        let page = inside.page(handle.index);
        let links = loop {
            if !page.is(handle) {
                return None;
            }
            match page.links().try_lock() {
                Some(links) => break links,
                None => inside.mmu.host.relax(),
            }
        };
        Some(PageGuard { page, index: handle.index, links, order: PhantomData }).filter(|guard| guard.page.is(handle))
    }

    /// Locks the bucket of `gfn`.
    pub(crate) fn bucket<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, gfn: Gfn) -> BucketGuard<'g, 's> {
        bucket(inside, inside.shadow.buckets.number(gfn))
    }
}

impl PageGuard<'_, '_> {
    /// Locks the bucket of that number.
    pub(super) fn numbered<'g, 's, H: Host>(&'s mut self, inside: Inside<'g, H>, number: usize) -> BucketGuard<'g, 's> {
        bucket(inside, number)
    }
}

impl Deref for BucketGuard<'_, '_> {
    type Target = Bucket;
    fn deref(&self) -> &Bucket {
        &self.bucket
    }
}

impl DerefMut for BucketGuard<'_, '_> {
    fn deref_mut(&mut self) -> &mut Bucket {
        &mut self.bucket
    }
}
