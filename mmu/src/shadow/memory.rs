//! Guest frames and what stands behind them, for walks of the guest's tables and for leaves.
//!
//! The slot and the backing are asked outside the MMU lock, which may wait; what they say is [`Backed`]. Memory is
//! touched, and entries are made, inside the lock, and only if [`Backed::still_holds`]: no slot has changed and no
//! invalidation has begun or ended since the answer, and none can begin before the lock is left.
//!
//! # Neighbours
//! What else a fault maps is found inside the lock: in the same piece of memory, or by [`crate::host::Backing::page`], which
//! does not wait. Either counts only while nothing at all is being invalidated, nor was since the fault's own answer
//! ([`Backed::neighbours`]); none begins before the lock is left, so what the backing says there stays true as long.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::table::Inside;
use super::{GFN_LIMIT, Shadow};
use crate::addr::{Gfn, GfnRange, Gpa, Hfn, Level, PAGE_SHIFT};
use crate::format::MemoryType;
use crate::guest::{Marked, Tables, Width};
use crate::host::{Access, GuestMemory, Host, Page};
use crate::lock::{Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::notify::Snapshot;
use crate::slots::dirty::Ring;
use crate::slots::{AddressSpace, Slot, SlotFlags, SlotState};
use crate::tdp::protect::Logged;
use crate::vcpu::FaultError;
use crate::{Mmu, OutOfMemory};

/// Guest tables whose frames a vCPU remembers are in sets, by their number, so that few are gone through to find one. A set
/// has room for all of a walk, and some more.
const SETS: usize = 4;
const WAYS: usize = 8;
/// No frame of a guest's.
const NO_FRAME: Gfn = Gfn(u64::MAX);

/// The host frame behind the page that a leaf maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct TargetPage {
    pub(super) page: Page,
    /// Writes to it are logged.
    pub(super) logged: bool,
}

/// What stands behind a guest frame, as it was said outside the lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backed {
    pub(super) gfn: Gfn,
    pub(super) writable: bool,
    pub(super) memory: MemoryType,
    /// Writes are logged.
    pub(super) logged: bool,
    /// Writes to some frames of the slot are tracked.
    pub(super) tracked: bool,
    /// Frames around it that are backed in one piece.
    run: GfnRange,
    first: Hfn,
    generation: u64,
    snapshot: Snapshot,
}

impl Backed {
    /// Whether it is true still, and stays so until the lock is left.
    pub(super) fn still_holds<H: Host>(&self, mmu: &Mmu<H>, _inside: &Shared<'_, H>) -> bool {
        mmu.slots.generation() == self.generation
            && !mmu.notify.must_retry(self.snapshot, GfnRange { start: self.gfn, end: Gfn(self.gfn.0 + 1) })
    }

    /// Whether writes to the frame are tracked. Inside the lock, where the answer counts: see `slots::track`.
    #[inline]
    pub(super) fn is_tracked<H: Host>(&self, inside: Inside<'_, H>) -> bool {
        self.tracked && self.looks_tracked(inside, GfnRange::block(Level::K4, self.gfn))
    }

    #[cold]
    fn looks_tracked<H: Host>(&self, inside: Inside<'_, H>, block: GfnRange) -> bool {
        let slot = inside.mmu.slots.read(inside.shared).find(AddressSpace::Main, self.gfn);
        slot.is_some_and(|slot| slot.tracked().is_some_and(|tracked| tracked.touches(slot.range().start, block)))
    }

    /// What one leaf for all of `block`, which holds the frame, would map, its first page: if the block is backed in one
    /// piece, and nobody watches writes to it. As [`Backed::still_holds`], for the block.
    pub(super) fn block<H: Host>(&self, inside: Inside<'_, H>, block: GfnRange) -> Option<Page> {
        let first = self.run.covers(block).then(|| self.at(block.start))?;
        let overtaken = inside.mmu.notify.must_retry(self.snapshot, block);
        let overtaken = overtaken && !mutants::is(Mutant::ShadowLargeFreshInPart);
        let watched = self.logged || self.tracked && self.looks_tracked(inside, block);
        (first.0.is_multiple_of(block.pages()) && !overtaken && !watched).then_some(Page {
            hfn: first,
            writable: self.writable,
            memory: self.memory,
        })
    }

    /// What stands behind other frames of the slot, unless anything at all is being invalidated or was. As
    /// [`Backed::still_holds`], which the caller has asked, for other frames than the one that was asked for.
    #[inline]
    pub(super) fn neighbours<'n, H: Host>(
        &'n self,
        inside: Inside<'n, H>,
        seen: &'n Option<SeenSlot>,
    ) -> Option<Neighbours<'n, H>> {
        let mmu = inside.mmu;
        let slot = seen.as_ref().filter(|seen| seen.generation == self.generation).map(|seen| &seen.slot);
        let overtaken = mmu.notify.is_overtaken(self.snapshot) && !mutants::is(Mutant::ShadowNeighboursNotFresh);
        (!overtaken).then_some(Neighbours { host: &mmu.host, backed: self, slot })
    }

    /// As [`Backed::neighbours`], for a fault that has asked nothing outside the lock: whether the slots are still those
    /// that were asked is found out here.
    pub(super) fn near<'n, H: Host>(
        &'n self,
        inside: Inside<'n, H>,
        seen: &'n Option<SeenSlot>,
    ) -> Option<Neighbours<'n, H>> {
        (inside.mmu.slots.generation() == self.generation).then(|| self.neighbours(inside, seen)).flatten()
    }

    pub(super) fn page(&self) -> TargetPage {
        let page = Page { hfn: self.hfn(), writable: self.writable, memory: self.memory };
        TargetPage { page, logged: self.logged }
    }

    pub(super) fn hfn(&self) -> Hfn {
        self.at(self.gfn)
    }

    fn at(&self, gfn: Gfn) -> Hfn {
        Hfn(self.first.0 + (gfn.0 - self.run.start.0))
    }
}

/// Frames near one that a fault is about. Good for as long as the hold in which it was asked for.
#[derive(Debug)]
pub(super) struct Neighbours<'n, H> {
    host: &'n H,
    backed: &'n Backed,
    slot: Option<&'n Slot>,
}

impl<H: Host> Neighbours<'_, H> {
    /// Whether writes to them are logged, or to some of them tracked.
    pub(super) fn are_watched(&self) -> bool {
        self.backed.logged || self.backed.tracked
    }

    /// The page that a leaf of `gfn` would map, unless writes to some of the slot are tracked.
    pub(super) fn target(&self, gfn: Gfn) -> Option<TargetPage> {
        let page = self.page(gfn).filter(|_| !self.backed.tracked)?;
        Some(TargetPage { page, logged: self.backed.logged })
    }

    /// What stands behind `gfn`, if that is known or can be told at once.
    #[inline]
    pub(super) fn page(&self, gfn: Gfn) -> Option<Page> {
        let Backed { run, writable, memory, .. } = *self.backed;
        if run.contains(gfn) {
            return Some(Page { hfn: self.backed.at(gfn), writable, memory });
        }
        let slot = self.slot.filter(|slot| slot.range().contains(gfn) && gfn < GFN_LIMIT)?;
        let page = self.host.page(slot, gfn, Access::Read)?;
        Some(Page { writable: page.writable && !slot.flags().contains(SlotFlags::READ_ONLY), ..page })
    }
}

/// A slot as the sets of a generation have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SeenSlot {
    slot: Slot,
    tracked: bool,
    generation: u64,
}

impl SeenSlot {
    /// The slot of `gfn`; looked up only if `last` is of another, or of earlier sets.
    #[inline]
    fn find<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, gfn: Gfn, last: &mut Option<Self>) -> Option<Self> {
        match last {
            Some(seen) if seen.slot.range().contains(gfn) && seen.generation == mmu.slots.generation() => {}
            _ => *last = Self::look_up(mmu, ticket, gfn),
        }
        *last
    }

    fn look_up<H: Host>(mmu: &Mmu<H>, ticket: &mut Ticket, gfn: Gfn) -> Option<Self> {
        let inside = Shared::enter(mmu, ticket);
        let set = mmu.slots.read(&inside);
        let found = set.find(AddressSpace::Main, gfn)?;
        Some(Self { slot: found.slot(), tracked: found.tracked().is_some(), generation: set.generation() })
    }
}

/// Why nothing stands behind a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unbacked {
    /// It is changing: try again.
    Changing,
    /// It has no memory.
    NoMemory,
    /// The embedder said so.
    Error(FaultError),
}

/// Asks what stands behind `gfn`. Outside the lock. `seen` is the slot that was asked about last.
pub(super) fn back<H: Host>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    gfn: Gfn,
    access: Access,
    seen: &mut Option<SeenSlot>,
) -> Result<Backed, Unbacked> {
    let Some(snapshot) = mmu.notify.snapshot(gfn) else { return Err(Unbacked::Changing) };
    if gfn >= GFN_LIMIT {
        return Err(Unbacked::NoMemory);
    }
    let found = SeenSlot::find(mmu, ticket, gfn, seen).ok_or(Unbacked::NoMemory)?;
    let SeenSlot { slot, tracked, generation } = found;
    if slot.state() == SlotState::Changing {
        return Err(Unbacked::Changing);
    }
    let error = match mmu.host.resolve(&slot, gfn, access) {
        Ok(extent) if extent.gfns.contains(gfn) => {
            let writable = extent.writable && !slot.flags().contains(SlotFlags::READ_ONLY);
            let (start, end) = (extent.gfns.start.max(slot.range().start), extent.gfns.end.min(slot.range().end));
            let run = GfnRange { start, end: end.min(GFN_LIMIT) };
            let first = Hfn(extent.hfn.0 + (start.0 - extent.gfns.start.0));
            return Ok(Backed {
                gfn,
                writable,
                memory: extent.memory,
                logged: slot.is_logged(),
                tracked,
                run,
                first,
                generation,
                snapshot,
            });
        }
        Ok(_) => FaultError::BadExtent,
        Err(error) => FaultError::Backing(error),
    };
    // That may be news of yesterday, as for any fault.
    let overtaken = mmu.slots.generation() != generation || mmu.notify.is_overtaken(snapshot);
    Err(if overtaken { Unbacked::Changing } else { Unbacked::Error(error) })
}

/// Some of the frames of guest tables that are remembered.
#[derive(Debug)]
struct Set {
    /// Of which frame each is. Beside it, because this is gone through at each entry.
    gfns: [Gfn; WAYS],
    frames: [Option<Backed>; WAYS],
    next: usize,
}

/// What a vCPU has asked last: the frames of guest tables that it has read, and what its last fault led to.
#[derive(Debug)]
pub(super) struct Remembered {
    sets: Vec<Set>,
    pub(super) target: Option<Backed>,
    /// The slots of the last table and of the last target that were asked about.
    table_slot: Option<SeenSlot>,
    pub(super) target_slot: Option<SeenSlot>,
}

impl Remembered {
    pub(super) fn new() -> Result<Self, OutOfMemory> {
        let mut sets = Vec::new();
        sets.try_reserve_exact(SETS)?;
        sets.extend((0..SETS).map(|_| Set { gfns: [NO_FRAME; WAYS], frames: [None; WAYS], next: 0 }));
        Ok(Self { sets, target: None, table_slot: None, target_slot: None })
    }

    /// Asks what stands behind a guest's table. Outside the lock.
    pub(super) fn table<H: Host>(&mut self, mmu: &Mmu<H>, ticket: &mut Ticket, gfn: Gfn) -> Result<Backed, Unbacked> {
        back(mmu, ticket, gfn, Access::Read, &mut self.table_slot)
    }

    #[inline]
    pub(super) fn find(&self, gfn: Gfn) -> Option<&Backed> {
        let set = &self.sets[gfn.0 as usize % SETS];
        let place = set.gfns.iter().position(|other| *other == gfn)?;
        set.frames[place].as_ref()
    }

    fn keep(&mut self, backed: Backed) {
        let set = &mut self.sets[backed.gfn.0 as usize % SETS];
        set.gfns[set.next] = backed.gfn;
        set.frames[set.next] = Some(backed);
        set.next = (set.next + 1) % WAYS;
    }

    fn forget(&mut self, gfn: Gfn) {
        let Set { gfns, frames, .. } = &mut self.sets[gfn.0 as usize % SETS];
        for (place, frame) in gfns.iter_mut().zip(frames).filter(|(other, _)| **other == gfn) {
            *place = NO_FRAME;
            *frame = None;
        }
    }

    /// Asks what stands behind `gfn`, for an access that a fault is about. Outside the lock.
    ///
    /// The backing is asked once for each piece of memory: what it said of one frame of it holds for the others, for as
    /// long as it holds for that one. It is asked again if it would not let the guest write, which it may change its mind
    /// about, and if anything has been invalidated since: to find out in the lock only would be to find out each time.
    pub(super) fn target<H: Host>(
        &mut self,
        mmu: &Mmu<H>,
        ticket: &mut Ticket,
        gfn: Gfn,
        access: Access,
    ) -> Result<Backed, Unbacked> {
        let allows = |last: &Backed| last.run.contains(gfn) && (last.writable || access != Access::Write);
        if let Some(last) = self.target.filter(allows)
            && mmu.slots.generation() == last.generation
            && !mmu.notify.is_overtaken(last.snapshot)
        {
            return Ok(Backed { gfn, ..last });
        }
        let backed = back(mmu, ticket, gfn, access, &mut self.target_slot)?;
        self.target = Some(backed);
        Ok(backed)
    }
}

/// The guest's memory as far as it is remembered. Inside the lock; what is not remembered, or not true any more, has no
/// memory.
pub(super) struct Known<'g, H: Host> {
    pub(super) inside: Inside<'g, H>,
    pub(super) remembered: &'g Remembered,
}

impl<H: Host + GuestMemory> Known<'_, H> {
    #[inline]
    fn find(&self, gfn: Gfn) -> Option<&Backed> {
        self.remembered.find(gfn).filter(|backed| backed.still_holds(self.inside.mmu, self.inside.shared))
    }
}

impl<H: Host + GuestMemory> Tables for Known<'_, H> {
    #[inline]
    fn read(&mut self, at: Gpa, width: Width) -> Option<u64> {
        let backed = self.find(at.gfn())?;
        Some(self.inside.mmu.host.load(backed.hfn(), offset(at), width))
    }

    fn mark(&mut self, at: Gpa, width: Width, old: u64, new: u64) -> Marked {
        self.find(at.gfn()).map_or(Marked::Changed, |backed| mark(self.inside, backed, at, width, old, new))
    }
}

/// The guest's memory as its CPU's page walker sees it. Outside the lock; enters it for each entry.
pub(super) struct GuestTables<'v, H: Host> {
    pub(super) mmu: &'v Mmu<H>,
    pub(super) shadow: &'v Shadow,
    pub(super) ticket: &'v mut Ticket,
    pub(super) remembered: &'v mut Remembered,
    /// The vCPU's, if it has one: marks in the guest's tables are writes of its.
    pub(super) ring: Option<&'v Arc<Ring>>,
    /// Why the last entry could not be read.
    pub(super) trouble: Option<Unbacked>,
}

impl<H: Host + GuestMemory> GuestTables<'_, H> {
    /// Runs `with` on what stands behind `gfn`, inside the lock.
    fn touch<R>(&mut self, gfn: Gfn, with: impl Fn(Inside<'_, H>, &Backed) -> R) -> Option<R> {
        // Twice: what is remembered may be old, and a new answer overtaken; then the guest tries again.
        for _ in 0..2 {
            let backed = match self.remembered.find(gfn) {
                Some(backed) => *backed,
                None => match self.remembered.table(self.mmu, self.ticket, gfn) {
                    Ok(backed) => {
                        self.remembered.keep(backed);
                        backed
                    }
                    Err(trouble) => {
                        self.trouble = Some(trouble);
                        return None;
                    }
                },
            };
            let inside = Shared::enter(self.mmu, self.ticket);
            if backed.still_holds(self.mmu, &inside) {
                return Some(with(Inside::new(&inside, self.mmu, self.shadow).noting(self.ring), &backed));
            }
            drop(inside);
            self.remembered.forget(gfn);
        }
        self.trouble = Some(Unbacked::Changing);
        None
    }
}

/// A frame was written, or can be from now on without our notice. Inside the lock and after the fact: `slots::dirty` says
/// why. (The slots are still those that said whether it is logged.)
pub(super) fn note_write<H: Host>(inside: Inside<'_, H>, logged: bool, gfn: Gfn) {
    if logged {
        log_write(inside, gfn);
    }
}

/// In the slot's log, and in the vCPU's ring if that is news.
fn log_write<H: Host>(inside: Inside<'_, H>, gfn: Gfn) {
    let Some(slot) = inside.mmu.slots.read(inside.shared).find(AddressSpace::Main, gfn) else { return };
    if let Some(log) = slot.log() {
        let ring = inside.ring.map(|ring| (slot.id(), ring));
        Logged { log, first: slot.range().start, ring }.mark(Level::K4, gfn);
    }
}

const fn offset(at: Gpa) -> u32 {
    (at.0 & ((1 << PAGE_SHIFT) - 1)) as u32
}

impl<H: Host + GuestMemory> Tables for GuestTables<'_, H> {
    fn read(&mut self, at: Gpa, width: Width) -> Option<u64> {
        self.touch(at.gfn(), |inside, backed| inside.mmu.host.load(backed.hfn(), offset(at), width))
    }

    fn mark(&mut self, at: Gpa, width: Width, old: u64, new: u64) -> Marked {
        let marked = self.touch(at.gfn(), |inside, backed| mark(inside, backed, at, width, old, new));
        marked.unwrap_or(Marked::Changed)
    }
}

/// Sets marks in an entry of a guest's table, if it is `old` still. Inside the lock.
///
/// What was made of the entry stays right when it gets a mark: without it nothing was made. So its page need not be marked
/// out of step, as by a write of the guest's.
fn mark<H: Host + GuestMemory>(
    inside: Inside<'_, H>,
    backed: &Backed,
    at: Gpa,
    width: Width,
    old: u64,
    new: u64,
) -> Marked {
    if !backed.writable {
        return Marked::ReadOnly;
    }
    match inside.mmu.host.compare_exchange(backed.hfn(), offset(at), width, old, new) {
        true => {
            note_write(inside, backed.logged, backed.gfn);
            Marked::Done
        }
        false => Marked::Changed,
    }
}
