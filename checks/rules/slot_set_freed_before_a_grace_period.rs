//! An old set of memslots is freed when every fault that may be reading it has left: the proof is made by waiting.

use crate::reclaim::{GracePeriod, synchronize};
use crate::rcu::Replaced;
use crate::slots::SlotSet;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &Mmu<H>, old: Replaced<SlotSet>) {
    old.after_grace_period(synchronize(mmu));
}

#[cfg(wrong)]
pub(crate) fn wrong(old: Replaced<SlotSet>) {
    old.after_grace_period(GracePeriod(()));
}
