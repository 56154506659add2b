//! Addresses, frame numbers and paging levels.
//!
//! Guest and host numbers are different types, and so are addresses and frame numbers: a [`Gfn`] never meets an
//! [`Hfn`] without a line of code that says so. All arithmetic here is on 4 KiB frames; nothing here knows a
//! page-table format.

use core::fmt;

/// log2 of the size of a base page (4 KiB).
pub const PAGE_SHIFT: u32 = 12;
/// Size of a base page in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of the number of entries of a table. Under a model checker tables are tiny: what is checked is who meets whom in
/// an entry, and every entry costs.
pub const INDEX_BITS: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) { 1 } else { 9 };
/// Entries of one table page.
pub const ENTRIES: usize = 1 << INDEX_BITS;
/// Frame numbers of a 52-bit physical address space end here (AMD64 APM vol 2, 5.3; Intel SDM vol 3, 4.1.4).
pub const MAX_FRAME: u64 = 1 << (52 - PAGE_SHIFT);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

number!(
    /// A guest-physical address, in bytes.
    Gpa
);
number!(
    /// A guest frame number: a guest-physical address divided by 4 KiB.
    Gfn
);
number!(
    /// A host-physical address, in bytes.
    Hpa
);
number!(
    /// A host frame number: a host-physical address divided by 4 KiB.
    Hfn
);

impl Gpa {
    /// The frame that holds this address.
    #[inline]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Gfn {
    /// The address of the frame's first byte.
    #[inline]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl Hpa {
    /// The frame that holds this address.
    #[inline]
    pub const fn hfn(self) -> Hfn {
        Hfn(self.0 >> PAGE_SHIFT)
    }
}

impl Hfn {
    /// The address of the frame's first byte.
    #[inline]
    pub const fn hpa(self) -> Hpa {
        Hpa(self.0 << PAGE_SHIFT)
    }
}

/// A paging level, counted from the leaf as the field does: 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB; 4 and 5 hold
/// tables only.
///
/// "An entry of level L" maps [`Level::pages`] frames, whether by a leaf or through a table of level L − 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Level(u8);

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.0)
    }
}

impl Level {
    /// 4 KiB.
    pub const K4: Self = Self(1);
    /// 2 MiB.
    pub const M2: Self = Self(2);
    /// 1 GiB.
    pub const G1: Self = Self(3);
    /// 512 GiB an entry: tables only.
    pub const L4: Self = Self(4);
    /// 256 TiB an entry: tables only.
    pub const L5: Self = Self(5);

    /// The level's number, 1 to 5.
    #[inline]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The level with this number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        if number >= 1 && number <= 5 { Some(Self(number)) } else { None }
    }

    /// Base pages that one entry of this level covers.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << (INDEX_BITS * (self.0 as u32 - 1))
    }

    /// Index of the entry for `gfn` in a table of this level.
    #[inline]
    pub const fn index(self, gfn: Gfn) -> usize {
        (gfn.0 >> (INDEX_BITS * (self.0 as u32 - 1))) as usize & (ENTRIES - 1)
    }

    /// First frame of the block of this level that holds `gfn`.
    #[inline]
    pub const fn align_down(self, gfn: Gfn) -> Gfn {
        Gfn(gfn.0 & !(self.pages() - 1))
    }

    /// First frame after the block of this level that holds `gfn`.
    #[inline]
    pub const fn next_block(self, gfn: Gfn) -> Gfn {
        Gfn((gfn.0 | (self.pages() - 1)) + 1)
    }

    /// The next level towards the leaf; `None` at 4 KiB.
    #[inline]
    pub const fn down(self) -> Option<Self> {
        if self.0 > 1 { Some(Self(self.0 - 1)) } else { None }
    }

    /// First frame number that a root table of this level can not translate.
    #[inline]
    pub const fn root_limit(self) -> Gfn {
        Gfn(1 << (INDEX_BITS * self.0 as u32))
    }
}

/// A half-open range of guest frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GfnRange {
    /// First frame.
    pub start: Gfn,
    /// First frame after the range.
    pub end: Gfn,
}

impl GfnRange {
    /// `pages` frames from `start`; `None` if the range would pass the last guest frame that 52 address bits allow.
    pub const fn new(start: Gfn, pages: u64) -> Option<Self> {
        match start.0.checked_add(pages) {
            Some(end) if end <= MAX_FRAME => Some(Self { start, end: Gfn(end) }),
            _ => None,
        }
    }

    /// The block of `level` that holds `gfn`.
    pub const fn block(level: Level, gfn: Gfn) -> Self {
        Self { start: level.align_down(gfn), end: level.next_block(gfn) }
    }

    /// Number of frames.
    #[inline]
    pub const fn pages(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether the range has no frame.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// Whether `gfn` lies in the range.
    #[inline]
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.0 <= gfn.0 && gfn.0 < self.end.0
    }

    /// Whether every frame of `other` lies in this range.
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }

    /// Whether the two ranges share a frame.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end.0 && other.start.0 < self.end.0
    }

    /// The smallest range that holds both.
    pub const fn union(self, other: Self) -> Self {
        let start = if self.start.0 < other.start.0 { self.start } else { other.start };
        let end = if self.end.0 > other.end.0 { self.end } else { other.end };
        Self { start, end }
    }
}

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
const _: () = {
    assert!(Level::K4.pages() == 1 && Level::M2.pages() == 512 && Level::G1.pages() == 512 * 512);
    assert!(Level::L4.index(Gfn(0x1ff << 27)) == 511 && Level::K4.index(Gfn(0x1ff)) == 511);
    assert!(Level::M2.align_down(Gfn(0x3ff)).0 == 0x200 && Level::M2.next_block(Gfn(0x200)).0 == 0x400);
    assert!(Level::L4.root_limit().0 == 1 << 36 && Level::L5.root_limit().0 == 1 << 45);
    assert!(GfnRange::new(Gfn(MAX_FRAME), 1).is_none() && GfnRange::new(Gfn(1), u64::MAX).is_none());
};
