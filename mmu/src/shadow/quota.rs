//! The quota of shadow pages, and who goes when it is reached.
//!
//! A fault brings the pages that it may need, got outside the lock. When few places are left, the least useful pages are
//! zapped first: a hand goes round the arena, spares pages that a fault went through since its last visit, and roots
//! that a vCPU keeps. All of this is *before* the fault proves what it builds on: a page that is zapped here may be the
//! fault's own root, or a table on its way (CVE-2026-64561).

use super::Shadow;
use super::fault::Blanks;
use super::hold::{Debts, hold};
use super::page::{Blank, Handle};
use super::zap::zap_page;
use crate::Mmu;
use crate::events::{Counter, SeatCounters};
use crate::host::{Host, LOW_FRAMES};
use crate::lock::Ticket;
use crate::reclaim;
use crate::sync::{AtomicU32, Ordering};
use crate::vcpu::FaultError;

/// Pages that one fault may make: a root of level 5 and four below.
pub(super) const ROOM: usize = 5;
/// Fewer free places than this, and pages are zapped.
const LOW: u32 = 16;
/// Pages zapped at once.
const REFILL: u32 = 24;

/// Times that a page is looked for.
const TRIES: usize = if cfg!(any(feature = "loom", feature = "shuttle")) { 2 } else { 64 };

/// Where the hand stands.
#[derive(Debug)]
pub(super) struct Hand(AtomicU32);

impl Hand {
    pub(super) fn new() -> Self {
        Self(AtomicU32::new(0))
    }
}

/// Fills `blanks`. Outside the lock.
pub(super) fn top_up<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut Debts,
    blanks: &mut Blanks,
) -> Result<(), FaultError> {
    let relax = || mmu.host.relax();
    let mut tries = 0;
    while blanks.len() < ROOM {
        if shadow.arena.free(relax) < LOW.min(shadow.arena.limit() / 4) {
            zap_least_useful(mmu, shadow, ticket, debts);
        }
        let Some(index) = shadow.arena.take(relax)? else {
            // All that could go went, and others took it: they got on by that. Where nothing can go, all pages are roots
            // that vCPUs keep, or at hand for faults.
            tries += 1;
            if tries == TRIES {
                return Err(FaultError::OutOfTables);
            }
            relax();
            continue;
        };
        let Some(frame) = reclaim::alloc(mmu, ticket.counters(), H::alloc_table) else {
            shadow.arena.put(index, relax);
            return Err(FaultError::OutOfTables);
        };
        ticket.counters().add(Counter::TableFrames, 1);
        blanks.push(Blank { index, frame });
    }
    Ok(())
}

/// Sees to it that the blank that is taken next has a frame below 4 GiB, for the root of a guest without long mode. All such
/// roots are made of these.
pub(super) fn have_low<H: Host>(mmu: &Mmu<H>, ticket: &Ticket, blanks: &mut Blanks) -> Result<(), FaultError> {
    let Some(last) = blanks.len().checked_sub(1) else { return Ok(()) };
    if let Some(low) = blanks.iter().rposition(|blank| blank.frame.0 < LOW_FRAMES) {
        blanks.swap(low, last);
        return Ok(());
    }
    let low = reclaim::alloc(mmu, ticket.counters(), H::alloc_low_table).ok_or(FaultError::OutOfTables)?;
    // Nobody has seen either.
    mmu.host.free_table(core::mem::replace(&mut blanks[last].frame, low));
    Ok(())
}

/// Gives pages back that were not needed.
pub(super) fn give_back<H: Host>(mmu: &Mmu<H>, shadow: &Shadow, blanks: &mut Blanks, counters: &SeatCounters) {
    for Blank { index, frame } in blanks.drain(..) {
        crate::root::give_back(&mmu.host, frame, counters);
        shadow.arena.put(index, || mmu.host.relax());
    }
}

/// Zaps pages that were not used since the hand last came by.
fn zap_least_useful<H: Host>(mmu: &Mmu<H>, shadow: &Shadow, ticket: &mut Ticket, debts: &mut Debts) {
    let limit = shadow.arena.limit();
    hold(mmu, shadow, ticket, debts, |inside, order, debts| {
        let mut zapped = 0;
        // Twice round finds everything that is not in use: the first round takes the marks away.
        for _ in 0..2 * limit {
            if zapped == REFILL || debts.are_many() {
                break;
            }
            let index = inside.shadow.hand.0.fetch_add(1, Ordering::Relaxed) % limit;
            let Some(page) = inside.shadow.arena.known(index) else { continue };
            let handle = Handle { index, life: page.life() };
            if page.is(handle) && page.loads() == 0 && !page.take_used() && zap_page(inside, order, debts, handle) {
                zapped += 1;
            }
        }
        inside.counters().add(Counter::Recycled, u64::from(zapped));
    });
}
