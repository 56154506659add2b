//! Reverse maps: which entries map a guest frame.
//!
//! One word a frame: nothing, one place, or the number of a node. Words come in chunks of 64, of frames that are
//! [`super::bucket::STRIDE`] apart; a chunk exists once one of its frames was mapped. A node holds up to 14 places and
//! leads to the next; only the first may have fewer. A frame that is mapped from very many places is *crowded*, and the
//! fault that would add one more removes all others instead (KVM: rmap recycling): removal looks through the list.
//!
//! Nothing here allocates but [`Rmap::reserve`], which is called outside the MMU lock.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::page::Place;
use crate::OutOfMemory;

/// Frames of a chunk.
pub(super) const WORDS: usize = 64;
const NODE: usize = 14;
/// Marks a word that names a node.
const MANY: u32 = 1 << 31;
/// No node.
const NONE: u32 = u32::MAX;
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
    chunks: Vec<(u32, Box<[u32; WORDS]>)>,
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

/// Whether a place can be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// It can.
    Enough,
    /// After [`Rmap::reserve`].
    None,
    /// The frame is mapped from too many places.
    Crowded,
}

impl Rmap {
    pub(super) const fn new() -> Self {
        Self { chunks: Vec::new(), nodes: Vec::new(), free: NONE }
    }

    fn chunk(&self, number: u32) -> Result<usize, usize> {
        self.chunks.binary_search_by_key(&number, |(number, _)| *number)
    }

    fn word(&self, key: Key) -> u32 {
        self.chunk(key.chunk).map_or(0, |chunk| self.chunks[chunk].1[key.word])
    }

    fn set(&mut self, key: Key, word: u32) {
        if let Ok(chunk) = self.chunk(key.chunk) {
            self.chunks[chunk].1[key.word] = word;
        }
    }

    /// Whether one more place of the frame can be added.
    pub(super) fn room(&self, key: Key) -> Room {
        let Ok(chunk) = self.chunk(key.chunk) else { return Room::None };
        let word = self.chunks[chunk].1[key.word];
        if word == 0 {
            return Room::Enough;
        }
        if word & MANY != 0 {
            let node = &self.nodes[(word & !MANY) as usize];
            if node.depth >= CROWD {
                return Room::Crowded;
            }
            if usize::from(node.count) < NODE {
                return Room::Enough;
            }
        }
        if self.free == NONE { Room::None } else { Room::Enough }
    }

    /// Makes room for a place of this frame.
    pub(super) fn reserve(&mut self, key: Key) -> Result<(), OutOfMemory> {
        if let Err(position) = self.chunk(key.chunk) {
            self.chunks.try_reserve_exact(1)?;
            self.chunks.insert(position, (key.chunk, Box::new([0; WORDS])));
        }
        if self.free == NONE && self.word(key) != 0 {
            self.nodes.try_reserve(1)?;
            self.free = self.nodes.len() as u32;
            self.nodes.push(Node { places: [0; NODE], next: NONE, count: 0, depth: 0 });
        }
        Ok(())
    }

    fn take_node(&mut self) -> u32 {
        let node = self.free;
        self.free = self.nodes[node as usize].next;
        node
    }

    /// Adds a place, for which there is room.
    pub(super) fn add(&mut self, key: Key, place: Place) {
        let word = self.word(key);
        if word == 0 {
            return self.set(key, place.0 + 1);
        }
        let head = if word & MANY == 0 {
            let node = self.take_node();
            self.nodes[node as usize] = Node { places: [0; NODE], next: NONE, count: 1, depth: 0 };
            self.nodes[node as usize].places[0] = word - 1;
            self.set(key, MANY | node);
            node
        } else {
            word & !MANY
        };
        let first = &mut self.nodes[head as usize];
        if usize::from(first.count) < NODE {
            first.places[usize::from(first.count)] = place.0;
            first.count += 1;
            return;
        }
        let depth = first.depth + 1;
        let node = self.take_node();
        self.nodes[node as usize] = Node { places: [0; NODE], next: head, count: 1, depth };
        self.nodes[node as usize].places[0] = place.0;
        self.set(key, MANY | node);
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

    /// The keys of the `from`-th chunk; `None` past the last.
    pub(super) fn keys(&self, from: usize) -> Option<impl Iterator<Item = Key> + use<>> {
        let chunk = self.chunks.get(from)?.0;
        Some((0..WORDS).map(move |word| Key { chunk, word }))
    }

    pub(super) fn bytes(&self) -> usize {
        self.chunks.capacity() * size_of::<(u32, Box<[u32; WORDS]>)>()
            + self.chunks.len() * size_of::<[u32; WORDS]>()
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
                    if rmap.room(key) == Room::None {
                        rmap.reserve(key).unwrap();
                    }
                    prop_assert_eq!(rmap.room(key), Room::Enough);
                    rmap.add(key, Place(place));
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
            match rmap.room(KEY) {
                Room::None => rmap.reserve(KEY).unwrap(),
                Room::Crowded => break,
                Room::Enough => {
                    rmap.add(KEY, Place(count));
                    count += 1;
                }
            }
        }
        assert!((1000..1100).contains(&count), "{count}");
        let nodes = rmap.nodes.len();
        for _ in 0..3 {
            (0..count).for_each(|place| assert!(rmap.remove(KEY, Place(place))));
            assert!(rmap.first(KEY).is_none() && !rmap.remove(KEY, Place(0)));
            (0..count).for_each(|place| rmap.add(KEY, Place(place)));
        }
        assert_eq!(rmap.nodes.len(), nodes);
    }
}
