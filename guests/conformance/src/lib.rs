//! Cases of paging: what a guest tries on the CPU that it has, what it finds there, and what the manuals say.
//!
//! # Protocol
//! A [`Case`] is one linear address, the entries that lead to it, and two accesses ([`Shot`]) with a change of one entry
//! between them. It is made from a number, by [`sample`] (everything at random) or by [`every`] (all combinations of one
//! entry, the leaf, the controls and the access, in order), the same one for the same number on the same [`Cpu`]. So a guest and
//! whoever reads its report speak of a case by its number and say no more of it.
//!
//! The guest tries a case on whatever it runs on and notes an [`Outcome`]. It judges nothing. Outcomes of [`BLOCK`] cases go
//! into a [`Digest`], which is one line of its report; on demand it prints each outcome as well. Two reports of the same
//! cases are the same, or the CPU of one of them walks tables otherwise than that of the other. The oracle is the CPU
//! without a hypervisor; [`model::expect`] is a second opinion, which says which of two is wrong.
//!
//! Only what the architecture defines is tried: an entry that a CPU may have cached is changed only together with what
//! drops it, and an entry that is not present needs nothing (APM vol. 2, 5.5.2; SDM vol. 3, 4.10.4.3). What the emulated CPU
//! does otherwise than the manuals say is left out where it is named: [`Outcome::without_flaws`] and [`Case::sound`].
//!
//! # Memory
//! [`TARGET`] is the physical page that a case's address leads to. With [`Entry::OTHER`] its leaf leads to the page or
//! large page beside it. Each of these pages holds the same three things with marks of its own: a descriptor table, a
//! word of data, and code.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod every;
pub mod model;
mod outcome;
mod sample;
mod space;
mod words;

pub use every::{count, every};
pub use outcome::{Digest, Line, Outcome, Seen};
pub use sample::sample;
pub use space::{
    Access, Case, Change, Controls, Cpu, Entry, Features, Flush, Kind, LEVELS, Paging, Shot, frame_mark, written,
};

/// Cases that go into one digest.
pub const BLOCK: u64 = 256;
/// Sets of tables that cases take turns with.
pub const TABLE_SETS: u8 = 4;

/// The page that a case's address leads to.
pub const TARGET: u64 = 0x02a3_4000;
/// What a leaf with [`Entry::OTHER`] leads to, by the bit of the address that differs: a page of 4 KiB, 2 MiB, 4 MiB on.
pub const FRAMES: [u64; 4] = [TARGET, TARGET ^ 1 << 12, TARGET ^ 1 << 21, TARGET ^ 1 << 22];
/// Offset in a page of the descriptor that says it has been used.
pub const USED_DESCRIPTOR: u64 = 8;
/// Of the one that does not, and that the CPU marks.
pub const FRESH_DESCRIPTOR: u64 = 16;
/// Of the word that is read and written.
pub const DATA: u64 = 24;
/// Of the code that is called.
pub const CODE: u64 = 0x200;

/// The protection key of entries with [`Entry::KEY`]; others have key 0.
pub const KEY: u32 = 5;
/// The vector by which an access that did not fault ends.
pub const NO_FAULT: u8 = 0x40;
/// What EAX is before an access.
pub const UNTOUCHED: u32 = 0x1111_1111;

/// How each line of a report begins.
pub const PREFIX: &str = "conformance:";
