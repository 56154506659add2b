//! Writes a random program: mostly instructions that a CPU knows, biased to those that a hypervisor has to do with.
//!
//! Left out on purpose is what ends QEMU's emulation (7.2) itself, which would hide what is looked for: LTR (of a null
//! selector, which a CPU refuses; the next event then finds "invalid tss"), CR0.NE cleared (an x87 error then raises its
//! interrupt line without the lock that this needs), data breakpoints in DR7 (met while an event is delivered, they take a
//! lock that is held already), and bit tests of a register with a LOCK prefix (which a CPU refuses; the translator uses an
//! address that nothing made, and aborts with "tcg fatal error"). Random bytes may still do any of it, but for the last:
//! that one was met in one guest of three hundred.

use super::{PROGRAMS, Random, SCRATCH, SCRATCH_BYTES};
use crate::machine::TEST_RAM;
use crate::{apic, boot};

/// The most bytes of a program.
const LENGTH: usize = 640;
const BREAKPOINT: u8 = 0xcc;
/// CR0.NE.
const NE: u32 = 1 << 5;

/// A program being written. What does not fit any more is left out.
struct Program {
    bytes: [u8; LENGTH],
    length: usize,
}

impl Program {
    fn push(&mut self, bytes: &[u8]) {
        if let Some(to) = self.bytes.get_mut(self.length..self.length + bytes.len()) {
            to.copy_from_slice(bytes);
            self.length += bytes.len();
        }
    }

    /// MOV to a register (by encoding), of 32 bits.
    fn set(&mut self, register: u8, value: u32) {
        self.push(&[0xb8 | register & 7]);
        self.push(&value.to_le_bytes());
    }
}

/// Writes a program at `at`, with breakpoints behind it.
pub(super) fn write(at: u64, random: &mut Random) {
    let mut program = Program { bytes: [BREAKPOINT; LENGTH], length: 0 };
    for _ in 0..1 + random.below(40) {
        step(&mut program, random);
    }
    unlock_bit_tests(&mut program.bytes);
    let to = core::ptr::with_exposed_provenance_mut::<u8>(at as usize);
    // SAFETY: the place is for programs only.
    unsafe { to.copy_from_nonoverlapping(program.bytes.as_ptr(), LENGTH) };
}

/// Makes another prefix, which means nothing there, of each LOCK before a BT, BTS, BTR or BTC of a register, wherever one may
/// begin.
fn unlock_bit_tests(code: &mut [u8]) {
    for at in 0..code.len().saturating_sub(2) {
        let register = match code[at..at + 3] {
            [0x0f, 0xa3 | 0xab | 0xb3 | 0xbb, operand] => operand >= 0xc0,
            [0x0f, 0xba, operand] => operand >= 0xe0,
            _ => false,
        };
        if register {
            let prefixes = code[..at].iter_mut().rev().take_while(|byte| is_prefix(**byte));
            prefixes.filter(|byte| **byte == 0xf0).for_each(|lock| *lock = 0x3e);
        }
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// An address, or something else, for a register.
pub(super) fn pointer(random: &mut Random) -> u64 {
    match random.below(14) {
        0 => TEST_RAM + random.below(0x1_0100),
        1 => apic::WINDOW + random.below(0x400),
        2 => apic::WINDOW + (random.below(0x40) << 4),
        3 => 0xfec0_0000 + random.below(0x50),
        4 => 0xff00_0000 - 8 + random.below(16),
        5 => SCRATCH + random.below(SCRATCH_BYTES),
        6 => SCRATCH + (random.below(SCRATCH_BYTES) & !0xfff) - random.below(16),
        7 => PROGRAMS + random.below(0x20_0000),
        8 => random.below(1 << 32),
        9 => random.below(0x40_0000),
        10 => random.below(64),
        11 => random.next(),
        12 => 0x3ff_fff0 + random.below(32),
        _ => u64::from(boot::table_address(random.below(6))) + (random.below(512) << 3),
    }
}

fn step(program: &mut Program, random: &mut Random) {
    match random.below(24) {
        0 => (0..1 + random.below(15)).for_each(|_| program.push(&[random.next() as u8])),
        1..=4 => on_memory(program, random),
        5 => control_register(program, random),
        6 | 7 => model_specific(program, random),
        8..=10 => port(program, random),
        11 => string(program, random),
        12 | 13 => system(program, random),
        14 => table_entry(program, random),
        15 => interprocessor(program, random),
        16 => program.push(&[0xcd, random.next() as u8]),
        17 => timer(program, random),
        18 => {
            program.push(random.of(&[&[0xf4][..], &[0xfa], &[0xfb, 0xf4], &[0xfa, 0xf4], &[0xf3, 0x90], &[0xeb, 0xfe]]))
        }
        19 => {
            // A loop over what came before.
            let back = 2 + random.below(program.length.min(100) as u64) as u8;
            program.push(&[random.of(&[0xe2, 0x75, 0x72, 0x71]), back.wrapping_neg()]);
        }
        20 => pointers(program, random),
        21 => cpuid(program, random),
        22 => test_device(program, random),
        _ => program.push(&[0x9d]),
    }
}

/// Prefixes, as often as not none.
fn prefixes(program: &mut Program, random: &mut Random) {
    for (prefix, one_in) in [(0x66, 5), (0x67, 16), (0xf2, 14), (0xf3, 10), (0xf0, 12), (0x64, 20), (0x2e, 30)] {
        if random.below(one_in) == 0 {
            program.push(&[prefix]);
        }
    }
    if random.below(2) == 0 {
        program.push(&[0x40 | random.below(16) as u8]);
    }
}

/// An operand: mostly memory through a register, with or without displacement.
fn operand(program: &mut Program, random: &mut Random) {
    let register = (random.below(8) << 3) as u8;
    match random.below(8) {
        0 => program.push(&[0xc0 | register | random.below(8) as u8]),
        1 => {
            program.push(&[0x44 | register, random.next() as u8, random.next() as u8]);
        }
        2 => {
            program.push(&[0x80 | register | random.of(&[0, 1, 2, 3, 5, 6, 7])]);
            program.push(&(random.next() as u32 & 0xfff).to_le_bytes());
        }
        3 => program.push(&[0x40 | register | random.of(&[0, 1, 2, 3, 5, 6, 7]), random.next() as u8]),
        _ => program.push(&[register | random.of(&[0, 1, 2, 3, 6, 7])]),
    }
}

/// Any instruction of one or two opcode bytes with an operand, and bytes that may be its immediate.
fn on_memory(program: &mut Program, random: &mut Random) {
    prefixes(program, random);
    match random.below(6) {
        0 | 1 => {
            let group = random.of(&[0u8, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38]);
            program.push(&[group + random.below(4) as u8]);
        }
        2 => program.push(&[random.of(&[
            0x80u8, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8f, 0xc0, 0xc1, 0xc6, 0xc7, 0xd0,
            0xd1, 0xd2, 0xd3, 0xd9, 0xdb, 0xdd, 0xdf, 0xf6, 0xf7, 0xfe, 0xff, 0x63, 0x69, 0x6b, 0xc4, 0xc5, 0x62,
        ])]),
        3 => program.push(&[
            0x0f,
            random.of(&[
                0x10u8, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xa3, 0xa4, 0xa5, 0xab,
                0xac, 0xad, 0xae, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1,
                0xc3, 0xc7, 0xd6, 0xe7, 0xf0, 0x0d, 0x18, 0x1f,
            ]),
        ]),
        4 => match random.next() as u8 {
            // Group 6, where LTR is, and writes to debug registers.
            0 | 0x23 => return,
            opcode => program.push(&[0x0f, opcode]),
        },
        _ => program.push(&[0x0f, random.of(&[0x38u8, 0x3a]), random.next() as u8]),
    }
    operand(program, random);
    if random.below(3) == 0 {
        program.push(&(random.next() as u32).to_le_bytes());
    }
}

/// MOV to and from control and debug registers, with values near those that stand there.
fn control_register(program: &mut Program, random: &mut Random) {
    let number = random.of(&[0u8, 0, 2, 3, 3, 4, 4, 8, 8, 8, 1, 5, 15]);
    let prefix = 0x40 | (number >> 3) << 2;
    let register = (number & 7) << 3;
    if random.below(3) == 0 {
        // Debug registers too; of those that are written, not the one that switches breakpoints on.
        let (opcode, number) = random.of(&[(0x20, number), (0x21, number), (0x21, 7), (0x23, 0), (0x23, 3), (0x23, 6)]);
        program.push(&[prefix & !4, 0x0f, opcode, 0xc0 | (number & 7) << 3 | random.below(8) as u8]);
        return;
    }
    program.push(&[prefix, 0x0f, 0x20, 0xc0 | register]);
    match random.below(4) {
        // BTC of one bit.
        0 | 1 => {
            let bit = random.below(if number == 4 { 26 } else { 64 }) as u8;
            program.push(&[0x48, 0x0f, 0xba, 0xf8, if number == 0 && bit == 5 { 16 } else { bit }]);
        }
        2 => program.set(0, random.next() as u32 & 0xf | NE),
        _ => program.set(0, random.next() as u32 | NE),
    }
    program.push(&[prefix, 0x0f, 0x22, 0xc0 | register]);
}

fn model_specific(program: &mut Program, random: &mut Random) {
    let known = [
        0x10,
        0x1b,
        0x3a,
        0x8b,
        0xfe,
        0x174,
        0x175,
        0x176,
        0x179,
        0x1a0,
        0x1d9,
        0x200,
        0x250,
        0x268,
        0x277,
        0x2ff,
        0x6e0,
        0x800,
        0x808,
        0x80b,
        0x80f,
        0x810,
        0x820,
        0x830,
        0x832,
        0x838,
        0x839,
        0x83e,
        0x83f,
        0xda0,
        0x4000_0000,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d02,
        0xc000_0080,
        0xc000_0081,
        0xc000_0082,
        0xc000_0084,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0xc000_0103,
        0xc001_0010,
        0xc001_0015,
        0xc001_0055,
        0xc001_0114,
        0xc001_0117,
        0xc001_1029,
    ];
    let msr = match random.below(5) {
        0 => random.next() as u32,
        1 => random.of(&known) + random.below(16) as u32,
        _ => random.of(&known),
    };
    program.set(1, msr);
    if random.below(2) == 0 {
        program.push(&[0x0f, 0x32]);
        if random.below(2) == 0 {
            return;
        }
        // Written back with one bit changed.
        program.push(&[0x0f, 0xba, 0xf8 | random.of(&[0, 2]), random.below(32) as u8, 0x0f, 0x30]);
        return;
    }
    let low = match random.below(3) {
        0 => random.next() as u32,
        1 => pointer(random) as u32,
        _ => random.below(256) as u32,
    };
    program.set(0, low);
    program.set(2, if random.below(3) == 0 { random.next() as u32 } else { 0 });
    program.push(&[0x0f, 0x30]);
}

fn port(program: &mut Program, random: &mut Random) {
    let devices = [
        0x20u16, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x80, 0x92, 0xa0, 0xb2, 0xe0, 0xe4, 0x2f8, 0x3f8, 0x4d0, 0x510,
        0x514, 0x600, 0x604, 0x608, 0x620, 0xcd6, 0xcf8, 0xcfc, 0x2000,
    ];
    let port = match random.below(6) {
        0 => random.next() as u16,
        _ => random.of(&devices) + random.below(10) as u16,
    };
    // These end the guest by design: seldom, or nothing else would happen.
    if matches!(port, 0x64 | 0x92 | 0xf4..=0xf7 | 0x604 | 0x605 | 0xcf9) && random.below(16) != 0 {
        return;
    }
    program.set(2, u32::from(port));
    program.set(0, random.next() as u32);
    match random.below(4) {
        0 => {
            if random.below(2) == 0 {
                program.set(1, random.below(64) as u32);
                program.push(&[0xf3]);
            }
            program.push(random.of(&[&[0x6c][..], &[0x6d], &[0x6e], &[0x6f], &[0x66, 0x6d], &[0x66, 0x6f]]));
        }
        1 => program.push(&[random.of(&[0xe4, 0xe5, 0xe6, 0xe7]), port as u8]),
        _ => program.push(random.of(&[&[0xec][..], &[0xed], &[0xee], &[0xef], &[0x66, 0xed], &[0x66, 0xef]])),
    }
}

fn string(program: &mut Program, random: &mut Random) {
    program.set(1, if random.below(8) == 0 { random.next() as u32 } else { random.below(600) as u32 });
    program.set(6, pointer(random) as u32);
    program.set(7, pointer(random) as u32);
    program.push(random.of(&[&[0xfc][..], &[0xfd], &[]]));
    program.push(random.of(&[&[0xf3][..], &[0xf2], &[], &[0x66, 0xf3], &[0xf3, 0x48], &[0x67, 0xf3]]));
    program.push(&[random.of(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf])]);
}

/// Privileged instructions, those of the virtualisation extension among them, and what switches modes.
fn system(program: &mut Program, random: &mut Random) {
    if random.below(8) == 0 {
        program.push(&[random.of(&[0x48u8, 0x66, 0x67, 0xf3])]);
    }
    if random.below(100) == 0 {
        // Far jumps and calls: most are into nowhere, and the end.
        program.push(&[0xff, random.of(&[0x28, 0x1b])]);
    }
    program.push(random.of(&[
        &[0x0f, 0x01, 0xd8][..],
        &[0x0f, 0x01, 0xd9],
        &[0x0f, 0x01, 0xda],
        &[0x0f, 0x01, 0xdb],
        &[0x0f, 0x01, 0xdc],
        &[0x0f, 0x01, 0xdd],
        &[0x0f, 0x01, 0xde],
        &[0x0f, 0x01, 0xdf],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0x01, 0xd0],
        &[0x0f, 0x01, 0xd1],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x01, 0xf9],
        &[0x0f, 0x01, 0x10],
        &[0x0f, 0x01, 0x18],
        &[0x0f, 0x01, 0x13],
        &[0x0f, 0x01, 0x1b],
        &[0x0f, 0x01, 0x38],
        &[0x0f, 0x01, 0x3e],
        &[0x0f, 0x01, 0xf0],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x05],
        &[0x0f, 0x06],
        &[0x0f, 0x07],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        &[0x0f, 0x0b],
        &[0x0f, 0x30],
        &[0x0f, 0x31],
        &[0x0f, 0x33],
        &[0x0f, 0x34],
        &[0x0f, 0x35],
        &[0x0f, 0xaa],
        &[0x0f, 0xae, 0x00],
        &[0x0f, 0xae, 0x0b],
        &[0x0f, 0xae, 0x26],
        &[0x0f, 0xae, 0x2e],
        &[0x0f, 0xc7, 0x26],
        &[0x66, 0x0f, 0x38, 0x82, 0x06],
        &[0xcf],
        &[0xcb],
        &[0xca, 0x08, 0x00],
        &[0x8e, 0xd8],
        &[0x8e, 0xd0],
        &[0x8e, 0xe3],
        &[0x8e, 0xc1],
        &[0xf1],
        &[0xcc],
        &[0xce],
        &[0x9c],
        &[0xc8, 0x10, 0x00, 0x03],
        &[0xea, 0x00, 0x00, 0x60, 0x00, 0x38, 0x00],
    ]));
}

/// Writes an entry of a page table, or of a descriptor table.
fn table_entry(program: &mut Program, random: &mut Random) {
    let at = match random.below(4) {
        0 => super::table_of_processors(random.below(8)) + (random.below(0x1100) as u32 & !7),
        _ => boot::table_address(random.below(6)) + (random.of(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 511]) << 3),
    };
    let target = random.of(&[0, 0x60_0000, 0x80_0000, 0xfee0_0000, 0xff00_0000, 0xfec0_0000, 0xc000_0000, 0x400_0000]);
    let flags = random.of(&[0x87u32, 0x67, 0xe7, 0x07, 0x83, 0x80, 0x05, 0x187, 0x1f, 0]);
    program.set(7, at);
    program.set(0, target | flags);
    program.push(&[0x89, 0x07]);
    if random.below(3) == 0 {
        // The upper half: reserved bits, NX, an address beyond all memory.
        program.set(0, random.next() as u32 & random.of(&[0x8000_0000, 0xff, 0x000f_0000, u32::MAX]));
        program.push(&[0x89, 0x47, 0x04]);
    }
    if random.below(2) == 0 {
        program.push(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]);
    }
}

/// A command in the interrupt command register: to anyone, of any kind.
fn interprocessor(program: &mut Program, random: &mut Random) {
    let kind = random.of(&[0u32, 0, 0, 1, 2, 3, 4, 4, 5, 6, 6, 7]);
    let vector = match kind {
        // The start code, programs, and zeros.
        6 if random.below(4) != 0 => random.of(&[8, 8, 0x60, 0x80]),
        _ => random.next() as u32 & 0xff,
    };
    let command = vector | kind << 8 | random.of(&[0, 1, 2, 3]) << 18 | random.of(&[0x4000, 0x4000, 0x800, 0xc000, 0]);
    program.set(7, 0xfee0_0300);
    program.set(0, random.of(&[0u32, 1, 2, 3, 0xff]) << 24);
    program.push(&[0x89, 0x47, 0x10]);
    program.set(0, command);
    program.push(&[0x89, 0x07]);
}

/// Any register of the local APIC, timers above all.
fn timer(program: &mut Program, random: &mut Random) {
    program.set(7, 0xfee0_0000);
    program.set(0, random.next() as u32 & random.of(&[u32::MAX, 0xff, 0x600ff, 0xffff]));
    program.push(&[0x89, 0x87]);
    let register = random.of(&[0x80u32, 0xb0, 0xd0, 0xe0, 0xf0, 0x320, 0x340, 0x350, 0x360, 0x370, 0x380, 0x3e0, 0x20]);
    program.push(&register.to_le_bytes());
}

fn pointers(program: &mut Program, random: &mut Random) {
    for register in [0, 1, 2, 3, 5, 6, 7] {
        if random.below(2) == 0 {
            program.set(register, pointer(random) as u32);
        }
    }
}

fn cpuid(program: &mut Program, random: &mut Random) {
    let any = random.next() as u32;
    let leaf = random.of(&[0, 0x4000_0000, 0x8000_0000, any]).wrapping_add(random.below(0x22) as u32);
    program.set(0, leaf);
    program.set(1, random.below(4) as u32);
    program.push(&[0x0f, 0xa2]);
}

/// The test device: interrupt lines, and pages that the host is to forget.
fn test_device(program: &mut Program, random: &mut Random) {
    if random.below(2) == 0 {
        program.set(2, 0x2000 + random.below(24) as u32);
        program.set(0, random.below(2) as u32);
    } else {
        program.set(2, 0xe4);
        program.set(0, pointer(random) as u32);
    }
    program.push(&[0xef]);
}
