//! Two-dimensional paging: the tables that translate guest-physical to host-physical addresses.
//!
//! `fault` fills entries, `zap` empties them; both walk from a root through [`crate::table`] and change entries
//! through [`crate::entry`] only, so that any number of vCPUs may fault while ranges are zapped; `inspect` only looks.
//! Protection, splitting, collapsing and aging get their own files here.

pub(crate) mod fault;
pub(crate) mod inspect;
pub(crate) mod zap;
