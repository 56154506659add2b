//! Splitting: a huge leaf becomes a table of leaves of the level below.
//!
//! # Protocol
//! Inside the shared side. The table is filled while nothing leads to it, from the value that the walker saw, and takes
//! the leaf's place by compare-and-swap; whoever loses goes on from what is there. Every leaf of it maps the frame that
//! the huge leaf mapped there, with the same rights, cache type, software bits, accessed and dirty bits: the dirty bit of
//! the whole stands for each part, because which part was written nobody knows.
//!
//! Nothing is flushed. A TLB may keep the huge translation and use it beside the small ones: both say the same. What is
//! taken from a small leaf later is flushed then, and a flush forgets all sizes. A CPU that has the huge translation
//! without the dirty bit walks again at its first write and sets the bit of the small leaf that it finds.

use crate::addr::{ENTRIES, Hfn, Level};
use crate::entry::{Books, Entry, change, prepare};
use crate::format::{Format, Leaf, State};
use crate::host::Host;
use crate::lock::Shared;
use crate::mutants::{self, Mutant};
use crate::table::Table;

/// The leaves that a mapping of `level` falls apart into; `None` if `raw` is no mapping, or of the lowest level.
fn part<F: Format>(raw: u64, level: Level) -> Option<(Level, impl Fn(u64) -> u64)> {
    let below = level.down()?;
    let (leaf, tracked) = match F::decode(raw, level) {
        State::Leaf(leaf) => (leaf, false),
        State::AccessTracked(leaf) => (leaf, true),
        _ => return None,
    };
    let lost = if mutants::is(Mutant::SoftwareBitsLost) { F::MMU_WRITABLE } else { 0 };
    Some((below, move |index| {
        let leaf = Leaf { hfn: Hfn(leaf.hfn.0 + index * below.pages()), ..leaf };
        (if tracked { F::access_tracked(below, leaf) } else { F::leaf(below, leaf) }) & !lost
    }))
}

/// Whether the part `leaf` says of its frame what the mapping `raw` of `level` says of it.
fn says_the_same<F: Format>(raw: u64, level: Level, index: u64, leaf: u64) -> bool {
    let Some(below) = level.down() else { return false };
    match (F::decode(raw, level), F::decode(leaf, below)) {
        (State::Leaf(whole), State::Leaf(part)) | (State::AccessTracked(whole), State::AccessTracked(part)) => {
            part == Leaf { hfn: Hfn(whole.hfn.0 + index * below.pages()), ..whole }
        }
        _ => false,
    }
}

/// Splits the mapping `raw` in `cell` of `table` with the empty table `frame`. The table, or what the cell holds now; the
/// frame is still the caller's then.
pub(crate) fn split<'g, H: Host>(
    inside: &Shared<'_, H>,
    table: &Table<'g, H>,
    cell: &Entry,
    raw: u64,
    frame: Hfn,
) -> Result<Table<'g, H>, u64> {
    let Some((below, leaf)) = part::<H::Format>(raw, table.level) else { return Err(raw) };
    let new = H::Format::table(frame);
    let Some(parts) = table.next(new) else { return Err(raw) };
    debug_assert_eq!(parts.level, below);
    for (index, part) in (0..ENTRIES as u64).zip(parts.entries()) {
        let leaf = leaf(index);
        debug_assert!(says_the_same::<H::Format>(raw, table.level, index, leaf), "{raw:#x}, part {index}: {leaf:#x}");
        prepare(part, leaf);
    }
    match change::<H::Format>(cell, table.level, raw, new, Books::LeafSplit, inside.counters()) {
        Ok(()) => Ok(parts),
        Err(now) => {
            // Frames go back, or are used again, as they came: empty.
            parts.entries().iter().for_each(|part| prepare(part, H::Format::ABSENT));
            Err(now)
        }
    }
}
