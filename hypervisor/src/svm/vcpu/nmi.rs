//! When a guest takes NMIs (15.20, 8.2.3): not while it handles one, not in an interrupt shadow, not before another event
//! that is on its way in.
//!
//! **The mask** lasts from one NMI to the *completion* of the next IRET. The intercept comes before the IRET, whose stack a
//! second NMI would overwrite if it used the same one. So the IRET is stepped over, and the trap behind it ends the mask.
//! An IRET that faults has not completed: the fault goes to the guest as if nothing were watched, and the mask stays until
//! an IRET that does, which will be that of the fault's handler.
//!
//! An IRET that returns to another task (12.3) is not stepped over: the switch would write the trap flag into the state of
//! the task that it leaves, and that is guest memory. It is let go instead, and the mask ends when the vCPU is seen somewhere
//! else. So a fault of such an IRET ends it too, which a CPU's mask would outlive.
//!
//! **A shadow** ends behind the next instruction, and nothing tells when: stepping over any instruction would leave the
//! trap flag where it pushes flags, or where a fault of its does. Whoever runs the vCPU looks again soon. QEMU's emulation
//! (7.2) stores the shadow at an exit and does not load it at entry; so it is kept here from exit to exit
//! ([`Vcpu::keep_shadow`]) while its instruction is still to be executed.
//!
//! **Stepping** sets the guest's trap flag, and nothing of that may be seen: DR6 is as before, a trap or breakpoint of the
//! guest's own comes as it would have, and no interrupt, whose frame would have the flag in it, goes in meanwhile. Where a
//! step ends otherwise than by its trap (the IRET faults, or another CPU has written another instruction there), the flag is
//! taken back before anybody looks.

use super::paging::Paging;
use super::{DR6_BS, EXCEPTIONS, Entry, Intercepts1, RFLAGS_TF, Vcpu, event, virtual_interrupt};
use crate::vm::exit::{Exit, Intercepted, Raised};
use crate::vm::guest_cpu::{GuestCpu, NmiWindow};

/// #TS, #NP, #SS, #GP and #PF: what an IRET can raise, beside #AC, which always exits.
const IRET_FAULTS: u32 = 0b1_1111 << 10;
const DR6_BREAKPOINTS: u64 = 0xf;
const PAGE_FAULT: u64 = 14;
const RFLAGS_NT: u64 = 1 << 14;
const RFLAGS_VM: u64 = 1 << 17;
const CR0_PE: u64 = 1 << 0;
const EFER_LMA: u64 = 1 << 10;
const EXIT_EXCEPTION: u64 = 0x40;

/// Whether the guest takes NMIs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NmiState {
    /// It does.
    Open,
    /// It is handling one; IRET is intercepted.
    Masked,
    /// The IRET that ends the mask is being executed with the trap flag set.
    Stepping(Step),
    /// It returns to another task, and is executed as it is.
    Returning(Place),
}

/// Where a vCPU is: its instruction pointer and its task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    rip: u64,
    task: u16,
}

/// A step that has begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Step {
    /// The trap flag was the guest's own.
    stepped: bool,
    /// DR6 before.
    dr6: u64,
    /// An external interrupt that waits meanwhile.
    held: Option<u8>,
}

impl<P: Paging> Vcpu<P> {
    pub(super) fn is_stepping(&self) -> bool {
        matches!(self.nmi, NmiState::Stepping(_))
    }

    /// Puts an NMI in, and masks others.
    pub(super) fn inject_nmi(&mut self) {
        self.put_in(event::VALID | event::NMI | 2);
        self.mask_nmis();
    }

    pub(super) fn mask_nmis(&mut self) {
        (self.nmi, self.next) = (NmiState::Masked, Entry::Unusual);
        self.vmcb_mut().control.intercepts_1 |= Intercepts1::IRET.bits();
    }

    pub(super) fn watch_for_nmi(&mut self) -> NmiWindow {
        match self.nmi {
            NmiState::Open => {}
            NmiState::Returning(_) => return NmiWindow::BehindInstruction,
            NmiState::Masked | NmiState::Stepping(_) => return NmiWindow::Watched,
        }
        if self.event != 0 {
            return NmiWindow::BehindEvent;
        }
        NmiWindow::BehindInstruction
    }

    /// After an exit from a run that began at `rip` in a shadow: is it still in it? These exits come before the instruction
    /// is executed. If it has been all the same, and jumped to itself, the next exit of another kind says so, and there will
    /// be one: an interrupt that waits asks for its window.
    #[inline]
    pub(super) fn keep_shadow(&mut self, rip: u64, exit: Exit) {
        let before = matches!(exit, Exit::Interrupt | Exit::Nmi | Exit::Fault(_)) || Self::is_translation(exit);
        let vmcb = self.vmcb_mut();
        if before && vmcb.save.rip == rip {
            vmcb.control.shadow |= 1;
        }
    }

    /// A page fault of which it is not known yet whether it is the guest's.
    #[inline]
    fn is_translation(exit: Exit) -> bool {
        P::WATCHES_FAULTS && matches!(exit, Exit::PageFault(_))
    }

    fn place(&self) -> Place {
        let save = self.save();
        Place { rip: save.rip, task: save.tr.selector }
    }

    /// Whether the IRET at RIP returns to another task.
    fn returns_to_task(&self) -> bool {
        let save = self.save();
        let protected = save.cr0 & CR0_PE != 0 && save.rflags & RFLAGS_VM == 0 && save.efer & EFER_LMA == 0;
        protected && save.rflags & RFLAGS_NT != 0
    }

    fn return_to_task(&mut self) {
        self.nmi = NmiState::Returning(self.place());
        self.vmcb_mut().control.intercepts_1 &= !Intercepts1::IRET.bits();
    }

    fn step_over(&mut self) {
        self.close_interrupt_window();
        let held = self.latched.take();
        let vmcb = self.vmcb_mut();
        vmcb.control.virtual_interrupt &= !virtual_interrupt::REQUEST;
        let (stepped, dr6) = (vmcb.save.rflags & RFLAGS_TF != 0, vmcb.save.dr6);
        vmcb.save.rflags |= RFLAGS_TF;
        // So that what is found there afterwards is of this instruction.
        vmcb.save.dr6 &= !(DR6_BREAKPOINTS | DR6_BS);
        vmcb.control.intercepts_1 &= !Intercepts1::IRET.bits();
        vmcb.control.exceptions |= IRET_FAULTS;
        self.nmi = NmiState::Stepping(Step { stepped, dr6, held });
    }

    /// Takes back a step that has begun and not ended. Between two runs, when nothing of it has been executed: what was
    /// stepped over is still to come, and is met again.
    pub(super) fn take_step_back(&mut self) {
        match self.nmi {
            NmiState::Stepping(step) => {
                self.end_step(step, false);
                self.save_mut().dr6 = step.dr6;
                self.mask_nmis();
            }
            NmiState::Returning(_) => self.mask_nmis(),
            NmiState::Open | NmiState::Masked => {}
        }
    }

    /// After an exit: how far is a step, and what is left of the exit for others?
    #[inline]
    pub(super) fn settle_nmi(&mut self, exit: Exit) -> Exit {
        match self.nmi {
            NmiState::Open => exit,
            NmiState::Masked => {
                if exit == Exit::NmiWindow {
                    if self.returns_to_task() { self.return_to_task() } else { self.step_over() }
                }
                exit
            }
            NmiState::Returning(from) => {
                if self.place() != from {
                    self.nmi = NmiState::Open;
                }
                exit
            }
            NmiState::Stepping(step) => self.settle_step(step, exit),
        }
    }

    #[cold]
    fn settle_step(&mut self, step: Step, exit: Exit) -> Exit {
        let found = self.save().dr6 & (DR6_BREAKPOINTS | DR6_BS);
        let trapped = exit == Exit::Exception(Intercepted::Debug) && found & DR6_BS != 0;
        // These say nothing of the instruction, which is still to be executed.
        if matches!(exit, Exit::Interrupt | Exit::Nmi | Exit::Fault(_) | Exit::InterruptWindow)
            || Self::is_translation(exit)
        {
            return exit;
        }
        self.end_step(step, trapped);
        // Breakpoints add up; that of a single step shows only if the guest made one.
        let shown = if step.stepped { found } else { found & DR6_BREAKPOINTS };
        self.save_mut().dr6 = step.dr6 | shown;
        if trapped {
            if shown != 0 {
                self.raise(Raised::Again(Intercepted::Debug));
            }
            return Exit::NmiWindow;
        }
        self.mask_nmis();
        if self.give_on_fault() { Exit::NmiWindow } else { exit }
    }

    /// Takes back what [`Self::step_over`] did, but for DR6.
    fn end_step(&mut self, step: Step, trapped: bool) {
        self.nmi = NmiState::Open;
        let vmcb = self.vmcb_mut();
        vmcb.control.exceptions = EXCEPTIONS | P::EXCEPTIONS;
        // Behind an IRET the flags are those that it took from its stack.
        if !(step.stepped || trapped) {
            vmcb.save.rflags &= !RFLAGS_TF;
        }
        if let Some(vector) = step.held {
            self.latch(vector);
        }
    }

    /// If the exit was one of [`IRET_FAULTS`], raises it again.
    fn give_on_fault(&mut self) -> bool {
        let control = &self.vmcb().control;
        let (code, error, address) = (control.exit_code, control.exit_info_1, control.exit_info_2);
        let Some(vector) = code.checked_sub(EXIT_EXCEPTION).filter(|vector| *vector < 32) else { return false };
        if IRET_FAULTS & 1 << vector == 0 {
            return false;
        }
        if vector == PAGE_FAULT {
            self.save_mut().cr2 = address;
        }
        self.raise_fault(event::HAS_CODE | vector | error << event::CODE_SHIFT);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{exit, vcpu};
    use super::*;
    use crate::svm::exit::decode;

    /// The guest executes until this exit.
    fn run(vcpu: &mut Vcpu, code: u64, change: impl FnOnce(&mut Vcpu)) -> Exit {
        exit(vcpu, false, 0);
        change(vcpu);
        let control = &mut vcpu.vmcb_mut().control;
        (control.exit_code, control.exit_info_1, control.exit_info_2) = (code, 2, 0x1234);
        vcpu.settle_nmi(decode(code, 2, 0x1234))
    }

    fn trap(vcpu: &mut Vcpu) {
        vcpu.save_mut().dr6 |= DR6_BS;
    }

    fn flag(vcpu: &Vcpu) -> bool {
        vcpu.save().rflags & RFLAGS_TF != 0
    }

    const DEBUG: u64 = 0x41;
    const IRET: u64 = 0x74;
    const CPUID: u64 = 0x72;
    const NPF: u64 = 0x400;
    const CLEAN: u64 = 0xffff_0ff0;

    #[test]
    fn masked_until_iret_has_completed() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        assert!(!vcpu.can_take_nmi() && vcpu.nmis_masked() && !vcpu.can_take_interrupt());
        exit(&mut vcpu, false, 0);
        assert!(!vcpu.can_take_nmi() && vcpu.can_take_interrupt(), "interrupts are not masked");
        assert_eq!(run(&mut vcpu, IRET, |_| {}), Exit::NmiWindow);
        assert!(!vcpu.can_take_nmi() && flag(&vcpu), "it is still to be executed");
        assert!(matches!(run(&mut vcpu, NPF, |_| {}), Exit::Fault(_)), "its stack was not mapped");
        assert!(!vcpu.can_take_nmi() && flag(&vcpu));
        // IRET takes flags without TF from its stack.
        let popped = |vcpu: &mut Vcpu| {
            trap(vcpu);
            vcpu.save_mut().rflags &= !RFLAGS_TF;
        };
        assert_eq!(run(&mut vcpu, DEBUG, popped), Exit::NmiWindow);
        assert_eq!((vcpu.can_take_nmi(), flag(&vcpu), vcpu.save().dr6, vcpu.event), (true, false, CLEAN, 0));
    }

    #[test]
    fn an_iret_to_another_task_is_left_alone() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        let start = |vcpu: &mut Vcpu| {
            let save = vcpu.save_mut();
            (save.cr0, save.rflags, save.tr.selector) = (CR0_PE, RFLAGS_NT, 0x40);
        };
        assert_eq!(run(&mut vcpu, IRET, start), Exit::NmiWindow);
        assert!(!flag(&vcpu) && !vcpu.can_take_nmi() && vcpu.nmis_masked());
        assert_eq!(vcpu.open_nmi_window(), NmiWindow::BehindInstruction);
        assert!(matches!(run(&mut vcpu, NPF, |_| {}), Exit::Fault(_)));
        assert!(!vcpu.can_take_nmi(), "the other task's state was not mapped");
        assert_eq!(run(&mut vcpu, CPUID, |vcpu| vcpu.save_mut().tr.selector = 0x20), Exit::Cpuid);
        assert!(vcpu.can_take_nmi() && !vcpu.nmis_masked());
        // In 64-bit mode there are no tasks, and NT makes an IRET fault.
        vcpu.nmi();
        vcpu.save_mut().efer |= EFER_LMA;
        let _ = run(&mut vcpu, IRET, |_| {});
        assert!(flag(&vcpu));
    }

    #[test]
    fn a_guest_that_steps_over_its_iret_gets_its_trap() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        vcpu.save_mut().rflags |= RFLAGS_TF;
        let _ = run(&mut vcpu, IRET, |_| {});
        assert_eq!(run(&mut vcpu, DEBUG, trap), Exit::NmiWindow);
        assert_eq!((vcpu.save().dr6, vcpu.event as u8), (CLEAN | DR6_BS, 1));
    }

    #[test]
    fn an_iret_that_faults_leaves_the_mask() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        let _ = run(&mut vcpu, IRET, |_| {});
        assert_eq!(run(&mut vcpu, 0x4e, |_| {}), Exit::NmiWindow);
        assert_eq!((vcpu.event & 0xff, vcpu.event >> 32, vcpu.save().cr2), (14, 2, 0x1234));
        assert_eq!((flag(&vcpu), vcpu.nmi, vcpu.save().dr6), (false, NmiState::Masked, CLEAN));
        assert_eq!(vcpu.vmcb().control.exceptions, EXCEPTIONS);
        assert!(vcpu.vmcb().control.intercepts_1 & Intercepts1::IRET.bits() != 0, "the handler's IRET is the next");
    }

    #[test]
    fn an_instruction_that_another_cpu_wrote_over_the_iret_sees_nothing() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        let _ = run(&mut vcpu, IRET, |_| {});
        assert_eq!(run(&mut vcpu, CPUID, |_| {}), Exit::Cpuid);
        assert_eq!((flag(&vcpu), vcpu.nmi), (false, NmiState::Masked));
        let breakpoint = |vcpu: &mut Vcpu| vcpu.save_mut().dr6 |= 1;
        let _ = run(&mut vcpu, IRET, |_| {});
        assert_eq!(run(&mut vcpu, DEBUG, breakpoint), Exit::Exception(Intercepted::Debug));
        assert_eq!((flag(&vcpu), vcpu.nmi, vcpu.save().dr6), (false, NmiState::Masked, CLEAN | 1));
    }

    #[test]
    fn no_interrupt_goes_in_while_the_flag_is_set() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        exit(&mut vcpu, false, 0);
        vcpu.interrupt(0x40);
        exit(&mut vcpu, true, 0);
        vcpu.settle_nmi(Exit::NmiWindow);
        assert!(!vcpu.can_take_interrupt());
        assert_eq!(vcpu.vmcb().control.virtual_interrupt & virtual_interrupt::REQUEST, 0);
        vcpu.open_interrupt_window();
        assert_eq!(vcpu.vmcb().control.virtual_interrupt & virtual_interrupt::REQUEST, 0);
        let _ = run(&mut vcpu, DEBUG, trap);
        assert_eq!(vcpu.latched, Some(0x40), "it goes on waiting");
    }

    #[test]
    fn a_shadow_lasts_until_its_instruction_is_executed() {
        let mut vcpu = vcpu();
        let rip = vcpu.save().rip;
        for (exit, at, kept) in [
            (Exit::Interrupt, rip, 1),
            (Exit::Nmi, rip, 1),
            (Exit::Interrupt, rip + 2, 0),
            (Exit::InterruptWindow, rip, 0),
            (Exit::Exception(Intercepted::Debug), rip, 0),
        ] {
            // As an emulated CPU leaves it.
            vcpu.vmcb_mut().control.shadow = 0;
            vcpu.save_mut().rip = at;
            vcpu.keep_shadow(rip, exit);
            assert_eq!(vcpu.vmcb().control.shadow, kept, "{exit:?} at {at:#x}");
            assert_eq!((vcpu.in_shadow(), vcpu.can_take_nmi()), (kept == 1, kept == 0));
        }
        vcpu.vmcb_mut().control.shadow = 1;
        assert_eq!(vcpu.open_nmi_window(), NmiWindow::BehindInstruction);
        assert!(!flag(&vcpu), "nothing is stepped over");
    }

    #[test]
    fn another_event_goes_first() {
        let mut vcpu = vcpu();
        vcpu.raise(Raised::InvalidOpcode);
        assert_eq!(vcpu.open_nmi_window(), NmiWindow::BehindEvent);
        assert!(!flag(&vcpu));
    }
}
