//! The memory that every contender's tables come from.
//!
//! # Protocol
//! One arena a process, because one of the peers takes its frames from static functions. Whoever builds a table holds
//! the [`Claim`]; there is one at a time, and taking it starts the arena afresh. Frames are handed out by bumping a
//! counter and never come back before the next claim. Physical addresses are virtual addresses, as in a hypervisor
//! that maps its memory one to one.
//!
//! The arena is touched and advised to be huge when it is made, so that no contender pays for host page faults;
//! every frame is zeroed on its way into a table, so that all pay for that alike.

#![expect(unsafe_code, reason = "the one place that turns frame numbers into memory")]

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

/// Bytes of one table.
pub const TABLE_BYTES: usize = 4096;
/// Entries of one table.
pub const ENTRIES: usize = TABLE_BYTES / size_of::<u64>();

/// Enough for the 515 tables of 1 GiB in 4 KiB pages under four levels, for what racing threads allocate in vain, and
/// for alignment to a huge page.
const BYTES: usize = 16 << 20;
const HUGE: usize = 2 << 20;

/// First byte of the arena, aligned to a huge page.
static BASE: LazyLock<usize> = LazyLock::new(reserve);
/// Bytes handed out since the last claim.
static USED: AtomicUsize = AtomicUsize::new(0);
static CLAIMED: Mutex<()> = Mutex::new(());

/// The right to build one table in the arena.
#[derive(Debug)]
pub struct Claim {
    _claimed: MutexGuard<'static, ()>,
}

impl Claim {
    /// Waits until nobody else has the arena, and starts it afresh.
    pub fn take() -> Self {
        // A test that failed while it held the claim left nothing behind that the next one relies on.
        let claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        LazyLock::force(&BASE);
        USED.store(0, Ordering::Relaxed);
        Self { _claimed: claimed }
    }
}

/// A frame with whatever is in it, as its address, for a contender that zeroes its frames itself; `None` when the
/// arena is used up.
#[inline]
pub fn take() -> Option<u64> {
    let offset = USED.fetch_add(TABLE_BYTES, Ordering::Relaxed);
    (offset < BYTES - HUGE).then(|| (*BASE + offset) as u64)
}

/// A frame of zeros, as its address; `None` when the arena is used up.
#[inline]
pub fn alloc() -> Option<u64> {
    let address = take()?;
    // SAFETY: the bytes lie in the mapping that `reserve` made, which is never unmapped, and the counter gave them to
    // this caller alone until the next claim.
    unsafe { ptr::write_bytes(ptr::with_exposed_provenance_mut::<u8>(address as usize), 0, TABLE_BYTES) };
    Some(address)
}

/// The entries of the table at `address`.
///
/// # Safety
/// `address` is not 0. (To follow the pointer, it must be one that [`alloc`] gave since the current claim began.)
#[inline]
pub unsafe fn entries(address: u64) -> NonNull<[AtomicU64; ENTRIES]> {
    // SAFETY: the caller promises that it is not null.
    unsafe { NonNull::new_unchecked(ptr::with_exposed_provenance_mut(address as usize)) }
}

fn reserve() -> usize {
    // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
    let mapping = unsafe {
        mmap_anonymous(ptr::null_mut(), BYTES, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
            .expect("the kernel has 16 MiB for the arena")
    };
    // Advice only: a kernel without huge pages refuses, and then it is small pages for everyone.
    // SAFETY: the range is the mapping just made.
    let _ = unsafe { madvise(mapping, BYTES, Advice::LinuxHugepage) };
    // SAFETY: as above; writing is what makes the kernel provide the pages.
    unsafe { ptr::write_bytes(mapping.cast::<u8>(), 0, BYTES) };
    mapping.expose_provenance().next_multiple_of(HUGE)
}
