//! What a fault was told outside the lock is proved inside, and zapping a page ends the proof: the page may be the fault's
//! own root, or a table on its way (CVE-2026-64561).

use crate::Host;
use crate::shadow::hold::{Debts, Fresh};
use crate::shadow::order::Order;
use crate::shadow::page::Handle;
use crate::shadow::table::Inside;
use crate::shadow::zap::zap_page;

pub(crate) fn right<H: Host>(inside: Inside<'_, H>, order: &mut Order<'_>, debts: &mut Debts, root: Handle, old: Handle) {
    zap_page(inside, order, debts, old);
    let fresh = Fresh::check(debts, inside, Some(root), core::iter::empty());
    map(fresh);
}

fn map(_fresh: Option<Fresh<'_>>) {}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(inside: Inside<'_, H>, order: &mut Order<'_>, debts: &mut Debts, root: Handle, old: Handle) {
    let fresh = Fresh::check(debts, inside, Some(root), core::iter::empty());
    zap_page(inside, order, debts, old);
    map(fresh);
}
