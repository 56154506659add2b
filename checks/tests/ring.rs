//! Dirty rings: where to look, while the bitmap is what is believed.

use nestling::{
    Access, Cause, Config, DirtyPages, Fault, FaultError, Gfn, Granularity, Level, LogConfig, LogStart, SlotId, Split,
    Tracking, VcpuId,
};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{Amd, add, assert_none, small, two_by_two};

const START: Gfn = Gfn(0x400);
const ID: SlotId = SlotId(0);

fn log(granularity: Granularity) -> LogConfig {
    let (tracking, start, split) = (Tracking::WriteProtect, LogStart::Clean, Split::OnDemand);
    LogConfig { tracking, granularity, start, split }
}

fn pages(ring: &mut nestling::DirtyRing) -> Vec<DirtyPages> {
    std::iter::from_fn(|| ring.take()).collect()
}

#[test]
fn a_write_is_in_its_vcpus_ring_once_until_it_is_reset() {
    let mmu = small(Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, 512);
    let mut worker = mmu.worker().unwrap();
    worker.start_log(ID, log(Granularity::Page)).unwrap();
    let [mut one, mut two] = [0, 1].map(|id| GuestCpu::new(&mmu, VcpuId(id), 1, Manners::Right).with_patience(4));
    let (mut ring, mut other) = (one.vcpu.enable_dirty_ring(64).unwrap(), two.vcpu.enable_dirty_ring(64).unwrap());
    let entry = |page| DirtyPages { slot: ID, page, level: Level::K4 };
    for page in [7, 3, 7, 70] {
        assert_eq!(one.run_one(Gfn(START.0 + page), Access::Write), Done::Memory);
    }
    assert_eq!(two.run_one(Gfn(START.0 + 3), Access::Write), Done::Memory);
    assert_eq!(two.run_one(Gfn(START.0 + 9), Access::Write), Done::Memory);
    let taken = pages(&mut ring);
    assert_eq!(taken, [entry(7), entry(3), entry(70)]);
    assert_eq!(pages(&mut other), [entry(9)], "what another vCPU has noted already is no news");
    // Until they are reset, writes to them are no news either.
    assert_eq!(one.run_one(Gfn(START.0 + 7), Access::Write), Done::Memory);
    assert!(ring.is_empty());
    let locks = mmu.counters().exclusive_locks;
    assert_eq!(worker.reset_dirty(&taken), 3);
    assert_eq!(worker.reset_dirty(&taken), 0, "they are clean");
    assert_eq!(mmu.counters().exclusive_locks, locks);
    assert_eq!(one.run_one(Gfn(START.0 + 7), Access::Write), Done::Memory);
    assert_eq!(pages(&mut ring), [entry(7)]);
    let mut bits = [0; 8];
    assert_eq!(worker.harvest_dirty(ID, 0, &mut bits).unwrap(), 2);
    assert_eq!(bits[0], 1 << 7 | 1 << 9);
    assert_none(&mmu.host().violations());
}

#[test]
fn a_nearly_full_ring_keeps_its_vcpu_out_and_loses_nothing() {
    let mmu = small(Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, START, 512);
    let mut worker = mmu.worker().unwrap();
    worker.start_log(ID, log(Granularity::Page)).unwrap();
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut ring = cpu.vcpu.enable_dirty_ring(16).unwrap();
    let written = (0..100).take_while(|page| match cpu.run_one(Gfn(START.0 + page), Access::Write) {
        Done::Memory => true,
        Done::Failed(FaultError::DirtyRingFull) => false,
        other => panic!("{other:?}"),
    });
    let written = written.count() as u64;
    assert!((8..16).contains(&written), "{written}");
    assert!(ring.len() >= written);
    let taken = pages(&mut ring);
    assert_eq!(cpu.run_one(Gfn(START.0 + 200), Access::Write), Done::Memory, "emptied, the vCPU goes on");
    worker.reset_dirty(&taken);
    let mut bits = [0; 8];
    worker.harvest_dirty(ID, 0, &mut bits).unwrap();
    assert_eq!(bits[3], 1 << 8);
    assert_none(&mmu.host().violations());
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
    let mut cpu = GuestCpu::<<Amd as nestling::Host>::Format>::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut ring = cpu.vcpu.enable_dirty_ring(64).unwrap();
    assert_eq!(cpu.run_one(Gfn(START.0 + 600), Access::Write), Done::Memory);
    let taken = pages(&mut ring);
    assert_eq!(taken, [DirtyPages { slot: ID, page: 600, level: Level::M2 }]);
    assert_eq!(worker.reset_dirty(&taken), 512);
    assert_eq!(worker.harvest_dirty(ID, 0, &mut [0; 16]).unwrap(), 0);
    assert_none(&mmu.host().violations());
}
