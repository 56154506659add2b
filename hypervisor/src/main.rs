//! The freestanding binary: entry points in assembly, what the compiler expects of a runtime, the heap. All else is in
//! the library part of this crate, where it can be tested on the host.
#![no_std]
#![no_main]

#[cfg(not(panic = "abort"))]
compile_error!("there is no unwinder here: build this binary with `--profile bare-metal`");

extern crate alloc;

mod bare;
