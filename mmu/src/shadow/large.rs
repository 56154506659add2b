//! Leaves of 2 MiB, where a large page of the guest's may be mapped by one entry.
//!
//! A large page of the guest's (2 MiB, each part of 4 MiB or 1 GiB, or of the memory of a guest that does not page) can be
//! mapped in two forms. Either its entry leads to a page of level 1 that stands for the run of frames, which is made leaf
//! by leaf as the guest touches them; or the entry, in a table of level 2, is itself a leaf. Which of the two is decided at
//! the fault that finds neither, and again at each fault that finds the large leaf and is not content with it.
//!
//! # When
//! The slot, and one piece of backing, hold the whole block, in frames that are aligned as it is; nothing in the block is
//! being invalidated, or was since the backing was asked; leaves as large are allowed ([`crate::Config::largest`]). And
//! nobody needs to tell its frames apart:
//! - *tables of the guest's*: no shadow page stands for a frame of the block as a table. It could not be protected alone;
//! - *the dirty log*: the slot has none. Each page is logged by itself;
//! - *tracked pages*: there is none in the block;
//! - *CR0.WP clear*: whether the supervisor may write is then a thing of each leaf.
//!
//! # Against whom
//! Each of these may change while a fault is about to make a large leaf that may be written. Who changes it and who makes
//! the leaf meet in the bucket of the block, which is the bucket of each of its frames:
//! - *A frame becomes a table*: its shadow page becomes visible under the bucket's lock, and the leaf is made under it. If
//!   the page was first, the fault sees it there. If the leaf was, whoever brings the page in step finds it, for it is among
//!   the leaves of that frame: it loses its right to write, as a whole, before the page's entries are looked at.
//! - *A log begins, a page is tracked*: it is announced first (a new generation of slots, a bit), whoever may not have seen
//!   it has left the lock second, leaves lose their right to write third. A fault inside the lock that saw neither has made
//!   its leaf before the third.
//! - *A frame is invalidated, or its slot goes*: the fault asks of the whole block whether its answer is overtaken, inside
//!   the lock, where no invalidation begins. Zaps of a part of the block take the whole leaf.
//!
//! # The way back
//! A leaf that lost its right to write stays, for reading. The first write there faults, finds one of the reasons above, and
//! puts a page of level 1 in its place; the same write that finds the reason gone makes the leaf writable again. What a TLB
//! has of the large leaf it may go on using: it is removed as any other leaf is, and a right to write that went with it is
//! remembered in the bucket. Beside the small leaves it says what they say, or more than they say for a frame that has
//! since become a table, for which the bucket is asked and flushed (module head of `shadow`).
//!
//! A page of level 1 that is in the place stays there, also when nothing is in the way of a large leaf any more, until
//! it is zapped: by the quota, with its memory, or because somebody asks for it ([`collapse`]: it is zapped if a fault
//! would make a large leaf now, which is a guess and need be no more).

use super::Shadow;
use super::fault::{Step, Want, follow, install};
use super::hold::{Fresh, hold};
use super::order::Order;
use super::page::{Handle, Page, Place};
use super::role::{Identity, Meaning};
use super::sync::{clear, count, judge};
use super::table::Inside;
use super::zap::{ShadowDebts, blocks, zap_page};
use crate::Mmu;
use crate::addr::{GfnRange, Level};
use crate::format::long_mode::{self, KEY, NO_EXECUTE, USER, WRITE};
use crate::guest::Judged;
use crate::host::{Access, GuestMemory, Host};
use crate::lock::Ticket;
use crate::mutants::{self, Mutant};
use crate::slots::Memslot;
use crate::sync::load_for_update;

/// What a leaf in the place of `child` would say: the bits that the guest decides. `None` if `child` is no run of frames
/// that one leaf could map.
pub(super) fn bits(child: Identity) -> Option<u64> {
    let run = child.role.is_direct() && child.role.level() == Level::K4.number();
    match child.role.meaning(child.gfn, 0, Judged::Nothing) {
        Meaning::Leaf { rights, key, .. } if run => Some(long_mode::rights(rights, key)),
        _ => None,
    }
}

/// Whether the large leaf `there`, made for frames from `target` on, gives nothing that one in the place of `child` would
/// not. As of small leaves ([`super::leaves::Reading::gives`]).
pub(super) fn gives(child: Identity, there: u64, target: u32) -> bool {
    bits(child).is_some_and(|bits| {
        let taken = there & !bits & WRITE | !there & bits & NO_EXECUTE;
        child.gfn.0 == u64::from(target) && (bits ^ there) & (USER | KEY) | taken == 0
    })
}

/// Maps what is wanted by a large leaf in `entry` of the page `at`, in the place of `child`. `None` if that may not be: then
/// by small ones.
pub(super) fn map<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    _fresh: Fresh<'_>,
    at: Handle,
    entry: usize,
    child: Identity,
    want: &Want<'_>,
) -> Option<Step> {
    let mut bits = bits(child)?;
    let allowed = match want.access {
        Access::Read => true,
        Access::Write => bits & WRITE != 0,
        Access::Execute => bits & NO_EXECUTE == 0,
    };
    if !allowed || child.role.ignores_write_protection() || inside.mmu.config.largest < Level::M2 {
        return None;
    }
    let block = GfnRange::block(Level::M2, child.gfn);
    let backing = want.target.block(inside, block)?;
    if !backing.writable {
        bits &= !WRITE;
    }
    let Some(mut guard) = order.alive(inside, at) else { return Some(Step::Retry) };
    let page = guard.page;
    if page.role().meaning(page.gfn(), entry, judge(inside, page, &want.mode, entry)) != Meaning::Child(child) {
        return Some(Step::Retry);
    }
    let cell = &inside.entries(page)?[entry];
    let there = load_for_update(cell);
    if follow(inside, page, entry, child).is_some() {
        // Somebody has made it so meanwhile.
        return None;
    }
    if long_mode::next_table(there).is_some() || u64::from(page.target(entry)) != child.gfn.0 {
        count(inside, clear(inside, &mut guard, entry));
    }
    let place = Place::new(guard.index, entry);
    guard.links.note(entry);
    let early = mutants::is(Mutant::ShadowLargeDecidedEarly);
    let decided = early.then(|| guard.bucket(inside, child.gfn).may_be_large(inside, block));
    let mut bucket = guard.bucket(inside, child.gfn);
    if !decided.unwrap_or_else(|| bucket.may_be_large(inside, block)) {
        return None;
    }
    let new = long_mode::large(long_mode::leaf(bits, backing.hfn, backing.writable, backing.memory));
    let made = install(inside, &mut bucket, Level::M2, (page, place), child.gfn, cell, new);
    Some(made.err().unwrap_or(Step::Fixed))
}

/// Whether a page is one of small leaves in the place of which a large one could be, by itself.
fn is_small(page: &Page) -> bool {
    bits(page.identity()).is_some() && !page.role().ignores_write_protection() && page.life() & 1 == 1
}

/// Zaps the pages of small leaves in the place of which faults would make large ones, in `slot`.
///
/// A guess, as far as the backing goes: what it said is not true for longer than it takes to say, and the fault asks again.
pub(crate) fn collapse<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    slot: &Memslot,
) {
    if mmu.config.largest < Level::M2 {
        return;
    }
    for (number, block) in blocks(shadow, slot.range()) {
        let watched = slot.tracked().is_some_and(|tracked| tracked.touches(slot.range().start, block));
        if block.pages() < Level::M2.pages() || watched {
            continue;
        }
        // Those that are there now: what faults make meanwhile is theirs.
        let count = hold(mmu, shadow, ticket, debts.debts(), |inside, order, _| {
            let bucket = order.numbered(inside, number);
            let may_be_large = bucket.may_be_large(inside, block);
            let small = bucket.pages(block.start).filter(|index| is_small(inside.page(*index)));
            if may_be_large { small.count() } else { 0 }
        });
        if count == 0 || !is_whole(mmu, slot, block) {
            continue;
        }
        for _ in 0..count {
            hold(mmu, shadow, ticket, debts.debts(), |inside, order, debts| {
                let bucket = order.numbered(inside, number);
                let index = bucket.pages(block.start).find(|index| is_small(inside.page(*index)));
                drop(bucket);
                if let Some(index) = index {
                    zap_page(inside, order, debts, Handle { index, life: inside.page(index).life() });
                }
            });
        }
    }
}

/// Whether the backing has `block` in one piece. Outside the lock.
fn is_whole<H: Host>(mmu: &Mmu<H>, slot: &Memslot, block: GfnRange) -> bool {
    let extent = mmu.host.resolve(&slot.slot(), block.start, Access::Read);
    extent.is_ok_and(|extent| {
        let first = extent.hfn.0 + (block.start.0 - extent.gfns.start.0);
        extent.gfns.covers(block) && first.is_multiple_of(block.pages())
    })
}

/// Removes the large leaves of `range`. What a TLB keeps of them says nothing else than what the next faults make, until the
/// guest's entry becomes another one: who compares then must find the leaf, or know of its removal ([`super::withdrawn`]).
pub(crate) fn remove<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    range: GfnRange,
) {
    for (number, part) in blocks(shadow, range) {
        hold(mmu, shadow, ticket, debts.debts(), |inside, order, debts| {
            debts.withdraw(shadow);
            order.numbered(inside, number).unmap_large(inside, part.start);
        });
    }
}
