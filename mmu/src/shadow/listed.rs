//! The list of pages out of step, by number: what [`super::sync`] says of numbers is kept here.
//!
//! A ring of places, the newest first: what is new since some number is found without a look at the rest, and a page gets on
//! the list, gets a new number there and leaves it in as many steps, however long the list is. A page knows its place.
//!
//! A page gets on the list under the lock of the bucket of its table, and leaves it under that lock: when it is in step, or
//! when it leaves the bucket, dead. So whoever has that lock may tell without the list's whether the page is on it.

use alloc::boxed::Box;

use super::page::{Handle, Page, STALE, UNSYNC};
use super::table::Inside;
use crate::host::Host;
use crate::leaf_lock::LeafLock;
use crate::mutants::{self, Mutant};
use crate::sync::{AtomicU32, AtomicU64, Ordering, peek};

/// Pages out of step at most. More, and the fault that would add one brings the others in step first.
pub(super) const LIST: usize = 64;
/// The place that begins and ends the ring, and is no page's.
const HEAD: u32 = 0;

/// A place.
#[derive(Clone, Copy, Debug)]
struct Place {
    page: Handle,
    number: u64,
    newer: u32,
    /// Of a free place, the next free one.
    older: u32,
}

#[derive(Debug)]
struct Ring {
    places: Box<[Place; LIST + 1]>,
    /// [`HEAD`]: none.
    free: u32,
}

impl Ring {
    fn new() -> Self {
        let empty = Place { page: Handle { index: 0, life: 0 }, number: 0, newer: HEAD, older: HEAD };
        let mut places = Box::new([empty; LIST + 1]);
        for place in 1..LIST {
            places[place].older = place as u32 + 1;
        }
        Self { places, free: 1 }
    }

    fn at(&mut self, place: u32) -> &mut Place {
        &mut self.places[place as usize]
    }

    /// Makes `place`, which is in no ring, the newest.
    fn put_first(&mut self, place: u32, number: u64) {
        let older = self.at(HEAD).older;
        self.at(older).newer = place;
        self.at(HEAD).older = place;
        let this = self.at(place);
        (this.newer, this.older, this.number) = (HEAD, older, number);
    }

    fn take_out(&mut self, place: u32) {
        let Place { newer, older, .. } = *self.at(place);
        self.at(newer).older = older;
        self.at(older).newer = newer;
    }
}

/// A page, and the number that it had on the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    pub(super) page: Handle,
    /// 0: it was not there.
    pub(super) number: u64,
}

/// Some pages of the list, and up to which number they were chosen.
pub(super) struct Chosen {
    pages: [Listed; LIST],
    count: usize,
    pub(super) up_to: u64,
}

impl Chosen {
    pub(super) fn pages(&self) -> &[Listed] {
        &self.pages[..self.count]
    }

    /// Only those that `keep` says.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(Handle) -> bool) {
        let mut kept = 0;
        for place in 0..self.count {
            let listed = self.pages[place];
            if keep(listed.page) {
                self.pages[kept] = listed;
                kept += 1;
            }
        }
        self.count = kept;
    }
}

/// The list of pages out of step.
#[derive(Debug)]
pub(super) struct OutOfStep {
    ring: LeafLock<Ring>,
    /// How many are on it; written under its lock, by exchanges for the reason of [`OutOfStep::is_empty`]. Who finds none has nothing to bring in step: what the guest wrote
    /// before it asked to forget was writable before, and on the list before that.
    count: AtomicU32,
    /// The highest number that was given; written under the lock.
    latest: AtomicU64,
}

impl OutOfStep {
    pub(super) fn new() -> Self {
        Self { ring: LeafLock::new(Ring::new()), count: AtomicU32::new(0), latest: AtomicU64::new(0) }
    }

    /// Puts a page on the list, with a new number if it was there, and marks it as out of step; whether there was room. Under
    /// its bucket lock.
    ///
    /// Both at once for who copies the list: a look that finds the page there, and no way to it, is followed by links that
    /// find it marked.
    pub(super) fn add<H: Host>(&self, inside: Inside<'_, H>, handle: Handle) -> bool {
        let page = inside.page(handle.index);
        let mut ring = self.ring.lock(inside.relax());
        let place = match page.place() {
            HEAD if ring.free == HEAD => return false,
            HEAD => {
                let place = ring.free;
                ring.free = ring.at(place).older;
                ring.at(place).page = handle;
                page.set_place(place);
                self.count.fetch_add(1, Ordering::AcqRel);
                place
            }
            place => {
                ring.take_out(place);
                place
            }
        };
        let late = mutants::is(Mutant::ShadowListedBeforeMarked);
        if !late {
            page.set(UNSYNC | STALE);
        }
        ring.put_first(place, self.next_number());
        drop(ring);
        if late {
            mutants::dawdle(Mutant::ShadowListedBeforeMarked, inside.relax());
            page.set(UNSYNC | STALE);
        }
        true
    }

    /// A page as it is on the list, or not.
    pub(super) fn look_up<H: Host>(&self, inside: Inside<'_, H>, page: Handle) -> Listed {
        let mut ring = self.ring.lock(inside.relax());
        let number = match inside.page(page.index).place() {
            HEAD => 0,
            place => ring.at(place).number,
        };
        Listed { page, number }
    }

    /// Gives a page that is on the list a new number. Under the page's lock.
    pub(super) fn renew<H: Host>(&self, inside: Inside<'_, H>, index: u32) {
        let mut ring = self.ring.lock(inside.relax());
        let place = inside.page(index).place();
        if place != HEAD {
            ring.take_out(place);
            ring.put_first(place, self.next_number());
        }
    }

    /// Takes a page from the list, if it is there. Under its bucket lock.
    pub(super) fn remove<H: Host>(&self, inside: Inside<'_, H>, page: &Page) {
        self.remove_if(inside, page, |_| true);
    }

    /// Takes a page from the list unless it has another number now; whether it is not there any more. Under its bucket lock.
    pub(super) fn remove_as<H: Host>(&self, inside: Inside<'_, H>, page: &Page, number: u64) -> bool {
        self.remove_if(inside, page, |now| now == number || mutants::is(Mutant::ShadowOpenedAgainUnnoticed))
    }

    fn remove_if<H: Host>(&self, inside: Inside<'_, H>, page: &Page, may: impl FnOnce(u64) -> bool) -> bool {
        let place = page.place();
        if place == HEAD {
            return true;
        }
        let mut ring = self.ring.lock(inside.relax());
        if !may(ring.at(place).number) {
            return false;
        }
        ring.take_out(place);
        ring.at(place).older = ring.free;
        ring.free = place;
        page.set_place(HEAD);
        self.count.fetch_sub(1, Ordering::AcqRel);
        true
    }

    /// Under the lock. A read-modify-write, as is the look in [`OutOfStep::has_news`]: of two, one sees the other, and what
    /// was done before it.
    fn next_number(&self) -> u64 {
        self.latest.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Whether no page is on the list. The newest answer: that another vCPU has put one there may be known to the guest
    /// alone, which had that vCPU write the table and tell this one.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        peek(&self.count) == 0
    }

    /// The highest number that was given.
    pub(super) fn latest(&self) -> u64 {
        self.latest.load(Ordering::Acquire)
    }

    /// Whether there may be something on the list that was not looked at from `page`.
    #[inline]
    pub(super) fn has_news(&self, page: &Page) -> bool {
        !self.is_empty() && self.latest.fetch_add(0, Ordering::AcqRel) > page.in_step_to()
    }

    /// Pages on the list with higher numbers than `seen`.
    pub(super) fn since<H: Host>(&self, inside: Inside<'_, H>, seen: u64) -> Chosen {
        let nothing = Listed { page: Handle { index: 0, life: 0 }, number: 0 };
        let mut chosen = Chosen { pages: [nothing; LIST], count: 0, up_to: 0 };
        let mut ring = self.ring.lock(inside.relax());
        chosen.up_to = self.latest();
        let mut place = ring.at(HEAD).older;
        while place != HEAD && ring.at(place).number > seen {
            let Place { page, number, older, .. } = *ring.at(place);
            chosen.pages[chosen.count] = Listed { page, number };
            chosen.count += 1;
            place = older;
        }
        chosen
    }
}
