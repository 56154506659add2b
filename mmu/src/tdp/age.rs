//! Aging: which mapped pages were used lately (F29).
//!
//! # Protocol
//! A sweep of the shared side over the valid roots: beside faults and zaps, without the exclusive lock, in steps that
//! yield. Where the CPU sets accessed bits, a leaf is young when its bit is set, and is made old by clearing it. Where it
//! does not, a leaf is young, and is made old by taking all its rights (access-tracked); the fault of its next use makes it
//! young again. W goes with them, and MMU_WRITABLE stays to say that a TLB may still have it.
//!
//! Nothing is flushed, as in KVM: a translation that stays in a TLB makes a page that is in use look old until the TLB
//! forgets it, which costs the one who asked a wrong guess, and a flush would cost every vCPU. An accessed bit may be lost
//! to any other change of the entry as well. The dirty bit is kept: an access-tracked entry has it as it was.

use crate::addr::{Gfn, GfnRange, Level};
use crate::entry::{Entry, age, track};
use crate::format::{Format, Rights};
use crate::host::Host;
use crate::lock::Shared;
use crate::root::{AdBits, RootRef};
use crate::table::Table;
use crate::tdp::sweep::{Visited, Visitor};

/// How many pages of a range are in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Age {
    /// Pages of 4 KiB that are mapped, each root counted by itself.
    pub mapped: u64,
    /// Of these, the ones in leaves that were used since they were last made old. Between two times of making everything
    /// old, this is the working set of that interval.
    pub young: u64,
}

/// Whether what is young is made old.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Clear {
    /// It is.
    Yes,
    /// It is looked at.
    No,
}

/// Looks at ages.
pub(crate) struct Ages {
    clear: Clear,
    by_accessed_bit: bool,
    pub(crate) age: Age,
}

impl Ages {
    pub(crate) fn new(clear: Clear) -> Self {
        Self { clear, by_accessed_bit: true, age: Age::default() }
    }

    /// Looks at `cell`, which holds `raw`, a mapping of so many pages of what is asked about.
    #[inline]
    fn look<F: Format>(&mut self, cell: &Entry, level: Level, raw: u64, pages: u64) {
        self.age.mapped += pages;
        let young = match self.by_accessed_bit {
            true => raw & F::ACCESSED != 0,
            false => F::permits(raw, level, Rights::READ),
        };
        if !young {
            return;
        }
        self.age.young += pages;
        if self.clear == Clear::Yes {
            // Once: who loses against another change of the entry leaves it young, which it was a moment ago.
            if self.by_accessed_bit {
                let _ = age::<F>(cell, level, raw);
            } else {
                let _ = track::<F>(cell, level, raw);
            }
        }
    }
}

impl<H: Host> Visitor<H> for Ages {
    fn enters(&mut self, root: &RootRef) -> bool {
        self.by_accessed_bit = root.role().ad_bits() == AdBits::On;
        true
    }

    fn leaves(&mut self, _inside: &Shared<'_, H>, table: &Table<'_, H>, range: GfnRange) {
        let start = Level::K4.index(range.start);
        for cell in &table.entries()[start..start + range.pages() as usize] {
            let raw = cell.read();
            if H::Format::is_mapping(raw, Level::K4) {
                self.look::<H::Format>(cell, Level::K4, raw, 1);
            }
        }
    }

    fn huge(&mut self, _inside: &Shared<'_, H>, table: &Table<'_, H>, gfn: Gfn, raw: u64) -> Visited {
        self.look::<H::Format>(table.entry(gfn), table.level, raw, table.level.pages());
        Visited::Done
    }
}
