//! Dirty rings of vCPUs on shadow tables: as with nested paging, where to look, while the bitmap is what is believed.

use nestling::guest::Width;
use nestling::slots::dirty::{Granularity, LogConfig, LogStart, Split, Tracking};
use nestling::{Access, DirtyPages, DirtyRing, FaultError, Gfn, Level, SlotId};
use nestling_checks::shadow::cpu::{Done, ShadowCpu};
use nestling_checks::shadow::small::{
    ALL, DATA, KERNEL, LONG, OTHER_ROOT, TABLES, ask, cpu, end, machine, write_entry,
};

const ID: SlotId = SlotId(0);
const LOG: LogConfig = LogConfig {
    tracking: Tracking::WriteProtect,
    granularity: Granularity::Page,
    start: LogStart::Clean,
    split: Split::OnDemand,
};

fn pages(ring: &mut DirtyRing) -> Vec<DirtyPages> {
    std::iter::from_fn(|| ring.take()).collect()
}

const fn entry(page: u64) -> DirtyPages {
    DirtyPages { slot: ID, page, level: Level::K4 }
}

fn write(cpu: &mut ShadowCpu, page: u64) -> Done {
    cpu.access(ask(page, Access::Write, KERNEL), None)
}

#[test]
fn a_write_is_in_its_vcpus_ring_once_until_it_is_reset() {
    let (mmu, mut worker) = machine(64);
    worker.start_log(ID, LOG).unwrap();
    let [mut one, mut two] = [0, 1].map(|id| cpu(&mmu, id, LONG));
    let (mut ring, mut other) = (one.vcpu.enable_dirty_ring(64).unwrap(), two.vcpu.enable_dirty_ring(64).unwrap());
    for page in [27, 23, 27, 60] {
        assert_eq!(write(&mut one, page), Done::Memory);
    }
    for page in [23, 29] {
        assert_eq!(write(&mut two, page), Done::Memory);
    }
    let taken = pages(&mut ring);
    assert_eq!(taken, [entry(27), entry(23), entry(60)]);
    assert_eq!(pages(&mut other), [entry(29)], "what another vCPU has noted already is no news");
    // Until they are reset, writes to them are no news either, by whatever root, nor do reads take the right away.
    one.load_cr3(OTHER_ROOT << 12);
    assert_eq!(one.access(ask(27, Access::Read, KERNEL), None), Done::Memory);
    let fixed = mmu.counters().faults_fixed;
    assert_eq!(write(&mut one, 27), Done::Memory);
    assert_eq!(mmu.counters().faults_fixed, fixed);
    assert!(ring.is_empty());
    assert_eq!(worker.reset_dirty(&taken), 3);
    assert_eq!(worker.reset_dirty(&taken), 0, "they are clean");
    assert_eq!(write(&mut one, 27), Done::Memory);
    assert_eq!(pages(&mut ring), [entry(27)]);
    let mut bits = [0];
    assert_eq!(worker.harvest_dirty(ID, 0, &mut bits).unwrap(), 2);
    assert_eq!(bits[0], 1 << 27 | 1 << 29);
    end(mmu, worker, vec![one, two]);
}

#[test]
fn a_nearly_full_ring_keeps_its_vcpu_out_and_loses_nothing() {
    let (mmu, mut worker) = machine(64);
    worker.start_log(ID, LOG).unwrap();
    let mut cpu = cpu(&mmu, 0, LONG);
    let mut ring = cpu.vcpu.enable_dirty_ring(16).unwrap();
    let written = (DATA..60).take_while(|page| match write(&mut cpu, *page) {
        Done::Memory => true,
        Done::Failed(FaultError::DirtyRingFull) => false,
        other => panic!("{other:?}"),
    });
    let written = written.count() as u64;
    assert!((8..16).contains(&written), "{written}");
    assert!(ring.len() >= written);
    assert!(matches!(cpu.vcpu.enter(), Err(FaultError::DirtyRingFull)));
    let taken = pages(&mut ring);
    assert_eq!(write(&mut cpu, 60), Done::Memory, "emptied, the vCPU goes on");
    worker.reset_dirty(&taken);
    let mut bits = [0];
    worker.harvest_dirty(ID, 0, &mut bits).unwrap();
    assert_eq!(bits[0], 1 << 60);
    end(mmu, worker, vec![cpu]);
}

/// What a guest does to its tables, and what its CPU does to them.
#[test]
fn tables_and_the_marks_in_them_are_written_as_any_page() {
    let (mmu, mut worker) = machine(64);
    let mut cpu = cpu(&mmu, 0, LONG);
    // An entry that was never used.
    mmu.host().prepare(Gfn(TABLES[3]), 100 * 8, Width::Eight, DATA << 12 | ALL & !(1 << 5 | 1 << 6));
    worker.start_log(ID, LOG).unwrap();
    let mut ring = cpu.vcpu.enable_dirty_ring(64).unwrap();
    assert_eq!(cpu.access(ask(100, Access::Read, KERNEL), None), Done::Memory);
    let taken = pages(&mut ring);
    assert_eq!(taken, [entry(TABLES[3])], "the accessed bit");
    assert_eq!(worker.reset_dirty(&taken), 1);
    assert_eq!(write(&mut cpu, 100), Done::Memory);
    assert_eq!(pages(&mut ring), [entry(TABLES[3]), entry(DATA)], "the dirty bit, and the page");
    write_entry(&mut cpu, TABLES[2], 7, 0);
    assert_eq!(pages(&mut ring), [entry(TABLES[2])]);
    end(mmu, worker, vec![cpu]);
}
