//! Events on their way in, as EVENTINJ and EXITINTINFO have them (15.20); the order among them is in [`super`].

use super::super::vmcb::virtual_interrupt;
use super::paging::Paging;
use super::{Entry, RFLAGS_RF, Vcpu};

pub(super) const VALID: u64 = 1 << 31;
pub(super) const HAS_CODE: u64 = 1 << 11;
pub(super) const INTERRUPT: u64 = 0 << 8;
pub(super) const NMI: u64 = 2 << 8;
pub(super) const EXCEPTION: u64 = 3 << 8;
pub(super) const SOFTWARE: u64 = 4 << 8;
pub(super) const KIND: u64 = 7 << 8;
pub(super) const CODE_SHIFT: u32 = 32;

impl<P: Paging> Vcpu<P> {
    /// The next entry puts this in, as EVENTINJ has it.
    pub(super) fn put_in(&mut self, event: u64) {
        (self.event, self.next) = (event, Entry::Unusual);
    }

    /// After an exit: what was on its way in, and has it arrived?
    #[inline]
    pub(super) fn settle_events(&mut self) {
        let control = &self.vmcb().control;
        let (interrupted, word) = (control.exit_event, control.virtual_interrupt);
        let requested = word & virtual_interrupt::REQUEST != 0;
        if let Some(vector) = self.latched {
            let interrupted_this = interrupted & VALID != 0 && interrupted as u8 == vector;
            if requested {
                if interrupted_this {
                    return; // V_IRQ is still set and delivers it: the copy in EXITINTINFO is the same event.
                }
            } else {
                self.latched = None;
            }
        }
        if interrupted & VALID == 0 {
            return;
        }
        match interrupted & KIND {
            INTERRUPT => self.latch(interrupted as u8),
            // RIP still points at the INT instruction: running it again raises the event again.
            SOFTWARE => {}
            EXCEPTION if matches!(interrupted as u8, 3 | 4) => {}
            // QEMU calls an external interrupt an exception when its delivery faults; real exceptions end at 31.
            EXCEPTION if interrupted as u8 > 31 => self.latch(interrupted as u8),
            _ => self.put_in(interrupted),
        }
    }

    pub(super) fn latch(&mut self, vector: u8) {
        (self.latched, self.next) = (Some(vector), Entry::Unusual);
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = control.virtual_interrupt & !(0xff << virtual_interrupt::VECTOR_SHIFT)
            | virtual_interrupt::REQUEST
            | u64::from(vector) << virtual_interrupt::VECTOR_SHIFT;
    }

    /// Puts in a fault, `what` of EVENTINJ. Its frame says that the instruction at RIP was met already: a breakpoint there
    /// does not come again when it is tried again (13.1.2).
    pub(super) fn raise_fault(&mut self, what: u64) {
        self.save_mut().rflags |= RFLAGS_RF;
        self.put_in(VALID | EXCEPTION | what);
    }
}
