//! What dirty logging, splitting, collapsing and aging cost: instructions, counted as in [`crate::instructions`].
//!
//! Each case is a process of its own, which maps [`PAGES`] pages, brings them into the state that the case begins with, and
//! then does one thing that is counted. Figures are `dirty.CASE.instructions_per_UNIT`; a case whose unit is `call` is one
//! whose cost must not depend on what is mapped.

use std::sync::Arc;

use nestling::{
    Access, AddressSpace, Cause, Fault, Gfn, GfnRange, Gpa, Granularity, Level, LogConfig, LogStart, Mmu, Outcome,
    SlotId, Split, Tracking, Vcpu, VcpuId, Worker,
};

use crate::arena::Claim;
use crate::contenders::nestling::{Machine as Host, vm};
use crate::contenders::{FIRST, FullFences, PAGE};
use crate::figures::Figure;
use crate::instructions::{CountError, run_counted};

/// Argument that makes the benchmark one of the counted processes; the case's name follows.
pub const ARGUMENT: &str = "--count-dirty";
/// Where callgrind starts and stops counting.
const COUNTED: &str = "nestling_bench::dirty::counted";
/// Pages of the guest: 1 GiB.
const PAGES: u64 = crate::contenders::PAGES;
/// Pages of a huge leaf.
const HUGE: u64 = 512;
/// Huge leaves of the guest.
const LEAVES: u64 = PAGES / HUGE;
const ID: SlotId = SlotId(0);

type Machine = Host<FullFences>;

/// One thing to count.
#[derive(Clone, Copy)]
pub struct Case {
    /// As it appears in the figure's name, and the unit of its cost.
    pub name: &'static str,
    unit: &'static str,
    /// How many units it does.
    units: u64,
    run: fn(&mut Bench),
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

const fn case(name: &'static str, unit: &'static str, units: u64, run: fn(&mut Bench)) -> Case {
    Case { name, unit, units, run }
}

/// All of them. "4k" is 1 GiB mapped by pages of 4 KiB, "2m" by pages of 2 MiB.
pub const CASES: &[Case] = &[
    case("start_clean_4k", "page", PAGES, |b| b.small().start(Tracking::WriteProtect, LogStart::Clean)),
    case("start_clean_2m", "leaf", LEAVES, |b| b.huge().start(Tracking::WriteProtect, LogStart::Clean)),
    case("start_all_dirty_4k", "call", 1, |b| b.small().start(Tracking::WriteProtect, LogStart::AllDirty)),
    case("harvest_1_percent_4k", "dirty_page", PAGES / 100, |b| b.small().harvest(Tracking::WriteProtect, 100)),
    case("harvest_10_percent_4k", "dirty_page", PAGES / 10, |b| b.small().harvest(Tracking::WriteProtect, 10)),
    case("harvest_100_percent_4k", "dirty_page", PAGES, |b| b.small().harvest(Tracking::WriteProtect, 1)),
    case("harvest_10_percent_4k_by_dirty_bit", "dirty_page", PAGES / 10, |b| b.small().harvest(Tracking::DirtyBit, 10)),
    case("harvest_100_percent_4k_by_dirty_bit", "dirty_page", PAGES, |b| b.small().harvest(Tracking::DirtyBit, 1)),
    case("harvest_1_percent_2m", "dirty_leaf", LEAVES / 100, |b| b.huge().harvest_leaves(100)),
    case("harvest_10_percent_2m", "dirty_leaf", LEAVES / 10, |b| b.huge().harvest_leaves(10)),
    case("harvest_100_percent_2m", "dirty_leaf", LEAVES, |b| b.huge().harvest_leaves(1)),
    case("get_10_percent_4k", "dirty_page", PAGES / 10, |b| b.small().get(10)),
    case("clear_1_percent_4k", "dirty_page", PAGES / 100, |b| b.small().clear(100)),
    case("clear_10_percent_4k", "dirty_page", PAGES / 10, |b| b.small().clear(10)),
    case("clear_100_percent_4k", "dirty_page", PAGES, |b| b.small().clear(1)),
    case("clear_1_percent_2m", "dirty_leaf", LEAVES / 100, |b| b.huge().clear_leaves(100)),
    case("clear_10_percent_2m", "dirty_leaf", LEAVES / 10, |b| b.huge().clear_leaves(10)),
    case("clear_100_percent_2m", "dirty_leaf", LEAVES, |b| b.huge().clear_leaves(1)),
    case("first_write_after_protect", "write", PAGES, |b| b.small().first_writes()),
    case("split_2m", "leaf", LEAVES, |b| b.huge().split()),
    case("collapse_2m", "leaf", LEAVES, |b| b.huge().collapse()),
    case("age_4k", "page", PAGES, |b| b.small().age()),
    case("age_2m", "leaf", LEAVES, |b| b.huge().age()),
];

/// A machine whose guest has touched nothing yet.
#[derive(Debug)]
pub struct Bench {
    claim: Option<Claim>,
}

/// A machine whose guest has written all of its memory.
struct Mapped {
    vcpu: Vcpu<Machine>,
    worker: Worker<Machine>,
    words: Vec<u64>,
    // Dropped last: the tables lie in it.
    _mmu: Arc<Mmu<Machine>>,
    _claim: Claim,
}

#[inline(never)]
fn counted(work: &mut dyn FnMut() -> u64) -> u64 {
    let done = work();
    // Nothing may be left to do after the work but to return: a tail call would end the counting early.
    std::hint::black_box(done)
}

fn gpa(page: u64) -> Gpa {
    Gpa(FIRST + page * PAGE)
}

impl Bench {
    fn small(&mut self) -> Mapped {
        self.mapped(Level::K4, 1)
    }

    fn huge(&mut self) -> Mapped {
        self.mapped(Level::M2, HUGE)
    }

    fn mapped(&mut self, largest: Level, step: u64) -> Mapped {
        let claim = self.claim.take().expect("a process runs one case");
        let mmu = vm::<FullFences>(largest);
        let mut vcpu = mmu.vcpu(VcpuId(0)).expect("the only vCPU");
        drop(vcpu.enter().expect("there is memory for a root"));
        let worker = mmu.worker().expect("there is memory for a worker");
        let mut mapped = Mapped { vcpu, worker, words: vec![0; PAGES.div_ceil(64) as usize], _mmu: mmu, _claim: claim };
        (0..PAGES).step_by(step as usize).for_each(|page| mapped.write(page));
        mapped
    }
}

impl Mapped {
    fn write(&mut self, page: u64) {
        let fault = Fault { gpa: gpa(page), access: Access::Write, cause: Cause::Translation };
        let outcome = self.vcpu.fault(fault);
        assert!(matches!(outcome, Ok(Outcome::Fixed { .. } | Outcome::Spurious)), "{outcome:?}");
    }

    fn begin(&mut self, tracking: Tracking, granularity: Granularity, start: LogStart) {
        let config = LogConfig { tracking, granularity, start, split: Split::OnDemand };
        self.worker.start_log(ID, config).expect("the slot has no log");
    }

    fn start(mut self, tracking: Tracking, start: LogStart) {
        counted(&mut || {
            self.begin(tracking, Granularity::Page, start);
            0
        });
    }

    /// Dirties every `nth` page of a log that was just started.
    fn dirty(&mut self, tracking: Tracking, nth: u64) -> u64 {
        // By dirty bits nothing faults, and here is no CPU to set them: what the mapping faults set is left.
        let start = if tracking == Tracking::DirtyBit { LogStart::AllDirty } else { LogStart::Clean };
        self.begin(tracking, Granularity::Page, start);
        if tracking == Tracking::DirtyBit {
            let all = self.worker.harvest_dirty(ID, 0, &mut self.words).expect("the slot has a log");
            assert_eq!(all, PAGES);
            let (first, space) = (gpa(0).gfn(), AddressSpace::Main);
            for page in (0..PAGES / nth).map(|number| first.0 + number * nth) {
                self.worker.mark_dirty(space, GfnRange { start: Gfn(page), end: Gfn(page + 1) });
            }
        } else {
            (0..PAGES / nth).for_each(|number| self.write(number * nth));
        }
        PAGES / nth
    }

    fn harvest(mut self, tracking: Tracking, nth: u64) {
        let dirty = self.dirty(tracking, nth);
        let Self { worker, words, .. } = &mut self;
        assert_eq!(counted(&mut || worker.harvest_dirty(ID, 0, words).expect("the slot has a log")), dirty);
    }

    /// Dirties every `nth` huge leaf of a log that was just started; how many pages that makes.
    fn dirty_leaves(&mut self, nth: u64) -> u64 {
        self.begin(Tracking::WriteProtect, Granularity::Leaf, LogStart::Clean);
        (0..LEAVES / nth).for_each(|number| self.write(number * nth * HUGE));
        LEAVES / nth * HUGE
    }

    fn harvest_leaves(mut self, nth: u64) {
        let dirty = self.dirty_leaves(nth);
        let Self { worker, words, .. } = &mut self;
        assert_eq!(counted(&mut || worker.harvest_dirty(ID, 0, words).expect("the slot has a log")), dirty);
    }

    fn clear_leaves(mut self, nth: u64) {
        let dirty = self.dirty_leaves(nth);
        let Self { worker, words, .. } = &mut self;
        worker.get_dirty(ID, 0, words).expect("the slot has a log");
        assert_eq!(counted(&mut || worker.clear_dirty(ID, 0, words).expect("the slot has a log")), dirty);
    }

    fn get(mut self, nth: u64) {
        let dirty = self.dirty(Tracking::WriteProtect, nth);
        let Self { worker, words, .. } = &mut self;
        assert_eq!(counted(&mut || worker.get_dirty(ID, 0, words).expect("the slot has a log")), dirty);
    }

    fn clear(mut self, nth: u64) {
        let dirty = self.dirty(Tracking::WriteProtect, nth);
        let Self { worker, words, .. } = &mut self;
        worker.get_dirty(ID, 0, words).expect("the slot has a log");
        assert_eq!(counted(&mut || worker.clear_dirty(ID, 0, words).expect("the slot has a log")), dirty);
    }

    fn first_writes(mut self) {
        self.begin(Tracking::WriteProtect, Granularity::Page, LogStart::Clean);
        counted(&mut || {
            (0..PAGES).for_each(|page| self.write(page));
            PAGES
        });
    }

    fn split(mut self) {
        counted(&mut || {
            self.worker.split(ID).expect("there are tables");
            0
        });
    }

    fn collapse(mut self) {
        self.worker.split(ID).expect("there are tables");
        let made = counted(&mut || self.worker.collapse(ID).expect("the slot has no log").leaves_2m);
        assert_eq!(made, PAGES / HUGE);
    }

    fn age(mut self) {
        let range = GfnRange::new(gpa(0).gfn(), PAGES).expect("the benchmark's memory is within 52 bits");
        assert_eq!(counted(&mut || self.worker.clear_young(AddressSpace::Main, range).young), PAGES);
    }
}

/// What a counted process does; whether there is such a case.
pub fn counted_process(name: &str) -> bool {
    let Some(case) = CASES.iter().find(|case| case.name == name) else { return false };
    (case.run)(&mut Bench { claim: Some(Claim::take()) });
    true
}

/// Counts all cases, prints their table and gives their figures; none when they can not be counted.
pub fn counts() -> Vec<Figure> {
    println!("\ndirty logging, splitting, collapsing and aging, instructions; the guest has {} MiB", PAGES >> 8);
    let mut figures = Vec::new();
    for case in CASES {
        match run_counted(Some(COUNTED), &[ARGUMENT, case.name]) {
            Ok(total) => {
                let value = total as f64 / case.units as f64;
                println!("  {:<40} {value:>10.1} a {}", case.name, case.unit.replace('_', " "));
                figures.push(Figure { name: format!("dirty.{}.instructions_per_{}", case.name, case.unit), value });
            }
            Err(error @ CountError::Failed(_)) => println!("  {:<40} not counted: {error}", case.name),
            Err(error) => {
                println!("  not counted: {error}");
                return figures;
            }
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_does_what_it_says() {
        for case in CASES {
            assert!(counted_process(case.name), "{}", case.name);
        }
        assert!(!counted_process("no such case"));
    }
}
