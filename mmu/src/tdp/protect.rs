//! Arming pages for the dirty log, and gathering what the CPU has noticed of them.
//!
//! # Protocol
//! See [`crate::slots::dirty`] for the order in which a taker does these, and [`super::sweep`] for the walk. In roots whose
//! entries the CPU marks dirty, arming clears the dirty bit; in roots without, or where the log asks for it, it takes the
//! write right and leaves MMU_WRITABLE, by which a fault knows that it may give the right back. Which of the two is asked
//! of each root by itself: to clear dirty bits that no CPU sets would lose every write from then on (CVE-2024-26990).
//!
//! Arming owes a flush before the bits are handed out. Not before the lock is left: no one concludes anything from an
//! entry that is only armed, as long as MMU_WRITABLE says that a TLB may still know it as writable.
//!
//! A leaf larger than the log's granularity is split, or loses its write right, so that its first write splits it. Its
//! dirty bit stands for all its frames: when it is cleared for some, the others are marked first to last.

use crate::Mmu;
use crate::OutOfMemory;
use crate::addr::{ENTRIES, Gfn, GfnRange, Hfn, Level};
use crate::entry::{Entry, weaken};
use crate::events::Counter;
use crate::format::{Format, State};
use crate::host::Host;
use crate::lock::{Shared, Ticket};
use crate::mutants::{self, Mutant};
use crate::reclaim::{Batch, Debts, Reach, hold};
use crate::root::{AdBits, RootRef, RootSet, Spaces, give_back};
use crate::slots::dirty::{DirtyLog, DirtyPages, Granularity, Ring, Split, Tracking, WORD};
use crate::slots::{AddressSpace, SlotId};
use crate::table::Table;
use crate::tdp::split::split;
use crate::tdp::sweep::{Visited, Visitor};
use crate::tlb::Debt;

/// Tables that a sweep takes along, so that it need not leave the lock for each huge leaf.
const SPARES: usize = 16;

/// Tables for splitting, allocated outside the lock.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    frames: [Hfn; SPARES],
    count: usize,
    /// The embedder had none the last time.
    exhausted: bool,
}

impl Spares {
    fn take(&mut self) -> Option<Hfn> {
        self.count = self.count.checked_sub(1)?;
        Some(self.frames[self.count])
    }

    fn put(&mut self, frame: Hfn) {
        self.frames[self.count] = frame;
        self.count += 1;
    }

    pub(crate) fn refill<H: Host>(&mut self, mmu: &Mmu<H>, ticket: &Ticket) {
        while self.count < SPARES {
            let Some(frame) = mmu.host.alloc_table() else {
                self.exhausted = self.count == 0;
                return;
            };
            ticket.counters().add(Counter::TableFrames, 1);
            self.put(frame);
        }
    }

    /// Gives back what was not needed. Whether there was always a table.
    pub(crate) fn release<H: Host>(mut self, mmu: &Mmu<H>, ticket: &Ticket) -> Result<(), OutOfMemory> {
        while let Some(frame) = self.take() {
            give_back(&mmu.host, frame, ticket.counters());
        }
        if self.exhausted { Err(OutOfMemory) } else { Ok(()) }
    }

    /// Splits the mapping `raw` of `table` at `gfn`.
    pub(crate) fn split<H: Host>(
        &mut self,
        inside: &Shared<'_, H>,
        table: &Table<'_, H>,
        gfn: Gfn,
        raw: u64,
    ) -> Visited {
        let Some(frame) = self.take() else {
            // Without a table the leaf stays; its first write will need one, and its fault reports that there is none.
            return if self.exhausted { Visited::Done } else { Visited::NeedsTable };
        };
        match split(inside, table, table.entry(gfn), raw, frame) {
            Ok(_) => inside.counters().add(Counter::LeafSplit, 1),
            Err(_) => self.put(frame),
        }
        Visited::Again
    }
}

/// A slot's log as the tables see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logged<'l> {
    pub(crate) log: &'l DirtyLog,
    /// The slot's first frame.
    pub(crate) first: Gfn,
    /// The slot, and the ring of the vCPU that works on it, if that has one.
    pub(crate) ring: Option<(SlotId, &'l Ring)>,
}

impl Logged<'_> {
    /// Whether the CPU notices writes through the leaves of `root`.
    #[inline]
    pub(crate) fn by_dirty_bit(&self, root: &RootRef) -> bool {
        self.log.config().tracking == Tracking::DirtyBit && root.role().ad_bits() == AdBits::On
    }

    /// A leaf of `level` for `gfn` has become writable. By whoever made it so, after that, and before the lock is left.
    #[inline]
    pub(crate) fn mark(&self, level: Level, gfn: Gfn) {
        let page = gfn.0 - self.first.0;
        match self.ring {
            None if level == Level::K4 => self.log.note(page),
            Some((slot, ring)) if level == Level::K4 => {
                if self.log.mark(page) {
                    ring.push(DirtyPages { slot, page, level });
                }
            }
            ring => {
                self.log.mark_range(self.first, GfnRange::block(level, gfn));
                if let Some((slot, ring)) = ring {
                    ring.push(DirtyPages { slot, page, level });
                }
            }
        }
    }

    /// Whether leaves above 4 KiB must not be written through.
    #[inline]
    pub(crate) fn by_page(&self) -> bool {
        self.log.config().granularity == Granularity::Page
    }
}

/// Which pages are to be armed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pages<'w> {
    /// All.
    All,
    /// Those whose bits are set in these words of the log, the first of which is word `first`.
    Taken { first: usize, words: &'w [u64] },
}

/// Arms pages.
pub(crate) struct Arm<'l> {
    logged: Logged<'l>,
    pages: Pages<'l>,
    /// What is taken from a leaf of 4 KiB in the present root.
    bits: u64,
    by_dirty_bit: bool,
    spares: Spares,
    debt: &'l mut Debt,
}

impl<'l> Arm<'l> {
    pub(crate) fn new(logged: Logged<'l>, pages: Pages<'l>, debt: &'l mut Debt) -> Self {
        Self { logged, pages, bits: 0, by_dirty_bit: false, spares: Spares::default(), debt }
    }

    /// Ends it: a table was missing only if leaves were left unsplit, which their first writes make good.
    pub(crate) fn end<H: Host>(self, mmu: &Mmu<H>, ticket: &Ticket) {
        let _ = self.spares.release(mmu, ticket);
    }

    /// The bits of `word` that are to be armed, of a word of the log.
    fn wanted(&self, word: usize) -> u64 {
        match self.pages {
            Pages::All => u64::MAX,
            Pages::Taken { first, words } => {
                word.checked_sub(first).and_then(|index| words.get(index)).copied().unwrap_or(0)
            }
        }
    }

    fn page(&self, gfn: Gfn) -> u64 {
        gfn.0 - self.logged.first.0
    }

    /// The dirty bit of a leaf that maps `block` was cleared: the frames whose pages are not being taken stay dirty.
    fn keep_others(&self, block: GfnRange) {
        let Pages::Taken { .. } = self.pages else { return };
        let mut page = block.start.0.saturating_sub(self.logged.first.0);
        let end = block.end.0.saturating_sub(self.logged.first.0);
        while page < end {
            let (word, next) = ((page / WORD) as usize, ((page / WORD + 1) * WORD).min(end));
            let in_block = u64::MAX << (page % WORD) & u64::MAX >> (page / WORD * WORD + WORD - next);
            let others = in_block & !self.wanted(word);
            if others != 0 && self.logged.log.has_words(word, 1) {
                self.logged.log.mark_word(word, others);
            }
            page = next;
        }
    }
}

/// Takes `bits` from the mapping in `cell`, if it has any of them.
#[inline]
fn arm<F: Format>(cell: &Entry, bits: u64, debt: &mut Debt) {
    let mut raw = cell.read();
    while raw & bits != 0 && F::is_mapping(raw, Level::K4) {
        match weaken::<F>(cell, Level::K4, raw, bits, debt) {
            Ok(()) => return,
            Err(now) => raw = now,
        }
    }
}

impl<H: Host> Visitor<H> for Arm<'_> {
    fn enters(&mut self, root: &RootRef) -> bool {
        self.by_dirty_bit = self.logged.by_dirty_bit(root);
        let clear_only = self.by_dirty_bit || mutants::is(Mutant::DirtyBitClearedWhereProtectionTracks);
        self.bits = H::Format::DIRTY | if clear_only { 0 } else { H::Format::WRITE };
        true
    }

    fn seek(&self, from: Gfn) -> Gfn {
        let Pages::Taken { first, words } = self.pages else { return from };
        let page = self.page(from);
        let word = (page / WORD) as usize;
        let Some(mut index) = word.checked_sub(first).filter(|index| *index < words.len()) else { return from };
        let mut left = words[index] & u64::MAX << (page % WORD);
        while left == 0 {
            index += 1;
            match words.get(index) {
                Some(next) => left = *next,
                // Past the range's end, which the caller compares.
                None => return Gfn(self.logged.first.0 + (first + index) as u64 * WORD),
            }
        }
        Gfn(self.logged.first.0 + (first + index) as u64 * WORD + u64::from(left.trailing_zeros()))
    }

    fn leaves(&mut self, _inside: &Shared<'_, H>, table: &Table<'_, H>, range: GfnRange) {
        let (entries, bits) = (table.entries(), self.bits);
        let start = Level::K4.index(range.start);
        let Pages::Taken { first, words } = self.pages else {
            for cell in &entries[start..start + range.pages() as usize] {
                arm::<H::Format>(cell, bits, self.debt);
            }
            return;
        };
        let (page, end) = (self.page(range.start), self.page(range.end));
        let (from, to) = ((page / WORD) as usize - first, end.div_ceil(WORD) as usize - first);
        // The entry of each word's first page; that of the first one may lie before the table's.
        let mut base = start.wrapping_sub((page % WORD) as usize);
        for (index, word) in (from..to).zip(&words[from..to]) {
            let mut left = *word;
            if left != 0 {
                let head = if index == from { u64::MAX << (page % WORD) } else { u64::MAX };
                let tail = if index + 1 == to { u64::MAX >> ((to + first) as u64 * WORD - end) } else { u64::MAX };
                left &= head & tail;
            }
            while left != 0 {
                let cell = &entries[base.wrapping_add(left.trailing_zeros() as usize) % ENTRIES];
                arm::<H::Format>(cell, bits, self.debt);
                left &= left - 1;
            }
            base = base.wrapping_add(WORD as usize);
        }
    }

    fn huge(&mut self, inside: &Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn, raw: u64) -> Visited {
        let by_page = self.logged.by_page();
        if by_page && self.logged.log.config().split == Split::Eager && !self.spares.exhausted {
            return self.spares.split(inside, table, gfn, raw);
        }
        // Larger than the granularity: nobody may write through it, whoever notices writes to the small ones.
        let bits = if by_page { H::Format::WRITE | H::Format::DIRTY } else { self.bits };
        if raw & bits == 0 {
            return Visited::Done;
        }
        if weaken::<H::Format>(table.entry(gfn), table.level, raw, bits, self.debt).is_err() {
            return Visited::Again;
        }
        if raw & H::Format::DIRTY != 0 && self.by_dirty_bit {
            self.keep_others(GfnRange::block(table.level, gfn));
        }
        Visited::Done
    }

    fn refill(&mut self, mmu: &Mmu<H>, ticket: &Ticket) {
        self.spares.refill(mmu, ticket);
    }
}

/// Copies dirty bits of the tables into the log; the tables stay as they are.
pub(crate) struct Gather<'l> {
    pub(crate) logged: Logged<'l>,
}

impl<H: Host> Visitor<H> for Gather<'_> {
    fn enters(&mut self, root: &RootRef) -> bool {
        self.logged.by_dirty_bit(root)
    }

    fn leaves(&mut self, _inside: &Shared<'_, H>, table: &Table<'_, H>, range: GfnRange) {
        let (mut page, end) = (range.start.0 - self.logged.first.0, range.end.0 - self.logged.first.0);
        let mut cells = &table.entries()[Level::K4.index(range.start)..];
        while page < end {
            let (bit, count) = (page % WORD, (WORD - page % WORD).min(end - page));
            let mut mask = 0;
            let (now, rest) = cells.split_at(count as usize);
            cells = rest;
            for cell in now.iter().rev() {
                let raw = cell.read();
                mask = mask << 1 | u64::from(raw & H::Format::DIRTY != 0 && H::Format::is_mapping(raw, Level::K4));
            }
            mask <<= bit;
            if mask != 0 {
                self.logged.log.mark_word((page / WORD) as usize, mask);
            }
            page += count;
        }
    }

    fn huge(&mut self, _inside: &Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn, raw: u64) -> Visited {
        if raw & H::Format::DIRTY != 0 {
            self.logged.log.mark_range(self.logged.first, GfnRange::block(table.level, gfn));
        }
        Visited::Done
    }
}

/// Splits what is larger than 4 KiB.
#[derive(Default)]
pub(crate) struct SplitAll {
    pub(crate) spares: Spares,
}

impl<H: Host> Visitor<H> for SplitAll {
    fn leaves(&mut self, _inside: &Shared<'_, H>, _table: &Table<'_, H>, _range: GfnRange) {}

    fn huge(&mut self, inside: &Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn, raw: u64) -> Visited {
        self.spares.split(inside, table, gfn, raw)
    }

    fn refill(&mut self, mmu: &Mmu<H>, ticket: &Ticket) {
        self.spares.refill(mmu, ticket);
    }
}

/// Takes from every mapping of `gfn` the right to write and the right to be given it back by a fault; a larger leaf goes
/// as a whole. When it returns, no vCPU writes the page any more. Faults see already that they must not give the right
/// back.
pub(crate) fn write_protect<H: Host>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    batch: &mut Batch,
    space: AddressSpace,
    gfn: Gfn,
) {
    let mut roots = Shared::enter(mmu, ticket).valid_roots(Spaces::One(space));
    while let Some(root) = roots.next(mmu) {
        if gfn < root.role().level().root_limit() {
            hold(mmu, ticket, batch, Reach::Live, |hold| {
                let (inside, mut debts) = hold.step();
                protect_page(inside, &mut debts, &root, space, gfn);
            });
        }
        root.put(&mmu.host, ticket.counters());
    }
    // As for a zap: no vCPU runs on a root that became obsolete before its turn, once its invalidation is over.
    drop(Shared::enter(mmu, ticket));
}

fn protect_page<H: Host>(inside: &Shared<'_, H>, debts: &mut Debts<'_>, root: &RootRef, space: AddressSpace, gfn: Gfn) {
    let mut table = Table::root(inside, root);
    loop {
        let cell = table.entry(gfn);
        let raw = cell.read();
        if let Some(next) = table.next(raw) {
            table = next;
            continue;
        }
        if !H::Format::is_mapping(raw, table.level) {
            if H::Format::decode(raw, table.level) == State::Frozen {
                // Someone else's; the flush that goes with it may come after this returns.
                debts.owe_flush(table.level, gfn);
            }
            return;
        }
        let done = if table.level == Level::K4 {
            debts.restrict::<H>(cell, table.level, gfn, raw)
        } else {
            let frozen = debts.freeze::<H>(cell, table.level, gfn, raw);
            if frozen.is_ok() && raw & H::Format::DIRTY != 0 {
                inside.mmu.slots.read(inside).mark_dirty(space, GfnRange::block(table.level, gfn));
            }
            frozen
        };
        if done.is_ok() {
            return;
        }
    }
}
