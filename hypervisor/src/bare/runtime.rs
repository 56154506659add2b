//! The functions that compiled code expects of a C runtime (the GNU target's `compiler_builtins` leaves them out), and
//! the panic handler.

use core::arch::naked_asm;
use core::panic::PanicInfo;

/// Copies `n` bytes upwards; returns `dest`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(dest: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep movsb",
        "ret"
    )
}

/// Copies `n` bytes between ranges that may overlap; returns `dest`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memmove(dest: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    // A forward copy is right unless dest lies inside the source: dest - src, unsigned, below n.
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2: lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret"
    )
}

/// Fills `n` bytes; returns `dest`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(dest: *mut u8, byte: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "movzx eax, sil",
        "mov rcx, 0x0101010101010101",
        "imul rax, rcx",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep stosq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep stosb",
        "mov rax, r8",
        "ret"
    )
}

/// Compares `n` bytes; the sign of the first difference.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!(
        "xor eax, eax",
        "2: test rdx, rdx",
        "jz 3f",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "sub eax, ecx",
        "jz 2b",
        "3: ret"
    )
}

/// Compares `n` bytes for equality only.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

/// The length of a zero-terminated string.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn strlen(s: *const u8) -> usize {
    naked_asm!("xor eax, eax", "2: cmp byte ptr [rdi + rax], 0", "je 3f", "inc rax", "jmp 2b", "3: ret")
}

/// Prebuilt `core` refers to the personality routine of unwinding; with `panic = "abort"` nobody calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    nestling_hypervisor::cpu::panic::stop("unwinding was asked for")
}

/// A defect of the hypervisor: say where, end the machine.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    nestling_hypervisor::cpu::panic::stop(info)
}
