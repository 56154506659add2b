//! Bringing shadow pages back in step with the guest's tables (KVM: sync; Xen: resync).
//!
//! # The list
//! A page whose table the guest may write is on the list of pages out of step, from before the table's first writable
//! leaf until all its entries have been compared again. [`in_step`] goes through the list; it is called where a CPU would
//! forget translations: CR3 loads, flushes. That is more than the architecture asks (pages of other address spaces are
//! on the list too), and never wrong: a CPU may forget at any time.
//!
//! # One page
//! 1. Under the bucket lock of the table: it counts as protected again, and all leaves of the table lose their right to
//!    write.
//! 2. All vCPUs flush, unless they have since such a right was last taken away there. From here on every write to the
//!    table faults, and marks the page anew.
//! 3. Under the page's lock: each entry is compared with what would be made of the guest's entry now, and removed if it
//!    gives anything that it would not. Nothing is given: faults do that.
//! 4. Under both locks: if the table was not opened again meanwhile, the page is in step, and leaves the list.
//!
//! Others may do the same to the same page at the same time. Until step 4 the page stays on the list, so that who looks
//! at the list in between does not take it for done: it does steps 2 and 3 itself.
//!
//! # Why a fault can not slip in an old entry
//! Entries are made under the page's lock of what the guest's entry says under that lock. If that was before step 3, step
//! 3 sees the entry. If it was after, it read what step 3 reads or something newer.

use alloc::vec::Vec;

use super::bucket::Bucket;
use super::leaves::{Leaves, Reading};
use super::order::{Order, PageGuard};
use super::page::{Handle, Page, Place, STALE, UNSYNC};
use super::role::{Meaning, Source};
use super::table::Inside;
use crate::addr::{ENTRIES, Gfn};
use crate::events::Counter;
use crate::format::long_mode::ABSENT;
use crate::guest::{Judged, Mode, Width};
use crate::host::{GuestMemory, Host};
use crate::leaf_lock::LeafLock;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU32, Ordering, load_for_update};
use crate::tlb::Moment;

/// Pages out of step at most. More, and the fault that would add one brings the others in step first.
const LIST: usize = 64;
/// Pages that a frame may have when it is opened; those beyond are zapped first. A frame can have more pages than the list has
/// places, all of them roots in use (PAE has 128 in a frame): bringing others in step would never make room for them.
pub(super) const TOGETHER: usize = LIST / 2;

/// The list of pages out of step.
#[derive(Debug)]
pub(super) struct OutOfStep {
    pages: LeafLock<Vec<Handle>>,
    /// How many are on it; written under its lock. Who finds none has nothing to bring in step: what the guest wrote
    /// before it asked to forget was writable before, and on the list before that.
    count: AtomicU32,
}

impl OutOfStep {
    pub(super) fn new() -> Self {
        Self { pages: LeafLock::new(Vec::with_capacity(LIST)), count: AtomicU32::new(0) }
    }

    /// Puts a page on the list; whether there was room. Under its bucket lock.
    fn add<H: Host>(&self, inside: Inside<'_, H>, handle: Handle) -> bool {
        let mut pages = self.pages.lock(inside.relax());
        if pages.contains(&handle) {
            return true;
        }
        // Pages that died on the list are of no concern to anybody.
        pages.retain(|other| inside.page(other.index).is(*other));
        let room = pages.len() < LIST;
        if room {
            pages.push(handle);
        }
        self.count.store(pages.len() as u32, Ordering::Release);
        room
    }

    fn remove<H: Host>(&self, inside: Inside<'_, H>, handle: Handle) {
        let mut pages = self.pages.lock(inside.relax());
        pages.retain(|other| *other != handle);
        self.count.store(pages.len() as u32, Ordering::Release);
    }

    /// Whether no page is on the list.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    fn copy<H: Host>(&self, inside: Inside<'_, H>) -> ([Handle; LIST], usize) {
        let pages = self.pages.lock(inside.relax());
        let mut copy = [Handle { index: 0, life: 0 }; LIST];
        copy[..pages.len()].copy_from_slice(&pages);
        (copy, pages.len())
    }
}

/// Marks all pages of `gfn` that are in step as out of it, so that a leaf of it may become writable; `false` if the list
/// is full, and then some are and some are not, each rightly. Under the bucket lock, and before the leaf.
pub(super) fn open<H: Host>(inside: Inside<'_, H>, bucket: &Bucket, gfn: Gfn) -> bool {
    bucket.pages(gfn).all(|index| {
        let page = inside.page(index);
        if page.role().source() == Source::Identity || page.has(UNSYNC) {
            return true;
        }
        let handle = Handle { index, life: page.life() };
        // A page that is being taken apart has an even life; none of its entries will be used.
        if handle.life & 1 == 0 || inside.shadow.out_of_step.add(inside, handle) {
            page.set(UNSYNC | STALE);
            page.count_write();
            inside.counters().add(Counter::Unsynced, 1);
            return true;
        }
        false
    })
}

/// Brings all pages on the list in step.
pub(super) fn all_in_step<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>) {
    if inside.shadow.out_of_step.is_empty() {
        return;
    }
    let (pages, count) = inside.shadow.out_of_step.copy(inside);
    in_step(inside, order, &pages[..count]);
}

/// Brings these pages in step.
pub(super) fn in_step<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>, pages: &[Handle]) {
    let mut latest = Moment::NEVER;
    for handle in pages {
        let page = inside.page(handle.index);
        let gfn = page.gfn();
        let mut bucket = order.bucket(inside, gfn);
        // Under the lock of the wrong bucket, should the page have died and come to life for another frame: then it is
        // not this life any more.
        if page.is(*handle) {
            page.clear(UNSYNC);
            bucket.write_protect(inside, gfn);
            latest = latest.max(bucket.protected());
        }
    }
    if !inside.mmu.tlb.covers(latest) && !mutants::is(Mutant::ShadowPageWithoutFlush) {
        inside.mmu.tlb.flush(&inside.mmu.host, inside.counters());
    }
    for handle in pages {
        if let Some(mut guard) = order.alive(inside, *handle) {
            compare_all(inside, &mut guard);
            let mut bucket = guard.bucket(inside, inside.page(handle.index).gfn());
            in_step_now(inside, &mut bucket, *handle);
        }
    }
}

/// Step 4.
fn in_step_now<H: Host>(inside: Inside<'_, H>, _bucket: &mut Bucket, handle: Handle) {
    let page = inside.page(handle.index);
    if !page.has(UNSYNC) {
        page.clear(STALE);
        inside.shadow.out_of_step.remove(inside, handle);
    }
}

/// What the guest's entry behind `entry` of `page` says now. Under the page's lock, or before anybody knows the page.
pub(super) fn judge<H: Host + GuestMemory>(inside: Inside<'_, H>, page: &Page, mode: &Mode, entry: usize) -> Judged {
    let role = page.role();
    match role.source() {
        Source::Identity => Judged::Nothing,
        Source::Guest(width) => {
            let raw = inside.mmu.host.load(page.guest(), role.guest_offset(entry), width);
            mode.judge(role.level(), raw)
        }
    }
}

/// Compares all entries with the guest's, and removes what the guest's would not give.
pub(super) fn compare_all<H: Host + GuestMemory>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>) {
    let (page, role) = (guard.page, guard.page.role());
    let mode = role.mode(inside.shadow.cpu);
    if role.level() > 1 {
        return (0..role.entries()).for_each(|entry| compare_link(inside, guard, &mode, entry));
    }
    let Leaves::Guest(reading) = Leaves::of(page, &mode) else { return };
    let guest = page.guest();
    // Each with the width known, which would else be asked at each entry.
    match reading.width {
        Width::Eight => {
            compare_leaves(inside, guard, &reading, |entry| reading.load_as(inside, guest, entry, Width::Eight));
        }
        Width::Four => {
            compare_leaves(inside, guard, &reading, |entry| reading.load_as(inside, guest, entry, Width::Four));
        }
    }
}

fn compare_leaves<H: Host>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    reading: &Reading,
    load: impl Fn(usize) -> u64,
) {
    let page = guard.page;
    let (Some(entries), Some(targets)) = (inside.entries(page), page.targets()) else { return };
    let glance = reading.glance();
    for entry in 0..ENTRIES {
        let there = load_for_update(&entries[entry]);
        if there == ABSENT {
            continue;
        }
        let (raw, target) = (load(entry), targets[entry].load(Ordering::Relaxed));
        if !glance.is_unchanged(raw, there, target) && !reading.gives(raw, there, target) {
            if let Some(leaf) = reading.leaf(raw).filter(|_| mutants::is(Mutant::ShadowUnmappedByGuestEntry)) {
                page.aim(entry, leaf.gfn.0 as u32);
            }
            unmap(inside, guard, entry);
        }
    }
}

/// Compares one entry.
pub(super) fn compare<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    mode: &Mode,
    entry: usize,
) {
    let page = guard.page;
    if page.role().level() > 1 {
        return compare_link(inside, guard, mode, entry);
    }
    let (Leaves::Guest(reading), Some(entries)) = (Leaves::of(page, mode), inside.entries(page)) else { return };
    let there = load_for_update(&entries[entry]);
    if there != ABSENT && !reading.gives(reading.load(inside, page.guest(), entry), there, page.target(entry)) {
        unmap(inside, guard, entry);
    }
}

/// Compares one entry above level 1.
fn compare_link<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    mode: &Mode,
    entry: usize,
) {
    let page = guard.page;
    let Some(entries) = inside.entries(page) else { return };
    if load_for_update(&entries[entry]) == ABSENT {
        return;
    }
    let meaning = page.role().meaning(page.gfn(), entry, judge(inside, page, mode, entry));
    let below = inside.page(page.target(entry));
    if meaning != Meaning::Child(below.identity()) || below.life() & 1 == 0 {
        unlink(inside, guard, entry);
    }
}

/// Removes the link of `entry` to the page below, if there is one.
pub(super) fn unlink<H: Host>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, entry: usize) {
    let Some(entries) = inside.entries(guard.page) else { return };
    if entries[entry].swap(ABSENT, Ordering::AcqRel) == ABSENT {
        return;
    }
    let place = Place::new(guard.index, entry);
    let below = guard.page.target(entry);
    // Not there any more if the page below is dying: its list was taken, and whoever did that will find nothing here.
    guard.child(inside, below).links.parents.retain(|parent| *parent != place);
}

/// Removes the leaf of `entry`, if there is one.
pub(super) fn unmap<H: Host>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, entry: usize) {
    let gfn = Gfn(u64::from(guard.page.target(entry)));
    let place = Place::new(guard.index, entry);
    guard.bucket(inside, gfn).unmap(inside, gfn, place);
}
