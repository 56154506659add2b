//! Dirty logs against the ghost's dirty set: one slot, a few pages that everything happens to, and a TLB that forgets
//! nothing it need not forget.
//!
//! A million operations: `NESTLING_DEEP=8 cargo test --release -p nestling-checks --test dirty`.

use nestling::format::{Ept, Npt};
use nestling::{Level, SlotZap};
use nestling_checks::machine::cpu::Cpu;
use nestling_checks::program::single::{Lie, LogOp, Op, Setting, Single, Spot};
use nestling_checks::rng::Rng;
use nestling_checks::scene::{assert_none, deep};

const PAGES: u64 = 1200;

/// Mostly some pages of one word, and now and then one of another block.
fn spot(rng: &mut Rng) -> Spot {
    match rng.below(8) {
        0 => Spot { block: 1, page: rng.below(512) as u16 },
        1 => Spot { block: 2, page: rng.below(100) as u16 },
        _ => Spot { block: 0, page: 64 + rng.below(4) as u16 },
    }
}

fn part(rng: &mut Rng) -> (u8, u8) {
    if rng.once_in(3) { (rng.below(256) as u8, rng.below(256) as u8) } else { (0, 255) }
}

fn add(rng: &mut Rng) -> Op {
    let at = Spot { block: 0, page: if rng.once_in(4) { 3 } else { 0 } };
    let shape = if rng.once_in(4) { Lie::Pieces(600) } else { Lie::Aligned };
    Op::Add { id: 0, smm: false, at, pages: PAGES, shape, read_only: false }
}

fn op(rng: &mut Rng) -> Op {
    match rng.below(100) {
        0..60 => Op::Touch { second: rng.once_in(2), at: spot(rng), access: if rng.once_in(4) { 0 } else { 1 } },
        60..72 => {
            let (from, to) = part(rng);
            Op::Log(0, LogOp::Harvest(from, to))
        }
        72..78 => {
            let (from, to) = part(rng);
            Op::Log(0, LogOp::GetAndClear(from, to, rng.next()))
        }
        78 => Op::Log(0, LogOp::Stop),
        79 => Op::Log(0, LogOp::Collapse),
        80..84 => {
            let [dirty_bit, leaf, all, eager] = [(); 4].map(|()| rng.once_in(2));
            Op::Log(0, LogOp::Start { dirty_bit, leaf, all, eager })
        }
        84 => Op::Log(0, LogOp::Merge(rng.next())),
        97 => Op::Track(spot(rng), rng.once_in(2)),
        98 => Op::Age(spot(rng), 1 + rng.below(600), rng.once_in(2)),
        99 => Op::Log(0, if rng.once_in(3) { LogOp::Split } else { LogOp::Collapse }),
        85 => Op::Device(rng.once_in(2), spot(rng), 1 + rng.below(3)),
        86..89 => Op::Zap(spot(rng), 1 + rng.below(3)),
        89 => Op::Zap(Spot { block: 0, page: 0 }, 512),
        90 => Op::ZapAll,
        91 | 92 => Op::Invalidate(spot(rng), 1 + rng.below(2), rng.once_in(2)),
        93 => Op::Flags { id: 0, read_only: rng.once_in(3) },
        94 => Op::Move(0, Spot { block: 0, page: if rng.once_in(2) { 3 } else { 0 } }),
        95 if rng.once_in(4) => Op::Delete(0),
        95 | 96 => add(rng),
        _ => {
            let [second, five, plain] = [(); 3].map(|()| rng.once_in(2));
            Op::Turn { second, five, smm: false, plain }
        }
    }
}

/// Programs of some hundred operations, each on a machine of its own.
fn programs<F: Cpu>(first_seed: u64, programs: u64) {
    for seed in first_seed..first_seed + programs {
        let mut rng = Rng::new(seed);
        let largest = [Level::K4, Level::M2, Level::M2, Level::G1][rng.below(4) as usize];
        let slot_zap = if rng.once_in(3) { SlotZap::Everything } else { SlotZap::Slot };
        let (mmio_entries, restless) = (rng.once_in(2), rng.below(3));
        let setting = Setting { root_level: Level::L4, largest, slot_zap, mmio_entries, base_block: 510, restless };
        let mut machine = Single::<F>::new(setting);
        machine.act(add(&mut rng));
        for number in 0..OPERATIONS {
            machine.act(op(&mut rng));
            if number % 16 == 0 {
                machine.check();
            }
            let found = machine.violations();
            assert!(found.is_empty(), "seed {seed}, operation {number}: {}", found[0]);
        }
        assert_none(&machine.end());
    }
}

const OPERATIONS: u64 = 500;

/// So many that a run in depth makes a million operations of both.
fn count() -> u64 {
    8 + 128 * deep()
}

#[test]
fn npt_logs_agree_with_the_ghost() {
    programs::<Npt>(1, count());
}

#[test]
fn ept_logs_agree_with_the_ghost() {
    programs::<Ept>(1 << 32, count());
}
