//! Benchmarks of `nestling` against its peers and against a bare lock-free walk.
//!
//! Rooms, from the bottom up: [`arena`] is the memory that every contender's tables come from; [`floor`] is the bare
//! walk; [`contenders`] gives all of them one face; [`plan`] says which page is touched when, by whom; [`clock`]
//! measures one repetition in wall time; [`instructions`] counts instructions under valgrind; [`dirty`] counts
//! those of dirty logging, splitting, collapsing and aging; [`zap_all`] is what a zap of everything costs the one who does
//! it, and the one beside it; [`figures`] turns samples into the lines that scripts read; [`report`] is the whole run;
//! [`shadow`] is faults in shadow tables, which have no peers.
//!
//! `cargo bench -p nestling-bench` runs all of it (`benches/mmu.rs`); the crate's README says how to read the output.

#![deny(unsafe_code)]

pub mod arena;
pub mod clock;
pub mod contenders;
pub mod dirty;
pub mod figures;
pub mod floor;
pub mod instructions;
mod pipeline;
pub mod plan;
pub mod report;
pub mod shadow;
mod valgrind;
pub mod zap_all;
