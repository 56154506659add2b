//! Pages on their way out and in: what need not be sent is found, the rest is compressed.
//!
//! A page of zeros that was never anything else is not sent at all: the receiving machine's memory begins as zeros. A page
//! whose content another frame holds is sent as that frame's number. What a frame holds *there* is what was sent for it last;
//! so that is what is remembered: for each frame a 128-bit hash of it, with a key of this process, and for each hash
//! one frame. Memory for this is bounded by [`REMEMBERED`]: what is beyond is just sent.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
};

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use nestling_control::window::{PAGE_BYTES, SLOT_PAGES};

use super::stream::{Entry, Record};

/// How many frames' contents are remembered at most: those of 8 GiB, with some 48 bytes each.
const REMEMBERED: usize = 2 << 20;
const ZERO: u128 = 0;

/// What was found out about pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages that came.
    pub pages: u64,
    /// Those that hold zeros.
    pub zeros: u64,
    /// Those that hold what another one holds.
    pub same: u64,
    /// Bytes of the rest, compressed.
    pub bytes: u64,
}

/// The sending side.
#[derive(Debug, Default)]
pub struct Packer {
    keys: [RandomState; 2],
    /// The hash of what was sent for a frame last.
    sent: HashMap<u64, u128>,
    /// A frame for which this was sent.
    holders: HashMap<u128, u64>,
    /// What was found out.
    pub tally: Tally,
}

impl Packer {
    /// Makes a record of pages. `frames` and `data` belong together, a page each.
    pub fn pack(&mut self, frames: &[u64], data: &[u8]) -> Option<Record> {
        let (mut entries, mut bytes) = (Vec::new(), Vec::new());
        for (index, page) in data.chunks_exact(PAGE_BYTES).enumerate().take(frames.len()) {
            entries.extend(self.entry(frames[index], &frames[index + 1..], page, &mut bytes));
        }
        self.tally.bytes += bytes.len() as u64;
        (!entries.is_empty()).then_some(Record::Pages(entries, bytes))
    }

    /// `later`: the frames behind this one in the record. The receiver fills those with content first, so that none of them
    /// can be one whose old content is referred to.
    fn entry(&mut self, frame: u64, later: &[u64], page: &[u8], bytes: &mut Vec<u8>) -> Option<Entry> {
        self.tally.pages += 1;
        if page.iter().all(|&byte| byte == 0) {
            self.tally.zeros += 1;
            // Unknown is not sent before: a frame that is sent is remembered, or there was no room and it is sent again.
            return match self.sent.get(&frame) {
                None if self.sent.len() < REMEMBERED => None,
                Some(&ZERO) => None,
                _ => {
                    self.remember(frame, ZERO);
                    Some(Entry::Zero(frame))
                }
            };
        }
        let hash = self.hash(page);
        let holder = self.holders.get(&hash).copied();
        if let Some(other) =
            holder.filter(|other| *other != frame && self.sent.get(other) == Some(&hash) && !later.contains(other))
        {
            self.tally.same += 1;
            self.remember(frame, hash);
            return Some(Entry::Same(frame, other));
        }
        self.remember(frame, hash);
        let mut room = [0; get_maximum_output_size(PAGE_BYTES)];
        match compress_into(page, &mut room) {
            Ok(length) if length < PAGE_BYTES => {
                bytes.extend_from_slice(&room[..length]);
                Some(Entry::Packed(frame, length as u16))
            }
            _ => {
                bytes.extend_from_slice(page);
                Some(Entry::Plain(frame))
            }
        }
    }

    fn remember(&mut self, frame: u64, hash: u128) {
        if self.sent.len() >= REMEMBERED && !self.sent.contains_key(&frame) {
            return;
        }
        self.sent.insert(frame, hash);
        // The latest: it is the one that will most likely still hold it.
        if hash != ZERO && (self.holders.len() < REMEMBERED || self.holders.contains_key(&hash)) {
            self.holders.insert(hash, frame);
        }
    }

    /// Never [`ZERO`].
    fn hash(&self, page: &[u8]) -> u128 {
        let [high, low] = self.keys.each_ref().map(|key| u128::from(key.hash_one(page)));
        (high << 64 | low).max(1)
    }
}

/// What a record of pages says, with its pages unpacked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Frames with content, and it.
    pub frames: Vec<u64>,
    /// Their pages.
    pub data: Vec<u8>,
    /// Frames of zeros.
    pub zeros: Vec<u64>,
    /// Frames, and which others' content they hold.
    pub same: Vec<(u64, u64)>,
}

/// Unpacks the entries of a record; `None` if they are not what a sender makes.
#[must_use]
pub fn unpack(entries: &[Entry], mut bytes: &[u8]) -> Option<Unpacked> {
    if entries.len() > SLOT_PAGES {
        return None;
    }
    let mut unpacked = Unpacked::default();
    for &entry in entries {
        let length = match entry {
            Entry::Zero(frame) => {
                unpacked.zeros.push(frame);
                continue;
            }
            Entry::Same(frame, other) => {
                unpacked.same.push((frame, other));
                continue;
            }
            Entry::Plain(_) => PAGE_BYTES,
            Entry::Packed(_, length) => usize::from(length),
        };
        let (page, rest) = bytes.split_at_checked(length)?;
        bytes = rest;
        match entry {
            Entry::Packed(frame, _) => {
                let mut whole = [0; PAGE_BYTES];
                decompress_into(page, &mut whole).ok().filter(|&length| length == PAGE_BYTES)?;
                unpacked.frames.push(frame);
                unpacked.data.extend_from_slice(&whole);
            }
            Entry::Plain(frame) => {
                unpacked.frames.push(frame);
                unpacked.data.extend_from_slice(page);
            }
            Entry::Zero(_) | Entry::Same(..) => {}
        }
    }
    bytes.is_empty().then_some(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A receiving machine's memory.
    type Memory = HashMap<u64, Vec<u8>>;

    fn receive(memory: &mut Memory, record: &Record) {
        let Record::Pages(entries, bytes) = record else { panic!("no pages") };
        // In the order in which they are applied: an entry may refer to one of the same record.
        let Unpacked { frames, data, zeros, same } = unpack(entries, bytes).expect("well made");
        for (frame, page) in frames.iter().zip(data.chunks_exact(PAGE_BYTES)) {
            memory.insert(*frame, page.to_vec());
        }
        for frame in zeros {
            memory.insert(frame, vec![0; PAGE_BYTES]);
        }
        for (frame, other) in same {
            let page = memory.get(&other).expect("sent before").clone();
            memory.insert(frame, page);
        }
    }

    #[test]
    fn memory_arrives_whatever_the_pages_become_from_round_to_round() {
        let mut seed = 1u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        let (mut packer, mut there) = (Packer::default(), Memory::new());
        let mut here: Vec<Vec<u8>> = vec![vec![0; PAGE_BYTES]; 64];
        for _ in 0..2000 {
            // Few contents, so that pages become equal, and cease to be, all the time.
            let mut frames: Vec<u64> = (0..random(12)).map(|_| random(64)).collect();
            frames.sort_unstable();
            frames.dedup();
            let mut data = Vec::new();
            for &frame in &frames {
                let page = match random(5) {
                    0 => vec![0; PAGE_BYTES],
                    1 => (0..PAGE_BYTES).map(|_| random(256) as u8).collect(),
                    kind => vec![kind as u8 + random(3) as u8; PAGE_BYTES],
                };
                data.extend_from_slice(&page);
                here[frame as usize] = page;
            }
            if let Some(record) = packer.pack(&frames, &data) {
                receive(&mut there, &record);
            }
            for (frame, page) in here.iter().enumerate() {
                let zeros = vec![0; PAGE_BYTES];
                assert!(there.get(&(frame as u64)).unwrap_or(&zeros) == page, "frame {frame}");
            }
        }
        let Tally { zeros, same, .. } = packer.tally;
        assert!(zeros > 100 && same > 100, "{:?}", packer.tally);
    }

    #[test]
    fn pages_of_zeros_and_repeated_ones_cost_nothing() {
        let mut packer = Packer::default();
        assert_eq!(packer.pack(&[1, 2], &[0; 2 * PAGE_BYTES]), None);
        let mut noise = vec![0; PAGE_BYTES];
        noise.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * at / 7 + at) as u8);
        let record = packer.pack(&[3, 4], &[noise.clone(), noise].concat());
        let Some(Record::Pages(entries, bytes)) = record else { panic!("nothing sent") };
        assert!(matches!(entries[..], [Entry::Packed(3, _) | Entry::Plain(3), Entry::Same(4, 3)]), "{entries:?}");
        assert!(bytes.len() <= PAGE_BYTES);
    }

    #[test]
    fn badly_made_records_are_refused() {
        let page = [7; PAGE_BYTES];
        assert_eq!(unpack(&[Entry::Plain(1)], &page[1..]), None);
        assert_eq!(unpack(&[Entry::Packed(1, 5)], &[0xff; 5]), None);
        assert_eq!(unpack(&[Entry::Zero(1)], &[1]), None);
        assert_eq!(unpack(&[Entry::Zero(1); SLOT_PAGES + 1], &[]), None);
        let mut packed = [0; get_maximum_output_size(2 * PAGE_BYTES)];
        let length = compress_into(&[0; 2 * PAGE_BYTES], &mut packed).expect("fits");
        assert_eq!(unpack(&[Entry::Packed(1, length as u16)], &packed[..length]), None, "more than a page");
    }
}
