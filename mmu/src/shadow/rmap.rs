//! Reverse maps: which entries map a guest frame, or a block of them.
//!
//! One word a frame: nothing, one place, or the number of a node. Words come in chunks, of the frames of one run; a chunk
//! exists once one of its frames was mapped. A node holds up to 14 places and leads to the next; only the first may have
//! fewer. A frame that is mapped from very many places is *crowded*, and the fault that would add one more removes all
//! others instead (KVM: rmap recycling): removal looks through the list.
//!
//! Nothing here allocates but [`Rmap::reserve`], which is called outside the MMU lock.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;

use super::page::Place;
use crate::OutOfMemory;

/// Frames of a run: neighbours, whose words make a chunk. (Of blocks, as many make one.)
pub(super) const RUN: usize = if cfg!(any(feature = "loom", feature = "shuttle")) { 2 } else { 64 };
const NODE: usize = 14;
/// Marks a word that names a node.
const MANY: u32 = 1 << 31;
/// No node.
const NONE: u32 = u32::MAX;
/// Nodes that are made at a time: as many as a fault may need, which maps neighbours as well. They are mostly mapped in the
/// same places.
const NODES: usize = if cfg!(any(feature = "loom", feature = "shuttle")) { 1 } else { 8 };
/// Full nodes of a crowded frame: about a thousand places.
const CROWD: u16 = 72;

#[derive(Clone, Copy, Debug)]
struct Node {
    places: [u32; NODE],
    next: u32,
    count: u16,
    /// Nodes behind this one.
    depth: u16,
}

/// Reverse maps of a bucket's frames.
#[derive(Debug)]
pub(super) struct Rmap {
    /// Sorted by number.
    chunks: Vec<(u32, Box<[u32; RUN]>)>,
    /// Which of them was in use last: whoever goes through frames comes back to it.
    last: Cell<usize>,
    nodes: Vec<Node>,
    /// First of the free nodes, which are linked.
    free: u32,
}

/// Where a frame's word is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key {
    pub(super) chunk: u32,
    pub(super) word: usize,
}

/// Why a place can not be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NoRoom {
    /// It can, after [`Rmap::reserve`].
    Yet,
    /// The frame is mapped from too many places.
    Crowded,
}

impl Rmap {
    pub(super) const fn new() -> Self {
        Self { chunks: Vec::new(), last: Cell::new(0), nodes: Vec::new(), free: NONE }
    }

    #[inline]
    fn chunk(&self, number: u32) -> Result<usize, usize> {
        let last = self.last.get();
        match self.chunks.get(last) {
            Some((found, _)) if *found == number => Ok(last),
            _ => self.search(number),
        }
    }

    fn search(&self, number: u32) -> Result<usize, usize> {
        let found = self.chunks.binary_search_by_key(&number, |(number, _)| *number)?;
        self.last.set(found);
        Ok(found)
    }

    /// Whether a frame of the run of this one was ever mapped.
    pub(super) fn has(&self, key: Key) -> bool {
        self.chunk(key.chunk).is_ok()
    }

    fn word(&self, key: Key) -> u32 {
        self.chunk(key.chunk).map_or(0, |chunk| self.chunks[chunk].1[key.word])
    }

    fn set(&mut self, key: Key, word: u32) {
        if let Ok(chunk) = self.chunk(key.chunk) {
            self.chunks[chunk].1[key.word] = word;
        }
    }

    /// Makes room for a place of this frame.
    pub(super) fn reserve(&mut self, key: Key) -> Result<(), OutOfMemory> {
        if let Err(position) = self.chunk(key.chunk) {
            self.chunks.try_reserve_exact(1)?;
            self.chunks.insert(position, (key.chunk, Box::new([0; RUN])));
        }
        if self.free == NONE && self.word(key) != 0 {
            self.nodes.try_reserve(NODES)?;
            for _ in 0..NODES {
                let next = core::mem::replace(&mut self.free, self.nodes.len() as u32);
                self.nodes.push(Node { places: [0; NODE], next, count: 0, depth: 0 });
            }
        }
        Ok(())
    }

    fn take_node(&mut self) -> u32 {
        let node = self.free;
        self.free = self.nodes[node as usize].next;
        node
    }

    /// Adds a place.
    #[inline]
    pub(super) fn add(&mut self, key: Key, place: Place) -> Result<(), NoRoom> {
        let chunk = self.chunk(key.chunk).map_err(|_| NoRoom::Yet)?;
        let word = &mut self.chunks[chunk].1[key.word];
        if *word == 0 {
            *word = place.0 + 1;
            return Ok(());
        }
        let word = *word;
        *self.word_of_many(key, word)? = place.0;
        Ok(())
    }

    /// The place to be written to of a frame whose word is `word`, which is not zero.
    fn word_of_many(&mut self, key: Key, word: u32) -> Result<&mut u32, NoRoom> {
        let (first, depth) = match word & MANY {
            0 => (None, 0),
            _ => {
                let first = word & !MANY;
                let node = self.nodes[first as usize];
                if node.depth >= CROWD {
                    return Err(NoRoom::Crowded);
                }
                if usize::from(node.count) < NODE {
                    let node = &mut self.nodes[first as usize];
                    node.count += 1;
                    return Ok(&mut node.places[usize::from(node.count) - 1]);
                }
                (Some(first), node.depth + 1)
            }
        };
        if self.free == NONE {
            return Err(NoRoom::Yet);
        }
        let number = self.take_node();
        self.set(key, MANY | number);
        let node = &mut self.nodes[number as usize];
        *node = Node { places: [0; NODE], next: first.unwrap_or(NONE), count: 1, depth };
        if first.is_none() {
            // What was alone has company.
            node.places[0] = word - 1;
            node.count = 2;
        }
        Ok(&mut node.places[usize::from(node.count) - 1])
    }

    /// Removes a place. Whether it was there.
    pub(super) fn remove(&mut self, key: Key, place: Place) -> bool {
        let word = self.word(key);
        if word & MANY == 0 {
            let found = word == place.0 + 1;
            if found {
                self.set(key, 0);
            }
            return found;
        }
        let head = word & !MANY;
        let mut at = head;
        while at != NONE {
            let node = &self.nodes[at as usize];
            let count = usize::from(node.count);
            let Some(index) = node.places[..count].iter().position(|other| *other == place.0) else {
                at = node.next;
                continue;
            };
            // The last place of the first node takes its place.
            let first = &mut self.nodes[head as usize];
            first.count -= 1;
            let (last, empty, next) = (first.places[usize::from(first.count)], first.count == 0, first.next);
            self.nodes[at as usize].places[index] = last;
            if empty {
                self.nodes[head as usize].next = self.free;
                self.free = head;
                self.set(key, if next == NONE { 0 } else { MANY | next });
            }
            return true;
        }
        false
    }

    /// One of the frame's places.
    pub(super) fn first(&self, key: Key) -> Option<Place> {
        match self.word(key) {
            0 => None,
            word if word & MANY == 0 => Some(Place(word - 1)),
            word => {
                let node = &self.nodes[(word & !MANY) as usize];
                Some(Place(node.places[usize::from(node.count) - 1]))
            }
        }
    }

    /// All of the frame's places.
    pub(super) fn places(&self, key: Key) -> impl Iterator<Item = Place> {
        let word = self.word(key);
        let single = (word != 0 && word & MANY == 0).then(|| Place(word.wrapping_sub(1)));
        let mut at = if word & MANY == 0 { NONE } else { word & !MANY };
        let nodes = core::iter::from_fn(move || {
            let node = self.nodes.get(at as usize)?;
            at = node.next;
            Some(node)
        });
        let many = nodes.flat_map(|node| node.places[..usize::from(node.count)].iter().map(|place| Place(*place)));
        single.into_iter().chain(many)
    }

    /// Chunks that there are.
    pub(super) fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// The keys of the `from`-th chunk; `None` past the last.
    pub(super) fn keys(&self, from: usize) -> Option<impl Iterator<Item = Key> + use<>> {
        let chunk = self.chunks.get(from)?.0;
        Some((0..RUN).map(move |word| Key { chunk, word }))
    }

    /// All frames' places.
    pub(super) fn count(&self) -> u64 {
        let keys = (0..self.chunks.len()).filter_map(|chunk| self.keys(chunk)).flatten();
        keys.map(|key| self.places(key).count() as u64).sum()
    }

    pub(super) fn bytes(&self) -> usize {
        self.chunks.capacity() * size_of::<(u32, Box<[u32; RUN]>)>()
            + self.chunks.len() * size_of::<[u32; RUN]>()
            + self.nodes.capacity() * size_of::<Node>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    const KEY: Key = Key { chunk: 3, word: 7 };

    proptest! {
        /// Random additions and removals of a few frames against sets.
        #[test]
        fn agrees_with_sets(ops in prop::collection::vec((0usize..3, 0u32..200, any::<bool>()), 1..800)) {
            let mut rmap = Rmap::new();
            let mut sets = [const { BTreeSet::new() }; 3];
            for (frame, place, add) in ops {
                let key = Key { chunk: frame as u32 % 2, word: frame };
                if add && !sets[frame].contains(&place) {
                    if rmap.add(key, Place(place)).is_err() {
                        rmap.reserve(key).unwrap();
                        prop_assert_eq!(rmap.add(key, Place(place)), Ok(()));
                    }
                    sets[frame].insert(place);
                } else if !add {
                    prop_assert_eq!(rmap.remove(key, Place(place)), sets[frame].remove(&place));
                }
                let places: Vec<u32> = rmap.places(key).map(|place| place.0).collect();
                prop_assert_eq!(places.len(), sets[frame].len());
                prop_assert!(places.iter().all(|place| sets[frame].contains(place)));
                prop_assert_eq!(rmap.first(key).is_some(), !sets[frame].is_empty());
            }
        }
    }

    #[test]
    fn thousands_of_places_are_a_crowd_and_nodes_come_back() {
        let mut rmap = Rmap::new();
        let mut count = 0;
        loop {
            match rmap.add(KEY, Place(count)) {
                Err(NoRoom::Yet) => rmap.reserve(KEY).unwrap(),
                Err(NoRoom::Crowded) => break,
                Ok(()) => count += 1,
            }
        }
        assert!((1000..1100).contains(&count), "{count}");
        let nodes = rmap.nodes.len();
        for _ in 0..3 {
            (0..count).for_each(|place| assert!(rmap.remove(KEY, Place(place))));
            assert!(rmap.first(KEY).is_none() && !rmap.remove(KEY, Place(0)));
            (0..count).for_each(|place| assert_eq!(rmap.add(KEY, Place(place)), Ok(())));
        }
        assert_eq!(rmap.nodes.len(), nodes);
    }
}
