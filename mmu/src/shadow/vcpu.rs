//! What an embedder calls for a vCPU whose guest runs on shadow tables.
//!
//! # What the embedder intercepts, and what it says here
//! | the guest | the embedder |
//! |---|---|
//! | page fault | [`ShadowVcpu::fault`]; by the outcome it injects, emulates, or runs the guest again |
//! | CR3 load | [`ShadowVcpu::load_cr3`] |
//! | CR0, CR4, EFER write that changes paging | [`ShadowVcpu::set_controls`]; one that only flushes: [`ShadowVcpu::flush`] |
//! | INVLPG, INVPCID of one address of the present PCID | [`ShadowVcpu::invlpg`] |
//! | INVPCID otherwise | [`ShadowVcpu::flush`] |
//!
//! The guest reads its own values of these registers; the real ones are the embedder's, who follows [`InShadow::format`]
//! and keeps CR0.WP, EFER.NXE and CR0.PG set.
//!
//! # Turns
//! As of [`crate::Vcpu`]: [`ShadowVcpu::enter`] gives the root to load, the tag under which the TLB is to know it, and what of
//! that tag must be flushed first. What the guest asked to forget is forgotten there, at the latest, before it runs again.
//! Who owns tags, and when they owe a flush: [`super::tags`]. Loads of CR3 and INVLPG may be dealt with in guest mode, if they
//! find nothing to do ([`InShadow::load_cr3_at_once`], [`InShadow::invlpg_at_once`]).

pub mod at_once;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use super::Shadow;
use super::code;
use super::fault::{self, Blanks, Step, TOLD, Want, Way};
use super::hold::{Debts, Fresh, hold};
use super::invlpg::invlpg;
use super::memory::{GuestTables, Known, Remembered, Unbacked};
use super::near;
use super::page::Handle;
use super::quota;
use super::role::{Identity, Source};
use super::sync::{Busy, all_in_step, below_in_step};
use super::table::Inside;
use super::tags::{PREVIOUS, Tag, TagFlush, Tags};
use super::zap::zap_page;
use crate::addr::{GfnRange, Gpa, Hfn, Hpa, Level};
use crate::events::Counter;
use crate::format::long_mode::Top;
use crate::guest::{Controls, Mode, PageFault, Refused, Request, Translation, walk};
use crate::host::{Access, GuestMemory, Host, VcpuId};
use crate::lock::{Shared, Ticket};
use crate::slots::dirty::{DirtyRing, Ring};
use crate::tlb::{Entered, FLUSH, FLUSH_CURRENT, Own, RELOAD};
use crate::vcpu::FaultError;
use crate::{Mmu, OutOfMemory};

/// Times that a fault comes back to the lock with what it lacked there, before the guest is let to try again.
const ATTEMPTS: usize = 32;

/// How a fault ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowOutcome {
    /// A mapping was made or changed; the guest tries its access again.
    Fixed,
    /// The mapping was there already; the guest tries again.
    Spurious,
    /// Something was changing; the guest tries again.
    Retry,
    /// The guest's own fault: to be injected, with CR2.
    Inject(PageFault),
    /// No memory there: the access is a device's.
    Mmio {
        /// Where.
        gpa: Gpa,
    },
    /// A write to read-only memory: not carried out.
    ReadOnly {
        /// Where.
        gpa: Gpa,
    },
    /// A write to a page that is tracked ([`crate::Worker::track_page`]): the embedder carries it out, says so with
    /// [`crate::Worker::mark_dirty`], and tells whoever watches.
    Tracked {
        /// Where.
        gpa: Gpa,
    },
    /// The guest's tables are where there is no memory.
    NoTable {
        /// Where the entry should be.
        at: Gpa,
    },
    /// The guest may, but no entry can say so (without CR0.WP, where SMAP or protection keys look closer, or where a key
    /// forbids writing): the embedder executes the instruction.
    Emulate {
        /// Where.
        gpa: Gpa,
    },
}

/// Which format the real CPU must walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShadowFormat {
    /// PAE: CR4.PAE set, EFER.LMA clear. The root lies below 4 GiB.
    Pae,
    /// Long mode of four levels.
    Long4,
    /// Long mode of five levels: CR4.LA57 set.
    Long5,
}

/// A root, as a vCPU keeps it.
#[derive(Clone, Copy, Debug)]
struct Root {
    identity: Identity,
    handle: Handle,
    /// Its table, for as long as that life lasts.
    frame: Hfn,
    /// What the CPU must walk it by.
    format: ShadowFormat,
    /// The vCPU's name for it.
    tag: Tag,
}

/// One vCPU's part of shadow paging.
pub struct ShadowVcpu<H: Host + GuestMemory> {
    mmu: Arc<Mmu<H>>,
    ticket: Ticket,
    id: VcpuId,
    controls: Controls,
    cr3: u64,
    mode: Mode,
    /// The root that these registers name.
    identity: Identity,
    root: Option<Root>,
    /// Most recent first.
    previous: [Option<Root>; PREVIOUS],
    blanks: Blanks,
    debts: Debts,
    remembered: Remembered,
    way: Way,
    tlb: Own,
    /// Where its writes go besides the bitmaps, if it has one.
    ring: Option<Arc<Ring>>,
    tags: Tags,
    /// In guest mode, the page of linear addresses of the code that it looked at last, and the frame ([`at_once`]).
    fetched: Option<(u64, Hfn)>,
    /// The guest has asked to forget: pages are brought in step before it runs.
    sync_owed: bool,
}

impl<H: Host + GuestMemory> fmt::Debug for ShadowVcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowVcpu").field("id", &self.id).field("cr3", &self.cr3).finish_non_exhaustive()
    }
}

/// The vCPU may run guest code. Drop it as soon as the guest has stopped.
#[must_use = "the vCPU counts as in guest mode until this is dropped"]
#[derive(Debug)]
pub struct InShadow<'a, H: Host + GuestMemory> {
    vcpu: &'a mut ShadowVcpu<H>,
}

impl<H: Host + GuestMemory> InShadow<'_, H> {
    #[inline]
    fn here(&self) -> &Root {
        self.vcpu.root.as_ref().expect("a vCPU in guest mode has a root")
    }

    /// What to load into the real CR3.
    #[inline]
    pub fn root(&self) -> Hpa {
        self.here().frame.hpa()
    }

    /// What the real CR4 and EFER must say.
    #[inline]
    pub fn format(&self) -> ShadowFormat {
        self.here().format
    }

    /// By which tag the TLB is to have what it finds below this root, and nothing else.
    #[inline]
    pub fn tag(&self) -> Tag {
        self.here().tag
    }

    /// What this CPU's TLB must forget of what it has by the tag before the guest runs, if anything; takes the obligation over,
    /// as [`crate::InGuest::take_flush`].
    #[inline]
    #[must_use = "the guest must not run before the flush"]
    pub fn take_flush(&mut self) -> Option<TagFlush> {
        self.vcpu.tags.take(self.here().tag)
    }
}

impl<H: Host + GuestMemory> Drop for InShadow<'_, H> {
    #[inline]
    fn drop(&mut self) {
        self.vcpu.tlb.leave();
    }
}

impl<H: Host + GuestMemory> Mmu<H> {
    /// The vCPU of this number, on shadow tables; `None` if it exists already, the number is not below
    /// [`crate::Config::vcpus`], or shadow paging is not enabled. It starts without paging, as after a reset.
    pub fn shadow_vcpu(self: &Arc<Self>, id: VcpuId) -> Result<Option<ShadowVcpu<H>>, OutOfMemory> {
        let Some(shadow) = self.shadow.get().filter(|_| id.0 < self.config.vcpus) else { return Ok(None) };
        let mut blanks = Vec::new();
        blanks.try_reserve_exact(quota::ROOM)?;
        let (debts, remembered) = (Debts::new()?, Remembered::new()?);
        let seat = usize::from(id.0);
        let Some(ticket) = self.lock.claim(seat..seat + 1) else { return Ok(None) };
        let controls = Controls { cr0: 0, cr4: 0, efer: 0 };
        let mode = Mode::new(controls, shadow.cpu);
        let identity = Identity::root(controls, 0, shadow.cpu);
        Ok(Some(ShadowVcpu {
            mmu: Arc::clone(self),
            ticket,
            id,
            controls,
            cr3: 0,
            mode,
            identity,
            root: None,
            previous: [None; PREVIOUS],
            blanks,
            debts,
            remembered,
            way: Way::new(),
            tlb: self.tlb.own(id),
            ring: None,
            tags: Tags::new(shadow.withdrawals.now()),
            fetched: None,
            sync_owed: true,
        }))
    }
}

impl<H: Host + GuestMemory> ShadowVcpu<H> {
    /// The vCPU's number.
    pub fn id(&self) -> VcpuId {
        self.id
    }

    /// The MMU that it belongs to.
    pub fn mmu(&self) -> &Arc<Mmu<H>> {
        &self.mmu
    }

    /// The guest's CR3, as it was told last.
    #[inline]
    pub fn cr3(&self) -> u64 {
        self.cr3
    }

    /// The guest has written CR0, CR4 or EFER: how its addresses are translated from now on.
    ///
    /// Roots of other controls stay at hand: toggling CR0.WP goes back and forth between two.
    pub fn set_controls(&mut self, controls: Controls) {
        if controls != self.controls {
            self.controls = controls;
            let cpu = self.shadow().cpu;
            self.mode = Mode::new(controls, cpu);
            self.identity = Identity::root(controls, self.cr3, cpu);
            self.way.near = None;
            self.turn();
        }
        self.flush();
    }

    /// The guest has loaded CR3. `keeps` says that the load was one that keeps translations (bit 63, with CR4.PCIDE).
    ///
    /// Even then pages are brought in step, and the root's tag is flushed if it must be, unless it is the same value again:
    /// what was invalidated meanwhile for all PCIDs must not come back with this root.
    pub fn load_cr3(&mut self, cr3: u64, keeps: bool) {
        let same = cr3 == self.cr3;
        if !same {
            self.cr3 = cr3;
            self.identity = self.identity.with_cr3(&self.mode, cr3);
            self.turn();
        }
        if !(keeps && same) {
            self.flush();
        }
    }

    /// The guest has asked to forget all translations.
    pub fn flush(&mut self) {
        self.sync_owed = true;
    }

    /// The guest has asked to forget the translation of one address.
    pub fn invlpg(&mut self, linear: u64) {
        let Self { mmu, ticket, debts, tags, root: Some(root), .. } = self else { return };
        let Some(shadow) = mmu.shadow.get() else { return };
        if shadow.out_of_step.has_news(shadow.arena.page(root.handle.index)) {
            // Translations for all address spaces go by INVLPG (they are global): the others are brought in step when they
            // are loaded, for each load does that.
            hold(mmu, shadow, ticket, debts, |inside, order, _| invlpg(inside, order, root.handle, linear));
        }
        // Else nothing that the root reaches is out of step.
        tags.forget_address(root.tag, linear, shadow.withdrawals.now());
    }

    fn shadow(&self) -> &Shadow {
        self.mmu.shadow.get().expect("a shadow vCPU is made when shadow paging is enabled")
    }

    /// Turns to the root of the present registers if it is at hand; otherwise there is none, and one must be loaded.
    fn turn(&mut self) {
        let wanted = self.identity;
        if self.root.is_some_and(|root| root.identity == wanted) {
            return;
        }
        let place = self.previous.iter().position(|root| root.is_some_and(|root| root.identity == wanted));
        let found = place.and_then(|place| self.previous[place].take());
        if let Some(old) = core::mem::replace(&mut self.root, found) {
            let hole = place.unwrap_or(PREVIOUS - 1);
            if let Some(oldest) = self.previous[hole].take() {
                self.put(oldest);
            }
            self.previous[..=hole].rotate_right(1);
            self.previous[0] = Some(old);
        }
        // Whatever the guest wanted: see `tags` for why the tag it comes back to is asked.
        self.sync_owed = true;
    }

    /// Gives a root up. The page may be dead, or another page by now: the count is of whoever keeps the place.
    fn put(&self, root: Root) {
        self.shadow().arena.page(root.handle.index).count_unload();
    }

    /// Gives the vCPU a dirty ring, as [`crate::Vcpu::enable_dirty_ring`]. A fault may push more than one entry: where the
    /// tables of the guest are logged, a mark that its walk sets in one of them is a write as well.
    pub fn enable_dirty_ring(&mut self, entries: usize) -> Result<DirtyRing, OutOfMemory> {
        let (ring, taking) = Ring::new(entries)?;
        self.ring = Some(ring);
        Ok(taking)
    }

    /// Gets the vCPU ready to run guest code, as [`crate::Vcpu::enter`].
    pub fn enter(&mut self) -> Result<InShadow<'_, H>, FaultError> {
        if self.ring.as_ref().is_some_and(|ring| ring.is_nearly_full()) {
            return Err(FaultError::DirtyRingFull);
        }
        loop {
            let Self { mmu, ticket, debts, tags, root: Some(root), .. } = self else {
                self.load_root()?;
                continue;
            };
            let shadow = mmu.shadow.get().ok_or(FaultError::NoRoot)?;
            let asked = core::mem::take(&mut self.sync_owed);
            if asked {
                if shadow.out_of_step.has_news(shadow.arena.page(root.handle.index)) {
                    hold(mmu, shadow, ticket, debts, |inside, order, _| {
                        below_in_step(inside, order, root.handle, Busy::LeaveOpen)
                    });
                }
                // Read when all is compared.
                tags.forget(root.tag, shadow.withdrawals.now());
            }
            let Entered { must_flush, has_requests } = mmu.tlb.enter(&self.tlb, tags.generation(root.tag));
            if must_flush {
                ticket.counters().add(Counter::Flush, 1);
                tags.flush(root.tag, shadow.withdrawals.now());
            }
            if asked && !tags.owes(root.tag) {
                ticket.counters().add(Counter::FlushSpared, 1);
            }
            // A root may have ended without a request yet: whoever ended it has not come to its flush. To run on it would
            // be safe, and of no use.
            if !has_requests && shadow.arena.page(root.handle.index).is(root.handle) {
                // Should the page end from here on: its table is freed after a flush, which waits for this vCPU.
                self.fetched = None;
                return Ok(InShadow { vcpu: self });
            }
            self.tlb.leave();
            self.serve_requests();
        }
    }

    #[cold]
    fn serve_requests(&mut self) {
        let requests = self.tlb.take_requests();
        let counters = self.ticket.counters();
        let Some(shadow) = self.mmu.shadow.get() else { return };
        let now = shadow.withdrawals.now();
        if requests & FLUSH_CURRENT != 0
            && let Some(root) = self.root
        {
            self.tags.flush(root.tag, now);
        }
        if requests & FLUSH != 0 {
            self.tags.flush_all(now);
        }
        // Whatever else is asked for: each root is judged by itself.
        for place in core::iter::once(&mut self.root).chain(&mut self.previous) {
            let obsolete = |root: &mut Root| {
                let page = shadow.arena.page(root.handle.index);
                requests & RELOAD != 0 || !page.is(root.handle) || page.epoch() != shadow.epoch()
            };
            match place.take_if(obsolete) {
                Some(root) => {
                    counters.add(Counter::RootFreed, 1);
                    shadow.arena.page(root.handle.index).count_unload();
                }
                None => counters.add(Counter::RootKept, u64::from(place.is_some())),
            }
        }
    }

    /// Finds or makes the root of the present registers.
    #[cold]
    fn load_root(&mut self) -> Result<(), FaultError> {
        let mut wanted = self.identity;
        loop {
            let Self { mmu, ticket, debts, blanks, remembered, previous, tags, .. } = self;
            let shadow = mmu.shadow.get().ok_or(FaultError::NoRoot)?;
            quota::top_up(mmu, shadow, ticket, debts, blanks)?;
            if wanted.role.top() == Top::Pointers {
                quota::have_low(mmu, ticket, blanks)?;
            }
            let table = match wanted.role.source() {
                Source::Identity => None,
                Source::Guest(_) => match remembered.table(mmu, ticket, wanted.gfn) {
                    Ok(table) => Some(table),
                    Err(Unbacked::Error(error)) => return Err(error),
                    // CR3 names no memory (KVM: the dummy root): each access faults, and the guest's walk says why.
                    Err(Unbacked::NoMemory) => {
                        wanted = wanted.without_memory();
                        None
                    }
                    Err(Unbacked::Changing) => {
                        mmu.host.yield_now();
                        continue;
                    }
                },
            };
            let step = hold(mmu, shadow, ticket, debts, |inside, order, debts| {
                let fresh = Fresh::check(debts, inside, None, &table).ok_or(Step::Retry)?;
                let handle = fault::find_or_make(inside, order, fresh, wanted, table, blanks)?;
                fault::settle(inside, order, handle);
                let guard = order.alive(inside, handle).ok_or(Step::Retry)?;
                let frame = guard.page.frame(inside.shared).ok_or(Step::Retry)?;
                guard.page.count_load();
                Ok((handle, frame))
            });
            match step {
                Ok((handle, frame)) => {
                    let taken = previous.iter().flatten().map(|root| root.tag);
                    let tag = tags.give(taken, shadow.withdrawals.now());
                    let format = match (wanted.role.top(), wanted.role.level()) {
                        (Top::Pointers, _) => ShadowFormat::Pae,
                        (Top::Usual, 5) => ShadowFormat::Long5,
                        (Top::Usual, _) => ShadowFormat::Long4,
                    };
                    self.root = Some(Root { identity: wanted, handle, frame, format, tag });
                    self.ticket.counters().add(Counter::RootMade, 1);
                    // What is out of step is not to be used under a root that did not have it.
                    self.flush();
                    return Ok(());
                }
                Err(step) => serve(mmu, shadow, ticket, debts, blanks, step)?,
            }
        }
    }

    /// Translates one address as the guest's CPU would, by the guest's own tables, and marks them: for an embedder that
    /// executes an instruction.
    pub fn walk(&mut self, request: &Request) -> Result<Translation, Refused> {
        let Self { mmu, ticket, remembered, ring, mode, cr3, .. } = self;
        let ring = ring.as_ref();
        let shadow = mmu.shadow.get().ok_or(Refused::Changing)?;
        walk(mode, *cr3, request, &mut GuestTables { mmu, shadow, ticket, remembered, ring, trouble: None })
    }

    /// The four bytes at `linear`, the lowest first, as the guest's CPU finds them there by the shadow tables: for an
    /// embedder that looks at the instruction which the guest has just stopped at, and knows that it may be executed.
    ///
    /// `None` means nothing: they may be in two pages, or be taken away at the moment. [`ShadowVcpu::walk`] finds them.
    pub fn code(&mut self, linear: u64) -> Option<u32> {
        let Self { mmu, ticket, root: Some(root), .. } = self else { return None };
        let (mmu, shadow) = (&**mmu, mmu.shadow.get()?);
        let inside = &Shared::enter(mmu, ticket);
        code::four_bytes(Inside::new(inside, mmu, shadow), root.handle, linear)
    }

    /// Handles a page fault that the guest's access has met in the shadow tables.
    pub fn fault(&mut self, request: &Request) -> Result<ShadowOutcome, FaultError> {
        let result = if self.fix_near(request) { Ok(ShadowOutcome::Fixed) } else { self.handle(request) };
        let counter = match result {
            Ok(ShadowOutcome::Fixed) => Counter::Fixed,
            Ok(ShadowOutcome::Spurious) => Counter::Spurious,
            Ok(ShadowOutcome::Retry | ShadowOutcome::Emulate { .. }) => Counter::Retried,
            Ok(ShadowOutcome::Mmio { .. }) => Counter::Mmio,
            Ok(ShadowOutcome::ReadOnly { .. }) => Counter::ReadOnly,
            Ok(ShadowOutcome::Tracked { .. }) => Counter::Tracked,
            Ok(ShadowOutcome::Inject(_) | ShadowOutcome::NoTable { .. }) => Counter::Injected,
            Err(_) => Counter::Failed,
        };
        self.ticket.counters().add(counter, 1);
        result
    }

    /// Handles a fault near the last one, if it is one that needs no more than that.
    fn fix_near(&mut self, request: &Request) -> bool {
        let Self { mmu, ticket, remembered, way, debts, ring, mode, root: Some(root), .. } = self else { return false };
        let (Some(near), Some(shadow)) = (&way.near, mmu.shadow.get()) else { return false };
        near.holds(root.handle, request.linear)
            && hold(mmu, shadow, ticket, debts, |inside, order, _| {
                near::map(inside.noting(ring.as_ref()), order, near, mode, request, remembered)
            })
    }

    fn handle(&mut self, request: &Request) -> Result<ShadowOutcome, FaultError> {
        let Self { mmu, ticket, remembered, way, debts, blanks, ring, mode, cr3, identity, root, .. } = self;
        let ring = ring.as_ref();
        // Borrowed: a reference counted once more is a line that all vCPUs write.
        let mmu: &Mmu<H> = mmu;
        let shadow = mmu.shadow.get().ok_or(FaultError::NoRoot)?;
        let current = root.ok_or(FaultError::NoRoot)?;
        let by_memory = {
            let inside = &Shared::enter(mmu, ticket);
            let inside = Inside::new(inside, mmu, shadow).noting(ring);
            walk(mode, *cr3, request, &mut Known { inside, remembered })
        };
        let walked = match by_memory {
            Err(Refused::NoMemory { .. } | Refused::Changing) => {
                let mut tables = GuestTables { mmu, shadow, ticket, remembered, ring, trouble: None };
                let walked = walk(mode, *cr3, request, &mut tables);
                (walked, tables.trouble)
            }
            walked => (walked, None),
        };
        let found = match walked {
            (Ok(found), _) => found,
            (Err(Refused::Fault(fault)), _) => return Ok(ShadowOutcome::Inject(fault)),
            (Err(Refused::NoMemory { .. }), Some(Unbacked::Error(error))) => return Err(error),
            (Err(Refused::NoMemory { at }), Some(Unbacked::NoMemory) | None) => {
                return Ok(ShadowOutcome::NoTable { at });
            }
            (Err(Refused::NoMemory { .. }), Some(Unbacked::Changing)) | (Err(Refused::Changing), _) => {
                return Ok(ShadowOutcome::Retry);
            }
        };
        let target = match remembered.target(mmu, ticket, found.gpa.gfn(), request.access) {
            Ok(target) => target,
            Err(Unbacked::NoMemory) => return Ok(ShadowOutcome::Mmio { gpa: found.gpa }),
            Err(Unbacked::Changing) => return Ok(ShadowOutcome::Retry),
            Err(Unbacked::Error(error)) => return Err(error),
        };
        if request.access == Access::Write && !target.writable {
            return Ok(ShadowOutcome::ReadOnly { gpa: found.gpa });
        }
        let over_protection = request.access == Access::Write && !found.rights.write;
        if over_protection && found.rights.user && current.identity.role.has_smap_or_keys() {
            return Ok(ShadowOutcome::Emulate { gpa: found.gpa });
        }
        // The real CPU has CR0.WP, and heeds a key that this guest's supervisor need not, whatever the entry says.
        let over_key = request.access == Access::Write && current.identity.role.ignores_write_protection();
        if over_key && mode.key_protects(found.key, found.rights, request.pkru) {
            return Ok(ShadowOutcome::Emulate { gpa: found.gpa });
        }
        if current.identity != *identity {
            // The tables of a root without memory have got some.
            *root = None;
            self.put(current);
            return Ok(ShadowOutcome::Retry);
        }
        let mut want = Want {
            linear: request.linear,
            access: request.access,
            entries: [0; 5],
            root: current.identity,
            handle: current.handle,
            mode: *mode,
            target,
            target_slot: &remembered.target_slot,
            over_protection,
            tables: [None; TOLD],
        };
        for (place, (level, step)) in want.tables.iter_mut().zip(found.steps()) {
            *place = remembered.find(step.at.gfn());
            want.entries[usize::from(level) - 1] = step.entry;
        }
        for _ in 0..ATTEMPTS {
            quota::top_up(mmu, shadow, ticket, debts, blanks)?;
            let step = hold(mmu, shadow, ticket, debts, |inside, order, debts| {
                let told = want.tables.iter().copied().flatten().chain([&want.target]);
                match Fresh::check(debts, inside, Some(current.handle), told) {
                    Some(fresh) => fault::map(inside.noting(ring), order, fresh, &want, way, blanks),
                    None => Step::Retry,
                }
            });
            match step {
                Step::Fixed => return Ok(ShadowOutcome::Fixed),
                Step::Spurious => return Ok(ShadowOutcome::Spurious),
                Step::Retry => return Ok(ShadowOutcome::Retry),
                Step::Tracked => return Ok(ShadowOutcome::Tracked { gpa: found.gpa }),
                step => serve(mmu, shadow, ticket, debts, blanks, step)?,
            }
        }
        Ok(ShadowOutcome::Retry)
    }
}

/// Does what a walk lacked, outside the lock or in a hold of its own.
#[cold]
fn serve<H: Host + GuestMemory>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut Debts,
    blanks: &mut Blanks,
    step: Step,
) -> Result<(), FaultError> {
    let relax = || mmu.host.relax();
    match step {
        Step::Fixed | Step::Spurious | Step::Tracked => {}
        Step::Retry => mmu.host.relax(),
        Step::Blanks => quota::top_up(mmu, shadow, ticket, debts, blanks)?,
        Step::Bucket(level, gfn) => shadow.buckets.of(gfn).lock(relax).reserve(level, gfn)?,
        Step::Parents(index) => {
            let mut links = shadow.arena.page(index).links().lock(relax);
            links.parents.try_reserve(1).map_err(OutOfMemory::from)?;
        }
        Step::Flooded(handle) => hold(mmu, shadow, ticket, debts, |inside, order, debts| {
            inside.counters().add(Counter::Flooded, 1);
            zap_page(inside, order, debts, handle);
        }),
        Step::ListFull => hold(mmu, shadow, ticket, debts, |inside, order, _| all_in_step(inside, order)),
        Step::Crowded(gfn) => hold(mmu, shadow, ticket, debts, |inside, order, debts| {
            debts.withdraw(shadow);
            order.bucket(inside, gfn).unmap_range(inside, GfnRange::block(Level::K4, gfn));
        }),
        Step::Failed(error) => return Err(error),
    }
    Ok(())
}

impl<H: Host + GuestMemory> Drop for ShadowVcpu<H> {
    fn drop(&mut self) {
        let Some(shadow) = self.mmu.shadow.get() else { return };
        quota::give_back(&self.mmu, shadow, &mut self.blanks, self.ticket.counters());
        for root in core::iter::once(self.root).chain(self.previous).flatten() {
            self.put(root);
        }
    }
}
