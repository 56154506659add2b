//! Taking shadow pages and mappings away.
//!
//! # A page
//! Under its lock its entries go, each link under the lock of the page below, each leaf under the bucket lock of its frame;
//! then its life ends. Nobody makes entries without that lock, so a page whose life has ended has none, which whoever meets
//! its handle may conclude without the lock: from here on nobody links to it, maps by it, or finds it. The list of its
//! parents is taken, the lock let go (parents are locked before their children, never after), and each parent that still
//! leads to it is made to forget it. Then it leaves its bucket: only then the guest's table may be written freely, for
//! no entry is left that was made of it. Its frame is owed a flush and a grace period, its place is free at once.
//!
//! A CPU that walks a parent's entry in between finds a table without entries, and faults.
//!
//! # Frames
//! Memory that is taken from the guest: all leaves of its frames go, through their reverse maps, large ones as a whole,
//! and all shadow pages that stand for one of its frames as a table, for what they were made of is going. Pages of old
//! epochs are not different. The flush is not left to others here: it is done before the lock is left.

use super::Shadow;
use super::hold::{Debts, hold};
use super::order::Order;
use super::page::{GROUP, Handle, Page, Place};
use super::role::Source;
use super::sync::{clear, unmap};
use super::table::Inside;
use crate::Mmu;
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange, Level};
use crate::format::long_mode::{self, ABSENT, Top};
use crate::host::Host;
use crate::lock::Ticket;
use crate::mutants::{self, Mutant};
use crate::sync::{load_for_update, store_beside_looks};
use crate::tlb::Debt;

/// What a worker keeps for its work on shadow pages.
#[derive(Debug)]
pub(crate) struct ShadowDebts(Debts);

impl ShadowDebts {
    pub(crate) fn new() -> Result<Self, OutOfMemory> {
        Ok(Self(Debts::new()?))
    }

    pub(super) fn debts(&mut self) -> &mut Debts {
        &mut self.0
    }
}

/// Ends a page's life and takes it apart. Whether it was this that did.
pub(crate) fn zap_page<H: Host>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    debts: &mut Debts,
    handle: Handle,
) -> bool {
    let Some(mut guard) = order.alive(inside, handle) else { return false };
    debts.withdraw(inside.shadow);
    let (page, role) = (guard.page, guard.page.role());
    for entry in guard.links.groups().flat_map(|first| first..first + GROUP) {
        let empty = inside.entries(page).is_none_or(|entries| load_for_update(&entries[entry]) == ABSENT);
        let taken = match role.level() {
            _ if empty => None,
            1 => unmap(inside, &mut guard, entry),
            _ => clear(inside, &mut guard, entry),
        };
        if let Some(taken) = taken {
            taken.owed_by(debts);
        }
    }
    guard.links.note_all_empty();
    page.end();
    let parents = core::mem::take(&mut guard.links.parents);
    drop(guard);
    for parent in &parents {
        forget(inside, order, *parent, handle, page);
    }
    // The list's memory is the page's next life's.
    let mut guard = order.page(inside, handle.index);
    guard.links.parents = parents;
    guard.links.parents.clear();
    drop(guard);
    let mut bucket = order.bucket(inside, page.gfn());
    bucket.remove_page(handle.index);
    inside.shadow.out_of_step.remove(inside, page);
    drop(bucket);
    let may_be_root = role.level() >= 4 || role.top() == Top::Pointers;
    debts.unlinked(page.take_frame(), may_be_root);
    inside.shadow.arena.put(handle.index, inside.relax());
    true
}

/// Removes the link at `parent` if it leads to `page`, which is dead.
fn forget<H: Host>(inside: Inside<'_, H>, order: &mut Order<'_>, parent: Place, handle: Handle, page: &Page) {
    let guard = order.page(inside, parent.page());
    let Some(entries) = inside.entries(guard.page) else { return };
    let cell = &entries[parent.entry()];
    let leads_here = guard.page.role().level() > 1
        && guard.page.target(parent.entry()) == handle.index
        && long_mode::next_table(load_for_update(cell)) == page.frame(inside.shared);
    if leads_here {
        store_beside_looks(cell, ABSENT);
    }
}

/// What `range` has of each block of 2 MiB: the number of the block's bucket, and the frames.
pub(super) fn blocks(shadow: &Shadow, range: GfnRange) -> impl Iterator<Item = (usize, GfnRange)> {
    let (pages, end) = (Level::M2.pages(), range.end.min(super::GFN_LIMIT));
    (range.start.0 / pages..end.0.div_ceil(pages)).map(move |block| {
        let block = GfnRange::block(Level::M2, Gfn(block * pages));
        let part = GfnRange { start: block.start.max(range.start), end: block.end.min(end) };
        (shadow.buckets.number(part.start), part)
    })
}

/// Takes the frames of `range` from the guest. When it returns, no vCPU reaches what they were mapped to, and no shadow
/// page reads one of them as a table. How many leaves were removed.
pub(crate) fn zap_range<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    range: GfnRange,
) -> u64 {
    let range = GfnRange { start: range.start, end: range.end.min(super::GFN_LIMIT) };
    let mut leaves = 0;
    if range.is_empty() {
        return 0;
    }
    shadow.withdrawals.begin();
    // A few blocks are looked up; for many, all buckets are gone through.
    if range.pages() / Level::M2.pages() <= 2 * shadow.buckets.all().len() as u64 {
        for (number, part) in blocks(shadow, range) {
            zap_pages(mmu, shadow, ticket, debts, number, part);
            hold(mmu, shadow, ticket, &mut debts.0, |inside, order, _| {
                leaves += order.numbered(inside, number).unmap_range(inside, part);
            });
        }
    } else {
        for number in 0..shadow.buckets.all().len() {
            // Most are, of a guest that is not large.
            if hold(mmu, shadow, ticket, &mut debts.0, |inside, order, _| order.numbered(inside, number).is_empty()) {
                continue;
            }
            zap_pages(mmu, shadow, ticket, debts, number, range);
            let mut chunk = 0;
            while hold(mmu, shadow, ticket, &mut debts.0, |inside, order, _| {
                leaves += order.numbered(inside, number).unmap_chunk(inside, chunk, range)?;
                Some(())
            })
            .is_some()
            {
                chunk += 1;
            }
        }
    }
    // Always: leaves that went earlier, without a flush, may have led there.
    hold(mmu, shadow, ticket, &mut debts.0, |_, _, debts| debts.owe_flush());
    shadow.withdrawals.end();
    leaves
}

/// Zaps the pages that stand for tables in `range`, which was written by the embedder: nobody saw the write.
///
/// A page that becomes visible in its bucket after the look there reads the guest's entries later still, under a lock that
/// was taken later: it is made of what was written. Nothing is flushed for this: what a CPU still has of the old entries is
/// the guest's business, as with any write to its tables.
pub(crate) fn zap_tables<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    range: GfnRange,
) {
    for gfn in (range.start.0..range.end.min(super::GFN_LIMIT).0).map(Gfn) {
        let number = shadow.buckets.number(gfn);
        zap_pages(mmu, shadow, ticket, debts, number, GfnRange { start: gfn, end: Gfn(gfn.0 + 1) });
    }
}

/// Zaps the pages of a bucket that stand for tables in `range`.
fn zap_pages<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    number: usize,
    range: GfnRange,
) {
    // One that is dying reads nothing any more.
    let of_guest = |page: &Page| page.role().source() != Source::Identity && page.life() & 1 == 1;
    let GfnRange { start: mut from, end } = range;
    loop {
        // Frame by frame; of one frame as many as there are now, the oldest first: those that faults make meanwhile are
        // theirs. One page a hold, for that is a lot of work already.
        let next = hold(mmu, shadow, ticket, &mut debts.0, |inside, order, _| {
            let bucket = order.numbered(inside, number);
            let of_guest = |index: &u32| of_guest(inside.page(*index));
            let first = bucket.pages_in(GfnRange { start: from, end }).find(of_guest)?;
            let gfn = inside.page(first).gfn();
            Some((gfn, bucket.pages(gfn).filter(of_guest).count()))
        });
        let Some((gfn, count)) = next else { return };
        for _ in 0..count {
            hold(mmu, shadow, ticket, &mut debts.0, |inside, order, debts| {
                let bucket = order.numbered(inside, number);
                let index = bucket.pages(gfn).find(|index| of_guest(inside.page(*index)));
                drop(bucket);
                if let Some(index) = index {
                    zap_page(inside, order, debts, Handle { index, life: inside.page(index).life() });
                }
            });
        }
        from = Gfn(gfn.0 + 1);
    }
}

/// Zaps the pages of epochs before this one, which are reached by nobody since it began.
pub(crate) fn zap_obsolete<H: Host>(mmu: &Mmu<H>, shadow: &Shadow, ticket: &mut Ticket, debts: &mut ShadowDebts) {
    let epoch = shadow.epoch();
    let obsolete = |page: &Page| page.life() & 1 == 1 && page.epoch() != epoch;
    let mut old = shadow.arena.pages().filter(|(_, page)| obsolete(page)).peekable();
    while old.peek().is_some() && !mutants::is(Mutant::ObsoleteRootsNotEmptied) {
        hold(mmu, shadow, ticket, &mut debts.0, |inside, order, debts| {
            for (index, page) in old.by_ref() {
                let handle = Handle { index, life: page.life() };
                if obsolete(page) {
                    zap_page(inside, order, debts, handle);
                }
                if debts.are_many() || inside.shared.should_yield() {
                    break;
                }
            }
        });
        mmu.host.yield_now();
    }
}

/// Takes the right to write from all leaves that map one of `gfns`, large ones as a whole. The flush is the caller's: this
/// runs it up in `debt`.
pub(crate) fn write_protect<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    gfns: impl Iterator<Item = Gfn>,
    debt: &mut Debt,
) {
    debt.withdraw(shadow);
    let mut gfns = gfns.take_while(|gfn| *gfn < super::GFN_LIMIT).peekable();
    while let Some(first) = gfns.peek().copied() {
        // One block a hold.
        let number = shadow.buckets.number(first);
        hold(mmu, shadow, ticket, &mut debts.0, |inside, order, _| {
            let block = GfnRange::block(Level::M2, first);
            let here = core::iter::from_fn(|| gfns.next_if(|gfn| block.contains(*gfn)));
            order.numbered(inside, number).write_protect(inside, first, here);
        });
    }
}
