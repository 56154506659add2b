//! Local APICs in both modes: registers, self-sent interrupts, timers, interrupts to others, and the ways between modes.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::provoke;
use crate::apic::{
    self, ASSERT, DFR, ENABLE, LDR, LOGICAL, LVT_TIMER, OTHERS, SELF, SVR, TIMER_CURRENT, TIMER_DIVIDE, TIMER_INITIAL,
    TPR, X2APIC,
};
use crate::check;
use crate::cpu::{cli, inb, initial_apic_id, rdmsr, rdtsc, sleep, sti, wrmsr};
use crate::smp;
use crate::traps::{self, GENERAL_PROTECTION};

const VECTOR: u8 = 0x41;
const HIGH: u8 = 0xe1;
const TIMER: u8 = 0x51;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;
const MASKED: u32 = 1 << 16;

pub(super) fn run() {
    smp::everywhere(|_| {
        check!(!apic::is_x2apic(), "the machine starts in xAPIC mode");
        window();
        one();
        transitions();
        check!(apic::is_x2apic(), "in x2APIC mode");
        check!(apic::read(apic::ID) == initial_apic_id(), "x2APIC ID {}", apic::read(apic::ID));
        one();
        // Back by way of off.
        let base = rdmsr(apic::APIC_BASE);
        wrmsr(apic::APIC_BASE, base & !(ENABLE | X2APIC));
        check!(__cpuid(1).edx & 1 << 9 == 0, "CPUID shows an APIC that is off");
        wrmsr(apic::APIC_BASE, base & !X2APIC);
        apic::enable();
    });
    others();
    smp::everywhere(|_| {
        wrmsr(apic::APIC_BASE, rdmsr(apic::APIC_BASE) | X2APIC);
        apic::enable();
    });
    others();
    moved();
    // As it was found.
    smp::everywhere(|_| {
        let base = rdmsr(apic::APIC_BASE);
        wrmsr(apic::APIC_BASE, base & !(ENABLE | X2APIC));
        wrmsr(apic::APIC_BASE, base & !X2APIC | ENABLE);
        apic::enable();
    });
}

/// What only the window has.
fn window() {
    check!(apic::read(apic::ID) >> 24 == initial_apic_id(), "ID {:#x}", apic::read(apic::ID));
    check!(apic::read(apic::VERSION) & 0xff >= 0x10, "version {:#x}", apic::read(apic::VERSION));
    apic::write(LDR, 0x0300_0000);
    check!(apic::read(LDR) == 0x0300_0000, "LDR {:#x}", apic::read(LDR));
    apic::write(DFR, 0);
    check!(apic::read(DFR) == 0x0fff_ffff, "DFR {:#x}", apic::read(DFR));
    apic::write(DFR, !0);
    // SAFETY: the fault is expected: in this mode there are no such MSRs.
    unsafe { provoke!(["rdmsr"] in("ecx") 0x802, out("eax") _, out("edx") _,) };
    check!(traps::count(GENERAL_PROTECTION) > 0, "x2APIC MSRs in xAPIC mode");
}

/// CR8 written while an interrupt waits: in each of the windows in which the hypervisor offers it to the processor.
fn task_priority_while_one_waits() {
    // SAFETY: CR8 holds interrupts back and nothing else.
    let set = |class: u64| unsafe { core::arch::asm!("mov cr8, {}", in(reg) class) };
    cli();
    apic::write(TPR, 0);
    let before = traps::count(VECTOR);
    apic::send(0, SELF | ASSERT | u32::from(VECTOR));
    // An exit, behind which the hypervisor knows that the interrupt can't be taken.
    inb(0x80);
    for class in (0..16).chain([0, 15]) {
        set(class);
        check!(u64::from(apic::read(TPR)) == class << 4, "TPR {:#x} for CR8 {class}", apic::read(TPR));
    }
    sti();
    for _ in 0..100 {
        inb(0x80);
    }
    check!(traps::count(VECTOR) == before, "a vector below the task priority came");
    set(0);
    while traps::count(VECTOR) == before {
        core::hint::spin_loop();
    }
    cli();
    check!(traps::count(VECTOR) == before + 1, "once");
    // SAFETY: what is not a priority is refused, and that is expected.
    unsafe { provoke!(["mov cr8, {class}"] class = in(reg) 16u64,) };
    check!(apic::read(TPR) == 0, "TPR {:#x} after a write that was refused", apic::read(TPR));
}

/// What both modes have, on one processor.
fn one() {
    apic::write(SVR, 0x1ff);
    task_priority_while_one_waits();
    apic::write(TPR, 0x50);
    let class: u64;
    // SAFETY: CR8 holds interrupts back and nothing else.
    unsafe { core::arch::asm!("mov {}, cr8", out(reg) class) };
    check!(class == 5, "CR8 {class} for TPR 0x50");
    // SAFETY: as above.
    unsafe { core::arch::asm!("mov cr8, {}", in(reg) 7u64) };
    check!(apic::read(TPR) == 0x70, "TPR {:#x} for CR8 7", apic::read(TPR));
    check!(apic::read(apic::PPR) == 0x70, "PPR {:#x}", apic::read(apic::PPR));

    let (low, high) = (traps::count(VECTOR), traps::count(HIGH));
    apic::send(0, SELF | ASSERT | u32::from(VECTOR));
    apic::send(0, SELF | ASSERT | u32::from(HIGH));
    sti();
    while traps::count(HIGH) == high {
        core::hint::spin_loop();
    }
    check!(traps::count(VECTOR) == low, "a vector below the task priority");
    cli();
    apic::write(TPR, 0);
    sti();
    while traps::count(VECTOR) == low {
        core::hint::spin_loop();
    }
    cli();
    check!((traps::count(VECTOR), traps::count(HIGH)) == (low + 1, high + 1), "each once");

    let mut expected = traps::count(TIMER);
    apic::write(TIMER_DIVIDE, 0xb);
    for (mode, count) in [(0, 100_000), (PERIODIC, 200_000)] {
        apic::write(LVT_TIMER, mode | u32::from(TIMER));
        apic::write(TIMER_INITIAL, count);
        let first = apic::read(TIMER_CURRENT);
        check!(first <= count, "current count {first} of {count}");
        for _ in 0..if mode == 0 { 1 } else { 3 } {
            expected += 1;
            while traps::count(TIMER) < expected {
                sleep();
            }
        }
        apic::write(TIMER_INITIAL, 0);
        check!(apic::read(TIMER_CURRENT) == 0, "a timer that was stopped");
        expected = traps::count(TIMER);
    }
    if __cpuid(1).ecx & 1 << 24 != 0 {
        apic::write(LVT_TIMER, DEADLINE | u32::from(TIMER));
        wrmsr(apic::TSC_DEADLINE, rdtsc() + 100_000);
        while traps::count(TIMER) == expected {
            sleep();
        }
        check!(rdmsr(apic::TSC_DEADLINE) == 0, "a deadline that has passed");
        wrmsr(apic::TSC_DEADLINE, 1);
        while traps::count(TIMER) == expected + 1 {
            sleep();
        }
    }
    apic::write(LVT_TIMER, MASKED);
}

/// From xAPIC mode to x2APIC mode; what is not allowed faults.
fn transitions() {
    let base = rdmsr(apic::APIC_BASE);
    wrmsr(apic::APIC_BASE, base | X2APIC);
    apic::enable();
    for bad in [base, base & !ENABLE | X2APIC, base | X2APIC | 1, base | X2APIC | 1 << 52] {
        let before = traps::count(GENERAL_PROTECTION);
        // SAFETY: the fault is expected.
        unsafe { provoke!(["wrmsr"] in("ecx") apic::APIC_BASE, in("eax") bad as u32, in("edx") (bad >> 32) as u32,) };
        check!(traps::count(GENERAL_PROTECTION) == before + 1, "APIC_BASE took {bad:#x}");
    }
}

static READY: AtomicUsize = AtomicUsize::new(0);

/// Interrupts from processor 0 to the others, by every kind of destination.
fn others() {
    let processors = smp::count();
    if processors == 1 {
        return;
    }
    READY.store(0, Ordering::SeqCst);
    let before: [u32; smp::MOST] = core::array::from_fn(|number| traps::count_on(number, VECTOR));
    smp::begin(|number| {
        if !apic::is_x2apic() {
            apic::write(DFR, !0);
            apic::write(LDR, 1 << (24 + number));
        }
        let seen = traps::count(VECTOR);
        READY.fetch_add(1, Ordering::SeqCst);
        while traps::count(VECTOR) < seen + 3 {
            sleep();
        }
    });
    while READY.load(Ordering::SeqCst) + 1 < processors {
        core::hint::spin_loop();
    }
    let arrived = |number: usize| traps::count_on(number, VECTOR) - before[number];
    let wait = |number: usize, count| {
        while arrived(number) < count {
            core::hint::spin_loop();
        }
    };
    apic::send(0, OTHERS | ASSERT | u32::from(VECTOR));
    (1..processors).for_each(|number| wait(number, 1));
    for number in 1..processors {
        apic::send(number as u32, ASSERT | u32::from(VECTOR));
        wait(number, 2);
        check!((number + 1..processors).all(|other| arrived(other) == 1), "a physical destination reaches one");
    }
    for number in 1..processors {
        // In x2APIC mode the logical ID follows from the ID and is the same for the first sixteen.
        apic::send(1 << number, LOGICAL | ASSERT | u32::from(VECTOR));
        wait(number, 3);
    }
    smp::finish();
    check!(arrived(0) == 0, "nobody sent to processor 0");
}

/// The window somewhere else.
fn moved() {
    let base = rdmsr(apic::APIC_BASE);
    wrmsr(apic::APIC_BASE, base & !(ENABLE | X2APIC));
    let elsewhere = 0xfed4_0000;
    wrmsr(apic::APIC_BASE, elsewhere | base & 0x100 | ENABLE);
    let version = crate::machine::word(elsewhere + u64::from(apic::VERSION));
    check!(version & 0xff >= 0x10, "version {version:#x} in a window that was moved");
    check!(crate::machine::word(apic::WINDOW + u64::from(apic::VERSION)) == !0, "nothing where it was");
    wrmsr(apic::APIC_BASE, base & !X2APIC);
}
