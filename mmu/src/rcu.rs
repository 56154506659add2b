//! A published value that readers use without a lock, and that is replaced as a whole.
//!
//! Readers hold the shared side of the MMU lock (the read-side mark); the one updater publishes a new value and may
//! free the old one when a grace period has passed since. A reader therefore sees the old value or the new one, never
//! a mixture, and never one that was freed. (A model checker is told of reading and freeing, and finds the second
//! unordered after the first: [`Watched`].)

#![expect(unsafe_code, reason = "the pointer behind the cell is followed here and nowhere else")]

use alloc::boxed::Box;
use core::marker::PhantomData;

use crate::host::Host;
use crate::lock::Shared;
use crate::mutants::{self, Mutant};
use crate::reclaim::GracePeriod;
use crate::sync::{AtomicPtr, Ordering, Watched};

/// Holds one `Box` of a `T` at a time.
#[derive(Debug)]
pub(crate) struct RcuCell<T> {
    pointer: AtomicPtr<Watched<T>>,
    owns: PhantomData<Box<T>>,
}

/// A value that was replaced: readers may still use it. Dropping it early would free it under them, so it can only be
/// given up with [`Replaced::after_grace_period`].
#[must_use = "the old value is freed by after_grace_period, and leaks otherwise"]
pub(crate) struct Replaced<T>(*mut Watched<T>);

impl<T> RcuCell<T> {
    /// A cell, and the right to replace its value.
    pub(crate) fn new(value: T) -> (Self, UpdateRight<T>) {
        let value = Box::into_raw(Box::new(Watched::new(value)));
        (Self { pointer: AtomicPtr::new(value), owns: PhantomData }, UpdateRight(value))
    }

    /// The value that is published now; it lives as long as the guard.
    #[inline]
    pub(crate) fn read<'g, H: Host>(&'g self, _inside: &'g Shared<'_, H>) -> &'g T {
        // SAFETY: the pointer came from a Box and is freed only by `Replaced::after_grace_period`, whose caller
        // promises a grace period after the pointer was replaced; the guard is the read-side mark that such a grace
        // period waits for.
        unsafe { &*self.pointer.load(Ordering::Acquire) }.read()
    }

    /// The value, for the one updater, who has the right to replace it and so knows that it stays.
    pub(crate) fn read_exclusive<'u>(&'u self, updater: &'u mut UpdateRight<T>) -> &'u T {
        // SAFETY: the right holds the pointer that is published, because only its holder replaces it and `replace`
        // keeps it; both cell and right are borrowed for as long as the reference lives.
        unsafe { &*updater.0 }.read()
    }

    /// Publishes `value`.
    pub(crate) fn replace(&self, value: Box<Watched<T>>, updater: &mut UpdateRight<T>) -> Replaced<T> {
        let value = Box::into_raw(value);
        self.pointer.store(value, Ordering::Release);
        Replaced(core::mem::replace(&mut updater.0, value))
    }
}

impl<T> Replaced<T> {
    /// Frees the old value; the proof is that a grace period has passed since it was replaced.
    pub(crate) fn after_grace_period(self, _passed: GracePeriod) {
        // SAFETY: the pointer came from a Box and was unpublished by `replace`, before this value existed; a
        // `GracePeriod` is made only by waiting for one. (It was made after `replace`: the one caller makes it in the
        // expression that passes it.)
        let old = unsafe { Box::from_raw(self.0) };
        old.give_up();
        if mutants::is(Mutant::SlotWithoutGracePeriod) {
            // The bug is to be found by what it does, and not by what happens to be in freed memory.
            core::mem::forget(old);
        }
    }
}

impl<T> Drop for RcuCell<T> {
    fn drop(&mut self) {
        // SAFETY: the cell is going away, so no reader can hold a reference (their lifetimes end before the cell's),
        // and the pointer came from a Box.
        drop(unsafe { Box::from_raw(self.pointer.load(Ordering::Acquire)) });
    }
}

/// The right to replace a cell's value, and the updater's own note of which that is. Kept under the update lock that
/// serialises updaters; one a cell.
#[derive(Debug)]
pub(crate) struct UpdateRight<T>(*mut Watched<T>);

// SAFETY: the pointer is followed only together with the cell, which owns the value, and by the one updater.
unsafe impl<T: Send + Sync> Send for UpdateRight<T> {}

// SAFETY: the cell owns a `T` and hands out `&T` to other threads: the usual conditions of a shared, owned value.
unsafe impl<T: Send + Sync> Sync for RcuCell<T> {}
// SAFETY: as above; moving the cell moves the ownership of the box.
unsafe impl<T: Send + Sync> Send for RcuCell<T> {}
