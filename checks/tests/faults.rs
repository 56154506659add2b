//! The outcomes of faults: the size of the leaf, who wins a race, and what running out of memory changes.

use std::sync::{Arc, Barrier};

use nestling::format::MemoryType;
use nestling::host::Extent;
use nestling::{
    Access, AddressSpace, Cause, Config, Fault, FaultError, Gfn, GfnRange, Hfn, Level, Outcome, Role, SlotConfig,
    SlotFlags, SlotId, SlotZap, VcpuId,
};
use nestling_checks::ghost::object::{Object, Page, Shape};
use nestling_checks::machine::arena::Refuse;
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::machine::{Build, Machine, check_tables};
use nestling_checks::scene::{add, aligned, assert_none, deep, small, two_by_two};
use proptest::prelude::*;

fn fault(gfn: Gfn, access: Access) -> Fault {
    Fault { gpa: gfn.gpa(), access, cause: Cause::Translation }
}

/// The largest leaf for `gfn`, found by looking at every page of its block.
fn naive_level(slot: GfnRange, object: &Object, gfn: Gfn, largest: Level) -> Level {
    let page = |gfn: u64| gfn - slot.start.0 + object.shape.lead;
    let frame = |gfn: u64| match object.page(page(gfn)) {
        Page::At(frame) => frame.0,
        Page::Taken(_) => unreachable!("nothing is taken here"),
    };
    let fits = |level: Level| {
        let first = gfn.0 / level.pages() * level.pages();
        let all = first..first + level.pages();
        level <= largest
            && slot.start.0 <= all.start
            && all.end <= slot.end.0
            && frame(first).is_multiple_of(level.pages())
            && all.clone().all(|gfn| {
                // The backing names no run longer than a chunk, even where two happen to touch.
                page(gfn) / object.shape.chunk == page(first) / object.shape.chunk
                    && frame(gfn) == frame(first) + (gfn - first)
            })
    };
    [Level::G1, Level::M2].into_iter().find(|level| fits(*level)).unwrap_or(Level::K4)
}

/// Near a border of 2 MiB, or of 1 GiB.
fn near_border() -> impl Strategy<Value = u64> {
    let border = prop_oneof![(0u64..6).prop_map(|block| block * 512), (0u64..4).prop_map(|block| block << 18)];
    (border, prop_oneof![4 => Just(0i64), 1 => -2i64..3]).prop_map(|(border, off)| border.saturating_add_signed(off))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200 + 2000 * deep() as u32, ..ProptestConfig::default() })]

    #[test]
    fn the_leaf_is_the_largest_that_fits(
        (start, end) in (near_border(), near_border()).prop_filter("not empty", |(start, end)| start < end),
        at in near_border(),
        (lead, skew) in (0u64..3, prop_oneof![4 => Just(0u64), 1 => 1u64..3, 1 => Just(512)]),
        (chunk, gap) in (prop_oneof![3 => Just(1u64 << 40), 1 => Just(512), 1 => Just(700), 1 => 1u64..9], 0u64..2),
        largest in prop_oneof![Just(Level::K4), Just(Level::M2), Just(Level::G1)],
    ) {
        let slot = GfnRange { start: Gfn(start), end: Gfn(end) };
        let gfn = Gfn(at.clamp(start, end - 1));
        let phase = start.wrapping_sub(lead).wrapping_add(skew) % (1 << 18);
        let shape = Shape { pages: slot.pages() + 2 * lead, lead, phase, chunk, gap, writable: true };
        let config = Config { vcpus: 1, workers: 2, largest, ..Config::default() };
        let mmu = Machine::<nestling::format::Npt>::build(Build { tables: 16, ..Build::default() }, config);
        let backing = mmu.host().ghost().make_object(shape);
        let config = SlotConfig {
            id: SlotId(0),
            space: AddressSpace::Main,
            base: slot.start.gpa(),
            size: slot.pages() << 12,
            flags: SlotFlags::empty(),
            backing,
        };
        mmu.host().ghost().adding(&config);
        mmu.worker().expect("a worker is free").add_slot(config).expect("it fits");
        mmu.host().ghost().added(&config, true);
        let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
        drop(vcpu.enter().expect("there is a frame for the root"));
        let level = naive_level(slot, mmu.host().ghost().object(backing).expect("it was made"), gfn, largest);
        prop_assert_eq!(vcpu.fault(fault(gfn, Access::Write)), Ok(Outcome::Fixed { level }));
        prop_assert_eq!(vcpu.fault(fault(gfn, Access::Read)), Ok(Outcome::Spurious));
        drop(vcpu);
        check_tables(&mmu);
        assert_none(&mmu.host().violations());
    }
}

/// Many vCPUs want the same frames at once: each frame is mapped once, nobody fails, no frame of a table is lost.
#[test]
fn a_race_has_one_winner() {
    const VCPUS: u16 = 4;
    let mmu = small(Config { vcpus: VCPUS, largest: Level::K4, ..two_by_two() });
    // Apart by 1 GiB, so that each round makes tables of three levels.
    let rounds = 40u64;
    for round in 0..rounds {
        add(&mmu, 0, Gfn(round << 18), 16);
        let line = Barrier::new(VCPUS.into());
        let fixed: u64 = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..VCPUS)
                .map(|id| {
                    let (mmu, line) = (&mmu, &line);
                    scope.spawn(move || {
                        let mut vcpu = mmu.vcpu(VcpuId(id)).expect("each number once");
                        drop(vcpu.enter().expect("there is a frame for the root"));
                        line.wait();
                        let outcomes = (0..16).map(|page| vcpu.fault(fault(Gfn((round << 18) + page), Access::Write)));
                        outcomes
                            .filter(|outcome| match outcome {
                                Ok(Outcome::Fixed { .. }) => true,
                                Ok(Outcome::Spurious) => false,
                                other => panic!("{other:?}"),
                            })
                            .count() as u64
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().expect("it does not panic")).sum()
        });
        assert_eq!((fixed, mmu.counters().leaves_4k), (16, 16));
        check_tables(&mmu);
        mmu.host().ghost().deleting(SlotId(0));
        mmu.worker().expect("a worker is free").delete_slot(SlotId(0)).expect("it is there");
        mmu.host().ghost().deleted(SlotId(0), true);
    }
    let counters = mmu.counters();
    assert_eq!(counters.faults_fixed, rounds * 16);
    assert_eq!(counters.faults_spurious, rounds * 16 * u64::from(VCPUS - 1));
    assert_none(&mmu.host().violations());
}

/// Frames for tables run out at every possible point of a program that makes tables of all levels: an error each time,
/// nothing half-done, and the same access goes through when there are frames again.
#[test]
fn running_out_of_tables_changes_nothing() {
    for root_level in [Level::L4, Level::L5] {
        for refused in 0..24 {
            let mmu = small(Config { root_level, largest: Level::K4, ..two_by_two() });
            let places = [Gfn(5), Gfn(512), Gfn(3 << 18), Gfn((1 << 36) - 1)];
            for (id, gfn) in places.into_iter().enumerate() {
                add(&mmu, id as u32, gfn, 1);
            }
            mmu.host().ghost().tables_may_run_out = true;
            mmu.host().arena.refuse(Refuse::After(refused));
            let mut cpu = GuestCpu::new(&mmu, VcpuId(0), refused, Manners::Right).with_patience(4);
            let mut failed = 0;
            for gfn in places {
                let mut done = cpu.run_one(gfn, Access::Write);
                if done == Done::Failed(FaultError::OutOfTables) {
                    failed += 1;
                    check_tables(&mmu);
                    assert_eq!(cpu.run_one(gfn, Access::Write), Done::Failed(FaultError::OutOfTables));
                    mmu.host().arena.refuse(Refuse::Never);
                    done = cpu.run_one(gfn, Access::Write);
                    mmu.host().arena.refuse(Refuse::After(refused));
                }
                assert_eq!(done, Done::Memory);
                check_tables(&mmu);
            }
            assert!(refused > 0 || failed > 0, "nothing was refused");
            drop(cpu);
            assert_none(&mmu.host().violations());
        }
    }
}

/// Memory runs out every few requests while a guest sweeps over its memory.
#[test]
fn a_sweep_gets_through_in_spite_of_refusals() {
    let mmu = small(Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, Gfn(0), 20 * 512);
    mmu.host().ghost().tables_may_run_out = true;
    mmu.host().arena.refuse(Refuse::Every(3));
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut failed = 0;
    for page in (0..20 * 512).step_by(64) {
        loop {
            match cpu.run_one(Gfn(page), Access::Write) {
                Done::Memory => break,
                Done::Failed(FaultError::OutOfTables) => failed += 1,
                other => panic!("{other:?}"),
            }
            assert!(failed < 1000, "no progress");
        }
    }
    assert!(failed > 0);
    check_tables(&mmu);
    assert_none(&mmu.host().violations());
}

/// Frames that wait until a reader has left are waited for, and are no reason for an error.
#[test]
fn frames_on_their_way_back_are_waited_for() {
    const GIB: u64 = 1 << 18;
    let mmu = Machine::build(Build { tables: 40, ..Build::default() }, Config { largest: Level::K4, ..two_by_two() });
    add(&mmu, 0, Gfn(0), 40 * GIB);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let mut touch = |place: u64| {
        vcpu.fault(Fault { gpa: Gfn(place * GIB).gpa(), access: Access::Write, cause: Cause::Translation })
    };
    mmu.host().ghost().tables_may_run_out = true;
    let full = (0..40).find(|place| touch(*place) == Err(FaultError::OutOfTables)).expect("there are 40 tables");
    let (mut worker, mut reader) = (mmu.worker().expect("a worker"), mmu.worker().expect("another"));
    let walk = reader.walk(mmu.role(), Gfn(0)).expect("there is a root");
    let (is_inside, inside) = std::sync::mpsc::channel();
    let (host, before) = (Arc::downgrade(&mmu), mmu.host().arena.in_vain());
    mmu.host().on_next_look_at(
        walk.last().expect("it has steps").address.hfn(),
        Box::new(move || {
            let mmu = host.upgrade().expect("the test holds it");
            is_inside.send(()).expect("the test waits");
            // Until the fault has found that there is none.
            while mmu.host().arena.in_vain() == before {
                std::thread::yield_now();
            }
        }),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| reader.walk(mmu.role(), Gfn(0)));
        inside.recv().expect("the reader comes by");
        worker.zap(GfnRange { start: Gfn(GIB), end: Gfn(full * GIB) });
        assert!(mmu.host().arena.in_vain() == before && mmu.counters().table_frames > 30, "they are back already");
        assert!(matches!(touch(full), Ok(Outcome::Fixed { .. })));
    });
    // Nothing is on its way any more: then it is one.
    let full = (full + 1..40).find(|place| touch(*place) == Err(FaultError::OutOfTables));
    assert!(full.is_some());
    assert_none(&mmu.host().violations());
}

/// A backing that breaks its word gets an error, not a wrong mapping, and not a panic: whatever the frames are.
#[test]
fn a_backing_that_changes_its_mind_is_told() {
    for (gfn, hfn) in [(Gfn(0x400), Hfn(7)), (Gfn(0x5ff), Hfn(0)), (Gfn(0x5ff), Hfn(1 << 30)), (Gfn(0x401), Hfn(0))] {
        let mmu = small(two_by_two());
        add(&mmu, 0, Gfn(0x400), 512);
        let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
        drop(vcpu.enter().expect("there is a frame for the root"));
        // Read-only by the backing, so that a write has to come back to the entry.
        let answer = |gfns, hfn, writable| Extent { gfns, hfn, writable, memory: MemoryType::WriteBack };
        let all = GfnRange { start: Gfn(0x400), end: Gfn(0x600) };
        mmu.host().on_next_resolve(Box::new(move |_, _| Ok(answer(all, Hfn(0x40_0000), false))));
        assert_eq!(vcpu.fault(fault(gfn, Access::Read)), Ok(Outcome::Fixed { level: Level::M2 }));
        let one = GfnRange { start: gfn, end: Gfn(gfn.0 + 1) };
        mmu.host().on_next_resolve(Box::new(move |_, _| Ok(answer(one, hfn, true))));
        assert_eq!(vcpu.fault(fault(gfn, Access::Write)), Err(FaultError::BackingChanged), "{gfn:?} {hfn:?}");
        // Nor does it get to name other frames than the one that was asked for.
        let beside = GfnRange { start: Gfn(gfn.0 + 1), end: Gfn(gfn.0 + 9) };
        mmu.host().on_next_resolve(Box::new(move |_, _| Ok(answer(beside, hfn, true))));
        assert_eq!(vcpu.fault(fault(gfn, Access::Write)), Err(FaultError::BadExtent));
    }
}

/// Rights that the backing has come to allow are added in place; the TLBs that do not know fault once for nothing.
#[test]
fn rights_grow_in_place() {
    let mmu = small(two_by_two());
    let config = add(&mmu, 0, Gfn(0x400), 512);
    let mut first = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    let mut second = GuestCpu::new(&mmu, VcpuId(1), 2, Manners::Right).with_patience(4);
    let hook = move |mmu: &std::sync::Arc<nestling::Mmu<nestling_checks::scene::Amd>>| {
        let inner = std::sync::Arc::clone(mmu);
        mmu.host().on_next_resolve(Box::new(move |slot, gfn| {
            inner.host().ghost().resolve(slot, gfn, true).map(|extent| Extent { writable: false, ..extent })
        }));
    };
    hook(&mmu);
    assert_eq!(first.run_one(Gfn(0x410), Access::Read), Done::Memory);
    assert_eq!(second.run_one(Gfn(0x410), Access::Read), Done::Memory);
    assert!(!check_tables(&mmu)[0].leaves[0].allows.write);
    assert_eq!(first.run_one(Gfn(0x410), Access::Write), Done::Memory);
    assert!(check_tables(&mmu)[0].leaves[0].allows.write);
    assert_eq!(second.run_one(Gfn(0x410), Access::Write), Done::Memory);
    let counters = mmu.counters();
    assert_eq!((counters.faults_fixed, counters.leaves_2m, counters.leaves_zapped), (2, 1, 0));
    assert_eq!(config.id, SlotId(0));
    assert_none(&mmu.host().violations());
}

/// A zap of everything costs each vCPU the roots that are obsolete, and only those.
#[test]
fn only_obsolete_roots_are_dropped() {
    for slot_zap in [SlotZap::Slot, SlotZap::Everything] {
        let mmu = small(Config { root_level: Level::L5, slot_zap, ..two_by_two() });
        add(&mmu, 0, Gfn(0x400), 512);
        let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
        let roles = [Level::L5, Level::L4].map(|level| Role::new(level).expect("roots have these levels"));
        for role in roles {
            cpu.set_role(role);
            assert_eq!(cpu.run_one(Gfn(0x400), Access::Write), Done::Memory);
        }
        assert_eq!((check_tables(&mmu).len(), mmu.counters().leaves_2m), (2, 2));
        let before = mmu.counters();
        // A zap of a range and a change of another slot leave the roots alone, unless that is configured.
        mmu.worker().expect("a worker is free").zap(GfnRange { start: Gfn(0), end: Gfn(9) });
        add(&mmu, 1, Gfn(0x9000), 1);
        assert_eq!(cpu.run_one(Gfn(0x400), Access::Write), Done::Memory);
        assert_eq!(mmu.counters().roots_freed, before.roots_freed);
        mmu.worker().expect("a worker is free").zap_all();
        assert_eq!(mmu.counters().mapped_bytes(), [0; 3]);
        for role in roles {
            cpu.set_role(role);
            assert_eq!(cpu.run_one(Gfn(0x400), Access::Write), Done::Memory);
        }
        assert_eq!(mmu.counters().roots_freed, before.roots_freed + 2);
        assert_eq!(mmu.counters().leaves_2m, 2);
        check_tables(&mmu);
        assert_none(&mmu.host().violations());
    }
}

/// A root of four levels does not reach as far as a slot may: what is above its limit is no memory for its vCPU, and not
/// the memory whose entry has the same index.
#[test]
fn a_root_reaches_no_further_than_its_levels() {
    let limit = Level::L4.root_limit();
    let mmu = small(Config { root_level: Level::L5, ..two_by_two() });
    add(&mmu, 0, Gfn(limit.0 - 8), 16);
    add(&mmu, 1, Gfn(0), 16);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("the number is free");
    // The slot is remembered from a root that does reach.
    drop(vcpu.enter().expect("there is a root"));
    assert!(matches!(vcpu.fault(fault(Gfn(limit.0 + 3), Access::Read)), Ok(Outcome::Fixed { .. })));
    vcpu.set_role(Role::new(Level::L4).expect("a root's level"));
    drop(vcpu.enter().expect("there is a root"));
    // Above, below (which remembers the slot again), and above.
    assert_eq!(vcpu.fault(fault(Gfn(limit.0 + 3), Access::Read)), Ok(Outcome::Mmio));
    assert!(matches!(vcpu.fault(fault(Gfn(limit.0 - 1), Access::Read)), Ok(Outcome::Fixed { .. })));
    assert_eq!(vcpu.fault(fault(limit, Access::Read)), Ok(Outcome::Mmio));
    let low = vcpu.fault(fault(Gfn(3), Access::Read));
    assert!(matches!(low, Ok(Outcome::Fixed { .. })), "nothing was there before: {low:?}");
    assert_eq!(Role::new(Level::G1), None);
}

/// The shapes of the tests are what the name says: a check of the checks.
#[test]
fn an_aligned_object_is_congruent() {
    let mmu = small(two_by_two());
    let mut ghost = mmu.host().ghost();
    let object = ghost.make_object(aligned(Gfn((1 << 18) + 77), 600));
    let Some(Page::At(first)) = ghost.object(object).map(|object| object.page(0)) else { panic!("nothing is taken") };
    assert_eq!(first.0 % (1 << 18), 77);
}
