//! Seeing to it that kicks arrive: while a VM runs, and when its vCPUs are to leave for good.
//!
//! **Who may call.** CPU 0, which keeps house and runs no guest.
//!
//! **A kick can be lost.** Not by a CPU: an interrupt that waits ends the guest's run as soon as it is entered. QEMU's
//! emulation (7.2) can lose one, where VMRUN with a virtual interrupt pending races with it ([`crate::cpu::barrier`]). Who
//! posts something to a vCPU to which something is posted already relies on the first kick, so a vCPU whose guest exits for
//! no other reason would go on without any of it. There [`forgotten`] kicks again whoever has news and is not in the
//! hypervisor. One kick too many is a look too many.
//!
//! **How long a vCPU may take to leave** is not to be measured by the clock: where CPUs are threads of a machine that has far
//! more to do, one may not be run at all for as long as one likes to name. While this CPU sleeps between two looks, their
//! number is a clock. So behind the first looks this CPU stays awake, and counts its own instructions: all CPUs are
//! scheduled alike, and one that has left nothing behind while this one got so far is stuck. Meanwhile it is asked by NMIs
//! too, which take another way out of a guest than interrupts do.

use alloc::vec::Vec;
use core::hint::black_box;

use super::shared::{Place, Shared};
use crate::cpu::local;
use crate::memory::embedder;

/// Looks with a sleep of [`super::house`]'s between them: 2 s on a machine that has nothing else to do, where a vCPU needs
/// some microseconds.
const ASLEEP: u32 = 1_000;
/// Looks without, and the turns of a loop behind each: 2^32 together, some seconds of this CPU's own time.
const AWAKE: u32 = 256;
const TURNS: u32 = 1 << 24;

/// Kicks again the vCPUs that have news and are where they do not look.
pub(super) fn forgotten(vm: &Shared) {
    for (vcpu, _) in vm.vcpus.iter().enumerate().filter(|(_, reach)| reach.has_news()) {
        vm.wake(vcpu);
    }
}

/// What to do behind a look at vCPUs that have not all left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Means {
    /// Sleep until something comes.
    Sleep,
    /// Stay awake, and ask by NMIs as well.
    Insist,
    /// They are stuck.
    GiveUp,
}

/// How far the waiting for vCPUs to leave is.
#[derive(Debug, Default)]
pub(super) struct Leave {
    looks: u32,
}

impl Leave {
    /// One look; `slept` says that a whole sleep lies behind it: looks because somebody left count for nothing.
    fn count(&mut self, slept: bool) -> Means {
        match self.looks {
            looks if looks < ASLEEP => {
                self.looks += u32::from(slept);
                Means::Sleep
            }
            looks if looks < ASLEEP + AWAKE => {
                self.looks += 1;
                Means::Insist
            }
            _ => Means::GiveUp,
        }
    }

    /// Makes the vCPUs leave that have not yet. The VM has been ended before.
    ///
    /// # Panics
    /// If one is stuck in its guest. Its memory can't be taken down under it: this is a defect of ours, and the end.
    pub(super) fn look(&mut self, vm: &Shared, slept: bool) {
        vm.wake_all();
        match self.count(slept) {
            Means::Sleep => {}
            Means::Insist => {
                let inside = (0..vm.vcpus.len()).zip(vm.places()).filter(|(_, place)| *place == Place::Guest);
                inside.for_each(|(vcpu, _)| embedder::insist(vcpu));
                (0..TURNS).for_each(|turn| _ = black_box(turn));
            }
            Means::GiveUp => {
                let cpus = (0..vm.vcpus.len()).map(|vcpu| &local::all()[embedder::cpu_of(vcpu)]);
                let nmis: Vec<u64> = cpus.map(local::Local::nmis).collect();
                panic!("vCPUs did not leave: {:?}, NMIs taken there {nmis:?}", vm.places());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sleeps_and_own_work_count() {
        let mut leave = Leave::default();
        assert!((0..100_000).all(|_| leave.count(false) == Means::Sleep), "vCPUs that leave one after the other");
        assert!((0..ASLEEP).all(|_| leave.count(true) == Means::Sleep));
        assert!((0..AWAKE).all(|_| leave.count(false) == Means::Insist));
        assert_eq!(leave.count(false), Means::GiveUp);
    }
}
