//! Who is using guest memory from the hypervisor's side.
//!
//! A guest's own accesses end when its mappings are gone and flushed; the hypervisor's (an instruction executed in
//! software, a clock written into guest memory) are seen by no table. So whoever looks up a page to use it pins its
//! neighbourhood first, and whoever changes what stands behind a page marks it as busy, then waits for the pins:
//! both write first and look second, with full fences, so one of the two sees the other. A pin is held for the length of a
//! copy inside one page and never while waiting for a page.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering, fence};

use nestling::Gfn;

const COUNTERS: usize = 64;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter(AtomicU32);

/// Counters of pins; frames of one 2 MiB block share one.
#[derive(Debug)]
pub(super) struct Pins([Counter; COUNTERS]);

/// Keeps the memory behind a frame, as it is found after this was made, from being moved.
#[derive(Debug)]
pub(super) struct Pin<'a>(&'a Counter);

impl Pins {
    pub(super) fn new() -> Self {
        Self([const { Counter(AtomicU32::new(0)) }; COUNTERS])
    }

    fn of(&self, gfn: Gfn) -> &Counter {
        &self.0[(gfn.0 >> 9) as usize % COUNTERS]
    }

    pub(super) fn pin(&self, gfn: Gfn) -> Pin<'_> {
        let counter = self.of(gfn);
        counter.0.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Pin(counter)
    }

    /// Waits until nobody uses what was there before the caller marked it as busy.
    pub(super) fn wait(&self, gfn: Gfn) {
        fence(Ordering::SeqCst);
        while self.of(gfn).0.load(Ordering::Acquire) != 0 {
            spin_loop();
        }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}
