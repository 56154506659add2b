//! Copies of a running guest: snapshots in files, and guests on their way to another machine.
//!
//! The hypervisor sends raw pages and the state of the machine through a [`window`] of shared memory, because it runs under
//! an emulator where every instruction counts ten. What can be done on this side is done here: pages of zeros and pages
//! that were sent before are found, the rest is compressed ([`pages`]), and everything is written as checked records
//! ([`stream`]), to a file or to a socket. On the way back the same records become messages through the window of
//! another machine.
//!
//! - [`source`] takes one copy from a running machine;
//! - [`sink`] brings one into a machine that waits for it;
//! - [`migrate`] is what two commands say to each other around that, over a [`link`], until exactly one of the two machines
//!   runs the guest;
//! - [`door`] is where a running command hears what it is asked for, and [`knock`] the other side of it.

pub mod door;
pub mod knock;
pub mod link;
pub mod migrate;
pub mod pages;
pub mod sink;
pub mod source;
pub mod stream;
pub mod window;
