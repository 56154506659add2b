//! A published value that readers use without a lock, and that is replaced as a whole.
//!
//! Readers hold the shared side of the MMU lock (the read-side mark); the one updater publishes a new value and may
//! free the old one when a grace period has passed since. A reader therefore sees the old value or the new one, never
//! a mixture, and never one that was freed.

#![expect(unsafe_code, reason = "the pointer behind the cell is followed here and nowhere else")]

use alloc::boxed::Box;
use core::marker::PhantomData;

use crate::host::Host;
use crate::lock::Shared;
use crate::reclaim::GracePeriod;
use crate::sync::{AtomicPtr, Ordering};

/// Holds one `Box<T>` at a time.
#[derive(Debug)]
pub(crate) struct RcuCell<T> {
    pointer: AtomicPtr<T>,
    owns: PhantomData<Box<T>>,
}

/// A value that was replaced: readers may still use it. Dropping it early would free it under them, so it can only be
/// given up with [`Replaced::after_grace_period`].
#[must_use = "the old value is freed by after_grace_period, and leaks otherwise"]
pub(crate) struct Replaced<T>(*mut T);

impl<T> RcuCell<T> {
    pub(crate) fn new(value: Box<T>) -> Self {
        Self { pointer: AtomicPtr::new(Box::into_raw(value)), owns: PhantomData }
    }

    /// The value that is published now; it lives as long as the guard.
    #[inline]
    pub(crate) fn read<'g, H: Host>(&'g self, _inside: &'g Shared<'_, H>) -> &'g T {
        // SAFETY: the pointer came from a Box and is freed only by `Replaced::after_grace_period`, whose caller
        // promises a grace period after the pointer was replaced; the guard is the read-side mark that such a grace
        // period waits for.
        unsafe { &*self.pointer.load(Ordering::Acquire) }
    }

    /// The value, for the one updater, who has the right to replace it and so knows that it stays.
    pub(crate) fn read_exclusive<'u>(&'u self, _updater: &'u mut UpdateRight) -> &'u T {
        // SAFETY: only the holder of the `UpdateRight` of this cell replaces the value, and it is borrowed for as long
        // as the reference lives.
        unsafe { &*self.pointer.load(Ordering::Relaxed) }
    }

    /// Publishes `value`.
    pub(crate) fn replace(&self, value: Box<T>, _updater: &mut UpdateRight) -> Replaced<T> {
        Replaced(self.pointer.swap(Box::into_raw(value), Ordering::AcqRel))
    }
}

impl<T> Replaced<T> {
    /// Frees the old value; the proof is that a grace period has passed since it was replaced.
    pub(crate) fn after_grace_period(self, _passed: GracePeriod) {
        // SAFETY: the pointer came from a Box and was unpublished by `replace`, before this value existed; a
        // `GracePeriod` is made only by waiting for one. (It was made after `replace`: the one caller makes it in the
        // expression that passes it.)
        drop(unsafe { Box::from_raw(self.0) });
    }
}

impl<T> Drop for RcuCell<T> {
    fn drop(&mut self) {
        // SAFETY: the cell is going away, so no reader can hold a reference (their lifetimes end before the cell's),
        // and the pointer came from a Box.
        drop(unsafe { Box::from_raw(*self.pointer.get_mut()) });
    }
}

/// The right to replace a cell's value. Kept under the update lock that serialises updaters; one a cell.
#[derive(Debug)]
pub(crate) struct UpdateRight(());

impl UpdateRight {
    /// The one right for a new cell.
    pub(crate) const fn new() -> Self {
        Self(())
    }
}

// SAFETY: the cell owns a `T` and hands out `&T` to other threads: the usual conditions of a shared, owned value.
unsafe impl<T: Send + Sync> Sync for RcuCell<T> {}
// SAFETY: as above; moving the cell moves the ownership of the box.
unsafe impl<T: Send + Sync> Send for RcuCell<T> {}
