//! Memslots: which guest frames have memory, and what stands behind them (F68).
//!
//! # Protocol
//! Readers (faults) see one immutable [`SlotSet`] at a time, published as a whole; a lookup is two binary searches
//! inside the read-side mark. The set's *generation* goes up with every publication.
//!
//! Updates are serialised by one lock. Adding a slot publishes once. Every change of a slot that exists, deleting and
//! moving it or giving it other flags, goes in steps:
//! 1. publish a set in which the slot is [`SlotState::Changing`]: faults on it are retried;
//! 2. wait for a grace period: every fault that had checked the older generation has left the lock, so nothing is
//!    mapped by the old slot any more after this;
//! 3. zap the slot's range in all roots, flushing;
//! 4. publish the set in which the slot is gone, or is what it became.
//!
//! So a fault sees the old slot, the changing one (retry) or the new one, never a mixture: it looks the slot up in
//! one set, and installs a mapping only after it has found, inside the lock, that the generation is still that of the
//! set.
//!
//! A set in which memory turns up somewhere (a slot that is new, or has moved) is published only while no host
//! invalidation is in progress: an invalidation names frames where the embedder found the memory, and would not hold
//! back a fault on a new place of the same memory (invariant I20).
//!
//! # Address spaces
//! A guest in system-management mode sees other memory at the same addresses (APM vol 2, 10.3; KVM: `as_id`). Each
//! [`AddressSpace`] has its own slots; a fault looks in that of its vCPU's role, and a slot's change is zapped in the
//! roots of its space alone. All spaces are one published set with one generation: an update in one of them makes what
//! vCPUs remember of the other stale as well, which costs a lookup, and saves a fault from asking which generation is
//! its own. The same goes for MMIO entries.
//!
//! MMIO entries carry the low bits of the generation and are stale in any other. Before these bits come round again,
//! all of them are zapped, or one of long ago would be valid again.

pub mod dirty;
mod set;
pub(crate) mod track;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT, PAGE_SIZE};
use crate::format::MMIO_GENERATION_MASK;
use crate::rcu::{RcuCell, Replaced, UpdateRight};
use crate::root::AllRoots;
use crate::sync::{AtomicU64, Ordering, Padded, Watched};
use crate::tdp::zap::Gone;
use crate::{Host, OutOfMemory};
use dirty::{DirtyLog, LogConfig, LogError};
pub(crate) use set::SlotSet;
use track::Tracked;

/// The number an embedder gives a slot; unique in one MMU at one time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(pub u32);

/// Which of a VM's guest-physical address spaces.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum AddressSpace {
    /// The one that a vCPU runs in.
    #[default]
    Main,
    /// The one of vCPUs in system-management mode.
    Smm,
}

impl AddressSpace {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Main, Self::Smm];

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

bitflags::bitflags! {
    /// What is special about a slot.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct SlotFlags: u32 {
        /// Guest writes are not carried out; they end in [`crate::Outcome::ReadOnly`].
        const READ_ONLY = 1;
    }
}

/// What an embedder says of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotConfig {
    /// Its number.
    pub id: SlotId,
    /// The address space that it is in.
    pub space: AddressSpace,
    /// First guest-physical address, 4 KiB aligned.
    pub base: Gpa,
    /// Length in bytes, a multiple of 4 KiB, not zero.
    pub size: u64,
    /// Flags.
    pub flags: SlotFlags,
    /// Whatever the embedder's [`crate::host::Backing`] needs to find the memory; not interpreted.
    pub backing: u64,
}

/// Where a slot is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// In use.
    Ready,
    /// Being deleted, moved or restricted: faults on it are retried.
    Changing,
}

bitflags::bitflags! {
    /// Why a write to a slot is not simply let through. Reasons add up.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Special: u8 {
        /// The slot is read-only.
        const READ_ONLY = 1;
        /// Its writes are logged.
        const LOGGED = 2;
        /// Writes to some of its pages are watched, or were.
        const TRACKED = 4;
    }
}

/// A slot as faults see it; immutable, replaced by every change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    id: SlotId,
    space: AddressSpace,
    range: GfnRange,
    flags: SlotFlags,
    backing: u64,
    state: SlotState,
    special: Special,
}

/// A slot of the set, with what the library keeps for it.
#[derive(Clone, Debug)]
pub(crate) struct Memslot {
    slot: Slot,
    log: Option<Arc<DirtyLog>>,
    tracked: Option<Arc<Tracked>>,
}

impl core::ops::Deref for Memslot {
    type Target = Slot;
    #[inline]
    fn deref(&self) -> &Slot {
        &self.slot
    }
}

impl Memslot {
    fn new(slot: Slot) -> Self {
        Self { slot, log: None, tracked: None }
    }

    /// As embedders see it.
    pub(crate) fn slot(&self) -> Slot {
        self.slot
    }

    #[inline]
    pub(crate) fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    #[inline]
    pub(crate) fn tracked(&self) -> Option<&Arc<Tracked>> {
        self.tracked.as_ref()
    }

    /// The same memory, described by `slot`.
    fn as_slot(&self, slot: Slot) -> Self {
        let mut new = Self { slot, ..self.clone() };
        new.slot.special = Special::empty();
        new.slot.special.set(Special::READ_ONLY, slot.flags.contains(SlotFlags::READ_ONLY));
        new.slot.special.set(Special::LOGGED, self.log.is_some());
        new.slot.special.set(Special::TRACKED, self.tracked.is_some());
        new
    }
}

impl Slot {
    /// No slot of any set: it has no frames.
    pub(crate) const EMPTY: Self = Self {
        id: SlotId(0),
        space: AddressSpace::Main,
        range: GfnRange { start: Gfn(0), end: Gfn(0) },
        flags: SlotFlags::empty(),
        backing: 0,
        state: SlotState::Changing,
        special: Special::empty(),
    };

    fn new(config: SlotConfig) -> Result<Self, SlotError> {
        let SlotConfig { id, space, base, size, flags, backing } = config;
        if size == 0 {
            return Err(SlotError::Empty);
        }
        if base.0 % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
            return Err(SlotError::Unaligned);
        }
        let range = GfnRange::new(base.gfn(), size >> PAGE_SHIFT).ok_or(SlotError::TooHigh)?;
        let special = if flags.contains(SlotFlags::READ_ONLY) { Special::READ_ONLY } else { Special::empty() };
        Ok(Self { id, space, range, flags, backing, state: SlotState::Ready, special })
    }

    /// Its number.
    pub const fn id(&self) -> SlotId {
        self.id
    }

    /// The address space that it is in.
    #[inline]
    pub const fn space(&self) -> AddressSpace {
        self.space
    }

    /// Its frames.
    #[inline]
    pub const fn range(&self) -> GfnRange {
        self.range
    }

    /// Its flags.
    #[inline]
    pub const fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// The embedder's word for its memory.
    #[inline]
    pub const fn backing(&self) -> u64 {
        self.backing
    }

    /// Where it is in its life.
    #[inline]
    pub const fn state(&self) -> SlotState {
        self.state
    }

    /// Whether its writes are logged.
    pub const fn is_logged(&self) -> bool {
        self.special.contains(Special::LOGGED)
    }

    /// Whether nothing stands in the way of a write to memory that the backing lets the guest write.
    #[inline]
    pub(crate) const fn is_plain(&self) -> bool {
        self.special.is_empty()
    }

    /// The slot as far as `limit`, for who can not reach further.
    pub(crate) fn up_to(&self, limit: Gfn) -> Self {
        let range = GfnRange { end: self.range.end.min(limit), ..self.range };
        Self { range, ..*self }
    }

    fn config(&self) -> SlotConfig {
        let Self { id, space, range, flags, backing, .. } = *self;
        SlotConfig { id, space, base: range.start.gpa(), size: range.pages() << PAGE_SHIFT, flags, backing }
    }
}

/// Why a memslot update was refused. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotError {
    /// The size is zero.
    Empty,
    /// Base or size is not a multiple of 4 KiB.
    Unaligned,
    /// The slot would pass the last address that the root's levels can translate, or 2^52.
    TooHigh,
    /// Frames of it belong to another slot of the same address space.
    Overlap(SlotId),
    /// The number is taken.
    InUse,
    /// There is no slot of this number.
    NotFound,
    /// [`crate::Config::slots`] is reached.
    TooMany,
    /// No memory for the update.
    OutOfMemory,
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the slot's size is zero"),
            Self::Unaligned => f.write_str("the slot's base and size must be multiples of 4 KiB"),
            Self::TooHigh => f.write_str("the slot ends above what second-stage paging can translate"),
            Self::Overlap(other) => write!(f, "the slot overlaps slot {}", other.0),
            Self::InUse => f.write_str("the slot's number is in use"),
            Self::NotFound => f.write_str("there is no slot of this number"),
            Self::TooMany => f.write_str("the limit on the number of slots is reached"),
            Self::OutOfMemory => f.write_str("out of memory for the slot update"),
        }
    }
}

impl core::error::Error for SlotError {}

impl From<OutOfMemory> for SlotError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// The published set, and its generation on a line of its own that every fault reads and only updates write.
#[derive(Debug)]
pub(crate) struct Slots {
    generation: Padded<AtomicU64>,
    set: RcuCell<SlotSet>,
}

/// What updates work on, behind the update lock.
#[derive(Debug)]
pub(crate) struct Updates {
    by_id: BTreeMap<SlotId, Arc<Memslot>>,
    right: UpdateRight<SlotSet>,
    limit: usize,
    /// First frame that no root can translate.
    end: Gfn,
}

/// A publication that readers may not all have noticed yet.
#[must_use = "the old set is freed, and faults by it are over, only after Published::settle"]
pub(crate) struct Published {
    old: Replaced<SlotSet>,
    /// The generation of the new set.
    pub(crate) generation: u64,
}

impl Published {
    /// Waits for a grace period, after which no fault acts on the old set, and frees it.
    pub(crate) fn settle<H: Host>(self, mmu: &crate::Mmu<H>) {
        self.old.after_grace_period(crate::reclaim::synchronize(mmu));
    }

    /// Whether MMIO entries are due to be zapped, so that none is left when its bits come round again.
    ///
    /// Twice a round. Faults see a new generation before the zap that it brings is done: were there only the zap at
    /// the wrap, entries made at the wrap before would be believed in between. So they go half a round earlier.
    pub(crate) const fn wraps_mmio(&self) -> bool {
        self.generation & (MMIO_GENERATION_MASK >> 1) as u64 == 0
    }
}

impl Slots {
    /// No slots, and what updates of them work on: `limit` slots at most, none of which reaches `end`.
    pub(crate) fn new(limit: usize, end: Gfn) -> (Self, Updates) {
        let set = SlotSet::empty();
        let generation = Padded(AtomicU64::new(set.generation()));
        let (set, right) = RcuCell::new(set);
        (Self { generation, set }, Updates { by_id: BTreeMap::new(), right, limit, end })
    }

    /// The generation now. A fault compares it, inside the lock, with that of the set it looked its slot up in.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The slots now.
    #[inline]
    pub(crate) fn read<'g, H: Host>(&'g self, inside: &'g crate::lock::Shared<'_, H>) -> &'g SlotSet {
        self.set.read(inside)
    }

    /// Publishes a set.
    pub(crate) fn publish(&self, updates: &mut Updates, Prepared(set): Prepared) -> Published {
        let generation = set.read().generation();
        let old = self.set.replace(set, &mut updates.right);
        // Release: who sees the new generation sees the new set. A fault that still sees the old one is inside the
        // lock, and the grace period that follows waits for it.
        self.generation.store(generation, Ordering::Release);
        Published { old, generation }
    }
}

/// The next set, not published yet: memory for it was needed outside the lock.
#[must_use = "what the update decided is not seen by faults before it is published"]
pub(crate) struct Prepared(Box<Watched<SlotSet>>);

impl Updates {
    fn prepare(&mut self, slots: &Slots, remove: Option<&Memslot>, insert: Option<Arc<Memslot>>) -> Prepared {
        Prepared(Box::new(Watched::new(slots.set.read_exclusive(&mut self.right).changed(remove, insert))))
    }

    /// The slot `id`.
    pub(crate) fn get(&self, id: SlotId) -> Result<Arc<Memslot>, SlotError> {
        self.by_id.get(&id).cloned().ok_or(SlotError::NotFound)
    }

    /// Checks a new place for a slot, `except` being where it is now.
    fn check(&mut self, slots: &Slots, slot: &Slot, except: Option<SlotId>) -> Result<(), SlotError> {
        if slot.range.end > self.end {
            return Err(SlotError::TooHigh);
        }
        let set = slots.set.read_exclusive(&mut self.right);
        match set.overlapping(slot.space, slot.range, except) {
            Some(other) => Err(SlotError::Overlap(other)),
            None => Ok(()),
        }
    }

    /// Prepares a new slot.
    pub(crate) fn add(&mut self, slots: &Slots, config: SlotConfig) -> Result<Prepared, SlotError> {
        let slot = Arc::new(Memslot::new(Slot::new(config)?));
        if self.by_id.contains_key(&slot.id) {
            return Err(SlotError::InUse);
        }
        if self.by_id.len() >= self.limit {
            return Err(SlotError::TooMany);
        }
        self.check(slots, &slot, None)?;
        self.by_id.insert(slot.id, Arc::clone(&slot));
        Ok(self.prepare(slots, None, Some(slot)))
    }

    /// First step of a change of `id`: checks what it is to become and prepares it as changing.
    pub(crate) fn begin(&mut self, slots: &Slots, id: SlotId, change: Change) -> Result<(Begun, Prepared), SlotError> {
        let old = self.get(id)?;
        let new = match change {
            Change::Delete => None,
            Change::Move(base) => Some(Slot::new(SlotConfig { base, ..old.config() })?),
            Change::Flags(flags) => Some(Slot { flags, ..old.slot() }),
        };
        if let Some(new) = &new {
            self.check(slots, new, Some(id))?;
        }
        // The log stays with both: what the zap in between finds dirty goes there.
        let changing = Arc::new(old.as_slot(Slot { state: SlotState::Changing, ..old.slot() }));
        let new = new.map(|new| Arc::new(old.as_slot(new)));
        let prepared = self.prepare(slots, Some(&old), Some(Arc::clone(&changing)));
        Ok((Begun { changing, new }, prepared))
    }

    /// Prepares `id` with a log, or without one.
    pub(crate) fn change_log(
        &mut self,
        slots: &Slots,
        id: SlotId,
        config: Option<LogConfig>,
    ) -> Result<(Arc<Memslot>, Prepared), LogError> {
        let old = self.get(id)?;
        let log = match config {
            Some(_) if old.log.is_some() => return Err(LogError::Running),
            None if old.log.is_none() => return Err(LogError::NotRunning),
            Some(config) => Some(DirtyLog::new(old.range().pages(), config)?),
            None => None,
        };
        let new = Arc::new(Memslot { log, ..(*old).clone() }.as_slot(old.slot()));
        self.by_id.insert(id, Arc::clone(&new));
        let prepared = self.prepare(slots, Some(&old), Some(Arc::clone(&new)));
        Ok((new, prepared))
    }

    /// The slot of `space` that holds `gfn`, with a place for its tracked pages.
    pub(crate) fn trackable(&mut self, slots: &Slots, space: AddressSpace, gfn: Gfn) -> Result<Trackable, SlotError> {
        let set = slots.set.read_exclusive(&mut self.right);
        let old = set.find(space, gfn).cloned().ok_or(SlotError::NotFound)?;
        if let Some(tracked) = old.tracked.clone() {
            return Ok(Trackable { slot: old, tracked, prepared: None });
        }
        let tracked = Tracked::new(old.range().pages())?;
        let new = Arc::new(Memslot { tracked: Some(Arc::clone(&tracked)), ..(*old).clone() }.as_slot(old.slot()));
        self.by_id.insert(new.id(), Arc::clone(&new));
        let prepared = self.prepare(slots, Some(&old), Some(Arc::clone(&new)));
        Ok(Trackable { slot: new, tracked, prepared: Some(prepared) })
    }

    /// The slot `id`, which has a log.
    pub(crate) fn logged(&self, id: SlotId) -> Result<(Arc<Memslot>, Arc<DirtyLog>), LogError> {
        let slot = self.get(id)?;
        let log = slot.log.clone().ok_or(LogError::NotRunning)?;
        Ok((slot, log))
    }

    /// Last step, when nothing leads to the slot's memory any more: prepares what the slot has become.
    pub(crate) fn finish(&mut self, slots: &Slots, begun: Begun, gone: &Gone<AllRoots>) -> Prepared {
        debug_assert_eq!(gone.range, begun.slot().range());
        match &begun.new {
            Some(new) => self.by_id.insert(new.id, Arc::clone(new)),
            None => self.by_id.remove(&begun.changing.id),
        };
        self.prepare(slots, Some(&begun.changing), begun.new)
    }
}

/// A slot whose pages can be tracked.
pub(crate) struct Trackable {
    pub(crate) slot: Arc<Memslot>,
    pub(crate) tracked: Arc<Tracked>,
    /// What to publish first, if the slot had no place for tracked pages.
    pub(crate) prepared: Option<Prepared>,
}

/// A change of a slot that exists.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Delete,
    Move(Gpa),
    Flags(SlotFlags),
}

/// A change between its first and its last publication.
#[must_use = "the slot stays in the changing state, and its faults are retried, until the change is finished"]
pub(crate) struct Begun {
    changing: Arc<Memslot>,
    new: Option<Arc<Memslot>>,
}

impl Begun {
    /// The slot as it was: its mappings, in its address space, must go before the change is finished.
    pub(crate) fn slot(&self) -> &Slot {
        &self.changing
    }
}
