//! The scenarios: pairs and triples of operations that race.
//!
//! [`SCENARIOS`] are small enough for all their interleavings, with the memory model's weak orderings, under loom.
//! [`long`] makes long ones, of every pair of operations, for shuttle's random schedules.

/// Operations of a worker, each followed by what an embedder may do once it has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Zap the range of pages 0 and 1.
    Zap,
    /// Zap everything.
    ZapAll,
    /// Zap everything, then move page 0: nothing of what vCPUs had of the old roots is left for it to flush.
    ZapAllThenMovePage,
    /// Delete the slot; its memory goes to somebody else.
    Delete,
    /// The same, and add it again with other memory.
    DeleteAndAdd,
    /// Zap all pages, letting go of the lock as often as that is possible.
    ZapYielding,
    /// Move page 0 to another host frame under an invalidation; the old one goes to somebody else.
    MovePage,
    /// The same twice.
    MovePageTwice,
    /// The same, and a look at all tables before the page is given away.
    MovePageLooking,
    /// The same, if it can be done without waiting.
    TryMovePage,
    /// Zap the range of pages 0 and 1 in the middle of another worker's zap: when that has kicked a vCPU, or is over.
    ZapInZap,
    /// Move the slot to the frames behind it.
    MoveSlot,
    /// Take the slot's dirty log, and copy the pages that it names.
    Harvest,
    /// Look at the log, then clear what it named, and copy the pages.
    GetAndClear,
    /// Split huge leaves.
    Split,
    /// Make leaves huge.
    Collapse,
}

/// What is made ready before a scenario begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// Writes are logged by write protection.
    LogByProtection,
    /// Writes are logged by dirty bits.
    LogByDirtyBit,
    /// Leaves may be huge, and writes are logged leaf by leaf, by dirty bits.
    HugeLogged,
    /// Leaves may be huge, and were split.
    Split,
}

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
    /// A vCPU that accesses this page in the guest, and has its faults handled in guest mode as far as that is possible.
    RunStaying(u64),
    /// A vCPU that enters once and accesses this page, if it is mapped.
    Turn(u64),
    /// A vCPU that loads a root and goes.
    LoadAndFree,
    /// A vCPU that runs on a root of five levels for a while, then accesses page 0 on its first root again.
    SwitchAndBack,
    /// A vCPU that turns between roots of four and five levels, and keeps both.
    Switch,
    /// A vCPU that accesses one page after the other, so many times, and keeps its TLB as long as it may.
    Wander(u64),
    /// A vCPU that writes this page so often.
    Write(u64, usize),
    /// The same, and has its faults handled in guest mode as far as that is possible.
    WriteStaying(u64, usize),
    /// The same, on tables without accessed and dirty bits.
    WriteWithoutAdBits(u64, usize),
    /// A worker.
    Work(Work),
    /// Nobody: what is made ready before.
    Setup(Setup),
    /// The same again and again.
    Often(u32, &'static Actor),
}

impl Actor {
    /// Whether it needs a vCPU.
    pub const fn is_vcpu(self) -> bool {
        match self {
            Self::Often(_, actor) => actor.is_vcpu(),
            Self::Work(_) | Self::Setup(_) => false,
            _ => true,
        }
    }
}

/// A scenario. The last actor runs on the main thread.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'s> {
    /// For reports.
    pub name: &'s str,
    /// Pages that are mapped before.
    pub mapped: &'s [u64],
    /// The threads.
    pub actors: &'s [Actor],
}

impl Scenario<'_> {
    /// What is made ready before.
    pub fn setup(&self) -> Option<Setup> {
        self.actors.iter().find_map(|actor| if let Actor::Setup(setup) = actor { Some(*setup) } else { None })
    }

    /// Those who race.
    pub fn threads(&self) -> impl DoubleEndedIterator<Item = &Actor> {
        self.actors.iter().filter(|actor| !matches!(actor, Actor::Setup(_)))
    }
}

use Actor::{
    Fault, LoadAndFree, Often, Run, RunSleepy, RunStaying, RunTwice, SwitchAndBack, Turn, Wander, Write, WriteStaying,
    WriteWithoutAdBits,
};
const ZAP: Actor = Actor::Work(Work::Zap);
const ZAP_ALL: Actor = Actor::Work(Work::ZapAll);
const ZAP_ALL_THEN_MOVE: Actor = Actor::Work(Work::ZapAllThenMovePage);
const DELETE: Actor = Actor::Work(Work::Delete);
const MOVE: Actor = Actor::Work(Work::MovePage);
const MOVE_LOOKING: Actor = Actor::Work(Work::MovePageLooking);
const TRY_MOVE: Actor = Actor::Work(Work::TryMovePage);
const ZAP_IN_ZAP: Actor = Actor::Work(Work::ZapInZap);
const MOVE_TWICE: Actor = Actor::Work(Work::MovePageTwice);
const HARVEST: Actor = Actor::Work(Work::Harvest);
const GET_AND_CLEAR: Actor = Actor::Work(Work::GetAndClear);
const SPLIT: Actor = Actor::Work(Work::Split);
const COLLAPSE: Actor = Actor::Work(Work::Collapse);
const BY_PROTECTION: Actor = Actor::Setup(Setup::LogByProtection);
const BY_DIRTY_BIT: Actor = Actor::Setup(Setup::LogByDirtyBit);
const HUGE_LOGGED: Actor = Actor::Setup(Setup::HugeLogged);
const WERE_SPLIT: Actor = Actor::Setup(Setup::Split);
const MOVE_SLOT: Actor = Actor::Work(Work::MoveSlot);

/// All of them.
pub const SCENARIOS: &[Scenario<'static>] = &[
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
    Scenario {
        name: "zap-all, then invalidation beside one turn",
        mapped: &[0],
        actors: &[ZAP_ALL_THEN_MOVE, Turn(0)],
    },
    Scenario { name: "guest that faults beside zap-all", mapped: &[1], actors: &[Run(0), ZAP_ALL] },
    Scenario { name: "guest that faults beside slot delete", mapped: &[1], actors: &[RunSleepy(0), DELETE] },
    Scenario { name: "guest that faults beside invalidation", mapped: &[1], actors: &[Run(0), MOVE] },
    Scenario { name: "guest that stays beside zap", mapped: &[1], actors: &[RunStaying(0), ZAP] },
    Scenario { name: "guest that stays beside zap-all", mapped: &[1], actors: &[RunStaying(0), ZAP_ALL] },
    Scenario { name: "guest that stays beside slot delete", mapped: &[1], actors: &[DELETE, RunStaying(0)] },
    Scenario { name: "guest that stays beside invalidation", mapped: &[1], actors: &[RunStaying(0), MOVE] },
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
    Scenario {
        name: "writes beside harvest, by protection",
        mapped: &[0],
        actors: &[BY_PROTECTION, Write(0, 2), HARVEST],
    },
    Scenario {
        name: "writes that stay beside harvest, by protection",
        mapped: &[0, 1],
        actors: &[BY_PROTECTION, WriteStaying(0, 2), HARVEST],
    },
    Scenario {
        name: "writes beside harvest, by dirty bit",
        mapped: &[0],
        actors: &[BY_DIRTY_BIT, Write(0, 2), HARVEST],
    },
    Scenario {
        name: "writes beside harvest, without dirty bits",
        mapped: &[0],
        actors: &[BY_DIRTY_BIT, WriteWithoutAdBits(0, 2), HARVEST],
    },
    Scenario { name: "writes beside clear", mapped: &[0], actors: &[BY_PROTECTION, Write(0, 2), GET_AND_CLEAR] },
    Scenario { name: "writes beside zap, by dirty bit", mapped: &[0], actors: &[BY_DIRTY_BIT, Write(0, 2), ZAP] },
    Scenario {
        name: "writes beside zap-all, by dirty bit",
        mapped: &[0],
        actors: &[BY_DIRTY_BIT, Write(0, 2), ZAP_ALL],
    },
    Scenario { name: "writes beside split", mapped: &[0], actors: &[HUGE_LOGGED, Write(0, 2), SPLIT] },
    Scenario { name: "writes beside collapse", mapped: &[0], actors: &[WERE_SPLIT, Write(0, 2), COLLAPSE] },
    Scenario { name: "fault beside collapse", mapped: &[0], actors: &[WERE_SPLIT, Fault(1), COLLAPSE] },
    Scenario { name: "zap beside collapse", mapped: &[0], actors: &[WERE_SPLIT, ZAP, COLLAPSE] },
    Scenario { name: "zap-all beside collapse", mapped: &[0], actors: &[WERE_SPLIT, ZAP_ALL, COLLAPSE] },
    Scenario {
        name: "writes, zap and harvest, by dirty bit",
        mapped: &[0],
        actors: &[BY_DIRTY_BIT, Write(0, 2), ZAP, HARVEST],
    },
    Scenario {
        name: "writes, writes and harvest, by protection",
        mapped: &[0],
        actors: &[BY_PROTECTION, Write(0, 1), Write(0, 2), HARVEST],
    },
    Scenario { name: "fault, fault and invalidation", mapped: &[1], actors: &[Fault(0), Fault(1), MOVE] },
];

/// An operation of which every pair is run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Op {
    /// Faults.
    Fault,
    /// Zap of a range.
    Zap,
    /// Zap of everything.
    ZapAll,
    /// Deletion of the slot (and a new one in its place).
    SlotDelete,
    /// A page is taken and comes back elsewhere.
    Invalidation,
    /// Roots of two roles are loaded, and kept.
    RootLoad,
    /// A vCPU comes, loads a root, goes and puts it.
    RootFree,
    /// A zap that lets go of the lock as often as it can.
    Yield,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Fault,
        Self::Zap,
        Self::ZapAll,
        Self::SlotDelete,
        Self::Invalidation,
        Self::RootLoad,
        Self::RootFree,
        Self::Yield,
    ];

    /// As the scenarios' names have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Zap => "zap",
            Self::ZapAll => "zap-all",
            Self::SlotDelete => "slot delete",
            Self::Invalidation => "invalidation",
            Self::RootLoad => "root load",
            Self::RootFree => "root free",
            Self::Yield => "yield",
        }
    }

    const fn actor(self) -> Actor {
        match self {
            Self::Fault => Wander(8),
            Self::Zap => Often(3, &ZAP),
            Self::ZapAll => Often(3, &ZAP_ALL),
            Self::SlotDelete => Often(2, &Actor::Work(Work::DeleteAndAdd)),
            Self::Invalidation => Often(3, &MOVE),
            Self::RootLoad => Often(3, &Actor::Switch),
            Self::RootFree => Often(4, &LoadAndFree),
            Self::Yield => Often(2, &Actor::Work(Work::ZapYielding)),
        }
    }
}

/// Operations that are run against each other in a long scenario, beside a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Long {
    /// The operations, joined by "beside".
    pub name: String,
    /// The threads: one an operation, and the guest.
    pub actors: Vec<Actor>,
}

/// The triples that bugs of the past needed.
const TRIPLES: [[Op; 3]; 6] = [
    // Roots that are being emptied still lead to memory that is given back (CVE-2021-47639).
    [Op::Fault, Op::ZapAll, Op::Invalidation],
    // Roots outlive the slot that they map (KVM, b7cccd397f31).
    [Op::ZapAll, Op::SlotDelete, Op::RootFree],
    // A second zap of everything, while the first empties its roots.
    [Op::ZapAll, Op::ZapAll, Op::RootLoad],
    // Two zaps share a table, and one yields (KVM, a835429cda91).
    [Op::Zap, Op::Yield, Op::Fault],
    // The slot changes while a page of it is away (invariant I20).
    [Op::Fault, Op::SlotDelete, Op::Invalidation],
    // A walker that yields stands on a root that becomes obsolete.
    [Op::Yield, Op::ZapAll, Op::RootFree],
];

/// Long scenarios: every pair of operations, and the triples.
pub fn long() -> Vec<Long> {
    let mut all = Vec::new();
    for (index, &first) in Op::ALL.iter().enumerate() {
        all.extend(Op::ALL[index..].iter().map(|&second| Long::of(&[first, second])));
    }
    all.extend(TRIPLES.iter().map(|ops| Long::of(ops)));
    all
}

impl Long {
    /// The scenario. The guest, on the main thread, begins with some pages mapped.
    pub fn scenario(&self) -> Scenario<'_> {
        Scenario { name: &self.name, mapped: &[0, 1, 3], actors: &self.actors }
    }

    fn of(ops: &[Op]) -> Self {
        let names: Vec<_> = ops.iter().map(|op| op.name()).collect();
        let mut actors: Vec<_> = ops.iter().map(|op| op.actor()).collect();
        actors.push(Wander(12));
        Self { name: names.join(" beside "), actors }
    }
}
