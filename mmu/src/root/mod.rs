//! Roots: the top tables that vCPUs load. Identified by role, reference-counted, made obsolete all at once.
//!
//! # The life of a root
//! ```text
//!   made ──► valid ──invalidate_all──► defunct ──emptied by its zapper──► empty ──last put──► freed
//!            │ found by role           │ found by nobody who looks          │ kept by whoever has not
//!            │ faults fill it          │ for a role; faults leave it        │ let go of it yet
//! ```
//! - A root is born with one reference, the MMU's own, held by the list of valid roots. A vCPU that has loaded it holds
//!   one, and so does an operation for as long as it walks it. At most one valid root a role exists at a time.
//! - Invalidation moves the MMU's reference from the valid to the defunct list, under the exclusive lock, and that is
//!   one way. [`Defunct`] is the right, and the duty, to empty what one invalidation moved: a value, consumed once, so
//!   each root is emptied by whoever made it defunct and by nobody else.
//! - The defunct list exists so that whoever gives memory back to the host sees *all* roots ([`AllRoots`]) until each
//!   is empty. Everyone else sees valid ones ([`ValidRoots`]): a defunct root is entered by no vCPU any more.
//! - After emptying, the MMU's reference is put. Others (a vCPU that halts and has not served its request, a walker that
//!   yielded) may keep the empty root alive: its frame, never its contents.
//!
//! # Who may see which roots
//! | set | had from | used by |
//! |---|---|---|
//! | valid | the shared guard | faults, zap of a range |
//! | all | the exclusive guard | host invalidation, memslot delete and move |
//! | defunct, its own | `invalidate_all`, once | the back half of zap-all |
//!
//! Each set can be narrowed to the roots of one address space ([`Spaces`]): a slot is mapped in its own space only.
//!
//! # Roles
//! Two vCPUs share a root when everything that its tables depend on is the same for both: the address space, which
//! decides what is where; the number of levels; and whether accessed and dirty bits mean anything. Without them
//! ([`AdBits::Off`]) a leaf that lets the guest write counts as written from the start, so that its dirty bit never says
//! less than was done; cleaning it takes the write right away, and its age shows when an access-tracked entry faults.
//!
//! Sets are cursors over serial numbers, not lists: nothing is allocated, and a root made after the cursor was, which
//! by then cannot map what the caller is about to remove, is not visited.

mod loaded;

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{Hfn, Level};
use crate::events::{Counter, SeatCounters};
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::lock::{Exclusive, Shared};
use crate::mutants::{self, Mutant};
use crate::reclaim::Reach;
use crate::slots::AddressSpace;
use crate::sync::{AtomicU32, Ordering};
use crate::tdp::zap::Gone;
use crate::tlb::Flushed;
use crate::{Mmu, OutOfMemory};
pub(crate) use loaded::Loaded;

/// What makes two roots different: vCPUs whose roles are equal share one (module head).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Role {
    level: Level,
    space: AddressSpace,
    ad_bits: AdBits,
}

/// Whether the CPU sets accessed and dirty bits in the tables.
///
/// EPT can do without (EPTP bit 6, SDM vol 3, 30.3.5). NPT can not; there [`AdBits::Off`] says that nobody relies on
/// what it sets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum AdBits {
    /// It does.
    #[default]
    On,
    /// It does not, or what it sets is not looked at: writes show by write protection, accesses by access tracking.
    Off,
}

impl Role {
    /// Roots of the main address space whose table is of `level`: [`Level::L4`] or [`Level::L5`], otherwise `None`.
    pub const fn new(level: Level) -> Option<Self> {
        if level.number() < Level::L4.number() {
            return None;
        }
        Some(Self { level, space: AddressSpace::Main, ad_bits: AdBits::On })
    }

    /// The same in another address space.
    #[must_use]
    pub const fn in_space(self, space: AddressSpace) -> Self {
        Self { space, ..self }
    }

    /// The same with accessed and dirty bits, or without.
    #[must_use]
    pub const fn with_ad_bits(self, ad_bits: AdBits) -> Self {
        Self { ad_bits, ..self }
    }

    /// The address space whose slots it maps.
    #[inline]
    pub const fn space(self) -> AddressSpace {
        self.space
    }

    /// Whether accessed and dirty bits are relied on.
    #[inline]
    pub const fn ad_bits(self) -> AdBits {
        self.ad_bits
    }

    /// The root table's level.
    #[inline]
    pub const fn level(self) -> Level {
        self.level
    }
}

/// One root.
#[derive(Debug)]
struct Root {
    frame: Hfn,
    role: Role,
    /// Never given twice; later roots have higher ones.
    serial: u64,
    /// [`INVALID`] and [`WITHOUT_AD`]: one word, so that the usual fault finds out by one look that neither is the case.
    state: AtomicU32,
}

/// The root was invalidated: one way, under the exclusive lock.
const INVALID: u32 = 1;
/// Its role is without accessed and dirty bits: from its birth, or never.
const WITHOUT_AD: u32 = 2;

/// A counted reference to a root. Given up with [`RootRef::put`]; the last one frees the root's frame.
#[derive(Debug)]
#[must_use = "a reference that is not put leaks its root"]
pub(crate) struct RootRef(Arc<Root>);

impl RootRef {
    #[inline]
    pub(crate) fn frame(&self) -> Hfn {
        self.0.frame
    }

    #[inline]
    pub(crate) fn role(&self) -> Role {
        self.0.role
    }

    /// Whether the root may be filled. Inside the lock the answer stands until the guard is dropped, because
    /// invalidation is exclusive.
    #[inline]
    pub(crate) fn is_valid<H: Host>(&self, _inside: &Shared<'_, H>) -> bool {
        !self.is_obsolete() || mutants::is(Mutant::FaultIntoObsoleteRoot)
    }

    /// Whether the root may be filled, and with nothing but what the usual role asks for: leaves whose dirty bit the CPU
    /// sets.
    #[inline]
    pub(crate) fn is_usual<H: Host>(&self, _inside: &Shared<'_, H>) -> bool {
        self.0.state.load(Ordering::Acquire) == 0 || mutants::is(Mutant::FaultIntoObsoleteRoot)
    }

    /// Whether the root was invalidated; a vCPU asks this of each of its roots when it is told to drop obsolete ones.
    pub(crate) fn is_obsolete(&self) -> bool {
        self.0.state.load(Ordering::Acquire) & INVALID != 0
    }

    fn another(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Gives the reference up. The last one frees the root's frame, at once: whoever walks a root holds a reference, a
    /// vCPU puts its own only outside guest mode, and flushes before it runs on another root.
    pub(crate) fn put<H: Host>(self, host: &H, counters: &SeatCounters) {
        if let Some(root) = Arc::into_inner(self.0) {
            // (A model checker does not know what the counter of references orders.)
            let invalid = cfg!(feature = "loom") || root.state.load(Ordering::Relaxed) & INVALID != 0;
            debug_assert!(invalid, "the last reference to a valid root is the MMU's own");
            counters.add(Counter::TableFrames, 1u64.wrapping_neg());
            host.free_table(root.frame);
        }
    }
}

/// Both lists, behind one leaf lock.
#[derive(Debug)]
struct Lists {
    valid: Vec<RootRef>,
    /// With the generation whose invalidation moved them here.
    defunct: Vec<(u64, RootRef)>,
    next_serial: u64,
    /// Counts invalidations.
    generation: u64,
}

/// The MMU's roots, each by the MMU's own reference.
#[derive(Debug)]
pub(crate) struct Roots {
    lists: LeafLock<Lists>,
}

impl Roots {
    pub(crate) fn new() -> Self {
        Self { lists: LeafLock::new(Lists { valid: Vec::new(), defunct: Vec::new(), next_serial: 1, generation: 0 }) }
    }

    /// The valid root of `role`; made if there is none. `frame` is a table frame to make it of, taken if it is used.
    pub(crate) fn get_or_make<H: Host>(
        &self,
        host: &H,
        role: Role,
        frame: &mut Option<Hfn>,
    ) -> Result<RootRef, OutOfMemory> {
        let mut lists = self.lists.lock(|| host.relax());
        if let Some(root) = lists.valid.iter().find(|root| root.role() == role) {
            return Ok(root.another());
        }
        // Room for it in both lists now: invalidation, under the exclusive lock, must not allocate.
        lists.valid.try_reserve(1)?;
        let total = lists.valid.len() + 1;
        lists.defunct.try_reserve(total)?;
        let frame = frame.take().ok_or(OutOfMemory)?;
        let state = AtomicU32::new(if role.ad_bits == AdBits::Off { WITHOUT_AD } else { 0 });
        let root = RootRef(Arc::new(Root { frame, role, serial: lists.next_serial, state }));
        lists.next_serial += 1;
        lists.valid.push(root.another());
        Ok(root)
    }

    /// The valid root of `role`, if there is one. Never an invalid one: a get fails on those.
    pub(crate) fn get<H: Host>(&self, host: &H, role: Role) -> Option<RootRef> {
        let is_it = |root: &&RootRef| root.role() == role || mutants::is(Mutant::RootOfAnotherRole);
        self.lists.lock(|| host.relax()).valid.iter().find(is_it).map(RootRef::another)
    }

    /// Waits until every root that is obsolete now is empty. The caller is not inside the lock, and empties none itself.
    pub(crate) fn wait_until_emptied<H: Host>(&self, host: &H) {
        let generation = self.lists.lock(|| host.relax()).generation;
        let left = |lists: &Lists| lists.defunct.iter().any(|(defunct, _)| *defunct <= generation);
        while left(&self.lists.lock(|| host.relax())) {
            host.yield_now();
        }
    }

    /// All roots, for the end of the MMU, when nobody else holds any.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (Hfn, Level)> + use<> {
        let lists = self.lists.get_mut();
        let defunct = core::mem::take(&mut lists.defunct).into_iter().map(|(_, root)| root);
        core::mem::take(&mut lists.valid).into_iter().chain(defunct).map(|root| (root.frame(), root.role().level()))
    }
}

/// A set of roots that an operation goes through, holding a reference to one at a time.
pub(crate) trait RootSet<H: Host> {
    /// The next root of the set. The caller puts it.
    fn next(&mut self, mmu: &Mmu<H>) -> Option<RootRef>;

    /// Who may have in a TLB what the roots of the set map.
    fn reach(&self) -> Reach<'_> {
        Reach::Live
    }
}

/// Of which address spaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Spaces {
    /// All of them: what is said is of frames, and whoever says it need not know who has memory there.
    All,
    /// One: what is said is of a slot.
    One(AddressSpace),
}

impl Spaces {
    fn hold(self, root: &RootRef) -> bool {
        match self {
            Self::All => true,
            Self::One(space) => root.role().space == space,
        }
    }
}

/// The valid roots. Had from a shared guard: `Shared::valid_roots`.
#[derive(Debug)]
pub(crate) struct ValidRoots {
    spaces: Spaces,
    after: u64,
}

/// All roots, valid or not, that existed when the exclusive lock was held. Had from an exclusive guard only.
#[derive(Debug)]
pub(crate) struct AllRoots {
    spaces: Spaces,
    after: u64,
    end: u64,
}

impl AllRoots {
    /// How many there are, for who is alone inside the lock.
    pub(crate) fn count<H: Host>(&self, mmu: &Mmu<H>) -> u64 {
        let lists = mmu.roots.lists.lock(|| mmu.host.relax());
        let all = lists.valid.iter().chain(lists.defunct.iter().map(|(_, root)| root));
        all.filter(|root| root.0.serial < self.end && self.spaces.hold(root)).count() as u64
    }
}

/// The roots that one invalidation made defunct, and the proof that no vCPU uses them any more. To be emptied, once.
#[derive(Debug)]
#[must_use = "the roots keep their mappings, and the memslot update must not end, until they are emptied"]
pub(crate) struct Defunct {
    generation: u64,
    after: u64,
    flushed: Flushed,
}

impl<'a, H: Host> Shared<'a, H> {
    /// The roots that a holder of the shared side may walk.
    pub(crate) fn valid_roots(&self, spaces: Spaces) -> ValidRoots {
        ValidRoots { spaces, after: 0 }
    }
}

impl<'a, H: Host> Exclusive<'a, H> {
    /// All roots of `spaces` that can map anything now.
    pub(crate) fn all_roots(&self, spaces: Spaces) -> AllRoots {
        AllRoots { spaces, after: 0, end: self.mmu.roots.lists.lock(|| self.mmu.host.relax()).next_serial }
    }

    /// The front half of zap-all: makes every root obsolete, and every vCPU leave guest mode with the request to drop
    /// the obsolete ones.
    ///
    /// One method, because nothing may come between its steps. Were the lock let go before every vCPU is out, one could
    /// go on running on tables that are being taken apart, and a flush at the end of that would come too late; were
    /// the request made in another hold of the lock, a root could be loaded in between that nobody tells its vCPU to
    /// drop. The cost depends on the number of vCPUs and roles, not on how much is mapped.
    pub(crate) fn invalidate_all_roots(&self) -> Defunct {
        let mut lists = self.mmu.roots.lists.lock(|| self.mmu.host.relax());
        lists.generation += 1;
        let generation = lists.generation;
        let Lists { valid, defunct, .. } = &mut *lists;
        debug_assert!(defunct.capacity() - defunct.len() >= valid.len(), "room is made when a root is");
        for root in valid.drain(..) {
            root.0.state.fetch_or(INVALID, Ordering::Release);
            defunct.push((generation, root));
        }
        drop(lists);
        if let Some(shadow) = self.mmu.shadow.get() {
            shadow.begin_epoch();
        }
        let flushed = if mutants::is(Mutant::RequestAfterUnlock) {
            Flushed::of_a_mutant(Mutant::RequestAfterUnlock)
        } else {
            self.mmu.tlb.flush_and_free_obsolete_roots(&self.mmu.host, self.counters())
        };
        Defunct { generation, after: 0, flushed }
    }
}

impl<H: Host> RootSet<H> for ValidRoots {
    fn next(&mut self, mmu: &Mmu<H>) -> Option<RootRef> {
        let lists = mmu.roots.lists.lock(|| mmu.host.relax());
        let root = first_after(lists.valid.iter().filter(|root| self.spaces.hold(root)), self.after)?;
        self.after = root.0.serial;
        Some(root)
    }
}

impl<H: Host> RootSet<H> for AllRoots {
    fn next(&mut self, mmu: &Mmu<H>) -> Option<RootRef> {
        let lists = mmu.roots.lists.lock(|| mmu.host.relax());
        let defunct = lists.defunct.iter().filter(|_| !mutants::is(Mutant::NotifierOnValidRootsOnly));
        let all = lists.valid.iter().chain(defunct.map(|(_, root)| root));
        let wanted = all.filter(|root| root.0.serial < self.end && self.spaces.hold(root));
        let root = first_after(wanted, self.after)?;
        self.after = root.0.serial;
        Some(root)
    }
}

impl<H: Host> RootSet<H> for Defunct {
    fn next(&mut self, mmu: &Mmu<H>) -> Option<RootRef> {
        let lists = mmu.roots.lists.lock(|| mmu.host.relax());
        let own = lists.defunct.iter().filter(|(generation, _)| *generation == self.generation);
        let root = first_after(own.map(|(_, root)| root), self.after)?;
        self.after = root.0.serial;
        Some(root)
    }

    fn reach(&self) -> Reach<'_> {
        Reach::Unreachable(&self.flushed)
    }
}

/// The one with the lowest serial above `after`.
fn first_after<'l>(roots: impl Iterator<Item = &'l RootRef>, after: u64) -> Option<RootRef> {
    roots.filter(|root| root.0.serial > after).min_by_key(|root| root.0.serial).map(RootRef::another)
}

impl Defunct {
    /// Ends the life of the roots, which are empty now, as `_gone` says: the MMU's own references are put.
    pub(crate) fn put_emptied<H: Host>(self, _gone: &Gone<Self>, mmu: &Mmu<H>, counters: &SeatCounters) {
        loop {
            let mut lists = mmu.roots.lists.lock(|| mmu.host.relax());
            let own = |(generation, _): &(u64, RootRef)| *generation == self.generation;
            let Some(index) = lists.defunct.iter().position(own) else { return };
            let (_, root) = lists.defunct.swap_remove(index);
            drop(lists);
            root.put(&mmu.host, counters);
        }
    }
}

/// A frame taken for a table that turned out not to be needed goes back at once: no entry ever led to it.
pub(crate) fn give_back<H: Host>(host: &H, frame: Hfn, counters: &SeatCounters) {
    counters.add(Counter::TableFrames, 1u64.wrapping_neg());
    host.free_table(frame);
}
