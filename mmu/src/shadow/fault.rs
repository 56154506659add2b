//! The walk of a fault: down from the root along what the guest's walk found, pages made and linked where they are
//! missing, a leaf at the end.
//!
//! # Protocol
//! The caller has walked the guest's tables and asked the backing outside the lock, and proves that the answers hold
//! ([`Fresh`]). What the guest's entries said is only a guess at what is wanted:
//! - A link is followed without a lock if what is behind it is the page that is wanted, by `(gfn, role)`.
//! - A link is made under the locks of both pages, when the guest's entry, read again there, still wants that page. All
//!   that is below must have been in step at some time *after* the guest's entry was first read: a CPU reads upper entries
//!   before lower ones, and never has an old lower entry under an upper one that is newer (KVM, 65855ed8b034). And it must
//!   have been in step since any load of CR3 that did not find the link. Both are seen to under the locks ([`may_link`]);
//!   what a page found there reaches is brought in step before, so that there is rarely anything to be seen to.
//! - A leaf is made under the page's lock of the guest's entry read again there, and under the bucket lock of its frame,
//!   where it is decided whether it may be writable (module head of `shadow`). Before a run of frames gets a page of
//!   leaves it is seen whether one leaf will do ([`large`]).
//!
//! The page that is wanted is found by its bucket or made there; two faults that want the same page meet in its lock.
//!
//! Whatever is not as expected ends the walk: the guest tries again, or the caller does what is needed outside the lock
//! ([`Step`]) and comes back with a proof that is new. Each of these ends makes progress: room once made stays, a
//! crowd or a page zapped is gone, a list that was full is empty.

use super::GFN_LIMIT;
use super::bucket::{Bucket, Written};
use super::hold::Fresh;
use super::large;
use super::leaves::{Leaf, Leaves};
use super::memory::{Backed, Neighbours, SeenSlot, TargetPage, note_write};
use super::near::Near;
use super::order::{BucketGuard, Order, PageGuard};
use super::page::{Blank, GROUP, Handle, Page, Place, STALE, UNSYNC};
use super::rmap::NoRoom;
use super::role::{Identity, Meaning, Role, Source};
use super::sync::{Busy, TOGETHER, below_in_step, clear, count, in_step, judge, may_link, open, unmap};
use super::table::Inside;
use crate::addr::{ENTRIES, Gfn, INDEX_BITS, Level, PAGE_SHIFT};

use crate::events::Counter;
use crate::format::long_mode::{self, ABSENT, NO_EXECUTE, USER, WRITE};
use crate::guest::{Judged, Mode};
use crate::host::{Access, GuestMemory, Host, Page as BackingPage};
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU64, Ordering, load_for_update, store_beside_looks};
use crate::vcpu::FaultError;

/// Leaves that are made together, of neighbours (KVM's PTE_PREFETCH_NUM).
const PREFETCH: usize = if cfg!(feature = "loom") { 1 } else { 8 };
/// Times that a table may be opened, without a fault through its page in between, before the page is taken for a table
/// that is none any more (KVM: write flooding).
const FLOOD: u32 = 3;
/// Tables on the way of one walk, and the page itself.
pub(super) const TOLD: usize = 6;

/// What a fault wants mapped.
#[derive(Debug)]
pub(super) struct Want<'v> {
    pub(super) linear: u64,
    pub(super) access: Access,
    /// The guest's entries on the way, by level − 1.
    pub(super) entries: [u64; 5],
    /// The root, and what its role makes of the guest's tables.
    pub(super) root: Identity,
    pub(super) handle: Handle,
    pub(super) mode: Mode,
    /// The frame that the guest's tables lead to.
    pub(super) target: Backed,
    /// Its slot, for its neighbours.
    pub(super) target_slot: &'v Option<SeenSlot>,
    /// A write by the supervisor where the tables let nobody write, without CR0.WP.
    pub(super) over_protection: bool,
    /// What stands behind the tables on the way.
    pub(super) tables: [Option<&'v Backed>; TOLD],
}

/// How a walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The leaf was made or changed.
    Fixed,
    /// It was there.
    Spurious,
    /// It is a write to a frame whose writes are tracked.
    Tracked,
    /// Something has changed: the guest tries again.
    Retry,
    /// No page is at hand.
    Blanks,
    /// The bucket of the frame has no room, for a page of it or a leaf of this level.
    Bucket(Level, Gfn),
    /// The page's list of parents has no room.
    Parents(u32),
    /// The page is in step and is written like a page that is no table, or is one of too many of its frame.
    Flooded(Handle),
    /// Too many pages are out of step.
    ListFull,
    /// The frame is mapped from too many places.
    Crowded(Gfn),
    /// It can not be mapped.
    Failed(FaultError),
}

/// Pages at hand.
pub(super) type Blanks = alloc::vec::Vec<Blank>;

impl Want<'_> {
    fn judged(&self, role: Role) -> Judged {
        match role.source() {
            Source::Identity => Judged::Nothing,
            Source::Guest(_) => self.mode.judge(role.level(), self.entries[usize::from(role.level()) - 1]),
        }
    }

    fn table(&self, gfn: Gfn) -> Option<Backed> {
        self.tables.iter().copied().flatten().find(|table| table.gfn == gfn).copied()
    }
}

/// The pages that the last fault wanted on its way down, for the next one that begins alike: most lead to the same table.
///
/// Which page is wanted below an entry follows from the root's identity, the address, and what the guest's entries said
/// on the way. Whether it is there is looked at each time.
#[derive(Debug)]
pub(super) struct Way {
    root: Option<Identity>,
    /// The address, but for the part that tells pages of one table apart.
    table: u64,
    /// As in [`Want`], but for the leaf's.
    entries: [u64; 4],
    /// By the level of the entry that they are below, from 2 on.
    children: [Option<Identity>; 4],
    /// Where the last fault ended.
    pub(super) near: Option<Near>,
}

impl Way {
    pub(super) const fn new() -> Self {
        Self { root: None, table: 0, entries: [0; 4], children: [None; 4], near: None }
    }

    /// Forgets what it knows unless that is of the same way.
    fn turn(&mut self, want: &Want<'_>) {
        let (table, entries) = (want.linear >> (PAGE_SHIFT + INDEX_BITS), &want.entries[1..]);
        if self.root != Some(want.root) || self.table != table || self.entries != entries {
            *self = Self { root: Some(want.root), table, children: [None; 4], ..Self::new() };
            self.entries.copy_from_slice(entries);
        }
    }

    /// The page that is wanted below `entry` of a page of this identity.
    fn child(&mut self, page: Identity, entry: usize, want: &Want<'_>) -> Option<Identity> {
        let known = &mut self.children[usize::from(page.role.level()) - 2];
        if known.is_none()
            && let Meaning::Child(child) = page.role.meaning(page.gfn, entry, want.judged(page.role))
        {
            *known = Some(child);
        }
        *known
    }
}

/// Maps what is wanted.
pub(super) fn map<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    fresh: Fresh<'_>,
    want: &Want<'_>,
    way: &mut Way,
    blanks: &mut Blanks,
) -> Step {
    way.turn(want);
    let (mut at, mut identity) = (want.handle, want.root);
    loop {
        // Nothing here is locked: should the page have died and be another by now, what is wanted below stays what it is.
        let page = inside.page(at.index);
        page.touch();
        if identity.role.level() == 1 {
            return leaf(inside, order, fresh, at, want, way);
        }
        let entry = identity.role.index(want.linear);
        let Some(child) = way.child(identity, entry, want) else { return Step::Retry };
        at = match follow(inside, page, entry, child) {
            Some(below) => below,
            None => {
                if let Some(step) = large::map(inside, order, fresh, at, entry, child, want) {
                    return step;
                }
                match link(inside, order, fresh, at, entry, child, want, blanks) {
                    Ok(below) => below,
                    Err(step) => return step,
                }
            }
        };
        identity = child;
    }
}

/// The page that `entry` leads to, if it is the one that is wanted.
///
/// What the page says that it leads to and what the entry says are read one after the other; that they belong together
/// is known by the frame, which no other page can have before the lock is left.
pub(super) fn follow<H: Host>(inside: Inside<'_, H>, page: &Page, entry: usize, child: Identity) -> Option<Handle> {
    let frame = long_mode::next_table(load_for_update(&inside.entries(page)?[entry]))?;
    let index = page.target(entry);
    // It may be a leaf's by now, and no page's number.
    let below = inside.shadow.arena.known(index)?;
    let life = below.life();
    (is_wanted(below, child) && below.frame(inside.shared) == Some(frame) && life & 1 == 1)
        .then_some(Handle { index, life })
}

fn is_wanted(page: &Page, wanted: Identity) -> bool {
    page.identity() == wanted || mutants::is(Mutant::ShadowRoleNotCompared) && page.gfn() == wanted.gfn
}

/// The page of this identity, found or made.
pub(super) fn find_or_make<H: Host>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    _fresh: Fresh<'_>,
    wanted: Identity,
    table: Option<Backed>,
    blanks: &mut Blanks,
) -> Result<Handle, Step> {
    if wanted.gfn >= GFN_LIMIT {
        return Err(Step::Retry);
    }
    let mut bucket = order.bucket(inside, wanted.gfn);
    if let Some(index) = bucket.find(inside, wanted) {
        return Ok(Handle { index, life: inside.page(index).life() });
    }
    if !bucket.has_room_for_page() {
        return Err(Step::Bucket(Level::K4, wanted.gfn));
    }
    let guest = match (wanted.role.source(), table) {
        (Source::Identity, _) => None,
        (Source::Guest(_), Some(table)) => Some(table.hfn()),
        // What the table is backed by was not asked: another walk will.
        (Source::Guest(_), None) => return Err(Step::Retry),
    };
    let Blank { index, frame } = blanks.pop().ok_or(Step::Blanks)?;
    let page = inside.page(index);
    page.note_in_step_to(inside.shadow.out_of_step.latest());
    let life = page.begin(wanted, inside.shadow.epoch(), guest, frame);
    bucket.add_page(wanted.gfn, index);
    Ok(Handle { index, life })
}

/// Brings a page that nothing leads to yet in step: it is to be linked, or loaded as a root.
pub(super) fn settle<H: Host + GuestMemory>(inside: Inside<'_, H>, order: &mut Order<'_>, handle: Handle) {
    let page = inside.page(handle.index);
    if page.has(STALE) && !page.has(UNSYNC) {
        in_step(inside, order, &[inside.shadow.out_of_step.look_up(inside, handle)]);
    }
}

/// Links the page that is wanted below `entry` of the page `at`.
#[expect(clippy::too_many_arguments, reason = "what a walk carries along")]
fn link<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    fresh: Fresh<'_>,
    at: Handle,
    entry: usize,
    child: Identity,
    want: &Want<'_>,
    blanks: &mut Blanks,
) -> Result<Handle, Step> {
    let below = find_or_make(inside, order, fresh, child, want.table(child.gfn), blanks)?;
    settle(inside, order, below);
    let late = mutants::is(Mutant::ShadowLinkedOutOfStep);
    if child.role.level() > 1 && !late {
        below_in_step(inside, order, below, Busy::Protect);
    }
    let mut guard = order.alive(inside, at).ok_or(Step::Retry)?;
    let (page, place) = (guard.page, Place::new(at.index, entry));
    // The guest's entry first, then the page below: see the module head.
    if page.role().meaning(page.gfn(), entry, judge(inside, page, &want.mode, entry)) != Meaning::Child(child) {
        return Err(Step::Retry);
    }
    if let Some(there) = follow(inside, page, entry, child) {
        return Ok(there);
    }
    count(inside, clear(inside, &mut guard, entry));
    guard.links.note(entry);
    let mut under = guard.future_child(inside, below).ok_or(Step::Retry)?;
    if !is_wanted(under.page, child) {
        return Err(Step::Retry);
    }
    if under.links.parents.len() == under.links.parents.capacity() {
        return Err(Step::Parents(below.index));
    }
    let (Some(entries), Some(frame)) = (inside.entries(page), under.page.frame(inside.shared)) else {
        return Err(Step::Retry);
    };
    under.links.parents.push(place);
    if !late && !may_link(inside, &mut under) {
        under.links.parents.pop();
        return Err(Step::Retry);
    }
    page.aim(entry, below.index);
    // Absent, and nobody makes links but under the page's lock.
    store_beside_looks(&entries[entry], long_mode::table(frame, page.role().top()));
    Ok(below)
}

/// Makes the leaf in the page `at`.
fn leaf<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    order: &mut Order<'_>,
    _fresh: Fresh<'_>,
    at: Handle,
    want: &Want<'_>,
    way: &mut Way,
) -> Step {
    let Some(mut guard) = order.alive(inside, at) else { return Step::Retry };
    let (page, role) = (guard.page, guard.page.role());
    let entry = role.index(want.linear);
    let leaves = Leaves::of(page, &want.mode);
    let found = match leaves {
        Leaves::Guest(reading) => {
            let late = mutants::is(Mutant::ShadowEntryNotReadAgain);
            let raw = if late { want.entries[0] } else { reading.load(inside, page.guest(), entry) };
            // That the supervisor may write over protection here, and that the entry is marked dirty, was found of the entry
            // that was walked, and of no other.
            if want.over_protection && raw != want.entries[0] {
                return Step::Retry;
            }
            reading.leaf(raw)
        }
        Leaves::Run(_) => leaves.leaf(inside, page, entry),
    };
    let Some(mut leaf) = found else { return Step::Retry };
    if want.over_protection && leaf.bits & WRITE == 0 && role.ignores_write_protection() {
        // Writable for the supervisor and closed to the user, who may read it: a user's access faults and gets the leaf
        // that the tables say. Under SMEP the supervisor must not execute what has become its own.
        let closed = if leaf.bits & USER != 0 && role.has_smep() { NO_EXECUTE } else { 0 };
        leaf.bits = leaf.bits & !USER | WRITE | closed;
    }
    let allowed = match want.access {
        Access::Read => true,
        Access::Write => leaf.bits & WRITE != 0,
        Access::Execute => leaf.bits & NO_EXECUTE == 0,
    };
    if leaf.gfn != want.target.gfn || !allowed {
        return Step::Retry;
    }
    if leaf.bits & WRITE != 0 && want.target.is_tracked(inside) {
        if want.access == Access::Write {
            return Step::Tracked;
        }
        leaf.bits &= !WRITE;
    }
    let Some(entries) = inside.entries(page) else { return Step::Retry };
    if load_for_update(&entries[entry]) != ABSENT && page.target(entry) != leaf.gfn.0 as u32 {
        if mutants::is(Mutant::ShadowLeafOverwritten) {
            entries[entry].store(ABSENT, Ordering::Release);
        }
        count(inside, unmap(inside, &mut guard, entry));
    }
    let step = fill(inside, &mut guard, entry, want.access, &want.target.page(), leaf);
    if step == Step::Fixed {
        if let Some(neighbours) = want.target.neighbours(inside, want.target_slot) {
            prefetch(inside, &mut guard, entry, &neighbours, &leaves);
        }
        way.near = Some(Near { root: want.handle, table: Near::table(want.linear), page: at, leaves });
    }
    step
}

/// Makes or changes the leaf of `entry`, which is absent or maps that frame, for an access that it allows.
pub(super) fn fill<H: Host>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    entry: usize,
    access: Access,
    target: &TargetPage,
    Leaf { gfn, mut bits }: Leaf,
) -> Step {
    let (page, place) = (guard.page, Place::new(guard.index, entry));
    let Some(entries) = inside.entries(page) else { return Step::Retry };
    let cell = &entries[entry];
    guard.links.note(entry);
    let mut bucket = guard.bucket(inside, gfn);
    let TargetPage { page: BackingPage { hfn, writable, memory }, logged } = *target;
    let old = load_for_update(cell);
    // What is logged is given for writing when it is written, and not taken back before the log is asked.
    let unlogged = access != Access::Write && logged;
    if !writable || unlogged && !long_mode::is_writable(old) {
        bits &= !WRITE;
    }
    let late = mutants::is(Mutant::ShadowUnsyncAfterWritable);
    if bits & WRITE != 0
        && let Written::InStep(index) = bucket.may_write(inside, gfn)
    {
        let table = inside.page(index);
        if access != Access::Write {
            bits &= !WRITE;
        } else if table.writes() >= FLOOD && table.loads() == 0 {
            return Step::Flooded(Handle { index, life: table.life() });
        } else if let Some(index) = bucket.surplus(inside, gfn, TOGETHER) {
            return Step::Flooded(Handle { index, life: inside.page(index).life() });
        } else if !late && !open(inside, &bucket, gfn) {
            return Step::ListFull;
        }
    }
    let write = bits & WRITE != 0;
    let new = long_mode::leaf(bits, hfn, writable, memory);
    if let Err(step) = install(inside, &mut bucket, Level::K4, (page, place), gfn, cell, new) {
        return step;
    }
    if write && !unlogged {
        note_write(inside, logged, gfn);
    }
    if late && write {
        open(inside, &bucket, gfn);
    }
    Step::Fixed
}

/// Makes the leaf `new` of `level`, for `gfn` or from there on, in `cell`, which is that place of that page; or changes the
/// one of the same frame that is there. Under the page's lock.
#[inline(always)]
pub(super) fn install<H: Host>(
    inside: Inside<'_, H>,
    bucket: &mut Bucket,
    level: Level,
    (page, place): (&Page, Place),
    gfn: Gfn,
    cell: &AtomicU64,
    new: u64,
) -> Result<(), Step> {
    let mut old = load_for_update(cell);
    if old == ABSENT {
        // It stays so: nobody makes leaves here but under the page's lock.
        match bucket.mapped(level, gfn, place) {
            Ok(()) => {}
            Err(NoRoom::Yet) => return Err(Step::Bucket(level, gfn)),
            Err(NoRoom::Crowded) => return Err(Step::Crowded(gfn)),
        }
        page.aim(place.entry(), gfn.0 as u32);
        store_beside_looks(cell, new);
        inside.counters().leaf(level, 1);
        return Ok(());
    }
    loop {
        if long_mode::frame(old) != long_mode::frame(new) {
            return Err(Step::Failed(FaultError::BackingChanged));
        }
        if old == new {
            return Err(Step::Spurious);
        }
        match cell.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => break,
            Err(now) => old = now,
        }
    }
    if long_mode::is_writable(old) && !long_mode::is_writable(new) {
        bucket.note_protected(inside);
    }
    if long_mode::takes_away(old, new) {
        inside.shadow.withdrawals.note(level.number());
    }
    Ok(())
}

/// Makes leaves for neighbours that the guest has used before and whose memory is at hand. Best effort: whatever is in the
/// way stays, and nothing is opened for writing for their sake.
pub(super) fn prefetch<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    guard: &mut PageGuard<'_, '_>,
    entry: usize,
    neighbours: &Neighbours<'_, H>,
    leaves: &Leaves,
) {
    let (page, index) = (guard.page, guard.index);
    let Some(entries) = inside.entries(page) else { return };
    let start = entry & !(PREFETCH - 1);
    let end = (start + PREFETCH).min(ENTRIES);
    (start..end).step_by(GROUP).for_each(|entry| guard.links.note(entry));
    // A page whose writes are logged is given for writing when it is written, and not before; which of a slot's pages are
    // tracked is asked then as well.
    let at_once = !neighbours.are_watched();
    // Most neighbours lead to neighbours, whose bucket is the same.
    let mut held: Option<(usize, BucketGuard<'_, '_>)> = None;
    let mut made = 0;
    for (other, cell) in (start..end).zip(&entries[start..end]) {
        if load_for_update(cell) != ABSENT {
            continue;
        }
        let Some(Leaf { gfn, mut bits }) = leaves.leaf(inside, page, other) else { continue };
        let Some(backing) = neighbours.page(gfn) else { continue };
        let number = inside.shadow.buckets.number(gfn);
        if held.as_ref().is_none_or(|(other, _)| *other != number) {
            #[expect(unused_assignments, reason = "the other lock is let go before this one is taken")]
            {
                held = None;
            }
            held = Some((number, guard.numbered(inside, number)));
        }
        let Some((_, bucket)) = &mut held else { return };
        if bucket.mapped(Level::K4, gfn, Place::new(index, other)).is_err() {
            continue;
        }
        if bits & WRITE != 0 && !(at_once && backing.writable && bucket.may_write(inside, gfn) == Written::Free) {
            bits &= !WRITE;
        }
        let new = long_mode::leaf(bits, backing.hfn, backing.writable, backing.memory);
        page.aim(other, gfn.0 as u32);
        // Nobody makes leaves here but under the page's lock, which this holds.
        store_beside_looks(cell, long_mode::aged(new));
        made += 1;
    }
    drop(held);
    inside.counters().leaf(Level::K4, made);
    inside.counters().add(Counter::Prefetched, made);
}
