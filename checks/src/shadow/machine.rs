//! The embedder: table frames, guest memory with contents, and the record of what was written to it.
//!
//! Every write to guest memory goes through one lock and gets a tick, so that the record and the memory agree on the
//! order. Host frames that were taken from the guest are never given to it again; they are filled with entries that
//! look like page tables, and any use of them is reported.
//!
//! Beside small frames, whose memory lies here and there, there are blocks of 2 MiB that one leaf may map. A frame of one
//! that moves leaves its block broken; the block as a whole moves to a new place, and is whole there.

#![expect(unsafe_code, reason = "implementing TableFrames is a promise about memory")]

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64 as Cell, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nestling::format::{MemoryType, Npt};
use nestling::guest::Width;
use nestling::host::{Backing, BackingError, Extent, GuestMemory, Page, TableFrames, Time, Vcpus};
use nestling::sync::AtomicU64;
use nestling::{Access, Gfn, GfnRange, Hfn, Host, Slot, VcpuId};

use crate::machine::arena::Arena;

/// The first host frame of guest memory.
pub const HOME: u64 = 0x1000;
/// Small guest frames, in two slots.
pub const FRAMES: u64 = 96;
/// The first frame of the blocks, which are one slot.
pub const LARGE: u64 = 512;
/// How many blocks there are.
pub const BLOCKS: u64 = 2;
/// Frames of a block.
pub const BLOCK: u64 = 512;
/// The end of guest frames. Between the small ones and the blocks is nothing.
pub const END: u64 = LARGE + BLOCKS * BLOCK;
/// Moves of a whole block.
const BLOCK_MOVES: u64 = 6;
/// The second slot begins here; it comes and goes.
pub const SECOND: u64 = 64;
/// Guest frames whose neighbours are told of in one answer, beside as many that are told of one by one.
const TOGETHER: u64 = 2;
/// Host frames: those of all guest frames, what blocks move to, and what single frames do.
const HOST_FRAMES: u64 = MOVED + 2048;
/// The first of these, counted from the first host frame.
const MOVED: u64 = END + BLOCK_MOVES * BLOCK;
/// What a frame that was taken away holds: present in every format, with all rights, to a frame that nobody owns.
const TAKEN: u64 = 0x03f0_0067_03f0_0067;

/// One value of an entry, from a tick on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Value {
    /// Since when.
    pub since: u64,
    /// What.
    pub value: u64,
}

/// The record.
#[derive(Debug)]
pub struct Record {
    tick: u64,
    values: HashMap<(u64, u32), Vec<Value>>,
    /// Host frame of each guest frame.
    place: Vec<u64>,
    /// Guest frame of each host frame that is in use.
    owner: HashMap<u64, u64>,
    next: u64,
    /// Where the next block goes.
    next_block: u64,
    /// A frame that must not be written, because its writes are tracked.
    tracked: Option<u64>,
    /// The second slot is there, or is about to be.
    second: bool,
    /// What a CPU writes to an entry as soon as the library has marked it: guest frame, offset, value.
    after_mark: Option<(u64, u32, u64)>,
    /// What was found.
    pub violations: Vec<String>,
}

/// See the module head.
#[derive(Debug)]
pub struct ShadowMachine {
    /// Table frames; shared, so that they can be counted when the MMU is gone.
    pub arena: Arc<Arena>,
    memory: Box<[[Cell; 512]]>,
    record: Mutex<Record>,
    /// A thread loses its CPU inside the library once in so many calls; 0 for never.
    rough: u64,
    calls: Cell,
}

const fn shift(offset: u32, width: Width) -> (u32, u64) {
    match width {
        Width::Four => (offset % 8 * 8, 0xffff_ffff),
        Width::Eight => (0, u64::MAX),
    }
}

impl ShadowMachine {
    /// A machine with so many table frames.
    pub fn new(tables: usize, rough: u64) -> Self {
        let record = Record {
            tick: 1,
            values: HashMap::new(),
            place: (0..END).map(|gfn| HOME + gfn).collect(),
            owner: (0..FRAMES).chain(LARGE..END).map(|gfn| (HOME + gfn, gfn)).collect(),
            next: HOME + MOVED,
            next_block: HOME + END,
            tracked: None,
            second: false,
            after_mark: None,
            violations: Vec::new(),
        };
        let memory = (0..HOST_FRAMES).map(|_| [const { Cell::new(0) }; 512]).collect();
        Self { arena: Arc::new(Arena::new(tables)), memory, record: Mutex::new(record), rough, calls: Cell::new(0) }
    }

    /// The record. Not to be held while the library is called.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cell(&self, hfn: Hfn, offset: u32) -> &Cell {
        &self.memory[(hfn.0 - HOME) as usize][offset as usize / 8]
    }

    /// Writes an entry of the guest's memory, by host frame.
    pub fn store(&self, hfn: Hfn, offset: u32, width: Width, value: u64) {
        let mut record = self.record();
        let Some(&gfn) = record.owner.get(&hfn.0) else {
            return record.violate(format!("a write to {hfn:?}, which was taken from the guest"));
        };
        self.put(hfn, offset, width, value);
        record.note(gfn, offset, value);
    }

    fn put(&self, hfn: Hfn, offset: u32, width: Width, value: u64) {
        let (shift, mask) = shift(offset, width);
        let cell = self.cell(hfn, offset);
        let old = cell.load(Ordering::SeqCst);
        cell.store(old & !(mask << shift) | (value & mask) << shift, Ordering::SeqCst);
    }

    /// Writes an entry before the guest runs.
    pub fn prepare(&self, gfn: Gfn, offset: u32, width: Width, value: u64) {
        let hfn = Hfn(self.record().place[gfn.0 as usize]);
        self.store(hfn, offset, width, value);
    }

    /// Some CPU writes this entry, of eight bytes, as soon as the library has marked it.
    pub fn write_after_mark(&self, gfn: Gfn, offset: u32, value: u64) {
        self.record().after_mark = Some((gfn.0, offset, value));
    }

    /// Moves a frame's memory to another host frame. In the middle of an invalidation of it.
    pub fn move_frame(&self, gfn: Gfn) {
        let mut record = self.record();
        if record.next == HOME + HOST_FRAMES {
            return;
        }
        let new = record.next;
        record.next += 1;
        self.relocate(&mut record, gfn.0, new);
    }

    /// Moves all of a block to another place, where it is whole. In the middle of an invalidation of it.
    pub fn move_block(&self, block: u64) {
        let mut record = self.record();
        if record.next_block == HOME + MOVED {
            return;
        }
        let first = record.next_block;
        record.next_block += BLOCK;
        for page in 0..BLOCK {
            self.relocate(&mut record, LARGE + block * BLOCK + page, first + page);
        }
    }

    fn relocate(&self, record: &mut Record, gfn: u64, to: u64) {
        let (old, new) = (Hfn(record.place[gfn as usize]), Hfn(to));
        for word in 0..512 {
            let value = self.cell(old, word * 8).swap(TAKEN, Ordering::SeqCst);
            self.cell(new, word * 8).store(value, Ordering::SeqCst);
        }
        record.place[gfn as usize] = new.0;
        record.owner.remove(&old.0);
        record.owner.insert(new.0, gfn);
    }

    /// From here on the guest must not write to this frame, or to any again.
    pub fn set_tracked(&self, gfn: Option<Gfn>) {
        self.record().tracked = gfn.map(|gfn| gfn.0);
    }

    /// The second slot is about to be added, or was deleted.
    pub fn set_second(&self, there: bool) {
        self.record().second = there;
    }

    /// Gives the CPU away now and then.
    fn stumble(&self) {
        if self.rough > 0 && self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.rough) {
            std::thread::yield_now();
        }
    }
}

impl Record {
    /// Now.
    pub fn tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// Writes something down that must not be.
    pub fn violate(&mut self, text: String) {
        if self.violations.len() < 16 {
            self.violations.push(text);
        }
    }

    fn note(&mut self, gfn: u64, offset: u32, value: u64) {
        let since = self.tick();
        self.values.entry((gfn, offset)).or_default().push(Value { since, value });
    }

    /// The values of an entry from `from` on, each with the tick at which it ended.
    pub fn values(&self, gfn: u64, offset: u32, from: u64) -> impl Iterator<Item = (Value, u64)> + '_ {
        let written: &[Value] = self.values.get(&(gfn, offset)).map_or(&[], |values| values);
        let first = Value { since: 0, value: 0 };
        let all = std::iter::once(first).chain(written.iter().copied());
        let ends = written.iter().map(|value| value.since).chain(std::iter::once(u64::MAX));
        all.zip(ends).filter(move |(_, end)| *end > from)
    }

    /// The guest frame behind a host frame, if it is in use and its slot is there.
    pub fn owner(&self, hfn: Hfn) -> Option<u64> {
        self.owner.get(&hfn.0).copied().filter(|gfn| *gfn < SECOND || *gfn >= LARGE || self.second)
    }

    /// Whether the guest must not write there.
    pub fn is_tracked(&self, hfn: Hfn) -> bool {
        self.tracked.is_some() && self.owner(hfn) == self.tracked
    }
}

// SAFETY: the arena's pages are 4 KiB-aligned arrays of 512 atomics that live as long as the machine, each at one
// place, and are reached through atomics only; a frame is given out to one owner at a time.
unsafe impl TableFrames for ShadowMachine {
    fn alloc_table(&self) -> Option<Hfn> {
        self.arena.alloc()
    }

    fn free_table(&self, frame: Hfn) {
        self.arena.free(frame);
    }

    fn table(&self, frame: Hfn) -> NonNull<AtomicU64> {
        self.stumble();
        NonNull::from(&self.arena.entries(frame)[0])
    }
}

impl Backing for ShadowMachine {
    fn resolve(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let record = self.record();
        let hfn = record.place[gfn.0 as usize];
        let alone = gfn.0 < LARGE && !(gfn.0 / TOGETHER).is_multiple_of(2);
        let same =
            |other: &u64| !alone && record.place[*other as usize].wrapping_sub(*other) == hfn.wrapping_sub(gfn.0);
        // Of what lies farther away nothing is told.
        let near = slot.range().start.0.max(gfn.0 / BLOCK * BLOCK)..slot.range().end.0.min((gfn.0 / BLOCK + 1) * BLOCK);
        let start = (near.start..gfn.0).rev().take_while(same).last().unwrap_or(gfn.0);
        let end = (gfn.0 + 1..near.end).take_while(same).last().unwrap_or(gfn.0) + 1;
        drop(record);
        self.stumble();
        let hfn = Hfn(hfn - (gfn.0 - start));
        Ok(Extent {
            gfns: GfnRange { start: Gfn(start), end: Gfn(end) },
            hfn,
            writable: true,
            memory: MemoryType::WriteBack,
        })
    }

    fn page(&self, _slot: &Slot, gfn: Gfn, _access: Access) -> Option<Page> {
        self.stumble();
        let hfn = Hfn(self.record().place[gfn.0 as usize]);
        Some(Page { hfn, writable: true, memory: MemoryType::WriteBack })
    }
}

impl GuestMemory for ShadowMachine {
    fn load(&self, hfn: Hfn, offset: u32, width: Width) -> u64 {
        self.stumble();
        let mut record = self.record();
        if !record.owner.contains_key(&hfn.0) {
            record.violate(format!("the library reads {hfn:?}, which was taken from the guest"));
        }
        let (shift, mask) = shift(offset, width);
        self.cell(hfn, offset).load(Ordering::SeqCst) >> shift & mask
    }

    fn compare_exchange(&self, hfn: Hfn, offset: u32, width: Width, old: u64, new: u64) -> bool {
        let mut record = self.record();
        let Some(&gfn) = record.owner.get(&hfn.0) else {
            record.violate(format!("the library writes {hfn:?}, which was taken from the guest"));
            return false;
        };
        let (shift, mask) = shift(offset, width);
        let same = self.cell(hfn, offset).load(Ordering::SeqCst) >> shift & mask == old;
        if same {
            self.put(hfn, offset, width, new);
            record.note(gfn, offset, new);
            let here = |(frame, place, _): &mut (u64, u32, u64)| (*frame, *place) == (gfn, offset);
            if let Some((.., value)) = record.after_mark.take_if(here) {
                self.put(hfn, offset, width, value);
                record.note(gfn, offset, value);
            }
        }
        same
    }
}

impl Vcpus for ShadowMachine {
    /// CPUs here leave guest mode after each access.
    fn kick(&self, _vcpu: VcpuId) {}
}

impl Time for ShadowMachine {
    fn relax(&self) {
        std::thread::yield_now();
    }
}

impl Host for ShadowMachine {
    type Format = Npt;
}
