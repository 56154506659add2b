//! The guest's CPUID leaves.
//!
//! Made once a VM from the host's leaves: each register is the host's, reduced to an allow list, then completed with what
//! the hypervisor itself provides (x2APIC, TSC deadline, TSC_ADJUST, MTRRs, the hypervisor leaves) and with the topology:
//! one socket with as many cores as there are vCPUs, one thread each. What differs from vCPU to vCPU, or with its control
//! registers, is filled in by [`CpuidPolicy::query`].
//!
//! Left out on purpose: SVM and VMX (no nesting), MONITOR (MWAIT would idle the host CPU out of our hands), performance
//! counters, speculation controls (their MSRs are not switched), AVX-512 and anything else whose state is larger than AVX
//! but for protection keys, supervisor state (XSAVES), and SME/SEV. What needs XSAVE is left out unless the configuration
//! says that XCR0 is a vCPU's own ([`crate::cpu::extended`]).

use alloc::vec::Vec;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidRegs {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// What of a guest's CPUID says what its CPU can do: leaf, subleaf, and the bits that count. Names, topology, rates and
/// sizes do not: a guest that has been told them goes on with what it was told.
const FEATURE_LEAVES: [(u32, u32, [u32; 4]); 7] = [
    (0x1, 0, [0, 0, !L1_ECX_OSXSAVE, !L1_EDX_APIC]),
    (0x7, 0, [0, u32::MAX, u32::MAX, u32::MAX]),
    (0xd, 0, [u32::MAX, 0, 0, 0]),
    (0xd, 1, [u32::MAX, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
    (0x8000_0007, 0, [0, 0, 0, u32::MAX]),
    // Physical and linear address bits.
    (0x8000_0008, 0, [0xffff, u32::MAX, 0, 0]),
];

/// The host's CPUID.
pub trait HostCpuid {
    /// CPUID with `leaf` in EAX and `subleaf` in ECX. Leaves beyond the host's last are not asked for.
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidRegs;
}

/// The CPU that this code runs on; all are alike.
#[derive(Clone, Copy, Debug)]
pub struct ThisCpu;

impl HostCpuid for ThisCpu {
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidRegs {
        let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(leaf, subleaf);
        CpuidRegs { eax, ebx, ecx, edx }
    }
}

/// What the hypervisor can offer in this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// How many vCPUs there are, 1 to 255. Their APIC IDs are 0, 1, 2, …
    pub vcpus: u32,
    /// XCR0 is kept apart from the host's, so the guest may have XSAVE and AVX.
    pub xsave: bool,
    /// TSC_AUX is kept apart from the host's, so the guest may have RDTSCP and RDPID.
    pub tsc_aux: bool,
    /// Rate of the guest's TSC in kHz.
    pub tsc_khz: u64,
}

/// What the answer depends on besides leaf and subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidContext {
    /// APIC ID of the vCPU that asks.
    pub apic_id: u32,
    /// Its CR4.
    pub cr4: u64,
    /// Its XCR0.
    pub xcr0: u64,
}

const LAST_BASIC: u32 = 0xd;
const LAST_EXTENDED: u32 = 0x8000_0021;
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_FEATURES: u32 = 0x4000_0001;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// Rate of the clock that feeds the local APIC's timer, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// "KVMKVMKVM\0\0\0" in EBX, ECX, EDX.
const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
/// Bit 0: clock by MSRs 0x11 and 0x12. Bit 1: no delay needed after port accesses. Bit 3: clock by MSRs 0x4b564d00 and 01.
const FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 3;
/// That clock is the same on all vCPUs.
const STABLE_CLOCK: u32 = 1 << 24;
/// "TCGTCGTCGTCG" in EBX, ECX, EDX: what QEMU's emulation says of itself.
const EMULATED: [u32; 3] = [0x5447_4354, 0x4354_4743, 0x4743_5447];

/// Whether the host's CPU is QEMU's emulation (TCG).
///
/// Two things are not offered there, and long mode is kept from it while a guest does not page (`svm::vcpu::long_mode`):
/// - The paravirtual clock is not called stable, although it is: a Linux that is told so patches its clock's code while its
///   other CPUs run it, and the emulation (multi-threaded, 7.2) now and then goes on with a translation of the half-patched
///   instruction, whose INT3 then hits nobody's handler. Plain QEMU guests with eight CPUs die of it as well. A Linux that
///   is not told so never uses that code.
/// - CMPXCHG16B: the emulation (7.2) makes the flags after it of an outdated notion of where they are, so that RFLAGS may
///   be the low half of some register's value, the direction flag included. An interrupt or exit that comes before the
///   next instruction that sets flags saves them, and what returns restores them: Linux's slab allocator uses the
///   instruction just before it touches a page that may have been taken away. A Linux that is not offered it takes a lock.
///   (CMPXCHG8B has the same fault; no 64-bit kernel does without its bit, nor uses the instruction.)
#[must_use]
pub fn emulated(host: &impl HostCpuid) -> bool {
    // Only a hypervisor (leaf 1, ECX bit 31) has these leaves.
    let hosted = host.leaf(0, 0).eax >= 1 && host.leaf(1, 0).ecx & 1 << 31 != 0;
    let name = if hosted { host.leaf(HYPERVISOR, 0) } else { CpuidRegs::default() };
    [name.ebx, name.ecx, name.edx] == EMULATED
}

/// A set of bits.
const fn bits(list: &[u32]) -> u32 {
    let mut set = 0;
    let mut index = 0;
    while index < list.len() {
        set |= 1 << list[index];
        index += 1;
    }
    set
}

/// SSE3, PCLMULQDQ, SSSE3, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
const L1_ECX: u32 = bits(&[0, 1, 9, 17, 19, 20, 22, 23, 25, 30]);
/// Not offered by an emulated host.
const L1_ECX_CMPXCHG16B: u32 = bits(&[13]);
/// FMA, XSAVE, AVX, F16C.
const L1_ECX_XSAVE: u32 = bits(&[12, 26, 28, 29]);
/// X2APIC, TSC deadline, hypervisor present.
const L1_ECX_ADDED: u32 = bits(&[21, 24, 31]);
const L1_ECX_XSAVE_BIT: u32 = 1 << 26;
const L1_ECX_OSXSAVE: u32 = 1 << 27;
/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, SEP, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR, SSE, SSE2.
const L1_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
const L1_EDX_APIC: u32 = 1 << 9;
const L1_EDX_MTRR: u32 = 1 << 12;
const L1_EDX_HTT: u32 = 1 << 28;
/// ARAT: the APIC timer runs in all C-states.
const L6_EAX_ADDED: u32 = 1 << 2;
/// FSGSBASE, BMI1, SMEP, BMI2, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const L7_EBX: u32 = bits(&[0, 3, 7, 8, 9, 10, 18, 19, 20, 23, 24, 29]);
/// AVX2.
const L7_EBX_XSAVE: u32 = bits(&[5]);
/// TSC_ADJUST.
const L7_EBX_ADDED: u32 = bits(&[1]);
/// UMIP, PKU, GFNI, LA57.
const L7_ECX: u32 = bits(&[2, 3, 8, 16]);
const L7_ECX_PKU: u32 = 1 << 3;
const L7_ECX_OSPKE: u32 = 1 << 4;
const L7_ECX_LA57: u32 = 1 << 16;
/// VAES, VPCLMULQDQ.
const L7_ECX_XSAVE: u32 = bits(&[9, 10]);
const L7_ECX_RDPID: u32 = 1 << 22;
/// FSRM.
const L7_EDX: u32 = bits(&[4]);
/// x87, SSE, AVX, PKRU.
const XCR0_ALLOWED: u64 = 7 | XCR0_PKRU;
/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
const LD1_EAX: u32 = bits(&[0, 1, 2]);
/// LAHF, AltMovCr8, ABM, SSE4A, misaligned SSE, 3DNow prefetch, TBM, TOPOEXT.
const E1_ECX: u32 = bits(&[0, 4, 5, 6, 7, 8, 21, 22]);
/// XOP, FMA4.
const E1_ECX_XSAVE: u32 = bits(&[11, 16]);
const E1_ECX_CMP_LEGACY: u32 = 1 << 1;
/// What repeats leaf 1 on AMD, then SYSCALL, NX, MMX extensions, MMX, FXSR, FFXSR, 1 GiB pages, LM, 3DNow.
const E1_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 29, 30, 31]);
const E1_EDX_RDTSCP: u32 = 1 << 27;
/// Invariant TSC.
const E7_EDX: u32 = 1 << 8;
/// Linear address bits of paging with four and with five levels.
const LINEAR_BITS: u32 = 48;
const LINEAR_BITS_LA57: u32 = 57;
/// CLZERO.
const E8_EBX: u32 = bits(&[0]);
/// RstrFpErrPtrs.
const E8_EBX_XSAVE: u32 = bits(&[2]);
/// NoNestedDataBp, LFENCE always serializing, NullSelectClearsBase.
const E21_EAX: u32 = bits(&[0, 2, 6]);

/// The leaves of a VM.
#[derive(Clone, Debug)]
pub struct CpuidPolicy {
    entries: Vec<Entry>,
    vcpus: u32,
    /// What XCR0 may have; 0 without XSAVE.
    xcr0: u64,
    components: Vec<Component>,
    linear_bits: u32,
}

/// State that XSAVE manages beyond x87 and SSE.
#[derive(Clone, Copy, Debug)]
struct Component {
    /// Its bit in XCR0.
    bit: u64,
    bytes: u32,
    /// Where it is in the standard format.
    offset: u32,
    /// In the compacted format it begins at a multiple of 64 bytes.
    aligned: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    leaf: u32,
    /// `None`: the leaf has no subleaves.
    subleaf: Option<u32>,
    regs: CpuidRegs,
}

impl CpuidPolicy {
    /// The features: leaf, EAX, EBX, ECX, EDX. Equal for two machines between which a guest may move.
    #[must_use]
    pub fn features(&self) -> Vec<[u32; 5]> {
        let context = CpuidContext { apic_id: 0, cr4: 0, xcr0: 1 };
        let row = |(leaf, subleaf, mask): (u32, u32, [u32; 4])| {
            let CpuidRegs { eax, ebx, ecx, edx } = self.query(leaf, subleaf, context);
            [leaf, eax & mask[0], ebx & mask[1], ecx & mask[2], edx & mask[3]]
        };
        FEATURE_LEAVES.into_iter().map(row).collect()
    }

    /// Makes the leaves of a VM on this host.
    pub fn new(host: &impl HostCpuid, config: CpuidConfig) -> Self {
        let vcpus = config.vcpus.clamp(1, 255);
        let mut policy = Self { entries: Vec::new(), vcpus, xcr0: 0, components: Vec::new(), linear_bits: LINEAR_BITS };
        let basic = host.leaf(0, 0);
        let extended = host.leaf(0x8000_0000, 0);
        // A host leaf beyond the host's last one would return some other leaf's data on some CPUs.
        let last_basic = basic.eax;
        let last_extended = if extended.eax >= 0x8000_0000 { extended.eax.min(LAST_EXTENDED) } else { 0x8000_0000 };
        let ask = |leaf: u32, subleaf: u32| {
            let last = if leaf >= 0x8000_0000 { last_extended } else { last_basic };
            if leaf <= last { host.leaf(leaf, subleaf) } else { CpuidRegs::default() }
        };
        let emulated = emulated(host);
        policy.add_basic(&ask, basic, config, emulated);
        policy.add_extended(&ask, CpuidRegs { eax: last_extended, ..extended }, config);
        policy.add_hypervisor(config, if emulated { FEATURES } else { FEATURES | STABLE_CLOCK });
        policy
    }

    /// The answer to CPUID. Leaves that don't exist are all zero.
    pub fn query(&self, leaf: u32, subleaf: u32, context: CpuidContext) -> CpuidRegs {
        let found = self
            .entries
            .iter()
            .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|wanted| wanted == subleaf))
            .map(|entry| entry.regs);
        let mut regs = match (leaf, found) {
            // Beyond the last level, leaf 0xb still echoes the subleaf and the ID.
            (0xb, None) => CpuidRegs { ecx: subleaf & 0xff, ..CpuidRegs::default() },
            (_, found) => found.unwrap_or_default(),
        };
        match leaf {
            1 => {
                regs.ebx = regs.ebx & 0x00ff_ffff | context.apic_id << 24;
                if regs.ecx & L1_ECX_XSAVE_BIT != 0 && context.cr4 & CR4_OSXSAVE != 0 {
                    regs.ecx |= L1_ECX_OSXSAVE;
                }
            }
            0xb => regs.edx = context.apic_id,
            7 if regs.ecx & L7_ECX_PKU != 0 && context.cr4 & CR4_PKE != 0 => regs.ecx |= L7_ECX_OSPKE,
            0xd if subleaf == 0 && found.is_some() => regs.ebx = self.xsave_bytes(context.xcr0).0,
            0xd if subleaf == 1 && found.is_some() => regs.ebx = self.xsave_bytes(context.xcr0).1,
            0x8000_001e => {
                regs.eax = context.apic_id;
                regs.ebx = context.apic_id & 0xff;
            }
            _ => {}
        }
        regs
    }

    /// Whether the guest has XSAVE.
    pub fn has_xsave(&self) -> bool {
        self.xcr0 != 0
    }

    /// What the guest may put in XCR0; 0 without XSAVE.
    #[must_use]
    pub const fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Whether the guest may put `value` in XCR0: what it was offered, x87 always, and AVX not without SSE.
    pub fn allows_xcr0(&self, value: u64) -> bool {
        value & !self.xcr0 == 0 && value & 1 != 0 && (value & XCR0_AVX == 0 || value & XCR0_SSE != 0)
    }

    /// Bits of the guest's linear addresses, at most.
    pub fn linear_bits(&self) -> u32 {
        self.linear_bits
    }

    /// The bits that the guest may set in CR4 (APM vol. 2, 3.1.3): those of the features that it is offered.
    pub fn cr4_bits(&self) -> u64 {
        // TSD, PCE.
        const ALWAYS: u64 = 1 << 2 | 1 << 8;
        let context = CpuidContext { apic_id: 0, cr4: 0, xcr0: 1 };
        let (one, seven) = (self.query(1, 0, context), self.query(7, 0, context));
        // Bits of the feature word, and of CR4: VME and PVI, DE, PSE, PAE, MCE, PGE, OSFXSR, OSXMMEXCPT; PCIDE, OSXSAVE; FSGSBASE,
        // SMEP, SMAP; UMIP, PKE, LA57.
        let edx = [(1, 0), (1, 1), (2, 3), (3, 4), (6, 5), (7, 6), (13, 7), (24, 9), (25, 10)];
        let words = [
            (one.edx, &edx[..]),
            (one.ecx, &[(17, 17), (26, 18)]),
            (seven.ebx, &[(0, 16), (7, 20), (20, 21)]),
            (seven.ecx, &[(2, 11), (3, 22), (16, 12)]),
        ];
        let offered =
            words.into_iter().flat_map(|(word, bits)| bits.iter().filter(move |(bit, _)| word >> bit & 1 != 0));
        offered.fold(ALWAYS, |cr4, (_, bit)| cr4 | 1 << bit)
    }

    /// Bytes of the XSAVE area for `xcr0` in the standard format, and in the compacted one.
    fn xsave_bytes(&self, xcr0: u64) -> (u32, u32) {
        let enabled = self.components.iter().filter(|component| xcr0 & component.bit != 0);
        enabled.fold((LEGACY_BYTES, LEGACY_BYTES), |(standard, compacted), component| {
            let begin = if component.aligned { compacted.next_multiple_of(64) } else { compacted };
            (standard.max(component.offset + component.bytes), begin + component.bytes)
        })
    }

    fn add(&mut self, leaf: u32, subleaf: Option<u32>, regs: CpuidRegs) {
        self.entries.push(Entry { leaf, subleaf, regs });
    }

    fn add_basic(
        &mut self,
        ask: &impl Fn(u32, u32) -> CpuidRegs,
        basic: CpuidRegs,
        config: CpuidConfig,
        emulated: bool,
    ) {
        let with_xsave = |allowed: u32| if config.xsave { allowed } else { 0 };
        let cmpxchg16b = if emulated { 0 } else { L1_ECX_CMPXCHG16B };
        let one = ask(1, 0);
        // What is offered must not depend on what a small host happens to have, so the last leaf is always the same; the
        // leaves that the host lacks are zero.
        self.add(0, None, CpuidRegs { eax: LAST_BASIC, ..basic });
        let many = if self.vcpus > 1 { L1_EDX_HTT } else { 0 };
        self.add(
            1,
            None,
            CpuidRegs {
                eax: one.eax,
                ebx: one.ebx & 0x0000_ffff | self.vcpus << 16,
                ecx: one.ecx & (L1_ECX | cmpxchg16b | with_xsave(L1_ECX_XSAVE)) | L1_ECX_ADDED,
                edx: one.edx & L1_EDX | L1_EDX_APIC | L1_EDX_MTRR | many,
            },
        );
        // Cache descriptors and deterministic cache parameters exist on Intel; AMD has 0x8000_001d.
        self.add(2, None, ask(2, 0));
        for subleaf in 0..8 {
            let cache = ask(4, subleaf);
            if cache.eax & 0x1f == 0 {
                break;
            }
            let cores = (1 << self.id_bits()) - 1;
            let eax = cache.eax & 0x0000_3fff | self.sharing(cache.eax) << 14 | cores << 26;
            self.add(4, Some(subleaf), CpuidRegs { eax, ..cache });
        }
        self.add(6, None, CpuidRegs { eax: L6_EAX_ADDED, ..CpuidRegs::default() });
        let seven = ask(7, 0);
        if seven.ecx & L7_ECX_LA57 != 0 {
            self.linear_bits = LINEAR_BITS_LA57;
        }
        let rdpid = if config.tsc_aux { L7_ECX_RDPID } else { 0 };
        self.add(
            7,
            Some(0),
            CpuidRegs {
                eax: 0,
                ebx: seven.ebx & (L7_EBX | with_xsave(L7_EBX_XSAVE)) | L7_EBX_ADDED,
                ecx: seven.ecx & (L7_ECX | with_xsave(L7_ECX_XSAVE) | rdpid),
                edx: seven.edx & L7_EDX,
            },
        );
        // Two levels: a core with one thread, a package with all cores. EDX is filled in when asked.
        self.add(0xb, Some(0), CpuidRegs { eax: 0, ebx: 1, ecx: 1 << 8, edx: 0 });
        self.add(0xb, Some(1), CpuidRegs { eax: self.id_bits(), ebx: self.vcpus, ecx: 2 << 8 | 1, edx: 0 });
        if config.xsave && one.ecx & L1_ECX_XSAVE_BIT != 0 {
            self.add_xsave(ask);
        }
    }

    fn add_xsave(&mut self, ask: &impl Fn(u32, u32) -> CpuidRegs) {
        self.xcr0 = u64::from(ask(0xd, 0).eax) & XCR0_ALLOWED;
        let offered = self.xcr0;
        for number in [2, 9].into_iter().filter(|number| offered & 1 << number != 0) {
            let described = ask(0xd, number);
            let (bytes, offset, flags) = (described.eax & 0xfff, described.ebx & 0xffff, described.ecx & FLAG_ALIGNED);
            self.add(0xd, Some(number), CpuidRegs { eax: bytes, ebx: offset, ecx: flags, edx: 0 });
            self.components.push(Component { bit: 1 << number, bytes, offset, aligned: flags != 0 });
        }
        let most = self.xsave_bytes(self.xcr0).0;
        self.add(0xd, Some(0), CpuidRegs { eax: self.xcr0 as u32, ebx: 0, ecx: most, edx: 0 });
        self.add(0xd, Some(1), CpuidRegs { eax: ask(0xd, 1).eax & LD1_EAX, ..CpuidRegs::default() });
    }

    fn add_extended(&mut self, ask: &impl Fn(u32, u32) -> CpuidRegs, first: CpuidRegs, config: CpuidConfig) {
        let with_xsave = |allowed: u32| if config.xsave { allowed } else { 0 };
        self.add(0x8000_0000, None, first);
        let one = ask(0x8000_0001, 0);
        let legacy = if self.vcpus > 1 { E1_ECX_CMP_LEGACY } else { 0 };
        let rdtscp = if config.tsc_aux { E1_EDX_RDTSCP } else { 0 };
        // AMD repeats leaf 1's APIC and MTRR bits here; Intel has 0 there.
        let repeated = if one.edx & 1 != 0 { L1_EDX_APIC | L1_EDX_MTRR } else { 0 };
        self.add(
            0x8000_0001,
            None,
            CpuidRegs {
                eax: one.eax,
                ebx: one.ebx,
                ecx: one.ecx & (E1_ECX | with_xsave(E1_ECX_XSAVE)) | legacy,
                edx: one.edx & (E1_EDX | rdtscp) | repeated,
            },
        );
        // The name, and what AMD says about caches and TLBs, describe the host's CPU, which runs the guest.
        for leaf in [0x8000_0002, 0x8000_0003, 0x8000_0004, 0x8000_0005, 0x8000_0006, 0x8000_0019] {
            self.add(leaf, None, ask(leaf, 0));
        }
        let seven = ask(0x8000_0007, 0);
        self.add(0x8000_0007, None, CpuidRegs { edx: seven.edx & E7_EDX, ..CpuidRegs::default() });
        let eight = ask(0x8000_0008, 0);
        self.add(
            0x8000_0008,
            None,
            CpuidRegs {
                // Physical and linear address bits; 23:16 would be a guest's own limit.
                eax: eight.eax & 0xff | (eight.eax >> 8 & 0xff).min(self.linear_bits) << 8,
                ebx: eight.ebx & (E8_EBX | with_xsave(E8_EBX_XSAVE)),
                ecx: (self.vcpus - 1) | self.id_bits() << 12,
                edx: 0,
            },
        );
        if one.ecx & E1_ECX & 1 << 22 != 0 {
            for subleaf in 0..8 {
                let cache = ask(0x8000_001d, subleaf);
                if cache.eax & 0x1f == 0 {
                    break;
                }
                let eax = cache.eax & 0x0000_3fff | self.sharing(cache.eax) << 14;
                self.add(0x8000_001d, Some(subleaf), CpuidRegs { eax, ..cache });
            }
            // One thread a core, one node; IDs are filled in when asked.
            self.add(0x8000_001e, None, CpuidRegs::default());
        }
        self.add(0x8000_0021, None, CpuidRegs { eax: ask(0x8000_0021, 0).eax & E21_EAX, ..CpuidRegs::default() });
    }

    fn add_hypervisor(&mut self, config: CpuidConfig, features: u32) {
        let [ebx, ecx, edx] = SIGNATURE;
        self.add(HYPERVISOR, None, CpuidRegs { eax: HYPERVISOR_TIMING, ebx, ecx, edx });
        self.add(HYPERVISOR_FEATURES, None, CpuidRegs { eax: features, ..CpuidRegs::default() });
        let eax = u32::try_from(config.tsc_khz).unwrap_or(u32::MAX);
        self.add(HYPERVISOR_TIMING, None, CpuidRegs { eax, ebx: APIC_BUS_KHZ, ecx: 0, edx: 0 });
    }

    /// Bits of an APIC ID that number the cores of the package.
    fn id_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().ilog2()
    }

    /// How many IDs, less one, share a cache: a third-level cache belongs to the package, others to a core.
    fn sharing(&self, cache_eax: u32) -> u32 {
        if cache_eax >> 5 & 7 >= 3 { (1 << self.id_bits()) - 1 } else { 0 }
    }
}

const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;
const XCR0_SSE: u64 = 1 << 1;
const XCR0_AVX: u64 = 1 << 2;
const XCR0_PKRU: u64 = 1 << 9;
/// Legacy region and XSAVE header.
const LEGACY_BYTES: u32 = 576;
/// Of a component, ECX: aligned in the compacted format.
const FLAG_ALIGNED: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    /// A host that has every bit of every register set, up to its last leaves.
    struct Everything;

    impl HostCpuid for Everything {
        fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidRegs {
            let all = u32::MAX;
            match (leaf, subleaf) {
                (0, _) => CpuidRegs { eax: 0x20, ebx: 0x6874_7541, ecx: 0x444d_4163, edx: 0x6974_6e65 },
                (0x8000_0000, _) => CpuidRegs { eax: 0x8000_0028, ..self.leaf(0, 0) },
                // Cache leaves: levels 1, 1, 2, 3, then the end.
                (4 | 0x8000_001d, 0..4) => {
                    let level = [1, 1, 2, 3][subleaf as usize];
                    CpuidRegs { eax: all & !0xff | level << 5 | 1, ebx: all, ecx: all, edx: all }
                }
                (4 | 0x8000_001d, _) => CpuidRegs::default(),
                (0xd, 2) => CpuidRegs { eax: 256, ebx: 576, ecx: 0, edx: 0 },
                (0xd, 9) => CpuidRegs { eax: 8, ebx: 2432, ecx: 2, edx: 0 },
                _ => CpuidRegs { eax: all, ebx: all, ecx: all, edx: all },
            }
        }
    }

    /// A host with the least: two leaves.
    struct Nothing;

    impl HostCpuid for Nothing {
        fn leaf(&self, leaf: u32, _: u32) -> CpuidRegs {
            assert!(matches!(leaf, 0 | 1 | 0x8000_0000), "{leaf:#x} does not exist on this host");
            CpuidRegs { eax: if leaf == 0 { 1 } else { 0 }, ..CpuidRegs::default() }
        }
    }

    fn config(vcpus: u32, xsave: bool) -> CpuidConfig {
        CpuidConfig { vcpus, xsave, tsc_aux: false, tsc_khz: 2_400_000 }
    }

    fn context(apic_id: u32) -> CpuidContext {
        CpuidContext { apic_id, cr4: 0, xcr0: 1 }
    }

    #[test]
    fn what_must_not_be_seen_is_not_seen() {
        let policy = CpuidPolicy::new(&Everything, config(4, false));
        let query = |leaf, subleaf| policy.query(leaf, subleaf, context(0));
        let one = query(1, 0);
        for (name, bit) in
            [("MONITOR", 3), ("VMX", 5), ("FMA", 12), ("PDCM", 15), ("XSAVE", 26), ("OSXSAVE", 27), ("AVX", 28)]
        {
            assert_eq!(one.ecx >> bit & 1, 0, "{name}");
        }
        for (name, bit) in [("X2APIC", 21), ("TSC deadline", 24), ("hypervisor", 31)] {
            assert_eq!(one.ecx >> bit & 1, 1, "{name}");
        }
        assert_eq!(query(7, 0).ebx & (1 << 5 | 1 << 14 | 1 << 16 | 1 << 25), 0, "AVX2, MPX, AVX-512, PT");
        assert_eq!(query(7, 0).edx & (1 << 26 | 1 << 27 | 1 << 29 | 1 << 31), 0, "speculation controls");
        assert_eq!(query(7, 1), CpuidRegs::default());
        assert_eq!(query(0x8000_0001, 0).ecx & (1 << 2 | 1 << 3 | 1 << 9 | 1 << 10 | 1 << 23), 0, "SVM and friends");
        assert_eq!(query(0x8000_0001, 0).edx >> 27 & 1, 0, "RDTSCP without TSC_AUX");
        for leaf in
            [3, 5, 9, 0xa, 0xd, 0xe, 0x12, 0x14, 0x8000_000a, 0x8000_001f, 0x8000_0022, 0x8000_0028, 0x4000_0002]
        {
            assert_eq!(query(leaf, 0), CpuidRegs::default(), "{leaf:#x}");
        }
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        for (vcpus, id_bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)] {
            let policy = CpuidPolicy::new(&Everything, config(vcpus, false));
            let mut ids = std::collections::BTreeSet::new();
            for id in 0..vcpus {
                let query = |leaf, subleaf| policy.query(leaf, subleaf, context(id));
                assert_eq!(query(1, 0).ebx >> 24, id);
                assert_eq!(query(1, 0).ebx >> 16 & 0xff, vcpus);
                assert_eq!(query(1, 0).edx >> 28 & 1, u32::from(vcpus > 1));
                assert_eq!(query(0xb, 0), CpuidRegs { eax: 0, ebx: 1, ecx: 0x100, edx: id });
                assert_eq!(query(0xb, 1), CpuidRegs { eax: id_bits, ebx: vcpus, ecx: 0x201, edx: id });
                assert_eq!(query(0xb, 2), CpuidRegs { eax: 0, ebx: 0, ecx: 2, edx: id });
                assert_eq!(query(0x8000_0008, 0).ecx, (vcpus - 1) | id_bits << 12);
                let node = query(0x8000_001e, 0);
                assert_eq!((node.eax, node.ebx, node.ecx), (id, id, 0));
                assert_eq!(query(4, 0).eax >> 14 & 0xfff, 0, "first level is a core's own");
                assert_eq!(query(4, 3).eax >> 14 & 0xfff, (1 << id_bits) - 1, "third level is shared");
                assert_eq!(query(0x8000_001d, 3).eax >> 14 & 0xfff, (1 << id_bits) - 1);
                ids.insert(query(0xb, 0).edx);
            }
            assert_eq!(ids.len(), vcpus as usize);
        }
    }

    #[test]
    fn hypervisor_leaves() {
        let policy = CpuidPolicy::new(&Everything, config(1, false));
        let base = policy.query(0x4000_0000, 0, context(0));
        let name: std::vec::Vec<u8> =
            [base.ebx, base.ecx, base.edx].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(name, b"KVMKVMKVM\0\0\0");
        let features = policy.query(0x4000_0001, 0, context(0)).eax;
        assert_eq!(features, 0x0100_000b);
        assert_eq!(policy.query(base.eax, 0, context(0)).eax, 2_400_000);
    }

    #[test]
    fn an_emulated_host_offers_no_stable_clock_and_no_cmpxchg16b() {
        struct Emulated;
        impl HostCpuid for Emulated {
            fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidRegs {
                match leaf {
                    HYPERVISOR => {
                        let word = |at: usize| u32::from_le_bytes(*b"TCGTCGTCGTCG"[at..].first_chunk().unwrap());
                        CpuidRegs { eax: 0x4000_0001, ebx: word(0), ecx: word(4), edx: word(8) }
                    }
                    _ => Everything.leaf(leaf, subleaf),
                }
            }
        }
        let policy = CpuidPolicy::new(&Emulated, config(1, false));
        assert_eq!(policy.query(0x4000_0001, 0, context(0)).eax, 0xb);
        let everywhere = CpuidPolicy::new(&Everything, config(1, false));
        let cmpxchg16b = |policy: &CpuidPolicy| policy.query(1, 0, context(0)).ecx >> 13 & 1;
        assert_eq!((cmpxchg16b(&policy), cmpxchg16b(&everywhere)), (0, 1));
    }

    #[test]
    fn xsave_follows_the_configuration_and_the_control_registers() {
        let policy = CpuidPolicy::new(&Everything, config(1, true));
        let query = |leaf, subleaf, cr4, xcr0| policy.query(leaf, subleaf, CpuidContext { apic_id: 0, cr4, xcr0 });
        assert_eq!(query(1, 0, 0, 1).ecx >> 26 & 7, 0b101, "XSAVE and AVX, not yet enabled");
        assert_eq!(query(1, 0, CR4_OSXSAVE, 1).ecx >> 27 & 1, 1);
        assert_eq!(query(0xd, 0, 0, 3), CpuidRegs { eax: 0x207, ebx: 576, ecx: 2440, edx: 0 });
        assert_eq!((query(0xd, 0, 0, 7).ebx, query(0xd, 0, 0, 0x203).ebx), (832, 2440));
        assert_eq!(
            (query(0xd, 1, 0, 7).ebx, query(0xd, 1, 0, 0x207).ebx, query(0xd, 1, 0, 0x203).ebx),
            (832, 840, 584)
        );
        assert_eq!(query(0xd, 1, 0, 7).eax, 7, "no XSAVES");
        assert_eq!(query(0xd, 2, 0, 7), CpuidRegs { eax: 256, ebx: 576, ecx: 0, edx: 0 });
        assert_eq!(query(0xd, 9, 0, 7), CpuidRegs { eax: 8, ebx: 2432, ecx: 2, edx: 0 });
        assert_eq!(query(0xd, 3, 0, 7), CpuidRegs::default());
        for (value, allowed) in [
            (1, true),
            (3, true),
            (7, true),
            (0x207, true),
            (0x201, true),
            (0, false),
            (2, false),
            (5, false),
            (0xf, false),
            (1 << 63 | 1, false),
        ] {
            assert_eq!(policy.allows_xcr0(value), allowed, "{value:#x}");
        }
        assert!(!CpuidPolicy::new(&Everything, config(1, false)).has_xsave());
        assert_eq!(query(7, 0, 0, 1).ebx >> 5 & 1, 1, "AVX2");
        assert_eq!(query(7, 0, 0, 1).ebx >> 16 & 1, 0, "AVX-512 is not offered");
    }

    #[test]
    fn five_levels_and_keys_are_as_the_cpu_has_them() {
        let policy = CpuidPolicy::new(&Everything, config(1, false));
        let seven = |cr4| policy.query(7, 0, CpuidContext { apic_id: 0, cr4, xcr0: 1 }).ecx;
        assert_eq!((seven(0) & 1 << 16, seven(0) & 0x18, seven(CR4_PKE) & 0x18), (1 << 16, 8, 0x18));
        assert_eq!((policy.linear_bits(), policy.query(0x8000_0008, 0, context(0)).eax >> 8 & 0xff), (57, 57));
        let small = CpuidPolicy::new(&Nothing, config(1, false));
        assert_eq!((small.linear_bits(), small.query(7, 0, context(0)).ecx), (48, 0));
    }

    #[test]
    fn rdtscp_needs_a_switched_tsc_aux() {
        let policy = CpuidPolicy::new(&Everything, CpuidConfig { tsc_aux: true, ..config(1, false) });
        assert_eq!(policy.query(0x8000_0001, 0, context(0)).edx >> 27 & 1, 1);
        assert_eq!(policy.query(7, 0, context(0)).ecx >> 22 & 1, 1);
    }

    #[test]
    fn a_small_host_is_not_asked_for_what_it_lacks() {
        let policy = CpuidPolicy::new(&Nothing, config(2, true));
        let one = policy.query(1, 0, context(1));
        assert_eq!(one.ecx, L1_ECX_ADDED);
        assert_eq!(one.edx, L1_EDX_APIC | L1_EDX_MTRR | L1_EDX_HTT);
        assert_eq!(policy.query(0xd, 0, context(0)), CpuidRegs::default());
        assert_eq!(policy.query(0x8000_0000, 0, context(0)).eax, 0x8000_0000);
    }

    #[test]
    fn any_leaf_can_be_asked_for() {
        let mut random = Random::new(9);
        let policy = CpuidPolicy::new(&Everything, config(255, true));
        for _ in 0..100_000 {
            let leaf = random.next() as u32 & if random.below(2) == 0 { 0xc000_003f } else { u32::MAX };
            let context = CpuidContext { apic_id: random.next() as u32, cr4: random.next(), xcr0: random.next() };
            let regs = policy.query(leaf, random.next() as u32, context);
            if leaf == 1 {
                assert_eq!(regs.ecx >> 5 & 1, 0);
            }
        }
    }
}
