//! Instructions on device memory, on all processors at once: each has a part of the test device's memory for itself, and
//! one word is everybody's.

use core::arch::asm;

use super::memory::{self, PAGE, PRESENT, WRITABLE};
use super::provoke;
use crate::check;
use crate::machine::{TEST_RAM, set_word, word};
use crate::smp;
use crate::traps::{self, GENERAL_PROTECTION, PAGE_FAULT};

const SHARED: u64 = TEST_RAM + 0x8000;
const ROUNDS: u32 = 200;

pub(super) fn run() {
    set_word(SHARED, 0);
    set_word(SHARED + 4, 0);
    smp::everywhere(|number| {
        let base = TEST_RAM + number as u64 * PAGE;
        moves(base);
        arithmetic(base);
        strings(base, number);
        straddle(base);
        across(base, number);
        floating(base);
        control(base);
        faults(base, number);
        for _ in 0..ROUNDS {
            // SAFETY: the word is the device's.
            unsafe {
                asm!("lock inc dword ptr [{0}]", "lock xadd dword ptr [{0} + 4], {1:e}", in(reg) SHARED, inout(reg) 3 => _);
            }
        }
    });
    let total = smp::count() as u32 * ROUNDS;
    check!(word(SHARED) == total, "{} of {total} locked increments", word(SHARED));
    check!(word(SHARED + 4) == 3 * total, "{} of {total} locked additions", word(SHARED + 4));
}

fn moves(base: u64) {
    let value = 0x8182_8384_8586_8788_u64;
    let (mut byte, mut word, mut dword, mut quad, mut high): (u64, u64, u64, u64, u64);
    // SAFETY: the memory is the device's, and this processor's part of it.
    unsafe {
        asm!("mov [{b}], {v}", b = in(reg) base, v = in(reg) value);
        asm!(
            "mov rax, -1", "mov al, [rdi]", "mov {byte}, rax",
            "mov rax, -1", "mov ax, [rdi]", "mov {word}, rax",
            "mov rax, -1", "mov eax, [rdi]", "mov {dword}, rax",
            "mov rax, [rdi]", "mov {quad}, rax",
            "xor eax, eax", "mov ah, [rdi + 1]", "mov {high}, rax",
            in("rdi") base, byte = out(reg) byte, word = out(reg) word, dword = out(reg) dword, quad = out(reg) quad,
            high = out(reg) high, out("rax") _,
        );
    }
    check!(byte == !0xff | 0x88 && word == !0xffff | 0x8788, "MOV of 1 and 2 bytes: {byte:#x}, {word:#x}");
    check!(dword == 0x8586_8788 && quad == value, "MOV of 4 and 8 bytes: {dword:#x}, {quad:#x}");
    check!(high == 0x8700, "MOV to AH: {high:#x}");
    // SAFETY: as above.
    unsafe {
        asm!(
            "movzx {byte:e}, byte ptr [{b}]", "movzx {word}, word ptr [{b}]", "movsx {dword}, word ptr [{b}]",
            "movsxd {quad}, dword ptr [{b}]", "mov rax, -1", "movsx ax, byte ptr [{b}]", "mov {high}, rax",
            b = in(reg) base, byte = out(reg) byte, word = out(reg) word, dword = out(reg) dword, quad = out(reg) quad,
            high = out(reg) high, out("rax") _,
        );
    }
    check!(byte == 0x88 && word == 0x8788, "MOVZX: {byte:#x}, {word:#x}");
    check!(dword == 0xffff_ffff_ffff_8788 && quad == 0xffff_ffff_8586_8788, "MOVSX: {dword:#x}, {quad:#x}");
    check!(high == !0xffff | 0xff88, "MOVSX to 16 bits: {high:#x}");
    // SAFETY: as above.
    unsafe {
        asm!(
            "mov byte ptr [{b}], 0x11", "mov word ptr [{b} + 2], 0x3322", "mov dword ptr [{b} + 4], 0x77665544",
            "mov qword ptr [{b} + 8], -2", "mov {quad}, [{b}]", "mov {dword}, [{b} + 8]",
            b = in(reg) base, quad = out(reg) quad, dword = out(reg) dword,
        );
    }
    check!(quad == 0x7766_5544_3322_8711 && dword == !1, "MOV of immediates: {quad:#x}, {dword:#x}");
}

fn arithmetic(base: u64) {
    let (flags, old): (u64, u32);
    // SAFETY: as in `moves`; the flags are put on the stack and taken off.
    unsafe {
        asm!(
            "mov dword ptr [{b}], 0xf0", "or dword ptr [{b}], 0x0f", "and dword ptr [{b}], 0x7e", "xor dword ptr [{b}], {m:e}",
            "add dword ptr [{b}], {m:e}", "sub word ptr [{b}], 2", "not byte ptr [{b} + 1]", "bts dword ptr [{b}], 31",
            "xchg {x:e}, [{b}]",
            "cmp dword ptr [{b}], 0x1234", "pushfq", "pop {f}",
            b = in(reg) base, m = in(reg) 3, x = inout(reg) 0x1234 => old, f = out(reg) flags,
        );
    }
    // ((0xf0 | 0x0f) & 0x7e ^ 3) + 3 - 2, then the second byte inverted and the top bit set.
    check!(old == 0x8000_ff7e, "read, modify, write: {old:#x}");
    check!(flags & 0x8d5 == 0x44, "CMP of equal values: flags {flags:#x}");
    let (failed, found): (u8, u32);
    // SAFETY: as above.
    unsafe {
        asm!(
            "lock cmpxchg [{b}], {n:e}", "setnz {z}", "lock cmpxchg [{b}], {n:e}",
            b = in(reg) base, n = in(reg) 0x55, z = out(reg_byte) failed, inout("eax") 0u32 => found,
        );
    }
    check!((failed, found, word(base)) == (1, 0x1234, 0x55), "CMPXCHG: {failed}, {found:#x}, {:#x}", word(base));
}

#[repr(align(4096))]
struct Buffers(#[expect(dead_code, reason = "reached by address")] [[u8; 4096]; smp::MOST]);

static mut BUFFERS: Buffers = Buffers([[0; 4096]; smp::MOST]);

/// Address of a page of RAM that is this processor's.
fn buffer(number: usize) -> u64 {
    (&raw mut BUFFERS).expose_provenance() as u64 + number as u64 * PAGE
}

fn strings(base: u64, number: usize) {
    let ram = buffer(number);
    let (left, end): (u64, u64);
    // SAFETY: both pages are this processor's.
    unsafe {
        asm!("rep stosq", inout("rcx") 512u64 => left, inout("rdi") base => end, in("rax") 0x0123_4567_89ab_cdef_u64);
        asm!("rep movsb", inout("rcx") 4096u64 => _, inout("rsi") base => _, inout("rdi") ram => _);
    }
    check!((left, end) == (0, base + PAGE), "REP STOS: {left} left at {end:#x}");
    for at in [0, 2048, 4092] {
        check!(
            word(ram + at) == [0x89ab_cdef, 0x0123_4567][(at as usize / 4) % 2],
            "REP MOVS: {at}: {:#x}",
            word(ram + at)
        );
    }
    set_word(ram, 0x4433_2211);
    set_word(ram + 4, 0x8877_6655);
    let (from, to): (u64, u64);
    // SAFETY: as above; the direction flag is put back.
    unsafe {
        asm!("std", "rep movsw", "cld", inout("rcx") 4u64 => _, inout("rsi") ram + 6 => from, inout("rdi") base + 6 => to);
    }
    check!((from, to) == (ram - 2, base - 2), "backwards: {from:#x}, {to:#x}");
    check!((word(base), word(base + 4)) == (0x4433_2211, 0x8877_6655), "backwards: {:#x}", word(base));
    let loaded: u64;
    // SAFETY: as above.
    unsafe { asm!("lodsd", in("rsi") base, out("rax") loaded, lateout("rsi") _) };
    check!(loaded == 0x4433_2211, "LODS: {loaded:#x}");
}

/// An operand of which half is a device's and half is RAM.
fn straddle(base: u64) {
    let number = ((base - TEST_RAM) / PAGE) as usize;
    let ram = buffer(number);
    let first = memory::map(4 * number, base, PRESENT | WRITABLE);
    memory::map(4 * number + 1, ram, PRESENT | WRITABLE);
    let at = first + PAGE - 3;
    let back: u64;
    // SAFETY: both pages are this processor's.
    unsafe {
        asm!("mov [{a}], {v}", "mov {r}, [{a}]", a = in(reg) at, v = in(reg) 0x1122_3344_5566_7788_u64, r = out(reg) back)
    };
    check!(back == 0x1122_3344_5566_7788, "across pages: {back:#x}");
    check!(word(ram) == 0x2233_4455, "the second page: {:#x}", word(ram));
    check!(word(base + PAGE - 4) >> 8 == 0x0066_7788, "the first page: {:#x}", word(base + PAGE - 4));
}

/// Strings over the end of a device's page, in both directions, from a port, and to RAM.
fn across(base: u64, number: usize) {
    const BYTES: u64 = 192;
    let ram = buffer(number);
    let first = memory::map(4 * number, base, PRESENT | WRITABLE);
    memory::map(4 * number + 1, base, PRESENT | WRITABLE);
    // The two pages are one of the device's: what is behind the end is at its beginning.
    let at = first + PAGE - BYTES / 2;
    for index in 0..BYTES / 4 {
        set_word(ram + 4 * index, 0x0101_0101 * index as u32);
    }
    let ends: [u64; 3];
    // SAFETY: all pages are this processor's; the direction flag is put back.
    unsafe {
        asm!("rep movsw", inout("rcx") BYTES / 2 => _, inout("rsi") ram => _, inout("rdi") at => _);
        let (left, source, target);
        asm!(
            "std", "rep movsd", "cld",
            inout("rcx") BYTES / 4 => left, inout("rsi") at + BYTES - 4 => source, inout("rdi") ram + 2 * BYTES - 4 => target,
        );
        ends = [left, source, target];
    }
    check!(ends == [0, at - 4, ram + BYTES - 4], "strings over the end of a page: {ends:x?}");
    for index in 0..BYTES / 4 {
        let (there, back) = (word(at + 4 * index), word(ram + BYTES + 4 * index));
        check!(
            (there, back) == (0x0101_0101 * index as u32, there),
            "over the end of a page: {index}: {there:#x}, {back:#x}"
        );
    }
    let (zero, left): (u8, u64);
    // SAFETY: as above.
    unsafe {
        asm!(
            "cmp {z}, {z}", "repe cmpsb", "setz {z}",
            z = out(reg_byte) zero, inout("rcx") BYTES => left, inout("rsi") at => _, inout("rdi") ram => _,
        );
    }
    check!((zero, left) == (1, 0), "REPE CMPS over the end of a page: {left} left");
    crate::cpu::outw(0xe0, 0x9999);
    // SAFETY: as above.
    unsafe { asm!("rep insb", inout("rcx") BYTES => _, inout("rdi") at => _, in("dx") 0xe0u16) };
    check!((word(at), word(at + BYTES - 4)) == (0x9999_9999, 0x9999_9999), "REP INS: {:#x}", word(at + BYTES - 4));
}

/// MMX registers and the x87 unit's words; aligned and unaligned vectors.
fn floating(base: u64) {
    const VALUE: u64 = 0x0102_0304_0506_0708;
    let (back, low, high): (u64, u64, u64);
    let words: [u16; 2];
    // SAFETY: the memory is this processor's part of the device's; the x87 unit is put in its initial state.
    unsafe {
        asm!(
            "fninit", "fld1", "movq mm3, {v}", "movq [{b}], mm3", "movq mm5, [{b}]", "movd mm6, [{b}]", "movq {r}, mm5",
            "movq {l}, mm6", "emms",
            b = in(reg) base, v = in(reg) VALUE, r = out(reg) back, l = out(reg) low,
            out("mm3") _, out("mm5") _, out("mm6") _,
        );
        asm!(
            "fninit", "fnstcw [{b}]", "fnstsw [{b} + 2]", "mov {w:e}, [{b}]", "mov word ptr [{b}], 0x27f", "fldcw [{b}]",
            "fnstcw [{b} + 4]", "fninit",
            "movups xmm0, [{b}]", "movups [{b} + 9], xmm0",
            b = in(reg) base, w = out(reg) high, out("xmm0") _,
        );
        words = [word(base) as u16, word(base + 4) as u16];
    }
    check!((word(base + 9), back, low) == (word(base), VALUE, VALUE & 0xffff_ffff), "MMX: {back:#x}, {low:#x}");
    check!((high as u32, words) == (0x37f, [0x27f; 2]), "words of the x87 unit: {high:#x}, {words:x?}");
}

/// A stack in device memory, a pointer to jump by, a segment register and the status word.
fn control(base: u64) {
    let (top, end): (u64, u64);
    // SAFETY: the stack pointer is put back; handlers have stacks of their own.
    unsafe {
        asm!(
            "mov {save}, rsp", "mov {top}, rbp", "lea rsp, [{b} + 0x800]",
            "call 61f", "jmp 62f", "61:", "enter 0x20, 0", "leave", "ret", "62:",
            "mov {end}, rsp", "mov rsp, {save}", "sub {top}, rbp",
            save = out(reg) _, b = in(reg) base, top = out(reg) top, end = out(reg) end,
        );
    }
    check!((top, end) == (0, base + 0x800), "a stack in device memory: {top:#x}, {end:#x}");
    let (segment, jumped): (u32, u32);
    // SAFETY: both segments are those that are in use.
    unsafe {
        asm!(
            "lea {s:r}, [rip + 63f]", "mov [rdi], {s:r}", "mov word ptr [rdi + 8], cs", "xor {j:e}, {j:e}",
            ".byte 0x48, 0xff, 0x2f", "jmp 64f", "63:", "inc {j:e}", "64:",
            "mov word ptr [rdi + 16], 0x10", "mov ss, [rdi + 16]", "mov {s:e}, ss",
            in("rdi") base, s = out(reg) segment, j = out(reg) jumped,
        );
    }
    check!((jumped, segment) == (1, 0x10), "JMP and MOV SS from device memory: {jumped}, {segment:#x}");
    let null: u32;
    // SAFETY: 64-bit code of this level needs no stack segment; it is put back.
    unsafe {
        asm!(
            "mov word ptr [{b}], 0", "mov ss, [{b}]", "mov {s:e}, ss", "mov ss, {d:e}",
            b = in(reg) base, s = out(reg) null, d = in(reg) 0x10,
        );
        check!(null == 0, "MOV SS of nothing from device memory: {null:#x}");
        let before = traps::count(GENERAL_PROTECTION);
        // One of another level, which is nothing as well.
        provoke!(["mov word ptr [{b}], 3", "mov ss, [{b}]"] b = in(reg) base,);
        check!(traps::count(GENERAL_PROTECTION) == before + 1, "MOV SS of nothing at level 3");
    }
    let cr0: u64;
    // SAFETY: it only reads, and writes the device's memory.
    unsafe { asm!("mov {v}, cr0", "smsw word ptr [{b}]", v = out(reg) cr0, b = in(reg) base) };
    check!(word(base) as u16 == cr0 as u16, "SMSW: {:#x}", word(base));
    // SAFETY: the selector is beyond the table; the fault is expected.
    unsafe { provoke!(["mov word ptr [{b}], 0x1ff8", "mov fs, [{b}]"] b = in(reg) base,) };
    check!(traps::last().0 == 0x1ff8, "a selector from device memory: {:#x}", traps::last().0);
}

/// Exceptions that come up inside an emulated instruction.
fn faults(base: u64, number: usize) {
    let page = 4 * number;
    let linear = memory::map(page, buffer(number), PRESENT | WRITABLE);
    memory::map(page + 1, 0, 0);
    let before = traps::count(PAGE_FAULT);
    let (left, to): (u64, u64);
    // From the device to a page of which the last 16 bytes are there.
    // SAFETY: the fault is expected.
    unsafe {
        provoke!(["rep movsb"] inout("rcx") 100u64 => left, inout("rsi") base => _, inout("rdi") linear + PAGE - 16 => to,);
    }
    let (code, cr2, _) = traps::last();
    check!(traps::count(PAGE_FAULT) == before + 1, "no page fault");
    check!((code, cr2) == (2, linear + PAGE), "page fault: code {code:#x}, CR2 {cr2:#x}");
    check!((left, to) == (84, linear + PAGE), "stopped at {to:#x} with {left} left");
    // To a page that must not be written.
    memory::map(page, buffer(number), PRESENT);
    // SAFETY: the fault is expected.
    unsafe { provoke!(["movsb"] inout("rsi") base => _, inout("rdi") linear => _,) };
    let (code, cr2, _) = traps::last();
    check!((code, cr2) == (3, linear), "write protection: code {code:#x}, CR2 {cr2:#x}");
    // To an address that is none.
    let before = traps::count(GENERAL_PROTECTION);
    // SAFETY: the fault is expected.
    unsafe { provoke!(["movsb"] inout("rsi") base => _, inout("rdi") 1u64 << 62 => _,) };
    check!(traps::count(GENERAL_PROTECTION) == before + 1, "no #GP");
    // What an emulated instruction reaches is marked as by the processor.
    memory::map(page, buffer(number), PRESENT | WRITABLE);
    // SAFETY: the page is this processor's.
    unsafe { asm!("movsb", inout("rsi") base => _, inout("rdi") linear => _) };
    check!(memory::entry(page) & 0x60 == 0x60, "accessed and dirty: {:#x}", memory::entry(page));
}
