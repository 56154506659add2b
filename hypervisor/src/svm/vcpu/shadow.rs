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
//! # ASIDs
//! One for each root that the library has at hand ([`super::asid`]). What the CPU is told beside the root is told for all of
//! them, so when that changes all are forgotten; what follows from a root's role (CR0.WP and the like) is in the tables.
//!
//! # What exits
//! Page faults, always. Loads of CR3 and CR4, INVLPG and INVPCID, for what the guest wants forgotten must be compared. Reads
//! of CR3. Reads and writes of CR0 only while the guest has PG or WP clear: otherwise it sees what there is, and what it
//! writes exits if it changes more than TS and MP (the selective intercept). Reads of CR4 only while it differs. Writes to
//! EFER exit in any case. Task switches, for they load CR3 from memory; a guest on shadow tables has none, and ends with its
//! first. QEMU's emulation (7.2) ignores that intercept and lets the guest run on with a CR3 of its own choice. Nothing
//! here can keep it from that, and then from memory that is not its own; the next exit finds CR3 changed, and ends it.
//!
//! # Events
//! A page fault that comes while an event is being delivered exits as any other. Where it turns out to be the guest's own,
//! the two make one (8.2.9): a fault while a page fault is delivered is a double fault, while a double fault is, the end.
//! Otherwise the page fault goes first. What waits behind it is an external interrupt, which stays latched, or an NMI, of
//! which the caller is told; other exceptions and software interrupts come again with their instruction.

use nestling::Hpa;
use nestling::guest::{PageFault, Privilege};
use nestling::shadow::tags::Tag;
use nestling::shadow::vcpu::ShadowFormat;

use super::super::exit;
use super::super::vmcb::{Control, Intercepts1, Intercepts3, TlbControl};
use super::asid::{Asids, Renewed};
use super::paging::Paging;
use super::{EFER_SVME, Entry, Features, NmiState, Vcpu, event};
use crate::cpu::instructions;
use crate::emulate::Glanced;
use crate::vm::exit::Exit;
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
/// Of a code segment, as the control block has its attributes.
const SEGMENT_LONG: u16 = 1 << 9;
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
    /// What the CPU was given for CR3.
    root: u64,
    asids: Asids,
    /// The tag whose ASID the control block has.
    tag: Option<Tag>,
    watched_writes: u16,
    /// A register was set, and nobody has asked yet.
    set: bool,
    /// What was seen at RIP, and where the next instruction begins; for the present exit.
    seen: Option<(Glanced, u64)>,
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
    // The CPU may have run out of ASIDs, and the guest may be stepping.
    const FIXES_MORE: bool = true;

    fn new(features: Features) -> Self {
        let asids = Asids::new(features.asids);
        Self {
            cr0: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            made_for: None,
            root: 0,
            asids,
            tag: None,
            watched_writes: 0,
            set: true,
            seen: None,
        }
    }

    fn forget(vcpu: &mut Vcpu<Self>) {
        vcpu.paging.asids.forget();
        vcpu.paging.tag = None;
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
        let own = &mut vcpu.paging;
        (own.cr0, own.cr3, own.cr4, own.efer, own.made_for) = (cr0 & CR0_OWN, cr3, cr4, efer, None);
        own.set = true;
    }

    fn cr4(vcpu: &Vcpu<Self>) -> u64 {
        vcpu.paging.cr4
    }

    #[inline]
    fn met(vcpu: &Vcpu<Self>) -> Option<Exit> {
        let met = match vcpu.vmcb().control.exit_code {
            exit::READ_CR3 => Exit::ReadControl,
            exit::WRITE_CR3 => Exit::WriteControl,
            exit::INVLPG => Exit::Invalidate,
            _ => return None,
        };
        (vcpu.save().cr3 == vcpu.paging.root).then_some(met)
    }

    #[inline]
    fn exited(vcpu: &Vcpu<Self>, exit: Exit) -> Exit {
        // Where the CPU refused to run, the block has nothing of the guest.
        if vcpu.save().cr3 == vcpu.paging.root || exit == Exit::Invalid { exit } else { Exit::TaskSwitch }
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
        let same = (save.cr4, save.efer) == (cr4, efer);
        (save.cr4, save.efer) = (cr4, efer);
        // The control block is told there which writes exit.
        self.next = Entry::Unusual;
        if !same {
            self.owe_flush();
        }
    }

    /// Turns to another tag.
    #[inline(never)]
    fn turn_to(&mut self, tag: Tag) {
        self.paging.tag = Some(tag);
        match self.paging.asids.get(tag) {
            Some(asid) => self.vmcb_mut().control.asid = asid,
            None => self.renew(tag),
        }
    }

    fn renew(&mut self, tag: Tag) {
        let Renewed { asid, flush_all } = self.paging.asids.renew(tag);
        self.vmcb_mut().control.asid = asid;
        if flush_all {
            self.owe(TlbControl::FlushAll);
        }
    }
}

impl ShadowCpu for Vcpu<Shadowed> {
    fn paging(&self) -> PagingRegisters {
        Shadowed::registers(self)
    }

    fn set_paging(&mut self, registers: PagingRegisters) {
        // CR3 is in the tables, not in the control block, which need not be made anew for it.
        if (PagingRegisters { cr3: registers.cr3, ..Shadowed::registers(self) }) == registers {
            self.set_cr3(registers.cr3);
        } else {
            Shadowed::set_registers(self, registers);
        }
    }

    // It is in the tables, not in the control block.
    fn set_cr3(&mut self, cr3: u64) {
        (self.paging.cr3, self.paging.set) = (cr3, true);
    }

    #[inline]
    fn take_paging_set(&mut self) -> bool {
        core::mem::take(&mut self.paging.set)
    }

    #[inline]
    fn keep_seen(&mut self, seen: (Glanced, u64)) {
        self.paging.seen = Some(seen);
    }

    #[inline]
    fn take_seen(&mut self) -> Option<(Glanced, u64)> {
        self.paging.seen.take()
    }

    fn runs_64_bit_kernel(&self) -> bool {
        let save = self.save();
        self.paging.efer & EFER_LMA != 0 && save.cs.attributes & SEGMENT_LONG != 0 && save.cpl == 0
    }

    #[inline]
    fn load_root(&mut self, root: Hpa, format: ShadowFormat, tag: Tag) {
        if self.paging.made_for != Some(format) {
            self.compose(format);
        }
        // A tag is of one root, until the library has it flushed.
        if self.paging.tag != Some(tag) {
            self.turn_to(tag);
        }
        self.paging.root = root.0;
        self.save_mut().cr3 = root.0;
    }

    fn forget_tag(&mut self) {
        if let Some(tag) = self.paging.tag {
            self.renew(tag);
        }
    }

    #[inline]
    fn forget_address(&mut self, linear: u64) {
        // SAFETY: SVM is on wherever a vCPU is run, and this is the CPU that runs it; the ASID is the guest's.
        unsafe { instructions::invlpga(linear, self.vmcb().control.asid) };
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

#[cfg(test)]
mod tests {
    use nestling::guest::FaultCode;

    use super::super::super::permission::Maps;
    use super::*;
    use crate::memory::frames::testing;
    use crate::vm::exit::Raised;
    use crate::vm::guest_cpu::GuestCpu;

    const PE: u64 = 1 << 0;
    const TS: u64 = 1 << 3;
    const ROOT: Hpa = Hpa(0x5000);

    fn vcpu() -> Vcpu<Shadowed> {
        testing::machine();
        Vcpu::new(Features::NONE, &Maps::new().unwrap()).unwrap()
    }

    /// Sets registers and gets it ready, as an entry does.
    fn entered(vcpu: &mut Vcpu<Shadowed>, [cr0, cr3, cr4, efer]: [u64; 4], format: ShadowFormat) {
        vcpu.set_paging(PagingRegisters { cr0, cr3, cr4, efer });
        vcpu.load_root(ROOT, format, tag());
    }

    /// Its tags, as the library would give them.
    fn tags() -> [Tag; Tag::COUNT] {
        core::array::from_fn(|number| Tag::all().nth(number).unwrap())
    }

    fn tag() -> Tag {
        tags()[0]
    }

    fn real(vcpu: &Vcpu<Shadowed>) -> [u64; 4] {
        let save = vcpu.save();
        [save.cr0, save.cr3, save.cr4, save.efer]
    }

    fn exiting(vcpu: &Vcpu<Shadowed>) -> (u16, u16) {
        (vcpu.vmcb().control.cr_reads, vcpu.paging.watched_writes())
    }

    #[test]
    fn a_guest_without_paging_is_paged_and_does_not_see_it() {
        let mut vcpu = vcpu();
        // Real mode, which has turned on all that only paging heeds.
        let guest = [0x10, 0x1000, CR4_SMEP | CR4_SMAP | CR4_PKE, EFER_LME];
        entered(&mut vcpu, guest, ShadowFormat::Pae);
        assert_eq!(real(&vcpu), [0x10 | CR0_OWN, ROOT.0, CR4_PAE, EFER_NXE | EFER_SVME]);
        let paging = vcpu.paging();
        assert_eq!([paging.cr0, paging.cr3, paging.cr4, paging.efer], guest);
        assert_eq!(exiting(&vcpu), (CR0 | CR3 | CR4, CR0 | CR3 | CR4), "nothing is as it has it");
    }

    #[test]
    fn a_guest_in_long_mode_reads_what_there_is() {
        let mut vcpu = vcpu();
        let (cr0, cr4, efer) = (CR0_OWN | PE, CR4_PAE | CR4_SMEP | CR4_SMAP, EFER_LME | EFER_LMA | EFER_NXE);
        entered(&mut vcpu, [cr0, 0x1000, cr4, efer], ShadowFormat::Long4);
        assert_eq!(real(&vcpu), [cr0, ROOT.0, cr4, efer | EFER_SVME]);
        assert_eq!(exiting(&vcpu), (CR3, CR3 | CR4));
        // TS and MP it writes where they are; nothing is made anew for that.
        vcpu.save_mut().cr0 |= TS;
        assert_eq!(vcpu.paging().cr0, cr0 | TS);
        vcpu.load_root(Hpa(0x6000), ShadowFormat::Long4, tag());
        assert_eq!(real(&vcpu)[..2], [cr0 | TS, 0x6000]);
        // Without WP its reads and writes are looked at, for the CPU keeps it.
        entered(&mut vcpu, [cr0 & !CR0_WP, 0x1000, cr4, efer], ShadowFormat::Long4);
        assert_eq!((real(&vcpu)[0], exiting(&vcpu)), (cr0, (CR0 | CR3, CR0 | CR3 | CR4)));
        assert_ne!(vcpu.flush, TlbControl::Keep);
    }

    #[test]
    fn the_format_is_the_tables_and_not_the_guests() {
        let mut vcpu = vcpu();
        // 32-bit paging, on PAE tables.
        entered(&mut vcpu, [CR0_OWN | PE, 0x1000, 0, 0], ShadowFormat::Pae);
        assert_eq!(real(&vcpu)[2..], [CR4_PAE, EFER_NXE | EFER_SVME]);
        assert_eq!(exiting(&vcpu).0, CR3 | CR4);
        let five = [CR0_OWN | PE, 0x1000, CR4_PAE | CR4_LA57 | CR4_PCIDE, EFER_LME | EFER_LMA];
        entered(&mut vcpu, five, ShadowFormat::Long5);
        assert_eq!(real(&vcpu)[2..], [CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME]);
        assert_eq!(vcpu.cr4(), five[2], "PCIDs it has, its CPU has not");
    }

    fn fault(code: FaultCode) -> PageFault {
        PageFault { code, address: 0xabc }
    }

    /// The last exit met the delivery of `event`.
    fn delivering(vcpu: &mut Vcpu<Shadowed>, event: u64) {
        vcpu.event = 0;
        vcpu.vmcb_mut().control.exit_event = event;
        vcpu.settle_events();
    }

    #[test]
    fn a_page_fault_and_what_it_interrupts_make_one() {
        use PageFaultTaken::{BeforeNmi, Raised, Shutdown};
        let exception = event::VALID | event::EXCEPTION;
        let given = exception | event::HAS_CODE | 14 | 6 << event::CODE_SHIFT;
        let double = exception | event::HAS_CODE | 8;
        for (interrupted, taken, then) in [
            (0, Raised, given),
            (exception | 6, Raised, given),
            (exception | event::HAS_CODE | 13, Raised, given),
            (exception | event::HAS_CODE | 14, Raised, double),
            (double, Shutdown, 0),
            (event::VALID | event::SOFTWARE | 0x80, Raised, given),
            (event::VALID | event::NMI | 2, BeforeNmi, given),
        ] {
            let mut vcpu = vcpu();
            delivering(&mut vcpu, interrupted);
            assert_eq!(vcpu.take_page_fault(fault(FaultCode::WRITE | FaultCode::USER)), taken, "{interrupted:#x}");
            assert_eq!((vcpu.event, vcpu.save().cr2), (then, 0xabc), "{interrupted:#x}");
        }
    }

    #[test]
    fn an_interrupt_and_an_nmi_wait_behind_a_page_fault() {
        let mut vcpu = vcpu();
        vcpu.interrupt(0x40);
        delivering(&mut vcpu, event::VALID | event::INTERRUPT | 0x40);
        assert_eq!(vcpu.take_page_fault(fault(FaultCode::empty())), PageFaultTaken::Raised);
        assert_eq!((vcpu.latched, vcpu.event as u8), (Some(0x40), 14));
        vcpu.event = 0;
        vcpu.nmi();
        delivering(&mut vcpu, event::VALID | event::NMI | 2);
        assert_eq!(vcpu.take_page_fault(fault(FaultCode::empty())), PageFaultTaken::BeforeNmi);
        vcpu.event = 0;
        assert!(vcpu.can_take_nmi(), "none is being handled: it is given again");
    }

    #[test]
    fn a_fault_of_a_watched_iret_is_asked_about_first() {
        let mut vcpu = vcpu();
        vcpu.nmi();
        vcpu.event = 0;
        assert_eq!(vcpu.settle_nmi(Exit::NmiWindow), Exit::NmiWindow);
        let stepping = vcpu.save().rflags & super::super::RFLAGS_TF != 0;
        let met = Exit::PageFault(fault(FaultCode::empty()));
        assert_eq!((stepping, vcpu.settle_nmi(met)), (true, met), "its stack may only not be mapped yet");
        assert!(vcpu.is_stepping());
        vcpu.take_page_fault(fault(FaultCode::empty()));
        assert!(!vcpu.is_stepping() && vcpu.nmis_masked(), "it was the guest's: the IRET has not completed");
        assert_eq!(vcpu.save().rflags & super::super::RFLAGS_TF, 0);
        vcpu.raise(Raised::InvalidOpcode);
        assert_eq!(vcpu.vmcb().control.exceptions & 1 << PAGE_FAULT, 1 << PAGE_FAULT, "it goes on being watched");
    }

    /// The ASID that the next entry runs by, and what it asks of the TLB.
    fn entry(vcpu: &mut Vcpu<Shadowed>) -> (u32, TlbControl) {
        (vcpu.vmcb().control.asid, vcpu.take_flush())
    }

    #[test]
    fn a_tag_has_an_asid_until_it_is_flushed_and_all_lose_theirs_when_there_are_no_more() {
        use TlbControl::{FlushAll, Keep};
        testing::machine();
        let features = Features { asids: 5, ..Features::NONE };
        let mut vcpu = Vcpu::<Shadowed>::new(features, &Maps::new().unwrap()).unwrap();
        let load = |vcpu: &mut Vcpu<Shadowed>, number: usize| {
            vcpu.load_root(ROOT, ShadowFormat::Long4, tags()[number]);
            entry(vcpu)
        };
        assert_eq!(load(&mut vcpu, 0), (1, FlushAll), "nobody knows what was there");
        assert_eq!(load(&mut vcpu, 1), (2, Keep));
        assert_eq!(load(&mut vcpu, 0), (1, Keep));
        vcpu.forget_tag();
        assert_eq!(entry(&mut vcpu), (3, Keep), "nothing is in the TLB by this one");
        assert_eq!((load(&mut vcpu, 1), load(&mut vcpu, 2)), ((2, Keep), (4, Keep)));
        // There are no more: those of the others are given again, to others.
        vcpu.forget_tag();
        assert_eq!(entry(&mut vcpu), (1, FlushAll));
        assert_eq!((load(&mut vcpu, 0), load(&mut vcpu, 1)), ((2, Keep), (3, Keep)));
        // What all of them depend on changes.
        vcpu.flush();
        assert_eq!(load(&mut vcpu, 1), (1, FlushAll));
        vcpu.set_paging(PagingRegisters { cr4: CR4_SMEP, cr0: CR0_OWN | PE, cr3: 0, efer: 0 });
        assert_eq!(load(&mut vcpu, 0), (1, FlushAll));
        // CR0.WP is in the tables.
        vcpu.set_paging(PagingRegisters { cr4: CR4_SMEP, cr0: CR0_PG | PE, cr3: 0, efer: 0 });
        assert_eq!(load(&mut vcpu, 1), (2, Keep));
    }

    #[test]
    fn with_one_asid_every_other_tag_is_a_flush() {
        let mut vcpu = vcpu();
        for number in [0, 1, 0, 2, 2] {
            let before = vcpu.paging.tag;
            vcpu.load_root(ROOT, ShadowFormat::Long4, tags()[number]);
            let all = if before == Some(tags()[number]) { TlbControl::Keep } else { TlbControl::FlushAll };
            assert_eq!(entry(&mut vcpu), (1, all), "{number}");
        }
    }

    #[test]
    fn another_cr3_than_was_given_is_a_task_switch() {
        let mut vcpu = vcpu();
        entered(&mut vcpu, [CR0_OWN | PE, 0x1000, 0, 0], ShadowFormat::Pae);
        vcpu.vmcb_mut().control.exit_code = 0x72;
        assert_eq!(vcpu.left_plain(), Exit::Cpuid);
        vcpu.save_mut().cr3 = 0x1000;
        assert_eq!(vcpu.left_plain(), Exit::TaskSwitch, "though it is what the guest calls its own");
    }

    #[test]
    fn whose_access_it_was() {
        let mut vcpu = vcpu();
        vcpu.save_mut().cpl = 3;
        assert_eq!(vcpu.privilege(true), Privilege::User);
        assert_eq!(vcpu.privilege(false), Privilege::Implicit, "the CPU's own, of a descriptor table");
        vcpu.save_mut().cpl = 0;
        assert_eq!(vcpu.privilege(false), Privilege::Supervisor { ac: false });
        vcpu.save_mut().rflags |= RFLAGS_AC;
        assert_eq!(vcpu.privilege(false), Privilege::Supervisor { ac: true });
    }
}
