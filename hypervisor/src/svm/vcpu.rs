//! One virtual CPU on SVM: its control block, what the control block does not hold, and the events on their way in.
//!
//! **Who may call.** A [`Vcpu`] is owned by the CPU that runs it. Nothing here is shared.
//!
//! **Events.** Four kinds wait here for the next entry, and the order among them is fixed:
//!
//! 1. an event whose delivery an exit interrupted (EXITINTINFO, 15.7.2): it goes first, again, as if nothing had been;
//! 2. an exception that emulation raised;
//! 3. an NMI;
//! 4. an external interrupt.
//!
//! The first three go in by EVENTINJ (15.20). External interrupts go in as *virtual* interrupts (15.21.4): the vector is
//! put in the control block with V_IRQ, when the guest's IF and shadow allow it, so that it is taken before the first
//! instruction. If a physical interrupt ends the run before that, V_IRQ is still set at the exit, and the next entry
//! tries again: the vector has left its controller, so it stays here until the CPU says that it was taken.
//!
//! Why not EVENTINJ for those too: QEMU's emulation leaves its own pending-exception index set after an injected
//! interrupt, and delivers it a second time when its thread is kicked at that moment. And why the vector is compared
//! below: when a nested fault interrupts the delivery of a virtual interrupt, QEMU reports it in EXITINTINFO *and* leaves
//! V_IRQ set, while the manual has only one of them. One event must come out of it, not two.

use alloc::boxed::Box;
use core::ptr;

use super::entry::{self, Switch};
use super::exit::{self, Exit};
use super::permission::Maps;
use super::vmcb::{Intercepts1, Intercepts2, NESTED_PAGING, Save, TlbControl, Vmcb, virtual_interrupt};
use super::{EFER_SVME, Features};
use crate::memory::frames::{self, FRAME};

const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_FIXED: u64 = 1 << 1;
const CR0_RESET: u64 = 0x6000_0010;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// The guest's ASID. One VM, one vCPU a CPU: the number only has to differ from the host's, 0.
const ASID: u32 = 1;
/// Machine checks belong to the host.
const MACHINE_CHECK: u32 = 1 << 18;

/// EVENTINJ and EXITINTINFO (15.20).
mod event {
    pub(super) const VALID: u64 = 1 << 31;
    pub(super) const HAS_CODE: u64 = 1 << 11;
    pub(super) const INTERRUPT: u64 = 0 << 8;
    pub(super) const NMI: u64 = 2 << 8;
    pub(super) const EXCEPTION: u64 = 3 << 8;
    pub(super) const SOFTWARE: u64 = 4 << 8;
    pub(super) const KIND: u64 = 7 << 8;
    pub(super) const CODE_SHIFT: u32 = 32;
}

/// Something to raise in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// #UD.
    InvalidOpcode,
    /// #GP(0).
    GeneralProtection,
}

/// One virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    switch: Box<Switch>,
    vmcb: *mut Vmcb,
    features: Features,
    /// An external interrupt that has left its controller and was not taken yet.
    latched: Option<u8>,
    /// The next entry's EVENTINJ.
    event: u64,
    /// An NMI was delivered and IRET has not been seen since.
    nmi_masked: bool,
    flush: bool,
    exit: Exit,
}

// SAFETY: the pages behind the pointers belong to this value alone, wherever it is.
unsafe impl Send for Vcpu {}

impl Vcpu {
    /// A vCPU in the state after reset, or `None` without memory.
    #[must_use]
    pub fn new(features: Features, maps: &Maps) -> Option<Self> {
        let guest = frames::alloc(0)?;
        let Some(host) = frames::alloc(0) else {
            frames::free(guest, 0);
            return None;
        };
        // SAFETY: both were just allocated. All zeros is a valid `Vmcb`.
        unsafe {
            frames::block(guest, 0).fill(0);
            frames::block(host, 0).fill(0);
        }
        let switch = Box::new(Switch { fx: [0; 512], registers: [0; 16], guest, host });
        let vmcb = ptr::with_exposed_provenance_mut(guest as usize);
        let mut vcpu = Self {
            switch,
            vmcb,
            features,
            latched: None,
            event: 0,
            nmi_masked: false,
            flush: true,
            exit: Exit::Invalid,
        };
        let control = &mut vcpu.vmcb_mut().control;
        control.intercepts_1 = (Intercepts1::INTR
            | Intercepts1::NMI
            | Intercepts1::INIT
            | Intercepts1::RDPMC
            | Intercepts1::CPUID
            | Intercepts1::RSM
            | Intercepts1::INVD
            | Intercepts1::HLT
            | Intercepts1::INVLPGA
            | Intercepts1::IO
            | Intercepts1::MSR
            | Intercepts1::SHUTDOWN)
            .bits();
        control.intercepts_2 = Intercepts2::all().bits();
        control.exceptions = MACHINE_CHECK;
        control.io_map = maps.io();
        control.msr_map = maps.msr();
        control.asid = ASID;
        control.virtual_interrupt = virtual_interrupt::MASKING | virtual_interrupt::IGNORE_TPR;
        control.nested = NESTED_PAGING;
        vcpu.reset();
        Some(vcpu)
    }

    fn vmcb(&self) -> &Vmcb {
        // SAFETY: the page is this value's own, and the CPU uses it during `enter` only.
        unsafe { &*self.vmcb }
    }

    fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as in `vmcb`.
        unsafe { &mut *self.vmcb }
    }

    /// The state after INIT (14.1.3), with the reset vector.
    pub fn reset(&mut self) {
        (self.latched, self.event, self.nmi_masked) = (None, 0, false);
        self.switch.registers = [0; 16];
        self.switch.fx = [0; 512];
        self.switch.fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        self.switch.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = virtual_interrupt::MASKING | virtual_interrupt::IGNORE_TPR;
        control.shadow = 0;
        control.intercepts_1 &= !(Intercepts1::VINTR | Intercepts1::IRET).bits();
        // SAFETY: all zeros is a valid `Save`.
        self.vmcb_mut().save = unsafe { core::mem::zeroed() };
        let data = super::vmcb::Segment { selector: 0, attributes: 0x093, limit: 0xffff, base: 0 };
        let save = self.save_mut();
        (save.es, save.ss, save.ds, save.fs, save.gs) = (data, data, data, data, data);
        save.cs = super::vmcb::Segment { selector: 0xf000, attributes: 0x09b, limit: 0xffff, base: 0xffff_0000 };
        (save.gdtr.limit, save.idtr.limit) = (0xffff, 0xffff);
        save.ldtr = super::vmcb::Segment { selector: 0, attributes: 0x082, limit: 0xffff, base: 0 };
        save.tr = super::vmcb::Segment { selector: 0, attributes: 0x08b, limit: 0xffff, base: 0 };
        save.efer = EFER_SVME;
        save.cr0 = CR0_RESET;
        (save.dr6, save.dr7) = (0xffff_0ff0, 0x400);
        save.rflags = RFLAGS_FIXED;
        save.rip = 0xfff0;
        save.pat = PAT_RESET;
        self.switch.registers[2] = 0x0060_0f00;
        self.flush = true;
    }

    /// The state-save area.
    #[must_use]
    pub fn save(&self) -> &Save {
        &self.vmcb().save
    }

    /// The state-save area, to change.
    pub fn save_mut(&mut self) -> &mut Save {
        &mut self.vmcb_mut().save
    }

    /// A general register by its encoding.
    #[must_use]
    pub fn register(&self, index: usize) -> u64 {
        match index {
            0 => self.save().rax,
            4 => self.save().rsp,
            _ => self.switch.registers[index],
        }
    }

    /// Sets a general register by its encoding.
    pub fn set_register(&mut self, index: usize, value: u64) {
        match index {
            0 => self.save_mut().rax = value,
            4 => self.save_mut().rsp = value,
            _ => self.switch.registers[index] = value,
        }
    }

    /// RAX.
    #[inline]
    #[must_use]
    pub fn rax(&self) -> u64 {
        self.save().rax
    }

    /// Moves RIP behind an instruction that was handled, of `length` bytes if the CPU does not say so itself.
    #[inline]
    pub fn advance(&mut self, length: u64) {
        let next_rip = self.features.next_rip();
        let vmcb = self.vmcb_mut();
        let next = if next_rip && vmcb.control.next_rip != 0 {
            vmcb.control.next_rip
        } else {
            vmcb.save.rip.wrapping_add(length)
        };
        self.advance_to(next);
    }

    /// Moves RIP behind an instruction that was handled. An instruction ends the shadow of the one before (15.21.5).
    #[inline]
    pub fn advance_to(&mut self, rip: u64) {
        let vmcb = self.vmcb_mut();
        vmcb.save.rip = rip;
        vmcb.control.shadow = 0;
    }

    /// Takes this CPU for this vCPU: stores the host's state that the switch will load back.
    pub fn bind(&mut self) {
        // SAFETY: the page is this vCPU's; SVM is on wherever a vCPU is run.
        unsafe { entry::save_host(self.switch.host) };
        self.flush = true;
    }

    /// What the CPU adds to its TSC while the guest runs.
    pub fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcb_mut().control.tsc_offset = offset;
    }

    /// Points the vCPU at a nested page table; a new root starts with an empty TLB.
    #[inline]
    pub fn set_root(&mut self, root: u64) {
        if self.vmcb().control.nested_root != root {
            self.vmcb_mut().control.nested_root = root;
            self.flush = true;
        }
    }

    /// The nested page table's root.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.vmcb().control.nested_root
    }

    /// Drops all of the vCPU's translations before the next instruction.
    #[inline]
    pub fn flush(&mut self) {
        self.flush = true;
    }

    /// Runs the guest until it exits.
    ///
    /// The caller has set a root, runs with interrupts off on the CPU that [`Vcpu::bind`] was called on, and takes the
    /// physical interrupt behind [`Exit::Interrupt`].
    #[inline]
    pub fn run(&mut self) -> Exit {
        let tlb = match (self.flush, self.features.flush_by_asid()) {
            (false, _) => TlbControl::Keep,
            (true, true) => TlbControl::FlushAsid,
            (true, false) => TlbControl::FlushAll,
        };
        self.flush = false;
        let event = core::mem::take(&mut self.event);
        let control = &mut self.vmcb_mut().control;
        control.event = event;
        control.tlb_control = tlb as u32;
        // SAFETY: `bind` was called on this CPU, so SVM is on; the controls set in `new` let the guest touch nothing but
        // what the nested table maps; both pages belong to this value.
        unsafe { entry::enter(&mut self.switch) };
        self.settle_events();
        self.exit = exit::decode(&self.vmcb().control);
        self.exit
    }

    /// After an exit: what was on its way in, and has it arrived?
    #[inline]
    fn settle_events(&mut self) {
        let control = &self.vmcb().control;
        let (interrupted, word) = (control.exit_event, control.virtual_interrupt);
        let requested = word & virtual_interrupt::REQUEST != 0;
        if let Some(vector) = self.latched {
            let interrupted_this = interrupted & event::VALID != 0 && interrupted as u8 == vector;
            if requested {
                if interrupted_this {
                    return; // V_IRQ is still set and delivers it: the copy in EXITINTINFO is the same event.
                }
            } else {
                self.latched = None;
            }
        }
        if interrupted & event::VALID == 0 {
            return;
        }
        match interrupted & event::KIND {
            event::INTERRUPT => self.latch(interrupted as u8),
            // RIP still points at the INT instruction: running it again raises the event again.
            event::SOFTWARE => {}
            event::EXCEPTION if matches!(interrupted as u8, 3 | 4) => {}
            // QEMU calls an external interrupt an exception when its delivery faults; real exceptions end at 31.
            event::EXCEPTION if interrupted as u8 > 31 => self.latch(interrupted as u8),
            _ => self.event = interrupted,
        }
    }

    fn latch(&mut self, vector: u8) {
        self.latched = Some(vector);
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = control.virtual_interrupt & !(0xff << virtual_interrupt::VECTOR_SHIFT)
            | virtual_interrupt::REQUEST
            | u64::from(vector) << virtual_interrupt::VECTOR_SHIFT;
    }

    /// Whether an external interrupt given now would be taken before the next instruction.
    #[inline]
    #[must_use]
    pub fn can_take_interrupt(&self) -> bool {
        let vmcb = self.vmcb();
        self.latched.is_none() && self.event == 0 && vmcb.save.rflags & RFLAGS_IF != 0 && vmcb.control.shadow & 1 == 0
    }

    /// Gives an external interrupt. Only when [`Vcpu::can_take_interrupt`].
    #[inline]
    pub fn interrupt(&mut self, vector: u8) {
        self.close_interrupt_window();
        self.latch(vector);
    }

    /// Asks for an [`Exit::InterruptWindow`] when an interrupt can be taken.
    pub fn open_interrupt_window(&mut self) {
        if self.latched.is_none() {
            let control = &mut self.vmcb_mut().control;
            control.intercepts_1 |= Intercepts1::VINTR.bits();
            control.virtual_interrupt |= virtual_interrupt::REQUEST;
        }
    }

    /// Takes the wish back, or ends it when it was answered.
    #[inline]
    pub fn close_interrupt_window(&mut self) {
        let latched = self.latched.is_some();
        let control = &mut self.vmcb_mut().control;
        if control.intercepts_1 & Intercepts1::VINTR.bits() != 0 {
            control.intercepts_1 &= !Intercepts1::VINTR.bits();
            if !latched {
                control.virtual_interrupt &= !virtual_interrupt::REQUEST;
            }
        }
    }

    /// Whether an NMI can be delivered now.
    #[must_use]
    pub fn can_take_nmi(&self) -> bool {
        self.event == 0 && !self.nmi_masked && self.vmcb().control.shadow & 1 == 0
    }

    /// Delivers an NMI. Only when [`Vcpu::can_take_nmi`]. Until the guest's IRET no other can be taken.
    pub fn nmi(&mut self) {
        self.event = event::VALID | event::NMI | 2;
        self.nmi_masked = true;
        self.vmcb_mut().control.intercepts_1 |= Intercepts1::IRET.bits();
    }

    /// The guest's IRET ends the masking of NMIs. (One could come just before the IRET completes; it then nests once.)
    pub fn nmi_done(&mut self) {
        self.nmi_masked = false;
        self.vmcb_mut().control.intercepts_1 &= !Intercepts1::IRET.bits();
    }

    /// Raises an exception at the current instruction.
    pub fn raise(&mut self, raised: Event) {
        self.event = event::VALID
            | event::EXCEPTION
            | match raised {
                Event::InvalidOpcode => 6,
                Event::GeneralProtection => event::HAS_CODE | 13 | 0 << event::CODE_SHIFT,
            };
    }

    /// Whether the guest, if it halts now, would wake by what is already on its way.
    #[must_use]
    pub fn has_event(&self) -> bool {
        self.latched.is_some() || self.event != 0
    }

    /// The guest's task priority as CR8 has it (bits 3:0).
    #[inline]
    #[must_use]
    pub fn task_priority(&self) -> u8 {
        (self.vmcb().control.virtual_interrupt & 0xf) as u8
    }

    /// Sets CR8.
    #[inline]
    pub fn set_task_priority(&mut self, priority: u8) {
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = control.virtual_interrupt & !virtual_interrupt::TPR | u64::from(priority & 0xf);
    }

    /// Raw exit code and details, for reports.
    #[must_use]
    pub fn raw_exit(&self) -> (u64, u64, u64) {
        let control = &self.vmcb().control;
        (control.exit_code, control.exit_info_1, control.exit_info_2)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        frames::free(self.switch.guest, 0);
        frames::free(self.switch.host, 0);
    }
}

const _: () = assert!(size_of::<Vmcb>() as u64 == FRAME);
