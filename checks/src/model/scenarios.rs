//! The scenarios: pairs and triples of operations that race, the same for every checker.
//!
//! Each ends by checking what must be left: the books agree with the machine, and no more tables than one root over the
//! slot's pages can need.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::thread::spawn;
use nestling_loom::{Counters, Level, Mmu, Outcome};

use super::machine::{Guest, Machine, Work, machine, work};

/// What one thread of a scenario does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A vCPU that faults on this page.
    Fault(u64),
    /// A vCPU that accesses this page in the guest, faulting as it must.
    Run(u64),
    /// The same, with a backing that sleeps.
    RunSleepy(u64),
    /// The same, and once more later.
    RunTwice(u64),
    /// A vCPU that loads a root and goes.
    LoadAndFree,
    /// A vCPU that runs on a root of five levels for a while, then accesses page 0 on its first root again.
    SwitchAndBack,
    /// A worker.
    Work(Work),
}

/// A scenario. The last actor runs on the main thread.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// For reports.
    pub name: &'static str,
    /// Pages that are mapped before.
    pub mapped: &'static [u64],
    /// The threads.
    pub actors: &'static [Actor],
}

use Actor::{Fault, LoadAndFree, Run, RunSleepy, RunTwice, SwitchAndBack};
const ZAP: Actor = Actor::Work(Work::Zap);
const ZAP_ALL: Actor = Actor::Work(Work::ZapAll);
const DELETE: Actor = Actor::Work(Work::Delete);
const MOVE: Actor = Actor::Work(Work::MovePage);
const MOVE_LOOKING: Actor = Actor::Work(Work::MovePageLooking);
const TRY_MOVE: Actor = Actor::Work(Work::TryMovePage);
const ZAP_IN_ZAP: Actor = Actor::Work(Work::ZapInZap);
const MOVE_TWICE: Actor = Actor::Work(Work::MovePageTwice);
const MOVE_SLOT: Actor = Actor::Work(Work::MoveSlot);

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "fault beside fault, one page", mapped: &[], actors: &[Fault(0), Fault(0)] },
    Scenario { name: "fault beside fault, one table", mapped: &[], actors: &[Fault(0), Fault(1)] },
    Scenario { name: "root load beside root load", mapped: &[], actors: &[LoadAndFree, LoadAndFree] },
    Scenario { name: "fault beside zap", mapped: &[1], actors: &[Fault(0), ZAP] },
    Scenario { name: "fault beside zap-all", mapped: &[1], actors: &[Fault(0), ZAP_ALL] },
    Scenario { name: "fault beside slot delete", mapped: &[1], actors: &[Fault(0), DELETE] },
    Scenario { name: "fault beside invalidation", mapped: &[1], actors: &[Fault(0), MOVE] },
    Scenario { name: "fault beside try-invalidation", mapped: &[1], actors: &[Fault(0), TRY_MOVE] },
    Scenario { name: "guest beside try-invalidation", mapped: &[0], actors: &[Run(0), TRY_MOVE] },
    Scenario { name: "zap-all beside try-invalidation", mapped: &[0], actors: &[ZAP_ALL, TRY_MOVE] },
    Scenario { name: "zap beside zap", mapped: &[0, 1], actors: &[ZAP, ZAP] },
    Scenario { name: "zap beside zap-all", mapped: &[0], actors: &[ZAP, ZAP_ALL] },
    Scenario { name: "zap beside slot delete", mapped: &[0], actors: &[ZAP, DELETE] },
    Scenario { name: "zap beside invalidation", mapped: &[0], actors: &[ZAP, MOVE] },
    Scenario { name: "zap-all beside zap-all", mapped: &[0], actors: &[ZAP_ALL, ZAP_ALL] },
    Scenario { name: "zap-all beside slot delete", mapped: &[0], actors: &[ZAP_ALL, DELETE] },
    Scenario { name: "zap-all beside invalidation", mapped: &[0], actors: &[ZAP_ALL, MOVE_LOOKING] },
    Scenario { name: "slot delete beside invalidation", mapped: &[0], actors: &[DELETE, MOVE] },
    Scenario { name: "root load and free beside zap-all", mapped: &[0], actors: &[LoadAndFree, ZAP_ALL] },
    Scenario { name: "guest beside zap", mapped: &[0], actors: &[Run(0), ZAP] },
    Scenario { name: "guest beside zap-all", mapped: &[0], actors: &[Run(0), ZAP_ALL] },
    Scenario { name: "guest beside slot delete", mapped: &[0], actors: &[Run(0), DELETE] },
    Scenario { name: "guest beside invalidation", mapped: &[0], actors: &[Run(0), MOVE] },
    Scenario { name: "guest that faults beside zap-all", mapped: &[1], actors: &[Run(0), ZAP_ALL] },
    Scenario { name: "guest that faults beside slot delete", mapped: &[1], actors: &[RunSleepy(0), DELETE] },
    Scenario { name: "guest that faults beside invalidation", mapped: &[1], actors: &[Run(0), MOVE] },
    Scenario { name: "guest that comes back beside invalidation", mapped: &[0], actors: &[RunTwice(0), MOVE] },
    Scenario { name: "guest, zap and zap in the zap", mapped: &[0], actors: &[Run(0), ZAP, ZAP_IN_ZAP] },
    Scenario { name: "guest beside two invalidations", mapped: &[1], actors: &[Run(0), MOVE_TWICE] },
    Scenario { name: "guest of two roles beside zap-all", mapped: &[0], actors: &[SwitchAndBack, ZAP_ALL] },
    Scenario { name: "guest, zap-all and invalidation", mapped: &[0], actors: &[Run(0), ZAP_ALL, MOVE] },
    Scenario { name: "guest, zap and invalidation", mapped: &[0], actors: &[Run(0), ZAP, MOVE] },
    Scenario { name: "guest, zap-all and slot delete", mapped: &[0], actors: &[Run(0), ZAP_ALL, DELETE] },
    Scenario { name: "slot move beside invalidation", mapped: &[0], actors: &[MOVE_SLOT, MOVE] },
    Scenario { name: "guest at the new place, slot move", mapped: &[0], actors: &[Run(4), MOVE_SLOT] },
    Scenario {
        name: "guest at the new place, slot move and invalidation",
        mapped: &[0],
        actors: &[Run(4), MOVE_SLOT, MOVE],
    },
    Scenario { name: "fault, fault and invalidation", mapped: &[1], actors: &[Fault(0), Fault(1), MOVE] },
];

/// One execution of `scenario`; the checker calls it for each interleaving that it tries. Returns the counters at its end.
pub(super) fn execute(scenario: &Scenario) -> Counters {
    let (mmu, pool) = machine();
    let (prepared, mapped) = (Arc::clone(&mmu), scenario.mapped);
    // In a thread of its own: the checker does not look behind what a thread has read before it writes.
    let prepare = spawn(move || {
        let mut guest = Guest::new(&prepared, 0);
        guest.load();
        for &page in mapped {
            assert!(matches!(guest.fault(page), Outcome::Fixed { .. }));
        }
    });
    prepare.join().unwrap();
    let mut vcpus = 0;
    let mut numbered = scenario.actors.iter().map(|actor| {
        let id = vcpus;
        vcpus += u16::from(!matches!(actor, Actor::Work(_)));
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
    let counters = mmu.counters();
    assert_eq!(counters.table_frames, pool.in_use(), "the books and the machine disagree on tables");
    pool.check_free();
    assert_eq!(counters.leaves_4k, pool.leaves(None), "the books and the machine disagree on leaves");
    drop(mmu);
    assert_eq!(pool.in_use(), 0, "tables are left behind");
    counters
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
        Actor::LoadAndFree => Guest::new(mmu, id).load(),
        Actor::SwitchAndBack => {
            let mut guest = Guest::new(mmu, id);
            guest.load();
            guest.switch(Level::L5);
            guest.switch(Level::L4);
            // One zap of everything gets in the way so often and no more.
            assert!(guest.access(0, 8), "the guest makes no progress on its root");
        }
        Actor::Work(what) => work(&mut mmu.worker().unwrap(), what),
    }
}
