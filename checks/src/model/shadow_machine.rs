//! The embedder of a shadowed guest under a model checker, and the ghost that knows what each CPU may still believe.
//!
//! Guest memory is the checker's atomics, so that the library's look at a guest's entry races with the guest's write.
//! Looks are exchanges of nothing, which see the newest value: what is checked is the library's order of things, not the
//! guest's own. The record of writes is plain, and made in one step with each write.

#![expect(unsafe_code, reason = "an embedder promises where tables are")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use super::checker::library::addr::ENTRIES;
use super::checker::library::format::{MemoryType, Npt};
use super::checker::library::guest::{CpuFeatures, Width};
use super::checker::library::host::{Backing, BackingError, Extent, GuestMemory, Page, TableFrames, Time, Vcpus};
use super::checker::library::shadow::ShadowConfig;
use super::checker::library::sync::{AtomicBool, AtomicU64 as Entry};
use super::checker::library::{
    Access, AddressSpace, Config, Gfn, GfnRange, Gpa, Hfn, Host, Level, Mmu, Slot, SlotConfig, SlotFlags, SlotId,
    VcpuId, Worker,
};
use super::checker::yield_now;
use super::machine::Pool;
use crate::model::shadow::{Do, FRAMES, LARGE_PAGE, ROOT, ShadowScenario, TABLES};

/// vCPUs of the machine: two that do something, and one that is in their way.
const VCPUS: usize = 3;
/// The first host frame of guest memory.
const HOME: u64 = 0x100;
/// Host frames: those of the guest, and as many moves.
const HOST_FRAMES: u64 = FRAMES + 8;
/// What tells a leaf of shadow tables from a link (bit 9: the backing lets the guest write).
const LEAF: u64 = 1 << 9;

/// What the guest wrote, and where its memory is.
#[derive(Debug)]
pub(super) struct Ghost {
    tick: u64,
    /// Of each entry of each frame: since when it has which value.
    values: [[Vec<(u64, u64)>; ENTRIES]; FRAMES as usize],
    /// Host frame of each guest frame.
    place: [Option<u64>; FRAMES as usize],
    next: u64,
}

impl Ghost {
    pub(super) fn tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    fn owner(&self, hfn: Hfn) -> Option<u64> {
        (0..FRAMES).find(|gfn| self.place[*gfn as usize] == Some(hfn.0))
    }

    fn note(&mut self, hfn: Hfn, offset: u32, value: u64) {
        let (owner, tick) = (self.owner(hfn).expect("only the guest's memory is written"), self.tick());
        self.values[owner as usize][offset as usize / 8].push((tick, value));
    }

    /// Whether a CPU that forgot everything of `page` at `from` may reach `hfn` by it under `root`: some walk from the top
    /// down, each entry read after `from` and not before the one above, leads there.
    pub(super) fn may(&self, root: u64, from: u64, page: u64, access: Access, hfn: Hfn) -> bool {
        self.owner(hfn).is_some_and(|wanted| self.leads(3, root, from, page, access, &|gfn| gfn == wanted))
    }

    /// Whether the guest's tables allow the access as they are.
    pub(super) fn allows_now(&mut self, page: u64, access: Access) -> bool {
        let now = self.tick();
        self.leads(3, ROOT, now, page, access, &|gfn| self.place[gfn as usize].is_some())
    }

    fn leads(&self, level: u32, table: u64, from: u64, page: u64, access: Access, is: &dyn Fn(u64) -> bool) -> bool {
        let values = &self.values[table as usize][(page >> (level - 1)) as usize % ENTRIES];
        let ends = values.iter().skip(1).map(|(since, _)| *since).chain([u64::MAX]);
        values.iter().zip(ends).filter(|(_, end)| *end > from).any(|((since, value), _)| {
            let (next, pointer) = (value >> 12, level == 3);
            let allowed = value & 1 != 0 && (pointer || access != Access::Write || value & 2 != 0);
            allowed
                && match level {
                    1 => is(next),
                    2 if value & LARGE_PAGE != 0 => is(next + page % ENTRIES as u64),
                    _ => self.leads(level - 1, next, from.max(*since), page, access, is),
                }
        })
    }
}

/// See the module head.
#[derive(Debug)]
pub(super) struct ShadowMachine {
    pub(super) pool: Arc<Pool>,
    memory: Box<[[Entry; ENTRIES]]>,
    ghost: Mutex<Ghost>,
    /// [`ShadowScenario::at_hand`].
    at_hand: bool,
    /// [`ShadowScenario::whole`].
    whole: bool,
    /// Kicks on their way to the vCPUs.
    pub(super) kicks: [AtomicBool; VCPUS],
}

impl ShadowMachine {
    fn new(pool: Arc<Pool>, at_hand: bool, whole: bool) -> Self {
        let mut values: [[Vec<(u64, u64)>; ENTRIES]; FRAMES as usize] = Default::default();
        for (frame, entry, value) in TABLES {
            values[frame as usize][entry as usize].push((0, value));
        }
        let first = |frame: u64, entry: usize| {
            let values = values.get(frame as usize).and_then(|frame| frame[entry].first());
            Entry::new(values.map_or(0, |(_, value)| *value))
        };
        let memory = (0..HOST_FRAMES).map(|frame| core::array::from_fn(|entry| first(frame, entry))).collect();
        let place = core::array::from_fn(|frame| Some(HOME + frame as u64));
        let ghost = Mutex::new(Ghost { tick: 1, values, place, next: HOME + FRAMES });
        Self { pool, memory, ghost, at_hand, whole, kicks: core::array::from_fn(|_| AtomicBool::new(false)) }
    }

    /// Not to be held over an operation of the checker's.
    pub(super) fn ghost(&self) -> MutexGuard<'_, Ghost> {
        self.ghost.lock().unwrap()
    }

    fn cell(&self, hfn: Hfn, offset: u32) -> &Entry {
        &self.memory[(hfn.0 - HOME) as usize][offset as usize / 8]
    }

    /// The guest writes an entry that it reached.
    pub(super) fn store(&self, hfn: Hfn, offset: u32, value: u64) {
        self.cell(hfn, offset).swap(value, Ordering::Release);
        self.ghost().note(hfn, offset, value);
    }

    /// The memory of a guest frame goes elsewhere, in the middle of an invalidation.
    fn relocate(&self, gfn: Gfn) {
        let old = self.ghost().place[gfn.0 as usize];
        let Some(old) = old.map(Hfn) else { return };
        let new = Hfn(self.ghost().next);
        for offset in (0..ENTRIES as u32).map(|entry| entry * 8) {
            let value = self.cell(old, offset).swap(0, Ordering::Acquire);
            self.cell(new, offset).swap(value, Ordering::Release);
        }
        let mut ghost = self.ghost();
        ghost.next += 1;
        ghost.place[gfn.0 as usize] = Some(new.0);
    }

    /// Leaves in all tables.
    pub(super) fn leaves(&self) -> u64 {
        self.pool.entries().filter(|raw| raw & (LEAF | 1) == LEAF | 1).count() as u64
    }
}

// SAFETY: as for the pool, which the other machine uses in the same way.
unsafe impl TableFrames for ShadowMachine {
    fn alloc_table(&self) -> Option<Hfn> {
        self.pool.alloc()
    }

    fn free_table(&self, frame: Hfn) {
        self.pool.free(frame);
    }

    fn table(&self, frame: Hfn) -> NonNull<Entry> {
        self.pool.table(frame)
    }
}

impl Backing for ShadowMachine {
    fn resolve(&self, _slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let place = self.ghost().place;
        let hfn = place[gfn.0 as usize].ok_or(BackingError::NotBacked)?;
        let block = GfnRange::block(Level::M2, gfn);
        let first = hfn - (gfn.0 - block.start.0);
        let whole =
            self.whole && (block.start.0..block.end.0).zip(first..).all(|(gfn, hfn)| place[gfn as usize] == Some(hfn));
        let (gfns, hfn) = if whole { (block, first) } else { (GfnRange::new(gfn, 1).unwrap(), hfn) };
        Ok(Extent { gfns, hfn: Hfn(hfn), writable: true, memory: MemoryType::WriteBack })
    }

    fn page(&self, slot: &Slot, gfn: Gfn, access: Access) -> Option<Page> {
        self.at_hand.then(|| self.resolve(slot, gfn, access).ok()?.page(gfn)).flatten()
    }
}

impl GuestMemory for ShadowMachine {
    fn load(&self, hfn: Hfn, offset: u32, _width: Width) -> u64 {
        assert!(self.ghost().owner(hfn).is_some(), "the library reads {hfn:?}, which was taken from the guest");
        self.cell(hfn, offset).fetch_or(0, Ordering::Acquire)
    }

    fn compare_exchange(&self, hfn: Hfn, offset: u32, _width: Width, old: u64, new: u64) -> bool {
        assert!(self.ghost().owner(hfn).is_some(), "the library writes {hfn:?}, which was taken from the guest");
        let done = self.cell(hfn, offset).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if done {
            self.ghost().note(hfn, offset, new);
        }
        done
    }
}

impl Vcpus for ShadowMachine {
    fn kick(&self, vcpu: VcpuId) {
        self.kicks[usize::from(vcpu.0)].store(true, Ordering::SeqCst);
    }
}

impl Time for ShadowMachine {
    fn relax(&self) {
        yield_now();
    }
}

impl Host for ShadowMachine {
    type Format = Npt;
}

/// A VM with one slot whose guest is shadowed.
pub(super) fn machine(scenario: &ShadowScenario) -> Arc<Mmu<ShadowMachine>> {
    let ShadowScenario { pages, at_hand, whole, .. } = *scenario;
    let config = Config { vcpus: VCPUS as u16, workers: 3, slots: 2, mmio_entries: false, ..Config::default() };
    let mmu = Mmu::new(ShadowMachine::new(Arc::new(Pool::new()), at_hand, whole), config).unwrap();
    let cpu = CpuFeatures { physical_bits: 40, gigantic_pages: false };
    mmu.enable_shadow(ShadowConfig { pages, cpu }).unwrap();
    let (space, flags) = (AddressSpace::Main, SlotFlags::empty());
    let slot = SlotConfig { id: SlotId(0), space, base: Gpa(0), size: FRAMES << 12, flags, backing: 0 };
    mmu.worker().unwrap().add_slot(slot).unwrap();
    mmu
}

/// The host's part of a scenario.
pub(super) fn work(worker: &mut Worker<ShadowMachine>, what: Do) {
    let mmu = Arc::clone(worker.mmu());
    match what {
        Do::Zap => {
            worker.zap(GfnRange::new(Gfn(0), 2).unwrap());
        }
        Do::ZapAll => {
            worker.zap_all();
        }
        Do::Move(frame) => {
            let held = worker.invalidate(GfnRange::new(Gfn(frame), 1).unwrap());
            mmu.host().relocate(Gfn(frame));
            drop(held);
        }
        // A second one finds it gone.
        Do::Delete if worker.delete_slot(SlotId(0)).is_ok() => {
            let mut ghost = mmu.host().ghost();
            ghost.place = [None; FRAMES as usize];
        }
        _ => {}
    }
}
