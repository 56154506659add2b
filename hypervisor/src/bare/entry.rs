//! Entry from the loaders, and the start code of the other CPUs.
//!
//! PVH and Multiboot2 both start the boot CPU in 32-bit protected mode without paging, flat segments, `ebx` = address of
//! their information; Multiboot2 has its magic number in `eax`, everything else is undefined. Each has an entry of its own,
//! which says by a magic number in `esi` how it came; the rest is common. The code here builds an identity map of the first
//! 4 GiB from 2 MiB pages, switches to long mode and calls [`rust_entry`] with interrupts off. SSE is on before the first Rust instruction:
//! the prebuilt `core` uses it.
//!
//! Other CPUs start at [`trampoline_start`], copied below 1 MiB (the start-up IPI carries a page number there), in real
//! mode, take the same page tables and call [`rust_ap_entry`] on the stack that the boot CPU left in the mailbox. They
//! are started one after another, so one mailbox does.
//!
//! Manuals: AMD APM vol. 2, 14.6 (long-mode activation), 16.5 and 7.3 (start-up IPI); the Xen project's PVH boot ABI;
//! the Multiboot2 specification, 3.1 (the header) and 3.3 (the machine's state).

use core::arch::global_asm;
use core::mem::size_of;

use nestling_hypervisor::boot::{self, ap::Mailbox};

const _: () = assert!(size_of::<Mailbox>() == 32, "the start code below reads the mailbox by offset");

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .p2align 2
    .long 4, 4, 18              // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    // In the first 32 KiB of the file, at a multiple of 8. Nothing is asked for that a loader without it would not give:
    // a page-aligned module, and the entry, for the file's own is PVH's.
    .section .multiboot2, "a", @progbits
    .p2align 3
multiboot2_header:
    .long 0xe85250d6, 0, multiboot2_header_end - multiboot2_header
    .long 0x100000000 - (0xe85250d6 + (multiboot2_header_end - multiboot2_header))
    .short 1, 0                 // information request: command line, module, memory map
    .long 20
    .long 1, 3, 6
    .p2align 3
    .short 3, 0                 // entry address
    .long 12
    .long multiboot2_entry
    .p2align 3
    .short 6, 0                 // module alignment
    .long 8
    .short 0, 0                 // end
    .long 8
multiboot2_header_end:

    .section .text.entry, "ax"
    .code32
    .global multiboot2_entry
multiboot2_entry:
    mov esi, eax
    jmp common_entry
    .global pvh_entry
pvh_entry:
    mov esi, {pvh_magic}
common_entry:
    cli
    cld
    mov esp, offset boot_stack_top
    mov edi, offset boot_page_tables
    lea eax, [edi + 0x1003]     // PML4[0] -> PDPT, present and writable
    mov [edi], eax
    lea eax, [edi + 0x2003]     // PDPT[0..4] -> four page directories
    lea edx, [edi + 0x1000]
    mov ecx, 4
2:  mov [edx], eax
    add eax, 0x1000
    add edx, 8
    dec ecx
    jnz 2b
    lea edx, [edi + 0x2000]     // 2048 leaves of 2 MiB
    mov eax, 0x83
    mov ecx, 2048
3:  mov [edx], eax
    add eax, 0x200000
    add edx, 8
    dec ecx
    jnz 3b
    mov edi, ebx                // the loader's information: first argument; esi is the second
    mov eax, offset boot_page_tables
    mov cr3, eax
    call enter_long_mode_32     // returns in compatibility mode
    lgdt [boot_gdt_pointer]
    .byte 0xea                  // far jump to the 64-bit code segment
    .long entry_64
    .short 8

    // CR3 is set. Changes eax, ecx, edx.
enter_long_mode_32:
    mov eax, cr4
    or eax, 0x620               // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080         // EFER: LME, NXE
    rdmsr
    or eax, 0x900
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3         // caches on (CD, NW), no emulation (EM), no lazy switch (TS)
    or eax, 0x80010023          // PG, WP, NE, MP, PE
    mov cr0, eax
    ret

    .code64
entry_64:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + boot_stack_top]
    xor ebp, ebp
    mov edi, edi
    mov esi, esi
    call {rust_entry}
    ud2

    .p2align 3
boot_gdt:
    .quad 0
    .quad 0x00209a0000000000    // 0x08: 64-bit code
    .quad 0x0000920000000000    // 0x10: data
    .quad 0x00cf9a000000ffff    // 0x18: 32-bit code, for the start of the other CPUs
    .quad 0x00cf92000000ffff    // 0x20: 32-bit data
boot_gdt_pointer:
    .short 39
    .long boot_gdt
    .long 0

    // The start code of the other CPUs. Runs at a page-aligned address below 1 MiB: CS base = that address.
    .code16
    .p2align 2
    .global trampoline_start
trampoline_start:
    jmp 4f
    .p2align 2
    .short 39                   // GDT pointer, at offset 4
    .long boot_gdt
4:  cli
    cld
    mov ax, cs
    mov ds, ax
    lgdtd [4]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea            // far jump, 32-bit offset
    .long ap_entry_32
    .short 0x18
    .global trampoline_end
trampoline_end:

    .code32
ap_entry_32:
    mov eax, 0x20
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset ap_early_stack_top
    mov eax, [{mailbox} + 0]    // CR3: the tables lie below 4 GiB
    mov cr3, eax
    call enter_long_mode_32
    .byte 0xea
    .long ap_entry_64
    .short 8
    .code64
ap_entry_64:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov rsp, [rip + {mailbox} + 8]
    mov rdi, [rip + {mailbox} + 16]
    xor ebp, ebp
    call {rust_ap_entry}
    ud2

    .section .bss.boot, "aw", @nobits
    .p2align 12
boot_page_tables:
    .skip 0x6000
    .global boot_stack
boot_stack:
    .skip 0x10000
boot_stack_top:
ap_early_stack:
    .skip 64
ap_early_stack_top:
    .text
"#,
    pvh_magic = const boot::pvh::MAGIC,
    rust_entry = sym rust_entry,
    rust_ap_entry = sym rust_ap_entry,
    mailbox = sym boot::ap::MAILBOX,
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static __image_start: u8;
    static __image_end: u8;
}

/// The boot CPU's first Rust function.
///
/// # Safety
/// Called once, by the code above, with the address that the loader passed and the magic number of its protocol.
unsafe extern "C" fn rust_entry(information: u64, magic: u64) -> ! {
    let address = |symbol: *const u8| symbol.addr() as u64;
    let image = boot::Image {
        start: address(&raw const __image_start),
        end: address(&raw const __image_end),
        trampoline_start: address(&raw const trampoline_start),
        trampoline_end: address(&raw const trampoline_end),
    };
    // SAFETY: this is the boot CPU's only call, on a fresh identity map; the loader's structure is at `information`.
    unsafe { boot::start(information, magic as u32, image) }
}

/// Another CPU's first Rust function; `cpu` is the number from the mailbox.
///
/// # Safety
/// Called once a CPU, by the code above.
unsafe extern "C" fn rust_ap_entry(cpu: u64) -> ! {
    // SAFETY: called on the stack and with the number that the boot CPU prepared for this CPU.
    unsafe { boot::ap::enter(cpu as usize) }
}
