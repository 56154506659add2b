//! A shadow page is made of answers that were found to be true inside the same hold: nothing else gives the proof.

use crate::shadow::hold::{Debts, Fresh};
use crate::shadow::table::Inside;
use crate::Host;

pub(crate) fn right<'d, H: Host>(inside: Inside<'_, H>, debts: &'d Debts) -> Option<Fresh<'d>> {
    Fresh::check(debts, inside, None, core::iter::empty())
}

#[cfg(wrong)]
pub(crate) fn wrong<'d>() -> Option<Fresh<'d>> {
    Some(Fresh(core::marker::PhantomData))
}
