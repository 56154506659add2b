//! Small scenes that many tests begin with.

use std::sync::Arc;

use nestling::format::Npt;
use nestling::{AddressSpace, Config, Gfn, Mmu, SlotConfig, SlotFlags, SlotId};

use crate::ghost::Violation;
use crate::ghost::object::Shape;
use crate::machine::{Build, Machine};

/// The machine that most tests use.
pub type Amd = Machine<Npt>;

/// How much more than usual a long run does: the number in `NESTLING_DEEP`, 0 if it is not set.
pub fn deep() -> u64 {
    std::env::var("NESTLING_DEEP").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Panics with the reports if there are any.
#[track_caller]
pub fn assert_none(found: &[Violation]) {
    let text: String = found.iter().map(Violation::to_string).collect();
    assert!(found.is_empty(), "{} violations\n{text}", found.len());
}

/// Two vCPUs, and a few workers and slots.
pub fn two_by_two() -> Config {
    Config { vcpus: 2, workers: 3, slots: 16, ..Config::default() }
}

/// An MMU on a machine of its own.
pub fn small(config: Config) -> Arc<Mmu<Amd>> {
    Machine::build(Build::default(), config)
}

/// Memory in one run, congruent with a slot at `start` in every leaf size.
pub const fn aligned(start: Gfn, pages: u64) -> Shape {
    Shape { pages, lead: 0, phase: start.0 % (1 << 18), chunk: 1 << 40, gap: 0, writable: true }
}

/// What a slot is added with; its memory is made for it.
pub fn slot(mmu: &Mmu<Amd>, id: u32, start: Gfn, pages: u64, flags: SlotFlags) -> SlotConfig {
    let backing = mmu.host().ghost().make_object(aligned(start, pages));
    SlotConfig { id: SlotId(id), space: AddressSpace::Main, base: start.gpa(), size: pages << 12, flags, backing }
}

/// Adds a slot with memory and tells the ghost.
pub fn add(mmu: &Arc<Mmu<Amd>>, id: u32, start: Gfn, pages: u64) -> SlotConfig {
    let config = slot(mmu, id, start, pages, SlotFlags::empty());
    mmu.host().ghost().adding(&config);
    let done = mmu.worker().expect("a worker is free").add_slot(config);
    mmu.host().ghost().added(&config, done.is_ok());
    done.expect("the slot fits");
    config
}
