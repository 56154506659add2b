//! Workers: whoever works on the tables without being a vCPU. Memslot updates, zaps, host invalidations.
//!
//! A worker has a seat of the lock and the room for a zap's debts, both reserved when it is made. It is used by one
//! thread at a time; an embedder has one for each thread that manages memory. Its operations may wait: for vCPUs to
//! leave guest mode, for readers to leave the lock, for other updates. So a thread that runs a vCPU may use a worker
//! only while that vCPU is not in guest mode, which the borrow of [`crate::InGuest`] does not know about.

mod dirty;

use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gfn, GfnRange, Gpa};
use crate::events::{Counter, Event};
use crate::host::{Host, VcpuId};
use crate::lock::{Exclusive, Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::reclaim::Batch;
use crate::root::{AllRoots, Role, Spaces};
use crate::shadow::{self, zap::ShadowDebts};
use crate::slots::{
    AddressSpace, Change, Prepared, Published, Slot, SlotConfig, SlotError, SlotFlags, SlotId, Updates,
};
use crate::tdp::age::{Age, Ages, Clear};
use crate::tdp::inspect::{Walk, walk};
use crate::tdp::sweep::sweep;
use crate::tdp::zap::{Gone, Zapped, zap_at_once, zap_range};
use crate::tlb::{Request, Wait};
use crate::{Level, Mmu, OutOfMemory, SlotZap};

/// An operation that must not block would have to. Nothing was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the operation would have to wait or to yield")
    }
}

impl core::error::Error for WouldBlock {}

/// See the module head.
pub struct Worker<H: Host> {
    mmu: Arc<Mmu<H>>,
    ticket: Ticket,
    batch: Batch,
    shadow: ShadowDebts,
}

impl<H: Host> fmt::Debug for Worker<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<H: Host> Worker<H> {
    pub(crate) fn new(mmu: &Arc<Mmu<H>>) -> Result<Self, OutOfMemory> {
        let (batch, shadow) = (Batch::new()?, ShadowDebts::new()?);
        let first = usize::from(mmu.config.vcpus);
        let ticket = mmu.lock.claim(first..first + usize::from(mmu.config.workers)).ok_or(OutOfMemory)?;
        Ok(Self { mmu: Arc::clone(mmu), ticket, batch, shadow })
    }

    /// The MMU that it works on.
    pub fn mmu(&self) -> &Arc<Mmu<H>> {
        &self.mmu
    }

    /// Adds a slot. Its frames have memory from the return on; an access that raced with it may still end as MMIO.
    ///
    /// Waits for invalidations in progress, as all slot updates do: none may be held by a thread that waits for this.
    pub fn add_slot(&mut self, config: SlotConfig) -> Result<(), SlotError> {
        let mmu = Arc::clone(&self.mmu);
        let mut updates = mmu.updates.lock(|| mmu.host.relax());
        let prepared = updates.add(&mmu.slots, config)?;
        self.publish_between_invalidations(&mmu, &mut updates, prepared);
        Ok(())
    }

    /// Deletes a slot. When it returns, no vCPU reaches the slot's memory any more.
    pub fn delete_slot(&mut self, id: SlotId) -> Result<(), SlotError> {
        self.change_slot(id, Change::Delete)
    }

    /// Moves a slot to another place in the guest's address space; its memory stays what it was.
    pub fn move_slot(&mut self, id: SlotId, base: Gpa) -> Result<(), SlotError> {
        self.change_slot(id, Change::Move(base))
    }

    /// Changes a slot's flags. When it returns, what they forbid is no longer possible.
    pub fn set_slot_flags(&mut self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.change_slot(id, Change::Flags(flags))
    }

    /// The slot that holds `gfn` in `space`, as faults see it now.
    pub fn slot_at(&mut self, space: AddressSpace, gfn: Gfn) -> Option<Slot> {
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        self.mmu.slots.read(&inside).find(space, gfn).map(|slot| slot.slot())
    }

    /// All slots, space by space in the order of their frames, as faults see them now.
    pub fn slots(&mut self) -> alloc::vec::Vec<Slot> {
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        self.mmu.slots.read(&inside).iter().map(|slot| slot.slot()).collect()
    }

    /// Removes every mapping of `range` in all address spaces. When it returns, no vCPU uses one that was there when it was called; faults may
    /// have made new ones.
    pub fn zap(&mut self, range: GfnRange) -> Zapped {
        let mut valid = Shared::enter(&self.mmu, &mut self.ticket).valid_roots(Spaces::All);
        let gone = zap_range(&self.mmu, &mut self.ticket, &mut self.batch, &mut valid, range);
        // A root that became obsolete before its turn was missed. Whoever made it so holds the exclusive lock until no
        // vCPU runs on it any more: to enter is to wait for that.
        drop(Shared::enter(&self.mmu, &mut self.ticket));
        let mut zapped = gone.zapped;
        zapped.leaves += self.zap_shadow(range);
        zapped
    }

    /// The same for what shadow paging has mapped of `range`, and made of tables there.
    fn zap_shadow(&mut self, range: GfnRange) -> u64 {
        let Some(shadow) = self.mmu.shadow.get() else { return 0 };
        shadow::zap::zap_range(&self.mmu, shadow, &mut self.ticket, &mut self.shadow, range)
    }

    /// Removes everything, at a front cost that does not depend on how much is mapped: all roots become obsolete at
    /// once, vCPUs go on with new, empty ones, and the old ones are emptied here, beside them.
    ///
    /// Only obsolete roots are dropped: a vCPU whose roots are current keeps them. When this returns, the old roots hold
    /// no mapping. Two of these at once are right; each empties the roots that it made obsolete.
    pub fn zap_all(&mut self) -> Zapped {
        let mmu = &self.mmu;
        self.ticket.counters().add(Counter::ZapAll, 1);
        let mut defunct = Exclusive::enter(mmu, &mut self.ticket).invalidate_all_roots();
        let everything = GfnRange { start: Gfn(0), end: Level::L5.root_limit() };
        let gone = if mutants::is(Mutant::ObsoleteRootsNotEmptied) {
            Gone::of_a_mutant(Mutant::ObsoleteRootsNotEmptied, everything)
        } else {
            zap_range(mmu, &mut self.ticket, &mut self.batch, &mut defunct, everything)
        };
        defunct.put_emptied(&gone, mmu, self.ticket.counters());
        if mutants::is(Mutant::RequestAfterUnlock) {
            mmu.tlb.flush_and_free_obsolete_roots(&mmu.host, self.ticket.counters());
        }
        if let Some(shadow) = mmu.shadow.get() {
            shadow::zap::zap_obsolete(mmu, shadow, &mut self.ticket, &mut self.shadow);
        }
        gone.zapped
    }

    /// Takes `range`, in all address spaces, from the guest until the returned value is dropped: when this returns, no vCPU reaches what
    /// stood behind it, and faults on it are retried. In between the embedder changes what its backing answers.
    pub fn invalidate(&mut self, range: GfnRange) -> Invalidation<'_, H> {
        let alone = Exclusive::enter(&self.mmu, &mut self.ticket);
        self.mmu.notify.begin(range, &alone);
        // All of them: also a root that is obsolete and not yet empty leads to the memory that is given back.
        let mut all = alone.all_roots(Spaces::All);
        drop(alone);
        let gone = if mutants::is(Mutant::LeafChangedInPlace) {
            Gone::of_a_mutant(Mutant::LeafChangedInPlace, range)
        } else {
            zap_range(&self.mmu, &mut self.ticket, &mut self.batch, &mut all, range)
        };
        self.zap_shadow(range);
        Invalidation { worker: self, gone }
    }

    /// As [`Worker::invalidate`] for a caller that must not block: takes the range now, or refuses with nothing done.
    ///
    /// Refused when another has the lock or wants it for itself, when somebody is inside for longer than a fault is, when
    /// the range is more than one hold of the lock may remove (a few MiB are not, hundreds are), and of a guest that is
    /// shadowed: a frame of its tables may take many shadow pages with it. It never
    /// yields, and waits only for vCPUs in guest mode to answer their kick, as any flush does; all of it is one hold. The
    /// invalidation's end waits for the lock like that of every other.
    pub fn try_invalidate(&mut self, range: GfnRange) -> Result<Invalidation<'_, H>, WouldBlock> {
        if self.mmu.shadow.get().is_some() {
            return Err(WouldBlock);
        }
        let mut alone = Exclusive::try_enter(&self.mmu, &mut self.ticket).ok_or(WouldBlock)?;
        let gone = zap_at_once(&mut alone, &mut self.batch, range).ok_or(WouldBlock)?;
        // After the zap, for once: nobody else was inside in between.
        self.mmu.notify.begin(range, &alone);
        drop(alone);
        Ok(Invalidation { worker: self, gone })
    }

    /// Asks a vCPU to do something before it runs guest code again, and kicks it if it does so now; one that halts is not
    /// woken. `None` if there is no such vCPU.
    ///
    /// With [`Wait::UntilServed`] no guest code runs, when this returns, that was entered without it. That waits for the
    /// vCPU to answer its kick.
    pub fn request(&mut self, vcpu: VcpuId, request: Request, wait: Wait) -> Option<()> {
        self.mmu.tlb.request(&self.mmu.host, self.ticket.counters(), vcpu, request, wait)
    }

    /// The entries that translate `gfn` under the root of `role`. `None` if no vCPU has loaded such a root.
    pub fn walk(&mut self, role: Role, gfn: Gfn) -> Option<Walk> {
        let root = self.mmu.roots.get(&self.mmu.host, role)?;
        let walk = walk(&Shared::enter(&self.mmu, &mut self.ticket), &root, gfn);
        root.put(&self.mmu.host, self.ticket.counters());
        Some(walk)
    }

    /// Frees tables whose readers have left. Done by every zap as well; for an embedder that wants memory back now.
    pub fn collect(&mut self) {
        self.mmu.reclaim.collect(&self.mmu, self.ticket.counters());
    }

    /// How many mapped pages of `range` in `space` were used since they were last made old.
    pub fn test_young(&mut self, space: AddressSpace, range: GfnRange) -> Age {
        self.look_at_ages(space, range, Clear::No)
    }

    /// The same, and makes them old. A leaf that reaches over the range's end counts, and becomes old, as a whole.
    ///
    /// No TLB is flushed: what one still has may look old although it is in use.
    pub fn clear_young(&mut self, space: AddressSpace, range: GfnRange) -> Age {
        self.look_at_ages(space, range, Clear::Yes)
    }

    fn look_at_ages(&mut self, space: AddressSpace, range: GfnRange, clear: Clear) -> Age {
        let mut ages = Ages::new(clear);
        sweep(&self.mmu, &mut self.ticket, space, range, &mut ages);
        let Self { mmu, ticket, shadow: debts, .. } = self;
        if let Some(shadow) = mmu.shadow.get().filter(|_| space == AddressSpace::Main) {
            shadow::age::look(mmu, shadow, ticket, debts, range, clear, &mut ages.age);
        }
        ages.age
    }

    fn change_slot(&mut self, id: SlotId, change: Change) -> Result<(), SlotError> {
        let mmu = Arc::clone(&self.mmu);
        // Held to the end: one update at a time, and the set in between is nobody else's to build on.
        let mut updates = mmu.updates.lock(|| mmu.host.relax());
        let (begun, prepared) = updates.begin(&mmu.slots, id, change)?;
        // At once, whatever is in progress: it only holds faults back.
        let published = mmu.slots.publish(&mut updates, prepared);
        self.settle(&mmu, published);
        // Every fault that had checked an older generation has left: the old slot maps nothing more from here on.
        if mmu.config.slot_zap == SlotZap::Everything {
            self.zap_all();
        }
        // Obsolete roots too, also those that another zap of everything has not emptied yet: when this update ends,
        // nothing leads to the old slot's memory any more.
        let spaces = Spaces::One(begun.slot().space());
        let mut all = Exclusive::enter(&mmu, &mut self.ticket).all_roots(spaces);
        let gone = zap_range(&mmu, &mut self.ticket, &mut self.batch, &mut all, begun.slot().range());
        if !mutants::is(Mutant::ShadowSlotNotZapped) {
            self.zap_shadow(begun.slot().range());
        }
        let prepared = updates.finish(&mmu.slots, begun, &gone);
        self.publish_between_invalidations(&mmu, &mut updates, prepared);
        Ok(())
    }

    /// Publishes a set in which memory may turn up where it was not, when no invalidation is in progress.
    fn publish_between_invalidations(&mut self, mmu: &Mmu<H>, updates: &mut Updates, prepared: Prepared) {
        loop {
            // Waited for outside the lock, which the invalidation needs for its end.
            while mmu.notify.seems_busy() && !mutants::is(Mutant::SlotsSwappedDuringInvalidation) {
                mmu.host.yield_now();
            }
            let alone = Exclusive::enter(mmu, &mut self.ticket);
            if !mmu.notify.is_busy(&alone) || mutants::is(Mutant::SlotsSwappedDuringInvalidation) {
                let published = mmu.slots.publish(updates, prepared);
                drop(alone);
                return self.settle(mmu, published);
            }
        }
    }

    /// After a publication: a grace period, then the old set is freed, and MMIO entries that would become valid again
    /// are zapped.
    fn settle(&mut self, mmu: &Mmu<H>, published: Published) {
        let (wraps, generation) = (published.wraps_mmio(), published.generation);
        published.settle(mmu);
        if H::TRACE {
            mmu.host.trace(Event::Slots { generation });
        }
        if wraps {
            self.zap_all();
        }
    }
}

impl<H: Host> Drop for Worker<H> {
    fn drop(&mut self) {
        self.collect();
    }
}

/// A range is taken from the guest until this is dropped.
#[must_use = "dropping it gives the range back to the guest's faults at once"]
#[derive(Debug)]
pub struct Invalidation<'w, H: Host> {
    worker: &'w mut Worker<H>,
    /// There is none without it: the embedder takes this value for the promise that all roots have let go.
    gone: Gone<AllRoots>,
}

impl<H: Host> Invalidation<'_, H> {
    /// The frames that are taken.
    pub fn range(&self) -> GfnRange {
        self.gone.range
    }

    /// What was mapped there.
    pub fn zapped(&self) -> Zapped {
        self.gone.zapped
    }
}

impl<H: Host> Drop for Invalidation<'_, H> {
    fn drop(&mut self) {
        let worker = &mut *self.worker;
        let alone = Exclusive::enter(&worker.mmu, &mut worker.ticket);
        worker.mmu.notify.end(&alone);
    }
}
