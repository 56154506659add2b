//! What a processor says of itself (CPUID), its model-specific registers, and the clocks that go by them: each on every
//! processor. What is written must be there behind an exit, what must not be written is refused, and what CPUID does not
//! have is not there.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::provoke;
use crate::cpu::{inb, initial_apic_id, rdmsr, rdtsc, sleep, wrmsr};
use crate::traps::{self, GENERAL_PROTECTION, INVALID_OPCODE, count};
use crate::{apic, check, smp};

const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const MISC_ENABLE: u32 = 0x1a0;
const MCG_CAP: u32 = 0x179;
const EFER: u32 = 0xc000_0080;
const TSC_AUX: u32 = 0xc000_0103;
/// The paravirtual clock and the wall clock, by their numbers and by those that they had first.
const CLOCKS: [(u32, u32); 2] = [(0x4b56_4d01, 0x4b56_4d00), (0x12, 0x11)];
const TIMER: u8 = 0x53;

pub(super) fn run() {
    smp::everywhere(|number| {
        leaves();
        instructions();
        kept();
        refused();
        counter();
        clocks(number);
    });
    smp::everywhere(agreement);
}

/// CPUID's own consistency, and the leaves of a hypervisor.
fn leaves() {
    let (first, extended) = (__cpuid(0), __cpuid(0x8000_0000));
    check!(first.eax >= 0xd && extended.eax >= 0x8000_0008, "last leaves {:#x}, {:#x}", first.eax, extended.eax);
    let vendor = |leaf: core::arch::x86_64::CpuidResult| (leaf.ebx, leaf.ecx, leaf.edx);
    check!(vendor(first) == vendor(extended), "two vendors");
    let (id, one) = (initial_apic_id(), __cpuid(1));
    let own = if apic::is_x2apic() { apic::read(apic::ID) } else { apic::read(apic::ID) >> 24 };
    check!((own, __cpuid_count(0xb, 0).edx, __cpuid_count(0xb, 1).edx) == (id, id, id), "APIC ID {own}, {id}");
    check!(one.ebx >> 16 & 0xff == smp::count() as u32, "{} logical processors", one.ebx >> 16 & 0xff);
    check!(__cpuid(extended.eax.wrapping_add(0x100)).eax == 0, "a leaf behind the last");
    check!(one.ecx >> 31 == 1, "no hypervisor");
    let own = __cpuid(0x4000_0000);
    check!((own.ebx, own.ecx, own.edx) == (0x4b4d_564b, 0x564b_4d56, 0x4d), "the hypervisor's name");
    // Both numbers of the clocks' registers, and ports need no delay.
    let features = __cpuid(0x4000_0001).eax;
    check!(own.eax >= 0x4000_0001 && features & 0xb == 0xb, "features {features:#x} of {:#x}", own.eax);
    // No other interface is there beside it, nor in the leaves where another's features would be.
    for other in (0x4000_0002..0x4000_0010u32).chain((0x4000_0100..0x4001_0000).step_by(0x100)) {
        let leaf = __cpuid(other);
        check!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0, 0), "leaf {other:#x}: {leaf:x?}");
    }
}

/// Instructions that are there or not, as CPUID says.
fn instructions() {
    static LINE: AtomicU64 = AtomicU64::new(0);
    let (line, seven) = (LINE.as_ptr(), __cpuid_count(7, 0).ebx);
    let is_there = |work: &dyn Fn()| {
        let before = count(INVALID_OPCODE);
        work();
        count(INVALID_OPCODE) == before
    };
    // SAFETY: a cache line is written back; a fault is expected where there is none of the instruction.
    let flush = is_there(&|| unsafe { provoke!(["clflush [{a}]"] a = in(reg) line,) });
    check!(flush == (__cpuid(1).edx & 1 << 19 != 0), "CLFLUSH: {flush}");
    // SAFETY: as above.
    let flush = is_there(&|| unsafe { provoke!(["clflushopt [{a}]"] a = in(reg) line,) });
    check!(flush == (seven & 1 << 23 != 0), "CLFLUSHOPT: {flush}");
    // SAFETY: as above.
    let flush = is_there(&|| unsafe { provoke!(["clwb [{a}]"] a = in(reg) line,) });
    check!(flush == (seven & 1 << 24 != 0), "CLWB: {flush}");
    // SAFETY: reading a counter has no effect; the fault is expected.
    let rdpru = is_there(&|| unsafe {
        provoke!([".byte 0x0f, 0x01, 0xfd"] in("ecx") 0, out("eax") _, out("edx") _,);
    });
    check!(!rdpru && __cpuid(0x8000_0008).ebx & 1 << 4 == 0, "RDPRU");
    // SAFETY: the fault is expected.
    let monitor = is_there(&|| unsafe { provoke!(["monitor"] in("rax") line, in("ecx") 0, in("edx") 0,) });
    check!(!monitor && __cpuid(1).ecx & 1 << 3 == 0, "MONITOR");
    // SAFETY: the fault is expected.
    let vmrun = is_there(&|| unsafe { provoke!(["vmrun rax"] in("rax") 0u64,) });
    check!(!vmrun && __cpuid(0x8000_0001).ecx & 1 << 2 == 0, "VMRUN");
    if __cpuid_count(7, 0).ecx & 1 << 22 != 0 {
        wrmsr(TSC_AUX, 0x1_00);
        inb(0x80);
        let read: u64;
        // SAFETY: it only reads.
        unsafe { asm!(".byte 0xf3, 0x0f, 0xc7, 0xf8", out("rax") read) };
        check!(read == 0x100, "RDPID {read:#x}");
    }
}

/// What a control register holds.
macro_rules! control {
    ($register:literal) => {{
        let value: u64;
        // SAFETY: it only reads.
        unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nomem, nostack)) };
        value
    }};
}

/// A write of bits that do not exist: the fault is that of an instruction which was met, and has changed nothing.
fn not_taken(register: &str, value: u64, write: impl Fn(), read: impl Fn() -> u64) {
    let (faults, before) = (count(GENERAL_PROTECTION), read());
    write();
    let (flags, code, found) = (traps::last_debug().1, traps::last().0, read());
    check!(count(GENERAL_PROTECTION) == faults + 1 && found == before, "{register} took {value:#x}: {found:#x}");
    check!(flags & 1 << 16 != 0 && code == 0, "#GP of {register}: flags {flags:#x}, code {code:#x}");
}

/// Writes a register, and says whether that was refused.
fn put(msr: u32, value: u64) -> bool {
    let before = count(GENERAL_PROTECTION);
    // SAFETY: callers write what this kernel does not depend on, and put it back.
    unsafe { provoke!(["wrmsr"] in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,) };
    count(GENERAL_PROTECTION) != before
}

/// Reads a register, and says whether that was refused.
fn get_refused(msr: u32) -> bool {
    let before = count(GENERAL_PROTECTION);
    // SAFETY: reading has no effect, or faults, which is expected.
    unsafe { provoke!(["rdmsr"] in("ecx") msr, out("eax") _, out("edx") _,) };
    count(GENERAL_PROTECTION) != before
}

/// What is written is read, and what was there before can be put back.
fn kept() {
    const ADDRESS: u64 = 0x1234_5678_9abc;
    // Register, value, and the bits that are not the guest's to change.
    let all: [(u32, u64, u64); 17] = [
        (0x174, 0x1234, 0),
        (0x175, ADDRESS, 0),
        (0x176, ADDRESS, 0),
        (MISC_ENABLE, 0x4_00c5_0809, 0x1880),
        (0x17a, 5, 0),
        (0x200, 0x1234_5006, 0),
        (0x201, 0xf_ffff_f800, 0),
        (0x250, 0x0606_0606_0000_0606, 0),
        (0x277, 0x0707_0707, 0),
        (0x2ff, 0xc00, 0),
        (EFER, rdmsr(EFER) | 1, 0),
        (0xc000_0081, 0x0123_4567_89ab_cdef, 0),
        (0xc000_0082, ADDRESS, 0),
        (0xc000_0083, ADDRESS, 0),
        (0xc000_0084, 0xffff_ffff, 0),
        (0xc000_0101, ADDRESS, 0),
        (0xc000_0102, ADDRESS, 0),
    ];
    for (msr, value, fixed) in all {
        let before = rdmsr(msr);
        let value = value & !fixed | before & fixed;
        check!(!put(msr, value), "MSR {msr:#x} does not take {value:#x}");
        inb(0x80);
        let found = rdmsr(msr);
        check!(!put(msr, before), "MSR {msr:#x} does not take {before:#x} back");
        check!(found == value, "MSR {msr:#x}: {found:#x} instead of {value:#x}");
        check!(rdmsr(msr) == before, "MSR {msr:#x}: {:#x} instead of {before:#x} as before", rdmsr(msr));
    }
}

fn refused() {
    let efer = rdmsr(EFER);
    let base = rdmsr(apic::APIC_BASE);
    for (msr, value) in [
        (EFER, efer | 1 << 12),
        (EFER, efer | 1 << 1),
        (EFER, efer | 1 << 63),
        (EFER, efer & !(1 << 8)),
        (apic::APIC_BASE, base | 1),
        (apic::APIC_BASE, base | 1 << 51),
        (0x277, 2),
        (0x277, 3 << 56),
        (0x200, 2),
        (0x2ff, 1 << 8),
        (0xfe, 0x508),
        (0x17a, 1 << 20),
        (0xc001_0015, 1 << 40),
        (TSC_AUX, 1 << 32),
        (CLOCKS[0].0, 3),
        (CLOCKS[0].1, 2),
        (0x1234_5678, 0),
    ] {
        let before = if get_refused(msr) { 0 } else { rdmsr(msr) };
        check!(put(msr, value), "MSR {msr:#x} takes {value:#x}");
        check!(get_refused(msr) || rdmsr(msr) == before, "MSR {msr:#x} changed by what it refused");
    }
    let (cr3, cr4) = (control!("cr3"), control!("cr4"));
    for value in [u64::from(u32::MAX), cr4 | 1 << 30, cr4 | 1 << 31, cr4 | 1 << 30] {
        // SAFETY: the fault is expected.
        let write = || unsafe { provoke!(["mov cr4, {v}"] v = in(reg) value,) };
        not_taken("CR4", value, write, || control!("cr4"));
    }
    for value in [1 << 60, cr3 | 1 << 52, cr3 | 1 << 51, cr3 | 1 << 62] {
        // SAFETY: as above.
        let write = || unsafe { provoke!(["mov cr3, {v}"] v = in(reg) value,) };
        not_taken("CR3", value, write, || control!("cr3"));
    }
    // Banks of machine checks that the processor does not have.
    let banks = rdmsr(MCG_CAP) as u32 & 0xff;
    for msr in (banks..32).flat_map(|bank| 0x400 + 4 * bank..0x404 + 4 * bank) {
        check!(get_refused(msr) && put(msr, 0), "MSR {msr:#x} of no bank");
    }
}

/// The time stamp counter, and the timer that goes by it.
fn counter() {
    const FAR: u64 = 1 << 40;
    check!(rdmsr(TSC_ADJUST) == 0, "TSC_ADJUST {:#x}", rdmsr(TSC_ADJUST));
    let before = rdtsc();
    wrmsr(TSC_ADJUST, FAR);
    check!(rdtsc() - before >= FAR && rdtsc() - before < 2 * FAR, "adjusted by {:#x}", rdtsc() - before);
    check!(rdmsr(TSC_ADJUST) == FAR && rdmsr(TSC) >= before + FAR, "TSC_ADJUST {:#x}", rdmsr(TSC_ADJUST));
    if __cpuid(1).ecx & 1 << 24 != 0 {
        let came = count(TIMER);
        apic::write(apic::LVT_TIMER, u32::from(TIMER) | 2 << 17);
        let due = rdtsc() + 200_000;
        wrmsr(apic::TSC_DEADLINE, due);
        while count(TIMER) == came {
            sleep();
        }
        check!(rdtsc() >= due, "the deadline came too early");
        apic::write(apic::LVT_TIMER, 1 << 16);
    }
    // What is written to the counter is an adjustment, too.
    let before = rdtsc();
    wrmsr(TSC, 2 * FAR);
    let (now, adjusted) = (rdtsc(), rdmsr(TSC_ADJUST));
    check!((2 * FAR..3 * FAR).contains(&now), "the counter is {now:#x}");
    check!(2 * FAR - adjusted >= before - FAR, "the machine's own counter went back: {adjusted:#x}");
    wrmsr(TSC_ADJUST, 0);
    let now = rdtsc();
    check!(now >= before - FAR && now < FAR, "the counter is {now:#x} as before");
}

/// What the hypervisor writes: version, padding, TSC, time, multiplier, shift, flags.
#[repr(align(64))]
struct Clock([AtomicU32; 16]);

static CLOCK: [Clock; smp::MOST] = [const { Clock([const { AtomicU32::new(0) }; 16]) }; smp::MOST];

impl Clock {
    fn address(&self) -> u64 {
        core::ptr::from_ref(self).expose_provenance() as u64
    }

    fn word(&self, index: usize) -> u32 {
        self.0[index].load(Ordering::SeqCst)
    }

    fn wide(&self, index: usize) -> u64 {
        u64::from(self.word(index)) | u64::from(self.word(index + 1)) << 32
    }

    /// Nanoseconds, as the interface says that they are computed.
    fn now(&self) -> u64 {
        loop {
            let version = self.word(0);
            let ticks = rdtsc().wrapping_sub(self.wide(2));
            let shift = self.word(7) as u8 as i8;
            let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let now = self.wide(4).wrapping_add((u128::from(ticks) * u128::from(self.word(6)) >> 32) as u64);
            if version & 1 == 0 && self.word(0) == version {
                return now;
            }
        }
    }
}

fn clocks(number: usize) {
    const SECOND: u64 = 1_000_000_000;
    let clock = &CLOCK[number];
    for (system, wall) in CLOCKS {
        wrmsr(system, clock.address() | 1);
        check!(rdmsr(system) == clock.address() | 1, "clock {system:#x}: {:#x}", rdmsr(system));
        let (version, first) = (clock.word(0), clock.now());
        check!(
            version != 0 && clock.word(7) >> 8 & 1 == 1,
            "clock {system:#x}: version {version}, {:#x}",
            clock.word(7)
        );
        let second = clock.now();
        check!(second >= first && second - first < 10 * SECOND, "clock {system:#x}: {first}, {second}");
        // A counter that is moved does not move the clock.
        wrmsr(TSC_ADJUST, 1 << 41);
        let third = clock.now();
        check!(clock.word(0) != version, "clock {system:#x} was not told again");
        check!(third >= second && third - second < 10 * SECOND, "clock {system:#x}: {second}, {third}");
        wrmsr(TSC_ADJUST, 0);
        let date = Clock([const { AtomicU32::new(0) }; 16]);
        wrmsr(wall, date.address());
        let (version, seconds) = (date.word(0), date.word(1));
        check!(version != 0 && version & 1 == 0, "wall clock {wall:#x}: version {version}");
        // After 2020, in the time of this format.
        check!(seconds > 1_577_836_800, "wall clock {wall:#x}: {seconds}");
        // A clock that is turned off is left alone.
        wrmsr(system, 0);
        let version = clock.word(0);
        wrmsr(TSC_ADJUST, 1 << 41);
        wrmsr(TSC_ADJUST, 0);
        check!((clock.word(0), rdmsr(system)) == (version, 0), "clock {system:#x} goes on");
    }
}

/// All processors' clocks are one.
fn agreement(number: usize) {
    static BUSY: AtomicBool = AtomicBool::new(false);
    static LAST: AtomicU64 = AtomicU64::new(0);
    let clock = &CLOCK[number];
    wrmsr(CLOCKS[0].0, clock.address() | 1);
    for _ in 0..2000 {
        while BUSY.swap(true, Ordering::SeqCst) {
            core::hint::spin_loop();
        }
        let (last, now) = (LAST.load(Ordering::SeqCst), clock.now());
        check!(now >= last, "the clock of processor {number} is {} ns behind another's", last - now);
        LAST.store(now, Ordering::SeqCst);
        BUSY.store(false, Ordering::SeqCst);
    }
    wrmsr(CLOCKS[0].0, 0);
}
