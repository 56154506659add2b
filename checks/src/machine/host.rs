//! The library's traits on the hosted machine.

#![expect(unsafe_code, reason = "implementing TableFrames is a promise about memory")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use nestling::events::Event;
use nestling::host::{Backing, BackingError, ByRange, Extent, Page, TableFrames, Time, Vcpus};
use nestling::sync::AtomicU64;
use nestling::{Access, Gfn, GfnRange, Hfn, Host, Slot, VcpuId};

use super::cpu::Cpu;
use super::{Machine, held};

// SAFETY: the arena's pages are 4 KiB-aligned arrays of 512 atomics that live as long as the machine, each at one
// place, and are reached through atomics only; a frame is given out to one owner at a time.
unsafe impl<F: Cpu> TableFrames for Machine<F> {
    fn alloc_table(&self) -> Option<Hfn> {
        self.arena.alloc()
    }

    fn free_table(&self, frame: Hfn) {
        let hook = held(&self.on_free).take();
        if let Some(hook) = hook {
            hook();
        }
        self.arena.free(frame);
    }

    fn table(&self, frame: Hfn) -> NonNull<AtomicU64> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.stumble();
        self.followed(frame);
        NonNull::from(&self.arena.entries(frame)[0])
    }
}

impl<F: Cpu> Backing for Machine<F> {
    fn resolve(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let hook = held(&self.on_resolve).take();
        if let Some(hook) = hook {
            return hook(slot, gfn);
        }
        let mut ghost = self.ghost();
        // By turns: a late answer is the old one, or an error.
        let stale = ghost.tick().is_multiple_of(2);
        ghost.resolve(slot, gfn, stale)
    }

    /// By turns: nothing, a late answer, and what is so.
    fn page(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Option<Page> {
        if held(&self.on_resolve).is_some() {
            return None;
        }
        let mut ghost = self.ghost();
        let turn = ghost.tick() % 3;
        if turn == 0 { None } else { ghost.resolve(slot, gfn, turn == 1).ok()?.page(gfn) }
    }
}

impl<F: Cpu> Vcpus for Machine<F> {
    fn kick(&self, vcpu: VcpuId) {
        self.kicks[usize::from(vcpu.0)].store(true, Ordering::SeqCst);
    }

    fn flush_range(&self, range: GfnRange) -> ByRange {
        if !self.by_range {
            return ByRange::Unsupported;
        }
        self.forget.iter().for_each(|ranges| held(ranges).push(range));
        ByRange::Done
    }
}

impl<F: Cpu> Time for Machine<F> {
    fn relax(&self) {
        std::thread::yield_now();
    }

    fn should_yield(&self) -> bool {
        self.restless > 0 && self.questions.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.restless)
    }

    #[inline]
    fn light_fence(&self) {
        self.stumble();
        self.fences.light();
    }

    fn heavy_fence(&self) {
        self.fences.heavy();
    }
}

impl<F: Cpu> Host for Machine<F> {
    type Format = F;
    const TRACE: bool = true;

    fn trace(&self, event: Event) {
        if !self.traced.load(Ordering::Relaxed) {
            return;
        }
        // Out of its place while it runs: it may wait for another thread, whose events then go unseen.
        let hook = held(&self.on_trace).take();
        if let Some(mut hook) = hook {
            hook(event);
            held(&self.on_trace).get_or_insert(hook);
        }
    }
}
