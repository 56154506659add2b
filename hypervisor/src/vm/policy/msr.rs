//! RDMSR and WRMSR of the guest.
//!
//! For the exit loop: [`rdmsr`] and [`wrmsr`] with the state of the vCPU that executes the instruction, its local APIC and
//! its VMCB. `Err(Gp)` means that #GP(0) is to be injected and nothing has changed. A write may ask the caller for
//! something that is beyond one vCPU's registers: [`MsrEffect`].
//!
//! An MSR that is not on the list ([`super::msr_list`]) raises #GP and is remembered once, in a set of bounded size, for
//! the report.

use serde::{Deserialize, Serialize};

use super::kvmclock::KvmClock;
use super::msr_list::{MsrClass, SoftMsr, VmcbField, classify};
use super::mtrr::Mtrrs;
use crate::devices::lapic::{IpiCommand, Lapic, LapicEffect};
use crate::devices::ports::Direction;
use crate::devices::saved::{BadState, require};
use crate::devices::{Gp, Now};

/// Access to the registers that live in a VMCB. Those that VMLOAD and VMSAVE move must be current in it during the call.
pub trait VmcbMsrs {
    /// The value of a register.
    fn get(&self, field: VmcbField) -> u64;
    /// Sets a register, except [`VmcbField::Cr0`], which is not written.
    fn set(&mut self, field: VmcbField, value: u64);
}

/// What the guest's MSRs are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrConfig {
    /// Rate of the guest's TSC in kHz.
    pub tsc_khz: u64,
    /// What is added to the host's TSC to make the guest's.
    pub tsc_offset: u64,
    /// Bits of a guest physical address.
    pub physical_bits: u32,
    /// Bits of a linear address, at most.
    pub linear_bits: u32,
    /// EFER.FFXSR is offered (CPUID 0x8000_0001 EDX bit 25).
    pub ffxsr: bool,
    /// TSC_AUX is switched, and RDTSCP offered.
    pub tsc_aux: bool,
}

/// What a write asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Look again at which interrupt can be delivered.
    Interrupts,
    /// The local APIC's next deadline may have changed, and with it which interrupt can be delivered.
    Timer,
    /// An interprocessor interrupt is to be sent.
    Ipi(IpiCommand),
    /// [`MsrState::tsc_offset`] has changed: copy it to the VMCB, publish the clock again, and look at the deadline.
    TscOffset,
    /// TSC_AUX has changed: load it before the next entry.
    TscAux,
    /// The clock's address has changed: publish it ([`MsrState::clock`]).
    KvmClock,
    /// Write the wall clock to this address.
    WallClock {
        /// Guest physical address, a multiple of 4.
        gpa: u64,
    },
}

/// An access to an MSR that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownMsr {
    /// The MSR.
    pub msr: u32,
    /// RDMSR or WRMSR.
    pub direction: Direction,
}

/// The MSRs of one vCPU that live in software.
#[derive(Clone, Debug)]
pub struct MsrState {
    /// The paravirtual clock.
    pub clock: KvmClock,
    config: MsrConfig,
    tsc_offset: u64,
    tsc_adjust: u64,
    tsc_aux: u32,
    misc_enable: u64,
    mtrrs: Mtrrs,
    mcg_status: u64,
    hwcr: u64,
    wall_clock: u64,
    unknown: [u32; UNKNOWN_CAPACITY],
    unknown_used: usize,
    unknown_news: Option<UnknownMsr>,
    unknown_accesses: u64,
}

/// The state of one vCPU's MSRs in software.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedMsrs {
    clock: (Option<u64>, u32),
    /// What the guest has added to its TSC since the start: the rest of the offset is the machine's.
    tsc_moved: u64,
    tsc_adjust: u64,
    tsc_aux: u32,
    misc_enable: u64,
    mtrrs: Mtrrs,
    mcg_status: u64,
    hwcr: u64,
    wall_clock: u64,
}

/// How many unknown MSRs are remembered. Later ones are only counted.
pub const UNKNOWN_CAPACITY: usize = 32;

const EFER_SCE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const EFER_FFXSR: u64 = 1 << 14;
const CR0_PG: u64 = 1 << 31;

/// After reset: fast strings are on, neither branch traces nor precise sampling is there. The latter two, and that there are
/// no performance counters, is not the guest's to change; the rest is kept as written, within what the manual defines.
const MISC_ENABLE: u64 = 1 << 0 | MISC_ENABLE_FIXED;
const MISC_ENABLE_FIXED: u64 = 1 << 11 | 1 << 12;
const MISC_ENABLE_KEPT: u64 = 1 << 0 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// What KVM's guests have long been told; nothing can be loaded.
const MICROCODE_REVISION: u64 = 0x0100_0065;
/// HWCR bit 24: the TSC counts at the P0 rate. The others are kept as written: IGNNE, WBINVD and FFDIS emulation, monitor
/// in user mode, McStatusWrEn.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
const HWCR_VALID: u64 = 1 << 3 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 18 | HWCR_TSC_FREQ_SEL;
/// DE_CFG bit 1: LFENCE is serializing. It is on every supported host, and can't be turned off.
const DE_CFG_LFENCE: u64 = 1 << 1;
const MCG_STATUS_VALID: u64 = 7;
const KVM_CLOCK_ENABLE: u64 = 1 << 0;

impl MsrState {
    /// The state after power-on.
    pub fn new(config: MsrConfig) -> Self {
        Self {
            clock: KvmClock::new(config.tsc_khz),
            config,
            tsc_offset: config.tsc_offset,
            tsc_adjust: 0,
            tsc_aux: 0,
            misc_enable: MISC_ENABLE,
            mtrrs: Mtrrs::new(config.physical_bits),
            mcg_status: 0,
            hwcr: HWCR_TSC_FREQ_SEL,
            wall_clock: 0,
            unknown: [0; UNKNOWN_CAPACITY],
            unknown_used: 0,
            unknown_news: None,
            unknown_accesses: 0,
        }
    }

    /// The state, without what belongs to the machine.
    pub fn save(&self) -> SavedMsrs {
        SavedMsrs {
            clock: self.clock.save(),
            tsc_moved: self.tsc_moved(),
            tsc_adjust: self.tsc_adjust,
            tsc_aux: self.tsc_aux,
            misc_enable: self.misc_enable,
            mtrrs: self.mtrrs.clone(),
            mcg_status: self.mcg_status,
            hwcr: self.hwcr,
            wall_clock: self.wall_clock,
        }
    }

    /// Goes on with a state that was saved, on the machine of this one's configuration.
    ///
    /// # Errors
    /// What is impossible.
    pub fn restore(&mut self, saved: &SavedMsrs) -> Result<(), BadState> {
        require("MSRs", "MTRRs", saved.mtrrs.fits(self.config.physical_bits))?;
        require("MSRs", "machine-check status", saved.mcg_status & !MCG_STATUS_VALID == 0)?;
        require("MSRs", "HWCR", saved.hwcr & !HWCR_VALID == 0)?;
        require("MSRs", "TSC_AUX", self.config.tsc_aux || saved.tsc_aux == 0)?;
        self.clock.restore(saved.clock);
        self.tsc_offset = self.config.tsc_offset.wrapping_add(saved.tsc_moved);
        (self.tsc_adjust, self.tsc_aux) = (saved.tsc_adjust, saved.tsc_aux);
        self.mtrrs = saved.mtrrs.clone();
        self.misc_enable = saved.misc_enable & MISC_ENABLE_KEPT | MISC_ENABLE_FIXED;
        (self.mcg_status, self.hwcr, self.wall_clock) = (saved.mcg_status, saved.hwcr, saved.wall_clock);
        Ok(())
    }

    /// The state after power-on, as at the start. What was told of is not told again.
    pub fn power_cycle(&mut self) {
        let Self { unknown, unknown_used, unknown_news, unknown_accesses, .. } = *self;
        *self = Self { unknown, unknown_used, unknown_news, unknown_accesses, ..Self::new(self.config) };
    }

    /// The VM's time began at another value of the host's TSC than it was told: `offset` makes the guest's of it.
    pub fn rebase(&mut self, offset: u64) {
        self.tsc_offset = offset.wrapping_add(self.tsc_moved());
        self.config.tsc_offset = offset;
    }

    /// What is added to the host's TSC to make the guest's.
    pub fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// What the guest has added to its TSC since the start.
    pub fn tsc_moved(&self) -> u64 {
        self.tsc_offset.wrapping_sub(self.config.tsc_offset)
    }

    /// TSC_AUX.
    pub fn tsc_aux(&self) -> u32 {
        self.tsc_aux
    }

    /// An access to an unknown MSR that has not been reported yet.
    pub fn take_unknown(&mut self) -> Option<UnknownMsr> {
        self.unknown_news.take()
    }

    /// The unknown MSRs that were accessed, in the order of their first use, and the number of all such accesses.
    pub fn unknown(&self) -> (&[u32], u64) {
        (&self.unknown[..self.unknown_used], self.unknown_accesses)
    }

    fn note_unknown(&mut self, msr: u32, direction: Direction) {
        self.unknown_accesses = self.unknown_accesses.saturating_add(1);
        let seen = &self.unknown[..self.unknown_used];
        if self.unknown_used < UNKNOWN_CAPACITY && !seen.contains(&msr) {
            self.unknown[self.unknown_used] = msr;
            self.unknown_used += 1;
            self.unknown_news.get_or_insert(UnknownMsr { msr, direction });
        }
    }

    fn move_tsc(&mut self, by: u64) -> MsrEffect {
        self.tsc_offset = self.tsc_offset.wrapping_add(by);
        self.tsc_adjust = self.tsc_adjust.wrapping_add(by);
        MsrEffect::TscOffset
    }
}

/// The guest executes RDMSR.
pub fn rdmsr(state: &mut MsrState, lapic: &mut Lapic, vmcb: &impl VmcbMsrs, now: Now, msr: u32) -> Result<u64, Gp> {
    Ok(match classify(msr) {
        MsrClass::Vmcb(field) => vmcb.get(field),
        MsrClass::Zero => 0,
        MsrClass::Absent => return Err(Gp),
        MsrClass::Unknown => {
            state.note_unknown(msr, Direction::Read);
            return Err(Gp);
        }
        MsrClass::Soft(soft) => match soft {
            SoftMsr::Tsc => now.tsc,
            SoftMsr::TscAdjust => state.tsc_adjust,
            SoftMsr::TscAux if !state.config.tsc_aux => return Err(Gp),
            SoftMsr::TscAux => u64::from(state.tsc_aux),
            SoftMsr::TscDeadline => lapic.tsc_deadline(now),
            SoftMsr::ApicBase => lapic.apic_base(),
            SoftMsr::X2Apic => return lapic.rdmsr(now, msr),
            SoftMsr::Mtrr => return state.mtrrs.read(msr),
            SoftMsr::MiscEnable => state.misc_enable,
            SoftMsr::MicrocodeRevision => MICROCODE_REVISION,
            SoftMsr::McgStatus => state.mcg_status,
            SoftMsr::Hwcr => state.hwcr,
            SoftMsr::DeCfg => DE_CFG_LFENCE,
            SoftMsr::KvmSystemTime => state.clock.address().map_or(0, |gpa| gpa | KVM_CLOCK_ENABLE),
            SoftMsr::KvmWallClock => state.wall_clock,
        },
    })
}

/// The guest executes WRMSR.
pub fn wrmsr(
    state: &mut MsrState,
    lapic: &mut Lapic,
    vmcb: &mut impl VmcbMsrs,
    now: Now,
    msr: u32,
    value: u64,
) -> Result<MsrEffect, Gp> {
    match classify(msr) {
        MsrClass::Vmcb(field) => {
            let value = check_field(state, vmcb, field, value)?;
            vmcb.set(field, value);
            Ok(MsrEffect::None)
        }
        MsrClass::Zero => Ok(MsrEffect::None),
        MsrClass::Absent => Err(Gp),
        MsrClass::Unknown => {
            state.note_unknown(msr, Direction::Write);
            Err(Gp)
        }
        MsrClass::Soft(soft) => write_soft(state, lapic, now, soft, msr, value),
    }
}

fn write_soft(
    state: &mut MsrState,
    lapic: &mut Lapic,
    now: Now,
    soft: SoftMsr,
    msr: u32,
    value: u64,
) -> Result<MsrEffect, Gp> {
    Ok(match soft {
        SoftMsr::Tsc => state.move_tsc(value.wrapping_sub(now.tsc)),
        SoftMsr::TscAdjust => state.move_tsc(value.wrapping_sub(state.tsc_adjust)),
        SoftMsr::TscAux if !state.config.tsc_aux => return Err(Gp),
        SoftMsr::TscAux => {
            state.tsc_aux = u32::try_from(value).map_err(|_| Gp)?;
            MsrEffect::TscAux
        }
        SoftMsr::TscDeadline => apic_effect(lapic.set_tsc_deadline(now, value)),
        SoftMsr::ApicBase => apic_effect(lapic.set_apic_base(value)?),
        SoftMsr::X2Apic => apic_effect(lapic.wrmsr(now, msr, value)?),
        SoftMsr::Mtrr => {
            state.mtrrs.write(msr, value)?;
            MsrEffect::None
        }
        // Nothing in it can be changed, and kernels write back what they read; microcode "revision" is cleared before it
        // is read, as some CPUs want it.
        SoftMsr::MicrocodeRevision | SoftMsr::DeCfg => MsrEffect::None,
        SoftMsr::MiscEnable => {
            state.misc_enable = value & MISC_ENABLE_KEPT | MISC_ENABLE_FIXED;
            MsrEffect::None
        }
        SoftMsr::McgStatus => {
            state.mcg_status = within(value, MCG_STATUS_VALID)?;
            MsrEffect::None
        }
        SoftMsr::Hwcr => {
            state.hwcr = within(value, HWCR_VALID)? | HWCR_TSC_FREQ_SEL;
            MsrEffect::None
        }
        SoftMsr::KvmSystemTime => {
            let gpa = value & !KVM_CLOCK_ENABLE;
            if gpa & 3 != 0 {
                return Err(Gp);
            }
            state.clock.set_address((value & KVM_CLOCK_ENABLE != 0).then_some(gpa));
            MsrEffect::KvmClock
        }
        SoftMsr::KvmWallClock if value & 3 != 0 => return Err(Gp),
        SoftMsr::KvmWallClock => {
            state.wall_clock = value;
            MsrEffect::WallClock { gpa: value }
        }
    })
}

fn apic_effect(effect: LapicEffect) -> MsrEffect {
    match effect {
        LapicEffect::None => MsrEffect::None,
        LapicEffect::Interrupts => MsrEffect::Interrupts,
        LapicEffect::Timer => MsrEffect::Timer,
        LapicEffect::Ipi(command) => MsrEffect::Ipi(command),
    }
}

/// Checks a value for a register in the VMCB. An illegal one must not get there: VMRUN would fail, or carry it into the
/// guest where hardware would have refused it.
fn check_field(state: &MsrState, vmcb: &impl VmcbMsrs, field: VmcbField, value: u64) -> Result<u64, Gp> {
    match field {
        VmcbField::Efer => {
            let ffxsr = if state.config.ffxsr { EFER_FFXSR } else { 0 };
            let old = vmcb.get(VmcbField::Efer);
            // LMA is not the guest's to write, but a kernel that reads, changes and writes back has it in its value.
            let new = within(value & !EFER_LMA, EFER_SCE | EFER_LME | EFER_NXE | ffxsr)?;
            if (new ^ old) & EFER_LME != 0 && vmcb.get(VmcbField::Cr0) & CR0_PG != 0 {
                return Err(Gp);
            }
            Ok(new | old & EFER_LMA)
        }
        VmcbField::Pat => {
            // Uncacheable, write-combining, write-through, write-protect, write-back, UC- (APM vol. 2, 7.8.1).
            let legal = value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7));
            if legal { Ok(value) } else { Err(Gp) }
        }
        VmcbField::Lstar
        | VmcbField::Cstar
        | VmcbField::KernelGsBase
        | VmcbField::FsBase
        | VmcbField::GsBase
        | VmcbField::SysenterEsp
        | VmcbField::SysenterEip => canonical(value, state.config.linear_bits),
        VmcbField::Sfmask => within(value, 0xffff_ffff),
        VmcbField::Star | VmcbField::SysenterCs => Ok(value),
        VmcbField::Cr0 => Err(Gp),
    }
}

fn within(value: u64, valid: u64) -> Result<u64, Gp> {
    if value & !valid == 0 { Ok(value) } else { Err(Gp) }
}

/// The bits above a linear address are all alike: above the widest that the CPU has, in whichever mode it is.
fn canonical(value: u64, linear_bits: u32) -> Result<u64, Gp> {
    let unused = 64 - linear_bits;
    if (value as i64) << unused >> unused == value as i64 { Ok(value) } else { Err(Gp) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::lapic::{Destination, IpiKind, LapicConfig};
    use crate::devices::testing::Random;

    #[derive(Default)]
    struct Registers(std::collections::HashMap<&'static str, u64>);

    fn name(field: VmcbField) -> &'static str {
        match field {
            VmcbField::Cr0 => "cr0",
            VmcbField::Efer => "efer",
            VmcbField::Pat => "pat",
            VmcbField::Star => "star",
            VmcbField::Lstar => "lstar",
            VmcbField::Cstar => "cstar",
            VmcbField::Sfmask => "sfmask",
            VmcbField::KernelGsBase => "kernel_gs",
            VmcbField::FsBase => "fs",
            VmcbField::GsBase => "gs",
            VmcbField::SysenterCs => "sysenter_cs",
            VmcbField::SysenterEsp => "sysenter_esp",
            VmcbField::SysenterEip => "sysenter_eip",
        }
    }

    impl VmcbMsrs for Registers {
        fn get(&self, field: VmcbField) -> u64 {
            self.0.get(name(field)).copied().unwrap_or(0)
        }

        fn set(&mut self, field: VmcbField, value: u64) {
            assert_ne!(field, VmcbField::Cr0);
            self.0.insert(name(field), value);
        }
    }

    struct Vcpu {
        state: MsrState,
        lapic: Lapic,
        vmcb: Registers,
    }

    impl Vcpu {
        fn new() -> Self {
            let tsc_khz = 2_000_000;
            Self {
                state: MsrState::new(MsrConfig {
                    tsc_khz,
                    tsc_offset: 0u64.wrapping_sub(1000),
                    physical_bits: 40,
                    linear_bits: 48,
                    ffxsr: false,
                    tsc_aux: true,
                }),
                lapic: Lapic::new(LapicConfig { apic_id: 0, bootstrap: true, tsc_khz }),
                vmcb: Registers::default(),
            }
        }

        /// `host_tsc` is what the host's counter reads.
        fn now(&self, host_tsc: u64) -> Now {
            Now { ns: host_tsc / 2, tsc: host_tsc.wrapping_add(self.state.tsc_offset()) }
        }

        fn read(&mut self, msr: u32) -> Result<u64, Gp> {
            let now = self.now(5000);
            rdmsr(&mut self.state, &mut self.lapic, &self.vmcb, now, msr)
        }

        fn write(&mut self, msr: u32, value: u64) -> Result<MsrEffect, Gp> {
            let now = self.now(5000);
            wrmsr(&mut self.state, &mut self.lapic, &mut self.vmcb, now, msr, value)
        }
    }

    #[test]
    fn efer_keeps_its_rules() {
        let mut vcpu = Vcpu::new();
        let efer = 0xc000_0080;
        assert_eq!(vcpu.write(efer, EFER_SCE | EFER_LME | EFER_NXE), Ok(MsrEffect::None));
        for bit in [12, 13, 14, 15, 1, 63] {
            assert_eq!(vcpu.write(efer, 1 << bit), Err(Gp), "bit {bit} (12 is SVME)");
        }
        vcpu.vmcb.set(VmcbField::Efer, EFER_LME | EFER_LMA | EFER_NXE);
        vcpu.vmcb.0.insert("cr0", CR0_PG);
        assert_eq!(vcpu.write(efer, EFER_NXE), Err(Gp), "LME can't change while paging");
        assert_eq!(vcpu.write(efer, EFER_LME | EFER_SCE), Ok(MsrEffect::None));
        assert_eq!(vcpu.read(efer), Ok(EFER_LME | EFER_LMA | EFER_SCE), "LMA stays");
    }

    #[test]
    fn addresses_must_be_canonical_and_pat_legal() {
        let mut vcpu = Vcpu::new();
        for msr in [0xc000_0082, 0xc000_0083, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0x175, 0x176] {
            assert_eq!(vcpu.write(msr, 0x0000_8000_0000_0000), Err(Gp), "{msr:#x}");
            assert_eq!(vcpu.write(msr, 0xffff_8000_0000_1234), Ok(MsrEffect::None));
            assert_eq!(vcpu.read(msr), Ok(0xffff_8000_0000_1234));
        }
        assert_eq!(vcpu.write(0x277, 0x0002_0000_0000_0000), Err(Gp));
        assert_eq!(vcpu.write(0x277, 0x0407_0506_0007_0106), Ok(MsrEffect::None));
    }

    #[test]
    fn misc_enable_is_kept_within_what_it_has() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.read(0x1a0), Ok(0x1801));
        assert!(vcpu.write(0x1a0, u64::MAX).is_ok());
        assert_eq!(vcpu.read(0x1a0), Ok(0x4_00c5_1809));
        assert!(vcpu.write(0x1a0, 0).is_ok());
        assert_eq!(vcpu.read(0x1a0), Ok(0x1800));
    }

    #[test]
    fn tsc_and_adjust_move_together() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.read(0x10), Ok(4000));
        assert_eq!(vcpu.write(0x10, 10_000), Ok(MsrEffect::TscOffset));
        assert_eq!(vcpu.read(0x10), Ok(10_000));
        assert_eq!(vcpu.read(0x3b), Ok(6000));
        assert_eq!(vcpu.state.tsc_moved(), 6000);
        assert_eq!(vcpu.write(0x3b, 0), Ok(MsrEffect::TscOffset));
        assert_eq!((vcpu.read(0x10), vcpu.state.tsc_moved()), (Ok(4000), 0));
    }

    #[test]
    fn local_apic_is_reached() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.read(0x1b), Ok(0xfee0_0d00));
        assert_eq!(vcpu.read(0x802), Ok(0));
        let sent = vcpu.write(0x830, (3 << 32) + 0x40);
        let command = IpiCommand { kind: IpiKind::Fixed(0x40), destination: Destination::Physical(3) };
        assert_eq!(sent, Ok(MsrEffect::Ipi(command)));
        assert_eq!(vcpu.write(0x832, 0x4_00ec), Ok(MsrEffect::Timer));
        assert_eq!(vcpu.write(0x6e0, 1_000_000), Ok(MsrEffect::Timer));
        assert_eq!(vcpu.read(0x6e0), Ok(1_000_000));
        assert_eq!(vcpu.write(0x80b, 0), Ok(MsrEffect::Interrupts));
        assert_eq!(vcpu.write(0x80b, 1), Err(Gp));
    }

    #[test]
    fn clock_addresses() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.write(0x4b56_4d01, 0x5001), Ok(MsrEffect::KvmClock));
        assert_eq!((vcpu.state.clock.address(), vcpu.read(0x4b56_4d01)), (Some(0x5000), Ok(0x5001)));
        assert_eq!(vcpu.write(0x4b56_4d01, 0x5003), Err(Gp));
        assert_eq!(vcpu.write(0x4b56_4d01, 0), Ok(MsrEffect::KvmClock));
        assert_eq!(vcpu.state.clock.address(), None);
        assert_eq!(vcpu.write(0x4b56_4d00, 0x6000), Ok(MsrEffect::WallClock { gpa: 0x6000 }));
        assert_eq!(vcpu.write(0x4b56_4d00, 0x6001), Err(Gp));
    }

    #[test]
    fn what_kernels_touch_without_asking_works() {
        let mut vcpu = Vcpu::new();
        for (msr, value) in
            [(0x179, 0), (0xfe, 0x508), (0x2ff, 0xc06), (0x8b, 0x0100_0065), (0xc001_0015, 1 << 24), (0xc001_001f, 0)]
        {
            assert_eq!(vcpu.read(msr), Ok(value), "{msr:#x}");
        }
        assert_eq!(vcpu.write(0xc001_0015, 1 << 24 | 1 << 6), Ok(MsrEffect::None));
        assert_eq!(vcpu.write(0xc001_0015, 1 << 40), Err(Gp));
        assert_eq!(vcpu.read(0xc001_1029), Ok(2));
        assert_eq!(vcpu.write(0xc000_0103, 7), Ok(MsrEffect::TscAux));
        assert_eq!(vcpu.state.tsc_aux(), 7);
    }

    #[test]
    fn tsc_aux_is_absent_when_it_is_not_switched() {
        let mut vcpu = Vcpu::new();
        vcpu.state.config.tsc_aux = false;
        assert_eq!(vcpu.read(0xc000_0103), Err(Gp));
        assert_eq!(vcpu.write(0xc000_0103, 0), Err(Gp));
    }

    #[test]
    fn unknown_registers_fault_and_are_reported_once() {
        let mut vcpu = Vcpu::new();
        assert_eq!(vcpu.read(0x1234), Err(Gp));
        assert_eq!(vcpu.state.take_unknown(), Some(UnknownMsr { msr: 0x1234, direction: Direction::Read }));
        assert_eq!(vcpu.write(0x1234, 0), Err(Gp));
        assert_eq!(vcpu.state.take_unknown(), None);
        for msr in 0x4000..0x5000 {
            assert_eq!(vcpu.write(msr, 0), Err(Gp));
        }
        let (seen, accesses) = vcpu.state.unknown();
        assert_eq!((seen.len(), accesses), (UNKNOWN_CAPACITY, 2 + 0x1000));
        assert_eq!(vcpu.read(0x48), Err(Gp));
        assert_eq!(vcpu.state.unknown().1, 2 + 0x1000, "absent ones are not unknown");
    }

    #[test]
    fn random_writes_never_panic_and_reach_the_vmcb_only_when_legal() {
        let mut random = Random::new(10);
        let mut vcpu = Vcpu::new();
        let ranges = [0u32, 0x170, 0x200, 0x270, 0x6e0, 0x800, 0x4b56_4d00, 0xc000_0080, 0xc000_0100, 0xc001_0000];
        for _ in 0..300_000 {
            let base = ranges[random.below(ranges.len() as u64) as usize];
            let msr = base + random.below(0x80) as u32;
            let value = random.next() >> random.below(64);
            if random.below(2) == 0 {
                _ = vcpu.read(msr);
            } else {
                _ = vcpu.write(msr, value);
            }
            assert_eq!(vcpu.vmcb.get(VmcbField::Efer) & (1 << 12), 0);
            assert!(canonical(vcpu.vmcb.get(VmcbField::Lstar), 48).is_ok());
            assert!(vcpu.vmcb.get(VmcbField::Pat).to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)));
        }
    }
}
