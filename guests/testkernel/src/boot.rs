//! From the Multiboot loader to 64-bit mode, by way of every older paging mode; and the start code of other processors.
//!
//! On the way each mode does a device access that can't run on the CPU alone: it reads the local APIC's version and leaves
//! a word in the test device's memory. `tests::modes` looks at what came of it.

use core::arch::global_asm;
use core::sync::atomic::AtomicU32;

/// What EAX and EBX held at the start.
#[unsafe(no_mangle)]
pub(crate) static BOOT_MAGIC: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
pub(crate) static BOOT_INFO: AtomicU32 = AtomicU32::new(0);
/// The local APIC's version as read without paging, with 4 MiB pages, and with PAE.
#[unsafe(no_mangle)]
pub(crate) static PROBES: [AtomicU32; 3] = [const { AtomicU32::new(0) }; 3];
/// Where the processor being started finds its stack, and its number.
#[unsafe(no_mangle)]
pub(crate) static NEXT_STACK: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
pub(crate) static NEXT_NUMBER: AtomicU32 = AtomicU32::new(0);

/// Page to which the start code is copied.
pub(crate) const TRAMPOLINE: usize = 0x8000;
/// Offset in it of the four bytes that real mode moved through a port by string instructions.
pub(crate) const REAL_MODE_PROBE: usize = 0xf00;

global_asm!(
    r#"
    .section .multiboot, "ax"
    .p2align 2
    .long 0x1badb002, 3, -(0x1badb002 + 3)

    .code32
    .global start
start:
    cli
    cld
    mov [BOOT_MAGIC], eax
    mov [BOOT_INFO], ebx
    mov esp, offset boot_stack_top

    // Four directories of 2 MiB pages, for PAE and for 64-bit mode.
    mov edx, offset directories
    mov eax, 0x87
    mov ecx, 2048
2:  mov [edx], eax
    add eax, 0x200000
    add edx, 8
    dec ecx
    jnz 2b
    // Their pointers, with rights for 64-bit mode and without for PAE.
    mov eax, offset directories
    mov edx, offset long_pointers
    mov ebx, offset pae_pointers
    mov ecx, 4
3:  lea esi, [eax + 7]
    mov [edx], esi
    lea esi, [eax + 1]
    mov [ebx], esi
    add eax, 0x1000
    add edx, 8
    add ebx, 8
    dec ecx
    jnz 3b
    mov eax, offset long_pointers
    add eax, 7
    mov [long_root], eax
    // 4 MiB pages.
    mov edx, offset legacy_root
    mov eax, 0x83
    mov ecx, 1024
4:  mov [edx], eax
    add eax, 0x400000
    add edx, 4
    dec ecx
    jnz 4b

    mov edi, 0xff00f000
    call probe
    mov [PROBES], eax

    mov eax, 0x10               // PSE
    mov cr4, eax
    mov eax, offset legacy_root
    mov cr3, eax
    call paging_on
    mov edi, 0xff00f010
    call probe
    mov [PROBES + 4], eax
    call paging_off

    mov eax, 0x20               // PAE
    mov cr4, eax
    mov eax, offset pae_pointers
    mov cr3, eax
    call paging_on
    mov edi, 0xff00f020
    call probe
    mov [PROBES + 8], eax
    call paging_off

    call enter_long_mode
    lgdt [boot_gdt_pointer]
    .byte 0xea
    .long start_64
    .short 8

paging_on:
    mov eax, cr0
    or eax, 0x80010001
    mov cr0, eax
    ret
paging_off:
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    ret

    // Fills 16 bytes at edi by a string instruction, and returns the APIC's version in eax.
probe:
    mov eax, 0x5aa5c33c
    mov ecx, 4
    rep stosd
    mov esi, 0xfee00000
    mov eax, [esi + 0x30]
    ret

    // Changes eax, ecx, edx.
enter_long_mode:
    mov eax, 0x620              // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset long_root
    mov cr3, eax
    mov ecx, 0xc0000080         // EFER: LME, NXE
    rdmsr
    or eax, 0x900
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3         // not: NW, CD, EM, TS
    or eax, 0x80010023          // PG, WP, NE, MP, PE
    mov cr0, eax
    ret

    .code64
start_64:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov esp, offset boot_stack_top
    call rust_start
    ud2

    // Other processors: real mode, at offset 0 of the page that this is copied to. Port 0xe0 is the test device's latch.
    .code16
    .global trampoline_start
    .global trampoline_end
trampoline_start:
    cli
    cld
    mov ax, cs
    mov ds, ax
    mov es, ax
    mov dx, 0xe0
    mov si, 0x40
    mov di, 0xf00
    mov cx, 4
5:  outsb
    insb
    dec cx
    jnz 5b
    .byte 0x66, 0x0f, 0x01, 0x16  // lgdt of 32 bits
    .short 0x48
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long other_32
    .short 0x18
    .org trampoline_start + 0x40
    .byte 0x12, 0x34, 0x56, 0x78
    .org trampoline_start + 0x48
    .short 8 * 4 - 1
    .long boot_gdt
trampoline_end:

    .code32
other_32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, [NEXT_STACK]
    call enter_long_mode
    .byte 0xea
    .long other_64
    .short 8
    .code64
other_64:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov esp, [NEXT_STACK]
    mov edi, [NEXT_NUMBER]
    call rust_start_other
    ud2

    .section .data
    .p2align 3
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
boot_gdt_pointer:
    .short 8 * 4 - 1
    .long boot_gdt

    .section .bss
    .p2align 12
    .global long_root
long_root: .skip 4096
    .global long_pointers
long_pointers: .skip 4096
    .global directories
directories: .skip 4 * 4096
legacy_root: .skip 4096
pae_pointers: .skip 4096
    .skip 16384
boot_stack_top:
    .text
    .code64
"#
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static long_root: u8;
}

/// Where the root of the page tables is, and the five tables of the first 4 GiB behind it.
pub(crate) fn table_address(index: u64) -> u32 {
    (&raw const long_root).expose_provenance() as u32 + 4096 * index as u32
}

/// The start code of other processors.
pub(crate) fn trampoline() -> &'static [u8] {
    let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
    // SAFETY: the two labels bound a piece of this image, which nobody writes.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}
