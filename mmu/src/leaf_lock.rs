//! A small spin lock for lists that are touched rarely and briefly (roots, pending frees, memslot updates).
//!
//! It is a leaf in the lock order but for the memslot update lock, which is outside everything, and for the locks of
//! shadow pages, which have an order of their own (`shadow::order`): nothing is locked while one of the others is held,
//! and nothing is called that may wait.

#![expect(unsafe_code, reason = "a lock is the place where shared becomes exclusive")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use crate::sync::{AtomicBool, Ordering};

/// A value behind a spin lock.
#[derive(Debug)]
pub(crate) struct LeafLock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by the thread that set `held`, so sharing the lock moves `T` between threads at
// most.
unsafe impl<T: Send> Sync for LeafLock<T> {}

impl<T> LeafLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock; `relax` is the embedder's hint for waiting.
    pub(crate) fn lock(&self, relax: impl Fn()) -> LeafGuard<'_, T> {
        while self.held.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            relax();
        }
        LeafGuard { lock: self }
    }

    /// The lock, if nobody holds it.
    pub(crate) fn try_lock(&self) -> Option<LeafGuard<'_, T>> {
        let taken = self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        // Made only then: to drop one is to release the lock.
        taken.is_ok().then(|| LeafGuard { lock: self })
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// Holds a [`LeafLock`].
pub(crate) struct LeafGuard<'a, T> {
    lock: &'a LeafLock<T>,
}

impl<T> Deref for LeafGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while this thread has set `held`; nobody else reaches the value.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for LeafGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and the guard is borrowed mutably.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for LeafGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.held.store(false, Ordering::Release);
    }
}
