//! The `nestling` command as a library, so that tests start guests exactly as the command does.
//!
//! A run has three parts, each of which can fail with its own message before the next begins:
//!
//! 1. [`args`] and [`plan`]: what was asked for, checked against everything that can be known without starting anything;
//! 2. [`setup`], [`guest`], [`artifacts`]: what is needed and not there is installed, fetched and built, and put into one
//!    bundle;
//! 3. [`qemu`] and [`session`]: the machine is started and watched to its end, which becomes an [`outcome::Outcome`].
//!
//! A guest that runs can be copied, and a copy be run instead of a kernel: [`copy`].
//!
//! The hypervisor is never trusted to end well: a run has an end because this side has a time limit, owns the machine's
//! process, and counts a channel that closes early as a failure.
#![forbid(unsafe_code)]

pub mod accel;
pub mod args;
pub mod artifacts;
pub mod bench;
pub mod conformance;
pub mod console;
pub mod copy;
pub mod doctor;
pub mod error;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod outcome;
pub mod plan;
pub mod progress;
pub mod qemu;
pub mod report;
pub mod run;
pub mod session;
pub mod setup;
pub mod terminal;
