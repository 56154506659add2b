//! One execution of a scenario, under whichever checker this file is compiled with.
//!
//! Each ends by checking what must be left: the books agree with the machine, and no more tables than one root over the
//! slot's pages can need.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::checker::library::{Counters, Gfn, Level, Mmu, Outcome};
use super::checker::spawn;
use super::machine::{Guest, Machine, after_mapping, before_mapping, check_dirty, machine, work};
use crate::model::scenarios::{Actor, Scenario};

/// One execution of `scenario`; the checker calls it for each interleaving that it tries. Returns the counters at its end.
pub(super) fn execute(scenario: &Scenario<'_>) -> Counters {
    let (mmu, pool) = machine();
    let (prepared, mapped, setup) = (Arc::clone(&mmu), scenario.mapped.to_vec(), scenario.setup());
    // In a thread of its own: the checker does not look behind what a thread has read before it writes.
    let prepare = spawn(move || {
        before_mapping(prepared.host(), setup);
        let mut guest = Guest::new(&prepared, 0);
        guest.load();
        for page in mapped {
            assert!(matches!(guest.fault(page), Outcome::Fixed { .. }));
        }
        if let Some(setup) = setup {
            after_mapping(&mut prepared.worker().unwrap(), setup);
        }
    });
    prepare.join().unwrap();
    let mut vcpus = 0;
    let mut numbered = scenario.threads().map(|actor| {
        let id = vcpus;
        vcpus += u16::from(actor.is_vcpu());
        (*actor, id)
    });
    let main = numbered.next_back().expect("a scenario has actors");
    let threads: Vec<_> = numbered
        .map(|(actor, id)| {
            let mmu = Arc::clone(&mmu);
            spawn(move || act(&mmu, actor, id))
        })
        .collect();
    act(&mmu, main.0, main.1);
    for thread in threads {
        thread.join().unwrap();
    }
    // What readers kept from being freed is free now.
    mmu.worker().unwrap().collect();
    if scenario.setup().is_some() {
        check_dirty(&mut mmu.worker().unwrap());
    }
    let counters = mmu.counters();
    assert_eq!(counters.table_frames, pool.in_use(), "the books and the machine disagree on tables");
    pool.check_free();
    let mapped = counters.leaves_4k + counters.leaves_2m;
    assert_eq!(mapped, pool.leaves(None), "the books and the machine disagree on leaves");
    drop(mmu);
    assert_eq!(pool.in_use(), 0, "tables are left behind");
    counters
}

/// A guest that has met the slot, by a fault on the page beside this one, and stays in guest mode from now on if it can.
fn staying(mmu: &Arc<Mmu<Machine>>, id: u16, page: u64) -> Guest {
    let mut guest = Guest::new(mmu, id);
    guest.load();
    guest.fault(page ^ 1);
    guest.stays = true;
    guest
}

fn act(mmu: &Arc<Mmu<Machine>>, actor: Actor, id: u16) {
    match actor {
        Actor::Fault(page) => {
            let mut guest = Guest::new(mmu, id);
            guest.load();
            guest.fault(page);
        }
        Actor::Run(page) => {
            Guest::new(mmu, id).access(page, 3);
        }
        Actor::RunSleepy(page) => {
            mmu.host().sleeps.store(true, Ordering::Relaxed);
            Guest::new(mmu, id).access(page, 3);
        }
        Actor::RunTwice(page) => {
            let mut guest = Guest::new(mmu, id);
            guest.access(page, 3);
            guest.access(page, 3);
        }
        Actor::Turn(page) => {
            Guest::new(mmu, id).turn(Some(Gfn(page)));
        }
        Actor::RunStaying(page) => _ = staying(mmu, id, page).access(page, 3),
        Actor::WriteStaying(page, times) => staying(mmu, id, page).write(page, times),
        Actor::LoadAndFree => Guest::new(mmu, id).load(),
        Actor::SwitchAndBack => {
            let mut guest = Guest::new(mmu, id);
            guest.load();
            guest.switch(Level::L5);
            guest.switch(Level::L4);
            // One zap of everything gets in the way so often and no more.
            assert!(guest.access(0, 8), "the guest makes no progress on its root");
        }
        Actor::Switch => {
            let mut guest = Guest::new(mmu, id);
            [Level::L4, Level::L5, Level::L4, Level::L5].into_iter().for_each(|level| guest.switch(level));
        }
        Actor::Wander(turns) => Guest::new(mmu, id).wander(turns),
        Actor::Often(times, actor) => (0..times).for_each(|_| act(mmu, *actor, id)),
        Actor::Write(page, times) => Guest::new(mmu, id).write(page, times),
        Actor::WriteWithoutAdBits(page, times) => {
            let mut guest = Guest::new(mmu, id);
            guest.without_ad_bits();
            guest.write(page, times);
        }
        Actor::Setup(_) => {}
        Actor::Work(what) => work(&mut mmu.worker().unwrap(), what),
    }
}
