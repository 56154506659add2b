//! The machine that is touched: port devices, board, and two vCPUs' APICs and registers, connected as a VM connects them.

use nestling_hypervisor::devices::board::BoardConfig;
use nestling_hypervisor::devices::lapic::{IpiCommand, Lapic, LapicConfig, LapicEffect, LapicShared, route};
use nestling_hypervisor::devices::platform::{Platform, PlatformConfig};
use nestling_hypervisor::devices::ports::UnclaimedPorts;
use nestling_hypervisor::devices::{Now, Width};
use nestling_hypervisor::vm::policy::cpuid::{CpuidConfig, CpuidContext, CpuidPolicy, CpuidRegs, HostCpuid};
use nestling_hypervisor::vm::policy::msr::{self, MsrConfig, MsrEffect, MsrState, UNKNOWN_CAPACITY, VmcbMsrs};
use nestling_hypervisor::vm::policy::msr_list::VmcbField;

use crate::source::Source;

const VCPUS: usize = 2;
const TSC_KHZ: u64 = 2_400_000;
const CONSOLE_OUTPUT: usize = 4096;
const NO_SENDER: u32 = u32::MAX;
/// An I/O APIC has 24 inputs, and each can have sent once.
const MOST_MESSAGES: usize = 24;
/// CPUID 0x8000_0001, ECX: SVM, which a guest must not see.
const CPUID_SVM: u32 = 1 << 2;

/// Registers that live in a control block.
#[derive(Clone, Debug)]
struct Fields([u64; 32]);

impl VmcbMsrs for Fields {
    fn get(&self, field: VmcbField) -> u64 {
        self.0[field as usize]
    }

    fn set(&mut self, field: VmcbField, value: u64) {
        self.0[field as usize] = value;
    }
}

/// A host CPU that has everything.
struct Everything;

impl HostCpuid for Everything {
    fn leaf(&self, leaf: u32, _: u32) -> CpuidRegs {
        let most = match leaf {
            0 => 0x20,
            0x8000_0000 => 0x8000_0021,
            _ => u32::MAX,
        };
        CpuidRegs { eax: most, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX }
    }
}

#[derive(Debug)]
struct Vcpu {
    lapic: Lapic,
    msrs: MsrState,
    fields: Fields,
}

/// All of it.
#[derive(Debug)]
pub struct Machine {
    platform: Platform,
    vcpus: Vec<Vcpu>,
    shared: Vec<LapicShared>,
    cpuid: CpuidPolicy,
    ns: u64,
    ended: bool,
    output: Vec<u8>,
    /// What the guest has touched so far.
    pub accesses: u64,
}

impl Machine {
    /// A machine after power-on, with a board or without.
    pub fn new(source: &mut impl Source) -> Self {
        let board = (source.below(4) != 0).then_some(BoardConfig { ram_bytes: 64 << 20, vcpus: VCPUS as u32 });
        let config = PlatformConfig {
            wall_clock_s: source.below(1 << 35),
            console_output: CONSOLE_OUTPUT,
            board,
            ..PlatformConfig::default()
        };
        let msrs = MsrConfig {
            tsc_khz: TSC_KHZ,
            tsc_offset: 0,
            physical_bits: 40,
            linear_bits: 48,
            ffxsr: true,
            tsc_aux: true,
        };
        let vcpu = |number: u32| {
            let config = LapicConfig { apic_id: number, bootstrap: number == 0, tsc_khz: TSC_KHZ };
            let lapic = Lapic::new(config);
            let lapic = if board.is_some() { lapic.in_xapic_mode() } else { lapic };
            Vcpu { lapic, msrs: MsrState::new(msrs), fields: Fields([0; 32]) }
        };
        let cpuid = CpuidConfig { vcpus: VCPUS as u32, xsave: false, tsc_aux: true, tsc_khz: TSC_KHZ };
        Self {
            platform: Platform::new(config),
            vcpus: (0..VCPUS as u32).map(vcpu).collect(),
            shared: (0..VCPUS as u32).map(LapicShared::new).collect(),
            cpuid: CpuidPolicy::new(&Everything, cpuid),
            ns: 0,
            ended: false,
            output: Vec::new(),
            accesses: 0,
        }
    }

    /// Whether the guest has switched itself off.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    fn now(&self, vcpu: usize) -> Now {
        let tsc = (u128::from(self.ns) * u128::from(TSC_KHZ) / 1_000_000) as u64;
        Now { ns: self.ns, tsc: tsc.wrapping_add(self.vcpus[vcpu].msrs.tsc_offset()) }
    }

    /// One thing that a guest can do, or that happens to it.
    pub fn step(&mut self, source: &mut impl Source) {
        let vcpu = source.below(VCPUS as u64) as usize;
        match source.below(26) {
            20..=25 => self.likely(source, vcpu),
            0..=6 => self.port(source),
            7..=10 => self.memory(source, vcpu),
            11..=14 => self.register(source, vcpu),
            15 => self.cpuid(source, vcpu),
            16 => {
                // From a nanosecond to a quarter of an hour.
                let most = 1 << source.below(40);
                self.ns += source.below(most);
            }
            17 => self.pass_time(),
            18 => self.take_interrupts(vcpu),
            _ => self.outside(source),
        }
        self.settle(vcpu);
    }

    fn port(&mut self, source: &mut impl Source) {
        const BASES: [u16; 24] = [
            0x20, 0x40, 0x42, 0x60, 0x64, 0x70, 0x80, 0x92, 0xa0, 0xb2, 0xe0, 0xe4, 0xf4, 0x2f8, 0x3f8, 0x4d0, 0x510,
            0x600, 0x608, 0x620, 0xcf8, 0xcfc, 0x2000, 0x8900,
        ];
        let port = match source.below(8) {
            0 => source.next() as u16,
            _ => source.of(&BASES).wrapping_add(source.below(8) as u16),
        };
        // Those that end the guest by design: seldom, or no machine would come far.
        let ends =
            matches!(port, 0x61..=0x64 | 0x8f..=0x92 | 0xf1..=0xf7 | 0x601..=0x605 | 0xcf6..=0xcf9 | 0x88fd..=0x8903);
        if ends && source.below(256) != 0 {
            return;
        }
        let width = source.of(&[Width::Byte, Width::Byte, Width::Word, Width::Dword]);
        self.accesses += 1;
        if source.below(2) == 0 {
            let value = self.platform.io_read(self.ns, port, width);
            assert_eq!(value & !width.mask(), 0, "port {port:#x} gives more than was asked for");
        } else {
            let value = source.value() as u32 & width.mask();
            self.platform.io_write(self.ns, port, width, value);
        }
    }

    /// What a guest's drivers do: without it, devices would hardly ever be set up, and nothing would come of the rest.
    fn likely(&mut self, source: &mut impl Source, vcpu: usize) {
        let vector = 16 + source.below(240);
        match source.below(10) {
            0 => self.apic(vcpu, 0xf0, 0x100 | vector),
            1..=2 => self.apic(vcpu, 0xb0, 0),
            3 => {
                let kind = source.of(&[0, 0, 0, 1, 4]);
                self.apic(vcpu, 0x310, source.below(4) << 24);
                self.apic(vcpu, 0x300, vector | kind << 8 | source.below(4) << 18 | 1 << 14);
            }
            4 => self.apic(vcpu, 0x80, source.below(8) << 5),
            5 => {
                self.apic(vcpu, 0x320, vector | source.of(&[0, 0x2_0000, 0x4_0000]));
                self.apic(vcpu, 0x380, source.value() & 0xffff_ffff);
            }
            6 => {
                // An entry of the I/O APIC, edge or level, and its line.
                let pin = source.below(24);
                self.window(0xfec0_0000, 0x10 + 2 * pin);
                self.window(0xfec0_0010, vector | source.of(&[0, 0x8000, 0x800, 0x400]));
                self.out(0x2000 + pin as u16, Width::Dword, source.below(2) as u32);
            }
            7 => (0..source.below(40)).for_each(|byte| self.out(0x3f8, Width::Byte, byte as u32)),
            8 => {
                // Both 8259s, and the masks.
                for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0), (0x20, 0x20)] {
                    self.out(port, Width::Byte, value);
                }
            }
            _ => {
                // The PIT's first counter in any mode.
                self.out(0x43, Width::Byte, 0x30 | (source.below(6) as u32) << 1);
                self.out(0x40, Width::Byte, source.next() as u32);
                self.out(0x40, Width::Byte, source.below(3) as u32);
            }
        }
    }

    fn out(&mut self, port: u16, width: Width, value: u32) {
        self.accesses += 1;
        self.platform.io_write(self.ns, port, width, value & width.mask());
    }

    fn window(&mut self, gpa: u64, value: u64) {
        self.accesses += 1;
        self.platform.memory_write(self.ns, gpa, 4, value);
    }

    /// A register of a vCPU's APIC by its offset in the window, if the APIC is there.
    fn apic(&mut self, vcpu: usize, register: u64, value: u64) {
        self.accesses += 1;
        let now = self.now(vcpu);
        let effect = self.vcpus[vcpu].lapic.window_write(now, register, 4, value);
        self.lapic_effect(vcpu, effect);
        self.settle(vcpu);
    }

    fn memory(&mut self, source: &mut impl Source, vcpu: usize) {
        let base = source.of(&[0xfee0_0000, 0xfee0_0000, 0xfec0_0000, 0xff00_0000, 0xff00_ff00, 0]);
        let gpa = base + if base == 0 { source.below(1 << 40) } else { source.below(0x400) };
        let gpa = if source.below(4) == 0 { gpa } else { gpa & !0xf };
        let bytes = source.of(&[4, 4, 1, 2, 8]);
        if gpa % 4096 + bytes as u64 > 4096 {
            return;
        }
        let now = self.now(vcpu);
        let write = source.below(2) == 0;
        let value = source.value() & u64::MAX >> (64 - 8 * bytes);
        self.accesses += 1;
        let lapic = &mut self.vcpus[vcpu].lapic;
        if let Some(offset) = lapic.window_offset(gpa) {
            if write {
                let effect = lapic.window_write(now, offset, bytes, value);
                self.lapic_effect(vcpu, effect);
            } else {
                lapic.window_read(now, offset, bytes);
            }
        } else if write {
            self.platform.memory_write(self.ns, gpa, bytes, value);
        } else if source.below(4) == 0 {
            let old = source.value() & u64::MAX >> (64 - 8 * bytes);
            self.platform.memory_exchange(gpa, bytes, old, value);
        } else {
            self.platform.memory_read(self.ns, gpa, bytes);
        }
    }

    fn register(&mut self, source: &mut impl Source, vcpu: usize) {
        const BASES: [u32; 25] = [
            0x10,
            0x1b,
            0x3a,
            0x3b,
            0x8b,
            0xfe,
            0x174,
            0x179,
            0x1a0,
            0x1d9,
            0x200,
            0x250,
            0x268,
            0x277,
            0x2ff,
            0x400,
            0x6e0,
            0x800,
            0x810,
            0x820,
            0x830,
            0x4b56_4d00,
            0xc000_0080,
            0xc000_0100,
            0xc001_0010,
        ];
        let number = match source.below(12) {
            0 => source.next() as u32,
            _ => source.of(&BASES) + source.below(16) as u32,
        };
        let now = self.now(vcpu);
        self.accesses += 1;
        let Vcpu { lapic, msrs, fields } = &mut self.vcpus[vcpu];
        if source.below(2) == 0 {
            let _ = msr::rdmsr(msrs, lapic, fields, now, number);
        } else if let Ok(effect) = msr::wrmsr(msrs, lapic, fields, now, number, source.value()) {
            match effect {
                MsrEffect::Ipi(command) => self.send(vcpu as u32, &command),
                MsrEffect::WallClock { gpa } => assert_eq!(gpa % 4, 0),
                _ => {}
            }
        }
        let Vcpu { msrs, .. } = &mut self.vcpus[vcpu];
        let _ = msrs.take_unknown();
        assert!(msrs.unknown().0.len() <= UNKNOWN_CAPACITY);
    }

    fn cpuid(&mut self, source: &mut impl Source, vcpu: usize) {
        let leaf = source.of(&[0, 0, 0x8000_0000, 0x4000_0000, 0xffff_fff0]) + source.below(16) as u32;
        let leaf = if source.below(8) == 0 { source.next() as u32 } else { leaf };
        let context = CpuidContext { apic_id: vcpu as u32, cr4: source.next(), xcr0: 1 };
        self.accesses += 1;
        let answer = self.cpuid.query(leaf, source.below(20) as u32, context);
        assert!(leaf != 0x8000_0001 || answer.ecx & CPUID_SVM == 0, "the guest sees SVM");
        assert!(leaf != 0x8000_000a || answer == CpuidRegs::default(), "the guest sees what SVM has: {answer:x?}");
    }

    /// Time is looked at, by both vCPUs and for the ports.
    fn pass_time(&mut self) {
        self.platform.poll(self.ns);
        if let Some(due) = self.platform.next_deadline_ns() {
            assert!(due > self.ns, "the ports' deadline {due} has passed at {}", self.ns);
        }
        for vcpu in 0..VCPUS {
            let now = self.now(vcpu);
            let lapic = &mut self.vcpus[vcpu].lapic;
            lapic.poll(now);
            if let Some(due) = lapic.next_deadline_ns(now) {
                assert!(due > now.ns, "vCPU {vcpu}'s deadline {due} has passed at {}", now.ns);
            }
        }
    }

    fn take_interrupts(&mut self, vcpu: usize) {
        let pending = self.vcpus[vcpu].lapic.sync(&self.shared[vcpu]);
        let lapic = &mut self.vcpus[vcpu].lapic;
        if pending.init {
            lapic.init();
        }
        assert!(pending.nmis <= 2);
        if vcpu == 0 && self.platform.interrupt_asserted() && lapic.accepts_extint() {
            self.platform.interrupt_acknowledge();
        }
        // No vector goes into service twice without an end in between: more than there are is a loop.
        for _ in 0..=256 {
            let Some(vector) = lapic.deliverable() else { return };
            assert!(vector >> 4 > lapic.ppr() >> 4, "vector {vector:#x} is below the priority {:#x}", lapic.ppr());
            assert_eq!(lapic.acknowledge(), Some(vector));
            assert_eq!(lapic.ppr() >> 4, vector >> 4);
        }
        panic!("interrupts without end");
    }

    /// What comes from outside: keys, the power button, a reader of the console.
    fn outside(&mut self, source: &mut impl Source) {
        match source.below(4) {
            0 => {
                self.platform.console_push(self.ns, &source.next().to_le_bytes());
            }
            1 => self.platform.press_power_button(self.ns),
            2 => {
                let class = source.below(16) as u8;
                self.vcpus[0].lapic.set_cr8(class);
                assert_eq!(self.vcpus[0].lapic.cr8(), class);
            }
            _ => {
                self.platform.console_take(self.ns, &mut self.output);
                assert!(self.output.len() <= CONSOLE_OUTPUT, "{} bytes of output", self.output.len());
                self.output.clear();
            }
        }
    }

    fn lapic_effect(&mut self, vcpu: usize, effect: LapicEffect) {
        if let LapicEffect::Ipi(command) = effect {
            self.send(vcpu as u32, &command);
        }
    }

    fn send(&self, sender: u32, command: &IpiCommand) {
        for vcpu in route(command, sender, self.shared.iter()).iter() {
            assert!(vcpu < VCPUS, "an interrupt to vCPU {vcpu}");
            self.shared[vcpu].post(command.kind);
        }
    }

    /// Carries what the devices did to where it belongs.
    fn settle(&mut self, vcpu: usize) {
        self.vcpus[vcpu].lapic.publish(&self.shared[vcpu]);
        if let Some(vector) = self.vcpus[vcpu].lapic.take_ended() {
            self.platform.end_of_interrupt(vector);
        }
        let effects = self.platform.take_effects();
        self.ended |= effects.end.is_some();
        for taken in 0.. {
            let Some(message) = self.platform.take_message() else { break };
            assert!(taken < MOST_MESSAGES, "messages without end");
            let Some(command) = message.command() else { continue };
            for to in route(&command, NO_SENDER, self.shared.iter()).iter() {
                if message.level {
                    self.shared[to].post_level(message.vector);
                } else {
                    self.shared[to].post(command.kind);
                }
            }
        }
    }

    /// What holds whatever happened.
    ///
    /// # Panics
    /// If it does not.
    pub fn check(&self) {
        assert!(self.platform.unclaimed().ports().len() <= UnclaimedPorts::CAPACITY);
        for Vcpu { lapic, .. } in &self.vcpus {
            assert!(lapic.tpr() >> 4 == lapic.cr8());
            if let Some(vector) = lapic.deliverable() {
                assert!(vector >= 16 && !lapic.is_held_back());
            }
        }
    }
}
