//! What the heap has: counted by the heap itself, which lives in the binary, and read by whoever looks for leaks.
//!
//! Both are plain counters that every CPU adds to. A reader that wants them exact sees to it that nobody allocates.

use core::sync::atomic::{AtomicU64, Ordering};

static BYTES: AtomicU64 = AtomicU64::new(0);
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// The heap gave `bytes` out.
pub fn allocated(bytes: usize) {
    BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// The heap took `bytes` back.
pub fn freed(bytes: usize) {
    BYTES.fetch_sub(bytes as u64, Ordering::Relaxed);
}

/// The heap grew by `frames` frames.
pub fn grown(frames: u64) {
    FRAMES.fetch_add(frames, Ordering::Relaxed);
}

/// Bytes given out now.
#[must_use]
pub fn heap_bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}

/// Frames that the heap has taken from the allocator.
#[must_use]
pub fn heap_frames() -> u64 {
    FRAMES.load(Ordering::Relaxed)
}
