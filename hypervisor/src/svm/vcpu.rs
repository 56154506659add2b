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
//!
//! **Plain runs.** Most entries deliver nothing, flush nothing and watch nothing, and then the control block is as it
//! was. [`Entry`] is set with whatever makes an entry another one; only such an entry looks at all of it, and it
//! alone takes the mark back, when it has put the control block in its plain form again. So a mark too many costs some
//! instructions; what must not be is a way to put in an event, to owe a flush or to mask NMIs without one.
//!
//! A plain run that an exit about translation ends is followed by another at once, if the VM can do in guest mode what it is
//! about ([`crate::vm::vcpu`]) and the exit left nothing behind in the control block. What was done may have: then the run that
//! follows is not a plain one, and ends as any other.

mod asid;
mod event;
mod floating;
mod long_mode;
mod msrs;
mod nmi;
mod paging;
mod run;
mod saved;
mod segments;
mod shadow;

use alloc::boxed::Box;
use core::ptr;

use nestling::Fault;
use nestling_control::message::Registers;

use super::entry::{self, Switch};
use super::exit;
use super::permission::Maps;
use super::vmcb::{Intercepts1, Intercepts2, Save, Segment, TlbControl, Vmcb, virtual_interrupt};
use super::{EFER_SVME, Features};
use crate::cpu::extended;
use crate::devices::saved::BadState;
use crate::emulate;
use crate::guest::{VcpuInit, entry as start};
use crate::memory::frames::{self, FRAME};
use crate::vm::exit::{Exit, Intercepted, Met, Raised, RawExit};
use crate::vm::guest_cpu::{CpuState, GuestCpu, NmiWindow};
use crate::vm::policy::msr::VmcbMsrs;
use crate::vm::walk::PagingRegisters;
use msrs::MSRS;
use nmi::NmiState;
pub use paging::{Nested, Paging};
use run::Entry;
use saved::check;
use segments::{segment_back, segment_in, segment_out};
pub use shadow::Shadowed;

const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_FIXED: u64 = 1 << 1;
const CR4_PKE: u64 = 1 << 22;
const CR0_RESET: u64 = 0x6000_0010;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// The guest's ASID, where it has one for all. One VM, one vCPU a CPU: the number only has to differ from the host's, 0.
const ASID: u32 = 1;
/// #DB and #AC, so that their delivery can't loop ([`Intercepted`]), #UD, behind which a hypercall of the other vendor may
/// be, and #MC, which is the host's.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 6 | 1 << 17 | 1 << 18;
/// CR8's bit in the intercept words.
const CR8: u16 = 1 << 8;
const RAX: usize = 0;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
/// DR6: the exception is that of a single step.
const DR6_BS: u64 = 1 << 14;
/// DR7: any access to a debug register raises #DB, whose delivery clears this.
const DR7_GD: u64 = 1 << 13;

/// One virtual CPU.
#[derive(Debug)]
pub struct Vcpu<P = Nested> {
    switch: Box<Switch>,
    vmcb: *mut Vmcb,
    features: Features,
    /// An external interrupt that has left its controller and was not taken yet.
    latched: Option<u8>,
    /// The next entry's EVENTINJ.
    event: u64,
    nmi: NmiState,
    /// What the next entry asks of the TLB.
    flush: TlbControl,
    /// Writes to CR8 exit.
    watch_task_priority: bool,
    /// What the next entry has to look at.
    next: Entry,
    /// The guest's EFER.LME is kept from the CPU ([`long_mode`]).
    long_mode_held: bool,
    paging: P,
}

// SAFETY: the pages behind the pointers belong to this value alone, wherever it is.
unsafe impl<P: Send> Send for Vcpu<P> {}

impl<P: Paging> Vcpu<P> {
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
            nmi: NmiState::Open,
            flush: TlbControl::FlushAll,
            watch_task_priority: false,
            next: Entry::Unusual,
            long_mode_held: false,
            paging: P::new(features),
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
        if features.emulated() {
            control.intercepts_1 |= Intercepts1::SELECTIVE_CR0.bits();
        }
        control.intercepts_2 = Intercepts2::all().bits();
        control.io_map = maps.io();
        control.msr_map = maps.msr();
        control.asid = ASID;
        control.virtual_interrupt = virtual_interrupt::MASKING | virtual_interrupt::IGNORE_TPR;
        P::set_up(control, features);
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
    fn reset(&mut self) {
        (self.latched, self.event, self.nmi) = (None, 0, NmiState::Open);
        self.switch.registers = [0; 16];
        self.switch.fx = [0; 512];
        self.switch.fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        self.switch.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = virtual_interrupt::MASKING | virtual_interrupt::IGNORE_TPR;
        control.shadow = 0;
        control.exceptions = EXCEPTIONS | P::EXCEPTIONS;
        control.intercepts_1 &= !(Intercepts1::VINTR | Intercepts1::IRET).bits();
        // SAFETY: all zeros is a valid `Save`.
        self.vmcb_mut().save = unsafe { core::mem::zeroed() };
        let data = Segment { selector: 0, attributes: 0x093, limit: 0xffff, base: 0 };
        let save = self.save_mut();
        (save.es, save.ss, save.ds, save.fs, save.gs) = (data, data, data, data, data);
        save.cs = Segment { selector: 0xf000, attributes: 0x09b, limit: 0xffff, base: 0xffff_0000 };
        (save.gdtr.limit, save.idtr.limit) = (0xffff, 0xffff);
        save.ldtr = Segment { selector: 0, attributes: 0x082, limit: 0xffff, base: 0 };
        save.tr = Segment { selector: 0, attributes: 0x08b, limit: 0xffff, base: 0 };
        (save.dr6, save.dr7) = (0xffff_0ff0, 0x400);
        save.rflags = RFLAGS_FIXED;
        save.rip = 0xfff0;
        save.pat = PAT_RESET;
        P::set_registers(self, PagingRegisters { cr0: CR0_RESET, cr3: 0, cr4: 0, efer: 0 });
        self.switch.registers[2] = 0x0060_0f00;
        self.next = Entry::Unusual;
        self.owe_flush();
    }

    /// The next entry flushes all that the TLB holds of the guest.
    fn owe_flush(&mut self) {
        P::forget(self);
        self.owe(if self.features.flush_by_asid() { TlbControl::FlushAsid } else { TlbControl::FlushAll });
    }

    /// The next entry asks that of the TLB, or more.
    fn owe(&mut self, what: TlbControl) {
        if self.flush != TlbControl::FlushAll {
            self.flush = what;
        }
        if self.next == Entry::Plain {
            self.next = Entry::Flushing;
        }
    }

    fn save(&self) -> &Save {
        &self.vmcb().save
    }

    fn save_mut(&mut self) -> &mut Save {
        &mut self.vmcb_mut().save
    }

    /// Moves behind an instruction that was executed, or counts as executed.
    #[inline]
    fn move_to(&mut self, rip: u64) -> &mut Vmcb {
        let vmcb = self.vmcb_mut();
        vmcb.save.rip = rip;
        vmcb.control.shadow = 0;
        vmcb.save.rflags &= !RFLAGS_RF;
        vmcb
    }
}

impl<P: Paging> GuestCpu for Vcpu<P> {
    type Memory = P::Memory;

    fn was_delivering(&self) -> bool {
        self.vmcb().control.exit_event & event::VALID != 0
    }

    fn register(&self, index: usize) -> u64 {
        match index {
            0 => self.save().rax,
            4 => self.save().rsp,
            _ => self.switch.registers[index],
        }
    }

    fn set_register(&mut self, index: usize, value: u64) {
        match index {
            0 => self.save_mut().rax = value,
            4 => self.save_mut().rsp = value,
            _ => self.switch.registers[index] = value,
        }
    }

    #[inline]
    fn advance(&mut self, length: u64) {
        let next_rip = self.features.next_rip();
        let vmcb = self.vmcb_mut();
        let next = if next_rip && vmcb.control.next_rip != 0 {
            vmcb.control.next_rip
        } else {
            vmcb.save.rip.wrapping_add(length)
        };
        self.advance_to(next);
    }

    fn trap_behind(&mut self, rip: u64) {
        self.move_to(rip);
        self.raise(Raised::Again(Intercepted::Debug));
    }

    #[inline]
    fn advance_to(&mut self, rip: u64) {
        let vmcb = self.move_to(rip);
        // The trap behind an instruction that a debugger steps over (APM vol. 2, 13.1.4) is ours to raise: the CPU has not
        // executed it.
        if vmcb.save.rflags & RFLAGS_TF != 0 {
            vmcb.save.dr6 |= DR6_BS;
            self.raise(Raised::Again(Intercepted::Debug));
        }
    }

    fn bind(&mut self) {
        // SAFETY: the page is this vCPU's; SVM is on wherever a vCPU is run.
        unsafe {
            entry::save_host(self.switch.host);
        }
        self.owe_flush();
    }

    fn export(&mut self) -> CpuState {
        self.take_step_back();
        let save = self.save();
        CpuState {
            registers: self.registers(),
            dr6: save.dr6,
            dr7: save.dr7,
            msrs: MSRS.map(|field| self.get(field)),
            fx: self.switch.fx,
            shadow: self.vmcb().control.shadow & 1 != 0,
            latched: self.latched,
            event: self.event,
            nmis_masked: self.nmis_masked(),
        }
    }

    fn import(&mut self, state: &CpuState) -> Result<(), BadState> {
        check(state)?;
        self.reset();
        let registers = &state.registers;
        for (index, value) in registers.general.iter().enumerate() {
            self.set_register(index, *value);
        }
        for (field, value) in MSRS.into_iter().zip(state.msrs) {
            self.set(field, value);
        }
        self.switch.fx = state.fx;
        let save = self.save_mut();
        let [es, cs, ss, ds, fs, gs] = registers.segments.map(segment_back);
        (save.es, save.cs, save.ss, save.ds, save.fs, save.gs) = (es, cs, ss, ds, fs, gs);
        (save.tr, save.ldtr) = (segment_back(registers.tr), segment_back(registers.ldtr));
        (save.gdtr, save.idtr) = (segment_back(registers.gdtr), segment_back(registers.idtr));
        (save.rip, save.rflags, save.cpl) = (registers.rip, registers.rflags, registers.cpl);
        save.cr2 = registers.cr2;
        (save.dr6, save.dr7) = (state.dr6, state.dr7);
        let Registers { cr0, cr3, cr4, efer, .. } = *registers;
        P::set_registers(self, PagingRegisters { cr0, cr3, cr4, efer });
        self.put_in(state.event);
        let control = &mut self.vmcb_mut().control;
        control.shadow = u64::from(state.shadow);
        if state.nmis_masked {
            self.mask_nmis();
        }
        if let Some(vector) = state.latched {
            self.latch(vector);
        }
        Ok(())
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcb_mut().control.tsc_offset = offset;
    }

    #[inline]
    fn flush(&mut self) {
        self.owe_flush();
    }

    #[inline]
    fn run(&mut self, fix: impl FnMut(&mut Self, &Met) -> bool) -> Exit {
        if self.next != Entry::Plain || self.vmcb().control.shadow & 1 != 0 {
            return self.run_other();
        }
        self.run_plain(fix)
    }

    fn can_take_interrupt(&self) -> bool {
        let vmcb = self.vmcb();
        let free = self.latched.is_none() && self.event == 0 && !self.is_stepping();
        free && vmcb.save.rflags & RFLAGS_IF != 0 && vmcb.control.shadow & 1 == 0
    }

    fn interrupt(&mut self, vector: u8) {
        self.close_interrupt_window();
        self.latch(vector);
    }

    fn open_interrupt_window(&mut self) {
        // Behind a step the question is asked again.
        if self.latched.is_none() && !self.is_stepping() {
            let control = &mut self.vmcb_mut().control;
            control.intercepts_1 |= Intercepts1::VINTR.bits();
            control.virtual_interrupt |= virtual_interrupt::REQUEST;
            self.next = Entry::Unusual;
        }
    }

    #[inline]
    fn close_interrupt_window(&mut self) {
        let latched = self.latched.is_some();
        let control = &mut self.vmcb_mut().control;
        if control.intercepts_1 & Intercepts1::VINTR.bits() != 0 {
            control.intercepts_1 &= !Intercepts1::VINTR.bits();
            if !latched {
                control.virtual_interrupt &= !virtual_interrupt::REQUEST;
            }
        }
    }

    fn can_take_nmi(&self) -> bool {
        self.event == 0 && self.nmi == NmiState::Open && self.vmcb().control.shadow & 1 == 0
    }

    fn in_shadow(&self) -> bool {
        self.event == 0 && self.vmcb().control.shadow & 1 != 0
    }

    fn nmis_masked(&self) -> bool {
        self.nmi != NmiState::Open
    }

    fn nmi(&mut self) {
        self.inject_nmi();
    }

    fn open_nmi_window(&mut self) -> NmiWindow {
        self.watch_for_nmi()
    }

    fn raise(&mut self, raised: Raised) {
        let coded = |vector: u64, code: u32| event::HAS_CODE | vector | u64::from(code) << event::CODE_SHIFT;
        let what = match raised {
            Raised::Divide => 0,
            Raised::InvalidOpcode => 6,
            Raised::DeviceNotAvailable => 7,
            Raised::FloatingPoint => 16,
            Raised::Stack => coded(12, 0),
            Raised::GeneralProtection => coded(13, 0),
            Raised::Selector(selector) => coded(13, selector.into()),
            Raised::SegmentNotPresent(selector) => coded(11, selector.into()),
            Raised::StackSelector(selector) => coded(12, selector.into()),
            Raised::PageFault { code, address } => {
                self.save_mut().cr2 = address;
                coded(14, code)
            }
            // A trap, or the fault of a breakpoint, whose frame has what the flags have.
            Raised::Again(Intercepted::Debug) => {
                self.save_mut().dr7 &= !DR7_GD;
                self.put_in(event::VALID | event::EXCEPTION | 1);
                return;
            }
            // The code of #AC is always 0.
            Raised::Again(Intercepted::AlignmentCheck) => coded(17, 0),
        };
        self.raise_fault(what);
    }

    fn has_event(&self) -> bool {
        self.latched.is_some() || self.event != 0
    }

    #[inline]
    fn task_priority(&self) -> u8 {
        (self.vmcb().control.virtual_interrupt & 0xf) as u8
    }

    #[inline]
    fn set_task_priority(&mut self, priority: u8) {
        let control = &mut self.vmcb_mut().control;
        control.virtual_interrupt = control.virtual_interrupt & !virtual_interrupt::TPR | u64::from(priority & 0xf);
    }

    fn set_status(&mut self, cr0: u64) {
        self.write_cr0(cr0);
    }

    fn watch_task_priority(&mut self, watch: bool) {
        if watch != self.watch_task_priority {
            (self.watch_task_priority, self.next) = (watch, Entry::Unusual);
        }
    }

    fn raw_exit(&self) -> RawExit {
        let control = &self.vmcb().control;
        RawExit { code: control.exit_code, info1: control.exit_info_1, info2: control.exit_info_2 }
    }

    fn last_fault(&self) -> Option<Fault> {
        let RawExit { code, info1, info2 } = self.raw_exit();
        (code == exit::NESTED_FAULT).then(|| exit::decode_fault(info1, info2))
    }

    fn load(&mut self, init: &VcpuInit) {
        self.reset();
        self.set_register(RBX, init.rbx);
        self.set_register(RSI, init.rsi);
        let save = self.save_mut();
        let data = segment_in(&init.data);
        (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
        (save.cs, save.tr, save.ldtr) = (segment_in(&init.cs), segment_in(&init.tr), segment_in(&init.ldtr));
        (save.gdtr.limit, save.gdtr.base) = (u32::from(init.gdtr.limit), init.gdtr.base);
        (save.idtr.limit, save.idtr.base) = (u32::from(init.idtr.limit), init.idtr.base);
        (save.rip, save.rsp, save.rflags) = (init.rip, init.rsp, init.rflags);
        (save.dr6, save.dr7, save.pat) = (init.dr6, init.dr7, init.pat);
        save.rax = init.rax;
        let VcpuInit { cr0, cr3, cr4, efer, .. } = *init;
        P::set_registers(self, PagingRegisters { cr0, cr3, cr4, efer });
    }

    fn registers(&self) -> Registers {
        let save = self.save();
        let PagingRegisters { cr0, cr3, cr4, efer } = P::registers(self);
        let mut general = [0; 16];
        for (index, register) in general.iter_mut().enumerate() {
            *register = self.register(index);
        }
        Registers {
            rip: save.rip,
            rflags: save.rflags,
            general,
            cr0,
            cr2: save.cr2,
            cr3,
            cr4,
            efer,
            cpl: save.cpl,
            segments: [&save.es, &save.cs, &save.ss, &save.ds, &save.fs, &save.gs].map(segment_out),
            tr: segment_out(&save.tr),
            ldtr: segment_out(&save.ldtr),
            gdtr: segment_out(&save.gdtr),
            idtr: segment_out(&save.idtr),
        }
    }

    fn emulated(&self, physical_bits: u32) -> emulate::Cpu {
        let save = self.save();
        let PagingRegisters { cr0, cr3, cr4, efer } = P::registers(self);
        let mut general = self.switch.registers;
        (general[RAX], general[RSP]) = (save.rax, save.rsp);
        let segment = |s: &Segment| start::Segment {
            selector: s.selector,
            attributes: s.attributes,
            limit: s.limit,
            base: s.base,
        };
        emulate::Cpu {
            registers: emulate::Registers { general, rip: save.rip, rflags: save.rflags, loaded: None },
            cr0,
            cr3,
            cr4,
            efer,
            cpl: save.cpl,
            segments: [&save.es, &save.cs, &save.ss, &save.ds, &save.fs, &save.gs].map(segment),
            gdtr: (save.gdtr.base, save.gdtr.limit),
            ldtr: segment(&save.ldtr),
            physical_bits,
            pkru: if cr4 & CR4_PKE != 0 { extended::pkru() } else { 0 },
        }
    }

    fn take_over(&mut self, registers: &emulate::Registers) {
        self.switch.registers = registers.general;
        let save = self.save_mut();
        (save.rax, save.rsp) = (registers.general[RAX], registers.general[RSP]);
        save.rflags = registers.rflags;
        if self.save().rip != registers.rip {
            self.advance_to(registers.rip);
        }
        if let Some((which, loaded)) = registers.loaded {
            self.load_segment(which, &loaded);
        }
    }

    fn wide(&mut self) -> &mut dyn emulate::Wide {
        &mut *self.switch
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.save().rip
    }

    fn cr4(&self) -> u64 {
        P::cr4(self)
    }
}

impl<P> Drop for Vcpu<P> {
    fn drop(&mut self) {
        frames::free(self.switch.guest, 0);
        frames::free(self.switch.host, 0);
    }
}

const _: () = assert!(size_of::<Vmcb>() as u64 == FRAME);

#[cfg(test)]
mod tests;
