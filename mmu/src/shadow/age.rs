//! Aging in shadow mode: which mapped pages were used lately (F29), through reverse maps.
//!
//! # Protocol
//! One hold of the shared side a block of 2 MiB, under its bucket's lock: no leaf of these frames comes or goes meanwhile,
//! and nothing is looked at of frames that are not mapped. A leaf is young when its accessed bit is set, and is made old by
//! clearing it, once: who loses against a mark of the CPU's leaves it young, which it was a moment ago. Nothing is flushed,
//! as with nested paging (`tdp::age` says why). The guest's own accessed bits are the guest's.

use super::Shadow;
use super::hold::hold;
use super::zap::{ShadowDebts, blocks};
use crate::Mmu;
use crate::addr::GfnRange;
use crate::host::Host;
use crate::lock::Ticket;
use crate::tdp::age::{Age, Clear};

/// Adds the ages of `range` to `age`, each leaf counted by itself, and makes them old if `clear` says so.
pub(crate) fn look<H: Host>(
    mmu: &Mmu<H>,
    shadow: &Shadow,
    ticket: &mut Ticket,
    debts: &mut ShadowDebts,
    range: GfnRange,
    clear: Clear,
    age: &mut Age,
) {
    for (number, part) in blocks(shadow, range) {
        hold(mmu, shadow, ticket, debts.debts(), |inside, order, _| {
            order.numbered(inside, number).look_at_age(inside, part, clear, age);
        });
    }
}
