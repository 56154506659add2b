//! Bringing shadow pages back in step with the guest's tables (KVM: sync; Xen: resync).
//!
//! # The list
//! A page whose table the guest may write is on the list of pages out of step, from before the table's first writable
//! leaf until all its entries have been compared again. Where a CPU would forget translations (CR3 loads, flushes), the
//! pages of the list that the root *reaches* are brought in step ([`below_in_step`]): those to which a way of links leads
//! from it. Those of other address spaces stay as they are, for the next load of a root that reaches them; their guest may
//! be writing them at the moment, on another vCPU.
//!
//! Each time that a page gets on the list, or its table is opened again, it has a new *number* there, higher than all
//! before. Every page T remembers a number up to which it has looked: **no page that is on the list with a number that T
//! has seen is reached from T.** So a load of CR3 looks at what is new since the last load of this root and at nothing
//! else, and mostly there is nothing.
//!
//! # Who keeps that true
//! - *A look from T* copies what is new on the list, goes up from each of these pages through the lists of parents, one
//!   lock at a time, and finds T or does not. What it finds is brought in step, which takes it off the list or, should it
//!   be opened meanwhile, gives it a higher number. Then T has seen the numbers up to that of the copy.
//! - *A link* to a page C enters itself into C's list of parents *first*, under C's lock, and looks from C *second*, under
//!   the same lock. If it finds a page out of step, it takes the link back. A look from some T that went past C's list
//!   before the link was entered had copied the list before that; what it had copied is on the list still when the link
//!   looks, or has been in step since. Of several links that are made at the same time and only together make a way, the
//!   last one that is entered finds the others entered.
//! - *A link to a page of leaves* that is out of step is made nevertheless, as its table may be written all the time: it is
//!   entered, the page gets a new number, and then all its entries are compared. Whoever looked at the list before that
//!   loaded CR3 before the comparison; whoever looks later finds the new number, and the link.
//! - *A load of CR3 that leaves a page of leaves open*, because the guest writes it between any two loads and each time
//!   that it is opened is a fault, does the same: the page gets a new number, and then all its entries are compared. What it
//!   has seen ends before that number, so the next load finds the page again.
//! - *A page whose life begins* has no link, and has seen what there is.
//!
//! A look may find a way that is not there (any more, or where there are too many to tell): then a page is brought in step
//! that need not be. That is never wrong: a CPU may forget at any time.
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
//! at the list in between does not take it for done: it does steps 2 and 3 itself. Whether the table was opened again since
//! is told by the number that the page had before step 1, and not by whether it is open at step 4: another may have protected
//! it again, and not have compared it yet.
//!
//! # Links that stay
//! A CPU never has an old lower entry under an upper one that is newer: it has read the upper one first. Of links that are
//! made, `fault` sees to that. But a link that is compared and *stays* is like one that is made: the guest's entry may have
//! been another one for a while, and the tables below written in that time. So whoever has compared upper pages for a root
//! looks at the list again: what was opened *since it was copied*, is of a lower level than the highest page that was
//! compared, and is reached from the root, is brought in step as well; and so on, until no upper page is among it. Each look
//! is at lower levels than the one before, so there are no more looks than levels.
//!
//! *Why that is all.* In one look, a page below an upper one was protected before either was compared. If it was not opened
//! until the upper one had been, it was in step at that moment, whichever was compared first; if it was, the next look finds
//! it. A page that is not on the list when that is copied is in step at that moment, and what is below it is in step then or
//! is compared later. So the moments at which entries were read never go back from the root down, and the first is after
//! the load of CR3. (Pages that stay open are written without a new number: none does beside upper pages.)
//!
//! Who brings single pages in step for other reasons (the list is full) owes nothing to what is below them: who loads CR3
//! later finds on the list what was opened there.
//!
//! # Why a fault can not slip in an old entry
//! Entries are made under the page's lock of what the guest's entry says under that lock. If that was before step 3, step
//! 3 sees the entry. If it was after, it read what step 3 reads or something newer.

use super::bucket::Bucket;
use super::large;
use super::leaves::{Glance, Leaves, Reading};
use super::listed::{Chosen, LIST, Listed};
use super::order::{Looks, Order, PageGuard};
use super::page::{GROUP, Handle, Page, Place, STALE, UNSYNC};
use super::role::{Meaning, Source};
use super::table::Inside;
use super::withdrawn::Taken;
use crate::addr::{ENTRIES, Gfn, Level};
use crate::events::Counter;
use crate::format::long_mode::{self, ABSENT};
use crate::guest::{Judged, Mode, Width};
use crate::host::{GuestMemory, Host};
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU64, Ordering, load_for_update};
use crate::tlb::Moment;

/// Pages that a frame may have when it is opened; those beyond are zapped first. A frame can have more pages than the list has
/// places, all of them roots in use (PAE has 128 in a frame): bringing others in step would never make room for them.
pub(super) const TOGETHER: usize = LIST / 2;

/// Groups of entries of a page that may be left open.
const FEW: usize = 8;
/// Ways up that a look follows at a time. With more, it takes the page for one that is reached.
const WAYS: usize = 16;

/// Whether a way of links leads from the page at `top` to `page`, or to too many pages to tell.
///
/// Level by level upwards: what leads to a page is of the next level. Dead pages lead nowhere, for they have no entries.
fn is_reached<H: Host>(inside: Inside<'_, H>, looks: &mut impl Looks, top: u32, page: Handle) -> bool {
    if page.index == top {
        return true;
    }
    let top_level = inside.page(top).role().level();
    let mut one = page;
    // Most pages have one parent.
    loop {
        let page = inside.page(one.index);
        let level = page.role().level();
        if !page.is(one) || level >= top_level {
            return false;
        }
        let Some(guard) = looks.look(inside, one.index) else { return true };
        if !page.is(one) {
            return false;
        }
        let parents = &guard.links.parents;
        if level + 1 == top_level {
            return parents.iter().any(|parent| parent.page() == top);
        }
        match parents[..] {
            [] => return false,
            [parent] => one = Handle { index: parent.page(), life: inside.page(parent.page()).life() },
            _ => break,
        }
    }
    is_reached_by_many(inside, looks, top, one)
}

/// The same of a page that has more than one parent, or had.
#[inline(never)]
fn is_reached_by_many<H: Host>(inside: Inside<'_, H>, looks: &mut impl Looks, top: u32, page: Handle) -> bool {
    let top_level = inside.page(top).role().level();
    let (mut here, mut count) = ([page; WAYS], 1);
    while count > 0 {
        let (mut above, mut found) = ([page; WAYS], 0);
        for handle in &here[..count] {
            let page = inside.page(handle.index);
            if !page.is(*handle) || page.role().level() >= top_level {
                continue;
            }
            let Some(guard) = looks.look(inside, handle.index) else { return true };
            if !page.is(*handle) {
                continue;
            }
            let parents = &guard.links.parents;
            if page.role().level() + 1 == top_level {
                if parents.iter().any(|parent| parent.page() == top) {
                    return true;
                }
                continue;
            }
            for index in parents.iter().map(|parent| parent.page()) {
                let handle = Handle { index, life: inside.page(index).life() };
                if !above[..found].contains(&handle) {
                    if found == WAYS {
                        return true;
                    }
                    above[found] = handle;
                    found += 1;
                }
            }
        }
        (here, count) = (above, found);
    }
    false
}

/// What becomes of pages of leaves that the guest writes again and again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Busy {
    /// They are brought in step as all others, for a link is to be made above them.
    Protect,
    /// They stay open, and are compared as they are.
    LeaveOpen,
}

/// Brings everything in step that the root `top`, or another page, reaches.
pub(super) fn below_in_step<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    top: Handle,
    busy: Busy,
) {
    let page = inside.page(top.index);
    if !inside.shadow.out_of_step.has_news(page) {
        return;
    }
    let mut news = inside.shadow.out_of_step.since(inside, page.in_step_to());
    let (up_to, mut below) = (news.up_to, u8::MAX);
    loop {
        let highest = look_down(inside, order, top, &mut news, below, busy);
        let more = highest > 1 && inside.shadow.out_of_step.latest() > news.up_to;
        if !more || mutants::is(Mutant::ShadowLookedOnce) {
            break;
        }
        below = highest;
        news = inside.shadow.out_of_step.since(inside, news.up_to);
    }
    if let Some(guard) = order.alive(inside, top) {
        // It was alive all the time: what was found is of this life.
        guard.page.note_in_step_to(up_to);
    }
}

/// Brings those of `news` in step that `top` reaches and that are of levels lower than `below`; the highest of these, 0 if
/// there is none.
fn look_down<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    top: Handle,
    news: &mut Chosen,
    below: u8,
    busy: Busy,
) -> u8 {
    let mut highest = 0;
    news.retain(|page| {
        // (One that has died meanwhile may be of another level by now. Nothing leads to it.)
        let level = inside.page(page.index).role().level();
        let reached = level < below && is_reached(inside, order, top.index, page);
        if reached {
            highest = highest.max(level);
        }
        reached
    });
    // Beside upper pages none stays open: see the module head.
    if highest == 1 && busy == Busy::LeaveOpen {
        news.retain(|page| !compare_busy(inside, order, page));
    }
    in_step(inside, order, news.pages());
    highest
}

/// Whether a link to the page of `guard`, which has been entered into its list of parents, may be made; if not, something
/// below has to be brought in step first.
pub(super) fn may_link<H: Host + GuestMemory>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>) -> bool {
    let (page, top) = (guard.page, guard.index);
    let out_of_step = &inside.shadow.out_of_step;
    if page.role().level() == 1 {
        if page.has(STALE) {
            // It may be written at any time, and is on the list: what counts is that its entries are not older than the
            // one above. If it is being protected by somebody who has not finished, that is not for sure yet.
            if !page.has(UNSYNC) {
                return false;
            }
            compare_open(inside, guard);
        }
        return true;
    }
    if !out_of_step.has_news(page) || mutants::is(Mutant::ShadowLinkWithoutLook) {
        return true;
    }
    let news = out_of_step.since(inside, page.in_step_to());
    let reaches_none = !news.pages().iter().any(|listed| is_reached(inside, guard, top, listed.page));
    if reaches_none {
        page.note_in_step_to(news.up_to);
    }
    reaches_none
}

/// Compares all entries of a page of leaves that stays open. Whoever looked at the list before has asked for nothing newer
/// than what is read now, and whoever looks later finds the new number.
fn compare_open<H: Host + GuestMemory>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>) {
    if !mutants::is(Mutant::ShadowLinkUnnoticed) {
        inside.shadow.out_of_step.renew(inside, guard.index);
    }
    compare_all(inside, guard);
}

/// Compares a page and leaves it open, if that is worth while: whether it was.
///
/// To compare a few entries costs less than the fault that would open the page again. But it is done at each load of a root
/// that reaches the page, so a page is left open for some loads only, and only if it was opened before.
fn compare_busy<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>, handle: Handle) -> bool {
    let page = inside.page(handle.index);
    if !page.is_busy() {
        return false;
    }
    let Some(mut guard) = order.alive(inside, handle) else { return false };
    // Somebody may be protecting it: then it is not for sure yet that it is open.
    let leave = page.role().level() == 1 && page.has(UNSYNC) && guard.links.groups().len() <= FEW;
    if leave {
        page.count_look();
        compare_open(inside, &mut guard);
    }
    leave
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
        let dying = handle.life & 1 == 0;
        if dying {
            page.set(UNSYNC | STALE);
        }
        if dying || inside.shadow.out_of_step.add(inside, handle) {
            page.count_write();
            page.note_open();
            inside.counters().add(Counter::Unsynced, 1);
            return true;
        }
        false
    })
}

/// Brings all pages on the list in step.
pub(super) fn all_in_step<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>) {
    if !inside.shadow.out_of_step.is_empty() {
        let all = inside.shadow.out_of_step.since(inside, 0);
        in_step(inside, order, all.pages());
    }
}

/// Brings these pages in step.
pub(super) fn in_step<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>, pages: &[Listed]) {
    if pages.is_empty() {
        return;
    }
    let mut latest = Moment::NEVER;
    let withdrawals = &inside.shadow.withdrawals;
    withdrawals.begin();
    for Listed { page: handle, .. } in pages {
        let page = inside.page(handle.index);
        let gfn = page.gfn();
        let mut bucket = order.bucket(inside, gfn);
        // Under the lock of the wrong bucket, should the page have died and come to life for another frame: then it is
        // not this life any more.
        if page.is(*handle) {
            page.clear(UNSYNC);
            bucket.write_protect(inside, gfn, core::iter::once(gfn));
            latest = latest.max(bucket.protected());
        }
    }
    if !inside.mmu.tlb.covers(latest) && !mutants::is(Mutant::ShadowPageWithoutFlush) {
        inside.mmu.tlb.flush(&inside.mmu.host, inside.counters());
    }
    withdrawals.end();
    for Listed { page: handle, number } in pages {
        if let Some(mut guard) = order.alive(inside, *handle) {
            compare_all(inside, &mut guard);
            mutants::dawdle(Mutant::ShadowOpenedAgainUnnoticed, inside.relax());
            let page = guard.page;
            in_step_now(inside, &mut guard.bucket(inside, page.gfn()), page, *number);
        }
    }
}

/// Step 4. `number` is what the page had on the list before step 1.
fn in_step_now<H: Host>(inside: Inside<'_, H>, _bucket: &mut Bucket, page: &Page, number: u64) {
    if !page.has(UNSYNC) && inside.shadow.out_of_step.remove_as(inside, page, number) {
        page.clear(STALE);
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
        return compare_links(inside, guard, &mode);
    }
    let Leaves::Guest(reading) = Leaves::of(page, &mode) else { return };
    let guest = page.guest();
    // Each with the width known, which would else be asked at each entry.
    match reading.width {
        Width::Eight => {
            compare_leaves(inside, guard, &reading, move |entry| reading.load_as(inside, guest, entry, Width::Eight));
        }
        Width::Four => {
            compare_leaves(inside, guard, &reading, move |entry| reading.load_as(inside, guest, entry, Width::Four));
        }
    }
}

/// The entries of a page that are made, group by group: those of the others are absent.
fn made<'e>(
    entries: &'e [AtomicU64; ENTRIES],
    guard: &PageGuard<'_, '_>,
) -> impl Iterator<Item = (usize, &'e [AtomicU64; GROUP])> + use<'e> {
    let groups = guard.links.groups();
    let others = || (0..ENTRIES).filter(|entry| !groups.contain(entry / GROUP * GROUP));
    debug_assert!(others().all(|entry| load_for_update(&entries[entry]) == ABSENT), "an entry was made and not noted");
    groups.filter_map(|first| Some((first, entries[first..].first_chunk()?)))
}

fn compare_leaves<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    reading: &Reading,
    load: impl Fn(usize) -> u64,
) {
    let page = guard.page;
    let (Some(entries), Some(targets)) = (inside.entries(page), page.targets()) else { return };
    let glance = reading.glance();
    for (first, entries) in made(entries, guard) {
        let Some(targets) = targets[first..].first_chunk::<GROUP>() else { return };
        let (mut difference, mut any) = (0, ABSENT);
        for (entry, (there, target)) in (first..).zip(entries.iter().zip(targets)) {
            // It may lose rights from here on, but gets none: leaves are made under the page's lock.
            let there = load_for_update(there);
            difference |= glance.difference(load(entry), there, target.load(Ordering::Relaxed));
            any |= there;
        }
        // Most are there and as they were.
        if !glance.is_change(difference) {
            continue;
        }
        if any == ABSENT {
            guard.links.note_empty(first);
            continue;
        }
        compare_changed(inside, guard, reading, glance, first);
    }
}

/// Compares the entries of a group that has changed, one by one. Apart: a look at a whole group is not to pay for it.
#[inline(never)]
fn compare_changed<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    reading: &Reading,
    glance: Glance,
    first: usize,
) {
    let page = guard.page;
    let Some(entries) = inside.entries(page) else { return };
    for (entry, there) in (first..).zip(&entries[first..first + GROUP]) {
        let there = load_for_update(there);
        let changed = || glance.difference(reading.load(inside, page.guest(), entry), there, page.target(entry));
        if there != ABSENT && glance.is_change(changed()) {
            compare_leaf(inside, guard, reading, entry);
        }
    }
}

fn compare_links<H: Host + GuestMemory>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, mode: &Mode) {
    let Some(entries) = inside.entries(guard.page) else { return };
    for (first, entries) in made(entries, guard) {
        for (entry, there) in (first..).zip(entries) {
            if load_for_update(there) != ABSENT {
                compare_link(inside, guard, mode, entry);
            }
        }
        if entries.iter().all(|there| load_for_update(there) == ABSENT) {
            guard.links.note_empty(first);
        }
    }
}

/// Removes the leaf of `entry`, if there is one and the guest's entry would not give it; or only its right to write, if that
/// is all that it would not give: what is left is what would be made of the entry (a process that forks has many such).
#[inline(never)]
fn compare_leaf<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    reading: &Reading,
    entry: usize,
) {
    let page = guard.page;
    let Some(entries) = inside.entries(page) else { return };
    let (there, target) = (load_for_update(&entries[entry]), page.target(entry));
    if there == ABSENT {
        return;
    }
    let raw = reading.load(inside, page.guest(), entry);
    if !reading.gives(raw, there, target) {
        if let Some(leaf) = reading.leaf(raw).filter(|_| mutants::is(Mutant::ShadowUnmappedByGuestEntry)) {
            page.aim(entry, leaf.gfn.0 as u32);
        } else if reading.gives(raw, long_mode::write_protected(there), target) {
            guard.bucket(inside, Gfn(u64::from(target))).write_protect_leaf(inside, &entries[entry]);
            return inside.shadow.withdrawals.note(page.role().level());
        }
        count(inside, unmap(inside, guard, entry));
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
    if page.role().level() == 1 {
        let Leaves::Guest(reading) = Leaves::of(page, mode) else { return };
        return compare_leaf(inside, guard, &reading, entry);
    }
    let is_there = |entries: &[AtomicU64; ENTRIES]| load_for_update(&entries[entry]) != ABSENT;
    if inside.entries(page).is_some_and(is_there) {
        compare_link(inside, guard, mode, entry);
    }
}

/// Compares one entry above level 1, which is there: a link, or a large leaf.
fn compare_link<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    mode: &Mode,
    entry: usize,
) {
    let page = guard.page;
    let Some(entries) = inside.entries(page) else { return };
    let there = load_for_update(&entries[entry]);
    if there == ABSENT {
        return;
    }
    let stays = match page.role().meaning(page.gfn(), entry, judge(inside, page, mode, entry)) {
        Meaning::Child(child) => match long_mode::next_table(there) {
            Some(_) => {
                let below = inside.page(page.target(entry));
                child == below.identity() && below.life() & 1 == 1
            }
            None => large::gives(child, there, page.target(entry)),
        },
        _ => false,
    };
    if !stays {
        count(inside, clear(inside, guard, entry));
    }
}

/// Counts what was taken because the guest's entries give it no more, if it was there. Under the page's lock.
pub(super) fn count<H: Host>(inside: Inside<'_, H>, taken: Option<Taken>) {
    if let Some(taken) = taken {
        taken.count(&inside.shadow.withdrawals);
    }
}

/// Removes what is in `entry` of a page above level 1, if there is anything: a link, or a large leaf.
#[must_use = "what was taken is counted, or under way"]
pub(super) fn clear<H: Host>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, entry: usize) -> Option<Taken> {
    // Under the page's lock a link stays one, and what is absent stays so. (A leaf may go.)
    match load_for_update(&inside.entries(guard.page)?[entry]) {
        ABSENT => None,
        there if long_mode::next_table(there).is_some() => unlink(inside, guard, entry),
        _ => unmap_at(inside, guard, Level::M2, entry),
    }
}

/// Removes the link of `entry` to the page below, if there is one.
fn unlink<H: Host>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, entry: usize) -> Option<Taken> {
    let entries = inside.entries(guard.page)?;
    if entries[entry].swap(ABSENT, Ordering::AcqRel) == ABSENT {
        return None;
    }
    let place = Place::new(guard.index, entry);
    let below = guard.page.target(entry);
    // Not there any more if the page below is dying: its list was taken, and whoever did that will find nothing here.
    guard.child(inside, below).links.parents.retain(|parent| *parent != place);
    Some(Taken::of(guard.page.role().level()))
}

/// Removes the leaf of 4 KiB in `entry`, if there is one.
#[must_use = "what was taken is counted, or under way"]
pub(super) fn unmap<H: Host>(inside: Inside<'_, H>, guard: &mut PageGuard<'_, '_>, entry: usize) -> Option<Taken> {
    unmap_at(inside, guard, Level::K4, entry)
}

#[inline(always)]
fn unmap_at<H: Host>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    level: Level,
    entry: usize,
) -> Option<Taken> {
    let gfn = Gfn(u64::from(guard.page.target(entry)));
    let place = Place::new(guard.index, entry);
    guard.bucket(inside, gfn).unmap(inside, level, gfn, place).then(|| Taken::of(level.number()))
}
