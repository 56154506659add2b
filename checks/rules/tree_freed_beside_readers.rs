//! All tables are freed at once, without flush and grace period, when the MMU is nobody's but the caller's.

use crate::addr::{Hfn, Level};
use crate::table::free_tree;
use crate::{Host, Mmu};

pub(crate) fn right<H: Host>(mmu: &mut Mmu<H>, frame: Hfn) {
    free_tree(mmu, frame, Level::L4);
}

#[cfg(wrong)]
pub(crate) fn wrong<H: Host>(mmu: &alloc::sync::Arc<Mmu<H>>, frame: Hfn) {
    free_tree(mmu, frame, Level::L4);
}
