//! The dirty set: which pages of a slot were written since someone was told.
//!
//! # What must be true
//! - A write that was carried out before a log was asked is in the answer, or was in an earlier one whose reader read the
//!   page afterwards. Writes that race with the question may be in this answer or in the next.
//! - A page is in an answer only if somebody tried to write it since the last answer that spoke for it: in the block of
//!   4 KiB where pages are logged, in the leaf that maps it where leaves are. What is dirty from the start counts as tried.
//!
//! # What "since" means where much goes on at once
//! An answer takes a page's bit at some moment between the question (*asked*) and the answer (*told*), and speaks for every
//! page that was asked for, named or not. So the next answer may name the page
//!
//! 1. if a try was under way at any time after *asked*: a try that was over by then had set its bit, or the dirty bit of
//!    the entry, and the answer took the one and cleared the other. A try lasts from before the vCPU's walk, which may set
//!    the dirty bit, or from the fault, to the access or the fault's end; or
//! 2. if a removal of its mapping was under way at any time between *asked* and *told*, and the answer named the page: who
//!    removes an entry holds its dirty bit until it has told the log, and may do so after the answer was taken. A removal
//!    that began after *told* finds no dirty bit of older tries, and one that ended before *asked* has told the log.
//!    The removal of all that an obsolete root maps can outlast several answers, so that a page that one of them named
//!    stays excused as long as removals overlap each that follows.
//!
//! That is exact where nothing overlaps: then neither excuse is ever there, and what is told is what was tried. How many
//! pages were told, and how many of them by an excuse alone ([`Answers`]), says how much of a storm is judged.

use std::collections::BTreeMap;

use nestling::{
    AddressSpace, DirtyPages, Gfn, GfnRange, Granularity, Hfn, Level, LogConfig, LogStart, SlotId, Tracking,
};

use super::Ghost;
use super::object::Page as Frame;

/// What is known of one log.
#[derive(Clone, Debug)]
pub(super) struct Book {
    config: LogConfig,
    /// When somebody last asked, if there was no answer yet.
    asked: Option<u64>,
    /// Pages written and not told of, with the time of the first such write.
    written: BTreeMap<u64, u64>,
    pages: Vec<Page>,
}

/// What is known of a page.
#[derive(Clone, Copy, Default, Debug)]
struct Page {
    /// When somebody last tried to write it.
    tried: u64,
    /// When the last answer that spoke for it was asked for; before the first, when the log began.
    since: u64,
    /// A removal may still tell of older writes.
    carried: bool,
}

/// What logs have told, by pages.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Answers {
    /// Named in an answer.
    pub told: u64,
    /// Of these, those that nobody is known to have tried to write since: a try or a removal was under way.
    pub excused: u64,
    /// Asked for, and not named.
    pub clean: u64,
}

/// The bits that are set in words of a log, by page.
fn pages_in(first_word: usize, words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    let bits = (first_word as u64..).zip(words);
    bits.flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit))
}

fn contains(ranges: &[GfnRange], gfn: Gfn) -> bool {
    ranges.iter().any(|range| range.contains(gfn))
}

impl Ghost {
    /// A log is about to start.
    pub fn log_starting(&mut self, id: SlotId, config: LogConfig) {
        let Some(place) = self.placements.iter().find(|place| place.id == id).copied() else { return };
        self.note(place.range, format!("{id:?} gets a log: {config:?}"));
        let now = self.tick();
        self.logs_changed = now;
        // What is dirty from the start may be told once.
        let tried = if config.start == LogStart::AllDirty { now } else { 0 };
        let page = Page { tried, since: now, carried: false };
        let pages = vec![page; place.range.pages() as usize];
        self.logs.entry(id).or_insert(Book { config, asked: Some(now), written: BTreeMap::new(), pages });
    }

    /// It has started: what was written until now need not be told.
    pub fn log_started(&mut self, id: SlotId) {
        self.logs_changed = self.tick();
        let Some(first) = self.first_of(id) else { return };
        let Some(book) = self.logs.get_mut(&id) else { return };
        let Some(asked) = book.asked.take() else { return };
        if book.config.start == LogStart::Clean {
            book.written.clear();
        }
        // Whoever was removing entries meanwhile may tell of writes that are older than the log.
        let removed = self.flight.removals_since(asked);
        for (page, number) in book.pages.iter_mut().zip(first.0..) {
            page.carried = contains(&removed, Gfn(number));
        }
    }

    /// It was stopped, or the slot is gone.
    pub fn log_stopped(&mut self, id: SlotId) {
        self.logs.remove(&id);
    }

    /// The log of `id`, if it has one: how it is configured, and how many words it has.
    pub fn log(&self, id: SlotId) -> Option<(LogConfig, usize)> {
        self.logs.get(&id).map(|book| (book.config, book.pages.len().div_ceil(64)))
    }

    /// What logs have told so far.
    pub const fn answers(&self) -> Answers {
        self.answers
    }

    fn first_of(&self, id: SlotId) -> Option<Gfn> {
        self.placements.iter().find(|place| place.id == id).map(|place| place.range.start)
    }

    /// Somebody is about to write exactly these frames, or has: they may be told.
    pub fn trying(&mut self, space: AddressSpace, range: GfnRange) {
        let now = self.tick();
        for (page, id) in self.logged_pages(space, range) {
            if let Some(page) = self.logs.get_mut(&id).and_then(|book| book.pages.get_mut(page as usize)) {
                page.tried = now;
            }
        }
    }

    /// A vCPU tries to write, or has tried, through a leaf of `level`, or less: what the log says of it may be told.
    pub(super) fn trying_through(&mut self, space: AddressSpace, gfn: Gfn, level: Level) {
        if self.logs.is_empty() {
            return;
        }
        for granularity in [Granularity::Page, Granularity::Leaf] {
            let level = if granularity == Granularity::Page { Level::K4 } else { level };
            let now = self.tick();
            for (page, id) in self.logged_pages(space, GfnRange::block(level, gfn)) {
                // A leaf has frames of one slot only.
                let with_gfn = |place: &super::Placement| place.id == id && place.range.contains(gfn);
                let same = self.placements.iter().any(with_gfn);
                if let Some(book) = self.logs.get_mut(&id).filter(|book| same && book.config.granularity == granularity)
                    && let Some(page) = book.pages.get_mut(page as usize)
                {
                    page.tried = now;
                }
            }
        }
    }

    /// Slots are changing their places: what is being written may be written in any of them.
    pub(super) fn trying_everywhere(&mut self) {
        let writes: Vec<_> = self.flight.writes().collect();
        for (space, gfn) in writes {
            self.trying_through(space, gfn, self.flight.largest);
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

    /// A vCPU has written `hfn` at `gfn`: of a slot that moves, in the one of its places whose page that is.
    pub(super) fn wrote_through(&mut self, space: AddressSpace, gfn: Gfn, hfn: Hfn) {
        let now = self.tick();
        for place in self.placements.iter().filter(|place| place.space == space && place.range.contains(gfn)) {
            let page = gfn.0 - place.range.start.0;
            let object = self.objects.get(&place.object);
            let there = object.is_some_and(|object| object.page(page + object.shape.lead) == Frame::At(hfn));
            if let Some(book) = self.logs.get_mut(&place.id).filter(|_| there) {
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
        let gfn = self.first_of(id).map(|first| Gfn(first.0 + page));
        self.violation(gfn, format!("page {page} of {id:?} {what}"));
    }

    /// The log of `id` is about to be asked, or told to forget. The time.
    pub fn asking(&mut self, id: SlotId) -> u64 {
        let now = self.tick();
        if let Some(book) = self.logs.get_mut(&id) {
            book.asked = Some(now);
        }
        now
    }

    /// Since when it matters what was removed: since the oldest question without an answer.
    pub(super) fn removals_needed_since(&self) -> u64 {
        self.logs.values().filter_map(|book| book.asked).min().unwrap_or(self.time)
    }

    /// Words of the log of `id` were told, as asked at `asked`; with `taken`, they are clean from then on.
    pub fn told(&mut self, id: SlotId, first_word: usize, words: &[u64], asked: u64, taken: bool) {
        let Some(first) = self.first_of(id) else { return };
        let Some(mut book) = self.logs.remove(&id) else { return };
        let is_told = |page: u64| words[(page / 64) as usize - first_word] >> (page % 64) & 1 != 0;
        let asked_for = first_word as u64 * 64..((first_word + words.len()) as u64 * 64).min(book.pages.len() as u64);
        let missing: Vec<_> = book
            .written
            .range(asked_for.clone())
            .filter(|(page, when)| **when < asked && !is_told(**page))
            .map(|(page, _)| *page)
            .collect();
        let beyond = pages_in(first_word, words).any(|page| page >= book.pages.len() as u64);
        let writing = self.being_written(id, &book);
        let mut untried = Vec::new();
        for number in asked_for.clone() {
            let page = &book.pages[number as usize];
            if !is_told(number) {
                self.answers.clean += 1;
                continue;
            }
            self.answers.told += 1;
            if page.tried < page.since {
                self.answers.excused += 1;
                if !page.carried && !contains(&writing, Gfn(first.0 + number)) {
                    untried.push(number);
                }
            }
        }
        book.asked = None;
        if taken {
            self.speaks_for(&mut book, first, asked_for, asked, is_told);
        }
        self.logs.insert(id, book);
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

    /// The pages that the log may hear of before the writes that are under way have ended.
    fn being_written(&self, id: SlotId, book: &Book) -> Vec<GfnRange> {
        let level = if book.config.granularity == Granularity::Page { Level::K4 } else { self.flight.largest };
        let here = |space, gfn| {
            self.placements.iter().any(|place| place.id == id && place.space == space && place.range.contains(gfn))
        };
        let writes = self.flight.writes().filter(|&(space, gfn)| here(space, gfn));
        writes.map(|(_, gfn)| GfnRange::block(level, gfn)).collect()
    }

    /// An answer that was asked for at `asked` has been given for `pages`.
    fn speaks_for(
        &self,
        book: &mut Book,
        first: Gfn,
        pages: impl Iterator<Item = u64>,
        asked: u64,
        is_told: impl Fn(u64) -> bool,
    ) {
        let removed = self.flight.removals_since(asked);
        for number in pages {
            let told = is_told(number);
            if told {
                book.written.remove(&number);
            }
            if let Some(page) = book.pages.get_mut(number as usize) {
                page.carried = (told || page.carried) && contains(&removed, Gfn(first.0 + number));
                page.since = asked;
            }
        }
    }

    /// The pages of `mask` were cleared, as was asked at `asked`. All of them were dirty.
    pub fn cleared(&mut self, id: SlotId, first_word: usize, mask: &[u64], asked: u64) {
        let Some(first) = self.first_of(id) else { return };
        let Some(mut book) = self.logs.remove(&id) else { return };
        book.asked = None;
        self.speaks_for(&mut book, first, pages_in(first_word, mask), asked, |_| true);
        self.logs.insert(id, book);
    }

    /// Entries of rings were armed again, as was asked at `asked`; whoever holds the rings reads their pages afterwards.
    pub fn reset<'e>(&mut self, id: SlotId, entries: impl Iterator<Item = &'e DirtyPages>, asked: u64) {
        let Some(first) = self.first_of(id) else { return };
        let Some(mut book) = self.logs.remove(&id) else { return };
        book.asked = None;
        let count = book.pages.len() as u64;
        // An entry of an older log may name a page that the slot no longer has.
        for entry in entries.filter(|entry| entry.page < count) {
            let block = GfnRange::block(entry.level, Gfn(first.0 + entry.page));
            let pages = block.start.0.max(first.0) - first.0..(block.end.0 - first.0).min(count);
            if book.config.tracking == Tracking::WriteProtect {
                self.speaks_for(&mut book, first, pages, asked, |_| true);
            } else {
                // What dirty bits know of a page that was not in the log is still to be told.
                book.written.retain(|page, _| !pages.contains(page));
            }
        }
        self.logs.insert(id, book);
    }

    /// Bits are about to be given back to the log of `id`.
    pub fn merging(&mut self, id: SlotId, first_word: usize, words: &[u64]) {
        let now = self.tick();
        let Some(book) = self.logs.get_mut(&id) else { return };
        for number in pages_in(first_word, words) {
            if let Some(page) = book.pages.get_mut(number as usize) {
                page.tried = now;
                book.written.entry(number).or_insert(now);
            }
        }
    }
}
