//! The hypervisor's memory: frames, the identity map, and what `nestling` asks of its embedder.
//!
//! All RAM is mapped where it is (virtual = physical), so a frame's address is a pointer. Three owners share it: the
//! heap (grows, never gives back), page tables and guest RAM (each frame counted, all of them back when a VM ends).

pub mod embedder;
pub mod frames;
pub mod guest;
pub mod kept;
pub mod map;
mod pins;
pub mod relocate;
pub mod usage;
