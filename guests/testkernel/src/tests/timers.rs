//! The 8254 by way of the I/O APIC and by way of the 8259s, and ACPI's timer, which the tables name.

use core::sync::atomic::Ordering;

use crate::cpu::{inb, inl, outb, rdtsc, sleep};
use crate::machine::{acpi_table, set_word, word};
use crate::traps::{self, count};
use crate::{apic, check};

const VECTOR: u8 = 0x71;
const BY_8259: u8 = 0x20;
const TICKS: u32 = 5;

pub(super) fn run() {
    // Rate generator, 1000 Hz.
    outb(0x43, 0x34);
    outb(0x40, 0xa9);
    outb(0x40, 0x04);
    by_ioapic();
    by_8259();
    pm_timer();
}

fn by_ioapic() {
    for (index, value) in [(0x15, 0), (0x14, u32::from(VECTOR))] {
        set_word(0xfec0_0000, index);
        set_word(0xfec0_0010, value);
    }
    wait(VECTOR);
    set_word(0xfec0_0000, 0x14);
    set_word(0xfec0_0010, 1 << 16);
}

fn by_8259() {
    traps::BY_8259.store(true, Ordering::SeqCst);
    for (port, value) in
        [(0x20, 0x11), (0xa0, 0x11), (0x21, BY_8259), (0xa1, BY_8259 + 8), (0x21, 4), (0xa1, 2), (0x21, 1), (0xa1, 1)]
    {
        outb(port, value);
    }
    outb(0xa1, 0xff);
    outb(0x21, 0xfe);
    apic::write(apic::LINT0, 0x700);
    wait(BY_8259);
    outb(0x21, 0xff);
    check!(inb(0x21) == 0xff, "mask of the 8259");
    traps::BY_8259.store(false, Ordering::SeqCst);
}

fn wait(vector: u8) {
    let before = count(vector);
    while count(vector) < before + TICKS {
        sleep();
    }
}

fn pm_timer() {
    let Some(fadt) = acpi_table(b"FACP") else { return check!(false, "no FADT") };
    let port = word(fadt + 76) as u16;
    let (first, from) = (inl(port), rdtsc());
    while inl(port) == first {}
    while rdtsc() - from < 1_000_000 {}
    let now = inl(port);
    check!(now.wrapping_sub(first) < 1 << 23, "the timer runs backwards: {first:#x}, {now:#x}");
}
