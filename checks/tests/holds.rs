//! How an embedder sees the lock: each hold begins and ends, exclusive ones are few, and what a zap does in one hold is
//! bounded, more tightly when somebody waits.

use std::sync::{Arc, Mutex};

use std::sync::atomic::{AtomicBool, Ordering};

use nestling::events::{Event, Side};
use nestling::{
    Access, Cause, Config, Fault, Gfn, GfnRange, Granularity, Level, LogConfig, LogStart, Mmu, Outcome, SlotId, Split,
    Tracking, VcpuId, Worker,
};
use nestling_checks::machine::{Build, Machine};
use nestling_checks::scene::{Amd, add, small, two_by_two};

#[test]
fn every_hold_of_a_worker_is_told_with_its_end() {
    let mmu = small(two_by_two());
    add(&mmu, 0, Gfn(0), 64);
    let mut worker = mmu.worker().expect("a worker is free");
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let held: Arc<Mutex<(Option<Side>, Vec<Side>)>> = Arc::default();
    let seen = Arc::clone(&held);
    mmu.host().on_trace(Box::new(move |event| {
        let (now, all) = &mut *seen.lock().expect("the hook does not panic");
        match event {
            Event::LockTaken { side } => assert_eq!(now.replace(side), None, "taken inside another hold"),
            Event::LockReleased { side, .. } => {
                assert_eq!(now.take(), Some(side), "released what was not taken");
                all.push(side);
            }
            _ => {}
        }
    }));
    let mut holds = |operation: &mut dyn FnMut(&mut nestling::Worker<_>)| {
        operation(&mut worker);
        let (now, all) = &mut *held.lock().expect("the hook does not panic");
        assert_eq!(*now, None, "still held");
        std::mem::take(all)
    };
    let range = GfnRange { start: Gfn(0), end: Gfn(64) };
    assert_eq!(holds(&mut |worker| _ = worker.zap(range)), [Side::Shared]);
    let pair = holds(&mut |worker| drop(worker.invalidate(range)));
    assert_eq!(pair, [Side::Exclusive, Side::Shared, Side::Exclusive]);
    assert_eq!(holds(&mut |worker| _ = worker.zap_all())[0], Side::Exclusive);
    let delete = holds(&mut |worker| worker.delete_slot(SlotId(0)).expect("it is there"));
    assert!(delete.contains(&Side::Exclusive), "{delete:?}");
}

const START: Gfn = Gfn(3 << 18);
/// More than one hold does without being asked to let go.
const TABLES: u64 = 150;

/// An MMU with so many level-1 tables in a row, of which the first two are full and the others have one leaf.
fn mapped(restless: u64) -> Arc<Mmu<Amd>> {
    let config = Config { largest: Level::K4, ..two_by_two() };
    let mmu = Machine::build(Build { restless, ..Build::default() }, config);
    add(&mmu, 0, START, TABLES * 512);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let full = START.0..START.0 + 1024;
    for gfn in full.chain((2..TABLES).map(|table| START.0 + table * 512 + table)) {
        let fault = Fault { gpa: Gfn(gfn).gpa(), access: Access::Write, cause: Cause::Translation };
        assert!(matches!(vcpu.fault(fault), Ok(Outcome::Fixed { .. })));
    }
    mmu
}

/// What each hold of the shared side did from now on: its steps, and leaves that were gone at its end.
fn watch(mmu: &Arc<Mmu<Amd>>) -> Arc<Mutex<Vec<(u32, u64)>>> {
    let holds: Arc<Mutex<Vec<_>>> = Arc::default();
    let (seen, counters) = (Arc::clone(&holds), Arc::downgrade(mmu));
    mmu.host().on_trace(Box::new(move |event| {
        if let Event::LockReleased { side: Side::Shared, steps } = event {
            let zapped = counters.upgrade().map_or(0, |mmu| mmu.counters().leaves_zapped);
            seen.lock().expect("the hook does not panic").push((steps, zapped));
        }
    }));
    holds
}

/// Holds of what was watched, as (steps, leaves that went in it).
fn holds(watched: &Mutex<Vec<(u32, u64)>>) -> Vec<(u32, u64)> {
    let mut before = 0;
    let ends = std::mem::take(&mut *watched.lock().expect("the hook does not panic"));
    ends.into_iter().map(|(steps, zapped)| (steps, zapped - std::mem::replace(&mut before, zapped))).collect()
}

fn everything() -> GfnRange {
    GfnRange { start: START, end: Gfn(START.0 + TABLES * 512) }
}

/// No flush is owed in the roots of a zap of everything: the lock is let go after each table, whoever waits.
#[test]
fn the_back_half_holds_the_lock_for_one_table() {
    for restless in [0, 1] {
        let mmu = mapped(restless);
        let watched = watch(&mmu);
        let zapped = mmu.worker().expect("a worker is free").zap_all();
        assert_eq!((zapped.leaves, zapped.tables), (1024 + TABLES - 2, TABLES + 2), "level-1 tables, and two above");
        let holds = holds(&watched);
        assert!(holds.iter().all(|&(steps, leaves)| steps == 1 && leaves <= 512), "{holds:?}");
        assert!(holds.len() as u64 >= TABLES);
        assert_eq!(mmu.counters().yields > 0, restless > 0, "a CPU is given away only when it is wanted");
    }
}

/// Elsewhere a hold ends with a flush, so it does more when nobody waits, and no more than so much.
#[test]
fn a_hold_is_bounded_when_nobody_waits() {
    let mmu = mapped(0);
    let watched = watch(&mmu);
    mmu.worker().expect("a worker is free").zap(everything());
    let holds = holds(&watched);
    assert_eq!(holds.iter().map(|hold| hold.0).max(), Some(64), "{holds:?}");
    assert_eq!(holds.len(), 3);
}

/// And one step, when somebody always does.
#[test]
fn a_hold_is_one_step_when_others_want_the_cpu() {
    let mmu = mapped(1);
    let watched = watch(&mmu);
    mmu.worker().expect("a worker is free").zap(everything());
    let holds = holds(&watched);
    assert!(holds.iter().all(|&(steps, leaves)| steps == 1 && leaves <= 512), "{holds:?}");
}

/// Who wants the lock for itself gets it when the step is done in which it came.
#[test]
fn a_hold_ends_with_the_step_in_which_somebody_comes_to_wait() {
    let mmu = mapped(0);
    let mut worker = mmu.worker().expect("a worker is free");
    // In the middle of the third step: when its table is looked at.
    let third = worker.walk(mmu.role(), Gfn(START.0 + 2 * 512)).expect("there is a root");
    let table = third.last().expect("it has steps").address.hfn();
    let (announced, watched): (Arc<AtomicBool>, Arc<Mutex<Vec<u32>>>) = Default::default();
    let (flag, seen) = (Arc::clone(&announced), Arc::clone(&watched));
    mmu.host().on_trace(Box::new(move |event| match event {
        Event::LockTaken { side: Side::Exclusive } => flag.store(true, Ordering::Release),
        Event::LockReleased { side: Side::Shared, steps } => seen.lock().expect("no panic").push(steps),
        _ => {}
    }));
    let other = Arc::downgrade(&mmu);
    mmu.host().on_next_look_at(
        table,
        Box::new(move || {
            std::thread::spawn(move || {
                let mmu = other.upgrade().expect("the test waits");
                let far = GfnRange { start: Gfn(1 << 30), end: Gfn((1 << 30) + 1) };
                drop(mmu.worker().expect("a worker is free").invalidate(far));
            });
            while !announced.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
        }),
    );
    worker.zap(everything());
    let steps = watched.lock().expect("no panic");
    assert_eq!(steps[0], 3, "{steps:?}");
}

/// What the front half of a zap of everything does has nothing to do with how much is mapped: it looks at no table.
#[test]
fn the_front_half_touches_no_table() {
    let mmu = mapped(0);
    // When the exclusive lock was taken and when it was let go: tables looked at by then, and flushes asked for.
    let moments: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let (seen, watched) = (Arc::clone(&moments), Arc::downgrade(&mmu));
    mmu.host().on_trace(Box::new(move |event| {
        if let Event::LockTaken { side: Side::Exclusive } | Event::LockReleased { side: Side::Exclusive, .. } = event {
            let now = watched.upgrade().map(|mmu| (mmu.host().looks(), mmu.counters().flush_requests));
            seen.lock().expect("the hook does not panic").extend(now);
        }
    }));
    let before = mmu.host().looks();
    mmu.worker().expect("a worker is free").zap_all();
    let moments = moments.lock().expect("the hook does not panic");
    let [taken, released] = moments[..] else { panic!("one exclusive hold: {moments:?}") };
    assert_eq!(released.0, taken.0, "tables were looked at");
    assert_eq!(released.1 - taken.1, u64::from(mmu.config().vcpus), "every vCPU is told, once");
    assert!(mmu.host().looks() - released.0 >= TABLES && taken.0 == before, "the back half looks at all of them");
}

/// What is done for dirty logs and ages, each with the most steps that one of its holds of the shared side did, and the
/// least holds that it must have taken if it let go after each.
fn dirty_work(mmu: &Arc<Mmu<Amd>>, tracking: Tracking) -> Vec<(&'static str, Vec<u32>)> {
    let id = SlotId(0);
    let words = (TABLES * 512 / 64) as usize;
    let config = LogConfig { tracking, granularity: Granularity::Page, start: LogStart::Clean, split: Split::Eager };
    let seen: Arc<Mutex<Vec<(Side, u32)>>> = Arc::default();
    let into = Arc::clone(&seen);
    mmu.host().on_trace(Box::new(move |event| {
        if let Event::LockReleased { side, steps } = event {
            into.lock().expect("the hook does not panic").push((side, steps));
        }
    }));
    let mut worker = mmu.worker().expect("a worker is free");
    let mut parts = Vec::new();
    let mut part = |name, operation: &mut dyn FnMut(&mut Worker<Amd>)| {
        let before = mmu.counters();
        operation(&mut worker);
        let holds = std::mem::take(&mut *seen.lock().expect("the hook does not panic"));
        let exclusive = holds.iter().filter(|hold| hold.0 == Side::Exclusive).count();
        assert_eq!(exclusive, 0, "{name} took the exclusive lock");
        let after = mmu.counters();
        assert_eq!(after.exclusive_locks, before.exclusive_locks, "{name} took the exclusive lock");
        let (asked, vcpus) = (after.flush_requests - before.flush_requests, u64::from(mmu.config().vcpus));
        assert!(asked <= vcpus, "{name}: a vCPU was asked to flush more than once");
        assert!(asked == 0 || name != "age", "aging flushes nothing");
        parts.push((name, holds.into_iter().map(|hold| hold.1).collect()));
    };
    part("start", &mut |worker| worker.start_log(id, config).expect("there is none yet"));
    part("harvest", &mut |worker| {
        worker.merge_dirty(id, 0, &vec![u64::MAX; words]).expect("it is on");
        assert_eq!(worker.harvest_dirty(id, 0, &mut vec![0; words]), Ok(TABLES * 512));
    });
    part("clear", &mut |worker| {
        worker.merge_dirty(id, 0, &vec![u64::MAX; words]).expect("it is on");
        assert_eq!(worker.clear_dirty(id, 0, &vec![u64::MAX; words]), Ok(TABLES * 512));
    });
    part("age", &mut |worker| assert!(worker.clear_young(Default::default(), everything()).mapped > 0));
    parts
}

/// Nobody waits for more than one table's work, and nothing of it takes the lock for itself: a vCPU that faults meanwhile
/// is held up by none of it.
#[test]
fn dirty_work_and_aging_let_go_after_each_table_when_somebody_waits() {
    for tracking in [Tracking::WriteProtect, Tracking::DirtyBit] {
        for (name, holds) in dirty_work(&mapped(1), tracking) {
            assert!(holds.iter().all(|&steps| steps == 1), "{name}, {tracking:?}: {holds:?}");
            assert!(holds.len() as u64 >= TABLES, "{name}, {tracking:?}: {} holds", holds.len());
        }
        for (name, holds) in dirty_work(&mapped(0), tracking) {
            assert!(
                holds.iter().any(|&steps| steps > 1),
                "{name}, {tracking:?}: nobody waits, so why let go: {holds:?}"
            );
        }
    }
}

/// A log that starts with everything dirty looks at no table and tells no vCPU, however much is mapped.
#[test]
fn a_log_that_starts_all_dirty_looks_at_no_table() {
    let mmu = mapped(0);
    let mut worker = mmu.worker().expect("a worker is free");
    let mut start = |start| {
        let config = LogConfig { start, ..LogConfig::default() };
        let before = (mmu.host().looks(), mmu.counters().flush_requests);
        worker.start_log(SlotId(0), config).expect("there is none yet");
        let after = (mmu.host().looks(), mmu.counters().flush_requests);
        worker.stop_log(SlotId(0)).expect("it is on");
        (after.0 - before.0, after.1 - before.1)
    };
    assert_eq!(start(LogStart::AllDirty), (0, 0));
    assert!(start(LogStart::Clean).0 >= TABLES, "else what is counted is not what it would look at");
}

/// What is done in parts of the memory that a vCPU does not use keeps it waiting for nothing, not even for a batch: it faults
/// in the middle of a hold, and is served within it.
#[test]
fn a_vcpu_that_faults_in_the_middle_of_dirty_work_is_served_within_it() {
    type Work = fn(&mut Worker<Amd>);
    const WORDS: usize = (TABLES * 512 / 64) as usize;
    let id = SlotId(0);
    let start: Work = |worker| {
        let config = LogConfig { start: LogStart::Clean, ..LogConfig::default() };
        worker.start_log(SlotId(0), config).expect("there is none yet");
    };
    let harvest: Work = |worker| _ = worker.harvest_dirty(SlotId(0), 0, &mut vec![0; WORDS]).expect("it is on");
    let clear: Work = |worker| _ = worker.clear_dirty(SlotId(0), 0, &vec![u64::MAX; WORDS]).expect("it is on");
    let age: Work = |worker| _ = worker.clear_young(Default::default(), everything());
    let works: [(&str, Work); 4] = [("start", start), ("harvest", harvest), ("clear", clear), ("age", age)];
    for (name, work) in works {
        let mmu = mapped(0);
        let mut worker = mmu.worker().expect("a worker is free");
        if name != "start" {
            worker.start_log(id, LogConfig::default()).expect("there is none yet");
            worker.harvest_dirty(id, 0, &mut vec![0; WORDS]).expect("it is on");
            worker.merge_dirty(id, 0, &vec![u64::MAX; WORDS]).expect("it is on");
        }
        let far = worker.walk(mmu.role(), Gfn(START.0 + (TABLES - 1) * 512)).expect("there is a root");
        let table = far.last().expect("it has steps").address.hfn();
        let mut vcpu = mmu.vcpu(VcpuId(1)).expect("it is the first");
        drop(vcpu.enter().expect("there is a frame for the root"));
        let held: Arc<Mutex<bool>> = Arc::default();
        let now = Arc::clone(&held);
        mmu.host().on_trace(Box::new(move |event| match event {
            Event::LockTaken { .. } => *now.lock().expect("no panic") = true,
            Event::LockReleased { .. } => *now.lock().expect("no panic") = false,
            _ => {}
        }));
        let served: Arc<Mutex<Option<bool>>> = Arc::default();
        let answer = Arc::clone(&served);
        mmu.host().on_next_look_at(
            table,
            Box::new(move || {
                // Beside all that is mapped: a fault of a vCPU takes whatever it takes anywhere else.
                let fault =
                    Fault { gpa: Gfn(START.0 + 2 * 512 + 99).gpa(), access: Access::Write, cause: Cause::Translation };
                let outcome = vcpu.fault(fault);
                let inside = *held.lock().expect("no panic");
                *answer.lock().expect("no panic") = Some(inside && matches!(outcome, Ok(Outcome::Fixed { .. })));
            }),
        );
        work(&mut worker);
        assert_eq!(*served.lock().expect("no panic"), Some(true), "{name}");
    }
}

/// The same bound for what splits huge leaves and makes them whole again: a hold is one of them when somebody waits.
#[test]
fn splitting_and_collapsing_let_go_after_each_leaf_when_somebody_waits() {
    let mmu = Machine::build(Build { restless: 1, ..Build::default() }, two_by_two());
    add(&mmu, 0, START, TABLES * 512);
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let mut worker = mmu.worker().expect("a worker is free");
    for block in 0..TABLES {
        let fault = Fault { gpa: Gfn(START.0 + block * 512).gpa(), access: Access::Write, cause: Cause::Translation };
        vcpu.fault(fault).expect("there is memory");
    }
    let huge = |mmu: &Mmu<Amd>| mmu.counters().mapped_bytes()[1..].iter().sum::<u64>() >> 21;
    let before = huge(&mmu);
    assert_eq!(before, TABLES);
    let holds: Arc<Mutex<Vec<(Side, u32)>>> = Arc::default();
    let seen = Arc::clone(&holds);
    mmu.host().on_trace(Box::new(move |event| {
        if let Event::LockReleased { side, steps } = event {
            seen.lock().expect("the hook does not panic").push((side, steps));
        }
    }));
    let faults = mmu.counters().faults_fixed;
    let mut bounded = |name: &str, operation: &mut dyn FnMut(&mut Worker<Amd>)| {
        operation(&mut worker);
        let holds = std::mem::take(&mut *holds.lock().expect("the hook does not panic"));
        assert!(holds.iter().all(|&hold| hold == (Side::Shared, 1)), "{name}: {holds:?}");
        assert!(holds.len() as u64 >= TABLES, "{name}: {} holds", holds.len());
    };
    bounded("split", &mut |worker| worker.split(SlotId(0)).expect("there are tables"));
    assert_eq!(huge(&mmu), 0);
    bounded("collapse", &mut |worker| _ = worker.collapse(SlotId(0)).expect("there is no log"));
    assert_eq!(huge(&mmu), before, "all that was huge is huge again");
    assert_eq!(mmu.counters().faults_fixed, faults, "without a fault");
}
