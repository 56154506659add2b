//! What paging and user mode have, as far as CPUID says that it is there: execution and access prevention, protection keys,
//! process-context identifiers, 1 GiB pages, five levels; system calls; XSAVE; TSC_AUX. Each on every processor, most also
//! by way of instructions that are executed in software, which must come to the same answer.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::memory::{self, PRESENT, WRITABLE};
use super::{legacy, provoke};
use crate::boot::table_address;
use crate::cpu::{inb, rdmsr, wrmsr};
use crate::machine::{TEST_RAM, set_word, word};
use crate::traps::{self, GENERAL_PROTECTION, INVALID_OPCODE, PAGE_FAULT, count};
use crate::visit::{Mode, visit};
use crate::{check, serial, smp};

const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const KEY_3: u64 = 3 << 59;

const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_UMIP: u64 = 1 << 11;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;

const LSTAR: u32 = 0xc000_0082;
const STAR: u32 = 0xc000_0081;
const SFMASK: u32 = 0xc000_0084;
const EFER: u32 = 0xc000_0080;
const TSC_AUX: u32 = 0xc000_0103;

#[repr(align(4096))]
struct Table([AtomicU64; 512]);

/// Memory below 4 GiB is not the user's under this root; the window of [`memory`] is as its entries say.
static STRICT: Table = Table([const { AtomicU64::new(0) }; 512]);
static FIVE: Table = Table([const { AtomicU64::new(0) }; 512]);
static HIGH: Table = Table([const { AtomicU64::new(0) }; 512]);
static GIANT: Table = Table([const { AtomicU64::new(0) }; 512]);
/// A page of RAM a processor, twice.
static RAM: [[Table; 2]; smp::MOST] = [const { [const { Table([const { AtomicU64::new(0) }; 512]) }; 2] }; smp::MOST];

fn address<T>(thing: &'static T) -> u64 {
    core::ptr::from_ref(thing).expose_provenance() as u64
}

fn seven() -> (u32, u32) {
    if __cpuid(0).eax < 7 {
        return (0, 0);
    }
    let leaf = __cpuid_count(7, 0);
    (leaf.ebx, leaf.ecx)
}

fn cr3() -> u64 {
    let value;
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr3(value: u64) {
    // SAFETY: callers' tables map this kernel as before.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack)) };
}

fn cr4() -> u64 {
    let value;
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack)) };
    value
}

fn set_cr4(value: u64) {
    // SAFETY: callers change what this kernel's own code does not meet.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack)) };
}

/// Does something with more bits of CR4, and under [`STRICT`].
fn with(bits: u64, work: impl FnOnce()) {
    let (before, root) = (cr4(), cr3());
    set_cr3(address(&STRICT));
    set_cr4(before | bits);
    work();
    set_cr4(before);
    set_cr3(root);
}

/// The processor's pages of the window.
struct Pages {
    first: usize,
    ram: u64,
    device: u64,
}

impl Pages {
    fn map(&self, index: usize, physical: u64, flags: u64) -> u64 {
        memory::map(self.first + index, physical, flags)
    }
}

/// Says what is checked, for CPUID decides about most of it.
fn tell() {
    let ((ebx, ecx), one) = (seven(), __cpuid(1).ecx);
    let extended = __cpuid(0x8000_0001).edx;
    let all = [
        ("SMEP", ebx >> 7),
        ("SMAP", ebx >> 20),
        ("INVPCID", ebx >> 10),
        ("UMIP", ecx >> 2),
        ("PKU", ecx >> 3),
        ("LA57", ecx >> 16),
        ("PCID", one >> 17),
        ("XSAVE", one >> 26),
        ("AVX", one >> 28),
        ("1 GiB pages", extended >> 26),
        ("RDTSCP", extended >> 27),
    ];
    for (name, bit) in all {
        serial::print(format_args!("modes: {name} {}\n", if bit & 1 != 0 { "is there" } else { "is not there" }));
    }
}

pub(super) fn run() {
    tell();
    memory::map(0, 0, 0);
    for (entry, flags) in [(0, PRESENT | WRITABLE), (1, PRESENT | WRITABLE | USER)] {
        // SAFETY: the boot code's root has 512 entries, which nobody changes now.
        let pointers = word(u64::from(table_address(0)) + 8 * entry) & !0xfff;
        STRICT.0[entry as usize].store(u64::from(pointers) | flags, Ordering::SeqCst);
    }
    smp::everywhere(|number| {
        let ram = address(&RAM[number][0]);
        let pages = Pages { first: 200 + 8 * number, ram, device: TEST_RAM + 0x1000 * number as u64 };
        no_execution(&pages);
        prevention(&pages);
        keys(&pages);
        user_mode(&pages);
        contexts(&pages);
        auxiliary(number);
        extended_state(number);
        legacy::run(number);
    });
    giant_pages();
    smp::everywhere(five_levels);
}

/// A page fault's code and address, or 0 and 0 if there was none.
fn fault_of(work: impl FnOnce()) -> (u64, u64) {
    let before = count(PAGE_FAULT);
    work();
    let (code, cr2, _) = traps::last();
    if count(PAGE_FAULT) == before { (0, 0) } else { (code, cr2) }
}

/// Calls what is at an address; a fault there is expected, or a RET is.
fn call(linear: u64) {
    let resume = traps::resume_at();
    // SAFETY: what CALL pushed is taken off behind a fault.
    unsafe {
        asm!(
            "mov {sp}, rsp", "lea {s}, [rip + 55f]", "mov [{resume}], {s}", "call {a}", "mov qword ptr [{resume}], 0",
            "55:", "mov rsp, {sp}",
            sp = out(reg) _, s = out(reg) _, resume = in(reg) resume, a = in(reg) linear,
        );
    }
}

fn read(linear: u64) {
    // SAFETY: reading has no effect, or faults, which is expected.
    unsafe { provoke!(["mov {v}, [{a}]"] a = in(reg) linear, v = out(reg) _,) };
}

fn write(linear: u64) {
    // SAFETY: callers pass pages of their own; a fault is expected.
    unsafe { provoke!(["mov [{a}], {a}"] a = in(reg) linear,) };
}

/// Moves a byte from a device's page, so that the write is done in software.
fn move_from(device: u64, to: u64) {
    // SAFETY: as in `write`.
    unsafe { provoke!(["movsb"] inout("rsi") device => _, inout("rdi") to => _,) };
}

fn set_code(ram: u64, code: &[u8]) {
    for (at, byte) in (ram..).zip(code) {
        // SAFETY: the page is this processor's.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(at as usize).write_volatile(*byte) };
    }
}

fn no_execution(pages: &Pages) {
    set_code(pages.ram, &[0xc3]);
    let linear = pages.map(0, pages.ram, PRESENT | WRITABLE | NO_EXECUTE);
    check!(fault_of(|| call(linear)) == (0x11, linear), "NX: {:x?}", fault_of(|| call(linear)));
    check!(fault_of(|| read(linear)) == (0, 0), "NX forbids reading");
    pages.map(0, pages.ram, PRESENT | WRITABLE);
    check!(fault_of(|| call(linear)) == (0, 0), "a page without NX");
}

/// Supervisor code and the user's pages.
fn prevention(pages: &Pages) {
    let (has, _) = seven();
    let device = pages.map(1, pages.device, PRESENT | WRITABLE);
    let linear = pages.map(0, pages.ram, PRESENT | WRITABLE | USER);
    set_code(pages.ram, &[0xc3]);
    if has & 1 << 7 != 0 {
        with(0, || check!(fault_of(|| call(linear)) == (0, 0), "without SMEP"));
        with(CR4_SMEP, || check!(fault_of(|| call(linear)) == (0x11, linear), "SMEP"));
    }
    if has & 1 << 20 != 0 {
        with(CR4_SMAP, || {
            check!(fault_of(|| read(linear)) == (1, linear), "SMAP: reading");
            check!(fault_of(|| write(linear)) == (3, linear), "SMAP: writing");
            check!(fault_of(|| move_from(device, linear)) == (3, linear), "SMAP: writing in software");
            // SAFETY: it opens the user's pages, and the next closes them.
            unsafe { asm!("stac") };
            let open = (fault_of(|| read(linear)), fault_of(|| move_from(device, linear)));
            // SAFETY: as above.
            unsafe { asm!("clac") };
            check!(open == ((0, 0), (0, 0)), "SMAP with AC: {open:x?}");
        });
    }
}

fn keys(pages: &Pages) {
    if seven().1 & 1 << 3 == 0 {
        return;
    }
    let device = pages.map(1, pages.device, PRESENT | WRITABLE);
    let linear = pages.map(0, pages.ram, PRESENT | WRITABLE | USER | KEY_3);
    let set = |rights: u32| {
        // SAFETY: this kernel has no pages of the user's but those of this check.
        unsafe { asm!("wrpkru", in("eax") rights << 6, in("ecx") 0, in("edx") 0) };
    };
    with(CR4_PKE, || {
        check!(seven().1 & 1 << 4 != 0, "CPUID does not show that keys are on");
        set(1);
        check!(fault_of(|| read(linear)) == (0x21, linear), "a key without access");
        check!(fault_of(|| move_from(device, linear)) == (0x23, linear), "a key without access, in software");
        inb(0x80);
        let rights: u32;
        // SAFETY: it only reads.
        unsafe { asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _) };
        check!(rights == 1 << 6, "rights {rights:#x} behind an exit");
        set(2);
        check!(fault_of(|| read(linear)) == (0, 0), "reading with a key that forbids writing");
        check!(fault_of(|| write(linear)) == (0x23, linear), "a key that forbids writing");
        check!(fault_of(|| move_from(device, linear)) == (0x23, linear), "a key that forbids writing, in software");
        set(0);
        check!(fault_of(|| move_from(device, linear)) == (0, 0), "a key with all rights");
    });
    check!(seven().1 & 1 << 4 == 0, "CPUID shows keys that are off");
}

core::arch::global_asm!(".global system_call", "system_call:", "mov eax, 0x51", "sysretq",);

unsafe extern "C" {
    static system_call: u8;
}

fn user_mode(pages: &Pages) {
    const HLT: u8 = 0xf4;
    let code = pages.map(0, pages.ram, PRESENT | WRITABLE | USER);
    let stack = pages.map(2, pages.ram + 0x1000, PRESENT | WRITABLE | USER) + 0x1000;
    let device = pages.map(1, pages.device, PRESENT | WRITABLE | USER);
    let run = |bytes: &[u8], arguments: [u64; 3]| {
        set_code(pages.ram, bytes);
        // SAFETY: the code touches what its arguments say.
        let rax = unsafe { traps::in_user_mode(code, stack, arguments) };
        let (error, cr2, rip) = traps::last();
        (traps::last_vector(), error, cr2, rip - code, rax)
    };
    with(0, || {
        let (vector, error, _, at, _) = run(&[HLT], [0; 3]);
        check!((vector, error, at) == (GENERAL_PROTECTION, 0, 0), "HLT of the user: {vector} {error:#x} at {at}");
        // mov rax, [rsi]
        let kernel = address(&STRICT);
        let (vector, error, cr2, ..) = run(&[0x48, 0x8b, 0x06], [0, kernel, 0]);
        check!((vector, error, cr2) == (PAGE_FAULT, 5, kernel), "the kernel's page: {vector} {error:#x} at {cr2:#x}");
        // lock inc dword ptr [rsi]; mov eax, [rsi]; hlt
        set_word(pages.device, 6);
        let (_, _, _, at, rax) = run(&[0xf0, 0xff, 0x06, 0x8b, 0x06, HLT], [0, device, 0]);
        check!((at, rax) == (5, 7), "a device of the user's: {rax} at {at}");
        // movsb, from that device to the kernel's page
        let (vector, error, cr2, ..) = run(&[0xa4, HLT], [0, device, kernel]);
        check!((vector, error, cr2) == (PAGE_FAULT, 7, kernel), "in software: {vector} {error:#x} at {cr2:#x}");
        // vmmcall; hlt
        let (_, _, _, at, rax) = run(&[0x0f, 0x01, 0xd9, HLT], [0; 3]);
        check!((at, rax) == (3, u64::MAX), "VMMCALL of the user: {rax:#x} at {at}");
        // syscall; hlt
        wrmsr(STAR, traps::STAR);
        wrmsr(LSTAR, (&raw const system_call).expose_provenance() as u64);
        wrmsr(SFMASK, 0x200);
        let efer = rdmsr(EFER);
        let (vector, _, _, at, _) = run(&[0x0f, 0x05, HLT], [0; 3]);
        check!((vector, at) == (INVALID_OPCODE, 0), "SYSCALL that is off: {vector} at {at}");
        wrmsr(EFER, efer | 1);
        let (_, _, _, at, rax) = run(&[0x0f, 0x05, HLT], [0; 3]);
        check!((at, rax) == (2, 0x51), "SYSCALL: {rax:#x} at {at}");
        // pushfq; or byte ptr [rsp + 1], 1; popfq; syscall; nop; hlt: no trap in the kernel, and one behind the return from it
        wrmsr(SFMASK, 0x300);
        let (vector, .., at, rax) = run(&[0x9c, 0x80, 0x4c, 0x24, 1, 1, 0x9d, 0x0f, 0x05, 0x90, HLT], [0; 3]);
        wrmsr(EFER, efer);
        check!((vector, at, rax) == (traps::DEBUG, 9, 0x51), "SYSCALL stepped over: {vector} at {at}, {rax:#x}");
        // mov rax, cr0
        let (vector, .., at, _) = run(&[0x0f, 0x20, 0xc0, HLT], [0; 3]);
        check!((vector, at) == (GENERAL_PROTECTION, 0), "MOV from CR0 of the user: {vector} at {at}");
        // sgdt [rsp - 16]; hlt
        let (.., at, _) = run(&[0x0f, 0x01, 0x44, 0x24, 0xf0, HLT], [0; 3]);
        check!(at == 5, "SGDT without UMIP ended at {at}");
    });
    if seven().1 & 1 << 2 != 0 {
        with(CR4_UMIP, || {
            // SGDT, SIDT of [rsp - 16]; SLDT, STR, SMSW of eax; and SMSW of a device, which is executed in software.
            let all: [&[u8]; 6] = [
                &[0x0f, 0x01, 0x44, 0x24, 0xf0, HLT],
                &[0x0f, 0x01, 0x4c, 0x24, 0xf0, HLT],
                &[0x0f, 0x00, 0xc0, HLT],
                &[0x0f, 0x00, 0xc8, HLT],
                &[0x0f, 0x01, 0xe0, HLT],
                &[0x0f, 0x01, 0x26, HLT],
            ];
            for code in all {
                let (vector, .., at, _) = run(code, [0, device, 0]);
                check!((vector, at) == (GENERAL_PROTECTION, 0), "{code:x?} with UMIP: {vector} at {at}");
            }
        });
    }
}

/// Two contexts, and a translation that is dropped in the one while the other is in use.
fn contexts(pages: &Pages) {
    if __cpuid(1).ecx & 1 << 17 == 0 {
        return;
    }
    const KEEP: u64 = 1 << 63;
    let other = address(&STRICT) | 1;
    let value = |linear: u64| word(linear);
    set_word(pages.ram, 0x1111_1111);
    set_word(pages.ram + 0x1000, 0x2222_2222);
    with(CR4_PCIDE, || {
        let linear = pages.map(3, pages.ram, PRESENT | WRITABLE);
        set_cr3(other);
        check!(value(linear) == 0x1111_1111, "the first page in context 1");
        set_cr3(address(&STRICT) | KEEP);
        // This drops it in context 0 only.
        pages.map(3, pages.ram + 0x1000, PRESENT | WRITABLE);
        if seven().0 & 1 << 10 != 0 {
            let descriptor = [1u64, linear];
            // SAFETY: dropping translations is always right.
            unsafe { asm!("invpcid {}, [{}]", in(reg) 0u64, in(reg) &descriptor) };
            set_cr3(other | KEEP);
        } else {
            set_cr3(other);
        }
        check!(value(linear) == 0x2222_2222, "a translation that was dropped: {:#x}", value(linear));
        set_cr3(address(&STRICT));
    });
    if seven().0 & 1 << 10 != 0 {
        let before = count(GENERAL_PROTECTION);
        let descriptor = [0u64; 2];
        // SAFETY: there is no such kind; the fault is expected.
        unsafe { provoke!(["invpcid {k}, [{d}]"] k = in(reg) 9u64, d = in(reg) &descriptor,) };
        check!(count(GENERAL_PROTECTION) == before + 1, "INVPCID of kind 9");
    }
}

fn auxiliary(number: usize) {
    if __cpuid(0x8000_0001).edx & 1 << 27 == 0 {
        return;
    }
    let own = 0x7700 + number as u32;
    wrmsr(TSC_AUX, own.into());
    inb(0x80);
    let mut read = 0;
    // SAFETY: it only reads.
    unsafe { core::arch::x86_64::__rdtscp(&mut read) };
    check!((read, rdmsr(TSC_AUX)) == (own, own.into()), "TSC_AUX {read:#x}");
}

#[repr(align(64))]
struct Area([u8; 4096]);

/// Each processor has another XCR0, and keeps it and what it stands for, whatever leaves the guest.
fn extended_state(number: usize) {
    if __cpuid(1).ecx & 1 << 26 == 0 {
        return;
    }
    set_cr4(cr4() | CR4_OSXSAVE);
    check!(__cpuid(1).ecx & 1 << 27 != 0, "CPUID does not show OSXSAVE");
    let all = __cpuid_count(0xd, 0);
    check!((all.eax & 3, all.edx) == (3, 0), "XCR0 may have {:#x}", all.eax);
    let set = |value: u32| {
        // SAFETY: this kernel uses x87 and SSE only; a fault is expected where it is one.
        unsafe { provoke!(["xsetbv"] in("ecx") 0, in("eax") value, in("edx") 0,) };
    };
    for wrong in [0, 2, 5, 1 << 31 | 1] {
        let before = count(GENERAL_PROTECTION);
        set(wrong);
        check!(count(GENERAL_PROTECTION) == before + 1, "XCR0 took {wrong:#x}");
    }
    let own = if number.is_multiple_of(2) { all.eax } else { 3 };
    set(own);
    let sizes = __cpuid_count(0xd, 0);
    let expected = if own == all.eax { sizes.ecx } else { 576 };
    check!(sizes.ebx == expected, "XCR0 {own:#x} takes {} bytes instead of {expected}", sizes.ebx);
    if own & 4 != 0 {
        vectors(number);
    }
    let mut area = Area([0; 4096]);
    check!(sizes.ecx <= 4096, "{} bytes", sizes.ecx);
    inb(0x80);
    let found: u32;
    // SAFETY: the area is large enough and aligned.
    unsafe {
        asm!("xsave64 [{a}]", "xrstor64 [{a}]", "xgetbv", a = in(reg) &raw mut area, in("ecx") 0, inout("eax") u32::MAX => found, inout("edx") u32::MAX => _);
    }
    let saved = u64::from_le_bytes(*area.0[512..].first_chunk().unwrap_or(&[0; 8]));
    check!(found == own, "XCR0 became {found:#x} instead of {own:#x}");
    check!(saved & !u64::from(own) == 0, "XSAVE saved {saved:#x}");
}

/// Upper halves of vector registers.
fn vectors(number: usize) {
    let given: [u64; 4] = core::array::from_fn(|index| 0x0123_4567_89ab_cdef ^ (number * 4 + index) as u64);
    let mut kept = [0u64; 8];
    // SAFETY: the instructions exist where XCR0 has the state; what changes is declared.
    unsafe {
        asm!(
            "vmovdqu ymm0, [{g}]", "vmovdqu ymm15, [{g}]",
            "push rbx", "xor eax, eax", "cpuid", "pop rbx",
            "in al, 0x80", "mov eax, [{device}]",
            "vmovdqu [{k}], ymm0", "vmovdqu [{k} + 32], ymm15", "vzeroupper",
            g = in(reg) &given, k = in(reg) &mut kept, device = in(reg) TEST_RAM,
            out("eax") _, out("ecx") _, out("edx") _, out("xmm0") _, out("xmm15") _,
        );
    }
    check!(kept[..4] == given && kept[4..] == given, "vector registers: {kept:x?}");
}

fn giant_pages() {
    if __cpuid(0x8000_0001).edx & 1 << 26 == 0 {
        return;
    }
    const AT: u64 = 2 << 39;
    GIANT.0[0].store(PRESENT | WRITABLE | LARGE, Ordering::SeqCst);
    GIANT.0[3].store(3 << 30 | PRESENT | WRITABLE | LARGE, Ordering::SeqCst);
    STRICT.0[2].store(address(&GIANT) | PRESENT | WRITABLE, Ordering::SeqCst);
    static WORD: AtomicU32 = AtomicU32::new(0x1357_9bdf);
    set_word(TEST_RAM + 0x100, 0x2468_ace0);
    with(0, || {
        check!(word(AT + address(&WORD)) == 0x1357_9bdf, "RAM in a page of 1 GiB");
        check!(word(AT + TEST_RAM + 0x100) == 0x2468_ace0, "a device in a page of 1 GiB");
        check!(GIANT.0[0].load(Ordering::SeqCst) & 0x20 != 0, "a page of 1 GiB that is not marked");
    });
    STRICT.0[2].store(0, Ordering::SeqCst);
}

/// The window of [`memory`] as five levels show it in addition.
const ABOVE: u64 = 1 << 48;

fn five_levels(_: usize) {
    if seven().1 & 1 << 16 == 0 {
        return;
    }
    let before = count(GENERAL_PROTECTION);
    // SAFETY: the fault is expected: this bit is not for 64-bit mode to change.
    unsafe { provoke!(["mov cr4, {v}"] v = in(reg) cr4() | CR4_LA57,) };
    check!(count(GENERAL_PROTECTION) == before + 1, "CR4.LA57 in 64-bit mode");
    let visit = visit();
    let root = u64::from(table_address(0));
    FIVE.0[0].store(root | PRESENT | WRITABLE | USER, Ordering::SeqCst);
    FIVE.0[1].store(address(&HIGH) | PRESENT | WRITABLE | USER, Ordering::SeqCst);
    HIGH.0[1].store(STRICT.0[1].load(Ordering::SeqCst), Ordering::SeqCst);
    let code = five_level_checks as extern "C" fn() -> u32 as *const ();
    // SAFETY: the tables map all that four levels do; the code is for 64-bit mode.
    let done = unsafe { visit.call(Mode::Long, address(&FIVE), cr4() | CR4_LA57, code.expose_provenance() as u64) };
    check!(done == 0x57, "five levels: {done:#x}");
    check!(cr4() & CR4_LA57 == 0, "back in four levels");
}

extern "C" fn five_level_checks() -> u32 {
    let number = traps::processor();
    check!(cr4() & CR4_LA57 != 0, "CR4 {:#x}", cr4());
    let first = 200 + 8 * number;
    let device = memory::map(first, TEST_RAM + 0x1000 * number as u64, PRESENT | WRITABLE) + ABOVE;
    let ram = memory::map(first + 1, address(&RAM[number][0]), PRESENT | WRITABLE) + ABOVE;
    set_word(device + 0x80, 0x5a5a_0000 + number as u32);
    check!(word(device + 0x80) == 0x5a5a_0000 + number as u32, "a device above 48 bits");
    set_word(ram, 0);
    // SAFETY: both pages are this processor's.
    unsafe { asm!("movsd", inout("rsi") device + 0x80 => _, inout("rdi") ram => _) };
    check!(word(ram) == 0x5a5a_0000 + number as u32, "MOVS above 48 bits: {:#x}", word(ram));
    let nowhere = 3 << 50;
    check!(fault_of(|| write(nowhere)) == (2, nowhere), "nothing above 48 bits");
    check!(fault_of(|| move_from(device, nowhere)) == (2, nowhere), "nothing above 48 bits, in software");
    let before = count(GENERAL_PROTECTION);
    move_from(device, 1 << 57);
    check!(count(GENERAL_PROTECTION) == before + 1, "an address of 58 bits");
    0x57
}
