//! The I/O APIC, its lines pulled by the test device.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::check;
use crate::cpu::{cli, outb, sti};
use crate::machine::{LINES, set_word, word};
use crate::smp;
use crate::traps::{self, count, count_on};

/// At how many interrupts the handler lowers the line.
static DOWN_AT: AtomicU32 = AtomicU32::new(0);

/// Which processor is to wait for an interrupt. It cannot ask the I/O APIC: its two registers are for one at a time.
static WAITS: AtomicUsize = AtomicUsize::new(0);

const SELECT: u64 = 0xfec0_0000;
const WINDOW: u64 = 0xfec0_0010;
const PIN: u8 = 14;
const VECTOR: u8 = 0x61;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const REMOTE_IRR: u64 = 1 << 14;

fn register(index: u8) -> u32 {
    set_word(SELECT, u32::from(index));
    word(WINDOW)
}

fn set_entry(pin: u8, entry: u64) {
    for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
        set_word(SELECT, u32::from(0x10 + 2 * pin + half));
        set_word(WINDOW, value);
    }
}

fn entry(pin: u8) -> u64 {
    u64::from(register(0x10 + 2 * pin)) | u64::from(register(0x11 + 2 * pin)) << 32
}

fn line(high: bool) {
    outb(LINES + u16::from(PIN), u8::from(high));
}

/// Lets pending interrupts in.
fn let_in() {
    sti();
    // Not PAUSE: QEMU's emulation keeps the shadow of STI over it.
    for _ in 0..100 {
        // SAFETY: it does nothing.
        unsafe { core::arch::asm!("nop") };
    }
    cli();
}

pub(super) fn run() {
    check!(register(1) & 0x00ff_0000 == 0x0017_0000, "24 inputs: {:#x}", register(1));
    set_entry(PIN, u64::from(VECTOR));
    edge();
    level();
    for number in 1..smp::count() {
        elsewhere(number);
    }
    set_entry(PIN, MASKED);
}

fn edge() {
    let before = count(VECTOR);
    line(true);
    let_in();
    check!(count(VECTOR) == before + 1, "an edge");
    line(true);
    let_in();
    check!(count(VECTOR) == before + 1, "no edge");
    line(false);
    set_entry(PIN, MASKED | u64::from(VECTOR));
    line(true);
    set_entry(PIN, u64::from(VECTOR));
    let_in();
    check!(count(VECTOR) == before + 1, "an edge while masked is lost");
    line(false);
    // Two edges before either is taken are one interrupt.
    for high in [true, false, true, false] {
        line(high);
    }
    let_in();
    check!(count(VECTOR) == before + 2, "edges that merge: {}", count(VECTOR) - before);
}

fn level() {
    set_entry(PIN, LEVEL | u64::from(VECTOR));
    let before = count(VECTOR);
    line(true);
    check!(entry(PIN) & REMOTE_IRR != 0, "remote IRR of an interrupt that is on its way");
    // The line stays up, so each end of interrupt brings another, until the handler lowers it at the third.
    DOWN_AT.store(before + 3, Ordering::SeqCst);
    traps::before_end(|vector| {
        if vector == VECTOR && count(VECTOR) >= DOWN_AT.load(Ordering::SeqCst) {
            line(false);
        }
    });
    let_in();
    let_in();
    let settled = count(VECTOR);
    check!(settled == before + 3, "{} interrupts by a level", settled - before);
    check!(entry(PIN) & REMOTE_IRR == 0, "remote IRR after the last end of interrupt");
    set_entry(PIN, MASKED | LEVEL | u64::from(VECTOR));
    line(true);
    let_in();
    check!(count(VECTOR) == settled, "a level while masked");
    set_entry(PIN, LEVEL | u64::from(VECTOR));
    let_in();
    check!(count(VECTOR) == settled + 1, "a level that was waiting");
    traps::before_end(|_| ());
}

/// To another processor, by its ID.
fn elsewhere(number: usize) {
    set_entry(PIN, (number as u64) << 56 | u64::from(VECTOR));
    WAITS.store(number, Ordering::SeqCst);
    smp::begin(|number| {
        if number != WAITS.load(Ordering::SeqCst) {
            return;
        }
        let before = count(VECTOR);
        while count(VECTOR) == before {
            crate::cpu::sleep();
        }
    });
    let before = count_on(number, VECTOR);
    // The other may not have begun to wait: it gets edges until it has seen one.
    while count_on(number, VECTOR) == before {
        line(true);
        line(false);
    }
    smp::finish();
}
