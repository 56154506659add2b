//! The operations on dirty logs, each held against the ghost's dirty set.

use nestling::{Granularity, Level, LogConfig, LogError, LogStart, SlotError, SlotId, Split, Tracking};

use super::{Cpu, GfnRange, Single, Spot};
use crate::ghost::tree::Leaf;
use crate::machine::check_tables;
use crate::rng::Rng;

/// An operation on the log of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogOp {
    /// Start it.
    Start {
        /// By dirty bits, and not by write protection.
        dirty_bit: bool,
        /// Leaf by leaf, and not page by page.
        leaf: bool,
        /// With everything dirty.
        all: bool,
        /// Splitting when pages are armed.
        eager: bool,
    },
    /// Stop it.
    Stop,
    /// Take part of it: the words between two places, in 1/256 of all of them.
    Harvest(u8, u8),
    /// Look at part of it, then clear some of what was seen, by a mask made of the last number.
    GetAndClear(u8, u8, u64),
    /// Give bits back that are made of this number.
    Merge(u64),
    /// Split all huge leaves of the slot.
    Split,
    /// Make huge leaves of them again.
    Collapse,
}

/// Of so many words those between two places: the first of them, and how many.
fn part(words: usize, from: u8, to: u8) -> (usize, usize) {
    let at = |place: u8| words * usize::from(place) / 255;
    let (first, end) = (at(from.min(to)), at(from.max(to)));
    (first, end - first)
}

impl<F: Cpu> Single<F> {
    pub(super) fn log_op(&mut self, id: u8, op: LogOp) {
        let id = SlotId(id.into());
        match op {
            LogOp::Start { dirty_bit, leaf, all, eager } => self.start_log(
                id,
                LogConfig {
                    tracking: if dirty_bit { Tracking::DirtyBit } else { Tracking::WriteProtect },
                    granularity: if leaf { Granularity::Leaf } else { Granularity::Page },
                    start: if all { LogStart::AllDirty } else { LogStart::Clean },
                    split: if eager { Split::Eager } else { Split::OnDemand },
                },
            ),
            LogOp::Stop => {
                let right = self.right_for_log(id);
                self.mmu.host().ghost().log_stopped(id);
                let got = self.worker.stop_log(id);
                self.expect_same("stop_log", &got, &right);
            }
            LogOp::Harvest(from, to) => self.harvest(id, from, to),
            LogOp::GetAndClear(from, to, seed) => self.get_and_clear(id, from, to, seed),
            LogOp::Merge(seed) => self.merge(id, seed),
            LogOp::Split => self.split(id),
            LogOp::Collapse => self.collapse(id),
        }
    }

    fn split(&mut self, id: SlotId) {
        let mut got = self.worker.split(id);
        if got == Err(SlotError::OutOfMemory) && self.mmu.host().ghost().tables_may_run_out {
            self.feed();
            got = self.worker.split(id);
        }
        let right = self.place(id).map(|_| ()).ok_or(SlotError::NotFound);
        self.expect_same("split", &got, &right);
        let Some(place) = self.place(id).filter(|_| got.is_ok()) else { return };
        for tree in check_tables(&self.mmu) {
            let huge = |leaf: &&Leaf| leaf.level > Level::K4 && place.range.contains(leaf.gfn);
            if let Some(left) = tree.leaves.iter().filter(|_| tree.role.space() == place.space).find(huge) {
                self.complain(format!("splitting {id:?} left {left:?}"));
            }
        }
    }

    fn collapse(&mut self, id: SlotId) {
        let right = match self.right_for_log(id) {
            Ok(()) => Err(LogError::Running),
            Err(LogError::NotRunning) => Ok(()),
            Err(error) => Err(error),
        };
        let faults = self.mmu.counters().faults_fixed;
        let got = self.worker.collapse(id).map(|_| ());
        self.expect_same("collapse", &got, &right);
        self.expect_same("faults of a collapse", &self.mmu.counters().faults_fixed, &faults);
    }

    fn right_for_log(&self, id: SlotId) -> Result<(), LogError> {
        if self.place(id).is_none() {
            Err(LogError::Slot(SlotError::NotFound))
        } else if self.mmu.host().ghost().log(id).is_none() {
            Err(LogError::NotRunning)
        } else {
            Ok(())
        }
    }

    fn start_log(&mut self, id: SlotId, config: LogConfig) {
        let right = match self.right_for_log(id) {
            Ok(()) => Err(LogError::Running),
            Err(LogError::NotRunning) => Ok(()),
            Err(error) => Err(error),
        };
        self.mmu.host().ghost().log_starting(id, config);
        let got = self.worker.start_log(id, config);
        self.mmu.host().ghost().log_started(id);
        self.expect_same("start_log", &got, &right);
    }

    /// The words of the log of `id` that an operation is about, or what it should answer.
    fn part_of_log(&self, id: SlotId, from: u8, to: u8) -> Result<(usize, usize), LogError> {
        self.right_for_log(id)?;
        let words = self.mmu.host().ghost().log(id).map_or(0, |(_, words)| words);
        Ok(part(words, from, to))
    }

    fn harvest(&mut self, id: SlotId, from: u8, to: u8) {
        let right = self.part_of_log(id, from, to);
        let (first, count) = right.unwrap_or((0, 1));
        let mut words = vec![0; count];
        let asked = self.mmu.host().ghost().asking(id);
        let got = self.worker.harvest_dirty(id, first, &mut words);
        self.told(id, first, &words, asked, true, got, right);
        self.log_ends(id);
    }

    #[expect(clippy::too_many_arguments, reason = "what was asked, what was answered, and what should have been")]
    fn told(
        &mut self,
        id: SlotId,
        first: usize,
        words: &[u64],
        asked: u64,
        taken: bool,
        got: Result<u64, LogError>,
        right: Result<(usize, usize), LogError>,
    ) {
        let dirty = words.iter().map(|word| u64::from(word.count_ones())).sum();
        self.expect_same("what a log answers", &got, &right.map(|_| dirty));
        if got.is_ok() {
            self.mmu.host().ghost().told(id, first, words, asked, taken);
        }
    }

    fn get_and_clear(&mut self, id: SlotId, from: u8, to: u8, seed: u64) {
        let right = self.part_of_log(id, from, to);
        let (first, count) = right.unwrap_or((0, 1));
        let mut words = vec![0; count];
        let asked = self.mmu.host().ghost().asking(id);
        let got = self.worker.get_dirty(id, first, &mut words);
        self.told(id, first, &words, asked, false, got, right);
        let mut rng = Rng::new(seed);
        words.iter_mut().for_each(|word| *word &= rng.next() | rng.next());
        let asked = self.mmu.host().ghost().asking(id);
        let got = self.worker.clear_dirty(id, first, &words);
        // What was not asked for may still be dirty: nothing is told of it.
        let dirty = words.iter().map(|word| u64::from(word.count_ones())).sum();
        self.expect_same("clear_dirty", &got, &right.map(|_| dirty));
        if got.is_ok() {
            self.mmu.host().ghost().cleared(id, first, &words, asked);
        }
    }

    fn merge(&mut self, id: SlotId, seed: u64) {
        let right = self.right_for_log(id);
        let words = self.mmu.host().ghost().log(id).map_or(1, |(_, words)| words);
        let mut rng = Rng::new(seed);
        let bits: Vec<_> = (0..words).map(|_| rng.next() & rng.next() & rng.next()).collect();
        self.mmu.host().ghost().merging(id, 0, &bits);
        let got = self.worker.merge_dirty(id, 0, &bits);
        self.expect_same("merge_dirty", &got, &right);
    }

    /// Words behind the last one are refused.
    fn log_ends(&mut self, id: SlotId) {
        let Some((_, words)) = self.mmu.host().ghost().log(id) else { return };
        let got = self.worker.harvest_dirty(id, words, &mut [0]);
        self.expect_same("a word behind the log's end", &got, &Err(LogError::PastTheEnd));
    }

    /// The embedder writes to a range itself.
    pub(super) fn device_writes(&mut self, by_vcpu: bool, at: Spot, pages: u64) {
        let range: GfnRange = self.range(at, pages);
        let space = if by_vcpu { self.cpus[0].role().space() } else { nestling::AddressSpace::Main };
        let machine = self.mmu.host();
        machine.ghost().trying(space, range);
        if by_vcpu {
            self.cpus[0].vcpu.mark_dirty(range);
        } else {
            self.worker.mark_dirty(space, range);
        }
        machine.ghost().wrote(space, range);
    }
}
