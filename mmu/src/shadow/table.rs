//! Shadow tables as their users see them: borrowed from the guard.

#![expect(unsafe_code, reason = "the frame number of a shadow page is followed to its table here")]

use alloc::sync::Arc;

use super::Shadow;
use super::page::{Page, Place};
use super::vcpu::{InShadow, ShadowFormat};
use crate::Mmu;
use crate::addr::{ENTRIES, INDEX_BITS, PAGE_SHIFT};
use crate::events::SeatCounters;
use crate::format::long_mode;
use crate::host::{GuestMemory, Host};
use crate::lock::Shared;
use crate::slots::dirty::Ring;
use crate::sync::{AtomicU64, load_for_update};

/// Inside the MMU lock, with everything that work on shadow pages needs.
pub(crate) struct Inside<'g, H: Host> {
    pub(super) shared: &'g Shared<'g, H>,
    pub(super) mmu: &'g Mmu<H>,
    pub(super) shadow: &'g Shadow,
    /// Where writes are noted besides the bitmaps: of the vCPU whose fault this is, if it has one.
    pub(super) ring: Option<&'g Ring>,
}

impl<H: Host> Clone for Inside<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H: Host> Copy for Inside<'_, H> {}

impl<'g, H: Host> Inside<'g, H> {
    /// For work that is not a vCPU's own.
    pub(super) const fn new(shared: &'g Shared<'g, H>, mmu: &'g Mmu<H>, shadow: &'g Shadow) -> Self {
        Self { shared, mmu, shadow, ring: None }
    }

    /// For a vCPU's fault.
    pub(super) fn noting(self, ring: Option<&'g Arc<Ring>>) -> Self {
        Self { ring: ring.map(|ring| &**ring), ..self }
    }

    #[inline]
    pub(super) fn page(self, index: u32) -> &'g Page {
        self.shadow.arena.page(index)
    }

    pub(super) fn counters(self) -> &'g SeatCounters {
        self.shared.counters()
    }

    pub(super) fn relax(self) -> impl Fn() {
        move || self.mmu.host.relax()
    }

    /// The entries of a page's table; `None` if it has none (any more).
    #[inline]
    pub(super) fn entries(self, page: &Page) -> Option<&'g [AtomicU64; ENTRIES]> {
        let frame = page.frame(self.shared)?;
        let entries = self.mmu.host.table(frame).cast::<[AtomicU64; ENTRIES]>();
        // SAFETY: a page's frame is a table frame that was allocated for it, and goes back after a grace period that
        // begins when it has been taken out of the page (`page`): it was read under the guard of `'g`, which such a
        // grace period waits for. `TableFrames` promises a valid, aligned pointer to 512 entries for it, which everyone
        // accesses as atomics only.
        Some(unsafe { entries.as_ref() })
    }

    /// The leaf for `linear` under the page `root`, which is alive, as the CPU would find it, absent or not; of a larger one
    /// the part. `None` where the way to it ends before.
    #[inline]
    pub(super) fn leaf(self, root: &Page, linear: u64) -> Option<u64> {
        let role = root.role();
        let mut raw = load_for_update(&self.entries(root)?[role.index(linear)]);
        for level in (1..role.level()).rev() {
            let Some(next) = long_mode::next_table(raw) else {
                long_mode::mapped(raw)?;
                return Some(long_mode::part(raw, (linear >> PAGE_SHIFT) as usize & (ENTRIES - 1)));
            };
            let table = self.mmu.host.table(next).cast::<[AtomicU64; ENTRIES]>();
            // SAFETY: as in `entries`. The link was read inside the lock, in the table of a live page or in one that such a
            // link led to, and before a page's frame is taken out of it the links to it are removed (`zap`).
            let entries = unsafe { table.as_ref() };
            let shift = PAGE_SHIFT + INDEX_BITS * (u32::from(level) - 1);
            raw = load_for_update(&entries[(linear >> shift) as usize & (ENTRIES - 1)]);
        }
        Some(raw)
    }

    /// The entry at a place that is in a reverse map or in a list of parents, whose lock the caller holds.
    #[inline]
    pub(super) fn entry(self, place: Place) -> Option<&'g AtomicU64> {
        Some(&self.entries(self.page(place.page()))?[place.entry()])
    }
}

impl<H: Host + GuestMemory> InShadow<'_, H> {
    /// As [`Inside::leaf`], under the root that the vCPU runs on, in 64-bit mode.
    pub(super) fn leaf(&self, linear: u64) -> Option<u64> {
        let levels = match self.format() {
            ShadowFormat::Pae => return None,
            ShadowFormat::Long4 => 4,
            ShadowFormat::Long5 => 5,
        };
        let (mut table, mut shift) = (self.root().hfn(), PAGE_SHIFT + INDEX_BITS * (levels - 1));
        loop {
            let entries = self.host().table(table).cast::<[AtomicU64; ENTRIES]>();
            // SAFETY: `TableFrames` as in `entries`. The vCPU is in guest mode, and says so for as long as `self` lives: the root was
            // alive after it had said so, and a link was read after that. A table goes back after it was unlinked (for a root: after
            // its life has ended) and a flush that began later (`hold`), which waits until this vCPU has left guest mode.
            let entries = unsafe { entries.as_ref() };
            let index = (linear >> shift) as usize & (ENTRIES - 1);
            let raw = load_for_update(&entries[index]);
            if shift == PAGE_SHIFT {
                return Some(raw);
            }
            let Some(next) = long_mode::next_table(raw) else {
                long_mode::mapped(raw)?;
                return Some(long_mode::part(raw, (linear >> PAGE_SHIFT) as usize & (ENTRIES - 1)));
            };
            (table, shift) = (next, shift - INDEX_BITS);
        }
    }
}
