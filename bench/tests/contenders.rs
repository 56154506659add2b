//! Each contender's table really translates what it mapped: checked with a walk that knows the CPU's format alone, so
//! that nobody measures something that does nothing.

use std::sync::atomic::Ordering;

use nestling_bench::arena::{self, Claim};
use nestling_bench::clock::repetition;
use nestling_bench::contenders::{
    BareWalk, Contender, FIRST_GFN, FullFences, Membarrier, Nestling, PAGES, PageTableMultiarch, Seat, X86_64, backing,
};
use nestling_bench::plan::{Order, Plan};

/// Translates `gfn` as a CPU does (APM vol 2, 5.3): present and huge bits, four levels.
fn cpu_walk(root: u64, gfn: u64) -> Option<u64> {
    let mut table = root;
    for level in (0..4).rev() {
        let index = (gfn >> (9 * level) & 511) as usize;
        // SAFETY: the address is a root's or came out of a present entry of a table above the leaves, so the arena gave
        // it; the test holds the claim's owner, and no thread writes the table now.
        let raw = unsafe { arena::entries(table).as_ref() }[index].load(Ordering::Relaxed);
        if raw & 1 == 0 {
            return None;
        }
        assert!(level == 0 || raw & 1 << 7 == 0, "a huge page where 4 KiB pages were asked for");
        assert_eq!(raw & 0b110, 0b110, "writable by the guest at every level: {raw:#x}");
        table = raw & ((1 << 52) - (1 << 12));
    }
    Some(table >> 12)
}

const TESTED: u64 = 4096;

fn translates<C: Contender>() {
    for (order, threads) in [(Order::Sequential, 1), (Order::Sequential, 2), (Order::Random, 2)] {
        let table = C::new(Claim::take());
        let plan = Plan::new(order, threads, TESTED);
        std::thread::scope(|scope| {
            for (number, share) in (0..).zip(&plan.shares) {
                let mut seat = table.seat(number);
                scope.spawn(move || {
                    for &gfn in &share.gfns {
                        assert_eq!(seat.look_up(gfn), None, "nothing is mapped yet");
                        assert!(seat.fault(gfn));
                        assert!(!seat.fault(gfn), "what is mapped is not mapped again");
                        assert_eq!(seat.look_up(gfn), Some(backing(gfn)));
                    }
                });
            }
        });
        let root = table.root();
        for gfn in FIRST_GFN..FIRST_GFN + PAGES {
            let mapped = gfn < FIRST_GFN + TESTED;
            assert_eq!(cpu_walk(root, gfn), mapped.then(|| backing(gfn)), "{} {gfn:#x}", C::NAME);
        }
        // One page, then a range that does not end where a table does.
        let mut seat = table.seat(0);
        assert!(seat.zap(FIRST_GFN + 7) && !seat.zap(FIRST_GFN + 7));
        assert_eq!(seat.look_up(FIRST_GFN + 7), None);
        assert_eq!(seat.zap_range(FIRST_GFN, 1000), 999);
        drop(seat);
        for gfn in FIRST_GFN..FIRST_GFN + TESTED {
            let mapped = gfn >= FIRST_GFN + 1000;
            assert_eq!(cpu_walk(root, gfn), mapped.then(|| backing(gfn)), "{} {gfn:#x} after a zap", C::NAME);
        }
    }
}

#[test]
fn the_floor_translates() {
    translates::<BareWalk>();
}

#[test]
fn nestling_translates() {
    translates::<Nestling<FullFences>>();
    if Membarrier::register() {
        translates::<Nestling<Membarrier>>();
    }
}

#[test]
fn page_table_multiarch_translates() {
    translates::<PageTableMultiarch>();
}

#[test]
fn x86_64_translates() {
    translates::<X86_64>();
}

#[test]
fn a_repetition_does_every_page() {
    let cpus = nestling_bench::clock::cpus();
    for order in Order::ALL {
        for threads in 1..=cpus.len().min(2) {
            let plan = Plan::new(order, threads, TESTED);
            for took in [
                repetition::<Nestling<FullFences>>(&plan, &cpus),
                repetition::<BareWalk>(&plan, &cpus),
                repetition::<PageTableMultiarch>(&plan, &cpus),
                repetition::<X86_64>(&plan, &cpus),
            ] {
                assert!(took.iter().all(|took| !took.is_zero()));
            }
        }
    }
}
