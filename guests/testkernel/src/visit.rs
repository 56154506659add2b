//! Ways out of 64-bit mode and back: to 32-bit mode with any paging or none, to real mode, and to 64-bit mode under other
//! tables, with five levels too.
//!
//! One processor at a time ([`visit`] sees to it): what the visited modes leave is in statics. Interrupts are off meanwhile;
//! exceptions of 32-bit mode are noted and go on at an address that was left for them, those of real mode have handlers in
//! the page at [`REAL`]. The stack stays the same: all memory is mapped to itself, in every mode.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Page in which real mode runs; its code is copied there.
pub(crate) const REAL: usize = 0x9000;
/// Offsets in it: what its code and its handlers leave.
pub(crate) const REAL_RESULTS: usize = 0xe00;

/// Where a visit goes.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Mode {
    /// 32-bit mode without paging.
    Flat = 0,
    /// 32-bit mode with the paging that CR4 says.
    Paged = 1,
    /// 64-bit mode.
    Long = 2,
}

/// What 32-bit code and its exceptions leave.
#[unsafe(no_mangle)]
pub(crate) static VISIT: [AtomicU32; 32] = [const { AtomicU32::new(0) }; 32];

/// Indices of [`VISIT`]: the last exception, how many there were, where to go on behind the next, and a word for code.
pub(crate) const VECTOR: usize = 0;
pub(crate) const CODE: usize = 1;
pub(crate) const CR2: usize = 2;
pub(crate) const COUNT: usize = 3;
pub(crate) const OWN: usize = 8;

#[unsafe(no_mangle)]
static VISIT_GATES: [AtomicU32; 128] = [const { AtomicU32::new(0) }; 128];

global_asm!(
    r#"
    .text
    .code64
    // rdi: CR3. rsi: CR4. rdx: the code to call. ecx: the mode. Returns what the code leaves in eax.
    .global visit_mode
visit_mode:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    cli
    mov rax, cr3
    push rax
    mov rax, cr4
    push rax
    mov ebp, esp
    mov ebx, ecx
    sidt [visit_idt_64]
    push 0x18
    lea rax, [rip + visit_32]
    push rax
    retfq

    .code32
visit_32:
    call visit_leave_long
    mov cr4, esi
    mov cr3, edi
    lidt [visit_idt_32]
    cmp ebx, 2
    je visit_long
    test ebx, ebx
    jz 3f
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
3:  call edx
    mov edi, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    jmp visit_back

visit_long:
    call visit_enter_long
    lidt [visit_idt_64]
    mov eax, offset visit_64
    push 8
    push eax
    retf

    .code64
visit_64:
    mov eax, 0x10
    mov ss, eax
    mov esp, esp
    and rsp, -16
    mov edx, edx
    call rdx
    mov edi, eax
    push 0x18
    lea rax, [rip + visit_32_again]
    push rax
    retfq

    .code32
visit_32_again:
    call visit_leave_long
visit_back:
    mov esp, ebp
    pop eax
    pop ecx
    mov cr4, eax
    pop eax
    pop ecx
    mov cr3, eax
    call visit_enter_long
    lidt [visit_idt_64]
    mov eax, offset visit_home
    push 8
    push eax
    retf

    .code64
visit_home:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov esp, esp
    mov eax, edi
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .code32
    // From compatibility mode to 32-bit mode without paging. Changes eax, and ecx and keeps edx.
visit_leave_long:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    push edx
    // An exit while EFER still has LME, and CR4 has no PAE.
    mov eax, cr4
    push eax
    and eax, 0xffffffdf
    mov cr4, eax
    push ebx
    xor eax, eax
    cpuid
    pop ebx
    pop eax
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    pop edx
    ret
    // And to compatibility mode under what CR3 and CR4 say.
visit_enter_long:
    push edx
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    pop edx
    ret

    // Exceptions of 32-bit mode, and the first interrupts.
    .p2align 4
    .global visit_stubs
visit_stubs:
    .set vector, 0
    .rept 64
    .p2align 4
    .if vector != 8 && (vector < 10 || vector > 14) && vector != 17
    push 0
    .endif
    push vector
    jmp visit_trap
    .set vector, vector + 1
    .endr
visit_trap:
    push eax
    mov eax, [esp + 4]
    mov [VISIT], eax
    mov eax, [esp + 8]
    mov [VISIT + 4], eax
    mov eax, cr2
    mov [VISIT + 8], eax
    inc dword ptr [VISIT + 12]
    xor eax, eax
    xchg eax, [VISIT + 16]
    test eax, eax
    jz 2f
    mov [esp + 12], eax
2:  pop eax
    add esp, 8
    iretd

    // What 32-bit code does, in any paging. A device's page is at [VISIT + 20], twelve bytes of it are used. With
    // [VISIT + 24] set there is paging, and a window of pages at that address: RAM, nothing, the device, RAM that can't be
    // written.
    .global visit_checks
visit_checks:
    push ebx
    push esi
    push edi
    mov edi, [VISIT + 20]
    mov eax, 0x5aa5c33c
    mov ecx, 2
    rep stosd
    mov eax, 7
    lock xadd [edi - 4], eax
    mov [VISIT + 32], eax
    mov eax, [edi - 4]
    mov [VISIT + 36], eax
    xor eax, eax
    cpuid
    mov [VISIT + 40], ebx
    int 0x30
    mov eax, [VISIT]
    mov [VISIT + 44], eax
    // An instruction that exits faults.
    mov dword ptr [VISIT + 16], offset visit_behind_4
    mov ecx, 0x12345678
    rdmsr
visit_behind_4:
    mov eax, [VISIT]
    mov [VISIT + 48], eax
    mov edx, [VISIT + 24]
    test edx, edx
    jz 9f
    // The processor's own fault.
    mov dword ptr [VISIT + 16], offset visit_behind_5
    mov eax, [edx + 0x1234]
visit_behind_5:
    mov eax, [VISIT + 4]
    mov [VISIT + 52], eax
    mov eax, [VISIT + 8]
    mov [VISIT + 56], eax
    // One that comes up inside an emulated instruction, which has got so far.
    mov dword ptr [VISIT + 16], offset visit_behind_6
    lea esi, [edx + 0x2000]
    lea edi, [edx + 0xff8]
    mov ecx, 16
    rep movsb
visit_behind_6:
    mov [VISIT + 60], ecx
    mov eax, [VISIT + 4]
    mov [VISIT + 64], eax
    mov eax, [VISIT + 8]
    mov [VISIT + 68], eax
    // And one that the page's rights raise.
    mov dword ptr [VISIT + 16], offset visit_behind_7
    lea edi, [edx + 0x3000]
    movsb
visit_behind_7:
    mov eax, [VISIT + 4]
    mov [VISIT + 72], eax
    mov eax, [edx + 0x2000]
    mov [VISIT + 76], eax
9:  mov eax, [VISIT + 12]
    pop edi
    pop esi
    pop ebx
    ret

    // To real mode and back, from 32-bit mode without paging.
    .global visit_real
visit_real:
    push ebx
    push esi
    push edi
    push ebp
    mov ebp, esp
    lgdt [visit_gdt_pointer]
    // FS keeps this limit, of 4 GiB, in real mode.
    mov eax, 0x10
    mov fs, eax
    .byte 0xea
    .long 0x9000
    .short 0x20
visit_real_back:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov esp, ebp
    sgdt [visit_gdt_seen]
    lgdt [visit_gdt_64]
    pop ebp
    pop edi
    pop esi
    pop ebx
    xor eax, eax
    ret

    // Copied to 0x9000 and entered there in a 16-bit segment that begins at 0.
    .code16
    .global visit_real_start
    .global visit_real_end
visit_real_start:
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    .byte 0xea
    .short 0x9000 + visit_real_in - visit_real_start
    .short 0
visit_real_in:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x9ff0
    lidt [0x9200]
    int 0x21
    xor dx, dx
    xor ax, ax
    xor cx, cx
    div cx
    ud2
    xor eax, eax
    cpuid
    mov [0x9e10], ebx
    mov eax, 0x5aa50000
    mov ebx, [0x9e0c]
    mov fs:[ebx], eax
    inc dword ptr fs:[ebx]
    mov eax, fs:[ebx]
    mov [0x9e14], eax
    // INT1, an MSR, a port by its number, and HLT until an interrupt of the local APIC, whose window is at [0x9e20].
    .byte 0xf1
    mov ecx, 0x1b
    rdmsr
    mov [0x9e2c], eax
    in al, 0x80
    mov ebx, [0x9e20]
    test ebx, ebx
    jz 7f
    mov eax, 0x44022
    mov fs:[ebx + 0x300], eax
    sti
    hlt
    cli
7:  mov dx, 0xe0
    mov si, 0x9e18
    mov di, 0x9e1c
    mov cx, 2
    rep outsw
    mov cx, 2
    rep insw
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long visit_real_back
    .short 0x18
    // Handlers: counters at 0x9e00 (INT), 0x9e04 (#DE), 0x9e08 (#UD), 0x9e24 (INT1), 0x9e28 (an interrupt). #DE and #UD go on
    // behind two bytes.
    .global visit_real_trap
    .global visit_real_interrupt
visit_real_trap:
    inc word ptr [0x9e24]
    iret
visit_real_interrupt:
    inc word ptr [0x9e28]
    push ebx
    mov ebx, [0x9e20]
    mov dword ptr fs:[ebx + 0xb0], 0
    pop ebx
    iret
    .global visit_real_int
    .global visit_real_divide
    .global visit_real_undefined
visit_real_int:
    inc word ptr [0x9e00]
    iret
visit_real_divide:
    inc word ptr [0x9e04]
    jmp 8f
visit_real_undefined:
    inc word ptr [0x9e08]
8:  push bp
    mov bp, sp
    add word ptr [bp + 2], 2
    pop bp
    iret
    .org visit_real_start + 0x200
    .short 0x3ff
    .long 0
visit_real_end:
    .code64

    .section .data
    .p2align 3
visit_gdt:
    .quad 0, 0, 0x00cf93000000ffff, 0x00cf9b000000ffff, 0x00009b000000ffff, 0x000093000000ffff
visit_gdt_pointer:
    .short 8 * 6 - 1
    .long visit_gdt
    .p2align 3
    .global visit_idt_32
visit_idt_32:
    .short 64 * 8 - 1
    .long VISIT_GATES
    .section .bss
    .p2align 3
visit_idt_64: .skip 16
    .global visit_gdt_64
visit_gdt_64: .skip 16
visit_gdt_seen: .skip 16
    .text
"#
);

unsafe extern "C" {
    fn visit_mode(cr3: u64, cr4: u64, code: u64, mode: u32) -> u32;
    static visit_stubs: u8;
    static visit_real_start: u8;
    static visit_real_end: u8;
    static visit_real_int: u8;
    static visit_real_divide: u8;
    static visit_real_undefined: u8;
    static visit_real_trap: u8;
    static visit_real_interrupt: u8;
    static mut visit_gdt_64: [u8; 16];
    /// Checks for any 32-bit mode.
    pub(crate) static visit_checks: u8;
    /// Real mode, by way of 32-bit mode.
    pub(crate) static visit_real: u8;
}

static BUSY: AtomicBool = AtomicBool::new(false);

/// One processor's visit.
pub(crate) struct Visit(());

/// Waits for other processors' visits to be over.
pub(crate) fn visit() -> Visit {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    for vector in 0..64u32 {
        let handler = (&raw const visit_stubs).expose_provenance() as u32 + 16 * vector;
        VISIT_GATES[2 * vector as usize].store(handler & 0xffff | 0x18 << 16, Ordering::SeqCst);
        VISIT_GATES[2 * vector as usize + 1].store(handler & 0xffff_0000 | 0x8e00, Ordering::SeqCst);
    }
    VISIT.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    Visit(())
}

impl Drop for Visit {
    fn drop(&mut self) {
        BUSY.store(false, Ordering::Release);
    }
}

impl Visit {
    /// Calls code in another mode.
    ///
    /// # Safety
    /// The code is made for that mode, and the tables map all of this kernel to itself.
    pub(crate) unsafe fn call(&self, mode: Mode, cr3: u64, cr4: u64, code: u64) -> u32 {
        // SAFETY: the caller vouches for code and tables; this visit is the only one.
        unsafe { visit_mode(cr3, cr4, code, mode as u32) }
    }

    /// Has a vector of 32-bit mode lead to a task, until the next visit.
    pub(crate) fn set_task_gate(&self, vector: usize, selector: u32) {
        VISIT_GATES[2 * vector].store(selector << 16, Ordering::SeqCst);
        VISIT_GATES[2 * vector + 1].store(0x8500, Ordering::SeqCst);
    }

    /// Puts real mode's code and handlers where they belong. `device` is where its one access to a device goes.
    /// `apic` is the local APIC's window, or 0 without one.
    pub(crate) fn prepare_real(&self, device: u32, apic: u32) {
        let start = &raw const visit_real_start;
        let offset = |label: *const u8| (REAL + label.addr() - start.addr()) as u32;
        // SAFETY: nobody else uses these two pages; the labels bound a piece of this image.
        unsafe {
            let length = (&raw const visit_real_end).offset_from_unsigned(start);
            let page = core::ptr::with_exposed_provenance_mut::<u8>(REAL);
            page.write_bytes(0, 4096);
            page.copy_from_nonoverlapping(start, length);
            page.add(REAL_RESULTS + 0xc).cast::<u32>().write_volatile(device);
            page.add(REAL_RESULTS + 0x20).cast::<u32>().write_volatile(apic);
            page.add(REAL_RESULTS + 0x18).cast::<u32>().write_volatile(0x7856_3412);
            for (vector, handler) in [
                (0, &raw const visit_real_divide),
                (6, &raw const visit_real_undefined),
                (1, &raw const visit_real_trap),
                (0x21, &raw const visit_real_int),
                (0x22, &raw const visit_real_interrupt),
            ] {
                // The first page has the table of real mode's vectors, and nothing of this kernel's.
                asm!("mov [{}], {:e}", in(reg) vector * 4u64, in(reg) offset(handler), options(nostack));
            }
            asm!("sgdt [{}]", in(reg) &raw mut visit_gdt_64, options(nostack));
        }
    }
}

/// A word that was left.
pub(crate) fn left(index: usize) -> u32 {
    VISIT[index].load(Ordering::SeqCst)
}
