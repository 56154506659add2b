//! Suspend to RAM, and the clock's alarm that ends it (ACPI 6.5, 16.1): memory stays, everything else is as after power-on, and
//! the first processor goes on in real mode where the tables were told. Twice: the second time another processor puts the
//! machine to sleep, if there is one.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::boot::TRAMPOLINE;
use crate::cpu::{inb, inw, outb, outw, rdmsr, wrmsr};
use crate::machine::{self, acpi_table, bytes, set_word, word};
use crate::{apic, check, serial, smp, traps};

const LSTAR: u32 = 0xc000_0082;
const TSC_ADJUST: u32 = 0x3b;
const STATUS_ALARM: u16 = 1 << 10;
const STATUS_WAKE: u16 = 1 << 15;
const SLEEP: u16 = 1 << 13;
const ALARM: u8 = 0x20;
/// The start code lies there, so that the waking vector is no page.
const OFFSET: usize = 0x30;
const SCRATCH: u16 = 0x3ff;

/// How often the machine has been put to sleep, and whether somebody went on behind that.
static ROUND: AtomicU32 = AtomicU32::new(0);
static BEHIND: AtomicU32 = AtomicU32::new(0);

fn fadt() -> u64 {
    let table = acpi_table(b"FACP");
    check!(table.is_some(), "no FADT");
    table.unwrap_or(0)
}

fn event_port() -> u16 {
    word(fadt() + 56) as u16
}

/// What `\_S3` says is to be written.
fn sleep_type() -> u16 {
    let dsdt = u64::from(word(fadt() + 40));
    let aml = bytes(dsdt as u32, word(dsdt + 4) as usize);
    // Package, its length and number of elements, and the first element's prefix.
    let found = aml.windows(9).find(|window| window.starts_with(b"_S3_\x12"));
    check!(found.is_some_and(|window| window[7] == 0x0a), "no \\_S3");
    found.map_or(0, |window| u16::from(window[8]))
}

fn clock(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

fn set_clock(register: u8, value: u8) {
    outb(0x70, register);
    outb(0x71, value);
}

pub(super) fn run() -> ! {
    // None of this is to be left afterwards.
    wrmsr(LSTAR, 0x1234_5678);
    wrmsr(TSC_ADJUST, 1 << 40);
    wrmsr(apic::APIC_BASE, rdmsr(apic::APIC_BASE) | apic::X2APIC);
    apic::write(apic::TPR, 0x40);
    outb(SCRATCH, 0x77);
    sleep(0)
}

/// Puts the machine to sleep until the clock's next second, by that processor.
fn sleep(by: usize) -> ! {
    ROUND.fetch_add(1, Ordering::SeqCst);
    smp::prepare(0, OFFSET);
    // The waking vector, in FACS.
    set_word(u64::from(word(fadt() + 36)) + 12, (TRAMPOLINE + OFFSET) as u32);
    outw(event_port() + 2, STATUS_ALARM);
    [1, 3, 5].iter().for_each(|register| set_clock(*register, 0xff));
    clock(0x0c);
    set_clock(0x0b, clock(0x0b) | ALARM);
    if by == 0 {
        fall_asleep();
    }
    smp::begin(|number| {
        if number == 1 {
            fall_asleep();
        }
    });
    loop {
        core::hint::spin_loop();
    }
}

fn fall_asleep() -> ! {
    outw(word(fadt() + 64) as u16, sleep_type() << 10 | SLEEP);
    loop {
        BEHIND.fetch_add(1, Ordering::SeqCst);
    }
}

/// The first processor, awake again.
pub(super) fn woken() -> ! {
    let status = inw(event_port());
    check!(BEHIND.load(Ordering::SeqCst) == 0, "the machine went on behind the write that puts it to sleep");
    check!(status & (STATUS_WAKE | STATUS_ALARM) == STATUS_WAKE | STATUS_ALARM, "PM1 status {status:#x}");
    outw(event_port(), status);
    check!(inw(event_port()) & (STATUS_WAKE | STATUS_ALARM) == 0, "PM1 status {:#x}", inw(event_port()));
    check!(rdmsr(apic::APIC_BASE) == apic::WINDOW | apic::ENABLE | 1 << 8, "APIC base {:#x}", rdmsr(apic::APIC_BASE));
    check!(apic::read(apic::TPR) == 0, "task priority {:#x}", apic::read(apic::TPR));
    check!(
        (rdmsr(LSTAR), rdmsr(TSC_ADJUST)) == (0, 0),
        "LSTAR {:#x}, TSC_ADJUST {:#x}",
        rdmsr(LSTAR),
        rdmsr(TSC_ADJUST)
    );
    check!(inb(SCRATCH) == 0, "the serial port kept {:#x}", inb(SCRATCH));
    check!(clock(0x0b) & ALARM != 0 && clock(0x0c) & ALARM != 0, "the clock's alarm");
    for number in 1..smp::count() {
        smp::forget_one();
        smp::start(number);
    }
    smp::everywhere(|number| {
        check!(traps::processor() == number, "a processor that was started anew");
        check!(!apic::is_x2apic(), "the APIC of processor {number}");
    });
    if ROUND.load(Ordering::SeqCst) == 1 {
        sleep(usize::from(smp::count() > 1));
    }
    serial::print(format_args!("PASS: sleep\n"));
    machine::exit(0)
}
