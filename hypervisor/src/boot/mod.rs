//! From the loader's hand-over to a machine whose CPUs all run our code.
//!
//! Order, and why: the control channel first (so that everything after can be told), then frames and the heap, the rest
//! of the identity map, this CPU's tables (so that a fault can be told too), clocks, and at last the other CPUs. From
//! then on CPU 0 keeps house and the others wait for a vCPU.
//!
//! A loader is a file of its own: [`pvh`] today; whatever comes beside it fills the same [`Handover`].

pub mod acpi;
pub mod ap;
pub mod pvh;
mod start;

use alloc::vec::Vec;
use core::ops::Range;

pub use start::{Image, start};

/// What a loader told us, in no loader's format.
#[derive(Debug, Default)]
pub struct Handover {
    /// Usable RAM as the firmware reports it, unsorted.
    pub ram: RangeList,
    /// The first module: the bundle of guest and settings.
    pub module: Option<Range<u64>>,
    /// Where the ACPI root pointer is.
    pub rsdp: Option<u64>,
}

/// A short list of address ranges that needs no heap.
#[derive(Clone, Debug)]
pub struct RangeList {
    ranges: [Range<u64>; Self::CAPACITY],
    len: usize,
}

impl Default for RangeList {
    fn default() -> Self {
        Self { ranges: [const { 0..0 }; Self::CAPACITY], len: 0 }
    }
}

impl RangeList {
    const CAPACITY: usize = 64;

    /// Adds a range; an empty one, or one too many, is left out.
    pub fn push(&mut self, range: Range<u64>) {
        if range.start < range.end && self.len < Self::CAPACITY {
            self.ranges[self.len] = range;
            self.len += 1;
        }
    }

    /// Cuts `hole` out of every range.
    pub fn exclude(&mut self, hole: Range<u64>) {
        if hole.is_empty() {
            return;
        }
        let old = core::mem::take(self);
        for range in old.as_slice() {
            self.push(range.start..range.end.min(hole.start));
            self.push(range.start.max(hole.end)..range.end);
        }
    }

    /// The ranges.
    #[must_use]
    pub fn as_slice(&self) -> &[Range<u64>] {
        &self.ranges[..self.len]
    }

    /// The ranges, on the heap.
    #[must_use]
    pub fn to_vec(&self) -> Vec<Range<u64>> {
        self.as_slice().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_splits_trims_or_swallows() {
        let mut list = RangeList::default();
        list.push(0..10);
        list.push(20..30);
        list.push(5..5);
        list.exclude(3..4);
        list.exclude(8..22);
        list.exclude(7..7);
        assert_eq!(list.as_slice(), [0..3, 4..8, 22..30]);
        list.exclude(0..100);
        assert!(list.as_slice().is_empty());
    }
}
