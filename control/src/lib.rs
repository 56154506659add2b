//! What the `nestling` command and the hypervisor say to each other.
//!
//! There are three ways from one to the other, and each has a module:
//!
//! - [`bundle`]: one file, from the command to the hypervisor, before it starts: the guest's kernel, initrd and
//!   configuration. QEMU loads it as the PVH module (`-initrd`).
//! - [`frame`] and [`message`]: a byte stream (the second serial port) that carries [`message::ToCommand`] while the
//!   guest runs and [`message::ToHypervisor`] the other way.
//! - [`window`]: shared memory, for the guest's memory and state when the guest is copied.
//!
//! And there is what both have to say to people: [`words`] and [`death`] tell a message, [`verdict`] judges a run. The
//! command does so; a hypervisor that was booted without a command does it itself, on the guest's console.
//!
//! Neither side trusts the other: the hypervisor's memory may have been damaged by the bug that is being looked for, and
//! a bundle may come from anywhere. Every parser here is bounds-checked, bounded in memory, and names what was wrong.
//!
//! The crate is `no_std` with `alloc`, and the same code runs on both sides: a field added here is added on both.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod config;
pub mod death;
pub mod frame;
pub mod message;
pub mod verdict;
pub mod window;
pub mod words;

/// The version of everything in this crate: it changes with every change of a message, of a frame or of the bundle.
///
/// Command and hypervisor are built from the same tree, so there is no negotiation: another version is an error.
pub const PROTOCOL_VERSION: u32 = 6;
