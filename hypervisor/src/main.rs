//! The freestanding binary: entry points in assembly, what the compiler expects of a runtime, the heap. All else is in
//! the library part of this crate, where it can be tested on the host.
#![no_std]
#![no_main]

extern crate alloc;

mod bare;
