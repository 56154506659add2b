//! The atomics layer: every atomic, fence and cell of the library comes from here, so that a model checker can put
//! its own in their place without a change to the code that is checked.

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(feature = "loom")]
pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(feature = "shuttle")]
pub use shuttle::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// Atomics that no protocol rests on (counters): always the processor's, so that a model checker does not spend its
/// time on their interleavings.
pub(crate) mod plain {
    pub(crate) use core::sync::atomic::{AtomicBool, AtomicU64};
}

/// After a sequentially consistent read-modify-write that announces something, and before the sequentially consistent
/// load that looks for the other side's announcement: nothing, for the model that the processor and the language have.
/// loom takes sequentially consistent accesses for acquire and release ones, and orders the two by a fence only.
#[inline]
pub(crate) fn announced() {
    #[cfg(feature = "loom")]
    fence(Ordering::SeqCst);
}

/// Reads a word of requests that the caller may go on to take; a name of its own for the reason of [`load_for_update`].
#[inline]
pub(crate) fn peek(word: &AtomicU32) -> u32 {
    #[cfg(feature = "loom")]
    return word.fetch_or(0, Ordering::SeqCst);
    #[cfg(not(feature = "loom"))]
    word.load(Ordering::SeqCst)
}

/// Reads an entry that the caller goes on to change by compare-and-swap.
///
/// A name of its own because of the model checker: loom takes a load that the same thread follows up with a store to
/// the same atomic for settled, and skips the interleavings in between; there the load is a read-modify-write that
/// changes nothing.
#[inline]
pub fn load_for_update(cell: &AtomicU64) -> u64 {
    #[cfg(feature = "loom")]
    return cell.fetch_or(0, Ordering::AcqRel);
    #[cfg(not(feature = "loom"))]
    cell.load(Ordering::Acquire)
}

/// Stores to an entry, whose only writer the caller is, while others look at it by [`load_for_update`].
///
/// A name of its own because of the model checker: loom does not order a store and a read-modify-write of which neither
/// happens before the other, and lets whoever comes after both see the older one; there the store is an exchange.
#[inline]
pub(crate) fn store_beside_looks(cell: &AtomicU64, value: u64) {
    #[cfg(feature = "loom")]
    cell.swap(value, Ordering::Release);
    #[cfg(not(feature = "loom"))]
    cell.store(value, Ordering::Release);
}

/// A value that many read until it is given up, of which a model checker finds out whether someone still may.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    value: T,
    #[cfg(feature = "loom")]
    access: loom::cell::UnsafeCell<()>,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value,
            #[cfg(feature = "loom")]
            access: loom::cell::UnsafeCell::new(()),
        }
    }

    #[inline]
    pub(crate) fn read(&self) -> &T {
        #[cfg(feature = "loom")]
        self.access.with(|_| ());
        &self.value
    }

    /// Nobody reads it any more, says the caller.
    #[inline]
    pub(crate) fn give_up(&self) {
        #[cfg(feature = "loom")]
        self.access.with_mut(|_| ());
    }
}

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
