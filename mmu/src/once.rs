//! A value that is made late and then stays: read without a lock, set once, freed with its owner.
//!
//! What costs memory and is not always wanted (the parts of shadow paging) hangs on one of these. The first who sets it
//! wins; a value that lost the race comes back to whoever made it. It never changes and never goes while the cell can be
//! borrowed, which is why a reader needs no read-side mark.

#![expect(unsafe_code, reason = "the pointer behind the cell is followed here and nowhere else")]

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ptr;

use crate::sync::{AtomicPtr, Ordering};

/// See the module head.
#[derive(Debug)]
pub(crate) struct OnceBox<T> {
    pointer: AtomicPtr<T>,
    owns: PhantomData<Box<T>>,
}

impl<T> OnceBox<T> {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { pointer: AtomicPtr::new(ptr::null_mut()), owns: PhantomData }
    }

    /// The value, once there is one.
    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        // SAFETY: the pointer is null or came from a Box in `set`; it is freed only by `drop`, which needs the cell for
        // itself. Acquire pairs with the release of `set`: the value is seen whole.
        unsafe { self.pointer.load(Ordering::Acquire).as_ref() }
    }

    /// Sets the value unless there is one already. The value that is there now.
    pub(crate) fn set(&self, value: Box<T>) -> &T {
        let new = Box::into_raw(value);
        match self.pointer.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: as in `get`.
            Ok(_) => unsafe { &*new },
            Err(now) => {
                // SAFETY: `new` came from a Box above and was not published.
                drop(unsafe { Box::from_raw(new) });
                // SAFETY: as in `get`: `now` is not null, for null was what was asked for.
                unsafe { &*now }
            }
        }
    }
}

impl<T> Drop for OnceBox<T> {
    fn drop(&mut self) {
        let pointer = self.pointer.load(Ordering::Acquire);
        if !pointer.is_null() {
            // SAFETY: the cell is going away, so nobody borrows the value (references end before the cell does), and
            // the pointer came from a Box.
            drop(unsafe { Box::from_raw(pointer) });
        }
    }
}

// SAFETY: the cell hands out `&T` to several threads, and a value set by one thread may be dropped by another: the usual
// conditions of a shared, owned value.
unsafe impl<T: Send + Sync> Sync for OnceBox<T> {}
// SAFETY: as above; moving the cell moves the ownership of the box.
unsafe impl<T: Send + Sync> Send for OnceBox<T> {}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;
    use alloc::sync::Arc;

    #[test]
    fn the_first_value_stays_and_none_leaks() {
        let (first, second) = (Arc::new(1), Arc::new(2));
        let cell = OnceBox::new();
        assert!(cell.get().is_none());
        assert_eq!(**cell.set(Box::new(Arc::clone(&first))), 1);
        assert_eq!(**cell.set(Box::new(Arc::clone(&second))), 1);
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (2, 1));
        drop(cell);
        assert_eq!(Arc::strong_count(&first), 1);
    }
}
