//! Exceptions and interrupts.
//!
//! All handlers run on stacks of the interrupt stack table: 1 for most, 2 for NMI, 3 for double faults. Every event is
//! counted by vector and processor. An exception must have been expected: the code that provokes it leaves an address to
//! go on at ([`resume_at`]); any other fails the check. Interrupts of the local APIC are ended there.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::cpu::{inb, outb};
use crate::smp::MOST;
use crate::{apic, machine, serial};

pub(crate) const DEBUG: u8 = 1;
pub(crate) const NMI: u8 = 2;
pub(crate) const BREAKPOINT: u8 = 3;
pub(crate) const INVALID_OPCODE: u8 = 6;
pub(crate) const DOUBLE_FAULT: u8 = 8;
pub(crate) const SEGMENT_NOT_PRESENT: u8 = 11;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
pub(crate) const PAGE_FAULT: u8 = 14;

const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const FIRST_TSS: u16 = 0x28;
const SPURIOUS: u64 = 0xff;
/// Code and data of user mode: behind the task segments, in the order that SYSRET wants.
const USER: usize = 5 + 2 * MOST;
const USER_DATA: u16 = (USER as u16 + 1) * 8 | 3;
const USER_CODE: u16 = (USER as u16 + 2) * 8 | 3;
/// What STAR holds: SYSCALL goes to this kernel's segments, SYSRET to the user's.
pub(crate) const STAR: u64 = (USER as u64 * 8 | 3) << 48 | (CODE as u64) << 32;
const DESCRIPTORS: usize = USER + 3;
const STACK_BYTES: usize = 16 << 10;
/// DR6 when nothing is noted in it.
pub(crate) const DR6_CLEAN: u64 = 0xffff_0ff0;

/// What is known about a processor's events.
pub(crate) struct Events {
    counts: [AtomicU32; 256],
    resume: AtomicU64,
    code: AtomicU64,
    cr2: AtomicU64,
    rip: AtomicU64,
    /// DR6 at its last #DB, and RFLAGS in the frame of its last exception.
    dr6: AtomicU64,
    flags: AtomicU64,
    /// Where it last was interrupted by an NMI.
    nmi_rip: AtomicU64,
    /// Its last exception, and the stack that this kernel goes on with behind one of user mode.
    vector: AtomicU64,
    stack: AtomicU64,
    /// What its NMI handler does.
    on_nmi: AtomicU32,
}

/// What an NMI handler does beside counting.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum OnNmi {
    /// Nothing.
    Nothing = 0,
    /// It sends itself another, once, and sees to it that this does not come before it is through.
    Again = 1,
    /// It executes an IRET that faults, and then the one that does not.
    Fault = 2,
}

static EVENTS: [Events; MOST] = [const {
    Events {
        counts: [const { AtomicU32::new(0) }; 256],
        resume: AtomicU64::new(0),
        code: AtomicU64::new(0),
        cr2: AtomicU64::new(0),
        rip: AtomicU64::new(0),
        dr6: AtomicU64::new(0),
        flags: AtomicU64::new(0),
        nmi_rip: AtomicU64::new(0),
        vector: AtomicU64::new(0),
        stack: AtomicU64::new(0),
        on_nmi: AtomicU32::new(0),
    }
}; MOST];

/// Vectors 0x20 to 0x2f come from the 8259s.
pub(crate) static BY_8259: AtomicBool = AtomicBool::new(false);

static BEFORE_END: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Has a function called in each interrupt, with its vector, before the interrupt is ended.
pub(crate) fn before_end(function: fn(u8)) {
    BEFORE_END.store(function as *mut (), Ordering::SeqCst);
}

#[repr(C)]
struct Frame {
    general: [u64; 15],
    vector: u64,
    code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// A gate; two words.
type Gate = [u64; 2];

#[repr(C, align(4096))]
pub(crate) struct Table([Gate; 256]);

#[repr(C, align(16))]
struct Tss {
    words: [u32; 26],
}

#[repr(C, align(4096))]
struct Stacks([[u8; STACK_BYTES]; 3]);

static mut IDT: Table = Table([[0; 2]; 256]);
static mut GDT: [u64; DESCRIPTORS] = [0; DESCRIPTORS];
static mut TSS: [Tss; MOST] = [const { Tss { words: [0; 26] } }; MOST];
static mut STACKS: [Stacks; MOST] = [const { Stacks([[0; STACK_BYTES]; 3]) }; MOST];

global_asm!(
    r#"
    .text
    .p2align 4
    .global trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .p2align 4
    .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push 0
    .endif
    push vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    call trap
    fxrstor64 [rsp]
    mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
"#
);

unsafe extern "C" {
    static trap_stubs: u8;
}

/// The number of the processor that calls: its task register says.
pub(crate) fn processor() -> usize {
    let selector: u64;
    // SAFETY: it only reads.
    unsafe { asm!("str {:r}", out(reg) selector, options(nomem, nostack)) };
    usize::from((selector as u16 - FIRST_TSS) / 16)
}

/// Gives a processor its tables. Processor 0 first, before any other runs.
pub(crate) fn set_up(number: usize) {
    let stack = |index: usize| {
        ((&raw const STACKS).expose_provenance() + number * size_of::<Stacks>() + (index + 1) * STACK_BYTES) as u64
    };
    let tss = (&raw mut TSS).cast::<Tss>().wrapping_add(number);
    let gdt = (&raw mut GDT).cast::<u64>();
    // SAFETY: processor 0 fills the shared tables before others exist; each fills its own TSS and descriptor.
    unsafe {
        for index in 0..3 {
            let top = stack(index);
            (*tss).words[9 + 2 * index] = top as u32;
            (*tss).words[10 + 2 * index] = (top >> 32) as u32;
        }
        (*tss).words[1] = stack(0) as u32;
        if number == 0 {
            for (index, entry) in
                [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff, 0].into_iter().enumerate()
            {
                gdt.add(index).write(entry);
            }
            for (index, entry) in
                [0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff].into_iter().enumerate()
            {
                gdt.add(USER + index).write(entry);
            }
            for vector in 0..=255 {
                set_gate(vector, true);
            }
        }
        let base = tss.expose_provenance() as u64;
        let low = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        gdt.add(5 + 2 * number).write(low);
        gdt.add(6 + 2 * number).write(base >> 32);
        load_tables(FIRST_TSS + 16 * number as u16);
    }
}

/// # Safety
/// The tables are filled.
unsafe fn load_tables(tss: u16) {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let gdt = Pointer(size_of::<[u64; DESCRIPTORS]>() as u16 - 1, (&raw const GDT).expose_provenance() as u64);
    let idt = Pointer(size_of::<Table>() as u16 - 1, idt_address());
    // SAFETY: the caller's tables have the same code and data segments that are in use.
    unsafe {
        asm!(
            "lgdt [{gdt}]", "lidt [{idt}]", "ltr {tss:x}",
            gdt = in(reg) &gdt, idt = in(reg) &idt, tss = in(reg) tss, options(nostack)
        );
    }
}

/// Where the IDT is.
pub(crate) fn idt_address() -> u64 {
    (&raw const IDT).expose_provenance() as u64
}

/// Makes a gate present or not.
pub(crate) fn set_gate(vector: u8, present: bool) {
    let handler = (&raw const trap_stubs).expose_provenance() as u64 + u64::from(vector) * 16;
    let stack = match vector {
        NMI => 2,
        DOUBLE_FAULT => 3,
        _ => 1,
    };
    let kind = if present { 0x8e00 } else { 0x0e00 };
    let low = handler & 0xffff | u64::from(CODE) << 16 | (stack | kind) << 32 | (handler & 0xffff_0000) << 32;
    // SAFETY: gates are changed by processor 0 only, while no event uses this one.
    unsafe { (&raw mut IDT.0[usize::from(vector)]).write_volatile([low, handler >> 32]) };
}

/// How often a vector has come on this processor.
pub(crate) fn count(vector: u8) -> u32 {
    count_on(processor(), vector)
}

/// How often a vector has come on a processor.
pub(crate) fn count_on(number: usize, vector: u8) -> u32 {
    EVENTS[number].counts[usize::from(vector)].load(Ordering::SeqCst)
}

/// Error code, CR2 and RIP of this processor's last exception.
pub(crate) fn last() -> (u64, u64, u64) {
    let events = &EVENTS[processor()];
    (events.code.load(Ordering::SeqCst), events.cr2.load(Ordering::SeqCst), events.rip.load(Ordering::SeqCst))
}

/// DR6 at this processor's last #DB, and the flags in the frame of its last exception.
pub(crate) fn last_debug() -> (u64, u64) {
    let events = &EVENTS[processor()];
    (events.dr6.load(Ordering::SeqCst), events.flags.load(Ordering::SeqCst))
}

/// This processor's last exception.
pub(crate) fn last_vector() -> u8 {
    EVENTS[processor()].vector.load(Ordering::SeqCst) as u8
}

/// Runs code in user mode until it raises an exception; what RDX, RSI and RDI are there. Returns what RAX was in the end.
///
/// # Safety
/// The code and the stack are mapped for the user, and the code leaves this kernel's memory alone.
pub(crate) unsafe fn in_user_mode(code: u64, stack: u64, [rdx, rsi, rdi]: [u64; 3]) -> u64 {
    let events = &EVENTS[processor()];
    let rax;
    // SAFETY: all registers are declared, or put back; the handler restores this stack.
    unsafe {
        asm!(
            "push rbx", "push rbp",
            "mov [r8], rsp",
            "lea rax, [rip + 55f]", "mov [r9], rax",
            "push r10", "push r11", "push 2", "push r12", "push r13",
            "xor eax, eax",
            "iretq",
            "55:", "pop rbp", "pop rbx",
            in("r8") events.stack.as_ptr(), in("r9") events.resume.as_ptr(),
            in("r10") u64::from(USER_DATA), in("r11") stack, in("r12") u64::from(USER_CODE), in("r13") code,
            inout("rdx") rdx => _, inout("rsi") rsi => _, inout("rdi") rdi => _, out("rax") rax, out("rcx") _,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _, lateout("r12") _, lateout("r13") _,
            out("r14") _, out("r15") _,
        );
    }
    rax
}

/// Where this processor last was interrupted by an NMI.
pub(crate) fn last_nmi() -> u64 {
    EVENTS[processor()].nmi_rip.load(Ordering::SeqCst)
}

/// Where this processor keeps the address to go on at after its next exception.
pub(crate) fn resume_at() -> *mut u64 {
    EVENTS[processor()].resume.as_ptr()
}

/// Says what this processor's NMI handler does.
pub(crate) fn on_nmi(what: OnNmi) {
    EVENTS[processor()].on_nmi.store(what as u32, Ordering::SeqCst);
}

#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    let number = processor();
    let events = &EVENTS[number];
    events.counts[frame.vector as usize & 0xff].fetch_add(1, Ordering::SeqCst);
    if frame.vector as u8 == NMI {
        events.nmi_rip.store(frame.rip, Ordering::SeqCst);
        match events.on_nmi.swap(OnNmi::Nothing as u32, Ordering::SeqCst) {
            0 => {}
            what => {
                apic::send(0, apic::NMI | apic::SELF | apic::ASSERT);
                check_nmi_waits(number);
                if what == OnNmi::Fault as u32 {
                    // Its handler ends with an IRET that does not fault, and with that the mask, while this NMI's stack is
                    // still in use.
                    move_nmi_stack(number, -8192);
                    faulting_iret();
                    move_nmi_stack(number, 8192);
                }
            }
        }
        return;
    }
    if frame.vector >= 32 {
        let function = BEFORE_END.load(Ordering::SeqCst);
        if !function.is_null() {
            // SAFETY: only `before_end` stores here.
            unsafe { core::mem::transmute::<*mut (), fn(u8)>(function)(frame.vector as u8) };
        }
        if (0x20..0x30).contains(&frame.vector) && BY_8259.load(Ordering::SeqCst) {
            end_8259(frame.vector);
        } else if frame.vector != SPURIOUS {
            apic::write(apic::EOI, 0);
        }
        return;
    }
    let cr2: u64;
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
    events.code.store(frame.code, Ordering::SeqCst);
    events.cr2.store(cr2, Ordering::SeqCst);
    events.rip.store(frame.rip, Ordering::SeqCst);
    events.flags.store(frame.rflags, Ordering::SeqCst);
    events.vector.store(frame.vector, Ordering::SeqCst);
    if frame.vector as u8 == DEBUG {
        let dr6: u64;
        // SAFETY: what it says is noted; nobody else needs it.
        unsafe { asm!("mov {0}, dr6", "mov dr6, {1}", out(reg) dr6, in(reg) DR6_CLEAN, options(nostack)) };
        events.dr6.store(dr6, Ordering::SeqCst);
    }
    match events.resume.swap(0, Ordering::SeqCst) {
        0 if [DEBUG, BREAKPOINT].contains(&(frame.vector as u8)) => frame.rflags &= !(1 << 8),
        0 => {
            let Frame { vector, code, rip, .. } = *frame;
            serial::print(format_args!(
                "FAIL: unexpected exception {vector} ({code:#x}) at {rip:#x}, CR2 {cr2:#x}, processor {number}\n"
            ));
            machine::exit(1);
        }
        address => {
            frame.rip = address;
            frame.rflags &= !(1 << 8);
            if frame.cs & 3 != 0 {
                (frame.cs, frame.ss) = (CODE.into(), DATA.into());
                frame.rsp = events.stack.load(Ordering::SeqCst);
            }
        }
    }
}

/// Moves the stack on which this processor's next NMI is handled, by so many bytes.
fn move_nmi_stack(number: usize, by: i32) {
    let tss = (&raw mut TSS).cast::<Tss>().wrapping_add(number);
    // SAFETY: a processor's TSS is written by that processor only. Stacks lie below 4 GiB.
    unsafe {
        let low = &raw mut (*tss).words[11];
        low.write_volatile(low.read_volatile().wrapping_add_signed(by));
    }
}

/// Executes an IRET to a segment that does not exist, and goes on behind the fault.
fn faulting_iret() {
    let resume = resume_at();
    // SAFETY: the fault is expected; the stack pointer is put back behind it.
    unsafe {
        asm!(
            "mov {sp}, rsp", "lea {s}, [rip + 55f]", "mov [{resume}], {s}",
            "push 0", "push {sp}", "pushfq", "push 0x1ff8", "push {s}", "iretq",
            "55:", "mov rsp, {sp}",
            sp = out(reg) _, s = out(reg) _, resume = in(reg) resume,
        );
    }
}

fn check_nmi_waits(number: usize) {
    let before = count_on(number, NMI);
    for _ in 0..100 {
        // An exit, after which it would come.
        inb(0x80);
    }
    if count_on(number, NMI) != before {
        serial::print(format_args!("FAIL: an NMI inside an NMI's handler\n"));
        machine::exit(1);
    }
}

fn end_8259(vector: u64) {
    if vector >= 0x28 {
        outb(0xa0, 0x20);
    }
    outb(0x20, 0x20);
}
