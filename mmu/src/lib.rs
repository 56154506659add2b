//! The guest-memory MMU of a hypervisor.
//!
//! An embedder implements the traits of [`host`], makes an [`Mmu`] a VM, a [`Vcpu`] a vCPU and a [`Worker`] for
//! each thread that manages memory. It adds memslots, hands in second-stage faults, and says when memory goes away;
//! the library keeps page tables, roots and TLBs consistent while all of that happens at once.
//!
//! Rooms, from the bottom up: [`addr`] and [`format`] know numbers and bits; `entry` is the one place where an entry
//! changes; `lock`, `tlb` and `reclaim` are the protocol of who may look, who must forget, and when a table is freed;
//! [`slots`], `root` and `notify` say what may be mapped; [`guest`] reads the guest's own tables, [`shadow`] makes tables of those; `tdp` maps and unmaps it; [`vcpu`] and [`worker`] are what
//! an embedder calls.
//!
//! `examples/hosted.rs` is a whole embedder.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "loom", feature = "shuttle"))]
extern crate std;

pub mod addr;
mod entry;
pub mod events;
pub mod format;
pub mod guest;
pub mod host;
mod leaf_lock;
mod lock;
mod mmu;
#[doc(hidden)]
pub mod mutants;
mod notify;
mod once;
mod rcu;
mod reclaim;
mod root;
pub mod shadow;
pub mod slots;
pub mod sync;
mod table;
mod tdp;
mod tlb;
pub mod vcpu;
pub mod watch;
pub mod worker;

pub use addr::{Gfn, GfnRange, Gpa, Hfn, Hpa, Level};
pub use events::Counters;
pub use format::State;
pub use host::{Access, Host, VcpuId};
pub use mmu::{Config, ConfigError, Mmu, OutOfMemory, SlotZap};
pub use root::{AdBits, Role};
pub use slots::dirty::{DirtyPages, DirtyRing, Granularity, LogConfig, LogError, LogStart, Split, Tracking};
pub use slots::{AddressSpace, Slot, SlotConfig, SlotError, SlotFlags, SlotId};
pub use tdp::age::Age;
pub use tdp::collapse::Collapsed;
pub use tdp::inspect::{Walk, WalkStep};
pub use tdp::zap::Zapped;
pub use tlb::{Flush, Request, Wait};
pub use vcpu::{Cause, Fault, FaultError, InGuest, Outcome, Vcpu};
pub use worker::{Invalidation, Worker, WouldBlock};
