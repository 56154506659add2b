//! Keeping operations apart in the processor's pipeline.

#![expect(unsafe_code, reason = "an intrinsic")]

use std::arch::x86_64::_mm_lfence;

/// Waits until everything before it is done, loads and locked instructions included, before anything after it starts
/// (APM vol 3, LFENCE; Linux has it dispatch-serialising on AMD as well).
#[inline(always)]
pub(crate) fn drain() {
    // SAFETY: SSE2, which has the instruction, is part of x86-64.
    unsafe { _mm_lfence() };
}
