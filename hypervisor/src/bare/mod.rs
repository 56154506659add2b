//! What only the freestanding image has: entry points, the memory functions that the compiler calls, the global
//! allocator and the panic handler.

mod entry;
mod heap;
mod runtime;
