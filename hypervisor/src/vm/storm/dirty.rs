//! Dirty logs under a storm: started, taken and stopped on a guest that runs, and held against its memory.
//!
//! **The check.** Some pages of a logged slot are read after each time the log is taken. A page that holds something else
//! than at the last reading was written in between, and the answer that came in between names it, or the next one does (it
//! was written after the log was taken, and before it was read). A page that neither names was written behind the log's
//! back: that ends everything, for a migration would have lost it.
//!
//! What the hypervisor writes itself it reports ([`Shared::note_write`]); pages that are moved or taken meanwhile keep
//! their content.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use nestling::{AddressSpace, GfnRange, Gpa, Granularity, LogConfig, LogStart, SlotId, Split, Tracking, Worker};

use super::Random;
use crate::memory::embedder::Machine;
use crate::memory::frames::FRAME;
use crate::vm::shared::Shared;

/// Slots that are logged at one time at most.
const MOST: usize = 4;
/// Pages of a logged slot that are read.
const SAMPLES: usize = 96;

/// A page that is watched.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Counted from the slot's first.
    page: u64,
    /// What it held at the last reading.
    held: u64,
    /// It was written since the reading before that, and the answer in between does not name it.
    unnamed: bool,
}

/// A slot that is logged.
#[derive(Debug)]
struct Watched {
    range: GfnRange,
    samples: Vec<Sample>,
}

/// The logs of a storm.
#[derive(Debug, Default)]
pub(super) struct Logs(BTreeMap<u32, Watched>);

/// A digest of a page's content; of one that has no memory yet, that of zeros.
fn digest(vm: &Shared, gpa: Gpa) -> u64 {
    let mut page = [0u8; FRAME as usize];
    if !vm.mmu.host().ram().peek(gpa, &mut page) {
        page.fill(0);
    }
    let words = page.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
    // Each step is one to one in both of its inputs, so that one word that differs is always seen.
    words.fold(0, |sum: u64, word| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}

impl Logs {
    /// Stops them all, after a last look.
    pub(super) fn stop(&mut self, vm: &Shared, worker: &mut Worker<Machine>) {
        for (id, mut watched) in core::mem::take(&mut self.0) {
            let id = SlotId(id);
            // The slot may have been away, and its log with it.
            if take(vm, worker, id, &mut watched) && worker.stop_log(id).is_ok() {
                let _ = worker.collapse(id);
            }
        }
    }

    /// Does something about the log of a slot; whether anything could be done.
    pub(super) fn step(
        &mut self,
        vm: &Shared,
        worker: &mut Worker<Machine>,
        random: &mut Random,
        id: SlotId,
        range: GfnRange,
    ) -> bool {
        vm.note_writes(true);
        let full = self.0.len() >= MOST;
        match self.0.get_mut(&id.0) {
            // It was away, and with it its log.
            Some(watched) if watched.range != range => drop(self.0.remove(&id.0)),
            Some(watched) => {
                if !take(vm, worker, id, watched) {
                    self.0.remove(&id.0);
                } else if random.below(4) == 0 {
                    worker.clear_young(AddressSpace::Main, range);
                } else if random.below(8) == 0 {
                    self.0.remove(&id.0);
                    return worker.stop_log(id).is_ok() && worker.collapse(id).is_ok();
                }
                return true;
            }
            None if full => {
                let logged = self.0.keys().nth(random.below(MOST as u64) as usize).copied();
                let Some((id, watched)) = logged.and_then(|id| Some((SlotId(id), self.0.get_mut(&id)?))) else {
                    return false;
                };
                if !take(vm, worker, id, watched) {
                    self.0.remove(&id.0);
                }
                return true;
            }
            None => {}
        }
        self.start(vm, worker, random, id, range)
    }

    fn start(
        &mut self,
        vm: &Shared,
        worker: &mut Worker<Machine>,
        random: &mut Random,
        id: SlotId,
        range: GfnRange,
    ) -> bool {
        let mut coin = || random.below(2) == 0;
        let config = LogConfig {
            tracking: if coin() { Tracking::DirtyBit } else { Tracking::WriteProtect },
            granularity: if coin() && coin() { Granularity::Leaf } else { Granularity::Page },
            start: if coin() { LogStart::AllDirty } else { LogStart::Clean },
            split: if coin() { Split::Eager } else { Split::OnDemand },
        };
        // A copy of the VM may be logging the slot already.
        if worker.start_log(id, config).is_err() {
            return false;
        }
        let samples = (0..SAMPLES).map(|_| {
            let page = random.below(range.pages());
            Sample { page, held: digest(vm, Gpa(range.start.gpa().0 + page * FRAME)), unnamed: false }
        });
        self.0.insert(id.0, Watched { range, samples: samples.collect() });
        true
    }
}

/// Takes the log of a slot and holds it against the slot's memory; whether the slot still has a log.
///
/// # Panics
/// A page was written, and the log does not say so.
fn take(vm: &Shared, worker: &mut Worker<Machine>, id: SlotId, watched: &mut Watched) -> bool {
    let mut words = Vec::new();
    let count = watched.range.pages().div_ceil(64) as usize;
    if words.try_reserve_exact(count).is_err() {
        return true;
    }
    words.resize(count, 0u64);
    if worker.harvest_dirty(id, 0, &mut words).is_err() {
        return false;
    }
    for sample in &mut watched.samples {
        let named = words[(sample.page / 64) as usize] >> (sample.page % 64) & 1 != 0;
        let gpa = Gpa(watched.range.start.gpa().0 + sample.page * FRAME);
        assert!(named || !sample.unnamed, "the page at {gpa:?} was written, and its dirty log does not say so");
        let held = digest(vm, gpa);
        *sample = Sample { unnamed: held != sample.held && !named, held, ..*sample };
    }
    true
}
