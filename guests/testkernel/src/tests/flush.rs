//! Pages that the host forgets while they are used: contents stay, counts stay, and so does an event on its way through a
//! page that is gone.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::apic::{self, ASSERT, SELF};
use crate::cpu::{cli, outl, sti};
use crate::machine::FLUSH;
use crate::{check, smp, traps};

const ROUNDS: u32 = 300;
const VECTOR: u8 = 0x91;

#[repr(align(4096))]
struct Page([AtomicU32; 1024]);

static PAGES: [Page; smp::MOST] = [const { Page([const { AtomicU32::new(0) }; 1024]) }; smp::MOST];
static SHARED: Page = Page([const { AtomicU32::new(0) }; 1024]);
static LAST_ROUND: AtomicBool = AtomicBool::new(false);

fn forget(page: &'static Page) {
    outl(FLUSH, core::ptr::from_ref(page).expose_provenance() as u32);
}

pub(super) fn run() {
    // Each its own page.
    smp::everywhere(|number| {
        let page = &PAGES[number];
        for round in 1..=ROUNDS {
            page.0[7].store(round, Ordering::SeqCst);
            forget(page);
            let found = page.0[7].load(Ordering::SeqCst);
            check!(found == round, "{found} in a page that held {round}");
        }
    });
    // One page of all: the others count, processor 0 has it forgotten.
    smp::begin(|_| {
        while !LAST_ROUND.load(Ordering::SeqCst) {
            SHARED.0[0].fetch_add(1, Ordering::SeqCst);
            SHARED.0[1].fetch_add(1, Ordering::SeqCst);
        }
    });
    for _ in 0..ROUNDS {
        forget(&SHARED);
        SHARED.0[2].fetch_add(1, Ordering::SeqCst);
    }
    LAST_ROUND.store(true, Ordering::SeqCst);
    smp::finish();
    let counts = [0, 1, 2].map(|index| SHARED.0[index].load(Ordering::SeqCst));
    check!(counts[0] == counts[1] && counts[2] == ROUNDS, "counts {counts:?}");
    smp::everywhere(|_| during_delivery());
}

/// An interrupt and an exception whose gate the host has forgotten.
fn during_delivery() {
    for _ in 0..20 {
        let before = traps::count(VECTOR);
        cli();
        apic::send(0, SELF | ASSERT | u32::from(VECTOR));
        outl(FLUSH, traps::idt_address() as u32);
        sti();
        while traps::count(VECTOR) == before {
            core::hint::spin_loop();
        }
        cli();
        check!(traps::count(VECTOR) == before + 1, "an interrupt came {} times", traps::count(VECTOR) - before);
        let before = traps::count(traps::BREAKPOINT);
        outl(FLUSH, traps::idt_address() as u32);
        // SAFETY: the handler returns.
        unsafe { core::arch::asm!("int3") };
        check!(
            traps::count(traps::BREAKPOINT) == before + 1,
            "INT3 came {} times",
            traps::count(traps::BREAKPOINT) - before
        );
    }
}
