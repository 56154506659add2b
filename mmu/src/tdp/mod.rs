//! Two-dimensional paging: the tables that translate guest-physical to host-physical addresses.
//!
//! `fault` fills entries, `zap` empties them; both walk from a root through [`crate::table`] and change entries
//! through [`crate::entry`] only, so that any number of vCPUs may fault while ranges are zapped; `inspect` only looks.
//! `sweep` goes through what is mapped for those that change it and
//! leave it: `protect` arms pages for the dirty log, `split` makes small leaves of a
//! huge one, `collapse` the reverse, `age` sees what is in use.

pub(crate) mod age;
pub(crate) mod collapse;
pub(crate) mod fault;
pub(crate) mod inspect;
pub(crate) mod protect;
pub(crate) mod split;
pub(crate) mod sweep;
pub(crate) mod zap;
