//! One immutable set of slots: for each address space its own, sorted by frame, in chunks.
//!
//! A change makes a new set that shares all chunks but one with the old, so that it costs a chunk and the list of
//! chunks (about √n each) and not the whole: 32 k slots are added one by one in a blink. A lookup is a binary search
//! over the chunks and one in a chunk.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{AddressSpace, Memslot, SlotId};
use crate::addr::{Gfn, GfnRange};

/// A chunk that grows past this is cut in two.
const CHUNK: usize = 256;

#[derive(Debug)]
struct Chunk {
    /// Sorted, disjoint, not empty.
    slots: Vec<Arc<Memslot>>,
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct SlotSet {
    generation: u64,
    spaces: [Chunks; AddressSpace::COUNT],
    /// Slots that have a dirty log.
    logs: usize,
}

/// The slots of one address space. Each chunk with its first slot's first frame, so that the search touches this list
/// alone.
type Chunks = Vec<(Gfn, Arc<Chunk>)>;

impl SlotSet {
    pub(super) fn empty() -> Self {
        Self { generation: 1, spaces: [const { Vec::new() }; AddressSpace::COUNT], logs: 0 }
    }

    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The slot of `space` that holds `gfn`.
    pub(crate) fn find(&self, space: AddressSpace, gfn: Gfn) -> Option<&Arc<Memslot>> {
        let chunks = &self.spaces[space.index()];
        let chunk = chunks.partition_point(|(first, _)| *first <= gfn).checked_sub(1)?;
        let slots = &chunks[chunk].1.slots;
        let slot = slots.partition_point(|slot| slot.range().start <= gfn).checked_sub(1)?;
        Some(&slots[slot]).filter(|slot| slot.range().contains(gfn))
    }

    /// Slots of `space` that share a frame with `range`, in order.
    fn in_range(&self, space: AddressSpace, range: GfnRange) -> impl Iterator<Item = &Arc<Memslot>> {
        let chunks = &self.spaces[space.index()];
        let first = chunks.partition_point(|(first, _)| *first <= range.start).saturating_sub(1);
        let slots = chunks[first..].iter().flat_map(|(_, chunk)| &chunk.slots);
        slots
            .skip_while(move |slot| slot.range().end <= range.start)
            .take_while(move |slot| slot.range().start < range.end)
    }

    /// `range` of `space` was written; notes it where it is logged.
    pub(crate) fn mark_dirty(&self, space: AddressSpace, range: GfnRange) {
        if self.logs == 0 {
            return;
        }
        for slot in self.in_range(space, range) {
            if let Some(log) = slot.log() {
                log.mark_range(slot.range().start, range);
            }
        }
    }

    /// All slots in order, one address space after the other.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Memslot>> {
        self.spaces.iter().flatten().flat_map(|(_, chunk)| &chunk.slots)
    }

    /// A slot of `space` other than `except` that shares a frame with `range`.
    pub(super) fn overlapping(&self, space: AddressSpace, range: GfnRange, except: Option<SlotId>) -> Option<SlotId> {
        // Slots are disjoint: those that begin before the range's end and reach into it are at the end of that list,
        // one that only begins before it can be only the first seen from there.
        let chunks = &self.spaces[space.index()];
        let after = chunks.partition_point(|(first, _)| *first < range.end);
        let backwards = chunks[..after].iter().rev().flat_map(|(_, chunk)| chunk.slots.iter().rev());
        backwards
            .skip_while(|slot| slot.range().start >= range.end)
            .take_while(|slot| slot.range().end > range.start)
            .find(|slot| Some(slot.id()) != except)
            .map(|slot| slot.id())
    }

    /// The next generation of the set: without `remove` (which is in it), with `insert` (which overlaps nothing).
    pub(super) fn changed(&self, remove: Option<&Memslot>, insert: Option<Arc<Memslot>>) -> Self {
        let mut new = Self { generation: self.generation + 1, spaces: self.spaces.clone(), logs: self.logs };
        if let Some(slot) = remove {
            new.logs -= usize::from(slot.log().is_some());
            new.edit(slot.space(), slot.range().start, |slots| {
                slots.retain(|other| other.range().start != slot.range().start)
            });
        }
        if let Some(slot) = insert {
            new.logs += usize::from(slot.log().is_some());
            new.edit(slot.space(), slot.range().start, |slots| {
                let place = slots.partition_point(|other| other.range().start < slot.range().start);
                slots.insert(place, slot);
            });
        }
        new
    }

    /// Replaces the chunk that `gfn` belongs to by an edited copy, dropping it when empty and cutting it when long.
    fn edit(&mut self, space: AddressSpace, gfn: Gfn, edit: impl FnOnce(&mut Vec<Arc<Memslot>>)) {
        let list = &mut self.spaces[space.index()];
        let index = list.partition_point(|(first, _)| *first <= gfn).saturating_sub(1);
        let mut slots = list.get(index).map(|(_, chunk)| chunk.slots.clone()).unwrap_or_default();
        edit(&mut slots);
        let tail = if slots.len() > CHUNK { slots.split_off(slots.len() / 2) } else { Vec::new() };
        let chunks = [slots, tail].into_iter().filter(|slots| !slots.is_empty());
        let chunks = chunks.map(|slots| (slots[0].range().start, Arc::new(Chunk { slots })));
        let replaced = index..(index + 1).min(list.len());
        list.splice(replaced, chunks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::{Slot, SlotConfig, SlotFlags};
    use proptest::prelude::*;
    use rangemap::RangeMap;

    const SPACE: AddressSpace = AddressSpace::Smm;

    fn slot(id: u32, start: u64, pages: u64) -> Memslot {
        let (id, base, flags) = (SlotId(id), Gfn(start).gpa(), SlotFlags::empty());
        let config = SlotConfig { id, space: SPACE, base, size: pages << 12, flags, backing: 0 };
        Memslot::new(Slot::new(config).unwrap())
    }

    proptest! {
        /// Random additions and removals against a range map; many more slots than a chunk holds.
        #[test]
        fn agrees_with_a_range_map(ops in prop::collection::vec((0u64..4000, 1u64..6, any::<bool>()), 1..1500)) {
            let (mut set, mut oracle) = (SlotSet::empty(), RangeMap::<u64, u32>::new());
            for (id, (start, pages, add)) in ops.into_iter().enumerate() {
                let new = slot(id as u32, start, pages);
                if add {
                    let mut others: Vec<u32> = oracle.overlapping(start..start + pages).map(|(_, id)| *id).collect();
                    others.sort_unstable();
                    match set.overlapping(SPACE, new.range(), None) {
                        Some(other) => prop_assert!(others.binary_search(&other.0).is_ok()),
                        None => {
                            prop_assert!(others.is_empty());
                            set = set.changed(None, Some(Arc::new(new)));
                            oracle.insert(start..start + pages, id as u32);
                        }
                    }
                } else if let Some(found) = set.find(SPACE, Gfn(start)).cloned() {
                    prop_assert_eq!(oracle.get(&start), Some(&found.id().0));
                    set = set.changed(Some(&found), None);
                    oracle.remove(found.range().start.0..found.range().end.0);
                }
            }
            for gfn in 0..4010 {
                prop_assert_eq!(set.find(SPACE, Gfn(gfn)).map(|slot| slot.id().0), oracle.get(&gfn).copied());
            }
            prop_assert_eq!(set.iter().count(), oracle.iter().count());
        }
    }

    #[test]
    fn many_slots_stay_in_small_chunks() {
        let mut set = SlotSet::empty();
        for id in 0..32 * 1024u32 {
            // A stride that visits all residues, so that chunks are cut everywhere.
            let place = u64::from(id) * 7919 % (32 * 1024);
            set = set.changed(None, Some(Arc::new(slot(id, place * 4, 3))));
        }
        let chunks = &set.spaces[SPACE.index()];
        assert!(chunks.iter().all(|(_, chunk)| chunk.slots.len() <= CHUNK) && chunks.len() < 300);
        for place in 0..32 * 1024u64 {
            assert_eq!(set.find(SPACE, Gfn(place * 4 + 2)).map(|slot| slot.range().start), Some(Gfn(place * 4)));
            assert!(set.find(SPACE, Gfn(place * 4 + 3)).is_none());
        }
    }
}
