//! One hold of the MMU lock in which shadow pages are worked on, and what it owes at its end.
//!
//! A hold is a closure, for the reason that `reclaim` gives: a guard could be forgotten, and its debts with it. When the
//! closure is over, the hold pays: a flush if one is owed, with the request to drop obsolete roots if a page went that
//! may be one; then it leaves the lock; then the tables that were unlinked go to `reclaim`, with the proof of the flush.
//!
//! # Fresh
//! A fault builds on answers that it got outside the lock: the slot, the backing, its root. [`Fresh`] is the proof that
//! inside this hold they were found to be true still. It borrows [`Debts`]; zapping a page needs `&mut Debts`. So nothing
//! that was proved before a zap can be used after it: zapping ends the proof, and the program that forgets to ask again
//! does not compile (CVE-2026-64561 was such a one).

use alloc::vec::Vec;
use core::marker::PhantomData;

use super::Shadow;
use super::memory::Backed;
use super::order::Order;
use super::page::Handle;
use super::table::Inside;
use crate::addr::Hfn;
use crate::host::Host;
use crate::lock::{Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::{Mmu, OutOfMemory};

/// Tables that one hold unlinks at most, but for the last step.
const FRAMES: usize = 256;

/// What a hold owes. Room is made before the lock is taken, and used again and again.
#[derive(Debug)]
pub(crate) struct Debts {
    flush: bool,
    roots: bool,
    /// What is taken away in this hold is under way: see [`super::withdrawn`].
    withdraws: bool,
    frames: Vec<Hfn>,
}

impl Debts {
    pub(super) fn new() -> Result<Self, OutOfMemory> {
        let mut frames = Vec::new();
        frames.try_reserve_exact(FRAMES)?;
        Ok(Self { flush: false, roots: false, withdraws: false, frames })
    }

    /// The hold flushes all vCPUs at its end.
    pub(super) fn owe_flush(&mut self) {
        self.flush = true;
    }

    /// Something is about to be taken away for the host's reasons, for which the hold flushes at its end.
    pub(super) fn withdraw(&mut self, shadow: &Shadow) {
        self.flush = true;
        if !core::mem::replace(&mut self.withdraws, true) {
            shadow.withdrawals.begin();
        }
    }

    /// Whether that was said in this hold.
    pub(super) fn withdraws(&self) -> bool {
        self.withdraws
    }

    /// A page's table is led to by nothing any more. vCPUs may still have it as a root, if it can be one.
    pub(super) fn unlinked(&mut self, frame: Hfn, may_be_root: bool) {
        self.flush = true;
        self.roots |= may_be_root;
        self.frames.push(frame);
    }

    /// Whether another page may not find room.
    pub(super) fn are_many(&self) -> bool {
        self.frames.len() + 1 >= FRAMES
    }
}

/// Proof that what a fault was told outside the lock holds inside it. See the module head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fresh<'d>(PhantomData<&'d Debts>);

impl<'d> Fresh<'d> {
    /// Asks whether each answer of `told` still stands, and `root` is what it was.
    pub(crate) fn check<'t, H: Host>(
        _debts: &'d Debts,
        inside: Inside<'_, H>,
        root: Option<Handle>,
        told: impl IntoIterator<Item = &'t Backed>,
    ) -> Option<Self> {
        let root = root.is_none_or(|root| {
            let page = inside.page(root.index);
            page.is(root) && page.epoch() == inside.shadow.epoch()
        });
        let stale = mutants::is(Mutant::ShadowFaultNotFresh);
        let told = told.into_iter().all(|told| told.still_holds(inside.mmu, inside.shared));
        (root && told || stale).then_some(Self(PhantomData))
    }
}

struct Hold<'a, H: Host> {
    shared: Option<Shared<'a, H>>,
    mmu: &'a Mmu<H>,
    shadow: &'a Shadow,
    debts: &'a mut Debts,
}

/// Runs `work` in one hold of the shared side.
pub(super) fn hold<H: Host, R>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut Debts,
    work: impl FnOnce(Inside<'_, H>, &mut Order<'_>, &mut Debts) -> R,
) -> R {
    let mut hold = Hold { shared: Some(Shared::enter(mmu, ticket)), mmu, shadow, debts };
    let Hold { shared, debts, .. } = &mut hold;
    let shared = shared.as_ref().expect("the guard is there until drop");
    work(Inside::new(shared, mmu, shadow), &mut Order::of_this_hold(), debts)
}

impl<H: Host> Drop for Hold<'_, H> {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        if !core::mem::take(&mut self.debts.flush) {
            return;
        }
        let counters = shared.counters();
        let flushed = if core::mem::take(&mut self.debts.roots) {
            self.mmu.tlb.flush_and_free_obsolete_roots(&self.mmu.host, counters)
        } else {
            self.mmu.tlb.flush(&self.mmu.host, counters)
        };
        if core::mem::take(&mut self.debts.withdraws) {
            self.shadow.withdrawals.end();
        }
        drop(shared);
        if !self.debts.frames.is_empty() {
            self.mmu.reclaim.defer(self.mmu, &self.debts.frames, &flushed, counters);
            self.debts.frames.clear();
        }
    }
}
