//! Tasks of the processor (APM vol. 2, 12): code of 32-bit mode that switches between them in every way there is, and what it
//! leaves. [`Tasks::run`] goes there by [`visit`].
//!
//! Each task has a state segment, a stack and a piece of code that counts itself in [`WORDS`] and goes back by IRET, so that
//! it goes on behind that the next time. Two go back by a jump. On demand everything that a switch touches (state segments,
//! stacks, descriptors) is forgotten by the host before each switch, which then stops in the middle of whatever led to it.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::traps;
use crate::visit::{Mode, REAL, Visit};

/// Selectors: this many bytes apart from [`FIRST`] on.
const FIRST: usize = 0x20;
/// Tasks by number: the one that everything begins with, those that are called, jumped to, entered for #GP, NMI and an
/// interrupt, that of virtual-8086 mode, and the one that its #UD leads to.
pub(crate) const MAIN: usize = 0;
const CALLED: usize = 1;
const JUMPED: usize = 2;
pub(crate) const FAULT: usize = 3;
pub(crate) const NMI: usize = 4;
pub(crate) const INTERRUPT: usize = 5;
pub(crate) const VIRTUAL: usize = 6;
const UNDEFINED: usize = 7;
const COUNT: usize = 8;

/// Words of a task's state segment (12.2.5).
const CR3: usize = 7;
const EIP: usize = 8;
pub(crate) const EFLAGS: usize = 9;
pub(crate) const EBX: usize = 13;
const ESP: usize = 14;
const ES: usize = 18;
const CS: usize = 19;
const SS: usize = 20;
const DS: usize = 21;
const FS: usize = 22;
const GS: usize = 23;

const DATA: u32 = 0x10;
const CODE: u32 = 0x18;
const RFLAGS_FIXED: u32 = 2;
const RFLAGS_VM: u32 = 1 << 17;
/// Where the code of virtual-8086 mode is, in the page of real mode.
const VIRTUAL_CODE: u32 = REAL as u32 + 0xd00;

/// What tasks leave: see the code.
#[unsafe(no_mangle)]
pub(crate) static TASKS_WORDS: [AtomicU32; 32] = [const { AtomicU32::new(0) }; 32];

#[repr(C, align(4096))]
struct States([[AtomicU32; 32]; COUNT]);
#[repr(C, align(4096))]
struct Stacks([[AtomicU32; 128]; COUNT]);
#[repr(C, align(4096))]
struct Table([AtomicU64; 16]);

#[unsafe(no_mangle)]
static TASKS_STATES: States = States([const { [const { AtomicU32::new(0) }; 32] }; COUNT]);
#[unsafe(no_mangle)]
static TASKS_STACKS: Stacks = Stacks([const { [const { AtomicU32::new(0) }; 128] }; COUNT]);
#[unsafe(no_mangle)]
static TASKS_TABLE: Table = Table([const { AtomicU64::new(0) }; 16]);

global_asm!(
    r#"
    .code32
    // Words: 0 calls, 1 calls that went on behind IRET, 2 jumps, 3 faults, 4 and 5 their codes, 6 NMIs, 7 interrupts,
    // 8 #UD of virtual-8086 mode, 9 where a fault goes on, 10 its code, 11 whether the host is to forget, 12 SYSENTER,
    // 13 the stack pointer there, 14 the local APIC, 15 the status word.
tasks_forget:
    cmp dword ptr [TASKS_WORDS + 44], 0
    je 2f
    mov eax, offset TASKS_STATES
    out 0xe4, eax
    mov eax, offset TASKS_STACKS
    out 0xe4, eax
    mov eax, offset TASKS_TABLE
    out 0xe4, eax
2:  ret

    .global tasks_run
tasks_run:
    push ebx
    push esi
    push edi
    push ebp
    sgdt [tasks_gdt_seen]
    lgdt [tasks_gdt_pointer]
    mov eax, 0x20
    ltr ax
    call tasks_forget
    .byte 0x9a
    .long 0xf4f4f4f4
    .short 0x28
    call tasks_forget
    .byte 0x9a
    .long 0xf4f4f4f4
    .short 0x28
    call tasks_forget
    .byte 0xea
    .long 0xf4f4f4f4
    .short 0x30
    call tasks_forget
    int 0x31
    // A fault of the processor's own, and one that is injected.
    mov dword ptr [TASKS_WORDS + 36], offset tasks_behind_1
    call tasks_forget
    mov eax, 0x1ff8
    mov fs, eax
tasks_behind_1:
    mov eax, [TASKS_WORDS + 40]
    mov [TASKS_WORDS + 16], eax
    mov dword ptr [TASKS_WORDS + 36], offset tasks_behind_2
    call tasks_forget
    mov ecx, 0x12345678
    rdmsr
tasks_behind_2:
    mov eax, [TASKS_WORDS + 40]
    mov [TASKS_WORDS + 20], eax
    // Two NMIs.
    mov esi, [TASKS_WORDS + 56]
    mov edi, 2
3:  mov ebx, [TASKS_WORDS + 24]
    call tasks_forget
    mov dword ptr [esi + 0x310], 0
    mov dword ptr [esi + 0x300], 0x44400
4:  pause
    cmp [TASKS_WORDS + 24], ebx
    je 4b
    dec edi
    jnz 3b
    // An interrupt.
    mov ebx, [TASKS_WORDS + 28]
    call tasks_forget
    mov dword ptr [esi + 0x300], 0x4403e
    sti
5:  pause
    cmp [TASKS_WORDS + 28], ebx
    je 5b
    cli
    // Virtual-8086 mode and back.
    call tasks_forget
    .byte 0xea
    .long 0
    .short 0x50
    // A switch leaves the floating-point state to be switched.
    smsw eax
    mov [TASKS_WORDS + 60], eax
    clts
    // To where the registers say, which an exit has saved and loaded meanwhile.
    xor edx, edx
    mov ecx, 0x174
    mov eax, 0x18
    wrmsr
    mov ecx, 0x175
    lea eax, [esp - 64]
    wrmsr
    mov ecx, 0x176
    mov eax, offset tasks_entered
    wrmsr
    mov ebp, esp
    xor eax, eax
    cpuid
    sysenter
    ud2
tasks_entered:
    mov eax, 0x10
    mov ss, eax
    mov [TASKS_WORDS + 52], esp
    mov esp, ebp
    inc dword ptr [TASKS_WORDS + 48]
    xor edx, edx
    xor eax, eax
    mov ecx, 0x174
    wrmsr
    lgdt [tasks_gdt_seen]
    pop ebp
    pop edi
    pop esi
    pop ebx
    ret

task_called:
    inc dword ptr [TASKS_WORDS]
    iretd
    inc dword ptr [TASKS_WORDS + 4]
    jmp task_called

task_jumped:
    inc dword ptr [TASKS_WORDS + 8]
    .byte 0xea
    .long 0
    .short 0x20
    jmp task_jumped

    // The code is on this task's own stack. The other goes on where it is told to, by its state.
task_fault:
    pop dword ptr [TASKS_WORDS + 40]
    inc dword ptr [TASKS_WORDS + 12]
    mov eax, [TASKS_WORDS + 36]
    mov [TASKS_STATES + 32], eax
    iretd
    jmp task_fault

task_nmi:
    inc dword ptr [TASKS_WORDS + 24]
    iretd
    jmp task_nmi

task_interrupt:
    inc dword ptr [TASKS_WORDS + 28]
    mov eax, [TASKS_WORDS + 56]
    mov dword ptr [eax + 0xb0], 0
    iretd
    jmp task_interrupt

task_undefined:
    inc dword ptr [TASKS_WORDS + 32]
    .byte 0xea
    .long 0
    .short 0x20
    jmp task_undefined

    .section .data
    .p2align 3
tasks_gdt_pointer:
    .short 16 * 8 - 1
    .long TASKS_TABLE
    .section .bss
    .p2align 3
tasks_gdt_seen: .skip 16
    .text
    .code64
"#
);

unsafe extern "C" {
    static tasks_run: u8;
    static task_called: u8;
    static task_jumped: u8;
    static task_fault: u8;
    static task_nmi: u8;
    static task_interrupt: u8;
    static task_undefined: u8;
}

fn address<T>(thing: *const T) -> u32 {
    thing.expose_provenance() as u32
}

/// A word that the tasks have left.
pub(crate) fn left(index: usize) -> u32 {
    TASKS_WORDS[index].load(Ordering::SeqCst)
}

/// A word of a task's state segment.
pub(crate) fn state(task: usize, word: usize) -> u32 {
    TASKS_STATES.0[task][word].load(Ordering::SeqCst)
}

/// Runs all tasks in 32-bit mode, in the paging that `root` (0: none) and CR4 say. Task gates are put in place meanwhile; the
/// processor's own tables are loaded anew behind it.
pub(crate) fn run(visit: &Visit, number: usize, root: u64, cr4: u64, forget: bool) {
    TASKS_WORDS.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    TASKS_WORDS[11].store(forget.into(), Ordering::SeqCst);
    TASKS_WORDS[14].store(crate::apic::WINDOW as u32, Ordering::SeqCst);
    let segments = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff];
    for (entry, value) in TASKS_TABLE.0.iter().zip(segments) {
        entry.store(value, Ordering::SeqCst);
    }
    let code = [
        &raw const tasks_run,
        &raw const task_called,
        &raw const task_jumped,
        &raw const task_fault,
        &raw const task_nmi,
        &raw const task_interrupt,
        &raw const tasks_run,
        &raw const task_undefined,
    ];
    for (task, code) in code.into_iter().enumerate() {
        let words = &TASKS_STATES.0[task];
        words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        let set = |word: usize, value: u32| words[word].store(value, Ordering::SeqCst);
        set(CR3, root as u32);
        set(EIP, address(code));
        set(EFLAGS, RFLAGS_FIXED);
        set(ESP, address(&raw const TASKS_STACKS.0[task]) + size_of_val(&TASKS_STACKS.0[task]) as u32);
        [ES, SS, DS, FS, GS].iter().for_each(|word| set(*word, DATA));
        set(CS, CODE);
        let base = u64::from(address(words));
        let descriptor = 0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24) << 56;
        TASKS_TABLE.0[FIRST / 8 + task].store(descriptor, Ordering::SeqCst);
    }
    let words = &TASKS_STATES.0[VIRTUAL];
    let start =
        [(EIP, 0), (EFLAGS, RFLAGS_FIXED | RFLAGS_VM), (CS, VIRTUAL_CODE >> 4), (SS, REAL as u32 >> 4), (ESP, 0xf00)];
    start.into_iter().for_each(|(word, value)| words[word].store(value, Ordering::SeqCst));
    // CPUID, UD2.
    crate::machine::set_word(VIRTUAL_CODE.into(), 0x0b0f_a20f);
    for (vector, task) in [(2, NMI), (6, UNDEFINED), (13, FAULT), (0x31, CALLED), (0x3e, INTERRUPT)] {
        visit.set_task_gate(vector, (FIRST + 8 * task) as u32);
    }
    let mode = if root == 0 { Mode::Flat } else { Mode::Paged };
    // SAFETY: the code is made for these modes; the processor's own task is loaded anew before anything needs it.
    unsafe {
        visit.call(mode, root, cr4, (&raw const tasks_run).expose_provenance() as u64);
    }
    traps::set_up(number);
}

const _: () = assert!(FIRST + 8 * JUMPED == 0x30 && FIRST + 8 * VIRTUAL == 0x50 && FIRST + 8 * MAIN == 0x20);
