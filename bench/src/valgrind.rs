//! Telling callgrind to start and stop counting from within, where no function is called exactly for what is to be
//! counted.

#![expect(unsafe_code, reason = "valgrind knows a request by its instructions")]

use std::arch::asm;

/// `CALLGRIND_TOGGLE_COLLECT` of valgrind's `callgrind.h`.
const TOGGLE_COLLECT: u64 = (b'C' as u64) << 24 | (b'T' as u64) << 16 | 2;

/// Starts counting, or stops it. Does nothing outside valgrind.
#[inline(always)]
pub(crate) fn toggle() {
    let request = [TOGGLE_COLLECT, 0, 0, 0, 0, 0];
    // SAFETY: to a CPU these are rotations by 128 in all, which leave RDI as it was, and an exchange of a register with
    // itself; valgrind takes them for a request at RAX, which outlives the block, and writes its answer to RDX.
    unsafe {
        asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") request.as_ptr(), inout("rdx") 0u64 => _, options(nostack),
        );
    }
}
