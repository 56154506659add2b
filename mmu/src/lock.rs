//! The MMU lock.
//!
//! # Protocol
//! Whoever works on page tables sits in a *seat*: each vCPU has one, each worker (memslot updates, zaps, host
//! invalidations) has one. Inside means that the seat's mark is odd.
//!
//! - **Shared side.** Enter: make the own mark odd; light fence; look for a writer; if there is one, step back (make
//!   the mark even) and wait. Leave: make the mark even (release). The only line written is the reader's own.
//! - **Exclusive side.** Announce (one writer at a time); heavy fence; wait until no mark is odd. Leave: withdraw the
//!   announcement (release).
//!
//! The fences order "my mark, then their announcement" against "my announcement, then their marks": at least one of
//! the two sees the other. The light side may be a mere compiler barrier when the heavy side makes all CPUs execute a
//! real one ([`crate::host::Time`]).
//!
//! The same mark is the read-side critical section of `reclaim`: a grace period is over when every mark that was odd
//! has changed. A table that was reachable when a reader entered is therefore not freed before that reader leaves.
//!
//! # Who may wait for whom
//! A holder of the shared side may wait for a vCPU to leave guest mode (a flush), never for another holder. The
//! exclusive side may wait for vCPUs as well: a vCPU that waits here is not in guest mode. One that is in guest mode may
//! come in ([`crate::InGuest::fix_at_once`]), but not wait for that: it enters by [`Shared::try_enter`], or not at all, and
//! waits for nobody inside. Guards are not `Send`, and borrow their seat mutably: a thread cannot be inside twice, which
//! would deadlock against a writer between the two.

use core::marker::PhantomData;

use crate::Mmu;
use crate::events::{Counter, Event, SeatCounters, Side};
use crate::host::Host;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering, Padded};
use alloc::boxed::Box;
use alloc::sync::Arc;

/// How often who may not wait looks whether a seat is left: a fault needs some hundred instructions, a zap far more.
const LOOKS: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) { 1 } else { 1000 };

/// One participant's place: its mark and its counters, on lines that only it writes.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Odd while inside.
    mark: AtomicU64,
    pub(crate) counters: SeatCounters,
    taken: AtomicBool,
}

#[inline]
const fn is_inside(mark: u64) -> bool {
    mark & 1 != 0
}

/// How a mark is stored.
#[inline(always)]
fn release_but_for(mutant: Mutant) -> Ordering {
    if mutants::is(mutant) { Ordering::Relaxed } else { Ordering::Release }
}

/// The lock: one announcement word that readers only read, and the seats.
#[derive(Debug)]
pub(crate) struct MmuLock {
    writer: Padded<AtomicU32>,
    // Shared with the tickets, so that a holder goes to its seat without a look at this list.
    seats: Box<[Arc<Padded<Seat>>]>,
}

impl MmuLock {
    pub(crate) fn new(seats: usize) -> Self {
        let seat = || Seat { mark: AtomicU64::new(0), counters: SeatCounters::new(), taken: AtomicBool::new(false) };
        Self { writer: Padded(AtomicU32::new(0)), seats: (0..seats).map(|_| Arc::new(Padded(seat()))).collect() }
    }

    pub(crate) fn seats(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().map(|seat| &seat.0)
    }

    /// Claims a seat of `range` for a new participant.
    pub(crate) fn claim(&self, range: core::ops::Range<usize>) -> Option<Ticket> {
        let free = self.seats[range].iter().find(|seat| !seat.taken.swap(true, Ordering::AcqRel));
        free.map(|seat| Ticket { seat: Arc::clone(seat), mark: seat.mark.load(Ordering::Relaxed) })
    }

    /// The marks that are odd now, as (seat, mark): what a grace period that starts now has to outlive. The caller
    /// has executed the heavy fence since it unlinked what it wants to free.
    pub(crate) fn readers(&self) -> impl Iterator<Item = (usize, u64)> {
        let marks = self.seats.iter().enumerate().map(|(index, seat)| (index, seat.mark.load(Ordering::Acquire)));
        marks.filter(|&(_, mark)| is_inside(mark))
    }

    pub(crate) fn has_left(&self, index: usize, mark: u64) -> bool {
        self.seats[index].mark.load(Ordering::Acquire) != mark
    }

    fn is_announced(&self) -> bool {
        self.writer.load(Ordering::Relaxed) != 0
    }
}

/// A seat at the table: the right to enter the lock. Not `Clone`; entering borrows it mutably. Dropping it gives the
/// seat back.
#[derive(Debug)]
pub(crate) struct Ticket {
    seat: Arc<Padded<Seat>>,
    /// The seat's mark, which only the holder changes: even while outside.
    mark: u64,
}

impl Ticket {
    /// The holder's own counters.
    #[inline]
    pub(crate) fn counters(&self) -> &SeatCounters {
        &self.seat.counters
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.seat.taken.store(false, Ordering::Release);
    }
}

/// Inside the lock, with others: page tables may be walked and changed by compare-and-swap.
///
/// Holding it also keeps every table that can be reached from being freed.
pub(crate) struct Shared<'a, H: Host> {
    pub(crate) mmu: &'a Mmu<H>,
    seat: &'a Seat,
    /// What the mark becomes when this is dropped.
    left: u64,
    not_send: PhantomData<*mut ()>,
}

impl<'a, H: Host> Shared<'a, H> {
    #[inline]
    pub(crate) fn enter(mmu: &'a Mmu<H>, ticket: &'a mut Ticket) -> Self {
        let mut left = ticket.mark + 2;
        ticket.mark = left;
        // Release, although nothing was done inside yet: whoever waits for the *last* stay to end may see this one as
        // its sign, and must then have seen that stay's work.
        ticket.seat.mark.store(left - 1, release_but_for(Mutant::EnterRelaxed));
        mmu.host.light_fence();
        // Acquire pairs with the writer's withdrawal: its changes are seen.
        if mmu.lock.writer.load(Ordering::Acquire) != 0 && !mutants::is(Mutant::SharedWithoutLook) {
            left = Self::step_back(mmu, ticket);
        }
        Self { mmu, seat: &ticket.seat.0, left, not_send: PhantomData }
    }

    /// As [`Shared::enter`] for who may not wait: `None` if a writer has announced itself.
    #[inline]
    pub(crate) fn try_enter(mmu: &'a Mmu<H>, ticket: &'a mut Ticket) -> Option<Self> {
        if mutants::is(Mutant::GuestWaitsForWriter) {
            return Some(Self::enter(mmu, ticket));
        }
        let left = ticket.mark + 2;
        ticket.mark = left;
        // As in `enter`.
        ticket.seat.mark.store(left - 1, release_but_for(Mutant::EnterRelaxed));
        mmu.host.light_fence();
        // Leaves, if that is to be, as every guard does when it is dropped.
        let inside = Self { mmu, seat: &ticket.seat.0, left, not_send: PhantomData };
        let alone = mmu.lock.writer.load(Ordering::Acquire) != 0 && !mutants::is(Mutant::SharedWithoutLook);
        (!alone).then_some(inside)
    }

    /// Leaves, waits for the writer to go, and enters again. What the mark becomes when that stay ends.
    #[cold]
    fn step_back(mmu: &Mmu<H>, ticket: &mut Ticket) -> u64 {
        let Ticket { seat, mark: left } = ticket;
        loop {
            seat.mark.store(*left, Ordering::Release);
            while mmu.lock.is_announced() {
                mmu.host.relax();
            }
            *left += 2;
            seat.mark.store(*left - 1, Ordering::Release);
            mmu.host.light_fence();
            if mmu.lock.writer.load(Ordering::Acquire) == 0 {
                return *left;
            }
        }
    }

    #[inline]
    pub(crate) fn counters(&self) -> &'a SeatCounters {
        &self.seat.counters
    }

    /// Whether a long operation should let others in.
    pub(crate) fn should_yield(&self) -> bool {
        self.mmu.lock.is_announced() || self.mmu.host.should_yield()
    }
}

impl<H: Host> Drop for Shared<'_, H> {
    #[inline]
    fn drop(&mut self) {
        self.seat.mark.store(self.left, release_but_for(Mutant::LeaveRelaxed));
    }
}

/// Alone inside the lock. Short by rule: nothing that depends on how much is mapped is done under it.
pub(crate) struct Exclusive<'a, H: Host> {
    pub(crate) mmu: &'a Mmu<H>,
    ticket: &'a mut Ticket,
    not_send: PhantomData<*mut ()>,
}

impl<'a, H: Host> Exclusive<'a, H> {
    pub(crate) fn enter(mmu: &'a Mmu<H>, ticket: &'a mut Ticket) -> Self {
        while mmu.lock.writer.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            mmu.host.relax();
        }
        if H::TRACE {
            mmu.host.trace(Event::LockTaken { side: Side::Exclusive });
        }
        if !mutants::is(Mutant::ExclusiveWithoutFence) {
            mmu.host.heavy_fence();
        }
        for seat in mmu.lock.seats().filter(|_| !mutants::is(Mutant::ExclusiveWithoutWaiting)) {
            // The own seat is even: entering borrowed the ticket, so no shared guard of it lives.
            while is_inside(seat.mark.load(Ordering::Acquire)) {
                mmu.host.relax();
            }
        }
        Self::entered(mmu, ticket)
    }

    /// As [`Exclusive::enter`] for who may not wait: `None` if another has announced itself, or somebody is inside for
    /// longer than a fault is.
    pub(crate) fn try_enter(mmu: &'a Mmu<H>, ticket: &'a mut Ticket) -> Option<Self> {
        mmu.lock.writer.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok()?;
        if H::TRACE {
            mmu.host.trace(Event::LockTaken { side: Side::Exclusive });
        }
        mmu.host.heavy_fence();
        // Withdraws the announcement when it is dropped, whether or not it comes to be used.
        let alone = Self::entered(mmu, ticket);
        let leaves = |seat: &Seat| {
            (0..LOOKS).any(|_| {
                core::hint::spin_loop();
                !is_inside(seat.mark.load(Ordering::Acquire))
            })
        };
        mmu.lock.seats().all(leaves).then_some(alone)
    }

    fn entered(mmu: &'a Mmu<H>, ticket: &'a mut Ticket) -> Self {
        ticket.counters().add(Counter::Exclusive, 1);
        Self { mmu, ticket, not_send: PhantomData }
    }

    pub(crate) fn counters(&self) -> &SeatCounters {
        self.ticket.counters()
    }

    /// The guard that walks want to see. Nobody else is inside; the own mark is made odd all the same, so that who frees
    /// tables meets a reader as always.
    pub(crate) fn walking(&mut self) -> Shared<'_, H> {
        let left = self.ticket.mark + 2;
        self.ticket.mark = left;
        self.ticket.seat.mark.store(left - 1, Ordering::Release);
        Shared { mmu: self.mmu, seat: &self.ticket.seat.0, left, not_send: PhantomData }
    }
}

impl<H: Host> Drop for Exclusive<'_, H> {
    fn drop(&mut self) {
        self.mmu.lock.writer.store(0, Ordering::Release);
        if H::TRACE {
            self.mmu.host.trace(Event::LockReleased { side: Side::Exclusive, steps: 0 });
        }
    }
}
