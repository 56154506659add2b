//! Dirty rings: where to look, while the bitmap is what is believed. What holds with nested paging and on shadow tables alike
//! is tested once, on [`Logged`] machines of both kinds.

use std::sync::Arc;

use nestling::guest::Width;
use nestling::{
    Access, Cause, Config, DirtyPages, DirtyRing, Fault, FaultError, Gfn, Granularity, Host, Level, LogConfig,
    LogStart, Mmu, SlotId, Split, Tracking, VcpuId, Worker,
};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{Amd, add, assert_none, small, two_by_two};
use nestling_checks::shadow::cpu::{self, ShadowCpu};
use nestling_checks::shadow::machine::ShadowMachine;
use nestling_checks::shadow::small::{self as shadow, ALL, DATA, KERNEL, LONG, OTHER_ROOT, TABLES, ask, write_entry};

const START: Gfn = Gfn(0x400);
const ID: SlotId = SlotId(0);
/// Of the slot that [`Logged`] machines have, from a page on that is no table of a guest's.
const PAGES: std::ops::Range<u64> = DATA..60;

fn log(granularity: Granularity) -> LogConfig {
    let (tracking, start, split) = (Tracking::WriteProtect, LogStart::Clean, Split::OnDemand);
    LogConfig { tracking, granularity, start, split }
}

fn pages(ring: &mut DirtyRing) -> Vec<DirtyPages> {
    std::iter::from_fn(|| ring.take()).collect()
}

const fn entry(page: u64) -> DirtyPages {
    DirtyPages { slot: ID, page, level: Level::K4 }
}

/// A machine with two vCPUs, whose slot [`ID`] is logged by pages, to their end.
trait Logged: Sized {
    type Host: Host;
    fn new() -> Self;
    fn mmu(&self) -> &Arc<Mmu<Self::Host>>;
    fn worker(&mut self) -> &mut Worker<Self::Host>;
    fn ring(&mut self, vcpu: usize, entries: usize) -> DirtyRing;
    fn can_enter(&mut self, vcpu: usize) -> Result<(), FaultError>;
    /// The guest writes to a page of the slot.
    fn write(&mut self, vcpu: usize, page: u64) -> Result<(), FaultError>;
    /// The vCPU turns to another root, where there is one, and reads the page.
    fn read_otherwise(&mut self, vcpu: usize, page: u64);
    /// Nothing was violated.
    fn end(self);

    /// What is dirty, and is no more.
    fn harvest(&mut self) -> u64 {
        let mut bits = [0];
        self.worker().harvest_dirty(ID, 0, &mut bits).unwrap();
        bits[0]
    }
}

struct Nested {
    mmu: Arc<Mmu<Amd>>,
    worker: Worker<Amd>,
    cpus: [GuestCpu<<Amd as Host>::Format>; 2],
}

impl Logged for Nested {
    type Host = Amd;

    fn new() -> Self {
        let mmu = small(Config { largest: Level::K4, ..two_by_two() });
        add(&mmu, 0, START, 64);
        let mut worker = mmu.worker().unwrap();
        worker.start_log(ID, log(Granularity::Page)).unwrap();
        let cpus = [0, 1].map(|id| GuestCpu::new(&mmu, VcpuId(id), 1, Manners::Right).with_patience(4));
        Self { mmu, worker, cpus }
    }

    fn mmu(&self) -> &Arc<Mmu<Amd>> {
        &self.mmu
    }

    fn worker(&mut self) -> &mut Worker<Amd> {
        &mut self.worker
    }

    fn ring(&mut self, vcpu: usize, entries: usize) -> DirtyRing {
        self.cpus[vcpu].vcpu.enable_dirty_ring(entries).unwrap()
    }

    fn can_enter(&mut self, vcpu: usize) -> Result<(), FaultError> {
        self.cpus[vcpu].vcpu.enter().map(drop)
    }

    fn write(&mut self, vcpu: usize, page: u64) -> Result<(), FaultError> {
        match self.cpus[vcpu].run_one(Gfn(START.0 + page), Access::Write) {
            Done::Memory => Ok(()),
            Done::Failed(error) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    fn read_otherwise(&mut self, vcpu: usize, page: u64) {
        assert_eq!(self.cpus[vcpu].run_one(Gfn(START.0 + page), Access::Read), Done::Memory);
    }

    fn end(self) {
        assert_none(&self.mmu.host().violations());
    }
}

struct Shadowed {
    mmu: Arc<Mmu<ShadowMachine>>,
    worker: Worker<ShadowMachine>,
    cpus: [ShadowCpu; 2],
}

impl Logged for Shadowed {
    type Host = ShadowMachine;

    fn new() -> Self {
        let (mmu, mut worker) = shadow::machine(64);
        worker.start_log(ID, log(Granularity::Page)).unwrap();
        let cpus = [0, 1].map(|id| shadow::cpu(&mmu, id, LONG));
        Self { mmu, worker, cpus }
    }

    fn mmu(&self) -> &Arc<Mmu<ShadowMachine>> {
        &self.mmu
    }

    fn worker(&mut self) -> &mut Worker<ShadowMachine> {
        &mut self.worker
    }

    fn ring(&mut self, vcpu: usize, entries: usize) -> DirtyRing {
        self.cpus[vcpu].vcpu.enable_dirty_ring(entries).unwrap()
    }

    fn can_enter(&mut self, vcpu: usize) -> Result<(), FaultError> {
        self.cpus[vcpu].vcpu.enter().map(drop)
    }

    fn write(&mut self, vcpu: usize, page: u64) -> Result<(), FaultError> {
        match self.cpus[vcpu].access(ask(page, Access::Write, KERNEL), None) {
            cpu::Done::Memory => Ok(()),
            cpu::Done::Failed(error) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    fn read_otherwise(&mut self, vcpu: usize, page: u64) {
        self.cpus[vcpu].load_cr3(OTHER_ROOT << 12);
        assert_eq!(self.cpus[vcpu].access(ask(page, Access::Read, KERNEL), None), cpu::Done::Memory);
    }

    fn end(self) {
        shadow::end(self.mmu, self.worker, self.cpus.into());
    }
}

fn noted_once_until_reset<M: Logged>() {
    let mut machine = M::new();
    let (mut ring, mut other) = (machine.ring(0, 64), machine.ring(1, 64));
    for page in [27, 23, 27, 60] {
        machine.write(0, page).unwrap();
    }
    for page in [23, 29] {
        machine.write(1, page).unwrap();
    }
    let taken = pages(&mut ring);
    assert_eq!(taken, [entry(27), entry(23), entry(60)]);
    assert_eq!(pages(&mut other), [entry(29)], "what another vCPU has noted already is no news");
    // Until they are reset, writes to them are no news either, by whatever root, nor do reads take the right away.
    machine.read_otherwise(0, 27);
    let fixed = machine.mmu().counters().faults_fixed;
    machine.write(0, 27).unwrap();
    assert_eq!(machine.mmu().counters().faults_fixed, fixed);
    assert!(ring.is_empty());
    let locks = machine.mmu().counters().exclusive_locks;
    assert_eq!(machine.worker().reset_dirty(&taken), 3);
    assert_eq!(machine.worker().reset_dirty(&taken), 0, "they are clean");
    assert_eq!(machine.mmu().counters().exclusive_locks, locks);
    machine.write(0, 27).unwrap();
    assert_eq!(pages(&mut ring), [entry(27)]);
    assert_eq!(machine.harvest(), 1 << 27 | 1 << 29);
    machine.end();
}

#[test]
fn a_write_is_in_its_vcpus_ring_once_until_it_is_reset() {
    noted_once_until_reset::<Nested>();
    noted_once_until_reset::<Shadowed>();
}

fn full_and_whole<M: Logged>() {
    let mut machine = M::new();
    let mut ring = machine.ring(0, 16);
    let written = PAGES.take_while(|page| match machine.write(0, *page) {
        Ok(()) => true,
        Err(FaultError::DirtyRingFull) => false,
        Err(other) => panic!("{other:?}"),
    });
    let written = written.count() as u64;
    assert!((8..16).contains(&written), "{written}");
    assert!(ring.len() >= written);
    assert_eq!(machine.can_enter(0), Err(FaultError::DirtyRingFull));
    let taken = pages(&mut ring);
    machine.write(0, PAGES.end).expect("emptied, the vCPU goes on");
    machine.worker().reset_dirty(&taken);
    assert_eq!(machine.harvest(), 1 << PAGES.end);
    machine.end();
}

#[test]
fn a_nearly_full_ring_keeps_its_vcpu_out_and_loses_nothing() {
    full_and_whole::<Nested>();
    full_and_whole::<Shadowed>();
}

/// Whether there is room in a ring is asked at entry, so a vCPU that has one handles no fault without leaving.
#[test]
fn a_vcpu_with_a_ring_leaves_for_its_faults() {
    for has_ring in [false, true] {
        let mmu = small(Config { largest: Level::K4, ..two_by_two() });
        add(&mmu, 0, START, 512);
        let mut worker = mmu.worker().unwrap();
        worker.start_log(ID, log(Granularity::Page)).unwrap();
        let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
        let ring = has_ring.then(|| cpu.vcpu.enable_dirty_ring(16).unwrap());
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        worker.harvest_dirty(ID, 0, &mut [0; 8]).unwrap();
        let mut turn = cpu.vcpu.enter().unwrap();
        let fault = Fault { gpa: START.gpa(), access: Access::Write, cause: Cause::Translation };
        assert_eq!(turn.fix_at_once(fault), !has_ring);
        drop(turn);
        drop(ring);
    }
}

/// Entries of slots that are gone, or of pages that are not there, arm nothing and break nothing.
#[test]
fn stale_entries_are_harmless() {
    let mmu = small(two_by_two());
    add(&mmu, 0, START, 100);
    let mut worker = mmu.worker().unwrap();
    let level = Level::M2;
    let stale = |slot, page, level| DirtyPages { slot: SlotId(slot), page, level };
    let entries = [stale(0, 1, level), stale(9, 0, level), stale(0, u64::MAX >> 8, Level::K4), stale(0, 99, Level::G1)];
    assert_eq!(worker.reset_dirty(&entries), 0);
    worker.start_log(ID, LogConfig { start: LogStart::AllDirty, ..log(Granularity::Leaf) }).unwrap();
    let behind = [stale(0, 100, Level::K4), stale(0, 100, Level::M2), stale(0, u64::MAX >> 8, Level::G1)];
    assert_eq!(worker.reset_dirty(&behind), 0, "none of the slot's pages is meant");
    assert_eq!(worker.reset_dirty(&entries), 100);
    assert_eq!(worker.harvest_dirty(ID, 0, &mut [0; 2]).unwrap(), 0);
}

#[test]
fn a_leaf_that_is_dirty_as_a_whole_is_one_entry() {
    let mmu = small(Config { largest: Level::M2, ..two_by_two() });
    add(&mmu, 0, START, 1024);
    let mut worker = mmu.worker().unwrap();
    worker.start_log(ID, log(Granularity::Leaf)).unwrap();
    let mut cpu = GuestCpu::<<Amd as Host>::Format>::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut ring = cpu.vcpu.enable_dirty_ring(64).unwrap();
    assert_eq!(cpu.run_one(Gfn(START.0 + 600), Access::Write), Done::Memory);
    let taken = pages(&mut ring);
    assert_eq!(taken, [DirtyPages { slot: ID, page: 600, level: Level::M2 }]);
    assert_eq!(worker.reset_dirty(&taken), 512);
    assert_eq!(worker.harvest_dirty(ID, 0, &mut [0; 16]).unwrap(), 0);
    assert_none(&mmu.host().violations());
}

/// What a guest does to its tables, and what its CPU does to them.
#[test]
fn tables_and_the_marks_in_them_are_written_as_any_page() {
    let (mmu, mut worker) = shadow::machine(64);
    let mut cpu = shadow::cpu(&mmu, 0, LONG);
    // An entry that was never used.
    mmu.host().prepare(Gfn(TABLES[3]), 100 * 8, Width::Eight, DATA << 12 | ALL & !(1 << 5 | 1 << 6));
    worker.start_log(ID, log(Granularity::Page)).unwrap();
    let mut ring = cpu.vcpu.enable_dirty_ring(64).unwrap();
    assert_eq!(cpu.access(ask(100, Access::Read, KERNEL), None), cpu::Done::Memory);
    let taken = pages(&mut ring);
    assert_eq!(taken, [entry(TABLES[3])], "the accessed bit");
    assert_eq!(worker.reset_dirty(&taken), 1);
    assert_eq!(cpu.access(ask(100, Access::Write, KERNEL), None), cpu::Done::Memory);
    assert_eq!(pages(&mut ring), [entry(TABLES[3]), entry(DATA)], "the dirty bit, and the page");
    write_entry(&mut cpu, TABLES[2], 7, 0);
    assert_eq!(pages(&mut ring), [entry(TABLES[2])]);
    shadow::end(mmu, worker, vec![cpu]);
}
