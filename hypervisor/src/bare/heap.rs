//! The hypervisor's own heap: `talc` over blocks of the frame allocator.
//!
//! The heap holds what is small and counted (vectors, devices, trees). Guest memory and page tables never come from
//! here: they are frames, and each is accounted for when a VM ends. The heap grows by blocks of 1 MiB and never gives
//! one back.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nestling_hypervisor::cpu::panic;
use nestling_hypervisor::memory::{frames, usage};
use talc::TalcLock;
use talc::base::{Talc, binning::Binning};
use talc::lock_api::{GuardSend, RawMutex};
use talc::source::Source;

/// A spin lock in the shape that `talc` wants. Interrupts are off in Rust code, and the NMI handler does not allocate,
/// so a holder is never interrupted by another taker on its own CPU.
struct SpinLock(AtomicBool);

// SAFETY: the flag is taken by one compare-exchange at a time with acquire, and given back with release.
unsafe impl RawMutex for SpinLock {
    // Every lock of this type starts as a copy of the unlocked constant: that is what the trait uses it for.
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: Self = Self(AtomicBool::new(false));
    type GuardMarker = GuardSend;

    fn lock(&self) {
        while !self.try_lock() {
            while self.0.load(Ordering::Relaxed) {
                core::hint::spin_loop();
            }
        }
    }

    fn try_lock(&self) -> bool {
        self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    unsafe fn unlock(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Grows the heap from the frame allocator.
#[derive(Debug)]
struct Frames;

// SAFETY: `acquire` touches the frame allocator only, which does not use the heap.
unsafe impl Source for Frames {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        // A page on top for talc's own records and the alignment.
        let bytes = (layout.size() + layout.align() + 4096).max(1 << 20).next_power_of_two();
        let order = (bytes / 4096).trailing_zeros();
        let block = frames::alloc(order).ok_or(())?;
        // SAFETY: the block was just allocated, is identity mapped, and nobody else knows of it.
        let claimed = unsafe { talc.claim(ptr::with_exposed_provenance_mut(block as usize), bytes) };
        usage::grown(1 << order);
        claimed.map(|_| ()).ok_or(())
    }
}

/// The heap, and beside it a reserve for the machine's last words: a CPU that panics may hold the heap's lock.
struct Heap {
    talc: TalcLock<SpinLock, Frames>,
    reserve: UnsafeCell<[u8; RESERVE_BYTES]>,
    reserve_used: AtomicUsize,
}

const RESERVE_BYTES: usize = 256 << 10;

// SAFETY: the reserve is only given out, in pieces that do not overlap (`reserve_used` is taken atomically).
unsafe impl Sync for Heap {}

// SAFETY: blocks come from talc or, after a panic, from fresh bytes of the reserve; both are aligned as asked.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !panic::in_progress() {
            // SAFETY: the caller's promises are talc's conditions.
            let block = unsafe { self.talc.alloc(layout) };
            if !block.is_null() {
                usage::allocated(layout.size());
            }
            return block;
        }
        let bytes = layout.size() + layout.align();
        let used = self.reserve_used.fetch_add(bytes, Ordering::Relaxed);
        if used + bytes > RESERVE_BYTES {
            return ptr::null_mut();
        }
        let start = self.reserve.get().cast::<u8>().wrapping_add(used);
        start.wrapping_add(start.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // After a panic nothing is given back: the block may be of the reserve, and the machine ends anyway.
        if !panic::in_progress() {
            // SAFETY: the caller's promises are talc's conditions.
            unsafe { self.talc.dealloc(block, layout) };
            usage::freed(layout.size());
        }
    }
}

#[global_allocator]
static HEAP: Heap = Heap {
    talc: TalcLock::new(Frames),
    reserve: UnsafeCell::new([0; RESERVE_BYTES]),
    reserve_used: AtomicUsize::new(0),
};
