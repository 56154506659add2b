//! Random machine code on all processors, for ever, from the seed on the command line (`random seed=N`).
//!
//! This is the guest that nobody wants. Nothing of it passes or fails; what counts is that the hypervisor below goes on. A
//! seed says what kind of guest it is:
//!
//! - one in eight has no sandbox: memory is filled with random bytes, and both processors jump into it, without an interrupt
//!   descriptor table to save them;
//! - the others write programs ([`program`]) and run them, each in a random mode and privilege level, with registers that
//!   point at devices, page tables and nowhere.
//!
//! **The sandbox.** Every event whatsoever, an exception, an interrupt, an NMI, ends the program: the gates of a processor all
//! lead to one handler, which puts control registers right, takes a fresh stack, returns by IRET (which lets NMIs in again) and
//! begins the next round. A round writes descriptor tables, task state and page tables anew, since the program may have
//! written there, and a PIT that reaches all processors as NMI through the I/O APIC, so that a program which loops or sleeps
//! with interrupts off ends too. A program that destroys the handler, or leaves 64-bit mode, may destroy the guest: then it
//! has lost, and the hypervisor makes the next one.

mod program;

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::smp::{self, MOST};
use crate::{apic, cpu, machine};

/// One guest in so many runs without a sandbox.
const RAW_EVERY: u64 = 8;
/// Where programs are: 1 MiB a processor.
const PROGRAMS: u64 = 0x60_0000;
/// Below 16 MiB a base is in one piece of a descriptor.
const PROGRAM_STRIDE: u64 = 1 << 20;
/// Where the memory is that programs mean to use: behind the programs.
const SCRATCH: u64 = 0xe0_0000;
const SCRATCH_BYTES: u64 = 6 << 20;
/// Bytes of random code in a guest without a sandbox.
const RAW_BYTES: u64 = 1 << 20;

const CODE_64: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE_32: u16 = 0x18;
const USER_CODE_32: u16 = 0x23;
const USER_DATA: u16 = 0x2b;
const USER_CODE_64: u16 = 0x33;
const CODE_16: u16 = 0x38;
const TASK: u16 = 0x40;
const DESCRIPTORS: [u64; 10] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x008f_9b00_0000_ffff,
    0,
    0,
];

/// Numbers that look random (SplitMix64), the same ones for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(crate) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// What a processor starts a program with, in the order in which it is popped.
#[repr(C)]
struct Start {
    general: [u64; 15],
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// A processor's tables, stack and state.
#[repr(C, align(4096))]
struct Processor {
    idt: [[u64; 2]; 256],
    gdt: [u64; DESCRIPTORS.len()],
    tss: [u32; 26],
    event_stack: [u8; 4096],
    start: Start,
}

static mut PROCESSORS: [Processor; MOST] = [const {
    Processor {
        idt: [[0; 2]; 256],
        gdt: [0; DESCRIPTORS.len()],
        tss: [0; 26],
        event_stack: [0; 4096],
        start: Start { general: [0; 15], rip: 0, cs: 0, rflags: 0, rsp: 0, ss: 0 },
    }
}; MOST];

#[unsafe(no_mangle)]
static mut RANDOM_STACKS: [[u8; 1 << 15]; MOST] = [[0; 1 << 15]; MOST];

static ON: AtomicBool = AtomicBool::new(false);
static SEED: AtomicU64 = AtomicU64::new(0);
static ROUNDS: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];

global_asm!(
    r#"
    .text
    .p2align 4
    .global random_escapes
    // 16 bytes a processor.
random_escapes:
    .set number, 0
    .rept 8
    .p2align 4
    mov edi, number
    jmp random_escape
    .set number, number + 1
    .endr

random_escape:
    cld
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov eax, 0x80010033
    mov cr0, rax
    mov eax, offset long_root
    mov cr3, rax
    mov eax, 0x620
    mov cr4, rax
    mov ecx, 0xc0000080
    mov eax, 0xd01
    xor edx, edx
    wrmsr
    mov eax, edi
    inc eax
    shl eax, 15
    add eax, offset RANDOM_STACKS
    mov esp, eax
    push 0x10
    lea rax, [rsp - 32]
    push rax
    push 2
    push 8
    lea rax, [rip + random_again]
    push rax
    iretq
random_again:
    and rsp, -16
    call random_round
    ud2
"#
);

unsafe extern "C" {
    static random_escapes: u8;
    static mut long_root: [u64; 512];
    static mut long_pointers: [u64; 512];
    static mut directories: [u64; 2048];
}

/// Runs random code until the machine ends.
pub(crate) fn run() {
    let seed = machine::command_line().split(' ').find_map(|word| word.strip_prefix("seed="));
    SEED.store(seed.and_then(|seed| seed.parse().ok()).unwrap_or(0), Ordering::SeqCst);
    ON.store(true, Ordering::SeqCst);
    smp::everywhere(|number| go(number));
}

/// A processor that was started anew joins in again.
pub(crate) fn again(number: usize) {
    if ON.load(Ordering::SeqCst) {
        go(number);
    }
}

fn go(number: usize) -> ! {
    let seed = SEED.load(Ordering::SeqCst);
    if seed % RAW_EVERY == RAW_EVERY - 1 {
        raw(&mut Random::new(seed ^ (number as u64) << 56));
    }
    random_round(number)
}

/// Jumps into random bytes with whatever tables there are.
fn raw(random: &mut Random) -> ! {
    let at = PROGRAMS + random.below(2) * PROGRAM_STRIDE;
    for offset in (0..RAW_BYTES).step_by(8) {
        put(at + offset, random.next());
    }
    let no_table = [0u64; 2];
    let entry = at + random.below(RAW_BYTES);
    // SAFETY: there is no safety here, and no way back: nothing of this kernel is used behind the jump.
    unsafe {
        asm!(
            "lidt [{table}]", "mov rsp, {stack}", "jmp {entry}",
            table = in(reg) &no_table, stack = in(reg) SCRATCH + SCRATCH_BYTES, entry = in(reg) entry,
            in("rax") random.next(), in("rcx") random.next(), in("rdx") random.next(),
            options(noreturn)
        );
    }
}

/// Where a processor's tables begin.
fn table_of_processors(number: u64) -> u32 {
    let all = (&raw const PROCESSORS).expose_provenance();
    (all + number as usize % MOST * size_of::<Processor>()) as u32
}

fn put(address: u64, value: u64) {
    // SAFETY: callers pass addresses of RAM that nothing of this kernel lies in.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(value) };
}

/// One program, from clean tables.
#[unsafe(no_mangle)]
extern "C" fn random_round(number: usize) -> ! {
    let number = number % MOST;
    let round = ROUNDS[number].fetch_add(1, Ordering::SeqCst);
    restore_paging();
    restore_tables(number);
    if round.is_multiple_of(16) {
        restore_devices(number);
    }
    let seed = SEED.load(Ordering::SeqCst);
    let mut random = Random::new(Random::new(seed).next() ^ (number as u64) << 48 ^ round << 8);
    let programs = PROGRAMS + number as u64 * PROGRAM_STRIDE;
    let code = programs + random.below(0x8000);
    program::write(code, &mut random);
    let (cs, ss) = random.of(&[
        (CODE_64, DATA),
        (CODE_64, DATA),
        (CODE_64, DATA),
        (CODE_64, DATA),
        (CODE_32, DATA),
        (CODE_16, DATA),
        (USER_CODE_64, USER_DATA),
        (USER_CODE_32, USER_DATA),
    ]);
    // Interrupts on in most; sometimes single steps, alignment checks, all I/O for everyone.
    let rflags = 2 | random.of(&[0x200, 0x200, 0x200, 0, 0x100, 0x4_0200, 0x3200, 0x1_0200]);
    // SAFETY: each processor uses its own; who uses it is this function, which does not return.
    let start = unsafe { &mut *(&raw mut PROCESSORS).cast::<Processor>().wrapping_add(number) };
    let start = &mut start.start;
    start.general = core::array::from_fn(|_| program::pointer(&mut random));
    start.rip = if cs == CODE_16 { code - programs } else { code };
    start.cs = u64::from(cs);
    start.rflags = rflags;
    start.rsp = SCRATCH + 0x8_0000 * (number as u64 + 1);
    start.ss = u64::from(ss);
    // SAFETY: the state is complete, and nothing comes back but events, whose handler needs nothing of this one's stack.
    unsafe {
        asm!(
            "mov rsp, {start}",
            "pop rax", "pop rcx", "pop rdx", "pop rbx", "pop rbp", "pop rsi", "pop rdi", "pop r8",
            "pop r9", "pop r10", "pop r11", "pop r12", "pop r13", "pop r14", "pop r15",
            "iretq",
            start = in(reg) start,
            options(noreturn)
        );
    }
}

/// The first 4 GiB mapped to themselves, for user code too.
fn restore_paging() {
    // SAFETY: the tables say what they say already, or what a program wrote, which nobody relies on.
    unsafe {
        let (root, pointers) = (&raw mut long_root, &raw mut long_pointers);
        let directory = (&raw mut directories).cast::<u64>();
        root.cast::<u64>().write_volatile(pointers.expose_provenance() as u64 | 7);
        for index in 0..4 {
            let table = directory.expose_provenance() as u64 + 4096 * index as u64;
            pointers.cast::<u64>().add(index).write_volatile(table | 7);
        }
        for index in 0..2048 {
            let entry = directory.add(index);
            let right = (index as u64) << 21 | 0x87;
            if entry.read_volatile() & !0x60 != right {
                entry.write_volatile(right);
            }
        }
        asm!("mov rax, cr3", "mov cr3, rax", out("rax") _, options(nostack));
    }
}

fn restore_tables(number: usize) {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    // SAFETY: the processor's own tables; the handler that all gates lead to needs none of what was there before.
    unsafe {
        let own = &mut *(&raw mut PROCESSORS).cast::<Processor>().wrapping_add(number);
        let handler = (&raw const random_escapes).expose_provenance() as u64 + 16 * number as u64;
        // Interrupt gates for everyone, on the stack of the first entry.
        let low = handler & 0xffff | u64::from(CODE_64) << 16 | 1 << 32 | 0xee00 << 32 | (handler & 0xffff_0000) << 32;
        for gate in &mut own.idt {
            if *gate != [low, 0] {
                *gate = [low, 0];
            }
        }
        own.gdt = DESCRIPTORS;
        // The 16-bit segment begins where the processor's programs do.
        own.gdt[usize::from(CODE_16 / 8)] |= (PROGRAMS + number as u64 * PROGRAM_STRIDE) << 16;
        let task = (&raw const own.tss).expose_provenance() as u64;
        own.gdt[8] = 103 | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56;
        own.gdt[9] = task >> 32;
        own.tss = [0; 26];
        let top = (&raw const own.event_stack).expose_provenance() as u32 + 4096;
        (own.tss[1], own.tss[9]) = (top, top);
        let gdt = Pointer(size_of_val(&own.gdt) as u16 - 1, (&raw const own.gdt).expose_provenance() as u64);
        let idt = Pointer(size_of_val(&own.idt) as u16 - 1, (&raw const own.idt).expose_provenance() as u64);
        asm!(
            "lgdt [{gdt}]", "lidt [{idt}]", "ltr {task:x}", "xor {zero:e}, {zero:e}", "lldt {zero:x}",
            gdt = in(reg) &gdt, idt = in(reg) &idt, task = in(reg) TASK, zero = out(reg) _, options(nostack)
        );
    }
}

/// The local APIC on; and, from the first processor, the timer whose NMI ends programs that never would.
fn restore_devices(number: usize) {
    cpu::wrmsr(apic::APIC_BASE, 0xfee0_0000 | apic::ENABLE | if number == 0 { 1 << 8 } else { 0 });
    apic::enable();
    apic::write(apic::EOI, 0);
    apic::write(apic::LVT_TIMER, 0x2_0040);
    apic::write(apic::TIMER_INITIAL, 400_000);
    if number == 0 {
        let (select, data) = (0xfec0_0000, 0xfec0_0010);
        // The PIT's line, edge, NMI to everyone.
        for (register, value) in [(0x15, 0xff00_0000), (0x14, 0x400)] {
            machine::set_word(select, register);
            machine::set_word(data, value);
        }
        // 500 a second.
        cpu::outb(0x43, 0x34);
        cpu::outb(0x40, 0x52);
        cpu::outb(0x40, 0x09);
    }
}
