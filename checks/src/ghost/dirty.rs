//! The dirty set: which pages of a slot were written since someone was told.
//!
//! # What must be true
//! - A write that was carried out before a log was asked is in the answer, or was in an earlier one whose reader read the
//!   page afterwards. Writes that race with the question may be in this answer or in the next.
//! - A page is in an answer only if somebody tried to write it since it was in the last one: in the block of 4 KiB where
//!   pages are logged, in the leaf that maps it where leaves are. What is dirty from the start counts as tried.
//!
//! The second is judged where operations do not overlap. In a storm an answer may repeat what an earlier one had, and a
//! zap that was begun before the log may tell it of older writes.

use std::collections::{BTreeMap, BTreeSet};

use nestling::{AddressSpace, Gfn, GfnRange, Granularity, Level, LogConfig, LogStart, SlotId};

use super::Ghost;

/// What is known of one log.
#[derive(Clone, Debug)]
pub(super) struct Book {
    config: LogConfig,
    pages: u64,
    /// Pages written and not told of, with the time of the first such write.
    written: BTreeMap<u64, u64>,
    /// Pages that may be told of.
    tried: BTreeSet<u64>,
}

/// How an answer is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judge {
    /// Nothing else went on: what is told is exactly what was written, and forgotten after it.
    Exactly,
    /// Guests wrote and others worked meanwhile: what was written before must be told, and more may be.
    Beside,
}

impl Ghost {
    /// A log is about to start.
    pub fn log_starting(&mut self, id: SlotId, config: LogConfig) {
        let Some(place) = self.placements.iter().find(|place| place.id == id).copied() else { return };
        let pages = place.range.pages();
        let all = config.start == LogStart::AllDirty;
        let tried = if all { (0..pages).collect() } else { BTreeSet::new() };
        self.note(place.range, format!("{id:?} gets a log: {config:?}"));
        self.logs.entry(id).or_insert(Book { config, pages, written: BTreeMap::new(), tried });
    }

    /// It has started: what was written until now need not be told.
    pub fn log_started(&mut self, id: SlotId) {
        if let Some(book) = self.logs.get_mut(&id)
            && book.config.start == LogStart::Clean
        {
            book.written.clear();
        }
    }

    /// It was stopped, or the slot is gone.
    pub fn log_stopped(&mut self, id: SlotId) {
        self.logs.remove(&id);
    }

    /// The log of `id`, if it has one: how it is configured, and how many words it has.
    pub fn log(&self, id: SlotId) -> Option<(LogConfig, usize)> {
        self.logs.get(&id).map(|book| (book.config, book.pages.div_ceil(64) as usize))
    }

    /// Somebody is about to write `range`: from here on it may be told.
    pub fn trying(&mut self, space: AddressSpace, range: GfnRange) {
        for (page, id) in self.logged_pages(space, range) {
            let Some(book) = self.logs.get_mut(&id) else { continue };
            match book.config.granularity {
                Granularity::Page => drop(book.tried.insert(page)),
                // The largest leaf that may have mapped it.
                Granularity::Leaf => {
                    let Some(place) = self.placements.iter().find(|place| place.id == id) else { continue };
                    let block = GfnRange::block(Level::G1, Gfn(place.range.start.0 + page));
                    let (start, end) = (block.start.max(place.range.start), block.end.min(place.range.end));
                    book.tried.extend(start.0 - place.range.start.0..end.0 - place.range.start.0);
                }
            }
        }
    }

    /// Somebody has written `range`.
    pub fn wrote(&mut self, space: AddressSpace, range: GfnRange) {
        if self.logs.is_empty() {
            return;
        }
        let now = self.tick();
        for (page, id) in self.logged_pages(space, range) {
            if let Some(book) = self.logs.get_mut(&id) {
                book.written.entry(page).or_insert(now);
            }
        }
    }

    fn logged_pages(&self, space: AddressSpace, range: GfnRange) -> Vec<(u64, SlotId)> {
        let logged = |place: &&super::Placement| place.space == space && self.logs.contains_key(&place.id);
        let places = self.placements.iter().filter(logged).filter(|place| place.range.overlaps(range));
        places
            .flat_map(|place| {
                let (start, end) = (place.range.start.max(range.start).0, place.range.end.min(range.end).0);
                (start..end).map(|gfn| (gfn - place.range.start.0, place.id))
            })
            .collect()
    }

    fn complain_of_page(&mut self, id: SlotId, page: u64, what: &str) {
        let gfn = self.placements.iter().find(|place| place.id == id).map(|place| Gfn(place.range.start.0 + page));
        self.violation(gfn, format!("page {page} of {id:?} {what}"));
    }

    /// Words of the log of `id` were told, as asked at `asked`; with `taken`, they are clean from then on.
    pub fn told(&mut self, id: SlotId, first_word: usize, words: &[u64], asked: u64, taken: bool, judge: Judge) {
        let Some(book) = self.logs.get_mut(&id) else { return };
        let pages = first_word as u64 * 64..(first_word + words.len()) as u64 * 64;
        let is_told = |page: u64| {
            let page = page - pages.start;
            words[(page / 64) as usize] >> (page % 64) & 1 != 0
        };
        let missing: Vec<_> = book
            .written
            .range(pages.clone())
            .filter(|(page, when)| **when < asked && !is_told(**page))
            .map(|(page, _)| *page)
            .collect();
        let told: Vec<_> = pages.clone().filter(|page| is_told(*page)).collect();
        let beyond = told.iter().any(|page| *page >= book.pages);
        let exactly = judge == Judge::Exactly;
        let untried: Vec<_> = told.iter().filter(|page| exactly && !book.tried.contains(page)).copied().collect();
        if taken {
            for page in &told {
                book.written.remove(page);
                if exactly {
                    book.tried.remove(page);
                }
            }
        }
        for page in missing {
            self.complain_of_page(id, page, "was written, and is not told of");
        }
        for page in untried {
            self.complain_of_page(id, page, "is told of, and nobody wrote it");
        }
        if beyond {
            self.violation(None, format!("{id:?}: pages behind the end of the slot are told of"));
        }
    }

    /// The pages of `mask` were cleared.
    pub fn cleared(&mut self, id: SlotId, first_word: usize, mask: &[u64]) {
        let Some(book) = self.logs.get_mut(&id) else { return };
        for (word, bits) in (first_word as u64..).zip(mask) {
            for page in (0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| word * 64 + bit) {
                book.written.remove(&page);
                book.tried.remove(&page);
            }
        }
    }

    /// Bits are about to be given back to the log of `id`.
    pub fn merging(&mut self, id: SlotId, first_word: usize, words: &[u64]) {
        let now = self.tick();
        let Some(book) = self.logs.get_mut(&id) else { return };
        for (word, bits) in (first_word as u64..).zip(words) {
            for page in
                (0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| word * 64 + bit).filter(|page| *page < book.pages)
            {
                book.tried.insert(page);
                book.written.entry(page).or_insert(now);
            }
        }
    }
}
