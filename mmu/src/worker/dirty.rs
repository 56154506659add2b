//! What an embedder does with dirty logs. [`crate::slots::dirty`] says why it is right.
//!
//! A slot of *n* pages has ⌈n / 64⌉ words; bit *b* of word *w* stands for the slot's page 64 · w + b. All of these wait
//! for memslot updates in progress, and hold the next ones back while they run.

use super::Worker;
use crate::addr::{Gfn, GfnRange};
use crate::host::Host;
use crate::lock::Shared;
use crate::mutants::{self, Mutant};
use crate::reclaim::synchronize;
use crate::shadow;
use crate::slots::dirty::{DirtyLog, DirtyPages, LogConfig, LogError, LogStart, Tracking, WORD};
use crate::slots::{AddressSpace, Memslot, SlotError, SlotId, Trackable};
use crate::tdp::collapse::{Collapsed, collapse};
use crate::tdp::protect::{Arm, Gather, Logged, Pages, SplitAll, write_protect};
use crate::tdp::sweep::sweep;
use crate::tlb::Debt;
use alloc::sync::Arc;

/// Words that are armed in one go. 64 pages each: a log of 1 GiB has 4096.
const CHUNK: usize = 64;

fn logged<'l>(slot: &Memslot, log: &'l DirtyLog) -> Logged<'l> {
    Logged { log, first: slot.range().start, ring: None }
}

/// The frames of `count` words of the slot's log, from word `first` on.
fn frames(slot: &Memslot, first: usize, count: usize) -> GfnRange {
    let start = slot.range().start.0 + first as u64 * WORD;
    GfnRange { start: Gfn(start), end: Gfn(start + count as u64 * WORD).min(slot.range().end) }
}

/// The pages of an entry of a ring, counted from the slot's first; those of a leaf that lie in the slot. None of an entry
/// that is older than the slot and names a page behind its end: nobody was told of the slot's own pages by it.
fn pages_of(slot: &Memslot, entry: &DirtyPages) -> (u64, u64) {
    let (start, end) = (slot.range().start.0, slot.range().end.0);
    if entry.page >= end - start {
        return (0, 0);
    }
    let block = GfnRange::block(entry.level, Gfn(start + entry.page));
    (block.start.0.max(start) - start, block.end.0.min(end) - start)
}

/// The words of the slot's log that they are in: the first, and how many.
fn words_of(slot: &Memslot, entry: &DirtyPages) -> (usize, usize) {
    let (start, end) = pages_of(slot, entry);
    ((start / WORD) as usize, (end.div_ceil(WORD) - start / WORD) as usize)
}

/// Their bits in one of these words.
fn mask_of(slot: &Memslot, entry: &DirtyPages, word: usize) -> u64 {
    let (start, end) = pages_of(slot, entry);
    let base = word as u64 * WORD;
    let (from, to) = (start.max(base), end.min(base + WORD));
    if from >= to { 0 } else { u64::MAX << (from - base) & u64::MAX >> (base + WORD - to) }
}

fn dirty_pages(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

impl<H: Host> Worker<H> {
    /// Starts logging writes to a slot, while vCPUs run. From its return on every write is logged.
    ///
    /// With [`LogStart::AllDirty`] the cost does not depend on what is mapped.
    pub fn start_log(&mut self, id: SlotId, config: LogConfig) -> Result<(), LogError> {
        let mmu = Arc::clone(&self.mmu);
        let mut updates = mmu.updates.lock(|| mmu.host.relax());
        let (slot, prepared) = updates.change_log(&mmu.slots, id, Some(config))?;
        let published = mmu.slots.publish(&mut updates, prepared);
        // After this no fault makes an entry writable without a word to the log.
        self.settle(&mmu, published);
        if config.start == LogStart::Clean {
            let Some(log) = slot.log() else { return Err(LogError::NotRunning) };
            let mut debt = Debt::flush();
            let mut arm = Arm::new(logged(&slot, log), Pages::All, &mut debt);
            sweep(&mmu, &mut self.ticket, slot.space(), slot.range(), &mut arm);
            arm.end(&mmu, &self.ticket);
            let range = slot.range();
            self.arm_shadow((range.start.0..range.end.0).map(Gfn), &mut debt);
            debt.pay(&mmu, self.ticket.counters());
        }
        Ok(())
    }

    /// Stops logging writes to a slot. What is in the log and was not asked for is forgotten.
    pub fn stop_log(&mut self, id: SlotId) -> Result<(), LogError> {
        let mmu = Arc::clone(&self.mmu);
        let mut updates = mmu.updates.lock(|| mmu.host.relax());
        let (_, prepared) = updates.change_log(&mmu.slots, id, None)?;
        let published = mmu.slots.publish(&mut updates, prepared);
        self.settle(&mmu, published);
        Ok(())
    }

    /// Copies the log's words from `first_word` on into `out`. Nothing is cleared or armed: that is
    /// [`Worker::clear_dirty`]'s part. How many pages are dirty.
    pub fn get_dirty(&mut self, id: SlotId, first_word: usize, out: &mut [u64]) -> Result<u64, LogError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let (slot, log) = updates.logged(id)?;
        self.gather(&slot, &log, first_word, out.len())?;
        for (word, out) in (first_word..).zip(out.iter_mut()) {
            *out = log.get_word(word);
        }
        Ok(dirty_pages(out))
    }

    /// Clears and arms the pages of `mask`, whose first word is the log's `first_word`. How many of them were dirty.
    ///
    /// Their data is to be read after this has returned: a write between [`Worker::get_dirty`] and this is not reported
    /// again.
    pub fn clear_dirty(&mut self, id: SlotId, first_word: usize, mask: &[u64]) -> Result<u64, LogError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let (slot, log) = updates.logged(id)?;
        if !log.has_words(first_word, mask.len()) {
            return Err(LogError::PastTheEnd);
        }
        let (mut debt, mut pages) = (Debt::nothing(), 0);
        for (chunk, mask) in mask.chunks(CHUNK).enumerate() {
            let first = first_word + chunk * CHUNK;
            let mut taken = [0; CHUNK];
            let taken = &mut taken[..mask.len()];
            for ((word, mask), taken) in (first..).zip(mask).zip(taken.iter_mut()) {
                *taken = log.take_word(word, *mask);
            }
            let dirty = dirty_pages(taken);
            self.arm_taken(&slot, &log, first, taken, dirty, &mut debt);
            pages += dirty;
        }
        debt.pay(&mmu, self.ticket.counters());
        Ok(pages)
    }

    /// Takes the log's words from `first_word` on into `out`, and arms their pages (get and clear). How many pages are
    /// dirty.
    ///
    /// Every write that was finished when this is called is in `out` or was in an earlier answer; the data of the pages
    /// is to be read after this has returned.
    pub fn harvest_dirty(&mut self, id: SlotId, first_word: usize, out: &mut [u64]) -> Result<u64, LogError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let (slot, log) = updates.logged(id)?;
        self.gather(&slot, &log, first_word, out.len())?;
        let pages = log.take_words(first_word, out);
        let mut debt = Debt::nothing();
        if mutants::is(Mutant::DirtyHandedOutBeforeFlush) {
            Debt::flush().pay(&mmu, self.ticket.counters());
            let mut late = Debt::nothing();
            self.arm_taken(&slot, &log, first_word, out, pages, &mut late);
            core::mem::forget(late);
            return Ok(pages);
        }
        self.arm_taken(&slot, &log, first_word, out, pages, &mut debt);
        debt.pay(&mmu, self.ticket.counters());
        Ok(pages)
    }

    /// Clears and arms pages that were taken from rings (KVM_RESET_DIRTY_RINGS). Of slots that are gone or have no log any
    /// more there is nothing to arm. How many pages were dirty.
    ///
    /// Entries that follow each other are best together: the pages of one word of a bitmap are armed at once.
    pub fn reset_dirty(&mut self, entries: &[DirtyPages]) -> u64 {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let (mut debt, mut pages, mut left) = (Debt::nothing(), 0, entries);
        while let Some(first) = left.first() {
            let Ok((slot, log)) = updates.logged(first.slot) else {
                left = &left[1..];
                continue;
            };
            // All entries from here on that are of the same slot and word, or leaf.
            let (base, count) = words_of(&slot, first);
            let run =
                left.iter().take_while(|entry| entry.slot == first.slot && words_of(&slot, entry) == (base, count));
            let run = run.count();
            for word in (base..base + count).filter(|word| log.has_words(*word, 1)) {
                let mask = left[..run].iter().fold(0, |mask, entry| mask | mask_of(&slot, entry, word));
                let taken = [log.take_word(word, mask)];
                let dirty = dirty_pages(&taken);
                self.arm_taken(&slot, &log, word, &taken, dirty, &mut debt);
                pages += dirty;
            }
            left = &left[run..];
        }
        debt.pay(&mmu, self.ticket.counters());
        pages
    }

    /// Gives bits back to the log: what was taken and not used, as when a migration failed, or what another log knew.
    pub fn merge_dirty(&mut self, id: SlotId, first_word: usize, bits: &[u64]) -> Result<(), LogError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let (_, log) = updates.logged(id)?;
        if !log.has_words(first_word, bits.len()) {
            return Err(LogError::PastTheEnd);
        }
        for (word, bits) in (first_word..).zip(bits).filter(|(_, bits)| **bits != 0) {
            log.mark_word(word, *bits);
        }
        Ok(())
    }

    /// The embedder itself has written to `range`: a device, a loader, an instruction that it carried out for the guest.
    ///
    /// To be called after the write, and before anyone is told that it is done. Frames without a log are not logged.
    ///
    /// A guest that is shadowed may have page tables there: what was made of them goes. To such a guest's memory every write
    /// of the embedder's is to be told, but for marks in entries of its tables.
    pub fn mark_dirty(&mut self, space: AddressSpace, range: GfnRange) {
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        self.mmu.slots.read(&inside).mark_dirty(space, range);
        drop(inside);
        if let Some(shadow) = self.mmu.shadow.get() {
            shadow::zap::zap_tables(&self.mmu, shadow, &mut self.ticket, &mut self.shadow, range);
        }
    }

    /// Tracks writes to a page: from the return on, each ends in [`crate::Outcome::Tracked`]. Calls add up; each is undone
    /// by one [`Worker::untrack_page`]. A page that moves with its slot stays tracked, one whose slot goes does not.
    pub fn track_page(&mut self, space: AddressSpace, gfn: Gfn) -> Result<(), SlotError> {
        let mmu = Arc::clone(&self.mmu);
        let mut updates = mmu.updates.lock(|| mmu.host.relax());
        let Trackable { slot, tracked, prepared } = updates.trackable(&mmu.slots, space, gfn)?;
        if let Some(prepared) = prepared {
            let published = mmu.slots.publish(&mut updates, prepared);
            self.settle(&mmu, published);
        }
        if tracked.add(gfn.0 - slot.range().start.0, || mmu.host.relax()) {
            // Faults that did not see the page tracked have left; what they made writable is found now.
            synchronize(&mmu);
            write_protect(&mmu, &mut self.ticket, &mut self.batch, space, gfn);
            if space == AddressSpace::Main && self.mmu.shadow.get().is_some() {
                let mut debt = Debt::flush();
                self.arm_shadow(core::iter::once(gfn), &mut debt);
                debt.pay(&mmu, self.ticket.counters());
            }
        }
        Ok(())
    }

    /// Undoes one [`Worker::track_page`]; fails if there was none.
    pub fn untrack_page(&mut self, space: AddressSpace, gfn: Gfn) -> Result<(), SlotError> {
        let mmu = Arc::clone(&self.mmu);
        let _updates = mmu.updates.lock(|| mmu.host.relax());
        let inside = Shared::enter(&self.mmu, &mut self.ticket);
        let slot = mmu.slots.read(&inside).find(space, gfn).ok_or(SlotError::NotFound)?;
        let tracked = slot.tracked().ok_or(SlotError::NotFound)?;
        let page = gfn.0 - slot.range().start.0;
        if tracked.remove(page, || mmu.host.relax()) { Ok(()) } else { Err(SlotError::NotFound) }
    }

    /// Splits every huge leaf of a slot, in steps that yield. Fails when there are no tables for it; what was split by then
    /// stays so. In shadow tables they are removed: the next faults decide again.
    pub fn split(&mut self, id: SlotId) -> Result<(), SlotError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let slot = updates.get(id)?;
        let mut all = SplitAll::default();
        sweep(&mmu, &mut self.ticket, slot.space(), slot.range(), &mut all);
        let Self { ticket, shadow: debts, .. } = self;
        if let Some(shadow) = mmu.shadow.get().filter(|_| slot.space() == AddressSpace::Main) {
            shadow::large::remove(&mmu, shadow, ticket, debts, slot.range());
        }
        Ok(all.spares.release(&mmu, ticket)?)
    }

    /// Makes huge leaves where the tables of a slot say nothing that one could not say, and the backing agrees: after its
    /// log was stopped, what was split is whole again. In place, without a fault; vCPUs that touch a block at that moment
    /// fault once and are retried. Refused while the slot has a log.
    ///
    /// In shadow tables the small ones are removed where that is so, for faults to make large ones; these are not counted.
    pub fn collapse(&mut self, id: SlotId) -> Result<Collapsed, LogError> {
        let mmu = Arc::clone(&self.mmu);
        let updates = mmu.updates.lock(|| mmu.host.relax());
        let slot = updates.get(id)?;
        if slot.log().is_some() {
            return Err(LogError::Running);
        }
        let Self { ticket, batch, shadow: debts, .. } = self;
        if let Some(shadow) = mmu.shadow.get().filter(|_| slot.space() == AddressSpace::Main) {
            shadow::large::collapse(&mmu, shadow, ticket, debts, &slot);
        }
        Ok(collapse(&mmu, ticket, batch, &slot))
    }

    /// Brings what is known of writes up to now into the log.
    fn gather(&mut self, slot: &Memslot, log: &DirtyLog, first: usize, count: usize) -> Result<(), LogError> {
        if !log.has_words(first, count) {
            return Err(LogError::PastTheEnd);
        }
        let mmu = &*self.mmu;
        if log.config().tracking == Tracking::DirtyBit {
            let mut gather = Gather { logged: logged(slot, log) };
            sweep(mmu, &mut self.ticket, slot.space(), frames(slot, first, count), &mut gather);
            // Roots that were obsolete before their turn were left out; what they know, whoever empties them brings
            // to the log. Those that become obsolete from here on were gone through.
            mmu.roots.wait_until_emptied(&mmu.host);
        }
        synchronize(mmu);
        Ok(())
    }

    /// Arms the pages of words that were taken, so many.
    fn arm_taken(&mut self, slot: &Memslot, log: &DirtyLog, first: usize, taken: &[u64], pages: u64, debt: &mut Debt) {
        debug_assert_eq!(pages, dirty_pages(taken));
        if pages > 0 {
            debt.note();
            let mut arm = Arm::new(logged(slot, log), Pages::Taken { first, words: taken }, debt);
            sweep(&self.mmu, &mut self.ticket, slot.space(), frames(slot, first, taken.len()), &mut arm);
            arm.end(&self.mmu, &self.ticket);
            let start = frames(slot, first, taken.len()).start;
            let bits = taken.iter().zip(0u64..).flat_map(|(word, number)| {
                let mut left = *word;
                core::iter::from_fn(move || {
                    let bit = u64::from(left.trailing_zeros());
                    left &= left.checked_sub(1)?;
                    Some(number * WORD + bit)
                })
            });
            self.arm_shadow(bits.map(|page| Gfn(start.0 + page)), debt);
        }
    }

    /// Arms pages where shadow paging maps them: there it is always the write right that tells.
    fn arm_shadow(&mut self, gfns: impl Iterator<Item = Gfn>, debt: &mut Debt) {
        if let Some(shadow) = self.mmu.shadow.get() {
            shadow::zap::write_protect(&self.mmu, shadow, &mut self.ticket, &mut self.shadow, gfns, debt);
        }
    }
}
