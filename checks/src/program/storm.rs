//! Storms: vCPU threads and workers collide in a few megabytes.
//!
//! The workers do a fixed number of operations; the vCPUs run until all workers are done. The first worker changes
//! slots (and zaps), the others zap and invalidate, also ranges whose slots are changing. What is random comes from
//! one seed; how threads interleave does not, so a seed that failed once need not fail again: the report of a
//! violation has to say enough.
//!
//! One thing the embedder must keep apart itself: memory of a slot is not moved to another place in the guest while
//! an invalidation of its old place is in flight, because the range in flight would not name the new place.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use nestling::{
    Access, AdBits, AddressSpace, Config, Counters, DirtyPages, DirtyRing, FaultError, Gfn, GfnRange, Granularity,
    Level, LogConfig, LogStart, Mmu, Role, SlotConfig, SlotFlags, SlotId, SlotZap, Split, Tracking, VcpuId, Worker,
};

use super::single::finish;
use crate::ghost::dirty::Answers;
use crate::ghost::object::Shape;
use crate::ghost::{Violation, everything};
use crate::machine::cpu::Cpu;
use crate::machine::fence::Fences;
use crate::machine::guest::{Done, GuestCpu, Instruction, Manners};
use crate::machine::{Build, Machine, check_tables};
use crate::rng::Rng;

/// What the memory side of an embedder might do wrong; the ghost must notice each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Care {
    /// Nothing.
    Right,
    /// Moves pages without an invalidation.
    MovesPagesUnasked,
    /// Gives a slot's memory back to the host before `delete_slot` has returned.
    FreesTooEarly,
    /// Puts bits into a log that nobody wrote.
    MarksUnwritten,
}

/// What a storm is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Where all random choices come from.
    pub seed: u64,
    /// vCPU threads.
    pub vcpus: u16,
    /// Worker threads.
    pub workers: u16,
    /// Operations of all workers together, at least.
    pub operations: u64,
    /// Guest accesses at least: the workers go on until there were so many.
    pub accesses: u64,
    /// The root tables' level.
    pub root_level: Level,
    /// The largest leaf.
    pub largest: Level,
    /// What a change of a slot zaps.
    pub slot_zap: SlotZap,
    /// Whether the workers only zap, a few ranges that are always the same, once the slots are there.
    pub only_zaps: bool,
    /// Whether vCPUs turn to another role now and then.
    pub roles: bool,
    /// Whether the first worker starts, takes and stops dirty logs, and vCPUs have dirty rings.
    pub logs: bool,
    /// The pair of fences.
    pub fences: Fences,
    /// How the vCPUs behave.
    pub manners: Manners,
    /// How the workers behave.
    pub care: Care,
}

impl Plan {
    /// Two vCPUs and two workers, all of them right.
    pub const fn new(seed: u64, operations: u64) -> Self {
        Self {
            seed,
            vcpus: 2,
            workers: 2,
            operations,
            // Where there are fewer CPUs than threads, the workers could be through before a guest's turn comes.
            accesses: 100,
            root_level: Level::L4,
            largest: Level::G1,
            slot_zap: SlotZap::Slot,
            only_zaps: false,
            roles: false,
            logs: false,
            fences: Fences::Full,
            manners: Manners::Right,
            care: Care::Right,
        }
    }
}

/// What a storm did.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was found.
    pub violations: Vec<Violation>,
    /// Guest accesses that were checked.
    pub accesses: u64,
    /// Accesses that a TLB translated without a walk.
    pub hits: u64,
    /// Worker operations.
    pub operations: u64,
    /// What dirty logs told.
    pub answers: Answers,
    /// Entries of dirty rings that were taken.
    pub ring_entries: u64,
    /// The library's counters at the end.
    pub counters: Counters,
}

/// Tries of one access. Far more than a delayed worker causes; only a livelock gets there.
const PATIENCE: u64 = 2_000_000;
/// Entries of a vCPU's dirty ring.
const RING: usize = 256;
/// Slots at most.
const SLOTS: u64 = 4;
/// The small world: blocks of 2 MiB around a border of 1 GiB.
const FIRST_BLOCK: u64 = 1022;
const BLOCKS: u64 = 4;

fn spot(rng: &mut Rng) -> Gfn {
    let page = match rng.below(3) {
        0 => rng.below(4),
        1 => 508 + rng.below(4),
        _ => 254 + rng.below(4),
    };
    Gfn((FIRST_BLOCK + rng.below(BLOCKS)) * 512 + page)
}

fn span(rng: &mut Rng) -> GfnRange {
    let (mut start, pages) = (spot(rng), [1, 2, 5, 512, 700, 1024, 2048][rng.below(7) as usize]);
    if rng.once_in(2) {
        start = Level::M2.align_down(start);
    }
    GfnRange { start, end: Gfn(start.0 + pages) }
}

/// What the threads share.
struct World<'a, F: Cpu> {
    mmu: &'a Mmu<Machine<F>>,
    care: Care,
    limit: u64,
    /// Guest accesses that there must have been.
    accesses: u64,
    only_zaps: bool,
    /// Whether vCPUs turn to other roles.
    roles: bool,
    /// Whether the first worker is busy with dirty logs.
    logs: bool,
    /// Operations that were begun.
    operations: AtomicU64,
    /// Workers that are not done.
    working: AtomicUsize,
    hits: AtomicU64,
    /// The vCPUs' dirty rings, if they have some.
    rings: Vec<Mutex<DirtyRing>>,
    ring_entries: AtomicU64,
    /// Read: an invalidation is in flight. Written: a slot moves (see the module head).
    places: RwLock<()>,
    found: AtomicBool,
}

impl<F: Cpu> World<'_, F> {
    /// Whether the vCPUs go on.
    fn goes_on(&self) -> bool {
        self.working.load(Ordering::Relaxed) > 0 && !self.found.load(Ordering::Relaxed)
    }

    fn look(&self) {
        if !self.mmu.host().ghost().violations().is_empty() {
            self.found.store(true, Ordering::Relaxed);
        }
    }

    /// One vCPU: pieces of code, the role turned between two of them.
    fn guest(&self, cpu: &mut GuestCpu<F>, roles: bool, mut rng: Rng) {
        while self.goes_on() {
            self.look();
            if roles {
                let level = if rng.once_in(2) { Level::L5 } else { Level::L4 };
                let space = if rng.once_in(3) { AddressSpace::Smm } else { AddressSpace::Main };
                let bits = if rng.once_in(3) { AdBits::Off } else { AdBits::On };
                let role = Role::new(level).expect("roots have these levels");
                cpu.set_role(role.in_space(space).with_ad_bits(bits));
            }
            let length = if roles { 1 + rng.below(64) } else { 512 };
            self.piece(cpu, length, &mut rng);
            if self.logs {
                self.device_writes(cpu, spot(&mut rng));
            }
        }
        self.hits.fetch_add(cpu.tlb.hits, Ordering::Relaxed);
    }

    /// The embedder writes a frame for the guest.
    fn device_writes(&self, cpu: &mut GuestCpu<F>, gfn: Gfn) {
        let (id, space, machine) = (cpu.vcpu.id(), cpu.role().space(), self.mmu.host());
        let began = machine.ghost().device_writes(id, space, gfn);
        cpu.vcpu.mark_dirty(GfnRange { start: gfn, end: Gfn(gfn.0 + 1) });
        machine.ghost().device_wrote(id, space, gfn, began);
    }

    fn piece(&self, cpu: &mut GuestCpu<F>, length: u64, rng: &mut Rng) {
        let space = cpu.role().space();
        let code = (0..length).map_while(|_| {
            if rng.once_in(8) {
                // In guest mode: so that workers find the vCPU there also when there are fewer CPUs than threads.
                std::thread::yield_now();
            }
            let access = [Access::Read, Access::Write, Access::Execute][rng.below(3) as usize];
            // Mostly where memory is: accesses without memory are cheap and would take most of the time.
            let mut gfn = spot(rng);
            for _ in 0..rng.below(4) {
                if self.mmu.host().ghost().placement_at(space, gfn).is_none() {
                    gfn = spot(rng);
                }
            }
            self.goes_on().then_some(Instruction { gfn, access })
        });
        cpu.run(code, |instruction, done| {
            if done == Done::Failed(FaultError::DirtyRingFull) {
                // Whoever has the log empties it. The access is given up.
                std::thread::yield_now();
            } else if let Done::Stuck | Done::Failed(_) = done {
                let text = format!("{instruction:?} ended as {done:?}");
                self.mmu.host().ghost().violation(Some(instruction.gfn), text);
                self.found.store(true, Ordering::Relaxed);
            }
        });
    }

    fn work(&self, worker: &mut Worker<Machine<F>>, first: bool, mut rng: Rng) {
        for id in 0..if first { SLOTS } else { 0 } {
            self.replace_slot(worker, &mut rng, id);
        }
        let begins_another = || {
            let operations = self.operations.fetch_add(1, Ordering::Relaxed);
            operations < self.limit || self.mmu.host().ghost().accesses < self.accesses
        };
        while self.goes_on() && begins_another() {
            match (first, rng.below(9)) {
                _ if self.only_zaps => {
                    let block = Gfn((FIRST_BLOCK + rng.below(2)) * 512);
                    let pages = [1, 4, 512, 1024][rng.below(4) as usize];
                    self.zap(worker, GfnRange { start: block, end: Gfn(block.0 + pages) });
                }
                (true, 0..=6) if self.logs && !rng.once_in(8) => self.log(worker, &mut rng),
                (true, 0..=2) => {
                    let id = rng.below(SLOTS);
                    self.replace_slot(worker, &mut rng, id);
                }
                (true, 3) => self.move_slot(worker, &mut rng),
                (true, 4 | 5) => self.flags(worker, &mut rng),
                (_, 6) => self.zap(worker, span(&mut rng)),
                (_, 7) => self.zap(worker, GfnRange { start: Gfn(FIRST_BLOCK * 512 - 512 * 512), end: Gfn(1 << 20) }),
                (_, 8) => self.zap_all(worker),
                _ => self.invalidate(worker, &mut rng),
            }
            std::thread::yield_now();
        }
        self.working.fetch_sub(1, Ordering::Relaxed);
    }

    fn replace_slot(&self, worker: &mut Worker<Machine<F>>, rng: &mut Rng, id: u64) {
        let machine = self.mmu.host();
        let (id, range) = (SlotId(id as u32), self.slot_range(rng, id));
        if let Some(object) = delete(worker, self.mmu, id, self.care) {
            machine.ghost().drop_object(object);
        }
        let lead = rng.below(3);
        let shape = Shape {
            pages: range.pages() + 2 * lead,
            lead,
            phase: range.start.0.wrapping_sub(lead).wrapping_add(rng.below(2)) % (1 << 18),
            chunk: [1 << 40, 1 << 40, 512, 3][rng.below(4) as usize],
            gap: rng.below(2),
            writable: !rng.once_in(8),
        };
        let backing = machine.ghost().make_object(shape);
        let space = if self.roles && rng.once_in(3) { AddressSpace::Smm } else { AddressSpace::Main };
        let flags = if rng.once_in(4) { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        let config = SlotConfig { id, space, base: range.start.gpa(), size: range.pages() << 12, flags, backing };
        machine.ghost().adding(&config);
        let done = worker.add_slot(config).is_ok();
        machine.ghost().added(&config, done);
        if !done {
            machine.ghost().drop_object(backing);
        }
    }

    /// Mostly each slot has a block of its own, or the slots would keep each other out; now and then one takes 2 GiB.
    fn slot_range(&self, rng: &mut Rng, id: u64) -> GfnRange {
        let mut range = span(rng);
        if rng.once_in(12) && self.mmu.config().largest == Level::G1 {
            return GfnRange { start: Gfn(1 << 18), end: Gfn(3 << 18) };
        }
        if !rng.once_in(4) {
            let start = Gfn((FIRST_BLOCK + id) * 512 + [0, 0, 1, 254][rng.below(4) as usize]);
            range = GfnRange { start, end: Gfn(start.0 + range.pages()) };
        }
        range
    }

    fn move_slot(&self, worker: &mut Worker<Machine<F>>, rng: &mut Rng) {
        let (id, start) = (SlotId(rng.below(SLOTS) as u32), span(rng).start);
        let alone = self.places.write();
        self.mmu.host().ghost().moving(id, start);
        let done = worker.move_slot(id, start.gpa()).is_ok();
        self.mmu.host().ghost().moved(id, start, done);
        drop(alone);
    }

    fn flags(&self, worker: &mut Worker<Machine<F>>, rng: &mut Rng) {
        let id = SlotId(rng.below(SLOTS) as u32);
        let flags = if rng.once_in(2) { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        self.mmu.host().ghost().changing_flags(id, flags);
        let done = worker.set_slot_flags(id, flags).is_ok();
        self.mmu.host().ghost().changed_flags(id, flags, done);
    }

    /// Something about the dirty log of a slot; one worker does all of these, so that the ghost learns their order.
    fn log(&self, worker: &mut Worker<Machine<F>>, rng: &mut Rng) {
        let (id, machine) = (SlotId(rng.below(SLOTS) as u32), self.mmu.host());
        let log = machine.ghost().log(id);
        match (log, rng.below(12)) {
            (None, _) => {
                let pick = |rng: &mut Rng| rng.once_in(2);
                let config = LogConfig {
                    tracking: if pick(rng) { Tracking::DirtyBit } else { Tracking::WriteProtect },
                    granularity: if rng.once_in(4) { Granularity::Leaf } else { Granularity::Page },
                    start: if pick(rng) { LogStart::AllDirty } else { LogStart::Clean },
                    split: if pick(rng) { Split::Eager } else { Split::OnDemand },
                };
                machine.ghost().log_starting(id, config);
                match worker.start_log(id, config) {
                    Ok(()) => machine.ghost().log_started(id),
                    Err(_) => machine.ghost().log_stopped(id),
                }
            }
            (Some(_), 0) => {
                machine.ghost().log_stopped(id);
                let stopped = worker.stop_log(id);
                debug_assert_eq!(stopped, Ok(()), "one worker starts and stops logs");
            }
            (Some((_, words)), 1) => {
                let bits: Vec<_> = (0..words).map(|_| rng.next() & rng.next() & rng.next()).collect();
                if self.care != Care::MarksUnwritten {
                    machine.ghost().merging(id, 0, &bits);
                }
                let _ = worker.merge_dirty(id, 0, &bits);
            }
            (Some(_), 2) => self.reset_rings(worker),
            (Some((_, words)), kind) => {
                let first = if rng.once_in(4) { rng.below(words as u64) as usize } else { 0 };
                let mut bits = vec![0; words - first];
                let asked = machine.ghost().asking(id);
                let got = if kind < 5 {
                    worker.get_dirty(id, first, &mut bits)
                } else {
                    worker.harvest_dirty(id, first, &mut bits)
                };
                if got.is_err() {
                    return machine.ghost().violation(None, format!("a log of {words} words answers {got:?}"));
                }
                machine.ghost().told(id, first, &bits, asked, kind >= 5);
                if kind < 5 {
                    let asked = machine.ghost().asking(id);
                    let _ = worker.clear_dirty(id, first, &bits);
                    machine.ghost().cleared(id, first, &bits, asked);
                }
            }
        }
    }

    /// Empties the vCPUs' rings and arms what they name. Entries of logs that have ended are among them.
    fn reset_rings(&self, worker: &mut Worker<Machine<F>>) {
        let machine = self.mmu.host();
        let entries: Vec<DirtyPages> = self
            .rings
            .iter()
            .flat_map(|ring| {
                let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
                std::iter::from_fn(|| ring.take()).collect::<Vec<_>>()
            })
            .collect();
        self.ring_entries.fetch_add(entries.len() as u64, Ordering::Relaxed);
        let asked: Vec<_> = (0..SLOTS).map(|id| machine.ghost().asking(SlotId(id as u32))).collect();
        worker.reset_dirty(&entries);
        for (id, asked) in (0..).map(SlotId).zip(asked) {
            machine.ghost().reset(id, entries.iter().filter(|entry| entry.slot == id), asked);
        }
    }

    fn zap(&self, worker: &mut Worker<Machine<F>>, range: GfnRange) {
        let called = self.mmu.host().ghost().zapping(range);
        worker.zap(range);
        self.mmu.host().ghost().zapped(range, called);
    }

    fn zap_all(&self, worker: &mut Worker<Machine<F>>) {
        let called = self.mmu.host().ghost().zapping(everything());
        worker.zap_all();
        self.mmu.host().ghost().zapped(everything(), called);
    }

    fn invalidate(&self, worker: &mut Worker<Machine<F>>, rng: &mut Rng) {
        let machine = self.mmu.host();
        let range = span(rng);
        let range = GfnRange { start: range.start, end: Gfn(range.end.0.min(range.start.0 + 16)) };
        let together = self.places.read();
        if self.care == Care::MovesPagesUnasked {
            machine.ghost().moved_behind_the_librarys_back(range);
            return;
        }
        let called = machine.ghost().zapping(range);
        let held = if rng.once_in(3) {
            // Refused in a crowd more often than not.
            let Ok(held) = worker.try_invalidate(range) else { return machine.ghost().not_zapped(called) };
            held
        } else {
            worker.invalidate(range)
        };
        machine.ghost().zapped(range, called);
        let pages = machine.ghost().taken(range);
        // Long enough for guests to fault beside it.
        (0..rng.below(16)).for_each(|_| std::thread::yield_now());
        machine.ghost().given(range, &pages, rng.once_in(2));
        drop(held);
        drop(together);
    }
}

/// Deletes a slot; its object, which is to be dropped, if it was there.
fn delete<F: Cpu>(worker: &mut Worker<Machine<F>>, mmu: &Mmu<Machine<F>>, id: SlotId, care: Care) -> Option<u64> {
    let machine = mmu.host();
    let object = machine.ghost().placements().iter().find(|place| place.id == id).map(|place| place.object);
    machine.ghost().deleting(id);
    if let (Care::FreesTooEarly, Some(object)) = (care, object) {
        machine.ghost().drop_object(object);
    }
    let done = worker.delete_slot(id).is_ok();
    machine.ghost().deleted(id, done);
    object.filter(|_| done)
}

/// Runs a storm.
pub fn run<F: Cpu>(plan: Plan) -> Report {
    let Plan { vcpus, workers, root_level, largest, fences, .. } = plan;
    let (mmio_entries, slot_zap) = (plan.seed % 4 != 3, plan.slot_zap);
    // One more worker, for the check at the end.
    let config = Config { vcpus, workers: workers + 1, slots: 8, root_level, largest, slot_zap, mmio_entries };
    let mmu = Machine::<F>::build(
        Build {
            tables: 512,
            fences,
            restless: plan.seed % 3 * 5,
            rough: plan.seed % 4 * 7,
            by_range: plan.seed % 5 == 4,
        },
        config,
    );
    let mut world = World {
        mmu: &mmu,
        care: plan.care,
        limit: plan.operations,
        accesses: plan.accesses,
        only_zaps: plan.only_zaps,
        roles: plan.roles,
        logs: plan.logs,
        rings: Vec::new(),
        ring_entries: AtomicU64::new(0),
        operations: AtomicU64::new(0),
        working: AtomicUsize::new(workers.into()),
        hits: AtomicU64::new(0),
        places: RwLock::new(()),
        found: AtomicBool::new(false),
    };
    let mut seeds = Rng::new(plan.seed);
    let mut cpus: Vec<_> = (0..vcpus)
        .map(|id| GuestCpu::new(&mmu, VcpuId(id), seeds.next(), plan.manners).with_patience(PATIENCE))
        .collect();
    if plan.logs {
        let ring = |cpu: &mut GuestCpu<F>| cpu.vcpu.enable_dirty_ring(RING).expect("there is memory for a ring");
        world.rings = cpus.iter_mut().map(|cpu| Mutex::new(ring(cpu))).collect();
    }
    let world = world;
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            let (world, rng) = (&world, Rng::new(seeds.next()));
            scope.spawn(move || world.guest(cpu, plan.roles, rng));
        }
        for number in 0..workers {
            let (world, rng) = (&world, Rng::new(seeds.next()));
            let mut worker = mmu.worker().expect("there is room for this worker");
            scope.spawn(move || world.work(&mut worker, number == 0, rng));
        }
    });
    // Each worker has begun one that it did not do.
    let operations = world.operations.into_inner().saturating_sub(workers.into());
    let hits = world.hits.into_inner();
    let ring_entries = world.ring_entries.into_inner();
    let mut worker = mmu.worker().expect("the workers are gone");
    for id in 0..SLOTS as u32 {
        if let Some(object) = delete(&mut worker, &mmu, SlotId(id), Care::Right) {
            mmu.host().ghost().drop_object(object);
        }
    }
    worker.collect();
    drop(worker);
    check_tables(&mmu);
    drop(cpus);
    let (accesses, counters) = (mmu.host().ghost().accesses, mmu.counters());
    let answers = mmu.host().ghost().answers();
    Report { violations: finish(mmu), accesses, hits, operations, answers, ring_entries, counters }
}
