//! A small bare-metal hypervisor for AMD SVM whose guest memory is managed by [`nestling`](https://docs.rs/nestling).
//!
//! The crate is a library and a freestanding binary. The library builds and is tested on the host: whatever can be plain
//! code is, and what touches the machine is in small modules. The binary adds entry points and runtime, and is built
//! only with the `bare-metal` feature.
//!
//! The rooms: [`boot`] (from the loader to running CPUs), [`cpu`] (tables, interrupts, clocks), [`memory`] (frames, the
//! map, what `nestling` asks of its embedder), [`svm`] (entering and leaving guests), [`vm`] (a VM, its vCPUs, their exit
//! loop), [`guest`] (loading guests), [`devices`], [`emulate`] (instructions on device memory), [`ghost`] (what checks the rest), [`seams`] (what counts the rest), and [`control`] (the way to the command).
#![no_std]
#![cfg(target_arch = "x86_64")]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod boot;
pub mod control;
pub mod cpu;
pub mod devices;
pub mod emulate;
pub mod ghost;
pub mod guest;
pub mod memory;
pub mod seams;
pub mod svm;
pub mod vm;
