//! The proof of a flush speaks for what was removed before it. It is lent, and not copied for later.

use crate::tlb::Flushed;

pub(crate) fn right(flushed: &Flushed) -> &Flushed {
    flushed
}

#[cfg(wrong)]
pub(crate) fn wrong(flushed: &Flushed) -> Flushed {
    *flushed
}
