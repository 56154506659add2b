//! Accesses without memory: the entries they leave, and for how long these are true.

use std::sync::{Arc, Mutex};

use nestling::events::Event;
use nestling::format::MMIO_GENERATION_MASK;
use nestling::{
    Access, Cause, Config, Fault, Gfn, GfnRange, Level, Mmu, Outcome, SlotConfig, SlotFlags, SlotId, State, VcpuId,
    Worker,
};
use nestling_checks::machine::guest::{Done, GuestCpu, Manners};
use nestling_checks::scene::{Amd, add, assert_none, slot, small, two_by_two};

const DEVICE: Gfn = Gfn(0xfec00);

fn touch(vcpu: &mut nestling::Vcpu<Amd>, cause: Cause) -> Outcome {
    let fault = Fault { gpa: DEVICE.gpa(), access: Access::Read, cause };
    let outcome = vcpu.fault(fault).expect("nothing runs out");
    if outcome != Outcome::Retry {
        return outcome;
    }
    // Its root was obsolete: the entry into the guest gives it another.
    drop(vcpu.enter().expect("there is a frame for the root"));
    vcpu.fault(fault).expect("nothing runs out")
}

fn entry(worker: &mut Worker<Amd>, mmu: &Mmu<Amd>) -> Option<State> {
    Some(worker.walk(mmu.role(), DEVICE)?.last()?.state)
}

#[test]
fn a_device_is_known_from_its_entry_until_the_slots_change() {
    let mmu = small(two_by_two());
    let mut worker = mmu.worker().expect("a worker is free");
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let cached = || mmu.counters().faults_mmio_cached;
    assert_eq!((touch(&mut vcpu, Cause::Translation), cached()), (Outcome::Mmio, 0));
    assert!(matches!(entry(&mut worker, &mmu), Some(State::Mmio { .. })));
    assert_eq!((touch(&mut vcpu, Cause::Reserved), cached()), (Outcome::Mmio, 1));
    // Elsewhere a slot comes: the entry is out of date, made again, and good again.
    add(&mmu, 0, Gfn(0), 1);
    assert_eq!((touch(&mut vcpu, Cause::Reserved), cached()), (Outcome::Mmio, 1));
    assert_eq!((touch(&mut vcpu, Cause::Reserved), cached()), (Outcome::Mmio, 2));
    // Memory comes: the entry must not hide it, whatever cause the CPU reports.
    add(&mmu, 1, DEVICE, 1);
    assert_eq!(touch(&mut vcpu, Cause::Reserved), Outcome::Fixed { level: Level::K4 });
    assert_eq!(touch(&mut vcpu, Cause::Reserved), Outcome::Spurious);
    // And goes.
    worker.delete_slot(SlotId(1)).expect("it is there");
    assert_eq!(touch(&mut vcpu, Cause::Reserved), Outcome::Mmio);
    // A zap takes entries without memory too.
    worker.zap(GfnRange { start: DEVICE, end: Gfn(DEVICE.0 + 1) });
    assert_eq!(entry(&mut worker, &mmu), Some(State::Absent));
}

#[test]
fn without_mmio_entries_nothing_is_written() {
    let mmu = small(Config { mmio_entries: false, ..two_by_two() });
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    for cause in [Cause::Translation, Cause::Reserved] {
        assert_eq!(touch(&mut vcpu, cause), Outcome::Mmio);
    }
    let mut worker = mmu.worker().expect("a worker is free");
    assert_eq!(entry(&mut worker, &mmu), Some(State::Absent));
    assert_eq!(mmu.counters().faults_mmio_cached, 0);
}

/// Publishes slot updates until the generation's low bits are those of `target`.
fn advance(worker: &mut Worker<Amd>, other: SlotConfig, generation: &Mutex<u64>, target: u64) {
    let now = || *generation.lock().expect("the hook does not panic");
    let mask = u64::from(MMIO_GENERATION_MASK);
    while target.wrapping_sub(now()) & mask != 0 {
        // An addition is one publication, a change of flags or a deletion two.
        if target.wrapping_sub(now()) & mask == 1 {
            worker.add_slot(other).expect("its place is free");
            return;
        }
        worker.set_slot_flags(SlotId(0), SlotFlags::empty()).expect("it is there");
    }
}

/// The generation in an entry has 18 bits. After 2^18 publications an entry of long ago looks new again: it must be
/// gone by then, and for every vCPU from the very moment at which it would.
#[test]
fn an_entry_is_not_believed_again_when_the_generation_wraps() {
    let mmu = small(Config { slots: 4096, ..two_by_two() });
    let mut worker = mmu.worker().expect("a worker is free");
    let mut vcpu = mmu.vcpu(VcpuId(0)).expect("it is the first");
    drop(vcpu.enter().expect("there is a frame for the root"));
    let generation = Arc::new(Mutex::new(0u64));
    let seen = Arc::clone(&generation);
    mmu.host().on_trace(Box::new(move |event| {
        if let Event::Slots { generation } = event {
            *seen.lock().expect("the hook does not panic") = generation;
        }
    }));
    add(&mmu, 0, Gfn(0), 1);
    let mut spare = 1u64;
    let mut other = || {
        spare += 1;
        slot(&mmu, 1000 + spare as u32, Gfn(0x10_0000 + spare), 1, SlotFlags::empty())
    };
    for start in [0, 1] {
        // The update that is under way when a hook looks is the one that reaches `start` again.
        advance(&mut worker, other(), &generation, start);
        assert_eq!(touch(&mut vcpu, Cause::Translation), Outcome::Mmio);
        let Some(State::Mmio { generation: made }) = entry(&mut worker, &mmu) else { panic!("no entry was left") };
        assert_eq!(u64::from(made), start, "generation");
        let memory = slot(&mmu, 1, DEVICE, 1, SlotFlags::empty());
        worker.add_slot(memory).expect("its place is free");
        // To the publication before `start`, then one more, during which the guest faults.
        advance(&mut worker, other(), &generation, start.wrapping_sub(1));
        let outcome = Arc::new(Mutex::new(Vec::new()));
        let (found, seen) = (Arc::clone(&outcome), Arc::clone(&generation));
        let vcpu = &mut vcpu;
        std::thread::scope(|scope| {
            let (ask, asked) = std::sync::mpsc::channel::<()>();
            let (answer, answered) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                while asked.recv().is_ok() {
                    let outcome = touch(vcpu, Cause::Reserved);
                    found.lock().expect("no panic").push(outcome);
                    let _ = answer.send(());
                }
            });
            mmu.host().on_trace(Box::new(move |event| {
                if let Event::Slots { generation } = event {
                    *seen.lock().expect("the hook does not panic") = generation;
                    let _ = ask.send(());
                    let _ = answered.recv();
                }
            }));
            let added = worker.add_slot(other());
            let seen = Arc::clone(&generation);
            // Replaces the hook, which ends the thread.
            mmu.host().on_trace(Box::new(move |event| {
                if let Event::Slots { generation } = event {
                    *seen.lock().expect("the hook does not panic") = generation;
                }
            }));
            added.expect("its place is free");
        });
        let outcome = outcome.lock().expect("no panic").clone();
        assert_eq!(outcome, [Outcome::Fixed { level: Level::K4 }], "an entry of generation {start:#x} came back");
        worker.delete_slot(SlotId(1)).expect("it is there");
    }
}

/// The walk of the checks, whose bits come from the manuals, takes the entry for what it is in both formats.
#[test]
fn the_cpu_reports_an_mmio_entry_as_a_reserved_bit() {
    let mmu = small(two_by_two());
    let mut cpu = GuestCpu::new(&mmu, VcpuId(0), 1, Manners::Right).with_patience(4);
    for _ in 0..3 {
        assert_eq!(cpu.run_one(DEVICE, Access::Write), Done::Mmio);
    }
    assert_eq!(mmu.counters().faults_mmio_cached, 2, "the CPU saw the entry as a plain absence");
    assert_none(&mmu.host().violations());
}
