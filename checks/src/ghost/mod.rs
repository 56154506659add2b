//! The ghost: what must be true of the guest's memory, in plain maps.
//!
//! # Protocol
//! The embedder side of the machine tells the ghost of every operation, always so that at each moment the ghost
//! allows at least what the library may do, and as little more as possible:
//! - what *gives* (a new slot, a new place, more rights, a page back) is told **before** the library is called;
//! - what *takes* (a slot's end, rights, a page, a zap) is told **after** the library has returned: from then on
//!   nobody may use it, and no grace is given.
//!
//! Each guest access asks the ghost while the vCPU is in guest mode whether it may go to that host frame now. The
//! library waits for vCPUs in guest mode before it returns, so an access that the ghost refuses was made through a
//! translation that should have been gone: there are no false alarms to filter.
//!
//! A zap takes no memory away, so it is remembered as a range and the time of its call: a translation that was read
//! from the tables before that time must not be used after the zap's return.

pub mod dirty;
mod flight;
pub mod history;
pub mod object;
pub mod tree;

use std::collections::{BTreeMap, VecDeque};

use nestling::host::{BackingError, Extent};
use nestling::{
    Access, AddressSpace, FaultError, Gfn, GfnRange, Hfn, Level, Outcome, Slot, SlotConfig, SlotFlags, SlotId, VcpuId,
};

pub use history::Violation;
use history::{Event, History, Side};
use object::{Object, Page, Shape};

use crate::machine::cpu::tlb::CachedLeaf;

/// Zaps remembered at most; forgetting an old one only makes the check weaker.
const ZAPS: usize = 512;
/// Violations kept at most: the first ones tell most.
const VIOLATIONS: usize = 16;

/// All frames.
pub(crate) fn everything() -> GfnRange {
    GfnRange { start: Gfn(0), end: Level::L5.root_limit() }
}

/// A slot at a place. A slot that moves is at two for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placement {
    /// The slot.
    pub id: SlotId,
    /// Its address space.
    pub space: AddressSpace,
    /// Its frames.
    pub range: GfnRange,
    /// Whether the slot lets the guest write.
    pub writable: bool,
    /// Its memory.
    pub object: u64,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct Ghost {
    time: u64,
    placements: Vec<Placement>,
    objects: BTreeMap<u64, Object>,
    next_object: u64,
    next_frame: u64,
    host_frames: u64,
    zaps: VecDeque<(GfnRange, u64)>,
    logs: BTreeMap<SlotId, dirty::Book>,
    /// When a log last started or was about to.
    logs_changed: u64,
    answers: dirty::Answers,
    flight: flight::Flight,
    /// Watchers of pages, by slot and page.
    pub watchers: BTreeMap<(SlotId, u64), u32>,
    history: History,
    violations: Vec<Violation>,
    /// Memslot changes under way, by when they began.
    changing: Vec<u64>,
    changed: u64,
    /// Whether table frames may be refused now.
    pub tables_may_run_out: bool,
    /// Guest accesses that were checked.
    pub accesses: u64,
}

impl Ghost {
    /// A ghost that allows nothing.
    pub fn new() -> Self {
        // Above the arena's frames and aligned for the largest leaf.
        Self { next_frame: 1 << 22, ..Self::default() }
    }

    /// Lets time pass and says what it is.
    pub fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    /// Writes down that something happened to `range`.
    pub fn note(&mut self, range: GfnRange, what: impl Into<String>) {
        let time = self.tick();
        self.history.push(Event { side: Side::Host, time, range, what: what.into() });
    }

    fn note_guest(&mut self, gfn: Gfn, what: String) {
        let time = self.tick();
        let range = GfnRange { start: gfn, end: Gfn(gfn.0 + 1) };
        self.history.push(Event { side: Side::Guest, time, range, what });
    }

    /// Writes down a contradiction.
    pub fn violation(&mut self, gfn: Option<Gfn>, what: impl Into<String>) {
        let time = self.tick();
        if self.violations.len() < VIOLATIONS {
            let history = gfn.map(|gfn| self.history.of(gfn)).unwrap_or_default();
            self.violations.push(Violation { time, what: what.into(), gfn, history });
        }
    }

    /// The contradictions found so far.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    // --- Objects and their pages ---

    fn reserve(&mut self, frames: u64, phase: u64) -> Hfn {
        let first = self.next_frame.next_multiple_of(1 << 18) + phase % (1 << 18);
        self.next_frame = first + frames;
        Hfn(first)
    }

    /// Memory of `shape`; its number is what a slot's `backing` says.
    pub fn make_object(&mut self, shape: Shape) -> u64 {
        let first = self.reserve(Object::span(&shape), shape.phase);
        self.host_frames += shape.pages;
        self.next_object += 1;
        self.objects.insert(self.next_object, Object::new(shape, first));
        self.next_object
    }

    /// Gives an object back to the host. To be called when no slot has it.
    pub fn drop_object(&mut self, object: u64) {
        if let Some(object) = self.objects.remove(&object) {
            self.host_frames -= object.shape.pages;
        }
    }

    /// Host frames that objects have now.
    pub const fn host_frames(&self) -> u64 {
        self.host_frames
    }

    /// The object of this number.
    pub fn object(&self, object: u64) -> Option<&Object> {
        self.objects.get(&object)
    }

    /// What the backing answers; `stale` says whether it answers with what was, or with an error, for a page that is
    /// taken or an object that is gone. (Both happen to real embedders: a fault that was overtaken asks late.)
    pub fn resolve(&mut self, slot: &Slot, gfn: Gfn, stale: bool) -> Result<Extent, BackingError> {
        let object = self.objects.get(&slot.backing()).ok_or(BackingError::NotBacked)?;
        let page = gfn.0 - slot.range().start.0 + object.shape.lead;
        match object.page(page) {
            Page::Taken(_) if !stale => Err(BackingError::NotBacked),
            _ => Ok(object.extent(slot, gfn, stale)),
        }
    }

    /// Every page of a slot in `range`, as (object, page).
    fn pages_in(&self, range: GfnRange) -> Vec<(u64, u64)> {
        let mut pages = Vec::new();
        for place in self.placements.iter().filter(|place| place.range.overlaps(range)) {
            let Some(object) = self.objects.get(&place.object) else { continue };
            let (start, end) = (place.range.start.max(range.start).0, place.range.end.min(range.end).0);
            pages.extend((start..end).map(|gfn| (place.object, gfn - place.range.start.0 + object.shape.lead)));
        }
        pages
    }

    /// An invalidation of `range` has begun (has returned to the embedder): its pages are the host's now.
    pub fn taken(&mut self, range: GfnRange) -> Vec<(u64, u64)> {
        self.note(range, "invalidated: pages taken");
        let pages = self.pages_in(range);
        for (object, page) in &pages {
            if let Some(object) = self.objects.get_mut(object) {
                object.take(*page);
            }
        }
        pages
    }

    /// The invalidation is about to end: the pages come back, `moved` to other frames or where they were.
    pub fn given(&mut self, range: GfnRange, pages: &[(u64, u64)], moved: bool) {
        self.note(range, if moved { "invalidation ends: pages moved" } else { "invalidation ends: pages back" });
        for (object, page) in pages {
            let frame = moved.then(|| self.reserve(1, 0));
            if let Some(object) = self.objects.get_mut(object) {
                object.give(*page, frame);
            }
        }
    }

    /// The embedder's mistake: pages move without an invalidation.
    pub fn moved_behind_the_librarys_back(&mut self, range: GfnRange) {
        self.note(range, "pages moved without an invalidation");
        let pages = self.pages_in(range);
        self.given(range, &pages, true);
    }

    // --- Slots ---

    /// All placements.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// The placement in `space` that holds `gfn`.
    pub fn placement_at(&self, space: AddressSpace, gfn: Gfn) -> Option<Placement> {
        self.placements.iter().find(|place| place.space == space && place.range.contains(gfn)).copied()
    }

    /// Whether the backing and the slots let a guest write at `place`.
    pub fn may_write(&self, place: &Placement) -> bool {
        place.writable && self.objects.get(&place.object).is_some_and(|object| object.shape.writable)
    }

    /// Whether writes to `gfn` are watched.
    pub fn is_watched(&self, space: AddressSpace, gfn: Gfn) -> bool {
        let place = self.placement_at(space, gfn);
        place.is_some_and(|place| self.watchers.contains_key(&(place.id, gfn.0 - place.range.start.0)))
    }

    fn begin_change(&mut self) {
        self.changed = self.tick();
        self.changing.push(self.changed);
        // Which mappings go with it depends on how the library is set up.
        self.flight.removal_begins(self.changed, everything());
        self.trying_everywhere();
    }

    fn end_change(&mut self) {
        self.changed = self.tick();
        self.trying_everywhere();
        // Of several the one that began last: the others stand for it until they have ended.
        if let Some(began) = self.changing.pop() {
            self.flight.removal_ends(began, self.changed, self.removals_needed_since());
        }
    }

    /// A slot is about to be added.
    pub fn adding(&mut self, config: &SlotConfig) {
        self.begin_change();
        if let Some(range) = GfnRange::new(config.base.gfn(), config.size >> 12) {
            self.note(range, format!("adding {:?} of object {}", config.id, config.backing));
            let writable = !config.flags.contains(SlotFlags::READ_ONLY);
            self.placements.push(Placement {
                id: config.id,
                space: config.space,
                range,
                writable,
                object: config.backing,
            });
        }
    }

    /// It was added, or refused.
    pub fn added(&mut self, config: &SlotConfig, done: bool) {
        if !done {
            self.placements.retain(|place| place.object != config.backing);
        }
        self.end_change();
    }

    /// A slot is about to be deleted.
    pub fn deleting(&mut self, id: SlotId) {
        self.begin_change();
        for place in self.of(id) {
            self.note(place.range, format!("deleting {id:?}"));
        }
    }

    /// It was deleted; its memory is to be given back to the host by the caller.
    pub fn deleted(&mut self, id: SlotId, done: bool) {
        if done {
            for place in self.of(id) {
                self.note(place.range, format!("deleted {id:?}"));
            }
            self.placements.retain(|place| place.id != id);
            self.log_stopped(id);
            self.watchers.retain(|(slot, _), _| *slot != id);
        }
        self.end_change();
    }

    /// A slot is about to move to `start`.
    pub fn moving(&mut self, id: SlotId, start: Gfn) {
        self.begin_change();
        for place in self.of(id) {
            self.note(place.range, format!("moving {id:?} to {:#x}", start.0));
            if let Some(range) = GfnRange::new(start, place.range.pages()) {
                self.note(range, format!("moving {id:?} here"));
                self.placements.push(Placement { range, ..place });
            }
        }
    }

    /// It has moved, or not.
    pub fn moved(&mut self, id: SlotId, start: Gfn, done: bool) {
        // The new place was pushed last. Moving to where it was leaves one of the two.
        let new = self.placements.iter().rposition(|place| place.id == id && place.range.start == start);
        let (old, new) = (self.placements.iter().position(|place| place.id == id), new);
        if let Some(gone) = if done { old.filter(|_| old != new) } else { new } {
            let place = self.placements.remove(gone);
            self.note(place.range, format!("{id:?} is no longer here"));
        }
        self.end_change();
    }

    /// A slot's flags are about to change.
    pub fn changing_flags(&mut self, id: SlotId, flags: SlotFlags) {
        self.begin_change();
        self.set_writable(id, !flags.contains(SlotFlags::READ_ONLY), |old, new| old || new);
    }

    /// They have changed.
    pub fn changed_flags(&mut self, id: SlotId, flags: SlotFlags, done: bool) {
        if done {
            self.set_writable(id, !flags.contains(SlotFlags::READ_ONLY), |_, new| new);
        }
        self.end_change();
    }

    fn set_writable(&mut self, id: SlotId, writable: bool, how: impl Fn(bool, bool) -> bool) {
        for place in self.of(id) {
            self.note(place.range, format!("{id:?} writable: {writable}"));
        }
        for place in self.placements.iter_mut().filter(|place| place.id == id) {
            place.writable = how(place.writable, writable);
        }
    }

    fn of(&self, id: SlotId) -> Vec<Placement> {
        self.placements.iter().filter(|place| place.id == id).copied().collect()
    }

    // --- What the guest does ---

    /// No leaf is larger than this.
    pub const fn set_largest(&mut self, level: Level) {
        self.flight.largest = level;
    }

    /// A zap of `range`, or an invalidation, is about to be called. The time.
    pub fn zapping(&mut self, range: GfnRange) -> u64 {
        let now = self.tick();
        self.flight.removal_begins(now, range);
        now
    }

    /// It has ended without having removed everything: it was refused.
    pub fn not_zapped(&mut self, called: u64) {
        let now = self.tick();
        self.flight.removal_ends(called, now, self.removals_needed_since());
    }

    /// A zap of `range`, called at `called`, has returned.
    pub fn zapped(&mut self, range: GfnRange, called: u64) {
        self.not_zapped(called);
        self.note(range, format!("zapped (called at {called})"));
        if self.zaps.len() == ZAPS {
            self.zaps.pop_front();
        }
        self.zaps.push_back((range, called));
    }

    /// A vCPU in guest mode, in `space`, is about to walk to where it writes: the walk may leave a dirty bit.
    pub fn writes(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn) {
        self.flight.write_begins(vcpu, space, gfn);
    }

    /// A vCPU in guest mode, in `space`, accesses `gfn` through this translation.
    pub fn access(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn, access: Access, leaf: &CachedLeaf) {
        let (hfn, born) = (leaf.translate(gfn), leaf.born);
        self.accesses += 1;
        self.note_guest(gfn, format!("{vcpu:?} {access:?} to {hfn:?} by a translation of {born}"));
        if access == Access::Write {
            self.flight.write_ends(vcpu);
            self.trying_through(space, gfn, leaf.level);
            self.wrote_through(space, gfn, hfn);
        }
        let here = |place: &&Placement| place.space == space && place.range.contains(gfn);
        let allowed = self.placements.iter().filter(here).any(|place| {
            let frame = self
                .objects
                .get(&place.object)
                .map(|object| object.page(gfn.0 - place.range.start.0 + object.shape.lead));
            let watched = self.watchers.contains_key(&(place.id, gfn.0 - place.range.start.0));
            frame == Some(Page::At(hfn)) && (access != Access::Write || self.may_write(place) && !watched)
        });
        if !allowed {
            let text = format!("{vcpu:?}: {access:?} of {gfn:?} went to {hfn:?}, which it may not reach (any more)");
            self.violation(Some(gfn), text);
        }
        if let Some((zap, called)) = self.zaps.iter().find(|(zap, called)| zap.contains(gfn) && *called > born) {
            let text = format!(
                "{vcpu:?}: {access:?} of {gfn:?} by a translation of {born}, after the zap of {zap:?} called at {called}"
            );
            self.violation(Some(gfn), text);
        }
    }

    /// The embedder is about to write a frame for the guest of a vCPU. The time.
    pub fn device_writes(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn) -> u64 {
        self.flight.write_begins(vcpu, space, gfn);
        self.tick()
    }

    /// It has, since `began`, and has told the library.
    pub fn device_wrote(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn, began: u64) {
        self.flight.write_ends(vcpu);
        let page = GfnRange { start: gfn, end: Gfn(gfn.0 + 1) };
        self.trying(space, page);
        // If slots or logs changed meanwhile, the library may have been told when there was no log here.
        if self.changing.is_empty() && self.changed.max(self.logs_changed) < began {
            self.wrote(space, page);
        }
    }

    /// A fault is about to be handed in. The time.
    pub fn fault_begins(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn, access: Access) -> u64 {
        if access == Access::Write {
            // Its entry may count as written whether or not the guest comes back to write.
            self.flight.write_begins(vcpu, space, gfn);
        }
        self.tick()
    }

    /// A fault that was handed in at `began` has ended.
    ///
    /// Judged only when no memslot changed meanwhile: then there is one right answer, but for "retry".
    pub fn fault_ended(
        &mut self,
        vcpu: VcpuId,
        space: AddressSpace,
        gfn: Gfn,
        access: Access,
        began: u64,
        result: &Result<Outcome, FaultError>,
    ) {
        self.note_guest(gfn, format!("{vcpu:?} {access:?} fault of {began}: {result:?}"));
        if access == Access::Write {
            self.flight.write_ends(vcpu);
            let level = if let Ok(Outcome::Fixed { level }) = result { *level } else { self.flight.largest };
            self.trying_through(space, gfn, level);
        }
        let wrong = match result {
            Ok(Outcome::Retry) => false,
            Err(FaultError::OutOfTables) => !self.tables_may_run_out,
            Err(_) => true,
            Ok(_) if !self.changing.is_empty() || self.changed > began => false,
            Ok(outcome) => {
                let right = match self.placement_at(space, gfn) {
                    None => *outcome == Outcome::Mmio,
                    Some(place) if access == Access::Write && !self.may_write(&place) => *outcome == Outcome::ReadOnly,
                    Some(_) if access == Access::Write && self.is_watched(space, gfn) => *outcome == Outcome::Tracked,
                    Some(_) => matches!(outcome, Outcome::Fixed { .. } | Outcome::Spurious),
                };
                !right
            }
        };
        if wrong {
            self.violation(Some(gfn), format!("{vcpu:?}: {access:?} fault of {gfn:?} ended as {result:?}"));
        }
    }
}
