//! Memslots through the public interface: what is refused and why, and that a refusal changes nothing.

use std::sync::Arc;

use nestling::{
    Access, AddressSpace, Cause, Config, ConfigError, Fault, Gfn, GfnRange, Gpa, Level, Mmu, OutOfMemory, Outcome,
    SlotConfig, SlotError, SlotFlags, SlotId, VcpuId,
};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables};
use nestling_checks::scene::{Amd, add, assert_none, slot, small, two_by_two};
use proptest::prelude::*;

fn config(id: u32, base: u64, size: u64) -> SlotConfig {
    SlotConfig {
        id: SlotId(id),
        space: AddressSpace::Main,
        base: Gpa(base),
        size,
        flags: SlotFlags::empty(),
        backing: 0,
    }
}

#[test]
fn wrong_slots_are_refused_and_change_nothing() {
    let mmu = small(Config { slots: 2, ..two_by_two() });
    let mut worker = mmu.worker().expect("a worker is free");
    let top = 1 << 48;
    worker.add_slot(config(1, 0x10_0000, 0x4000)).expect("the first slot fits");
    let before = worker.slots();
    for (wrong, why) in [
        (config(2, 0x1000, 0), SlotError::Empty),
        (config(2, 0x1800, 0x1000), SlotError::Unaligned),
        (config(2, 0x1000, 0x1800), SlotError::Unaligned),
        (config(2, 0x1000, 1), SlotError::Unaligned),
        (config(2, top, 0x1000), SlotError::TooHigh),
        (config(2, top - 0x1000, 0x2000), SlotError::TooHigh),
        (config(2, 0x1000, !0xfff), SlotError::TooHigh),
        (config(2, !0xfff, 0x1000), SlotError::TooHigh),
        (config(2, !0xfff, !0xfff), SlotError::TooHigh),
        (config(2, 0xf_f000, 0x2000), SlotError::Overlap(SlotId(1))),
        (config(2, 0x10_3000, 0x1000), SlotError::Overlap(SlotId(1))),
        (config(2, 0, 0x1000_0000), SlotError::Overlap(SlotId(1))),
        (config(1, 0x20_0000, 0x1000), SlotError::InUse),
    ] {
        assert_eq!(worker.add_slot(wrong), Err(why), "{wrong:x?}");
        assert_eq!(worker.slots(), before);
    }
    // Neighbours on both sides and the very last frames are right.
    worker.add_slot(config(2, top - 0x1000, 0x1000)).expect("the last frame is a frame");
    assert_eq!(worker.add_slot(config(3, 0x10_4000, 0x1000)), Err(SlotError::TooMany));
    worker.delete_slot(SlotId(2)).expect("it is there");
    worker.add_slot(config(3, 0x10_4000, 0x1000)).expect("a neighbour is no overlap");
    assert_eq!(worker.delete_slot(SlotId(2)), Err(SlotError::NotFound));
    assert_eq!(worker.move_slot(SlotId(2), Gpa(0)), Err(SlotError::NotFound));
    assert_eq!(worker.set_slot_flags(SlotId(2), SlotFlags::READ_ONLY), Err(SlotError::NotFound));
    let before = worker.slots();
    assert_eq!(worker.move_slot(SlotId(1), Gpa(0x10_1000)), Err(SlotError::Overlap(SlotId(3))));
    assert_eq!(worker.move_slot(SlotId(1), Gpa(0x123)), Err(SlotError::Unaligned));
    assert_eq!(worker.move_slot(SlotId(1), Gpa(top - 0x1000)), Err(SlotError::TooHigh));
    assert_eq!(worker.slots(), before);
}

/// The reach of roots of four and of five levels.
#[test]
fn five_levels_reach_above_48_bits() {
    let high = Gfn(1 << 38);
    let mut worker = small(two_by_two()).worker().expect("a worker is free");
    assert_eq!(worker.add_slot(config(0, high.gpa().0, 0x1000)), Err(SlotError::TooHigh));
    let mmu = small(Config { root_level: Level::L5, ..two_by_two() });
    let last = Gfn((1 << 40) - 512);
    add(&mmu, 0, high, 512);
    add(&mmu, 1, last, 512);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    for gfn in [high, Gfn(high.0 + 511), last, Gfn((1 << 40) - 1)] {
        assert_eq!(cpu.run_one(gfn, Access::Write), Done::Memory);
    }
    for gfn in [Gfn(high.0 - 1), Gfn(high.0 + 512), Gfn(0), Gfn(last.0 - 1)] {
        assert_eq!(cpu.run_one(gfn, Access::Write), Done::Mmio);
    }
    let tree = check_tables(&mmu).remove(0);
    assert_eq!((tree.leaves.len(), tree.leaves_of(Level::M2)), (2, 2));
    let mut worker = mmu.worker().expect("a worker is free");
    let steps: Vec<_> =
        worker.walk(mmu.role(), high).expect("there is a root").steps().map(|step| step.level).collect();
    assert_eq!(steps, [Level::L5, Level::L4, Level::G1, Level::M2]);
    worker.zap(GfnRange { start: Gfn(0), end: Gfn(1 << 45) });
    worker.collect();
    let tree = check_tables(&mmu).remove(0);
    assert_eq!((tree.leaves.len(), tree.tables, tree.reserved), (0, 1, 0), "only the root stays");
    assert_none(&mmu.host().violations());
}

/// No address that a guest can form ends in anything but an outcome.
#[test]
fn addresses_beyond_the_roots_reach_are_a_devices() {
    for root_level in [Level::L4, Level::L5] {
        let mmu = small(Config { root_level, ..two_by_two() });
        let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
        drop(vcpu.enter().expect("there is a frame for the root"));
        let edge = root_level.root_limit().gpa().0;
        for gpa in [edge - 1, edge, edge + 1, u64::MAX, 1 << 63, (1 << 52) - 1, 1 << 52] {
            for access in [Access::Read, Access::Write, Access::Execute] {
                for cause in [Cause::Translation, Cause::Reserved] {
                    assert_eq!(vcpu.fault(Fault { gpa: Gpa(gpa), access, cause }), Ok(Outcome::Mmio), "{gpa:#x}");
                }
            }
        }
    }
}

#[test]
fn wrong_configurations_are_refused() {
    let config = two_by_two();
    let build = |config| Mmu::new(bare(), config).map(|_| ());
    assert_eq!(build(config), Ok(()));
    assert_eq!(build(Config { vcpus: 0, ..config }), Err(ConfigError::Vcpus));
    assert_eq!(build(Config { vcpus: 4097, ..config }), Err(ConfigError::Vcpus));
    assert_eq!(build(Config { vcpus: 4096, ..config }), Ok(()));
    assert_eq!(build(Config { workers: 0, ..config }), Err(ConfigError::Workers));
    assert_eq!(build(Config { workers: 257, ..config }), Err(ConfigError::Workers));
    assert_eq!(build(Config { workers: 256, ..config }), Ok(()));
    for level in [Level::K4, Level::M2, Level::G1] {
        assert_eq!(build(Config { root_level: level, ..config }), Err(ConfigError::RootLevel));
        assert_eq!(build(Config { largest: level, ..config }), Ok(()));
    }
    for level in [Level::L4, Level::L5] {
        assert_eq!(build(Config { largest: level, ..config }), Err(ConfigError::Largest));
    }
}

/// A machine without an MMU.
fn bare() -> Amd {
    Machine::new(Build { tables: 1, ..Build::default() }, 1)
}

#[test]
fn vcpus_and_workers_are_counted() {
    let mmu = small(Config { vcpus: 2, workers: 2, ..two_by_two() });
    let first = mmu.vcpu(VcpuId(0)).expect("it is the first");
    assert!(mmu.vcpu(VcpuId(0)).is_none(), "each number once");
    assert!(mmu.vcpu(VcpuId(2)).is_none() && mmu.vcpu(VcpuId(u16::MAX)).is_none());
    let second = mmu.vcpu(VcpuId(1)).expect("it is the first of this number");
    drop(first);
    drop(mmu.vcpu(VcpuId(0)).expect("the number is free again"));
    drop(second);
    let workers = (mmu.worker().expect("one"), mmu.worker().expect("two"));
    assert!(matches!(mmu.worker(), Err(OutOfMemory)));
    drop(workers.0);
    mmu.worker().expect("there is room again");
}

/// 32 k slots, in an order that visits all of the address space; looked up, faulted, and deleted.
#[test]
fn many_slots() {
    const COUNT: u64 = 32 * 1024;
    let mmu = small(Config { slots: COUNT as usize, ..two_by_two() });
    let mut worker = mmu.worker().expect("a worker is free");
    let place = |id: u64| id * 7919 % COUNT;
    for id in 0..COUNT {
        worker.add_slot(config(id as u32, place(id) << 14, 0x3000)).expect("it fits");
    }
    assert_eq!(worker.add_slot(config(COUNT as u32, COUNT << 14, 0x1000)), Err(SlotError::TooMany));
    for id in (0..COUNT).step_by(7) {
        let first = Gfn(place(id) << 2);
        assert_eq!(worker.slot_at(AddressSpace::Main, Gfn(first.0 + 2)).map(|slot| slot.id()), Some(SlotId(id as u32)));
        assert_eq!(worker.slot_at(AddressSpace::Main, Gfn(first.0 + 3)), None);
    }
    let slots = worker.slots();
    assert_eq!(slots.len() as u64, COUNT);
    assert!(slots.windows(2).all(|two| two[0].range().end <= two[1].range().start));
    for id in 0..COUNT {
        worker.delete_slot(SlotId(id as u32)).expect("it is there");
    }
    assert!(worker.slots().is_empty());
}

#[test]
fn a_moved_slot_takes_its_memory_along() {
    let mmu = small(two_by_two());
    let (old, new) = (Gfn(0x400), Gfn(0x800));
    let moved = add(&mmu, 0, old, 512);
    let mut worker = mmu.worker().expect("a worker is free");
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    for (from, to) in [(old, new), (new, new), (new, Gfn(new.0 + 5)), (Gfn(new.0 + 5), old)] {
        assert_eq!(cpu.run_one(from, Access::Write), Done::Memory);
        mmu.host().ghost().moving(moved.id, to);
        worker.move_slot(moved.id, to.gpa()).expect("the place is free");
        mmu.host().ghost().moved(moved.id, to, true);
        assert_eq!(cpu.run_one(to, Access::Write), Done::Memory);
        if from != to {
            let outside = if from < to { from } else { Gfn(from.0 + 511) };
            assert_eq!(cpu.run_one(outside, Access::Read), Done::Mmio);
        }
        check_tables(&mmu);
        assert_none(&mmu.host().violations());
    }
}

#[test]
fn a_read_only_slot_is_read_and_fetched_but_not_written() {
    let mmu = small(two_by_two());
    let rom = slot(&mmu, 0, Gfn(0x400), 512, SlotFlags::READ_ONLY);
    mmu.host().ghost().adding(&rom);
    let mut worker = mmu.worker().expect("a worker is free");
    worker.add_slot(rom).expect("it fits");
    mmu.host().ghost().added(&rom, true);
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let touch = |cpu: &mut GuestCpu<_>| {
        [Access::Write, Access::Read, Access::Write, Access::Execute].map(|access| cpu.run_one(Gfn(0x410), access))
    };
    assert_eq!(touch(&mut cpu), [Done::ReadOnly, Done::Memory, Done::ReadOnly, Done::Memory]);
    for (flags, write) in [(SlotFlags::empty(), Done::Memory), (SlotFlags::READ_ONLY, Done::ReadOnly)] {
        mmu.host().ghost().changing_flags(rom.id, flags);
        worker.set_slot_flags(rom.id, flags).expect("it is there");
        mmu.host().ghost().changed_flags(rom.id, flags, true);
        assert_eq!(touch(&mut cpu), [write, Done::Memory, write, Done::Memory]);
    }
    assert_none(&mmu.host().violations());
}

/// A slot that is changing in every way at once: what the guest does on it ends, and nothing is left.
#[test]
fn nothing_is_left_at_the_end() {
    let mmu = small(two_by_two());
    let mut configs = Vec::new();
    for id in 0..4 {
        configs.push(add(&mmu, id, Gfn(u64::from(id) * 0x1_0000), 700));
    }
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    for config in &configs {
        for page in [0, 511, 512, 699] {
            assert_eq!(cpu.run_one(Gfn(config.base.gfn().0 + page), Access::Write), Done::Memory);
        }
    }
    let arena = Arc::clone(&mmu.host().arena);
    assert!(arena.live() > 4);
    // Also the tables of slots that were never deleted go with the MMU.
    drop((cpu, mmu));
    assert_eq!(arena.live(), 0);
    assert!(arena.take_misuse().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever an operator writes into a slot: an answer, never a panic, and the same as that of plain arithmetic.
    #[test]
    fn any_slot_gets_an_answer(base: u64, size: u64, aligned: bool, low in 0u32..64) {
        let mask = if aligned { !0xfff } else { !0 };
        let (base, size) = ((base >> low) & mask, (size >> (63 - low)) & mask);
        let mmu = small(Config { vcpus: 1, workers: 1, ..Config::default() });
        let mut worker = mmu.worker().expect("a worker is free");
        let right = if size == 0 {
            Err(SlotError::Empty)
        } else if base % 4096 != 0 || size % 4096 != 0 {
            Err(SlotError::Unaligned)
        } else if u128::from(base) + u128::from(size) > 1 << 48 {
            Err(SlotError::TooHigh)
        } else {
            Ok(())
        };
        prop_assert_eq!(worker.add_slot(config(0, base, size)), right);
        prop_assert_eq!(worker.slots().len(), usize::from(right.is_ok()));
    }
}
