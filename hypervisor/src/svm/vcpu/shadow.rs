//! A vCPU whose CPU walks shadow tables: nested paging is off, and the control block has registers of ours where they say
//! how addresses are translated.
//!
//! # Whose register is where
//! | register | in the control block | the guest's |
//! |---|---|---|
//! | CR3 | the root of the shadow tables | here |
//! | CR0.PG, CR0.WP | always set; with PE clear that is paged real mode (15.9) | here |
//! | CR0, the rest | the guest's | there |
//! | CR4 | the guest's, with PAE, LA57 as the tables' format wants it, without PCIDE, and without SMEP, SMAP and PKE while the guest does not page (all pages are the user's then) | here |
//! | EFER | the guest's, with NXE, and with LME and LMA as the format wants them | here |
//! | CR2 | the guest's | there |
//!
//! The format is the library's to say, at each entry; what the guest has was told to it before. A control block with
//! CR0.PG always set keeps what is told of QEMU's emulation in [`super::long_mode`] from happening.
//!
//! # What exits
//! Page faults, always. Loads of CR3 and CR4, INVLPG and INVPCID, for what the guest wants forgotten must be compared. Reads
//! of CR3. Reads and writes of CR0 only while the guest has PG or WP clear: otherwise it sees what there is, and what it
//! writes exits if it changes more than TS and MP (the selective intercept). Reads of CR4 only while it differs. Writes to
//! EFER exit in any case. Task switches, for they load CR3 from memory.
//!
//! # Events
//! A page fault that comes while an event is being delivered exits as any other. Where it turns out to be the guest's own,
//! the two make one (8.2.9): a fault while a page fault is delivered is a double fault, while a double fault is, the end.
//! Otherwise the page fault goes first. What waits behind it is an external interrupt, which stays latched, or an NMI, of
//! which the caller is told; other exceptions and software interrupts come again with their instruction.

use nestling::Hpa;
use nestling::guest::{PageFault, Privilege};
use nestling::shadow::vcpu::ShadowFormat;

use super::super::vmcb::{Control, Intercepts1, Intercepts3};
use super::paging::Paging;
use super::{EFER_SVME, Features, NmiState, Vcpu, event};
use crate::vm::guest_cpu::{PageFaultTaken, ShadowCpu};
use crate::vm::shadow::ShadowMemory;
use crate::vm::walk::PagingRegisters;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
/// The bits of CR0 that are the guest's own.
const CR0_OWN: u64 = CR0_PG | CR0_WP;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;
/// Bits of CR0, CR3 and CR4 in the words of intercepts.
const CR0: u16 = 1 << 0;
const CR3: u16 = 1 << 3;
const CR4: u16 = 1 << 4;
const PAGE_FAULT: u32 = 14;
const DOUBLE_FAULT: u64 = 8;

/// The guest's registers that the control block does not have.
#[derive(Debug)]
pub struct Shadowed {
    /// PG and WP.
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    /// What the control block was made for; `None`: the guest's registers have changed since.
    made_for: Option<ShadowFormat>,
    watched_writes: u16,
}

impl Shadowed {
    const fn is_paging(&self) -> bool {
        self.cr0 & CR0_PG != 0
    }

    /// CR4 for tables of this format.
    const fn real_cr4(&self, format: ShadowFormat) -> u64 {
        let mut cr4 = self.cr4 & !(CR4_LA57 | CR4_PCIDE) | CR4_PAE;
        if matches!(format, ShadowFormat::Long5) {
            cr4 |= CR4_LA57;
        }
        if !self.is_paging() {
            cr4 &= !(CR4_SMEP | CR4_SMAP | CR4_PKE);
        }
        cr4
    }

    /// EFER for tables of this format.
    const fn real_efer(&self, format: ShadowFormat) -> u64 {
        let efer = self.efer & !(EFER_LME | EFER_LMA) | EFER_NXE | EFER_SVME;
        match format {
            ShadowFormat::Pae => efer,
            ShadowFormat::Long4 | ShadowFormat::Long5 => efer | EFER_LME | EFER_LMA,
        }
    }
}

impl Paging for Shadowed {
    type Memory = ShadowMemory;

    const WATCHES_FAULTS: bool = true;
    const EXCEPTIONS: u32 = 1 << PAGE_FAULT;

    fn new() -> Self {
        Self { cr0: 0, cr3: 0, cr4: 0, efer: 0, made_for: None, watched_writes: 0 }
    }

    fn set_up(control: &mut Control, _features: Features) {
        control.intercepts_1 |= (Intercepts1::SELECTIVE_CR0 | Intercepts1::INVLPG | Intercepts1::TASK_SWITCH).bits();
        // A CPU without INVPCID has nothing to intercept, and does not look at the bit.
        control.intercepts_3 |= Intercepts3::INVPCID.bits();
    }

    fn registers(vcpu: &Vcpu<Self>) -> PagingRegisters {
        let Self { cr0, cr3, cr4, efer, .. } = vcpu.paging;
        PagingRegisters { cr0: vcpu.save().cr0 & !CR0_OWN | cr0, cr3, cr4, efer }
    }

    fn set_registers(vcpu: &mut Vcpu<Self>, registers: PagingRegisters) {
        let PagingRegisters { cr0, cr3, cr4, efer } = registers;
        vcpu.save_mut().cr0 = cr0 | CR0_OWN;
        let watched_writes = vcpu.paging.watched_writes;
        vcpu.paging = Self { cr0: cr0 & CR0_OWN, cr3, cr4, efer, made_for: None, watched_writes };
    }

    fn cr4(vcpu: &Vcpu<Self>) -> u64 {
        vcpu.paging.cr4
    }

    #[inline]
    fn watched_writes(&self) -> u16 {
        self.watched_writes
    }
}

impl Vcpu<Shadowed> {
    /// Makes the control block's registers of the guest's, for tables of this format.
    #[cold]
    fn compose(&mut self, format: ShadowFormat) {
        let own = &mut self.paging;
        let (cr4, efer) = (own.real_cr4(format), own.real_efer(format));
        let same_cr0 = own.cr0 == CR0_OWN;
        let same_cr4 = own.cr4 == cr4;
        own.made_for = Some(format);
        own.watched_writes = CR3 | CR4 | if same_cr0 { 0 } else { CR0 };
        let control = &mut self.vmcb_mut().control;
        control.cr_reads = CR3 | if same_cr0 { 0 } else { CR0 } | if same_cr4 { 0 } else { CR4 };
        let save = self.save_mut();
        (save.cr4, save.efer) = (cr4, efer);
        self.owe_flush();
    }
}

impl ShadowCpu for Vcpu<Shadowed> {
    fn paging(&self) -> PagingRegisters {
        Shadowed::registers(self)
    }

    fn set_paging(&mut self, registers: PagingRegisters) {
        // CR3 is in the tables, not in the control block, which need not be made anew for it.
        if (PagingRegisters { cr3: registers.cr3, ..Shadowed::registers(self) }) == registers {
            self.paging.cr3 = registers.cr3;
        } else {
            Shadowed::set_registers(self, registers);
        }
    }

    #[inline]
    fn load_root(&mut self, root: Hpa, format: ShadowFormat) {
        if self.paging.made_for != Some(format) {
            self.compose(format);
        }
        // Another root comes with a flush, if the library thinks that one is needed.
        self.save_mut().cr3 = root.0;
    }

    fn privilege(&self, user: bool) -> Privilege {
        let save = self.save();
        match (user, save.cpl) {
            (true, _) => Privilege::User,
            (false, 3) => Privilege::Implicit,
            (false, _) => Privilege::Supervisor { ac: save.rflags & RFLAGS_AC != 0 },
        }
    }

    fn take_page_fault(&mut self, fault: PageFault) -> PageFaultTaken {
        // A step over an IRET ends here: the fault is the IRET's own.
        self.take_step_back();
        let pending = core::mem::take(&mut self.event);
        let first =
            (pending & (event::VALID | event::KIND) == event::VALID | event::EXCEPTION).then_some(pending & 0xff);
        let vmcb = self.vmcb_mut();
        vmcb.save.cr2 = fault.address;
        // The first instruction of a handler is in nobody's shadow.
        vmcb.control.shadow = 0;
        match first {
            Some(DOUBLE_FAULT) => return PageFaultTaken::Shutdown,
            Some(vector) if vector == u64::from(PAGE_FAULT) => self.raise_fault(event::HAS_CODE | DOUBLE_FAULT),
            _ => {
                let code = u64::from(fault.code.bits()) << event::CODE_SHIFT;
                self.raise_fault(event::HAS_CODE | u64::from(PAGE_FAULT) | code);
            }
        }
        if pending & (event::VALID | event::KIND) == event::VALID | event::NMI {
            self.nmi = NmiState::Open;
            self.vmcb_mut().control.intercepts_1 &= !Intercepts1::IRET.bits();
            return PageFaultTaken::BeforeNmi;
        }
        PageFaultTaken::Raised
    }
}
