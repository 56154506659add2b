//! What one vCPU owns: its seat, its root, its table cache and its memory of the last slot.
//!
//! # The life of a vCPU's turn
//! [`Vcpu::enter`] loads a root if there is none, says that the vCPU is in guest mode and returns an [`InGuest`] with
//! the root to load and whether the TLB must be flushed first. The embedder runs the guest and drops the token as
//! soon as the guest has stopped: a flusher elsewhere may be waiting for that. [`Vcpu::fault`] handles a second-stage
//! fault, between two turns.
//!
//! # A fault within a turn
//! Most faults need no more than the short way below, and most of what they cost is then to leave guest mode and to enter
//! it again. [`InGuest::fix_at_once`] spares them that: the vCPU goes on counting as in guest mode while it looks at the
//! fault, and the embedder runs the guest on. To everyone else such a turn is one in which the guest ran through, and took
//! some hundred instructions for that access. So nothing has to be looked at again before it goes on:
//! - *The generation and requests.* Whoever advances the one or makes the other finds this vCPU in guest mode, kicks it,
//!   and waits if it has to wait. The embedder holds kicks back until the guest runs, so that one which came meanwhile
//!   ends the run at once, as it would have ended it without the fault. What the TLB had before the fault it may use until
//!   then: nobody who took it away has returned.
//! - *The flush* that entering told of was done before the guest first ran.
//! - *The root* may have become invalid: the fault looks, inside the lock, and fills no such root, and then the guest
//!   runs on as far as the kick lets it, on a root whose zapper waits for it.
//!
//! What it must not do is wait. A flusher waits for this vCPU, and may hold either side of the lock meanwhile. The short way
//! waits for nothing: it does not come in if a writer is there, asks the backing only for what that has at hand, and
//! changes one entry. A vCPU with a dirty ring has to be asked at each entry whether there is room; it handles no
//! fault within a turn.
//!
//! # The life of a fault
//! Slot (from memory if it is still the right one, else looked up) → snapshot of the invalidation sequence → backing,
//! outside the lock → table cache topped up → inside the shared side: are slots, backing and root still what was
//! asked about? → walk. Everything that was overtaken is retried, here a few times, then by the guest.
//!
//! The usual fault goes this way in short: of the backing it asks for its page alone, it needs no table, and its walk ends
//! in one compare-and-swap. Whatever is in its way, it leaves the lock with nothing done, and goes all of the way from the
//! start, with a snapshot of its own.
//!
//! A vCPU is used by one thread at a time; that is what `&mut` says. Nothing here takes the exclusive lock.

mod fault;

use alloc::sync::Arc;
use core::fmt;

pub use fault::{Cause, Fault, FaultError, Outcome};

use crate::Mmu;
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange, Gpa, Hpa, Level};
use crate::events::{Counter, Event};
use crate::format::{MMIO_GENERATION_MASK, State};
use crate::host::{Access, Host, VcpuId};
use crate::lock::{Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::notify::Snapshot;
use crate::reclaim;
use crate::root::{Loaded, Role, give_back};
use crate::slots::dirty::{DirtyLog, DirtyRing, Ring};
use crate::slots::track::Tracked;
use crate::slots::{Slot, SlotFlags, SlotState};
use crate::tdp::fault::{Mapping, Obstructed, TableCache, Watch, fix_protected, map_mmio, map_page, needed};
use crate::tdp::inspect::{translate, walk};
use crate::tdp::protect::Logged;
use crate::tlb::{Entered, FLUSH, FLUSH_CURRENT, FREE_OBSOLETE_ROOTS, Flush, Own, RELOAD};

/// The slot of the last fault, which was in use, and the generation of the set it was looked up in.
#[derive(Debug)]
struct Hint {
    /// Ends where the vCPU's roots do, if that is before the slot's own end.
    slot: Slot,
    generation: u64,
}

impl Hint {
    /// Nothing is remembered: holds no frame.
    const NONE: Self = Self { slot: Slot::EMPTY, generation: 0 };

    /// Whether it is the slot of `gfn` as long as the memslots are of generation `now`.
    #[inline]
    fn holds(&self, gfn: Gfn, now: u64) -> bool {
        self.generation == now && self.slot.range().contains(gfn)
    }
}

/// What is remembered besides of a slot whose writes are not simply let through. Kept apart from the [`Hint`] of other
/// slots, so that their faults need not ask.
#[derive(Debug)]
struct Watched {
    hint: Hint,
    /// The slot's log, if it has one. (A log that was stopped meanwhile is kept from being freed by this, until another
    /// such slot is remembered.)
    log: Option<Arc<DirtyLog>>,
    /// Its tracked pages.
    tracked: Option<Arc<Tracked>>,
}

impl Watched {
    const NONE: Self = Self { hint: Hint::NONE, log: None, tracked: None };

    // What cuts the slot off at a root's limit cuts its end.
    fn first(&self) -> Gfn {
        self.hint.slot.range().start
    }

    /// The log, as the tables see it.
    fn logged<'l>(&'l self, ring: Option<&'l Arc<Ring>>) -> Option<Logged<'l>> {
        let ring = ring.map(|ring| (self.hint.slot.id(), &**ring));
        self.log.as_deref().map(|log| Logged { log, first: self.first(), ring })
    }

    /// All of it, as the tables see it.
    fn watch<'l>(&'l self, ring: Option<&'l Arc<Ring>>) -> Watch<'l> {
        Watch { logged: self.logged(ring), tracked: self.tracked.as_deref(), first: self.first() }
    }
}

/// What the memslots say of a frame.
enum Found {
    /// It is in the slot that is remembered now.
    Slot,
    /// It is in the slot that is remembered as watched now.
    Watched,
    /// Its slot is being deleted, moved or restricted.
    Changing,
    /// It has no memory, in memslots of this generation.
    Nothing { generation: u64 },
}

/// One vCPU's part of the MMU.
pub struct Vcpu<H: Host> {
    mmu: Arc<Mmu<H>>,
    ticket: Ticket,
    id: VcpuId,
    role: Role,
    roots: Loaded,
    cache: TableCache,
    hint: Hint,
    watched: Watched,
    /// The frame without memory that was last met, and the memslots' generation in which it had none.
    mmio: Option<(Gfn, u64)>,
    /// Where its writes go besides the bitmaps, if it has one.
    ring: Option<Arc<Ring>>,
    /// The short way was tried for the last fault, in guest mode, and something is in it.
    obstructed: bool,
    tlb: Own,
    /// The TLB generation of the last flush.
    flushed: u64,
    /// What must be flushed before the guest runs.
    flush_owed: Option<Flush>,
}

impl<H: Host> fmt::Debug for Vcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("id", &self.id).field("role", &self.role).field("roots", &self.roots).finish()
    }
}

/// The vCPU may run guest code. Drop it as soon as the guest has stopped.
#[must_use = "the vCPU counts as in guest mode until this is dropped"]
#[derive(Debug)]
pub struct InGuest<'a, H: Host> {
    vcpu: &'a mut Vcpu<H>,
    root: Hpa,
}

impl<H: Host> InGuest<'_, H> {
    /// The root table to load (nCR3, or the EPT pointer's address).
    #[inline]
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// What kind of root it is, where the CPU wants to know (the walk's length and bit 6 of an EPT pointer).
    #[inline]
    pub fn role(&self) -> Role {
        self.vcpu.role
    }

    /// Which of the guest's translations in this CPU's TLB must be flushed before the guest runs, if any; takes the
    /// obligation over.
    ///
    /// Not advice: the library has already told others that it is done. An embedder that decides not to run the guest
    /// after all asks for it no sooner than it runs: what is not taken stays owed to the next entry.
    #[inline]
    #[must_use = "the guest must not run before the flush"]
    pub fn take_flush(&mut self) -> Option<Flush> {
        // A look first: most turns owe nothing.
        self.vcpu.flush_owed?;
        self.vcpu.flush_owed.take()
    }
}

impl<H: Host> InGuest<'_, H> {
    /// Handles a second-stage fault that the guest has just met, if that is done in a few steps and without waiting, and the
    /// vCPU may go on as it is (module head). If not, nothing was done: it has to leave, and the fault is
    /// [`Vcpu::fault`]'s.
    ///
    /// The embedder still holds back what it kicks with, and has done the flush that it was told of.
    #[inline(always)]
    pub fn fix_at_once(&mut self, fault: Fault) -> bool {
        let vcpu = &mut *self.vcpu;
        if vcpu.ring.is_some() {
            return false;
        }
        if vcpu.fix_at_once(fault) {
            vcpu.trace(fault, Outcome::Fixed { level: Level::K4 });
            return true;
        }
        vcpu.obstructed = true;
        false
    }
}

impl<H: Host> Drop for InGuest<'_, H> {
    #[inline]
    fn drop(&mut self) {
        self.vcpu.tlb.leave();
    }
}

impl<H: Host> Vcpu<H> {
    pub(crate) fn new(mmu: &Arc<Mmu<H>>, id: VcpuId) -> Option<Self> {
        let seat = usize::from(id.0);
        let ticket = mmu.lock.claim(seat..seat + 1)?;
        let role = mmu.role();
        let (tlb, mmu, cache) = (mmu.tlb.own(id), Arc::clone(mmu), TableCache::default());
        // Owed from the start: this number may have been another vCPU's, which was told to flush and did not any more.
        let flush_owed = Some(Flush::All);
        Some(Self {
            mmu,
            ticket,
            id,
            role,
            roots: Loaded::default(),
            cache,
            hint: Hint::NONE,
            watched: Watched::NONE,
            mmio: None,
            ring: None,
            obstructed: false,
            tlb,
            flushed: 0,
            flush_owed,
        })
    }

    /// The vCPU's number.
    pub fn id(&self) -> VcpuId {
        self.id
    }

    /// The MMU that it belongs to.
    pub fn mmu(&self) -> &Arc<Mmu<H>> {
        &self.mmu
    }

    /// The kind of root that it runs on.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Gets the vCPU ready to run guest code. To be called with whatever the embedder kicks with held back (interrupts
    /// disabled), so that a kick from here on ends the guest's run at once.
    #[inline]
    pub fn enter(&mut self) -> Result<InGuest<'_, H>, FaultError> {
        if self.ring.as_ref().is_some_and(|ring| ring.is_nearly_full()) {
            return Err(FaultError::DirtyRingFull);
        }
        loop {
            let Some(root) = self.roots.current() else {
                self.load_root()?;
                continue;
            };
            let root = root.frame().hpa();
            let early = mutants::is(Mutant::RequestsBeforeMode).then(|| self.tlb.has_requests());
            let Entered { must_flush, has_requests } = self.mmu.tlb.enter(&self.tlb, &mut self.flushed);
            if must_flush {
                self.ticket.counters().add(Counter::Flush, 1);
                self.flush_owed = Some(Flush::All);
            }
            if !early.unwrap_or(has_requests) {
                return Ok(InGuest { vcpu: self, root });
            }
            self.tlb.leave();
            self.serve_requests();
        }
    }

    /// Turns to another kind of root, for the turns to come: another address space (system-management mode), another
    /// number of levels, with accessed and dirty bits or without. The root of the present role stays at hand.
    pub fn set_role(&mut self, role: Role) {
        if role != self.role {
            self.role = role;
            self.hint = Hint::NONE;
            self.watched = Watched::NONE;
            self.mmio = None;
            self.roots.switch(role, &self.mmu.host, self.ticket.counters());
            // What the TLB holds was filled through another root, and one address-space number may serve both.
            self.owe(Flush::Current);
        }
    }

    #[cold]
    fn serve_requests(&mut self) {
        let requests = self.tlb.take_requests();
        // In this order: what is obsolete is counted as that, and what is to be flushed may be a root that is gone.
        if requests & FREE_OBSOLETE_ROOTS != 0 {
            self.roots.drop_obsolete(&self.mmu.host, self.ticket.counters());
        }
        if requests & RELOAD != 0 {
            self.roots.put_all(&self.mmu.host, self.ticket.counters());
        }
        if requests & FLUSH != 0 {
            self.owe(Flush::All);
        }
        if requests & FLUSH_CURRENT != 0 {
            self.owe(Flush::Current);
        }
    }

    fn owe(&mut self, flush: Flush) {
        self.flush_owed = self.flush_owed.max(Some(flush));
    }

    /// The host address behind `gpa` under the vCPU's root, if the tables let `access` through now.
    ///
    /// True of the moment of the look: a zap elsewhere does not wait for whoever holds the answer. An embedder that
    /// goes on to touch the memory keeps it from being taken away by its own means.
    #[inline]
    pub fn translate(&mut self, gpa: Gpa, access: Access) -> Option<Hpa> {
        let root = self.roots.current()?;
        if gpa.gfn() >= root.role().level().root_limit() {
            return None;
        }
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        translate(&inside, root, gpa, needed(access))
    }

    /// Handles a second-stage fault.
    #[inline]
    pub fn fault(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        // Whichever fault it was that the short way was tried for: the long one is right for all.
        let obstructed = core::mem::take(&mut self.obstructed);
        let result = match !obstructed && self.fix_at_once(fault) {
            true => Ok(Outcome::Fixed { level: Level::K4 }),
            false => self.fix(fault),
        };
        if let Ok(outcome) = result {
            self.trace(fault, outcome);
        }
        result
    }

    #[inline(always)]
    fn trace(&self, fault: Fault, outcome: Outcome) {
        if H::TRACE {
            self.mmu.host.trace(Event::Fault { gfn: fault.gpa.gfn(), outcome });
        }
    }

    /// What nearly every fault is: the first use of a page whose table is there, or a write that only the log held back.
    /// Whether that was all, and is done and counted; if not, nothing was done, and what is in the way is for
    /// [`Vcpu::fix`] to find out. It waits for nobody: the vCPU may be in guest mode.
    #[inline(always)]
    fn fix_at_once(&mut self, fault: Fault) -> bool {
        let gfn = fault.gpa.gfn();
        if fault.cause == Cause::Reserved {
            return false;
        }
        let now = self.mmu.slots.generation();
        if self.hint.holds(gfn, now) {
            self.map_at_once(gfn, fault.access)
        } else {
            let write = fault.access == Access::Write && self.watched.hint.holds(gfn, now);
            let fixed = write && matches!(self.fix_protected(gfn), Some(Outcome::Fixed { .. }));
            if fixed {
                self.ticket.counters().add(Counter::Fixed, 1);
            }
            fixed
        }
    }

    /// Maps `gfn`, of the slot that is remembered, if its table is there and the backing has its frame at hand.
    // Always inlined: of a slot of no use to it, a fault would learn that behind a call.
    #[inline(always)]
    fn map_at_once(&mut self, gfn: Gfn, access: Access) -> bool {
        let mmu = &*self.mmu;
        let (Some(snapshot), Some(root)) = (mmu.notify.quiet(), self.roots.current()) else { return false };
        let Some(page) = mmu.host.page(&self.hint.slot, gfn, access) else { return false };
        let late = if mutants::is(Mutant::SnapshotAfterBacking) { mmu.notify.quiet() } else { None };
        let snapshot = late.unwrap_or(snapshot);
        let writes = access == Access::Write;
        if writes && !page.writable {
            return false;
        }
        let Some(inside) = Shared::try_enter(mmu, &mut self.ticket) else { return false };
        // From here on no update gets past its grace period and no invalidation begins before the guard is dropped. A
        // root that was invalidated is being emptied, and must not be filled again. One of a rarer role takes the longer
        // way, as whatever is not plain.
        let current = mmu.slots.generation() == self.hint.generation
            && !mmu.notify.is_overtaken(snapshot)
            && root.is_usual(&inside);
        let mapped = current && map_page(&inside, root, gfn, page, writes);
        if mapped {
            inside.counters().add(Counter::Fixed, 1);
        }
        mapped
    }

    /// Handles a fault whatever it is, and counts how it ended.
    #[cold]
    #[inline(never)]
    fn fix(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let result = self.handle(fault);
        let counter = match result {
            Ok(Outcome::Fixed { .. }) => Counter::Fixed,
            Ok(Outcome::Spurious) => Counter::Spurious,
            Ok(Outcome::Retry) => Counter::Retried,
            Ok(Outcome::Mmio) => Counter::Mmio,
            Ok(Outcome::ReadOnly) => Counter::ReadOnly,
            Ok(Outcome::Tracked) => Counter::Tracked,
            Err(_) => Counter::Failed,
        };
        self.ticket.counters().add(counter, 1);
        result
    }

    /// Outside the lock: which slot it is, and what the backing says.
    fn handle(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let gfn = fault.gpa.gfn();
        if fault.cause == Cause::Reserved && self.is_known_mmio(gfn)? {
            self.ticket.counters().add(Counter::MmioCached, 1);
            return Ok(Outcome::Mmio);
        }
        let Some(snapshot) = self.mmu.notify.snapshot(gfn) else { return Ok(Outcome::Retry) };
        if self.hint.holds(gfn, self.mmu.slots.generation()) {
            self.back(fault.gpa, fault.access, snapshot)
        } else {
            self.find_slot(fault.gpa, fault.access, snapshot)
        }
    }

    /// Asks the backing of the slot that is remembered, which is that of the fault and lets writes through.
    fn back(&mut self, gpa: Gpa, access: Access, snapshot: Snapshot) -> Result<Outcome, FaultError> {
        let mmu = &*self.mmu;
        let (slot, gfn) = (&self.hint.slot, gpa.gfn());
        let extent = match mmu.host.resolve(slot, gfn, access) {
            Ok(extent) if extent.gfns.contains(gfn) => extent,
            Ok(_) => return self.refuse(&self.hint, snapshot, Err(FaultError::BadExtent)),
            Err(error) => return self.refuse(&self.hint, snapshot, Err(FaultError::Backing(error))),
        };
        let late = if mutants::is(Mutant::SnapshotAfterBacking) { mmu.notify.snapshot(gfn) } else { None };
        let snapshot = late.unwrap_or(snapshot);
        if !extent.writable && access == Access::Write {
            return self.refuse(&self.hint, snapshot, Ok(Outcome::ReadOnly));
        }
        let want = Mapping::new(slot.range(), gfn, access, extent, extent.writable);
        Self::top_up(mmu, &self.ticket, &mut self.cache)?;
        let root = self.roots.current().ok_or(FaultError::NoRoot)?;
        let generation = self.hint.generation;
        let inside = Shared::enter(mmu, &mut self.ticket);
        Obstructed { inside, want, generation, snapshot, watch: None }.map(root, &mut self.cache)
    }

    /// As [`Vcpu::back`], for a slot whose writes are not simply let through.
    #[inline(never)]
    fn back_watched(&mut self, gpa: Gpa, access: Access, snapshot: Snapshot) -> Result<Outcome, FaultError> {
        let gfn = gpa.gfn();
        if access == Access::Write
            && let Some(outcome) = self.fix_protected(gfn)
        {
            return Ok(outcome);
        }
        let mmu = &*self.mmu;
        let slot = &self.watched.hint.slot;
        let extent = match mmu.host.resolve(slot, gfn, access) {
            Ok(extent) if extent.gfns.contains(gfn) => extent,
            Ok(_) => return self.refuse(&self.watched.hint, snapshot, Err(FaultError::BadExtent)),
            Err(error) => return self.refuse(&self.watched.hint, snapshot, Err(FaultError::Backing(error))),
        };
        let writable = extent.writable && !slot.flags().contains(SlotFlags::READ_ONLY);
        if !writable && access == Access::Write {
            return self.refuse(&self.watched.hint, snapshot, Ok(Outcome::ReadOnly));
        }
        let want = Mapping::new(slot.range(), gfn, access, extent, writable);
        Self::top_up(mmu, &self.ticket, &mut self.cache)?;
        let root = self.roots.current().ok_or(FaultError::NoRoot)?;
        let (generation, watch) = (self.watched.hint.generation, self.watched.watch(self.ring.as_ref()));
        let inside = Shared::enter(mmu, &mut self.ticket);
        Obstructed { inside, want, generation, snapshot, watch: Some(&watch) }.map(root, &mut self.cache)
    }

    /// Gives a write right back that only the dirty log has taken, without asking the backing (F6).
    ///
    /// Inside the lock like every fault: entering is two plain stores and the look for a writer, and it is the mark that
    /// keeps the tables. No invalidation has to be looked for: the entry maps what it mapped before, and one that is to
    /// go will be found by its zap, which flushes.
    ///
    /// `None` where anything is in the way, also if that is a writer: it waits for nobody.
    #[inline]
    fn fix_protected(&mut self, gfn: Gfn) -> Option<Outcome> {
        let (logged, root) = (self.watched.logged(self.ring.as_ref())?, self.roots.current()?);
        let inside = Shared::try_enter(&self.mmu, &mut self.ticket)?;
        // The slot's log is still this one, and the slot is not read-only now.
        if self.mmu.slots.generation() != self.watched.hint.generation || !root.is_valid(&inside) {
            return None;
        }
        let outcome = fix_protected(&inside, root, gfn, &logged)?;
        if matches!(outcome, Outcome::Fixed { .. }) {
            inside.counters().add(Counter::Fast, 1);
        }
        Some(outcome)
    }

    /// Gives the vCPU a dirty ring of so many entries, in the place of any that it had. Its writes to logged slots are
    /// noted there as well as in the bitmaps, and [`Vcpu::enter`] fails while it is nearly full.
    pub fn enable_dirty_ring(&mut self, entries: usize) -> Result<DirtyRing, OutOfMemory> {
        let (ring, taking) = Ring::new(entries)?;
        self.ring = Some(ring);
        Ok(taking)
    }

    /// The embedder itself has written to `range`, for the guest on this vCPU and in its address space; see
    /// [`crate::Worker::mark_dirty`].
    pub fn mark_dirty(&mut self, range: GfnRange) {
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        self.mmu.slots.read(&inside).mark_dirty(self.role.space(), range);
    }

    /// A fault ends without a mapping, because the backing said so. That it said so may be news of yesterday too: of a
    /// slot that was deleted (its memory with it) or of a page that was away while an invalidation had it.
    ///
    /// Outside the lock: whatever the backing told had happened before the answer, and the update or invalidation
    /// began before that, so it is seen here.
    #[cold]
    fn refuse(
        &self,
        hint: &Hint,
        snapshot: Snapshot,
        result: Result<Outcome, FaultError>,
    ) -> Result<Outcome, FaultError> {
        let overtaken = self.mmu.slots.generation() != hint.generation || self.mmu.notify.is_overtaken(snapshot);
        if overtaken { Ok(Outcome::Retry) } else { result }
    }

    /// Finds the slot of the fault, then goes on.
    #[cold]
    fn find_slot(&mut self, gpa: Gpa, access: Access, snapshot: Snapshot) -> Result<Outcome, FaultError> {
        let gfn = gpa.gfn();
        if self.watched.hint.holds(gfn, self.mmu.slots.generation()) {
            return self.back_watched(gpa, access, snapshot);
        }
        match self.look_up_slot(gfn) {
            Found::Slot => self.back(gpa, access, snapshot),
            Found::Watched => self.back_watched(gpa, access, snapshot),
            Found::Changing => Ok(Outcome::Retry),
            Found::Nothing { generation } => self.no_memory(gfn, generation),
        }
    }

    /// Finds the slot of `gfn` and remembers it if it is in use, under one of two names.
    fn look_up_slot(&mut self, gfn: Gfn) -> Found {
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        let set = self.mmu.slots.read(&inside);
        let generation = set.generation();
        // An index above the root's limit would wrap, and name the entry of another frame.
        let limit = self.role.level().root_limit();
        let Some(slot) = set.find(self.role.space(), gfn).filter(|_| gfn < limit) else {
            return Found::Nothing { generation };
        };
        if slot.state() == SlotState::Changing {
            return Found::Changing;
        }
        let hint = Hint { slot: slot.up_to(limit), generation };
        if slot.is_plain() {
            self.hint = hint;
            Found::Slot
        } else {
            self.watched = Watched { hint, log: slot.log().cloned(), tracked: slot.tracked().cloned() };
            Found::Watched
        }
    }

    /// No slot holds `gfn`: leaves an MMIO entry, unless a slot was added meanwhile.
    #[cold]
    fn no_memory(&mut self, gfn: Gfn, generation: u64) -> Result<Outcome, FaultError> {
        // Tables reach no further than the root's limit, and slots never begin there.
        if self.mmu.config.mmio_entries && gfn < self.role.level().root_limit() {
            Self::top_up(&self.mmu, &self.ticket, &mut self.cache)?;
            let root = self.roots.current().ok_or(FaultError::NoRoot)?;
            let inside = Shared::enter(&self.mmu, &mut self.ticket);
            if self.mmu.slots.generation() != generation || !root.is_valid(&inside) {
                return Ok(Outcome::Retry);
            }
            map_mmio(&inside, root, gfn, generation, &mut self.cache);
        }
        Ok(Outcome::Mmio)
    }

    /// Whether `gfn` has no memory in the memslots as they are now, as far as vCPU or tables know.
    #[inline]
    fn is_known_mmio(&mut self, gfn: Gfn) -> Result<bool, FaultError> {
        // What was true in a generation of the memslots stays true of it, whatever becomes of the tables.
        Ok(self.mmio == Some((gfn, self.mmu.slots.generation())) || self.is_mapped_mmio(gfn)?)
    }

    /// The same, by the tables.
    #[cold]
    fn is_mapped_mmio(&mut self, gfn: Gfn) -> Result<bool, FaultError> {
        if gfn >= self.role.level().root_limit() {
            return Ok(false);
        }
        let root = self.roots.current().ok_or(FaultError::NoRoot)?;
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        let now = self.mmu.slots.generation();
        let state = walk(&inside, root, gfn).last().map(|step| step.state);
        let known =
            matches!(state, Some(State::Mmio { generation }) if generation == now as u32 & MMIO_GENERATION_MASK);
        drop(inside);
        self.mmio = known.then_some((gfn, now)).or(self.mmio);
        Ok(known)
    }

    #[cold]
    fn top_up(mmu: &Mmu<H>, ticket: &Ticket, cache: &mut TableCache) -> Result<(), FaultError> {
        while !cache.is_full() {
            let frame = reclaim::alloc(mmu, ticket.counters(), H::alloc_table).ok_or(FaultError::OutOfTables)?;
            ticket.counters().add(Counter::TableFrames, 1);
            cache.put(frame);
        }
        Ok(())
    }

    #[cold]
    fn load_root(&mut self) -> Result<(), FaultError> {
        let (host, counters) = (&self.mmu.host, self.ticket.counters());
        let root = match self.mmu.roots.get(host, self.role) {
            Some(root) => root,
            None => {
                let frame = reclaim::alloc(&self.mmu, counters, H::alloc_table);
                let mut frame = Some(frame.ok_or(FaultError::OutOfTables)?);
                counters.add(Counter::TableFrames, 1);
                let root = self.mmu.roots.get_or_make(host, self.role, &mut frame);
                match frame {
                    Some(frame) => give_back(host, frame, counters),
                    None => counters.add(Counter::RootMade, 1),
                }
                root?
            }
        };
        self.roots.load(root, self.role);
        // Its frame may have been another root's, and the TLB's tag with it.
        self.owe(Flush::Current);
        Ok(())
    }
}

impl<H: Host> Drop for Vcpu<H> {
    fn drop(&mut self) {
        while let Some(frame) = self.cache.take() {
            give_back(&self.mmu.host, frame, self.ticket.counters());
        }
        self.roots.put_all(&self.mmu.host, self.ticket.counters());
    }
}
