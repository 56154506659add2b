//! TLB generations: how a change of the tables reaches every vCPU's TLB.
//!
//! # Protocol
//! One generation counter a VM. A flush advances it, then looks at every vCPU: one that is in guest mode and has not
//! flushed for this generation is kicked, and the flusher waits until it has left guest mode or has flushed. A vCPU
//! that enters first says so (`mode`, sequentially consistent), then reads the generation; if that differs from the
//! one it last flushed for, it flushes before the guest runs.
//!
//! Either the flusher sees the vCPU in guest mode, or the vCPU sees the new generation: both sides write first and
//! read second, with full fences. So when [`Tlb::flush`] returns, no guest instruction runs on a translation that was
//! removed before it was called; what a vCPU outside guest mode still has in its TLB is flushed before it is used.
//!
//! # Requests
//! A vCPU can be asked for something: a bit that it finds before it enters. To make a request is to set the bit, then to
//! kick the vCPU if it is in guest mode, and, if that is wanted, to wait until it has left or has taken the bit. A vCPU
//! looks at its requests after it has said that it is in guest mode, and leaves again if there are any; so when the maker
//! has waited, the vCPU runs no guest code without having served the request. One that halts is not woken for it: it
//! meets the bit when it enters. Served in this order, before a root is loaded:
//!
//! | request | what the vCPU does |
//! |---|---|
//! | free obsolete roots | drops those of its roots that are obsolete, and only those; made by zap-all, of all vCPUs |
//! | reload | drops all its roots; the present role's is looked up, or made, anew |
//! | flush | owes [`Flush::All`] |
//! | flush current | owes [`Flush::Current`] |
//!
//! The generation is no request: it goes to all vCPUs at once, and asks nothing of those that are outside guest mode but
//! one comparison when they enter.
//!
//! # What is a hint
//! That a flush is owed is none. How much of the TLB is: the embedder may always flush more. [`Flush::Current`] spares an
//! embedder whose TLB is tagged by root (EPT) the other roots' translations; with one tag for the guest (an ASID of NPT)
//! both are the same. And where [`crate::host::Vcpus::flush_range`] can remove a range from all TLBs by other means than
//! the vCPUs' own flush, a zap needs neither generation nor kick.
//!
//! A flush must reach *all* vCPUs, also those on other CPUs: `invlpg` on the own CPU, or a flush of the caller alone,
//! is the bug that other hypervisors ship.
//!
//! # Several names in one TLB
//! A vCPU on shadow tables has a tag for each of its roots ([`crate::shadow::tags`]). The generation that it compares at entry
//! is that of the tag it is about to use, and what it says to others (`flushed`) is true of that one; its other tags may be
//! behind, and are compared when they are used. Nothing that a flusher concludes needs more: no guest instruction runs by a
//! tag before the tag is flushed for what was removed before. What a flush by `Flush::All` or a request to flush is owed by
//! is each of the tags.
//!
//! A vCPU is expected to stay on its CPU, or to flush when it is moved: what another CPU's TLB holds of an earlier
//! stay is the embedder's to flush.

use alloc::boxed::Box;
use alloc::sync::Arc;

use crate::addr::GfnRange;
use crate::events::{Counter, Event, SeatCounters};
use crate::host::{ByRange, Host, VcpuId};
use crate::mutants::{self, Mutant};
use crate::sync::plain;
use crate::sync::{AtomicU32, AtomicU64, Ordering, Padded, announced, load_for_update, peek};

/// How often a flusher looks at a vCPU that does not leave, before it kicks it again: milliseconds. A kick goes through
/// the embedder's interrupt controller and emulators, and one that got lost there must not stop the whole VM.
const KICK_AGAIN: u32 = 1 << 18;

const OUTSIDE: u32 = 0;
const IN_GUEST: u32 = 1;

/// What others may know of one vCPU.
#[derive(Debug, Default)]
struct VcpuTlb {
    mode: AtomicU32,
    /// Bits of what the vCPU is asked to do before it enters.
    requests: AtomicU32,
    /// The generation of the last flush before entry.
    flushed: AtomicU64,
}

/// When something was taken away: covered once a flush has ended that began later.
///
/// For who takes things away without a flush of its own, and leaves that to whoever will need to know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Moment(u64);

impl Moment {
    /// Nothing was taken away yet.
    pub(crate) const NEVER: Self = Self(0);
}

/// Drop the roots that are obsolete, and only those.
pub(crate) const FREE_OBSOLETE_ROOTS: u32 = 1;
/// Drop all roots.
pub(crate) const RELOAD: u32 = 1 << 1;
/// Flush everything.
pub(crate) const FLUSH: u32 = 1 << 2;
/// Flush what the current root uses.
pub(crate) const FLUSH_CURRENT: u32 = 1 << 3;

/// What a vCPU can be asked to do before it runs guest code again ([`crate::Worker::request`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Drop the root that it has loaded, and those of other roles that it keeps at hand, and load its role's root again.
    Reload,
    /// Flush its TLB.
    Flush,
    /// Flush what its TLB holds of the current root.
    FlushCurrent,
}

impl Request {
    const fn bit(self) -> u32 {
        match self {
            Self::Reload => RELOAD,
            Self::Flush => FLUSH,
            Self::FlushCurrent => FLUSH_CURRENT,
        }
    }
}

/// What a vCPU finds when it has said that it is in guest mode.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Entered {
    /// It must flush before the guest runs.
    pub(crate) must_flush: bool,
    /// It is asked for something, and has to leave again and serve that.
    pub(crate) has_requests: bool,
}

/// Whether to wait for a request that is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Until the vCPU runs no guest code that it entered before it knew of the request.
    UntilServed,
    /// Not at all.
    No,
}

/// What a CPU has to flush from its TLB. More is always right.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Flush {
    /// Whatever it would use under the root that is about to be loaded: where TLB entries are tagged by root, those of
    /// this one; where all roots of a guest share one tag, all of the guest.
    Current,
    /// Everything of the guest, filled through any of its roots.
    All,
}

#[derive(Debug)]
pub(crate) struct Tlb {
    generation: Padded<AtomicU64>,
    /// The latest generation whose flush has ended; all earlier ones have, in what they wait for.
    ended: Padded<AtomicU64>,
    /// Whether anybody will ask for it: until then flushes do not write a line more.
    asked: plain::AtomicBool,
    // Shared with the vCPUs, so that each goes to its own without a look at this list.
    vcpus: Box<[Arc<Padded<VcpuTlb>>]>,
}

/// A vCPU's own end of it.
#[derive(Debug)]
pub(crate) struct Own(Arc<Padded<VcpuTlb>>);

/// Proof that a flush was carried out: no vCPU uses a translation removed before it. What is freed or thawed wants to
/// see one. Not `Clone`: it speaks for what was removed before the flush, and is not to be kept for what comes later.
#[derive(Debug)]
pub(crate) struct Flushed(());

impl Flushed {
    /// For unit tests of what wants to see one.
    #[cfg(test)]
    pub(crate) const fn in_a_test() -> Self {
        Self(())
    }

    /// A proof that proves nothing, for mutants that are to go on without a flush.
    pub(crate) fn of_a_mutant(mutant: Mutant) -> Self {
        assert!(mutants::is(mutant), "a flush is proved by flushing");
        Self(())
    }
}

/// A flush that an operation owes before it tells anyone what it learned: of entries that were armed, which stay
/// MMU_WRITABLE, and of bits that were taken. It outlives the holds of the lock in which it was run up.
#[derive(Debug)]
#[must_use = "what was learned must not be told before the flush"]
pub(crate) struct Debt {
    flush: bool,
    /// What shadow tables lose is under way ([`crate::shadow::withdrawn`]).
    withdraws: bool,
}

impl Debt {
    /// Nothing, so far.
    pub(crate) fn nothing() -> Self {
        Self { flush: false, withdraws: false }
    }

    /// A flush, whatever follows.
    pub(crate) fn flush() -> Self {
        Self { flush: true, withdraws: false }
    }

    /// From here on, a flush.
    pub(crate) fn note(&mut self) {
        self.flush = true;
    }

    /// From here on, a flush, for which shadow tables are about to lose rights.
    pub(crate) fn withdraw(&mut self, shadow: &crate::shadow::Shadow) {
        self.flush = true;
        if !core::mem::replace(&mut self.withdraws, true) {
            shadow.withdrawals.begin();
        }
    }

    /// Pays. To be called outside the lock, or inside; it waits for vCPUs only.
    pub(crate) fn pay<H: Host>(mut self, mmu: &crate::Mmu<H>, counters: &SeatCounters) {
        if core::mem::take(&mut self.flush) && !mutants::is(Mutant::ProtectedWithoutFlush) {
            mmu.tlb.flush(&mmu.host, counters);
        }
        if self.withdraws
            && let Some(shadow) = mmu.shadow.get()
        {
            shadow.withdrawals.end();
        }
    }
}

impl Drop for Debt {
    fn drop(&mut self) {
        debug_assert!(!self.flush, "a flush is owed and was not paid");
    }
}

impl Tlb {
    pub(crate) fn new(vcpus: usize) -> Self {
        // Vcpus start one generation behind: the first entry flushes, whatever ran on the CPU before.
        let (generation, ended) = (Padded(AtomicU64::new(1)), Padded(AtomicU64::new(0)));
        let asked = plain::AtomicBool::new(false);
        Self { generation, ended, asked, vcpus: (0..vcpus).map(|_| Arc::default()).collect() }
    }

    /// The end of this vCPU, which nobody else has now.
    pub(crate) fn own(&self, id: VcpuId) -> Own {
        Own(Arc::clone(&self.vcpus[usize::from(id.0)]))
    }

    /// [`Tlb::covers`] is going to be asked. A flush that has begun before may be missed by it.
    pub(crate) fn will_be_asked(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Now, for what the caller has just taken away by a read-modify-write of an entry: any flush that begins after this
    /// look covers it.
    pub(crate) fn moment(&self) -> Moment {
        Moment(load_for_update(&self.generation) + 1)
    }

    /// Whether no TLB holds any more what was taken away at `moment` or before.
    pub(crate) fn covers(&self, moment: Moment) -> bool {
        self.ended.load(Ordering::Acquire) >= moment.0
    }

    /// As [`Tlb::flush`], and no vCPU runs another guest instruction before it has dropped its obsolete roots.
    pub(crate) fn flush_and_free_obsolete_roots<H: Host>(&self, host: &H, counters: &SeatCounters) -> Flushed {
        for vcpu in self.vcpus.iter() {
            vcpu.requests.fetch_or(FREE_OBSOLETE_ROOTS, Ordering::SeqCst);
        }
        self.flush(host, counters)
    }

    /// Makes every vCPU flush before it runs another guest instruction, and waits for that.
    ///
    /// May be called inside the MMU lock: it waits for vCPUs to leave guest mode and for nothing else.
    pub(crate) fn flush<H: Host>(&self, host: &H, counters: &SeatCounters) -> Flushed {
        if mutants::is(Mutant::LocalFlushOnly) {
            return Flushed(());
        }
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        announced();
        let behind = |vcpu: &VcpuTlb| {
            vcpu.mode.load(Ordering::SeqCst) == IN_GUEST && vcpu.flushed.load(Ordering::SeqCst) < generation
        };
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            counters.add(Counter::FlushRequest, 1);
            if behind(vcpu) {
                counters.add(Counter::Kick, 1);
                host.kick(VcpuId(id as u16));
            }
        }
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            let mut waited = 0u32;
            // A vCPU that leaves and enters again while this looks away has flushed for this generation by then.
            while behind(vcpu) && !mutants::is(Mutant::KickWithoutWaiting) {
                host.relax();
                waited = waited.wrapping_add(1);
                if waited.is_multiple_of(KICK_AGAIN) {
                    counters.add(Counter::Kick, 1);
                    host.kick(VcpuId(id as u16));
                }
            }
        }
        if self.asked.load(Ordering::Relaxed) {
            // A flush of generation N waits until each vCPU has flushed for N or is outside: all before N are over too.
            self.ended.fetch_max(generation, Ordering::AcqRel);
        }
        if H::TRACE {
            host.trace(Event::Flush { generation });
        }
        Flushed(())
    }

    /// Removes `range` from all TLBs at once if the host can, else by [`Tlb::flush`].
    pub(crate) fn flush_range<H: Host>(&self, host: &H, counters: &SeatCounters, range: GfnRange) -> Flushed {
        if mutants::is(Mutant::LocalFlushOnly) || host.flush_range(range) == ByRange::Unsupported {
            return self.flush(host, counters);
        }
        counters.add(Counter::FlushByRange, 1);
        Flushed(())
    }

    /// Asks one vCPU for something; `None` if there is no such vCPU.
    pub(crate) fn request<H: Host>(
        &self,
        host: &H,
        counters: &SeatCounters,
        id: VcpuId,
        request: Request,
        wait: Wait,
    ) -> Option<()> {
        let vcpu = self.vcpus.get(usize::from(id.0))?;
        vcpu.requests.fetch_or(request.bit(), Ordering::SeqCst);
        announced();
        let in_guest = || vcpu.mode.load(Ordering::SeqCst) == IN_GUEST;
        if !in_guest() {
            return Some(());
        }
        let mut waited = 0u32;
        loop {
            if waited.is_multiple_of(KICK_AGAIN) {
                counters.add(Counter::Kick, 1);
                host.kick(id);
            }
            if wait == Wait::No || !in_guest() || peek(&vcpu.requests) & request.bit() == 0 {
                return Some(());
            }
            host.relax();
            waited = waited.wrapping_add(1);
        }
    }

    /// The vCPU is about to run guest code. `flushed` is the generation that what it is about to use last flushed for, 0 at
    /// first.
    #[inline]
    pub(crate) fn enter(&self, Own(vcpu): &Own, flushed: &mut u64) -> Entered {
        let mut generation = if mutants::is(Mutant::ModeAfterTheLook) { self.generation() } else { 0 };
        vcpu.mode.swap(IN_GUEST, Ordering::SeqCst);
        announced();
        if !mutants::is(Mutant::ModeAfterTheLook) {
            generation = self.generation();
        }
        let must_flush = *flushed != generation;
        if must_flush {
            *flushed = generation;
            // Said before it is done: between here and the flush no guest instruction runs.
            vcpu.flushed.store(generation, Ordering::SeqCst);
        }
        // After "in guest mode" was said: whoever makes a request later waits for this turn's end.
        Entered { must_flush, has_requests: peek(&vcpu.requests) != 0 }
    }

    /// Whether a vCPU that is in guest mode may go on with what last flushed for the generation `flushed`, which is not what it
    /// went on with before. Nothing was removed since; and of what is removed from here on it is behind, as it has said
    /// `flushed` or less, so that whoever removes it waits for it to leave.
    #[inline]
    pub(crate) fn is_up_to_date(&self, flushed: u64) -> bool {
        self.generation() == flushed
    }

    #[inline]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the vCPU is in guest mode now; the answer may be old when it arrives.
    pub(crate) fn in_guest(&self, id: VcpuId) -> bool {
        self.vcpus[usize::from(id.0)].mode.load(Ordering::SeqCst) == IN_GUEST
    }
}

impl Own {
    /// Whether the vCPU is asked for anything. What counts is what [`Tlb::enter`] finds.
    pub(crate) fn has_requests(&self) -> bool {
        peek(&self.0.requests) != 0
    }

    /// Takes what the vCPU is asked for, to serve it. Outside guest mode.
    pub(crate) fn take_requests(&self) -> u32 {
        self.0.requests.swap(0, Ordering::SeqCst)
    }

    /// The vCPU has left guest mode.
    #[inline]
    pub(crate) fn leave(&self) {
        // Release: accesses that the guest made are before this for a flusher that sees it.
        self.0.mode.store(OUTSIDE, Ordering::Release);
    }
}
