//! Random sequences in one thread.
//!
//! The vCPU is outside guest mode while a worker works, but its TLB keeps everything: what a worker took must be
//! forgotten at the next entry, because the library says so, or the ghost sees the access. After every operation the
//! whole tree is read and compared, and the counters with it.

mod dirty;

use std::sync::Arc;

use nestling::format::{Ept, Npt};
use nestling::{
    Access, AdBits, AddressSpace, Config, FaultError, Gfn, GfnRange, Level, Mmu, Role, SlotConfig, SlotError,
    SlotFlags, SlotId, SlotZap, State, VcpuId, Worker,
};

pub use dirty::LogOp;

use crate::ghost::object::Shape;
use crate::ghost::tree::Leaf;
use crate::ghost::{Placement, Violation};
use crate::machine::arena::Refuse;
use crate::machine::cpu::{Cpu, Seen};
use crate::machine::guest::{Done, GuestCpu, Manners};
use crate::machine::{Build, Machine, check_tables};

/// A frame of the small world that programs live in: block number (of 2 MiB) and page in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    /// Block of 2 MiB.
    pub block: u8,
    /// Page in it; most are near the block's edges.
    pub page: u16,
}

/// An operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Add a slot.
    Add {
        /// Its number.
        id: u8,
        /// Whether it is for system-management mode.
        smm: bool,
        /// Its first frame.
        at: Spot,
        /// Its length in frames.
        pages: u64,
        /// How its memory lies.
        shape: Lie,
        /// Whether it is read-only.
        read_only: bool,
    },
    /// Delete a slot.
    Delete(u8),
    /// Move a slot.
    Move(u8, Spot),
    /// Change a slot's flags.
    Flags {
        /// The slot.
        id: u8,
        /// Whether it becomes read-only.
        read_only: bool,
    },
    /// A guest access, by one of two vCPUs.
    Touch {
        /// Which one.
        second: bool,
        /// Where.
        at: Spot,
        /// What: read, write, fetch.
        access: u8,
    },
    /// Zap a range.
    Zap(Spot, u64),
    /// Zap everything, by making all roots obsolete.
    ZapAll,
    /// One of the vCPUs turns to a role.
    Turn {
        /// Which one.
        second: bool,
        /// Whether to 5 levels.
        five: bool,
        /// Whether to system-management mode.
        smm: bool,
        /// Whether to tables without accessed and dirty bits.
        plain: bool,
    },
    /// Invalidate a range, and move its pages or not.
    Invalidate(Spot, u64, bool),
    /// Touch a frame while a range is invalidated.
    TouchDuring(Spot, u64, Spot),
    /// From now on table frames run out after so many requests.
    Starve(u8),
    /// Something about the dirty log of a slot.
    Log(u8, LogOp),
    /// Track writes to a frame, or track them once less.
    Track(Spot, bool),
    /// Age a range, or only look at its age.
    Age(Spot, u64, bool),
    /// The embedder writes to a range, by the vCPU or by the worker.
    Device(bool, Spot, u64),
}

/// How a slot's memory lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// One run, congruent with the slot in the largest leaf's size.
    Aligned,
    /// One run, off by a page.
    Crooked,
    /// Pieces of so many pages with a frame left out between them.
    Pieces(u16),
    /// One run, and the host does not let the guest write.
    HostReadOnly,
}

/// What a program runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setting {
    /// The root tables' level.
    pub root_level: Level,
    /// The largest leaf.
    pub largest: Level,
    /// What a change of a slot zaps.
    pub slot_zap: SlotZap,
    /// Whether accesses without memory leave entries.
    pub mmio_entries: bool,
    /// Where block 0 is, in blocks of 2 MiB.
    pub base_block: u64,
    /// Questions between two yields, 0 for never.
    pub restless: u64,
}

/// A machine with two vCPUs and a worker in one thread.
#[derive(Debug)]
pub struct Single<F: Cpu> {
    mmu: Arc<Mmu<Machine<F>>>,
    worker: Worker<Machine<F>>,
    cpus: [GuestCpu<F>; 2],
    setting: Setting,
}

/// Tries of one access in one thread: a frozen entry or a changing slot can not be met, so few are enough.
const PATIENCE: u64 = 8;

impl<F: Cpu> Single<F> {
    /// A machine for `setting`.
    pub fn new(setting: Setting) -> Self {
        let Setting { root_level, largest, slot_zap, mmio_entries, restless, .. } = setting;
        let config = Config { vcpus: 2, workers: 2, slots: 6, root_level, largest, slot_zap, mmio_entries };
        let mmu = Machine::<F>::build(Build { tables: 256, restless, ..Build::default() }, config);
        let worker = mmu.worker().expect("there is memory for a worker");
        let cpu = |id| GuestCpu::new(&mmu, VcpuId(id), 0x5eed + u64::from(id), Manners::Right).with_patience(PATIENCE);
        Self { worker, cpus: [cpu(0), cpu(1)], mmu, setting }
    }

    fn gfn(&self, at: Spot) -> Gfn {
        Gfn((self.setting.base_block + u64::from(at.block)) * 512 + u64::from(at.page % 512))
    }

    fn range(&self, at: Spot, pages: u64) -> GfnRange {
        GfnRange::new(self.gfn(at), pages).expect("the small world lies low")
    }

    /// Carries out one operation and checks everything after it.
    pub fn run(&mut self, op: Op) {
        self.act(op);
        self.check();
    }

    /// Carries out one operation; the tables are not looked at.
    pub fn act(&mut self, op: Op) {
        match op {
            Op::Add { id, smm, at, pages, shape, read_only } => self.add(id, space(smm), at, pages, shape, read_only),
            Op::Delete(id) => self.delete(SlotId(id.into())),
            Op::Move(id, at) => self.move_slot(SlotId(id.into()), self.gfn(at)),
            Op::Flags { id, read_only } => self.flags(SlotId(id.into()), read_only),
            Op::Touch { second, at, access } => self.touch(second.into(), self.gfn(at), access),
            Op::Zap(at, pages) => self.zap(self.range(at, pages)),
            Op::ZapAll => self.zap_all(),
            Op::Turn { second, five, smm, plain } => {
                let level = if five { Level::L5 } else { Level::L4 };
                let bits = if plain { AdBits::Off } else { AdBits::On };
                let role = Role::new(level).expect("roots have these levels").in_space(space(smm)).with_ad_bits(bits);
                self.cpus[usize::from(second)].set_role(role);
            }
            Op::Invalidate(at, pages, moved) => self.invalidate(self.range(at, pages), moved, None),
            Op::TouchDuring(at, pages, touch) => {
                self.invalidate(self.range(at, pages), true, Some(self.gfn(touch)));
            }
            Op::Starve(after) => self.starve(after.into()),
            Op::Log(id, op) => self.log_op(id, op),
            Op::Track(at, more) => self.track(self.gfn(at), more),
            Op::Age(at, pages, clear) => self.age(self.range(at, pages), clear),
            Op::Device(by_vcpu, at, pages) => self.device_writes(by_vcpu, at, pages),
        }
    }

    fn complain(&self, what: String) {
        self.mmu.host().ghost().violation(None, what);
    }

    fn expect_same<T: PartialEq + std::fmt::Debug>(&self, what: &str, got: &T, right: &T) {
        if got != right {
            self.complain(format!("{what}: {got:?} instead of {right:?}"));
        }
    }

    fn add(&mut self, id: u8, space: AddressSpace, at: Spot, pages: u64, lie: Lie, read_only: bool) {
        let start = self.gfn(at);
        let lead = 3;
        let phase = start.0.wrapping_sub(lead) % (1 << 18);
        let run = Shape { pages: pages + 2 * lead, lead, phase, chunk: 1 << 40, gap: 0, writable: true };
        let shape = match lie {
            Lie::Aligned => run,
            Lie::Crooked => Shape { phase: phase + 1, ..run },
            Lie::Pieces(chunk) => Shape { chunk: chunk.max(1).into(), gap: 1, ..run },
            Lie::HostReadOnly => Shape { writable: false, ..run },
        };
        let object = self.mmu.host().ghost().make_object(shape);
        let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        let id = SlotId(id.into());
        let config = SlotConfig { id, space, base: start.gpa(), size: pages << 12, flags, backing: object };
        let right = self.answer_to_add(id, space, start, pages);
        self.mmu.host().ghost().adding(&config);
        let got = self.worker.add_slot(config);
        self.mmu.host().ghost().added(&config, got.is_ok());
        if got.is_err() {
            self.mmu.host().ghost().drop_object(object);
        }
        self.expect_kind("add", got, right);
    }

    /// What adding should answer; an overlap is named by any of the slots that it may name.
    fn answer_to_add(&self, id: SlotId, space: AddressSpace, start: Gfn, pages: u64) -> Result<(), SlotError> {
        let ghost = self.mmu.host().ghost();
        let places = ghost.placements();
        if pages == 0 {
            Err(SlotError::Empty)
        } else if places.iter().any(|place| place.id == id) {
            Err(SlotError::InUse)
        } else if places.len() >= self.mmu.config().slots {
            Err(SlotError::TooMany)
        } else {
            overlap(places, space, GfnRange { start, end: Gfn(start.0 + pages) }, None)
        }
    }

    fn expect_kind(&self, what: &str, got: Result<(), SlotError>, right: Result<(), SlotError>) {
        let same = match (got, right) {
            (Err(SlotError::Overlap(_)), Err(SlotError::Overlap(_))) => true,
            _ => got == right,
        };
        if !same {
            self.complain(format!("{what}: {got:?} instead of {right:?}"));
        }
    }

    fn place(&self, id: SlotId) -> Option<Placement> {
        self.mmu.host().ghost().placements().iter().find(|place| place.id == id).copied()
    }

    fn delete(&mut self, id: SlotId) {
        let place = self.place(id);
        self.mmu.host().ghost().deleting(id);
        let got = self.worker.delete_slot(id);
        self.mmu.host().ghost().deleted(id, got.is_ok());
        self.expect_kind("delete", got, place.map(|_| ()).ok_or(SlotError::NotFound));
        if let Some(place) = place {
            self.mmu.host().ghost().drop_object(place.object);
        }
    }

    fn move_slot(&mut self, id: SlotId, start: Gfn) {
        let right = self.place(id).ok_or(SlotError::NotFound).and_then(|place| {
            let range = GfnRange { start, end: Gfn(start.0 + place.range.pages()) };
            overlap(self.mmu.host().ghost().placements(), place.space, range, Some(id))
        });
        self.mmu.host().ghost().moving(id, start);
        let got = self.worker.move_slot(id, start.gpa());
        self.mmu.host().ghost().moved(id, start, got.is_ok());
        self.expect_kind("move", got, right);
    }

    fn flags(&mut self, id: SlotId, read_only: bool) {
        let right = self.place(id).map(|_| ()).ok_or(SlotError::NotFound);
        let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        self.mmu.host().ghost().changing_flags(id, flags);
        let got = self.worker.set_slot_flags(id, flags);
        self.mmu.host().ghost().changed_flags(id, flags, got.is_ok());
        self.expect_kind("flags", got, right);
    }

    fn touch(&mut self, cpu: usize, gfn: Gfn, access: u8) {
        let access = [Access::Read, Access::Write, Access::Execute][usize::from(access % 3)];
        let mut done = self.cpus[cpu].run_one(gfn, access);
        if done == Done::Failed(FaultError::OutOfTables) {
            // The error changed nothing: the same access succeeds when there are frames again.
            self.check();
            self.feed();
            done = self.cpus[cpu].run_one(gfn, access);
        }
        let right = {
            let ghost = self.mmu.host().ghost();
            match ghost.placement_at(self.cpus[cpu].role().space(), gfn) {
                None => Done::Mmio,
                Some(place) if access == Access::Write && !ghost.may_write(&place) => Done::ReadOnly,
                Some(_) if access == Access::Write && ghost.is_watched(self.cpus[cpu].role().space(), gfn) => {
                    Done::Tracked
                }
                Some(_) => Done::Memory,
            }
        };
        self.expect_same(&format!("{access:?} of {gfn:?}"), &done, &right);
        if right == Done::Memory {
            self.check_level(cpu, gfn);
        }
    }

    /// The frame is mapped now: by the largest leaf that could be, unless a table stood there before.
    fn check_level(&mut self, cpu: usize, gfn: Gfn) {
        let Some(walk) = self.worker.walk(self.cpus[cpu].role(), gfn) else { return };
        let Some(last) = walk.last() else { return };
        let level = last.level.number();
        // By a translation that the TLB keeps, although the entry waits for the next use to show.
        let tracked = matches!(last.state, State::AccessTracked(_));
        if !tracked && !matches!(F::see(last.raw, level), Seen::Leaf(..)) {
            self.complain(format!("{gfn:?} was reached and is not mapped: {last:x?}"));
        }
        let possible = self.possible(self.cpus[cpu].role().space(), gfn);
        // Smaller than possible only below a table that serves other frames too or did when it was made.
        if last.level > possible {
            self.complain(format!("{gfn:?} is mapped by {:?}, only {possible:?} is possible", last.level));
        }
    }

    fn possible(&self, space: AddressSpace, gfn: Gfn) -> Level {
        let ghost = self.mmu.host().ghost();
        let Some(place) = ghost.placement_at(space, gfn) else { return Level::K4 };
        let Some(object) = ghost.object(place.object) else { return Level::K4 };
        let fits = |level: Level| {
            let block = GfnRange::block(level, gfn);
            let page = |gfn: Gfn| gfn.0 - place.range.start.0 + object.shape.lead;
            if level > self.setting.largest || !place.range.covers(block) {
                return false;
            }
            let run = object.run(page(gfn));
            let crate::ghost::object::Page::At(first) = object.page(page(block.start)) else { return false };
            run.start <= page(block.start)
                && page(Gfn(block.end.0 - 1)) < run.end
                && first.0.is_multiple_of(level.pages())
        };
        [Level::G1, Level::M2].into_iter().find(|level| fits(*level)).unwrap_or(Level::K4)
    }

    fn zap(&mut self, range: GfnRange) {
        let called = self.mmu.host().ghost().zapping(range);
        self.worker.zap(range);
        self.mmu.host().ghost().zapped(range, called);
        self.expect_empty(range);
    }

    fn zap_all(&mut self) {
        let range = GfnRange { start: Gfn(0), end: Level::L5.root_limit() };
        let called = self.mmu.host().ghost().zapping(range);
        self.worker.zap_all();
        self.mmu.host().ghost().zapped(range, called);
        self.expect_empty(range);
        if self.mmu.counters().mapped_bytes() != [0; 3] {
            self.complain("zap_all left mappings in an obsolete root".into());
        }
    }

    fn expect_empty(&self, range: GfnRange) {
        for tree in check_tables(&self.mmu) {
            let block = |leaf: &Leaf| GfnRange { start: leaf.gfn, end: Gfn(leaf.gfn.0 + leaf.level.pages()) };
            if let Some(left) = tree.leaves.iter().find(|leaf| range.overlaps(block(leaf))) {
                self.complain(format!("the zap of {range:?} left {left:?}"));
            }
        }
    }

    fn invalidate(&mut self, range: GfnRange, moved: bool, touch: Option<Gfn>) {
        let called = self.mmu.host().ghost().zapping(range);
        let mmu = Arc::clone(&self.mmu);
        let machine = mmu.host();
        let held = self.worker.invalidate(range);
        machine.ghost().zapped(range, called);
        let pages = machine.ghost().taken(range);
        if let Some(gfn) = touch {
            let done = self.cpus[0].run_one(gfn, Access::Read);
            let memory = machine.ghost().placement_at(self.cpus[0].role().space(), gfn).is_some();
            if memory && range.contains(gfn) && done == Done::Memory {
                let what = format!("{gfn:?} was reached while {range:?} is invalidated");
                machine.ghost().violation(Some(gfn), what);
            }
        }
        machine.ghost().given(range, &pages, moved);
        drop(held);
    }

    fn track(&mut self, gfn: Gfn, more: bool) {
        let space = AddressSpace::Main;
        let place = self.mmu.host().ghost().placement_at(space, gfn);
        let key = place.map(|place| (place.id, gfn.0 - place.range.start.0));
        let right = match key {
            Some(key) if more || self.mmu.host().ghost().watchers.contains_key(&key) => Ok(()),
            _ => Err(SlotError::NotFound),
        };
        // What takes is told after, what gives before the library is called.
        let add = |by: u32| {
            let mut ghost = self.mmu.host().ghost();
            if let (Some(key), true) = (key, right.is_ok()) {
                let count = ghost.watchers.entry(key).or_insert(0);
                *count = count.wrapping_add(by);
                if *count == 0 {
                    ghost.watchers.remove(&key);
                }
            }
        };
        let got = if more {
            let got = self.worker.track_page(space, gfn);
            add(1);
            got
        } else {
            add(1u32.wrapping_neg());
            self.worker.untrack_page(space, gfn)
        };
        self.expect_kind("tracking", got, right);
    }

    /// Nothing is lost by aging; what was just made old and not used since is old.
    fn age(&mut self, range: GfnRange, clear: bool) {
        let space = AddressSpace::Main;
        let locks = self.mmu.counters().exclusive_locks;
        if clear {
            let first = self.worker.clear_young(space, range);
            let now = self.worker.test_young(space, range);
            self.expect_same("pages that are mapped", &now.mapped, &first.mapped);
            self.expect_same("pages that were made old", &now.young, &0);
        } else {
            let age = self.worker.test_young(space, range);
            if age.young > age.mapped || self.worker.test_young(space, range) != age {
                self.complain(format!("the age of {range:?} is {age:?}, and then another"));
            }
        }
        self.expect_same("exclusive locks of aging", &self.mmu.counters().exclusive_locks, &locks);
    }

    fn starve(&mut self, after: u64) {
        self.mmu.host().ghost().tables_may_run_out = true;
        self.mmu.host().arena.refuse(Refuse::After(after));
    }

    fn feed(&mut self) {
        self.mmu.host().arena.refuse(Refuse::Never);
        self.mmu.host().ghost().tables_may_run_out = false;
    }

    /// Everything that must be true between two operations.
    pub fn check(&mut self) {
        self.worker.collect();
        check_tables(&self.mmu);
        let ghost = self.mmu.host().ghost();
        let mut right: Vec<_> =
            ghost.placements().iter().map(|place| (place.space, place.range.start, place.id)).collect();
        drop(ghost);
        right.sort_unstable();
        let got: Vec<_> =
            self.worker.slots().iter().map(|slot| (slot.space(), slot.range().start, slot.id())).collect();
        self.expect_same("slots", &got, &right);
    }

    /// Violations found so far.
    pub fn violations(&self) -> Vec<Violation> {
        self.mmu.host().violations()
    }

    /// Takes everything down; what was found, leaks among it.
    pub fn end(mut self) -> Vec<Violation> {
        self.feed();
        let places = self.mmu.host().ghost().placements().to_vec();
        for place in places {
            self.delete(place.id);
        }
        self.check();
        let Self { mmu, worker, cpus, .. } = self;
        drop((worker, cpus));
        finish(mmu)
    }
}

/// The end of a machine whose slots, vCPUs and workers are gone: nothing may be left.
pub fn finish<F: Cpu>(mmu: Arc<Mmu<Machine<F>>>) -> Vec<Violation> {
    let machine = mmu.host();
    let (arena, counters) = (Arc::clone(&machine.arena), mmu.counters());
    if counters.mapped_bytes() != [0; 3] {
        machine.ghost().violation(None, format!("at the end {counters:?}"));
    }
    let left = machine.ghost().host_frames();
    if left != 0 {
        machine.ghost().violation(None, format!("{left} host frames are left"));
    }
    let mut found = machine.violations();
    let last = Arc::into_inner(mmu).is_some();
    if !last || arena.live() != 0 {
        found.push(Violation::plain(format!("{} table frames are left (MMU dropped: {last})", arena.live())));
    }
    found.extend(arena.take_misuse().into_iter().map(|misuse| Violation::plain(format!("at the end: {misuse:?}"))));
    found
}

fn space(smm: bool) -> AddressSpace {
    if smm { AddressSpace::Smm } else { AddressSpace::Main }
}

fn overlap(
    places: &[Placement],
    space: AddressSpace,
    range: GfnRange,
    except: Option<SlotId>,
) -> Result<(), SlotError> {
    let here = |place: &&Placement| place.space == space && Some(place.id) != except;
    let mut others = places.iter().filter(here).filter(|place| place.range.overlaps(range));
    others.next().map_or(Ok(()), |other| Err(SlotError::Overlap(other.id)))
}

/// Runs a program and gives what was found.
pub fn run<F: Cpu>(setting: Setting, program: &[Op]) -> Vec<Violation> {
    let mut machine = Single::<F>::new(setting);
    for op in program {
        machine.run(*op);
        if !machine.violations().is_empty() {
            return machine.violations();
        }
    }
    machine.end()
}

/// Which format a program runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// AMD.
    Npt,
    /// Intel.
    Ept,
}

/// [`run`] on the format of that name.
pub fn run_on(table: Table, setting: Setting, program: &[Op]) -> Vec<Violation> {
    match table {
        Table::Npt => run::<Npt>(setting, program),
        Table::Ept => run::<Ept>(setting, program),
    }
}
