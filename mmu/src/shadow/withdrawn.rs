//! What the shadow tables have given and give no more: counted, so that a vCPU whose guest asks to forget its translations
//! can tell that there is nothing to forget.
//!
//! # Protocol
//! A TLB is filled from entries, so it may hold what an entry gave at any time since it was flushed. It holds nothing but
//! what the guest's tables say if (1) the entries give nothing else, which bringing them in step sees to, and (2) nothing
//! that an entry gave has been *withdrawn* from it since that flush: no entry was removed, and none has lost a right or
//! become another page. Rights that are added need no look: who has fewer faults.
//!
//! There are two kinds of withdrawals:
//! - *Because the guest's entry says something else*: under the lock of the page, which the guest's write has put on the
//!   list of pages out of step. It is counted **after the change and under that lock** ([`Withdrawals::note`]). Whoever is
//!   to bring the page in step takes the same lock later and finds the count; whoever need not, because others have, finds
//!   it by what told him so (the list, or the number up to which his root has looked), which they wrote later still.
//! - *For the host's reasons*: memory that goes, pages that are zapped, rights that are taken because writes are logged or
//!   tracked, or because a table is to be in step. No lock that bringing in step takes orders these: its look may find the
//!   entry gone already, conclude nothing, and be done before the flush that this owes. So they are *under way* **from
//!   before the first change until after the flush** that is owed for it ([`Withdrawals::begin`], [`Withdrawals::end`]).
//!   From then on the TLB generation tells of them ([`crate::tlb`]). Who finds any under way concludes nothing, and flushes.
//!
//! Removed *links*, and whatever is above level 1, are counted once more by themselves: who forgets one address must forget
//! more than that if there were any ([`super::tags`]).
//!
//! The count is of the whole VM. A finer one would rarely spare a flush: what is out of step is protected before it is
//! compared, and that flushes everybody.

use super::hold::Debts;
use crate::sync::{AtomicU64, Ordering, Padded};

/// What has been withdrawn.
#[derive(Debug)]
pub(crate) struct Withdrawals(Padded<Counts>);

#[derive(Debug)]
struct Counts {
    all: AtomicU64,
    links: AtomicU64,
    under_way: AtomicU64,
}

/// An entry of a page of this level has given up what it gave: to be counted, under the page's lock still, or to be under way.
#[must_use = "who has it in a TLB is not told otherwise"]
#[derive(Debug)]
pub(super) struct Taken(u8);

impl Taken {
    pub(super) const fn of(level: u8) -> Self {
        Self(level)
    }

    /// The guest's entry gives it no more.
    pub(super) fn count(self, withdrawals: &Withdrawals) {
        withdrawals.note(self.0);
    }

    /// It went for the host's reasons, and `debts` has said so before.
    pub(super) fn owed_by(self, debts: &Debts) {
        debug_assert!(debts.withdraws(), "what is under way is begun before the first change");
    }
}

/// What had been withdrawn at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Withdrawn {
    all: u64,
    links: u64,
    under_way: bool,
}

impl Withdrawals {
    pub(super) fn new() -> Self {
        let count = || AtomicU64::new(0);
        Self(Padded(Counts { all: count(), links: count(), under_way: count() }))
    }

    /// An entry of a page of `level` gives less than it gave, because the guest's does. After that, under the page's lock.
    pub(super) fn note(&self, level: u8) {
        if level > 1 {
            self.0.links.fetch_add(1, Ordering::AcqRel);
        }
        self.0.all.fetch_add(1, Ordering::AcqRel);
    }

    /// Entries are about to give less than they give, for the host's reasons.
    pub(crate) fn begin(&self) {
        self.0.under_way.fetch_add(1, Ordering::AcqRel);
    }

    /// The flush for that is over.
    pub(crate) fn end(&self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }

    /// Now. To be read when entries have been compared, and before the flush that depends on it.
    #[inline]
    pub(super) fn now(&self) -> Withdrawn {
        let now = |count: &AtomicU64| count.load(Ordering::Acquire);
        let Counts { all, links, under_way } = &*self.0;
        Withdrawn { all: now(all), links: now(links), under_way: now(under_way) != 0 }
    }
}

impl Withdrawn {
    /// Whether anything was withdrawn since `then`, or may be at the moment.
    #[inline]
    pub(super) fn is_more_than(self, then: Self) -> bool {
        self.all != then.all || self.under_way
    }

    /// The same of links alone.
    pub(super) fn has_more_links_than(self, then: Self) -> bool {
        self.links != then.links || self.under_way
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_counts_until_its_flush_and_not_after() {
        let withdrawals = Withdrawals::new();
        let before = withdrawals.now();
        assert!(!before.is_more_than(before) && !before.has_more_links_than(before));
        withdrawals.begin();
        withdrawals.begin();
        let during = withdrawals.now();
        withdrawals.end();
        assert!(during.is_more_than(during) && withdrawals.now().has_more_links_than(during), "one is");
        withdrawals.end();
        assert!(!withdrawals.now().is_more_than(before), "the generation tells of it");
    }

    #[test]
    fn links_are_told_from_leaves() {
        let withdrawals = Withdrawals::new();
        let before = withdrawals.now();
        withdrawals.note(1);
        assert!(withdrawals.now().is_more_than(before) && !withdrawals.now().has_more_links_than(before));
        let before = withdrawals.now();
        withdrawals.note(2);
        assert!(withdrawals.now().is_more_than(before) && withdrawals.now().has_more_links_than(before));
    }
}
