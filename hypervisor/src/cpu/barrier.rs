//! A fence on every CPU at the request of one: the expensive half of an asymmetric barrier.
//!
//! The cheap side orders nothing but its compiler. The expensive side asks every other online CPU for a full fence with
//! an NMI, whose handler increments that CPU's counter with a locked instruction, and waits for all the counters to
//! move. An NMI is not held back by IF = 0, a spin loop or HLT; a guest is left by it; only guest entry and exit
//! (GIF = 0) delay it, for a bounded number of instructions.
//!
//! Two callers at once may share one NMI. That is right: a counter read after the caller's own fence, and seen to have
//! moved, means that the target's locked increment came after that read.

use core::hint::spin_loop;
use core::sync::atomic::{Ordering, compiler_fence, fence};

use super::apic::{self, Command};
use super::{MAX_CPUS, local};

/// The cheap half: orders the compiler only.
#[inline]
pub fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// The expensive half: when it returns, every online CPU has executed a full fence since the call.
pub fn heavy() {
    fence(Ordering::SeqCst);
    let me = local::this().number();
    let mut before = [None; MAX_CPUS];
    for (cpu, seen) in local::all().iter().zip(&mut before) {
        if cpu.is_online() && cpu.number() != me {
            *seen = Some(cpu.nmis());
            apic::send(cpu.apic_id(), Command::Nmi);
        }
    }
    for (cpu, seen) in local::all().iter().zip(before) {
        while seen == Some(cpu.nmis()) {
            spin_loop();
        }
    }
    fence(Ordering::SeqCst);
}
