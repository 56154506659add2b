//! A machine small enough for a model checker: two-entry tables, a handful of frames, four pages of guest memory, and
//! vCPUs whose TLB keeps one translation until it is told to drop it.
//!
//! What the library reads and writes are the checker's atomics; what only the ghost knows (who owns a frame now) is
//! plain, because the checker runs one thread at a time and switches at its own operations only.

#![expect(unsafe_code, reason = "an embedder promises where tables are, and its CPU reads them")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool as Plain, AtomicU64 as PlainU64, Ordering};
use std::sync::{Arc, Mutex};

use loom::sync::Mutex as Lock;
use loom::thread::yield_now;
use nestling_loom::addr::ENTRIES;
use nestling_loom::format::{Format, Leaf, MemoryType, Npt, State};
use nestling_loom::host::{Backing, BackingError, Extent, TableFrames, Time, Vcpus};
use nestling_loom::sync::{AtomicBool, AtomicU64 as Entry};
use nestling_loom::{
    Access, Cause, Config, Fault, Gfn, GfnRange, Gpa, Hfn, Host, Level, Mmu, Outcome, Slot, SlotConfig, SlotFlags,
    SlotId, Vcpu, VcpuId, Worker,
};

/// Table frames of the machine.
const TABLES: usize = 24;
/// Guest pages of the one slot: two level-1 tables full.
const PAGES: u64 = 4;
/// The first host frame of guest memory; page *n* is at `HOME + n` until it is moved.
const HOME: u64 = 0x1000;
/// How far an invalidation moves a page.
const AWAY: u64 = 0x100;

/// One table frame.
#[derive(Debug)]
struct Frame {
    entries: Box<[Entry; ENTRIES]>,
    live: Plain,
}

/// The embedder.
#[derive(Debug)]
pub(super) struct Machine {
    tables: Box<[Frame]>,
    free: Mutex<Vec<usize>>,
    /// Kicks on their way to the vCPUs.
    kicks: [AtomicBool; 2],
    /// Host frame of each page, as the backing tells it.
    place: [PlainU64; PAGES as usize],
    /// Where the slot is. Held while the slot moves, and while an invalidation finds its frames and begins: an embedder
    /// has to know what it invalidates.
    base: Lock<Gfn>,
    /// Host frames that were taken from the guest and given to somebody else.
    gone: Mutex<Vec<u64>>,
}

impl Machine {
    fn new() -> Self {
        let entries = || Box::new(core::array::from_fn(|_| Entry::new(0)));
        Self {
            tables: (0..TABLES).map(|_| Frame { entries: entries(), live: Plain::new(false) }).collect(),
            free: Mutex::new((0..TABLES).collect()),
            kicks: [AtomicBool::new(false), AtomicBool::new(false)],
            place: core::array::from_fn(|page| PlainU64::new(HOME + page as u64)),
            base: Lock::new(Gfn(0)),
            gone: Mutex::new(Vec::new()),
        }
    }

    /// What an embedder does with memory that it took from the guest: somebody else gets it.
    fn give_away(&self, hfn: u64) {
        self.gone.lock().unwrap().push(hfn);
    }

    /// The guest touches host memory.
    fn touch(&self, hfn: Hfn) {
        assert!(!self.gone.lock().unwrap().contains(&hfn.0), "the guest reached {hfn:?}, which was taken from it");
    }

    pub(super) fn tables_in_use(&self) -> u64 {
        (TABLES - self.free.lock().unwrap().len()) as u64
    }
}

// SAFETY: a frame's number is its place in `tables`, which never moves; `alloc_table` gives each out once until it
// comes back.
unsafe impl TableFrames for Machine {
    fn alloc_table(&self) -> Option<Hfn> {
        let frame = self.free.lock().unwrap().pop()?;
        for entry in self.tables[frame].entries.iter() {
            entry.store(0, Ordering::Relaxed);
        }
        assert!(!self.tables[frame].live.swap(true, Ordering::Relaxed), "a frame was handed out twice");
        Some(Hfn(frame as u64 + 1))
    }

    fn free_table(&self, frame: Hfn) {
        let index = frame.0 as usize - 1;
        assert!(self.tables[index].live.swap(false, Ordering::Relaxed), "{frame:?} was freed twice");
        self.free.lock().unwrap().push(index);
    }

    fn table(&self, frame: Hfn) -> NonNull<Entry> {
        let table = &self.tables[frame.0 as usize - 1];
        assert!(table.live.load(Ordering::Relaxed), "{frame:?} is used after it was freed");
        NonNull::from(&*table.entries).cast()
    }
}

impl Backing for Machine {
    fn resolve(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let page = gfn.0 - slot.range().start.0;
        let hfn = Hfn(self.place[page as usize].load(Ordering::Relaxed));
        let gfns = GfnRange::new(gfn, 1).unwrap();
        Ok(Extent { gfns, hfn, writable: true, memory: MemoryType::WriteBack })
    }
}

impl Vcpus for Machine {
    fn kick(&self, vcpu: VcpuId) {
        self.kicks[usize::from(vcpu.0)].store(true, Ordering::SeqCst);
    }
}

impl Time for Machine {
    fn relax(&self) {
        yield_now();
    }
}

impl Host for Machine {
    type Format = Npt;
}

/// A VM with one slot, and the library's side of it.
pub(super) fn machine() -> Arc<Mmu<Machine>> {
    let config =
        Config { vcpus: 2, workers: 3, slots: 2, largest: Level::K4, mmio_entries: false, ..Config::default() };
    let mmu = Mmu::new(Machine::new(), config).unwrap();
    let size = PAGES << 12;
    let ram = SlotConfig { id: SlotId(0), base: Gpa(0), size, flags: SlotFlags::empty(), backing: 0 };
    mmu.worker().unwrap().add_slot(ram).unwrap();
    mmu
}

/// A guest on a vCPU.
#[derive(Debug)]
pub(super) struct Guest {
    vcpu: Vcpu<Machine>,
    tlb: Option<(Gfn, Hfn)>,
}

impl Guest {
    pub(super) fn new(mmu: &Arc<Mmu<Machine>>, id: u16) -> Self {
        Self { vcpu: mmu.vcpu(VcpuId(id)).unwrap(), tlb: None }
    }

    /// Loads a root and leaves again.
    pub(super) fn load(&mut self) {
        self.turn(None);
    }

    /// One turn in the guest: two accesses to `gfn`, unless a fault or a kick ends it; whether all were made.
    fn turn(&mut self, gfn: Option<Gfn>) -> bool {
        let mmu = Arc::clone(self.vcpu.mmu());
        let (machine, id) = (mmu.host(), usize::from(self.vcpu.id().0));
        let mut inside = self.vcpu.enter().unwrap();
        if inside.take_flush() {
            self.tlb = None;
        }
        let Some(gfn) = gfn else { return true };
        for _ in 0..2 {
            // A kick ends the turn at an instruction's boundary, and no later.
            if machine.kicks[id].swap(false, Ordering::SeqCst) {
                return false;
            }
            let cached = self.tlb.filter(|(cached, _)| *cached == gfn).map(|(_, hfn)| hfn);
            let Some(hfn) = cached.or_else(|| walk(machine, inside.root().hfn(), gfn)) else { return false };
            self.tlb = Some((gfn, hfn));
            machine.touch(hfn);
        }
        true
    }

    /// Accesses page `gfn` until it worked, or has no memory, or `tries` are over.
    pub(super) fn access(&mut self, gfn: u64, tries: usize) {
        for _ in 0..tries {
            if self.turn(Some(Gfn(gfn))) || self.fault(gfn) == Outcome::Mmio {
                return;
            }
        }
    }

    /// Only faults.
    pub(super) fn fault(&mut self, gfn: u64) -> Outcome {
        let fault = Fault { gpa: Gfn(gfn).gpa(), access: Access::Write, cause: Cause::Translation };
        self.vcpu.fault(fault).unwrap()
    }
}

/// The CPU's page walker.
fn walk(machine: &Machine, root: Hfn, gfn: Gfn) -> Option<Hfn> {
    let (mut frame, mut level) = (root, Level::L4);
    loop {
        // SAFETY: `table` gives the first of ENTRIES live entries, and the index is below that.
        let entry = unsafe { machine.table(frame).add(level.index(gfn)).as_ref() };
        match Npt::decode(entry.load(Ordering::Acquire), level) {
            State::Table(next) => (frame, level) = (next, level.down()?),
            State::Leaf(Leaf { hfn, .. }) => return Some(hfn),
            _ => return None,
        }
    }
}

/// Operations of a worker, each followed by what an embedder may do once it has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Zap the range of pages 0 and 1.
    Zap,
    /// Zap everything.
    ZapAll,
    /// Delete the slot; its memory goes to somebody else.
    Delete,
    /// Move page 0 to another host frame under an invalidation; the old one goes to somebody else.
    MovePage,
    /// Move the slot to the frames behind it.
    MoveSlot,
}

pub(super) fn work(worker: &mut Worker<Machine>, work: Work) {
    let mmu = Arc::clone(worker.mmu());
    let machine = mmu.host();
    match work {
        Work::Zap => {
            worker.zap(GfnRange::new(Gfn(0), 2).unwrap());
        }
        Work::ZapAll => {
            worker.zap_all();
        }
        Work::Delete => {
            worker.delete_slot(SlotId(0)).unwrap();
            machine.place.iter().for_each(|page| machine.give_away(page.load(Ordering::Relaxed)));
        }
        Work::MovePage => {
            let base = machine.base.lock().unwrap();
            let held = worker.invalidate(GfnRange::new(*base, 1).unwrap());
            drop(base);
            let old = machine.place[0].load(Ordering::Relaxed);
            machine.give_away(old);
            machine.place[0].store(old + AWAY, Ordering::Relaxed);
            drop(held);
        }
        Work::MoveSlot => {
            let mut base = machine.base.lock().unwrap();
            worker.move_slot(SlotId(0), Gfn(PAGES).gpa()).unwrap();
            *base = Gfn(PAGES);
        }
    }
}
