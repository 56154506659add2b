//! Anything that a guest can ask of its hypervisor, at random, on all processors at once: ports, model-specific registers,
//! CPUID, device memory, and holes in memory. Nothing is expected of it but that the machine goes on.
//!
//! Left out is what ends the guest by design: exit, reset and power-off, and interrupts that reset a processor. Sequences
//! are the same on every run.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

use super::provoke;
use crate::apic;
use crate::cpu::{inb, inl, inw, outb, outl, outw};
use crate::machine::TEST_RAM;
use crate::smp;

const ROUNDS: u32 = 20_000;

/// Ports that end the guest or its console, with the ports below from which a wide access reaches them.
const LEFT_OUT: [(u16, u16); 7] =
    [(0x61, 0x64), (0x8f, 0x92), (0xf1, 0xf7), (0x3f5, 0x3ff), (0x5fd, 0x607), (0xcf6, 0xcf9), (0x88fd, 0x8900)];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(super) fn run() {
    smp::everywhere(|number| {
        let mut random = Random(number as u64);
        for _ in 0..ROUNDS {
            match random.below(6) {
                0 | 1 => port(&mut random),
                2 => model_specific(&mut random),
                3 => {
                    let leaf = [0, 0x4000_0000, 0x8000_0000][random.below(3) as usize] + random.below(0x30) as u32;
                    __cpuid_count(leaf, random.below(40) as u32);
                }
                _ => memory(&mut random),
            }
        }
        refused();
    });
    // The clock of the serial port may have been set: the others have stopped, and this is for what is printed last.
    outb(0x3fb, 3);
}

fn port(random: &mut Random) {
    let devices = [0x20, 0x40, 0x70, 0xa0, 0xe0, 0x4d0, 0x510, 0x608, 0xcf8, 0x2000, 0x3e8];
    let port = match random.below(3) {
        0 => random.next() as u16,
        _ => devices[random.below(devices.len() as u64) as usize] + random.below(18) as u16,
    };
    if LEFT_OUT.iter().any(|(first, last)| (*first..=*last).contains(&port)) {
        return;
    }
    let value = random.next() as u32;
    match random.below(6) {
        0 => _ = inb(port),
        1 => _ = inw(port),
        2 => _ = inl(port),
        3 => outb(port, value as u8),
        4 => outw(port, value as u16),
        _ => outl(port, value),
    }
}

fn model_specific(random: &mut Random) {
    let known = [
        0x10,
        0x1b,
        0x3a,
        0x3b,
        0x8b,
        0xfe,
        0x174,
        0x179,
        0x17b,
        0x1a0,
        0x1d9,
        0x200,
        0x250,
        0x268,
        0x277,
        0x2ff,
        0x6e0,
        0x800,
        0x810,
        0x830,
        0x4b56_4d00,
        0x4b56_4d01,
        0xc000_0080,
        0xc000_0100,
        0xc001_0015,
        0xc001_0114,
        0xc001_0117,
    ];
    let msr = match random.below(4) {
        0 => random.next() as u32,
        _ => known[random.below(known.len() as u64) as usize] + random.below(16) as u32,
    };
    // SAFETY: reading has no effect, or faults, which is expected.
    unsafe { provoke!(["rdmsr"] in("ecx") msr, out("eax") _, out("edx") _,) };
    // Those that this kernel would not survive stay; so does the local APIC's mode. Clocks go where there is no RAM.
    let harmless = [0x8b, 0x1a0, 0x1d9, 0x250, 0x268, 0x2ff, 0x6e0, 0x4b56_4d00, 0x4b56_4d01, 0xc001_0015, 0xc001_0117];
    if harmless.contains(&msr) {
        let high = random.next() as u32 | 1 << 5;
        // SAFETY: none of these changes how this kernel's memory is reached.
        unsafe { provoke!(["wrmsr"] in("ecx") msr, in("eax") random.next() as u32, in("edx") high,) };
    }
}

fn memory(random: &mut Random) {
    let at = match random.below(4) {
        0 => TEST_RAM + random.below(0x1_1000),
        1 => apic::WINDOW + random.below(0x1000),
        2 => 0xfec0_0000 + random.below(0x50),
        _ => 0xc000_0000 + random.below(0x3ec0_0000),
    };
    let mut value = random.next();
    let read = random.below(2) == 0;
    if at & !0xfff == apic::WINDOW && !read && (0x2f9..0x310).contains(&(at & 0xfff)) {
        // Interrupts to processors are for other checks.
        return;
    }
    if at & !0xfff == 0xfec0_0000 {
        // Fixed interrupts only.
        value &= !0x700;
    }
    // SAFETY: the addresses are devices' or nobody's.
    unsafe {
        match (random.below(6), read) {
            (0, true) => asm!("mov {:r}, [{}]", out(reg) _, in(reg) at),
            (1, true) => asm!("mov {:e}, [{}]", out(reg) _, in(reg) at),
            (2, true) => asm!("movzx {:e}, word ptr [{}]", out(reg) _, in(reg) at),
            (3, true) => asm!("movzx {:e}, byte ptr [{}]", out(reg) _, in(reg) at),
            (4, true) => asm!("cmp [{}], {:e}", in(reg) at, in(reg) value),
            (_, true) => asm!("lodsq", inout("rsi") at => _, out("rax") _),
            (0, false) => asm!("mov [{}], {:r}", in(reg) at, in(reg) value),
            (1, false) => asm!("mov [{}], {:e}", in(reg) at, in(reg) value),
            (2, false) => asm!("mov [{}], {:x}", in(reg) at, in(reg) value),
            (3, false) => asm!("xchg [{}], {:e}", in(reg) at, inout(reg) value => _),
            (4, false) => asm!("lock or [{}], {:e}", in(reg) at, in(reg) value),
            (_, false) => asm!("rep stosb", inout("rcx") 3u64 => _, inout("rdi") at => _, in("al") value as u8),
        }
    }
}

/// Instructions that this machine's processors do not have, or not for guests.
fn refused() {
    // SAFETY: each faults, which is expected, or has no effect.
    unsafe {
        provoke!(["xsetbv"] in("ecx") 0, in("eax") 7, in("edx") 0,);
        provoke!(["vmrun rax"] in("rax") 0u64,);
        provoke!(["vmload rax"] in("rax") u64::MAX,);
        provoke!(["stgi"]);
        provoke!(["invlpga rax, ecx"] in("rax") 0u64, in("ecx") 0,);
        provoke!(["monitor"] in("rax") 0u64, in("ecx") 0, in("edx") 0,);
        provoke!(["rdpmc"] in("ecx") 99, out("eax") _, out("edx") _,);
        provoke!(["wbinvd"]);
        provoke!(["rsm"]);
        provoke!(["vmmcall"] inout("rax") u64::MAX => _,);
    }
}
