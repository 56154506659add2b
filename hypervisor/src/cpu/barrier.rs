//! A fence on every CPU at the request of one: the expensive half of an asymmetric barrier.
//!
//! The cheap side orders nothing but its compiler. The expensive side asks every other online CPU for a full fence with
//! an NMI, whose handler increments that CPU's counter with a locked instruction, and waits for all the counters to
//! move. An NMI is not held back by IF = 0, a spin loop or HLT; a guest is left by it; only guest entry and exit
//! (GIF = 0) delay it, for a bounded number of instructions.
//!
//! Two callers at once may share one NMI. That is right: a counter read after the caller's own fence, and seen to have
//! moved, means that the target's locked increment came after that read.
//!
//! A CPU that is away, which is halted, is not asked. It says so after everything that it did, and when it comes back
//! it withdraws that and executes a full fence, before it does anything that is ordered here. So a caller that finds it
//! away, having fenced itself, sees all that the CPU did before; and if it withdraws only then, its own fence comes after the
//! caller's, which is all that was asked of it. Where a CPU is a thread of an emulator, it need not be waited for until that
//! thread has its turn. (The same could be said of a CPU in a guest. It is asked all the same: its exit is the answer.)
//!
//! CPU 0 is left out. It is never on the cheap side while another CPU is on the expensive one: it sets a VM up before vCPUs
//! run and takes it down after, and in between it touches nothing that the fence orders ([`crate::vm`] says what it does
//! instead). Nor is it safe to ask it under QEMU: the bug told of there, another CPU's write-back of CPU 0's flags, could
//! also bring back the flag that masks NMIs, which the end of an NMI has just cleared; CPU 0 would take none any more.
//!
//! An NMI that is not answered in time is sent again. QEMU (7.2 was looked at) can lose one: VMRUN with a virtual interrupt
//! pending, which is how an interrupt window is asked for, puts a bit into the CPU's word of pending interrupts by a plain
//! read-modify-write, without the lock under which other CPUs put theirs in. One NMI too many is a fence too many.

use core::hint::spin_loop;
use core::sync::atomic::{Ordering, compiler_fence, fence};

use super::apic::{self, Command};
use super::instructions::rdtsc;
use super::{MAX_CPUS, clock, local};

/// How long a CPU may take to answer before it is asked again: far longer than a CPU that runs needs, and short for who
/// waits.
const PATIENCE_US: u64 = 20_000;

/// The cheap half: orders the compiler only.
#[inline]
pub fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// The expensive half: when it returns, every online CPU but CPU 0 has executed a full fence since the call, or will before
/// it does anything that is ordered by it.
pub fn heavy() {
    fence(Ordering::SeqCst);
    let me = local::this().number();
    let mut before = [None; MAX_CPUS];
    for (cpu, seen) in local::all().iter().zip(&mut before) {
        if cpu.is_online() && cpu.number() != me && cpu.number() != 0 && !cpu.is_away() {
            *seen = Some(cpu.nmis());
            apic::send(cpu.apic_id(), Command::Nmi);
        }
    }
    let patience = clock::tsc_from_us(PATIENCE_US);
    let mut sent = rdtsc();
    for (cpu, seen) in local::all().iter().zip(before) {
        while seen == Some(cpu.nmis()) {
            spin_loop();
            if rdtsc().wrapping_sub(sent) > patience {
                apic::send(cpu.apic_id(), Command::Nmi);
                sent = rdtsc();
            }
        }
    }
    fence(Ordering::SeqCst);
}
