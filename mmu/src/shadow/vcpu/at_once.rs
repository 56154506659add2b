//! What a guest on shadow tables stops for and what is dealt with in guest mode: the guest has not been left then.
//!
//! # Protocol
//! The vCPU has said that it is in guest mode, and goes on saying so. As in [`crate::InGuest::fix_at_once`] it therefore waits
//! for nobody: whoever is inside the lock may be waiting for this vCPU to leave guest mode, and so may the holder of any lock
//! below it. It takes none, and reads tables as its CPU does ([`super::super::code`]). What would need more, or a flush of others,
//! is refused; a call that refuses has changed nothing, and the vCPU leaves and does it the long way.
//!
//! *A load of CR3* of another value, or one for which the tag must be flushed, is refused unless its root is at hand and alive,
//! nobody has asked for anything, and there is nothing to compare, which is asked as at entry. In that case
//! [`super::ShadowVcpu::enter`] would do no more than ask the tag what it owes, in this order: what has been withdrawn, read when it is
//! known that nothing is to be compared; then the VM's TLB generation, read when the vCPU has said that it is in guest mode,
//! which it did before this. A tag that is behind is refused. One that is not may be used, for what the vCPU has said to others
//! (`flushed`) is no later than that generation: a flusher that advances it from here on finds the vCPU in guest mode and behind,
//! and waits until it leaves. For the same reason a root that ends from here on has its table until then.
//!
//! *A load of the same value*, if there is nothing to compare and nothing has been withdrawn, leaves everything as it was: to
//! others this is a vCPU that runs on by the tag that it entered with.
//!
//! *INVLPG* is refused if there is something to compare.
//!
//! What the tag then owes is owed before the guest goes on: the embedder asks for it again ([`InShadow::take_flush`]), after it
//! has loaded the root, the tag and the format, which may be others than before.
//!
//! *The frame of the code* is kept from one look to the next, until the vCPU leaves, or forgets anything or turns to another
//! root: so it is no older than what the CPU may have in its TLB by the tag, and as safe, as long as this vCPU is waited for.

use super::{InShadow, Root, code};
use crate::addr::PAGE_SHIFT;
use crate::events::Counter;
use crate::host::{GuestMemory, Host};
use crate::shadow::Shadow;

/// Nothing that the root reaches is out of step, by a look since the guest stopped.
#[derive(Debug)]
pub struct InStep(());

/// What a load of CR3 came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadedAtOnce {
    /// Nothing was done.
    No,
    /// The root and the tag are what they were, and the tag owes nothing.
    AsItWas,
    /// Root and tag may be others, and the tag may owe something.
    Turned,
}

impl<H: Host + GuestMemory> InShadow<'_, H> {
    /// As [`super::ShadowVcpu::code`].
    #[inline]
    pub fn code(&mut self, linear: u64) -> Option<u32> {
        let page = linear >> PAGE_SHIFT;
        let hfn = match self.vcpu.fetched {
            Some((fetched, hfn)) if fetched == page => hfn,
            _ => {
                let hfn = code::frame_in_guest(self, linear)?;
                self.vcpu.fetched = Some((page, hfn));
                hfn
            }
        };
        code::read(&self.vcpu.mmu.host, hfn, linear)
    }

    #[inline]
    pub(in crate::shadow) fn host(&self) -> &H {
        &self.vcpu.mmu.host
    }

    /// The guest's CR3.
    #[inline]
    pub fn cr3(&self) -> u64 {
        self.vcpu.cr3
    }

    /// Says so, if nothing that the root reaches is out of step. To be asked anew each time that the guest stops.
    #[inline]
    pub fn in_step(&self) -> Option<InStep> {
        self.here().is_in_step(self.vcpu.mmu.shadow.get()?).then_some(InStep(()))
    }

    /// The same, where the guest loads CR3 and nobody has looked yet with what. A guest that changes its tables goes to and fro
    /// between two roots and finds something to compare under either: if that is so of the root before this one, there is no
    /// use in looking further, and the answer is `None`.
    #[inline]
    pub fn in_step_for_load(&self) -> Option<InStep> {
        let shadow = self.vcpu.mmu.shadow.get()?;
        let vain = self.vcpu.previous[0].is_some_and(|before| !before.is_in_step(shadow));
        if vain { None } else { self.in_step() }
    }

    /// As [`super::ShadowVcpu::load_cr3`], if it is done in a few steps and without waiting.
    #[inline]
    pub fn load_cr3_at_once(&mut self, InStep(()): InStep, cr3: u64, keeps: bool) -> LoadedAtOnce {
        let vcpu = &mut *self.vcpu;
        if cr3 != vcpu.cr3 {
            return self.turn_at_once(cr3);
        }
        let (Some(root), Some(shadow)) = (&vcpu.root, vcpu.mmu.shadow.get()) else { return LoadedAtOnce::No };
        let tag = root.tag;
        if root.identity != vcpu.identity || !keeps && !vcpu.tags.is_even(tag, shadow.withdrawals.now()) {
            return self.turn_at_once(cr3);
        }
        if !keeps {
            vcpu.ticket.counters().add(Counter::FlushSpared, 1);
        }
        LoadedAtOnce::AsItWas
    }

    /// The same of any value, as one that does not keep translations.
    #[inline(never)]
    fn turn_at_once(&mut self, cr3: u64) -> LoadedAtOnce {
        let vcpu = &mut *self.vcpu;
        let identity = vcpu.identity.with_cr3(&vcpu.mode, cr3);
        let mut at_hand = vcpu.root.iter().chain(vcpu.previous.iter().flatten());
        let (Some(&root), Some(shadow)) = (at_hand.find(|root| root.identity == identity), vcpu.mmu.shadow.get())
        else {
            return LoadedAtOnce::No;
        };
        if !root.is_in_step(shadow) || vcpu.tlb.has_requests() {
            return LoadedAtOnce::No;
        }
        let withdrawn = shadow.withdrawals.now();
        if !vcpu.mmu.tlb.is_up_to_date(vcpu.tags.flushed(root.tag)) {
            return LoadedAtOnce::No;
        }
        (vcpu.cr3, vcpu.identity, vcpu.fetched) = (cr3, identity, None);
        vcpu.turn();
        // It was asked for, and is done.
        vcpu.sync_owed = false;
        vcpu.tags.forget(root.tag, withdrawn);
        if !vcpu.tags.owes(root.tag) {
            vcpu.ticket.counters().add(Counter::FlushSpared, 1);
        }
        LoadedAtOnce::Turned
    }

    /// As [`super::ShadowVcpu::invlpg`].
    #[inline]
    pub fn invlpg_at_once(&mut self, InStep(()): InStep, linear: u64) {
        let vcpu = &mut *self.vcpu;
        if let (Some(shadow), Some(root)) = (vcpu.mmu.shadow.get(), &vcpu.root) {
            vcpu.tags.forget_address(root.tag, linear, shadow.withdrawals.now());
            vcpu.fetched = None;
        }
    }
}

impl Root {
    /// Whether it is alive, and nothing that it reaches is out of step.
    #[inline]
    fn is_in_step(&self, shadow: &Shadow) -> bool {
        let page = shadow.arena.page(self.handle.index);
        page.is(self.handle) && !shadow.out_of_step.has_news(page)
    }
}
