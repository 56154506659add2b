//! Dirty logging: which pages of a slot were written (F32–F38).
//!
//! # Protocol
//! A slot has a [`DirtyLog`] or none; starting and stopping one is a change of the slot, published like any other and
//! followed by a grace period, so that every fault knows of the log before [`crate::Worker::start_log`] walks and
//! returns. A log belongs to its slot: it moves with it, is untouched by a change of flags, and ends with it.
//!
//! A page is *armed* when its next write will be noticed: by a fault, because its entry lets nobody write
//! ([`Tracking::WriteProtect`]), or by the CPU, which sets the dirty bit of an entry where it is clear
//! ([`Tracking::DirtyBit`]). What is noticed sets the page's bit in the log. Whoever takes bits arms their pages again.
//!
//! ## Order
//! - **A fault sets the bit after the entry has become writable**, inside the same stay in the lock. The other way round a
//!   taker could come between the two, take the bit, find the entry armed as it was, and then the entry becomes
//!   writable: with no bit set and nothing to notice the writes. This way round a taker that comes between finds no bit
//!   and leaves the entry alone; the bit is there for the next one.
//! - **Who removes an entry with the dirty bit set moves that bit to the log after the entry has changed**, and before it
//!   leaves the lock. Before would not do: a taker could take the bit, and a write that sets no dirty bit because one is
//!   set follows. Until its removal is flushed, a CPU may write through the entry without a trace; the bit is set by
//!   then, and a taker that takes it flushes as well.
//! - **A taker**: where dirty bits count, it copies those of the tables into the log, without clearing them; waits for a
//!   grace period; takes the words; arms the pages that it took; flushes if it took any; and only then hands them out.
//!   The grace period is for those that were inside and had changed an entry, but not yet the log: when it has passed,
//!   every write that came before the call is in the words. The flush is owed for *bits taken*, not for entries changed:
//!   another may have changed them, and not flushed yet (invariant I11).
//! - The data of a page is read after its bit was handed out. So a write that the flush was too late for is in the data,
//!   and one after the flush sets the bit again.
//!
//! Takers are serialised by the memslot update lock. Nothing here takes the MMU lock for exclusive use, and every walk
//! yields.

mod bitmap;
mod ring;

use alloc::sync::Arc;
use core::fmt;

use super::SlotError;
use crate::OutOfMemory;
use crate::addr::{Gfn, GfnRange};
pub(crate) use bitmap::{Bitmap, WORD};
pub(crate) use ring::Ring;
pub use ring::{DirtyPages, DirtyRing};

/// How writes are noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracking {
    /// Entries lose their write right, and the first write of each page faults.
    WriteProtect,
    /// The CPU sets the dirty bit. Nothing faults, but who asks has to look at every entry.
    DirtyBit,
}

/// What one write makes dirty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Granularity {
    /// A page of 4 KiB: larger leaves are split before they are written through.
    Page,
    /// The leaf that maps it, whatever its size: nothing is split.
    Leaf,
}

/// What a log begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogStart {
    /// Nothing is dirty. What is mapped is walked and armed, in steps that yield.
    Clean,
    /// Everything is dirty (KVM_DIRTY_LOG_INITIALLY_SET). Nothing is walked: pages are armed as their bits are taken.
    AllDirty,
}

/// When leaves larger than the granularity are split.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// By the first write.
    OnDemand,
    /// When their pages are armed, so that no write has to.
    Eager,
}

/// How a slot's writes are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogConfig {
    /// How writes are noticed.
    pub tracking: Tracking,
    /// What one write makes dirty.
    pub granularity: Granularity,
    /// What is dirty at first.
    pub start: LogStart,
    /// When huge leaves are split, if they are.
    pub split: Split,
}

impl Default for LogConfig {
    /// By write protection, page by page, with all pages dirty at first and huge leaves split when they are armed.
    fn default() -> Self {
        Self {
            tracking: Tracking::WriteProtect,
            granularity: Granularity::Page,
            start: LogStart::AllDirty,
            split: Split::Eager,
        }
    }
}

/// Why an operation on a slot's log was refused. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogError {
    /// The slot's update was refused: there is no such slot, or no memory for the log.
    Slot(SlotError),
    /// The slot has a log already.
    Running,
    /// The slot has no log.
    NotRunning,
    /// Words past the end of the slot's bitmap were asked for.
    PastTheEnd,
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(error) => error.fmt(f),
            Self::Running => f.write_str("the slot's writes are logged already"),
            Self::NotRunning => f.write_str("the slot's writes are not logged"),
            Self::PastTheEnd => f.write_str("the slot's dirty bitmap ends before the words that were asked for"),
        }
    }
}

impl core::error::Error for LogError {}

impl From<SlotError> for LogError {
    fn from(error: SlotError) -> Self {
        Self::Slot(error)
    }
}

impl From<OutOfMemory> for LogError {
    fn from(error: OutOfMemory) -> Self {
        Self::Slot(error.into())
    }
}

/// The log of one slot. Pages are counted from the slot's first.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    config: LogConfig,
    bitmap: Bitmap,
}

impl DirtyLog {
    pub(crate) fn new(pages: u64, config: LogConfig) -> Result<Arc<Self>, OutOfMemory> {
        Ok(Arc::new(Self { config, bitmap: Bitmap::new(pages, config.start == LogStart::AllDirty)? }))
    }

    #[inline]
    pub(crate) fn config(&self) -> &LogConfig {
        &self.config
    }

    /// The page was written.
    #[inline]
    pub(crate) fn note(&self, page: u64) {
        self.bitmap.note((page / WORD) as usize, 1 << (page % WORD));
    }

    /// The page was written; whether that is news.
    #[inline]
    pub(crate) fn mark(&self, page: u64) -> bool {
        self.bitmap.set((page / WORD) as usize, 1 << (page % WORD)) != 0
    }

    /// The pages of `range`, in a slot that begins at `first`, were written; what lies outside the slot is cut off.
    pub(crate) fn mark_range(&self, first: Gfn, range: GfnRange) {
        self.bitmap.set_range(range.start.0.saturating_sub(first.0), range.end.0.saturating_sub(first.0));
    }

    /// Of 64 pages: those of `mask` were written.
    pub(crate) fn mark_word(&self, word: usize, mask: u64) {
        self.bitmap.note(word, mask);
    }

    pub(crate) fn get_word(&self, word: usize) -> u64 {
        self.bitmap.get(word)
    }

    /// Takes as many words as `out` has, from `first` on. How many pages were dirty.
    pub(crate) fn take_words(&self, first: usize, out: &mut [u64]) -> u64 {
        self.bitmap.take_words(first, out)
    }

    pub(crate) fn take_word(&self, word: usize, mask: u64) -> u64 {
        self.bitmap.take(word, mask)
    }

    /// Whether words `first` to `first + count` are all there.
    pub(crate) fn has_words(&self, first: usize, count: usize) -> bool {
        first.checked_add(count).is_some_and(|end| end <= self.bitmap.words())
    }
}
