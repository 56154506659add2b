//! Each contender's table really translates what it mapped: checked with a walk that knows the CPU's format alone, so
//! that nobody measures something that does nothing.

use std::sync::atomic::Ordering;

use nestling_bench::arena::{self, Claim};
use nestling_bench::clock::repetition;
use nestling_bench::contenders::{
    BareWalk, Contender, FIRST, FullFences, Membarrier, Nestling, PAGE, PAGES, PageTableMultiarch, Seat, X86_64,
    backing, pages_from,
};
use nestling_bench::plan::{Order, Plan};

/// Translates `gpa` as a CPU does (APM vol 2, 5.3): present and huge bits, four levels.
fn cpu_walk(root: u64, gpa: u64) -> Option<u64> {
    let mut table = root;
    for level in (0..4).rev() {
        let index = (gpa >> (12 + 9 * level) & 511) as usize;
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
    Some(table)
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
                    for &gpa in &share.gpas {
                        assert_eq!(seat.look_up(gpa), None, "nothing is mapped yet");
                        assert!(seat.fault(gpa));
                        assert!(!seat.fault(gpa), "what is mapped is not mapped again");
                        assert_eq!(seat.look_up(gpa), Some(backing(gpa)));
                    }
                });
            }
        });
        let root = table.root();
        for gpa in pages_from(FIRST, PAGES) {
            let mapped = gpa < FIRST + TESTED * PAGE;
            assert_eq!(cpu_walk(root, gpa), mapped.then(|| backing(gpa)), "{} {gpa:#x}", C::NAME);
        }
        // One page, then a range that does not end where a table does.
        let mut seat = table.seat(0);
        assert!(seat.zap(FIRST + 7 * PAGE) && !seat.zap(FIRST + 7 * PAGE));
        assert_eq!(seat.look_up(FIRST + 7 * PAGE), None);
        assert_eq!(seat.zap_range(FIRST, 1000), 999);
        drop(seat);
        for gpa in pages_from(FIRST, TESTED) {
            let mapped = gpa >= FIRST + 1000 * PAGE;
            assert_eq!(cpu_walk(root, gpa), mapped.then(|| backing(gpa)), "{} {gpa:#x} after a zap", C::NAME);
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
