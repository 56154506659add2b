//! What a test kernel asks its machine before it does anything: Multiboot's information, fw_cfg, PCI, the test device.

use core::arch::asm;

use crate::boot::{PROBES, REAL_MODE_PROBE, TRAMPOLINE};
use crate::check;
use crate::cpu::{inb, inl, inw, outb, outl, outw};
use crate::machine::{TEST_RAM, boot_magic, bytes, command_line, fw_cfg, information, word};
use crate::smp;

/// What the loader and the ways to 64-bit mode leave.
pub(super) fn handover() {
    multiboot();
    firmware();
    modes();
}

pub(super) fn run() {
    handover();
    check!(&fw_cfg::<4>(0) == b"QEMU", "fw_cfg has no signature");
    check!(fw_cfg::<4>(0x11) == [0; 4], "fw_cfg item 0x11");
    let ram = u64::from_le_bytes(fw_cfg(3));
    check!(ram >> 10 == u64::from(information(8)) + 1024, "fw_cfg says {ram} bytes");
    outl(0xcf8, 0x8000_0000);
    check!(inl(0xcf8) == 0x8000_0000, "PCI address {:#x}", inl(0xcf8));
    check!(inl(0xcfc) == !0, "PCI device {:#x}", inl(0xcfc));
    pci();
    latch();
}

/// What firmware leaves for real mode: vectors that can be taken, and a timer that ticks at the 8259s.
fn firmware() {
    for vector in 1..256 {
        let target = word(4 * vector);
        check!(target >> 16 == 0xf000, "vector {vector:#x} of real mode: {target:#x}");
    }
    // IRR: behind its mask too a request shows.
    outb(0x20, 0x0a);
    while inb(0x20) & 1 == 0 {}
}

fn multiboot() {
    check!(boot_magic() == 0x2bad_b002, "magic {:#x}", boot_magic());
    check!(information(0) & 0x45 == 0x45, "flags {:#x}", information(0));
    check!(information(4) == 640, "{} KiB below", information(4));
    let (mut at, end) = (u64::from(information(48)), u64::from(information(48) + information(44)));
    let mut ram = 0;
    while at < end {
        if word(at + 20) == 1 {
            ram += u64::from(word(at + 12)) | u64::from(word(at + 16)) << 32;
        }
        at += 4 + u64::from(word(at));
    }
    check!(ram >> 10 == 640 + u64::from(information(8)), "{ram} bytes of RAM in the map");
    // With "module" on the command line there is one, and it holds this line.
    if command_line().ends_with(" module") {
        let module = u64::from(information(24));
        check!(information(0) & 8 != 0 && information(20) == 1, "no module");
        let (start, end) = (word(module), word(module + 4));
        let content = bytes(start, (end - start) as usize);
        check!(content == b"NR_CPUS=4\nTEST_DEVICE=1\n", "module {content:?}");
    }
}

/// The one PCI function: software finds it by scanning, sizes its BARs, and does its tests.
fn pci() {
    let select = |function: u32, register: u32| outl(0xcf8, 1 << 31 | function << 8 | register);
    let mut found = None;
    for function in 0..256 {
        select(function, 0);
        if (inw(0xcfc), inw(0xcfe)) == (0x1b36, 0x0005) {
            found = found.or(Some(function));
        }
    }
    let Some(function) = found else { return check!(false, "no PCI test device") };
    let bar = |number: u32| {
        select(function, 0x10 + 4 * number);
        let value = inl(0xcfc);
        outl(0xcfc, !0);
        let size = !(inl(0xcfc) & !0xf) + 1;
        outl(0xcfc, value);
        check!(inl(0xcfc) == value, "BAR {number} became {:#x}", inl(0xcfc));
        (value, size)
    };
    let ((memory, memory_size), (ports, _)) = (bar(0), bar(1));
    check!(memory & 0xf == 0 && memory_size == 4096, "BAR 0 {memory:#x}, {memory_size} bytes");
    check!(ports & 3 == 1, "BAR 1 {ports:#x}");
    let (at, ports) = (u64::from(memory), (ports & !3) as u16);
    // SAFETY: both are registers of the device.
    let put = |offset: u64, value: u8| unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>((at + offset) as usize).write_volatile(value);
    };
    let mut tests = 0;
    for number in 0..=255 {
        put(0, number);
        outb(ports, number);
        put(0, number);
        let width = word(at) >> 8 & 0xff;
        if width != 1 {
            break;
        }
        let (offset, value) = (word(at + 4), word(at + 8) as u8);
        put(u64::from(offset), value);
        put(u64::from(offset), value);
        check!(number != 0 || word(at + 12) == 2, "{} writes counted", word(at + 12));
        outb(ports, number);
        check!(inb(ports + 1) == 1 && inb(ports + 16) == b'p', "port test {number}");
        tests += 1;
    }
    check!(tests == 3, "{tests} tests");
}

fn latch() {
    outl(0xe0, 0x4433_2211);
    check!((inb(0xe1), inw(0xe2), inl(0xe0)) == (0x22, 0x4433, 0x4433_2211), "latch {:#x}", inl(0xe0));
    outb(0xe3, 0x55);
    outw(0xe0, 0x7766);
    check!(inl(0xe0) == 0x5533_7766, "latch {:#x}", inl(0xe0));
    let (mut out, mut back) = ([0x0102_0304_u32, 0x0506_0708], [0u32; 4]);
    // SAFETY: the counts are the arrays' lengths.
    unsafe {
        asm!("rep outsd", in("dx") 0xe0, inout("rcx") 2u64 => _, inout("rsi") out.as_mut_ptr() => _);
        asm!("rep insd", in("dx") 0xe0, inout("rcx") 4u64 => _, inout("rdi") back.as_mut_ptr() => _);
    }
    check!(back == [0x0506_0708; 4], "strings {back:x?}");
}

/// What the boot code left in other modes.
fn modes() {
    for (index, probe) in PROBES.iter().enumerate() {
        let version = probe.load(core::sync::atomic::Ordering::Relaxed);
        check!(version & 0xff >= 0x10, "mode {index}: version {version:#x}");
        let at = TEST_RAM + 0xf000 + 16 * index as u64;
        check!((0..4).all(|n| word(at + 4 * n) == 0x5aa5_c33c), "mode {index}: REP STOS");
    }
    if smp::count() > 1 {
        let moved = bytes((TRAMPOLINE + REAL_MODE_PROBE) as u32, 4);
        check!(moved == [0x12, 0x34, 0x56, 0x78], "real mode: {moved:x?}");
    }
}

/// Ends the machine by the old port.
pub(super) fn shut_down() {
    b"Shutdown".iter().for_each(|letter| outb(0x8900, *letter));
    loop {
        core::hint::spin_loop();
    }
}
