//! Random programs in one thread, against the ghost.

use nestling::{Level, SlotZap};
use nestling_checks::program::single::{Lie, LogOp, Op, Setting, Spot, Table, run_on};
use nestling_checks::scene::{assert_none, deep};
use proptest::prelude::*;

fn spot() -> impl Strategy<Value = Spot> {
    let page = prop_oneof![Just(0u16), Just(1), 508u16..512, 0u16..512];
    (0u8..4, page).prop_map(|(block, page)| Spot { block, page })
}

/// A spot where a block begins, more often than chance has it.
fn start() -> impl Strategy<Value = Spot> {
    prop_oneof![2 => (0u8..4).prop_map(|block| Spot { block, page: 0 }), 1 => spot()]
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1u64..4, 3 => Just(512), 3 => Just(513), 3 => 500u64..1600, 1 => Just(0), 1 => Just(3 << 18)]
}

fn lie() -> impl Strategy<Value = Lie> {
    let pieces = prop_oneof![Just(1u16), 2u16..9, Just(512), Just(600)].prop_map(Lie::Pieces);
    prop_oneof![4 => Just(Lie::Aligned), 1 => Just(Lie::Crooked), 2 => pieces, 1 => Just(Lie::HostReadOnly)]
}

fn log_op() -> impl Strategy<Value = LogOp> {
    let part = || prop_oneof![2 => Just((0, 255)), 1 => (any::<u8>(), any::<u8>())];
    prop_oneof![
        3 => any::<[bool; 4]>().prop_map(|[dirty_bit, leaf, all, eager]| LogOp::Start { dirty_bit, leaf, all, eager }),
        1 => Just(LogOp::Stop),
        6 => part().prop_map(|(from, to)| LogOp::Harvest(from, to)),
        3 => (part(), any::<u64>()).prop_map(|((from, to), seed)| LogOp::GetAndClear(from, to, seed)),
        1 => any::<u64>().prop_map(LogOp::Merge),
        1 => Just(LogOp::Split),
        2 => Just(LogOp::Collapse),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let id = || 0u8..5;
    let few = || prop_oneof![4 => 1u64..4, 4 => Just(512), 4 => 1u64..1600, 1 => Just(2 << 18)];
    prop_oneof![
        3 => (id(), prop::bool::weighted(0.25), start(), pages(), lie(), prop::bool::weighted(0.2))
            .prop_map(|(id, smm, at, pages, shape, read_only)| Op::Add { id, smm, at, pages, shape, read_only }),
        1 => id().prop_map(Op::Delete),
        1 => (id(), start()).prop_map(|(id, at)| Op::Move(id, at)),
        1 => (id(), any::<bool>()).prop_map(|(id, read_only)| Op::Flags { id, read_only }),
        10 => (any::<bool>(), spot(), 0u8..3).prop_map(|(second, at, access)| Op::Touch { second, at, access }),
        1 => Just(Op::ZapAll),
        1 => (any::<bool>(), any::<bool>(), prop::bool::weighted(0.25), any::<bool>())
            .prop_map(|(second, five, smm, plain)| Op::Turn { second, five, smm, plain }),
        2 => (start(), few()).prop_map(|(at, pages)| Op::Zap(at, pages)),
        2 => (spot(), 1u64..5, any::<bool>()).prop_map(|(at, pages, moved)| Op::Invalidate(at, pages, moved)),
        // In the same block, where a huge leaf would reach into the range.
        2 => (spot(), 1u64..5, 0u16..512).prop_map(|(at, pages, page)| Op::TouchDuring(at, pages, Spot { page, ..at })),
        1 => (0u8..6).prop_map(Op::Starve),
        8 => (id(), log_op()).prop_map(|(id, op)| Op::Log(id, op)),
        2 => (spot(), any::<bool>()).prop_map(|(at, more)| Op::Track(at, more)),
        2 => (spot(), few(), any::<bool>()).prop_map(|(at, pages, clear)| Op::Age(at, pages, clear)),
        1 => (any::<bool>(), spot(), few()).prop_map(|(by_vcpu, at, pages)| Op::Device(by_vcpu, at, pages)),
    ]
}

fn setting() -> impl Strategy<Value = (Table, Setting)> {
    let table = prop_oneof![Just(Table::Npt), Just(Table::Ept)];
    let root = prop_oneof![Just(Level::L4), Just(Level::L5)];
    let largest = prop_oneof![Just(Level::K4), Just(Level::M2), Just(Level::G1)];
    // At the bottom, across a border of 1 GiB, and across one of 512 GiB.
    let base = prop_oneof![Just(0u64), Just(510), Just((1 << 18) - 2)];
    let slot_zap = prop_oneof![2 => Just(SlotZap::Slot), 1 => Just(SlotZap::Everything)];
    (table, root, largest, slot_zap, any::<bool>(), base, 0u64..4).prop_map(
        |(table, root_level, largest, slot_zap, mmio_entries, base_block, restless)| {
            (table, Setting { root_level, largest, slot_zap, mmio_entries, base_block, restless })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96 + 2000 * deep() as u32, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_keep_the_ghost_content(
        (table, setting) in setting(),
        program in prop::collection::vec(op(), 1..60),
    ) {
        assert_none(&run_on(table, setting, &program));
    }
}
