//! The atomics layer: every atomic, fence and cell of the library comes from here, so that a model checker can put
//! its own in their place without a change to the code that is checked.

pub use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// Pads to two cache lines: adjacent-line prefetchers pull lines in pairs, so one line of distance is not enough to
/// keep two writers apart.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Padded<T>(pub T);

impl<T> core::ops::Deref for Padded<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}
