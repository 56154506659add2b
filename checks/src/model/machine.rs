//! A machine small enough for a model checker: two-entry tables, a handful of frames, four pages of guest memory, and
//! vCPUs whose TLB keeps one translation until it is told to drop it.
//!
//! What the library reads and writes are the checker's atomics; what only the ghost knows (who owns a frame now) is
//! plain, because the checker runs one thread at a time and switches at its own operations only.

#![expect(unsafe_code, reason = "an embedder promises where tables are, and its CPU reads them")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool as Plain, AtomicU64 as PlainU64, Ordering};
use std::sync::{Arc, Mutex};

use super::checker::library::addr::ENTRIES;
use super::checker::library::format::{Format, Leaf, MemoryType, Npt, Rights, State};
use super::checker::library::host::{Backing, BackingError, Extent, Page, TableFrames, Time, Vcpus};
use super::checker::library::sync::{AtomicBool, AtomicU64 as Entry};
use super::checker::library::{
    Access, AdBits, AddressSpace, Cause, Config, Fault, Gfn, GfnRange, Granularity, Hfn, Host, Level, LogConfig,
    LogStart, Mmu, Outcome, Role, Slot, SlotConfig, SlotFlags, SlotId, Split, Tracking, Vcpu, VcpuId, Worker,
};
use super::checker::{Lock, TABLES, VCPUS, yield_now};
use crate::model::scenarios::{Setup, Work};

/// Guest pages of the one slot: two level-1 tables full.
const PAGES: u64 = 4;
/// The first host frame of guest memory; page *n* is at `HOME + n` until it is moved.
const HOME: u64 = 0x1000;
/// The first host frame that a page is moved to; the next move takes the next one.
const AWAY: u64 = 0x2000;

/// One table frame.
#[derive(Debug)]
struct Frame {
    entries: Box<[Entry; ENTRIES]>,
    live: Plain,
}

/// What a free frame holds: absent entries, so that a fault which is still inside writes there and is found out.
const FREE: u64 = 0;

/// All table frames; outlives the machine, to see what is left.
#[derive(Debug)]
pub(super) struct Pool {
    tables: Box<[Frame]>,
    unused: Mutex<Vec<usize>>,
    /// The ghost has written (nothing new) to tables that others may have been freeing.
    disturbed: Plain,
}

impl Pool {
    pub(super) fn new() -> Self {
        let entries = || Box::new(core::array::from_fn(|_| Entry::new(FREE)));
        Self {
            tables: (0..TABLES).map(|_| Frame { entries: entries(), live: Plain::new(false) }).collect(),
            unused: Mutex::new((0..TABLES).collect()),
            disturbed: Plain::new(false),
        }
    }

    pub(super) fn alloc(&self) -> Option<Hfn> {
        let frame = self.unused.lock().unwrap().pop()?;
        let table = &self.tables[frame];
        for entry in table.entries.iter() {
            // By an exchange, which sees the newest value: the list of free frames is not the checker's.
            assert_eq!(entry.swap(0, Ordering::AcqRel), FREE, "a table was written after it was freed");
        }
        assert!(!table.live.swap(true, Ordering::Relaxed), "a frame was handed out twice");
        Some(Hfn(frame as u64 + 1))
    }

    pub(super) fn free(&self, frame: Hfn) {
        let index = frame.0 as usize - 1;
        let table = &self.tables[index];
        assert!(table.live.swap(false, Ordering::Relaxed), "{frame:?} was freed twice");
        table.entries.iter().for_each(|entry| entry.store(FREE, Ordering::Release));
        self.unused.lock().unwrap().push(index);
    }

    pub(super) fn table(&self, frame: Hfn) -> NonNull<Entry> {
        let table = &self.tables[frame.0 as usize - 1];
        assert!(table.live.load(Ordering::Relaxed), "{frame:?} is used after it was freed");
        NonNull::from(&*table.entries).cast()
    }

    /// An entry, as the CPU's page walker finds it.
    pub(super) fn entry(&self, frame: Hfn, index: usize) -> &Entry {
        let table = &self.tables[frame.0 as usize - 1];
        assert!(table.live.load(Ordering::Relaxed), "a page walk met {frame:?}, which was freed");
        &table.entries[index]
    }

    /// All entries of live tables, read as [`Pool::states`] reads them.
    pub(super) fn entries(&self) -> impl Iterator<Item = u64> {
        let live = self.tables.iter().filter(|table| table.live.load(Ordering::Relaxed));
        live.flat_map(|table| table.entries.iter()).map(|entry| entry.fetch_or(0, Ordering::AcqRel))
    }

    pub(super) fn in_use(&self) -> u64 {
        (TABLES - self.unused.lock().unwrap().len()) as u64
    }

    /// Panics if a free frame was written.
    pub(super) fn check_free(&self) {
        if self.disturbed.load(Ordering::Relaxed) {
            return;
        }
        let free = self.tables.iter().filter(|table| !table.live.load(Ordering::Relaxed));
        let entries = free.flat_map(|table| table.entries.iter());
        entries.for_each(|entry| assert_eq!(entry.load(Ordering::Acquire), FREE, "a freed table was written"));
    }

    /// Leaves that lead to `wanted`, or to any host frame, under any root of four levels, valid or not.
    ///
    /// A root is a live table that no other leads to. So is a table that was unlinked and not freed yet, but nothing in
    /// it is a leaf four levels down.
    pub(super) fn leaves(&self, wanted: Option<Hfn>) -> u64 {
        let numbers = 1..=TABLES as u64;
        let live = |frame: &u64| self.tables[*frame as usize - 1].live.load(Ordering::Relaxed);
        let below: Vec<u64> = numbers.clone().filter(live).flat_map(|frame| self.next(Hfn(frame), Level::L4)).collect();
        let roots = numbers.filter(live).filter(|frame| !below.contains(frame));
        roots.map(|root| self.leaves_below(Hfn(root), Level::L4, wanted)).sum()
    }

    /// Reads by an exchange of nothing, which sees the newest value and spares the checker the others.
    fn states(&self, table: Hfn, level: Level) -> impl Iterator<Item = State> {
        self.disturbed.store(true, Ordering::Relaxed);
        let entries = self.tables[table.0 as usize - 1].entries.iter();
        entries.map(move |entry| Npt::decode(entry.fetch_or(0, Ordering::AcqRel), level))
    }

    fn next(&self, table: Hfn, level: Level) -> impl Iterator<Item = u64> {
        self.states(table, level).filter_map(|state| match state {
            State::Table(next) if next.0 <= TABLES as u64 => Some(next.0),
            _ => None,
        })
    }

    fn leaves_below(&self, table: Hfn, level: Level, wanted: Option<Hfn>) -> u64 {
        let below = |state: State| match (state, level.down()) {
            (State::Table(next), Some(down)) if next.0 <= TABLES as u64 => self.leaves_below(next, down, wanted),
            (State::Leaf(Leaf { hfn, .. }), _) => u64::from(wanted.is_none_or(|wanted| wanted == hfn)),
            _ => 0,
        };
        self.states(table, level).map(below).sum()
    }
}

/// The embedder.
#[derive(Debug)]
pub(super) struct Machine {
    pool: Arc<Pool>,
    /// The backing sleeps before it answers, so that its answer is old when it is used.
    pub(super) sleeps: Plain,
    /// Long operations are to let go of the lock whenever they may.
    yields: Plain,
    /// The next host frame for a page that moves.
    fresh: PlainU64,
    /// Counts what the ghost has to put in order.
    ticks: PlainU64,
    /// Translations looked up before this tick were zapped, by a zap that has returned.
    zapped: PlainU64,
    /// A vCPU was kicked, or will not be any more.
    was_kicked: AtomicBool,
    /// Kicks on their way to the vCPUs.
    kicks: [AtomicBool; VCPUS],
    /// Host frame of each page, as the backing tells it.
    place: [PlainU64; PAGES as usize],
    /// Where the slot is. Held while the slot moves, and while an invalidation finds its frames and begins: an embedder
    /// has to know what it invalidates.
    base: Lock<Gfn>,
    /// Host frames that were taken from the guest and given to somebody else.
    gone: Mutex<Vec<u64>>,
    /// Whether the backing tells how far its memory goes, so that leaves may be huge.
    runs: Plain,
    /// How often the guest wrote each page, and what of that whoever takes the log has copied.
    written: [PlainU64; PAGES as usize],
    copied: [PlainU64; PAGES as usize],
}

impl Machine {
    fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            sleeps: Plain::new(false),
            yields: Plain::new(false),
            fresh: PlainU64::new(AWAY),
            ticks: PlainU64::new(1),
            zapped: PlainU64::new(0),
            was_kicked: AtomicBool::new(false),
            kicks: core::array::from_fn(|_| AtomicBool::new(false)),
            place: core::array::from_fn(|page| PlainU64::new(HOME + page as u64)),
            base: Lock::new(Gfn(0)),
            gone: Mutex::new(Vec::new()),
            runs: Plain::new(false),
            written: core::array::from_fn(|_| PlainU64::new(0)),
            copied: core::array::from_fn(|_| PlainU64::new(0)),
        }
    }

    /// What an embedder does with memory that it took from the guest: somebody else gets it.
    fn give_away(&self, hfn: u64) {
        self.gone.lock().unwrap().push(hfn);
    }

    fn fresh(&self) -> u64 {
        self.fresh.fetch_add(1, Ordering::Relaxed)
    }

    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::Relaxed)
    }

    /// The guest touches host memory through a translation that it looked up at `tick`.
    fn touch(&self, hfn: Hfn, tick: u64) {
        assert!(tick >= self.zapped.load(Ordering::Relaxed), "the guest used a translation that a zap had removed");
        assert!(!self.gone.lock().unwrap().contains(&hfn.0), "the guest reached {hfn:?}, which was taken from it");
    }
}

// SAFETY: a frame's number is its place in `tables`, which never moves; `alloc_table` gives each out once until it
// comes back.
unsafe impl TableFrames for Machine {
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

impl Backing for Machine {
    fn resolve(&self, slot: &Slot, gfn: Gfn, _access: Access) -> Result<Extent, BackingError> {
        let page = gfn.0 - slot.range().start.0;
        let hfn = Hfn(self.place[page as usize].load(Ordering::Relaxed));
        if self.runs.load(Ordering::Relaxed) {
            let (gfns, hfn) = (slot.range(), Hfn(HOME));
            return Ok(Extent { gfns, hfn, writable: true, memory: MemoryType::WriteBack });
        }
        let gfns = GfnRange::new(gfn, 1).unwrap();
        if self.sleeps.load(Ordering::Relaxed) {
            yield_now();
        }
        Ok(Extent { gfns, hfn, writable: true, memory: MemoryType::WriteBack })
    }

    fn page(&self, slot: &Slot, gfn: Gfn, access: Access) -> Option<Page> {
        self.resolve(slot, gfn, access).ok()?.page(gfn)
    }
}

impl Vcpus for Machine {
    fn kick(&self, vcpu: VcpuId) {
        self.kicks[usize::from(vcpu.0)].store(true, Ordering::SeqCst);
        self.was_kicked.store(true, Ordering::SeqCst);
    }
}

impl Time for Machine {
    fn relax(&self) {
        yield_now();
    }

    fn should_yield(&self) -> bool {
        self.yields.load(Ordering::Relaxed)
    }
}

impl Host for Machine {
    type Format = Npt;
}

/// A VM with one slot, the library's side of it, and its table frames.
pub(super) fn machine() -> (Arc<Mmu<Machine>>, Arc<Pool>) {
    let config = Config {
        vcpus: VCPUS as u16,
        workers: 3,
        slots: 2,
        largest: Level::M2,
        mmio_entries: false,
        ..Config::default()
    };
    let pool = Arc::new(Pool::new());
    let mmu = Mmu::new(Machine::new(Arc::clone(&pool)), config).unwrap();
    mmu.worker().unwrap().add_slot(ram(Gfn(0))).unwrap();
    (mmu, pool)
}

/// The slot, at `base`.
fn ram(base: Gfn) -> SlotConfig {
    let (space, flags) = (AddressSpace::Main, SlotFlags::empty());
    SlotConfig { id: SlotId(0), space, base: base.gpa(), size: PAGES << 12, flags, backing: 0 }
}

/// A guest on a vCPU.
#[derive(Debug)]
pub(super) struct Guest {
    vcpu: Vcpu<Machine>,
    tlb: Option<(Gfn, Hfn, u64)>,
    /// What it may write without a look at the tables: a page that it found writable and dirty.
    writable: Option<Gfn>,
    /// It has its faults handled in guest mode, if that is possible.
    pub(super) stays: bool,
}

/// A write that met a fault.
fn write_to(gfn: Gfn) -> Fault {
    Fault { gpa: gfn.gpa(), access: Access::Write, cause: Cause::Translation }
}

impl Guest {
    pub(super) fn new(mmu: &Arc<Mmu<Machine>>, id: u16) -> Self {
        Self { vcpu: mmu.vcpu(VcpuId(id)).unwrap(), tlb: None, writable: None, stays: false }
    }

    /// Loads a root and leaves again.
    pub(super) fn load(&mut self) {
        self.turn(None);
    }

    /// One turn in the guest: two accesses to `gfn`, unless a fault or a kick ends it; whether all were made.
    pub(super) fn turn(&mut self, gfn: Option<Gfn>) -> bool {
        let mmu = Arc::clone(self.vcpu.mmu());
        let (machine, id) = (mmu.host(), usize::from(self.vcpu.id().0));
        let mut inside = self.vcpu.enter().unwrap();
        if inside.take_flush().is_some() {
            self.tlb = None;
            self.writable = None;
        }
        let Some(gfn) = gfn else { return true };
        for _ in 0..2 {
            // A kick ends the turn at an instruction's boundary, and no later.
            if machine.kicks[id].swap(false, Ordering::SeqCst) {
                return false;
            }
            // An instruction takes its time: much may happen between the last look for a kick and its access.
            machine.kicks[id].load(Ordering::Relaxed);
            let cached = self.tlb.filter(|(cached, ..)| *cached == gfn).map(|(_, hfn, tick)| (hfn, tick));
            let root = inside.root().hfn();
            let look = || {
                let tick = machine.tick();
                walk(machine, root, gfn).map(|hfn| (hfn, tick))
            };
            let mut fix = || self.stays && inside.fix_at_once(write_to(gfn));
            let found = cached.or_else(look).or_else(|| if fix() { look() } else { None });
            let Some((hfn, tick)) = found else { return false };
            self.tlb = Some((gfn, hfn, tick));
            machine.touch(hfn, tick);
        }
        true
    }

    /// Accesses page `gfn` until it worked, or has no memory, or `tries` are over; whether it came to an end.
    pub(super) fn access(&mut self, gfn: u64, tries: usize) -> bool {
        (0..tries).any(|_| self.turn(Some(Gfn(gfn))) || self.fault(gfn) == Outcome::Mmio)
    }

    /// Accesses one page of the slot after the other, `turns` times, with the TLB that it has.
    pub(super) fn wander(&mut self, turns: u64) {
        for turn in 0..turns {
            self.stays = turn / PAGES % 2 == 1;
            // Zaps may get in the way for long: whether it makes progress is another scenario's question.
            self.access(turn % PAGES, 2);
        }
    }

    /// Writes page `gfn` so often if it gets that far, in one turn while nothing is in the way.
    pub(super) fn write(&mut self, gfn: u64, times: usize) {
        let mut left = times;
        for _ in 0..8 {
            left -= self.write_turn(Gfn(gfn), left);
            if left == 0 {
                return;
            }
            if self.fault(gfn) == Outcome::Retry {
                yield_now();
            }
        }
        // What it could not write it has not written: in some orders the checker lets nobody else go on.
    }

    /// One turn of writes; how many were made.
    fn write_turn(&mut self, gfn: Gfn, times: usize) -> usize {
        let mmu = Arc::clone(self.vcpu.mmu());
        let (machine, id) = (mmu.host(), usize::from(self.vcpu.id().0));
        let mut inside = self.vcpu.enter().unwrap();
        if inside.take_flush().is_some() {
            self.tlb = None;
            self.writable = None;
        }
        let sets_bits = inside.role().ad_bits() == AdBits::On;
        for done in 0..times {
            if machine.kicks[id].swap(false, Ordering::SeqCst) {
                return done;
            }
            machine.kicks[id].load(Ordering::Relaxed);
            let root = inside.root().hfn();
            let walk = || walk_to_write(machine, root, gfn, sets_bits);
            let mut fix = || self.stays && inside.fix_at_once(write_to(gfn));
            if self.writable != Some(gfn) && !walk() && !(fix() && walk()) {
                return done;
            }
            self.writable = Some(gfn);
            machine.written[gfn.0 as usize].fetch_add(1, Ordering::Relaxed);
        }
        times
    }

    /// Turns to tables without accessed and dirty bits.
    pub(super) fn without_ad_bits(&mut self) {
        self.vcpu.set_role(self.vcpu.role().with_ad_bits(AdBits::Off));
    }

    /// Runs on a root of this level from now on.
    pub(super) fn switch(&mut self, level: Level) {
        self.vcpu.set_role(Role::new(level).unwrap());
        self.load();
    }

    /// Only faults.
    pub(super) fn fault(&mut self, gfn: u64) -> Outcome {
        self.vcpu.fault(write_to(Gfn(gfn))).unwrap()
    }
}

/// The CPU's page walker.
fn walk(machine: &Machine, root: Hfn, gfn: Gfn) -> Option<Hfn> {
    let (mut frame, mut level) = (root, Level::L4);
    loop {
        // SAFETY: `table` gives the first of ENTRIES live entries, and the index is below that.
        let entry = unsafe { machine.table(frame).add(level.index(gfn)).as_ref() };
        let raw = entry.load(Ordering::Acquire);
        // Still live, after the look as well.
        machine.table(frame);
        match Npt::decode(raw, level) {
            State::Table(next) => (frame, level) = (next, level.down()?),
            State::Leaf(Leaf { hfn, .. }) => return Some(hfn),
            _ => return None,
        }
    }
}

/// The CPU's page walker on behalf of a write: as the manual has it, with the dirty bit set before the write. Whether it
/// may be made.
fn walk_to_write(machine: &Machine, root: Hfn, gfn: Gfn, sets_bits: bool) -> bool {
    let (mut frame, mut level) = (root, Level::L4);
    loop {
        // SAFETY: `table` gives the first of ENTRIES live entries, and the index is below that.
        let entry = unsafe { machine.table(frame).add(level.index(gfn)).as_ref() };
        let raw = entry.load(Ordering::Acquire);
        machine.table(frame);
        match (Npt::decode(raw, level), level.down()) {
            (State::Table(next), Some(down)) => (frame, level) = (next, down),
            (State::Leaf(leaf), _) if leaf.rights.contains(Rights::WRITE) => {
                let dirty = raw | if sets_bits { Npt::DIRTY } else { 0 };
                if dirty == raw || entry.compare_exchange(raw, dirty, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    return true;
                }
            }
            _ => return false,
        }
    }
}

/// Before anything is mapped.
pub(super) fn before_mapping(machine: &Machine, setup: Option<Setup>) {
    machine.runs.store(matches!(setup, Some(Setup::HugeLogged | Setup::Split)), Ordering::Relaxed);
}

/// When what the scenario wants is mapped.
pub(super) fn after_mapping(worker: &mut Worker<Machine>, setup: Setup) {
    let (tracking, granularity) = match setup {
        Setup::LogByProtection => (Tracking::WriteProtect, Granularity::Page),
        Setup::LogByDirtyBit => (Tracking::DirtyBit, Granularity::Page),
        Setup::HugeLogged => (Tracking::DirtyBit, Granularity::Leaf),
        Setup::Split => return worker.split(SlotId(0)).unwrap(),
    };
    let config = LogConfig { tracking, granularity, start: LogStart::Clean, split: Split::OnDemand };
    worker.start_log(SlotId(0), config).unwrap();
}

/// Copies the pages that the first word of a log names.
fn copy(machine: &Machine, bits: u64) {
    for page in (0..PAGES as usize).filter(|page| bits >> page & 1 != 0) {
        machine.copied[page].store(machine.written[page].load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn harvest(worker: &mut Worker<Machine>) {
    let mut bits = [0];
    worker.harvest_dirty(SlotId(0), 0, &mut bits).unwrap();
    copy(worker.mmu().host(), bits[0]);
}

/// When nobody writes any more: what was written is in a copy, or in the log, or else in a dirty bit.
pub(super) fn check_dirty(worker: &mut Worker<Machine>) {
    let mmu = Arc::clone(worker.mmu());
    let (machine, logged) = (mmu.host(), worker.slots()[0].is_logged());
    if logged {
        harvest(worker);
    }
    for page in 0..PAGES as usize {
        let (written, copied) = (&machine.written[page], &machine.copied[page]);
        let (written, copied) = (written.load(Ordering::Relaxed), copied.load(Ordering::Relaxed));
        if logged {
            assert_eq!(written, copied, "page {page} was written, and the log does not say so");
        } else if written > 0 {
            let walk = worker.walk(mmu.role(), Gfn(page as u64)).unwrap();
            let dirty = walk.last().is_some_and(|step| matches!(step.state, State::Leaf(Leaf { dirty: true, .. })));
            assert!(dirty, "page {page} was written, and its leaf does not say so");
        }
    }
}

pub(super) fn work(worker: &mut Worker<Machine>, work: Work) {
    let mmu = Arc::clone(worker.mmu());
    let machine = mmu.host();
    match work {
        Work::Zap => {
            worker.zap(GfnRange::new(Gfn(0), 2).unwrap());
            machine.was_kicked.store(true, Ordering::SeqCst);
        }
        Work::Harvest => harvest(worker),
        Work::GetAndClear => {
            let mut bits = [0];
            worker.get_dirty(SlotId(0), 0, &mut bits).unwrap();
            worker.clear_dirty(SlotId(0), 0, &bits).unwrap();
            copy(machine, bits[0]);
        }
        Work::Split => worker.split(SlotId(0)).unwrap(),
        Work::Collapse => drop(worker.collapse(SlotId(0)).unwrap()),
        Work::ZapAll => {
            worker.zap_all();
        }
        Work::ZapAllThenMovePage => {
            worker.zap_all();
            move_page(worker, machine, false);
        }
        Work::Delete => {
            worker.delete_slot(SlotId(0)).unwrap();
            machine.place.iter().for_each(|page| machine.give_away(page.load(Ordering::Relaxed)));
        }
        Work::DeleteAndAdd => {
            let base = machine.base.lock().unwrap();
            worker.delete_slot(SlotId(0)).unwrap();
            for page in &machine.place {
                machine.give_away(page.load(Ordering::Relaxed));
                page.store(machine.fresh(), Ordering::Relaxed);
            }
            worker.add_slot(ram(*base)).unwrap();
        }
        Work::ZapYielding => {
            machine.yields.store(true, Ordering::Relaxed);
            worker.zap(GfnRange::new(Gfn(0), PAGES).unwrap());
        }
        Work::MovePage => move_page(worker, machine, false),
        Work::TryMovePage => try_move_page(worker, machine),
        Work::MovePageTwice => (0..2).for_each(|_| move_page(worker, machine, false)),
        Work::MovePageLooking => move_page(worker, machine, true),
        Work::ZapInZap => {
            while !machine.was_kicked.load(Ordering::SeqCst) {
                yield_now();
            }
            let called = machine.tick();
            worker.zap(GfnRange::new(Gfn(0), 2).unwrap());
            machine.zapped.store(called, Ordering::Relaxed);
        }
        Work::MoveSlot => {
            let mut base = machine.base.lock().unwrap();
            worker.move_slot(SlotId(0), Gfn(PAGES).gpa()).unwrap();
            *base = Gfn(PAGES);
        }
    }
}

fn move_page(worker: &mut Worker<Machine>, machine: &Machine, look: bool) {
    let base = machine.base.lock().unwrap();
    let held = worker.invalidate(GfnRange::new(*base, 1).unwrap());
    drop(base);
    relocate(machine, look);
    drop(held);
}

fn try_move_page(worker: &mut Worker<Machine>, machine: &Machine) {
    let base = machine.base.lock().unwrap();
    let Ok(held) = worker.try_invalidate(GfnRange::new(*base, 1).unwrap()) else { return };
    drop(base);
    relocate(machine, false);
    drop(held);
}

/// Page 0 goes to another host frame while it is invalidated.
fn relocate(machine: &Machine, look: bool) {
    let old = machine.place[0].load(Ordering::Relaxed);
    if look {
        assert_eq!(machine.pool.leaves(Some(Hfn(old))), 0, "memory that is given back is still mapped");
    }
    machine.give_away(old);
    // Whatever may happen in an invalidation happens here: after the memory went, before the backing says so.
    yield_now();
    machine.place[0].store(machine.fresh(), Ordering::Relaxed);
}
