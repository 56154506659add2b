//! One run of the guest: what is put in the control block before it, and what is read from it behind it.

use super::super::entry;
use super::super::exit;
use super::super::vmcb::{TlbControl, virtual_interrupt};
use super::paging::Paging;
use super::{CR8, NmiState, Vcpu};
use crate::vm::exit::{Exit, Met, RawExit};
use crate::vm::guest_cpu::GuestCpu;

/// What an entry has to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// Nothing: the control block is as it was.
    Plain,
    /// What the TLB holds of the guest is to be flushed.
    Flushing,
    /// Everything.
    Unusual,
}

impl<P: Paging> Vcpu<P> {
    /// As [`GuestCpu::run`], when the entry is a plain one.
    #[inline]
    pub(super) fn run_plain(&mut self, mut fix: impl FnMut(&mut Self, &Met) -> bool) -> Exit {
        loop {
            // SAFETY: as in `run_unusual`.
            unsafe { entry::enter(&mut self.switch) };
            if !self.met().is_some_and(|met| fix(self, &met)) {
                return self.left_plain();
            }
            if P::FIXES_MORE && self.next != Entry::Plain {
                return self.run_other();
            }
        }
    }

    /// What ended a plain run, if it is about translation and another run may follow it. What makes one other than plain is
    /// put in by somebody here, and between two runs nobody was here but who fixes it; but for the event that the exit kept from
    /// arriving, and the shadow of the instruction before.
    #[inline]
    fn met(&self) -> Option<Met> {
        let exit = P::met(self)?;
        if self.was_delivering() || self.vmcb().control.shadow & 1 != 0 {
            return None;
        }
        Some(Met { exit, raw: self.raw_exit(), rip: self.rip() })
    }

    /// What ended a plain run.
    #[inline]
    pub(super) fn left_plain(&mut self) -> Exit {
        if self.was_delivering() {
            self.settle_events();
        }
        let RawExit { code, info1, info2 } = self.raw_exit();
        P::exited(self, exit::decode(code, info1, info2))
    }

    /// As [`GuestCpu::run`], when the entry is not a plain one.
    #[inline(never)]
    pub(super) fn run_other(&mut self) -> Exit {
        if self.next != Entry::Flushing || self.vmcb().control.shadow & 1 != 0 {
            return self.run_unusual();
        }
        self.next = Entry::Plain;
        let tlb = self.take_flush();
        self.vmcb_mut().control.tlb_control = tlb as u32;
        // SAFETY: as in `run_unusual`.
        unsafe { entry::enter(&mut self.switch) };
        self.vmcb_mut().control.tlb_control = TlbControl::Keep as u32;
        self.left_plain()
    }

    /// The same, when it may be any. Apart: what only flushes has few registers to save.
    #[inline(never)]
    fn run_unusual(&mut self) -> Exit {
        let tlb = self.take_flush();
        let event = core::mem::take(&mut self.event);
        // An event that goes in ends it.
        let (rip, shadowed) = (self.save().rip, self.vmcb().control.shadow & 1 != 0 && event == 0);
        let (watched, others) = (self.watch_task_priority, self.paging.watched_writes());
        let control = &mut self.vmcb_mut().control;
        // While an interrupt is offered, CR8 is written in software: QEMU's emulation (7.2) looks at a pending V_IRQ in such a
        // write without the lock that it needs, and dies. Nothing depends on the guest not writing it itself.
        let offered = control.virtual_interrupt & virtual_interrupt::REQUEST != 0;
        control.cr_writes = others | if offered || watched { CR8 } else { 0 };
        control.event = event;
        control.tlb_control = tlb as u32;
        // SAFETY: `bind` was called on this CPU, so SVM is on; the controls set in `new` let the guest touch nothing but
        // what the nested table maps; both pages belong to this value.
        unsafe { entry::enter(&mut self.switch) };
        self.settle_events();
        let RawExit { code, info1, info2 } = self.raw_exit();
        let exit = self.settle_nmi(P::exited(self, exit::decode(code, info1, info2)));
        if shadowed {
            self.keep_shadow(rip, exit);
        }
        self.settle_control();
        exit
    }

    /// How the CPU is told what the next entry flushes, which is not owed any more then.
    #[inline]
    pub(super) fn take_flush(&mut self) -> TlbControl {
        core::mem::replace(&mut self.flush, TlbControl::Keep)
    }

    /// Puts the control block in its plain form, if the next entry may be a plain one.
    pub(super) fn settle_control(&mut self) {
        let waits = self.event != 0 || self.latched.is_some() || self.nmi != NmiState::Open;
        let offered = self.vmcb().control.virtual_interrupt & virtual_interrupt::REQUEST != 0;
        if waits || offered || self.watch_task_priority {
            return;
        }
        let others = self.paging.watched_writes();
        let control = &mut self.vmcb_mut().control;
        (control.cr_writes, control.event, control.tlb_control) = (others, 0, TlbControl::Keep as u32);
        self.next = if self.flush == TlbControl::Keep { Entry::Plain } else { Entry::Flushing };
    }
}
