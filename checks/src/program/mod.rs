//! Programs that make the machine do things.
//!
//! [`single`] runs a list of operations in one thread, each checked against the ghost before the next; [`storm`] lets
//! vCPU threads and worker threads collide in a few megabytes.

pub mod single;
pub mod storm;
