//! Sending memory while its guest runs and writes to it, behind dirty logs.
//!
//! All slots are logged, with every page dirty at first. A round takes the dirty pages of one piece of memory after the
//! other from the log, which arms them again, and sends what they hold *then*; a page that is written afterwards is
//! dirty again. So after each round there are as many dirty pages as the guest has written meanwhile. When those can be
//! sent in the time for which the guest may stand still, it is held and they are sent; and that has been all.
//!
//! **A guest that writes faster than it is copied** is throttled: of the time of a round its vCPUs are kept from it, for a
//! part that grows by [`THROTTLE_STEP`] percent with each round that did not get nearer ([`super::throttle`]). It goes on
//! more slowly, with its clock at its usual pace. After the last round it is held however much is left.
//!
//! **Its working set** is what aging says: what was made old at the end of one round and is young at that of the next. It
//! is told with the round, and bounds what the guest can have written when it is stopped.
//!
//! What the hypervisor itself writes to the guest's memory it reports to the log
//! ([`crate::vm::shared::Shared::note_write`]).

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use nestling::{AddressSpace, Gfn, GfnRange, Level, LogConfig, SlotId, Worker};
use nestling_control::message::MigrateLimits;
use nestling_control::window::{FromHypervisor, HugePages, PAGE_BYTES, Round, SLOT_PAGES};

use super::send::{Copy, Stop, because};
use crate::cpu::instructions;
use crate::memory::embedder::Machine;
use crate::vm::shared::Shared;

/// Words of a log that are taken at once: 16 MiB, so that a flush pays for many pages.
const PIECE: usize = 64;
const WORD: u64 = u64::BITS as u64;
const PAGE_SHIFT: u32 = PAGE_BYTES.trailing_zeros();
/// What sending the machine's state takes beside memory, in nanoseconds.
const STATE_NS: u64 = 20_000_000;
/// In percent.
const THROTTLE_STEP: u8 = 20;
const MOST_THROTTLE: u8 = 80;

/// The dirty logs of all slots. Dropped, they are stopped, and what was split for them is made whole again.
pub(super) struct Logs {
    vm: Arc<Shared>,
    worker: Worker<Machine>,
    slots: Vec<(SlotId, GfnRange)>,
    /// Bytes mapped by huge pages before there were logs.
    huge_before: u64,
}

/// Bytes that are mapped by huge pages.
fn huge_bytes(vm: &Shared) -> u64 {
    vm.mmu.counters().mapped_bytes()[1..].iter().sum()
}

impl Logs {
    pub(super) fn start(vm: &Arc<Shared>) -> Result<Self, String> {
        let mut worker = vm.mmu.worker().map_err(|error| error.to_string())?;
        let slots = worker.slots().iter().map(|slot| (slot.id(), slot.range())).collect::<Vec<_>>();
        let mut logs = Self { vm: Arc::clone(vm), worker, slots: Vec::new(), huge_before: huge_bytes(vm) };
        // Before the logs: what is written without a note was written before everything became dirty.
        vm.note_writes(true);
        for (id, range) in slots {
            logs.worker.start_log(id, LogConfig::default()).map_err(|error| error.to_string())?;
            logs.slots.push((id, range));
        }
        // The first round's working set is what is used from here on.
        logs.used();
        Ok(logs)
    }

    /// Pages that were used since this was asked last.
    fn used(&mut self) -> u64 {
        let Self { worker, slots, .. } = self;
        slots.iter().map(|&(_, range)| worker.clear_young(AddressSpace::Main, range).young).sum()
    }

    /// Stops them, and makes whole what was split for them.
    pub(super) fn stop(&mut self) -> HugePages {
        let mut made = 0;
        for (id, _) in core::mem::take(&mut self.slots) {
            // It fails only for a slot that has gone, with its log. What was split is whole again for the guest to go on.
            let collapsed = self.worker.stop_log(id).and_then(|()| self.worker.collapse(id)).unwrap_or_default();
            made += collapsed.leaves_2m * Level::M2.pages() + collapsed.leaves_1g * Level::G1.pages();
        }
        self.vm.note_writes(false);
        HugePages { before: self.huge_before, after: huge_bytes(&self.vm), made: made << PAGE_SHIFT }
    }

    /// Dirty pages now.
    fn count(&mut self) -> Result<u64, Stop> {
        let mut pages = 0;
        for &(id, range) in &self.slots {
            let mut words = [0; PIECE];
            for first in (0..words_of(range)).step_by(PIECE) {
                let words = &mut words[..PIECE.min(words_of(range) - first)];
                pages += self.worker.get_dirty(id, first, words).map_err(because)?;
            }
        }
        Ok(pages)
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.stop();
    }
}

fn words_of(range: GfnRange) -> usize {
    range.pages().div_ceil(WORD) as usize
}

impl Copy<'_> {
    /// Sends memory, round after round, until the rest can be sent in the time that the guest may stand still.
    pub(super) fn send_rounds(&mut self, logs: &mut Logs, limits: MigrateLimits) -> Result<(), Stop> {
        let (mut throttle, mut before) = (0, u64::MAX);
        for number in 1..=limits.rounds {
            let (began, sent) = (instructions::rdtsc(), self.pages);
            self.set_throttle(throttle)?;
            self.send_dirty(logs)?;
            self.drain()?;
            self.set_throttle(0)?;
            self.rounds = number;
            let ns = self.vm.clock.ns_in(instructions::rdtsc() - began);
            let pages = self.pages - sent;
            let dirty = logs.count()?;
            let downtime_ns = (u128::from(dirty) * u128::from(ns) / u128::from(pages.max(1))) as u64 + STATE_NS;
            let round = Round { number, pages, dirty, used: logs.used(), ns, downtime_ns, throttle };
            self.wait_for_room(true)?;
            self.put(&FromHypervisor::Round(round))?;
            if downtime_ns <= u64::from(limits.downtime_ms) * 1_000_000 {
                break;
            }
            // Nearer by less than a third is not near enough soon enough.
            if dirty > before / 3 * 2 {
                throttle = (throttle + THROTTLE_STEP).min(MOST_THROTTLE);
            }
            before = dirty;
        }
        Ok(())
    }

    /// Takes what is dirty from the logs and sends it.
    pub(super) fn send_dirty(&mut self, logs: &mut Logs) -> Result<(), Stop> {
        let vm = Arc::clone(self.vm);
        let mut words = [0; PIECE];
        for index in 0..logs.slots.len() {
            let (id, range) = logs.slots[index];
            for first in (0..words_of(range)).step_by(PIECE) {
                let words = &mut words[..PIECE.min(words_of(range) - first)];
                logs.worker.harvest_dirty(id, first, words).map_err(because)?;
                let frames = bits(words).map(|bit| range.start.0 + first as u64 * WORD + bit);
                let ram = vm.mmu.host().ram();
                let frames: Vec<u64> = frames.filter(|&gfn| ram.next_with_memory(Gfn(gfn)) == Some(Gfn(gfn))).collect();
                for frames in frames.chunks(SLOT_PAGES) {
                    self.send_pages(ram, frames)?;
                    self.take_turn()?;
                }
            }
        }
        Ok(())
    }
}

/// The bits that are set, by number.
fn bits(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..words.len() as u64 * WORD).filter(|bit| words[(bit / WORD) as usize] & 1 << (bit % WORD) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_numbered_through() {
        let found: Vec<_> = bits(&[1 << 63, 0, 0b101]).collect();
        assert_eq!(found, [63, 128, 130]);
        assert_eq!(words_of(GfnRange { start: Gfn(5), end: Gfn(70) }), 2);
    }
}
