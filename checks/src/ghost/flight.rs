//! What is under way: writes that vCPUs have begun, and removals of mappings. The [dirty set](super::dirty) needs both,
//! because a log may hear of a write for as long as the write lasts, and from whoever removes its entry for as long as
//! that lasts.

use std::collections::BTreeMap;

use nestling::{AddressSpace, Gfn, GfnRange, Level, VcpuId};

/// See the module head.
#[derive(Debug)]
pub(super) struct Flight {
    /// No leaf is larger.
    pub(super) largest: Level,
    writes: BTreeMap<VcpuId, (AddressSpace, Gfn)>,
    /// Removals by the time at which they began, and when they were over.
    removals: BTreeMap<u64, (GfnRange, Option<u64>)>,
}

impl Default for Flight {
    fn default() -> Self {
        Self { largest: Level::G1, writes: BTreeMap::new(), removals: BTreeMap::new() }
    }
}

impl Flight {
    /// A vCPU has begun to write, or has been told that it may not.
    pub(super) fn write_begins(&mut self, vcpu: VcpuId, space: AddressSpace, gfn: Gfn) {
        self.writes.insert(vcpu, (space, gfn));
    }

    /// It is done with it, whether it has written or not.
    pub(super) fn write_ends(&mut self, vcpu: VcpuId) {
        self.writes.remove(&vcpu);
    }

    /// The writes that are under way.
    pub(super) fn writes(&self) -> impl Iterator<Item = (AddressSpace, Gfn)> + '_ {
        self.writes.values().copied()
    }

    /// A removal of `range` has begun at `time`.
    pub(super) fn removal_begins(&mut self, time: u64, range: GfnRange) {
        self.removals.insert(time, (range, None));
    }

    /// The one that began then is over. Forgets those that were over by `needed`.
    pub(super) fn removal_ends(&mut self, began: u64, now: u64, needed: u64) {
        if let Some((_, ended)) = self.removals.get_mut(&began) {
            *ended = Some(now);
        }
        self.removals.retain(|_, (_, ended)| ended.is_none_or(|ended| ended > needed));
    }

    /// The ranges of the removals that are under way, or were at some time since `since`; a leaf that reaches into one goes
    /// as a whole.
    pub(super) fn removals_since(&self, since: u64) -> Vec<GfnRange> {
        let recent = self.removals.values().filter(|(_, ended)| ended.is_none_or(|ended| ended > since));
        recent
            .map(|(range, _)| GfnRange {
                start: self.largest.align_down(range.start),
                end: self.largest.next_block(Gfn(range.end.0.saturating_sub(1))),
            })
            .collect()
    }
}
