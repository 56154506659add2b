//! The last step of a memslot update wants the proof that the slot's mappings are gone, and a proof is made by zapping.

use crate::addr::GfnRange;
use crate::lock::{Exclusive, Ticket};
use crate::reclaim::Batch;
use crate::root::{AllRoots, Spaces};
use crate::tdp::zap::{Gone, zap_range};
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(
    mmu: &Mmu<H>,
    ticket: &mut Ticket,
    batch: &mut Batch,
    range: GfnRange,
) -> Gone<AllRoots> {
    let mut all = Exclusive::enter(mmu, ticket).all_roots(Spaces::All);
    zap_range(mmu, ticket, batch, &mut all, range)
}

#[cfg(wrong)]
pub(crate) fn wrong(range: GfnRange) -> Gone<AllRoots> {
    Gone { range, zapped: Default::default(), roots: core::marker::PhantomData }
}
