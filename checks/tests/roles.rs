//! Roots by role: address spaces that see other memory at the same addresses, tables without accessed and dirty bits,
//! and that there is one valid root a role.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nestling::format::{Ept, Npt};
use nestling::{
    Access, AdBits, AddressSpace, Gfn, GfnRange, Level, Mmu, Outcome, Role, SlotConfig, SlotFlags, SlotId, VcpuId,
};
use nestling_checks::ghost::tree::Tree;
use nestling_checks::machine::cpu::Cpu;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables, current_root, roles};
use nestling_checks::scene::{aligned, assert_none, small, two_by_two};

const START: Gfn = Gfn(0x400);

fn add<F: Cpu>(mmu: &Arc<Mmu<Machine<F>>>, id: u32, space: AddressSpace, start: Gfn, pages: u64) {
    let backing = mmu.host().ghost().make_object(aligned(start, pages));
    let flags = SlotFlags::empty();
    let config = SlotConfig { id: SlotId(id), space, base: start.gpa(), size: pages << 12, flags, backing };
    mmu.host().ghost().adding(&config);
    let done = mmu.worker().expect("a worker is free").add_slot(config);
    mmu.host().ghost().added(&config, done.is_ok());
    done.expect("it overlaps nothing of its space");
}

fn leaves(trees: &[Tree], role: Role) -> usize {
    trees.iter().filter(|tree| tree.role == role).map(|tree| tree.leaves.len()).sum()
}

/// Both spaces have memory at the same place, and one of them has more. The ghost sees every access and knows whose
/// memory it has to reach.
#[test]
fn address_spaces_have_slots_of_their_own() {
    let mmu = small(two_by_two());
    let (main, smm) = (mmu.role(), mmu.role().in_space(AddressSpace::Smm));
    add(&mmu, 0, AddressSpace::Main, START, 512);
    add(&mmu, 1, AddressSpace::Smm, START, 1024);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let beyond = Gfn(START.0 + 512);
    for round in 0..3 {
        cpu.set_role(main);
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        assert_eq!(cpu.run_one(beyond, Access::Write), Done::Mmio);
        cpu.set_role(smm);
        assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
        assert_eq!(cpu.run_one(beyond, Access::Write), Done::Memory);
        // The previous root was at hand each time: nothing was made or mapped twice.
        let counters = mmu.counters();
        assert_eq!((counters.roots_made, counters.leaves_2m), (2, 3), "round {round}");
    }
    let trees = check_tables(&mmu);
    assert_eq!((leaves(&trees, main), leaves(&trees, smm)), (1, 2));

    // A slot's change concerns its own space: the other keeps its mappings.
    let mut worker = mmu.worker().expect("a worker is free");
    mmu.host().ghost().deleting(SlotId(1));
    worker.delete_slot(SlotId(1)).expect("it is there");
    mmu.host().ghost().deleted(SlotId(1), true);
    let trees = check_tables(&mmu);
    assert_eq!((leaves(&trees, main), leaves(&trees, smm)), (1, 0));
    assert_eq!(cpu.run_one(START, Access::Write), Done::Mmio);
    cpu.set_role(main);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);

    // Memory that goes back to the host goes in all of them.
    add(&mmu, 2, AddressSpace::Smm, START, 8);
    cpu.set_role(smm);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    drop(worker.invalidate(GfnRange { start: START, end: beyond }));
    assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
    assert_none(&mmu.host().violations());
}

/// An answer of the backing for one space does not end up in the other.
#[test]
fn what_a_vcpu_remembers_of_a_slot_does_not_outlive_its_space() {
    let mmu = small(two_by_two());
    add(&mmu, 0, AddressSpace::Main, START, 16);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    cpu.set_role(mmu.role().in_space(AddressSpace::Smm));
    assert_eq!(cpu.run_one(Gfn(START.0 + 1), Access::Write), Done::Mmio);
    // And an MMIO entry of one space says nothing of the other.
    cpu.set_role(mmu.role());
    assert_eq!(cpu.run_one(Gfn(START.0 + 1), Access::Write), Done::Memory);
    assert_none(&mmu.host().violations());
}

/// Every role at once, on two vCPUs: one root each, found again by whoever wants it, and never an obsolete one.
#[test]
fn there_is_one_valid_root_a_role() {
    let mmu = small(two_by_two());
    for space in AddressSpace::ALL {
        add(&mmu, space as u32, space, START, 512);
    }
    let mut cpus = [0, 1].map(|id| GuestCpu::new(&mmu, VcpuId(id), 1, Manners::Right).with_patience(4));
    let count = roles().count() as u64;
    assert_eq!(count, 8);
    for round in 1..=3 {
        for role in roles() {
            for cpu in &mut cpus {
                cpu.set_role(role);
                assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
            }
        }
        let counters = mmu.counters();
        assert_eq!((counters.roots_made, counters.leaves_2m), (round * count, count));
        assert_eq!(check_tables(&mmu).len(), roles().count());
        let mut worker = mmu.worker().expect("a worker is free");
        let before: Vec<_> = roles().map(|role| current_root(&mut worker, role)).collect();
        assert!(before.iter().all(Option::is_some));
        worker.zap_all();
        // vCPUs still hold the old ones, empty; nobody finds them by their role any more.
        assert!(roles().all(|role| current_root(&mut worker, role).is_none()));
    }
    assert_none(&mmu.host().violations());
}

fn without_bits<F: Cpu>() {
    let mmu = Machine::<F>::build(Build::default(), two_by_two());
    add(&mmu, 0, AddressSpace::Main, START, 1024);
    add(&mmu, 1, AddressSpace::Main, Gfn(0), 8);
    let role = mmu.role().with_ad_bits(AdBits::Off);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    cpu.set_role(role);
    let mut worker = mmu.worker().expect("a worker is free");
    let mut raw = |gfn| worker.walk(role, gfn).and_then(|walk| walk.last().copied()).expect("it was mapped").raw;

    // Read first: the guest may write from then on without anybody's noticing, so it counts as written.
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    let made = raw(START);
    assert_ne!(made & <F as Cpu>::DIRTY, 0);
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!(raw(START), made, "nothing is left for the CPU to write");

    // What the guest may not write is not written.
    let read_only = Gfn(3);
    mmu.host().ghost().changing_flags(SlotId(1), SlotFlags::READ_ONLY);
    mmu.worker().expect("a worker is free").set_slot_flags(SlotId(1), SlotFlags::READ_ONLY).expect("it is there");
    mmu.host().ghost().changed_flags(SlotId(1), SlotFlags::READ_ONLY, true);
    assert_eq!(cpu.run_one(read_only, Access::Read), Done::Memory);
    assert_eq!(raw(read_only) & <F as Cpu>::DIRTY, 0);

    // Tables with the bits beside them are as always: clean until the CPU writes.
    cpu.set_role(mmu.role());
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    let frame = current_root(&mut worker, mmu.role()).expect("it is loaded");
    let clean = |tree: Tree| tree.leaves.iter().all(|leaf| !leaf.dirty);
    assert!(clean(Tree::read::<F>(&mmu.host().arena, frame, mmu.role())));
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert!(!clean(Tree::read::<F>(&mmu.host().arena, frame, mmu.role())));
    check_tables(&mmu);
    assert_none(&mmu.host().violations());
}

#[test]
fn without_dirty_bits_a_leaf_counts_as_written_while_it_may_be() {
    without_bits::<Npt>();
    without_bits::<Ept>();
}

/// With EPTP bit 6 clear the CPU leaves the tables alone: an entry that was made clean stays so under a write.
#[test]
fn the_cpu_of_the_checks_sets_no_bits_where_it_is_told_not_to() {
    let mmu = Machine::<Ept>::build(Build::default(), two_by_two());
    add(&mmu, 0, AddressSpace::Main, START, 8);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let role = mmu.role().with_ad_bits(AdBits::Off);
    cpu.set_role(role);
    assert_eq!(cpu.run_one(START, Access::Read), Done::Memory);
    let mut worker = mmu.worker().expect("a worker is free");
    let step = *worker.walk(role, START).and_then(|walk| walk.last().copied()).as_ref().expect("it was mapped");
    let table = step.address.hfn();
    let life = mmu.host().arena.life(table).expect("it is live");
    let cell = mmu.host().arena.entry(table, life, Level::K4.index(START)).expect("it is there");
    cell.store(step.raw & !(Ept::DIRTY | Ept::ACCESSED), Ordering::Release);
    cpu.tlb.flush();
    assert_eq!(cpu.run_one(START, Access::Write), Done::Memory);
    assert_eq!(cell.load(Ordering::Acquire), step.raw & !(Ept::DIRTY | Ept::ACCESSED));
}

/// A fault hands the outcome of the role's own space, whatever was asked before, and a vCPU says what it runs on.
#[test]
fn a_vcpu_knows_its_role() {
    let mmu = small(two_by_two());
    add(&mmu, 0, AddressSpace::Smm, START, 8);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    for role in roles().chain(roles()) {
        vcpu.set_role(role);
        let turn = vcpu.enter().expect("there is a frame for the root");
        assert_eq!(turn.role(), role);
        drop(turn);
        assert_eq!(vcpu.role(), role);
        let cause = nestling::Cause::Translation;
        let outcome = vcpu.fault(nestling::Fault { gpa: START.gpa(), access: Access::Read, cause });
        match role.space() {
            AddressSpace::Main => assert_eq!(outcome, Ok(Outcome::Mmio)),
            AddressSpace::Smm => assert!(matches!(outcome, Ok(Outcome::Fixed { .. } | Outcome::Spurious))),
        }
    }
}
