//! Table frames from a bounded arena that remembers.
//!
//! Each frame has a life number, odd while it is given out. Whoever reads a table through a frame whose life has
//! ended (the library, or a CPU's page walk) is reported. A freed frame is filled with entries that look valid and
//! lead to [`POISON`], a frame that nobody owns; they are checked when the frame is given out again, so a write after
//! free is found as well. Frames are reused first in, first out, which keeps the poison in place for long.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use nestling::Hfn;
use nestling::sync::AtomicU64;

/// Number of the arena's first frame: below 4 GiB, where the root of a PAE table has to be.
pub const FIRST: u64 = 0xf_0000;
/// The host frame to which the entries of a freed table lead.
pub const POISON: Hfn = Hfn(0x3_dead_beef);
/// A present entry with all rights in both formats, for a table as well as for a 4 KiB leaf.
const POISONED: u64 = POISON.0 << 12 | 0x807;

/// When the arena refuses to give a frame although it has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refuse {
    /// Never.
    Never,
    /// Each time the count of requests is a multiple of this.
    Every(u64),
    /// From this number of further requests on.
    After(u64),
}

/// What went wrong with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Misuse {
    /// Freed although it was not given out.
    DoubleFree(Hfn),
    /// A table was asked for by a number that is not given out.
    UseAfterFree(Hfn),
    /// A freed frame no longer holds its poison.
    WriteAfterFree(Hfn),
    /// A number that was never the arena's.
    NotATable(Hfn),
}

#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([AtomicU64; 512]);

/// One frame, borrowed.
struct Frame<'a> {
    /// Odd while given out.
    life: &'a AtomicU32,
    page: &'a Page,
}

#[derive(Debug)]
struct Free {
    frames: VecDeque<usize>,
    refuse: Refuse,
    requests: u64,
    in_vain: u64,
}

/// See the module head.
#[derive(Debug)]
pub struct Arena {
    lives: Box<[AtomicU32]>,
    pages: Box<[Page]>,
    /// Handed out for numbers that are no table, so that the library can go on to its own end.
    sink: Box<Page>,
    free: Mutex<Free>,
    live: AtomicUsize,
    misuse: Mutex<Vec<Misuse>>,
}

fn page() -> Page {
    Page([const { AtomicU64::new(0) }; 512])
}

impl Arena {
    /// An arena of `frames` frames.
    pub fn new(frames: usize) -> Self {
        Self {
            lives: (0..frames).map(|_| AtomicU32::new(0)).collect(),
            pages: (0..frames).map(|_| page()).collect(),
            sink: Box::new(page()),
            free: Mutex::new(Free { frames: (0..frames).collect(), refuse: Refuse::Never, requests: 0, in_vain: 0 }),
            live: AtomicUsize::new(0),
            misuse: Mutex::default(),
        }
    }

    /// Frames given out now.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Requests for which there was no frame.
    pub fn in_vain(&self) -> u64 {
        self.free.lock().expect("no check panics inside").in_vain
    }

    /// Sets when requests are refused from now on.
    pub fn refuse(&self, refuse: Refuse) {
        self.free.lock().expect("no check panics inside").refuse = refuse;
    }

    /// What went wrong since the last time that this was asked.
    pub fn take_misuse(&self) -> Vec<Misuse> {
        std::mem::take(&mut *self.misuse.lock().expect("no check panics inside"))
    }

    fn report(&self, misuse: Misuse) {
        let mut list = self.misuse.lock().expect("no check panics inside");
        if list.len() < 64 {
            list.push(misuse);
        }
    }

    fn frame(&self, hfn: Hfn) -> Option<Frame<'_>> {
        let index = usize::try_from(hfn.0.checked_sub(FIRST)?).ok()?;
        Some(Frame { life: self.lives.get(index)?, page: self.pages.get(index)? })
    }

    pub(crate) fn alloc(&self) -> Option<Hfn> {
        let mut free = self.free.lock().expect("no check panics inside");
        free.requests += 1;
        match &mut free.refuse {
            Refuse::Never => {}
            Refuse::Every(n) => {
                let n = *n;
                if free.requests.is_multiple_of(n) {
                    return None;
                }
            }
            Refuse::After(0) => return None,
            Refuse::After(left) => *left -= 1,
        }
        let Some(index) = free.frames.pop_front() else {
            free.in_vain += 1;
            return None;
        };
        drop(free);
        let (hfn, page) = (Hfn(FIRST + index as u64), &self.pages[index]);
        let fresh = if self.lives[index].load(Ordering::Relaxed) == 0 { 0 } else { POISONED };
        for cell in &page.0 {
            if cell.swap(0, Ordering::Relaxed) != fresh {
                self.report(Misuse::WriteAfterFree(hfn));
            }
        }
        self.lives[index].fetch_add(1, Ordering::Release);
        self.live.fetch_add(1, Ordering::Relaxed);
        Some(hfn)
    }

    pub(crate) fn free(&self, hfn: Hfn) {
        let Some(frame) = self.frame(hfn) else { return self.report(Misuse::NotATable(hfn)) };
        let life = frame.life.load(Ordering::Relaxed);
        let ends =
            life % 2 == 1 && frame.life.compare_exchange(life, life + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if !ends {
            return self.report(Misuse::DoubleFree(hfn));
        }
        frame.page.0.iter().for_each(|cell| cell.store(POISONED, Ordering::Release));
        self.live.fetch_sub(1, Ordering::Relaxed);
        self.free.lock().expect("no check panics inside").frames.push_back((hfn.0 - FIRST) as usize);
    }

    /// The entries of a table; reports a frame that is not given out.
    pub(crate) fn entries(&self, hfn: Hfn) -> &[AtomicU64; 512] {
        let Some(frame) = self.frame(hfn) else {
            self.report(Misuse::NotATable(hfn));
            return &self.sink.0;
        };
        if frame.life.load(Ordering::Acquire) % 2 == 0 {
            self.report(Misuse::UseAfterFree(hfn));
        }
        &frame.page.0
    }

    /// Which life of the frame this is; even or `None` when it is not given out.
    pub fn life(&self, hfn: Hfn) -> Option<u32> {
        self.frame(hfn).map(|frame| frame.life.load(Ordering::Acquire))
    }

    /// An entry of a table in the life `life`; `None` if that life is over, before or after the read.
    pub fn entry(&self, hfn: Hfn, life: u32, index: usize) -> Option<&AtomicU64> {
        let frame = self.frame(hfn)?;
        (frame.life.load(Ordering::Acquire) == life && life % 2 == 1).then_some(&frame.page.0[index])
    }
}
