//! What tries to break shadow paging.
//!
//! A [`machine`] with guest memory that the guest's own page tables are in; [`cpu`]s that walk the shadow tables, with a
//! TLB by linear address and a paging-structure cache that keep everything until they are told to flush; an [`oracle`]
//! that knows each value that each entry of the guest's tables ever had, and says of a translation whether a CPU could
//! have it: made of values read one after the other, from the top down, none of them older than the guest's last flush;
//! and [`program`]s, guests that edit the tables they run on, at random, while the host takes memory away.

pub mod cpu;
pub mod machine;
pub mod oracle;
pub mod program;
pub mod small;
