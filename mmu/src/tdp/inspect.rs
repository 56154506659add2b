//! Looking without touching: what the tables say of a frame, for reports, checks and the MMIO path.
//!
//! Inside the shared side like a fault, but nothing is changed. What is seen is true of the moment at which each entry
//! was read; another thread may change it before the caller looks at the answer.

use crate::addr::{Gfn, Hpa, Level};
use crate::format::{Format, State};
use crate::host::Host;
use crate::lock::Shared;
use crate::root::RootRef;
use crate::sync::Ordering;
use crate::table::Table;

/// One entry read on a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalkStep {
    /// Level of the table that the entry is in.
    pub level: Level,
    /// Where the entry is.
    pub address: Hpa,
    /// What it holds.
    pub raw: u64,
    /// What that means.
    pub state: State,
}

/// The entries that translate one frame, root first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Walk {
    steps: [Option<WalkStep>; 5],
}

impl Walk {
    /// The entries in the order of the walk.
    pub fn steps(&self) -> impl Iterator<Item = &WalkStep> {
        self.steps.iter().flatten()
    }

    /// The entry that the walk ended at: anything but a table.
    pub fn last(&self) -> Option<&WalkStep> {
        self.steps().last()
    }
}

/// Walks to `gfn` under `root`.
pub(crate) fn walk<H: Host>(inside: &Shared<'_, H>, root: &RootRef, gfn: Gfn) -> Walk {
    let mut walk = Walk::default();
    let (mut table, mut frame) = (Table::root(inside, root), root.frame());
    for step in &mut walk.steps {
        let raw = table.entry(gfn).load(Ordering::Acquire);
        let address = Hpa(frame.hpa().0 + 8 * table.level.index(gfn) as u64);
        *step = Some(WalkStep { level: table.level, address, raw, state: H::Format::decode(raw, table.level) });
        match (table.next(raw), H::Format::next_table(raw, table.level)) {
            (Some(next), Some(below)) => (table, frame) = (next, below),
            _ => break,
        }
    }
    walk
}
