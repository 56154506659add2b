//! From the loader's hand-over to a machine whose CPUs all run our code.
//!
//! Order, and why: the control channel first (so that everything after can be told), then frames and the heap, the rest
//! of the identity map, this CPU's tables (so that a fault can be told too), clocks, and at last the other CPUs. From
//! then on CPU 0 keeps house and the others wait for a vCPU.
//!
//! A loader is a file of its own: [`pvh`], by which QEMU starts us for the command, and [`multiboot2`], by which GRUB does.
//! Both fill the same [`Handover`]; which of them it is decides one thing more, namely who listens (see [`crate::control`]).

pub mod acpi;
pub mod ap;
pub mod multiboot2;
pub mod pvh;
mod start;

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

pub use start::{Image, start};

/// What a loader told us, in no loader's format.
#[derive(Debug, Default)]
pub struct Handover {
    /// Usable RAM as the firmware reports it, unsorted.
    pub ram: RangeList,
    /// What of it holds something that is still to be read: the module, and the loader's information if it may lie anywhere.
    pub kept: RangeList,
    /// The first module: the bundle of guest and settings.
    pub module: Option<Range<u64>>,
    /// Where the ACPI root pointer is.
    pub rsdp: Option<u64>,
    /// The words for the hypervisor itself, without the zero that ends them.
    pub command_line: Option<Range<u64>>,
}

impl Handover {
    /// A page below 640 KiB for the start code of the other CPUs: RAM that holds nothing. Not the first, which has the real
    /// mode's interrupt table and the firmware's data.
    #[must_use]
    pub fn start_page(&self) -> Option<u64> {
        const PAGE: u64 = 4096;
        const CONVENTIONAL: u64 = 640 << 10;
        let mut free = self.ram.clone();
        self.kept.as_slice().iter().for_each(|range| free.exclude(range.clone()));
        free.exclude(0..PAGE);
        free.exclude(CONVENTIONAL..u64::MAX);
        let whole = |range: &Range<u64>| {
            let start = range.start.next_multiple_of(PAGE);
            (start + PAGE <= range.end).then_some(start)
        };
        free.as_slice().iter().filter_map(whole).min()
    }
}

/// Who started us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loader {
    /// By PVH: QEMU for the command, as a rule.
    Pvh,
    /// By Multiboot2: GRUB or its like, on a machine of its own.
    Multiboot2,
}

/// Why a loader's hand-over was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HandoverError {
    /// The entry for Multiboot2 was reached with another magic number.
    UnknownLoader(u32),
    /// PVH.
    Pvh(pvh::PvhError),
    /// Multiboot2.
    Multiboot2(multiboot2::Multiboot2Error),
}

impl fmt::Display for HandoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownLoader(magic) => write!(f, "started by an unknown loader, which leaves {magic:#x} in eax"),
            Self::Pvh(cause) => write!(f, "not started by a PVH loader: {cause:?}"),
            Self::Multiboot2(cause) => cause.fmt(f),
        }
    }
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
    fn the_start_page_is_ram_that_holds_nothing() {
        let mut handover = Handover::default();
        handover.ram.push(0x100..0x9_fc00);
        assert_eq!(handover.start_page(), Some(0x1000));
        handover.kept.push(0x1800..0x5001);
        handover.ram.exclude(0x7000..0x9_e800);
        assert_eq!(handover.start_page(), Some(0x6000));
        handover.kept.push(0x6fff..0x7000);
        assert_eq!(handover.start_page(), None, "the last page is not whole");
        handover.ram.push(0x9_f000..0x20_0000);
        assert_eq!(handover.start_page(), Some(0x9_f000));
    }

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
