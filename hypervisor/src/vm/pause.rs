//! Holding all vCPUs of a VM while somebody looks at its state.
//!
//! **The protocol.** Whoever holds a VM has a CPU of its own and goes through these phases, each of which every vCPU has
//! reached before the next begins:
//!
//! 1. *Hold.* Every vCPU leaves its guest, says that it has, and halts. Nothing of the guest runs now; what was on its way
//!    from one vCPU to another has been posted.
//! 2. The port devices are frozen, under their lock: CPU 0 types no more and lets no time pass there. From here on nobody
//!    posts anything. This is the moment at which the VM's time stands still.
//! 3. *Export.* Every vCPU takes in what was posted to it, and leaves its state here.
//! 4. *Run*, or the end of the VM. The zero of the VM's time has been moved by then, and each vCPU takes that over.
//!
//! A vCPU looks at the phase where it looks whether the VM ends: before a turn, in the last look before guest entry, and
//! before it halts. Phases are published before vCPUs are woken, with the same order of accesses as everything else that
//! wakes one ([`super::shared`]).
//!
//! The end of the VM goes before everything: held vCPUs leave, and whoever holds them looks for that while it waits.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use spin::Mutex;

use super::saved::SavedVcpu;

/// What the vCPUs are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Phase {
    /// Run the guest.
    Run = 0,
    /// Wait.
    Hold = 1,
    /// Leave the state here, then wait.
    Export = 2,
}

/// One VM's hold.
#[derive(Debug)]
pub struct Pause {
    phase: AtomicU8,
    /// vCPUs that wait.
    held: AtomicUsize,
    /// States by vCPU, in the export phase.
    states: Mutex<Vec<Option<SavedVcpu>>>,
    exported: AtomicUsize,
}

impl Default for Pause {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Run as u8),
            held: AtomicUsize::new(0),
            states: Mutex::new(Vec::new()),
            exported: AtomicUsize::new(0),
        }
    }
}

impl Pause {
    /// What the vCPUs are to do.
    #[inline]
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Run,
            1 => Phase::Hold,
            _ => Phase::Export,
        }
    }

    /// Sets it. To be followed by a wake-up of every vCPU.
    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// A vCPU waits from now on.
    pub(super) fn arrive(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    /// A vCPU goes on.
    pub(super) fn depart(&self) {
        self.held.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many vCPUs wait.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// A vCPU leaves its state.
    pub(super) fn leave(&self, vcpu: usize, state: SavedVcpu) {
        if let Some(place) = self.states.lock().get_mut(vcpu) {
            *place = Some(state);
        }
        self.exported.fetch_add(1, Ordering::SeqCst);
    }

    /// Makes room for the states of so many vCPUs. Before the export phase.
    pub(super) fn make_room(&self, vcpus: usize) {
        let mut states = self.states.lock();
        states.clear();
        states.resize_with(vcpus, || None);
        self.exported.store(0, Ordering::SeqCst);
    }

    /// How many vCPUs have left their state.
    pub(super) fn exported(&self) -> usize {
        self.exported.load(Ordering::SeqCst)
    }

    /// Takes the states, if all are there.
    pub(super) fn take_states(&self) -> Option<Vec<SavedVcpu>> {
        core::mem::take(&mut *self.states.lock()).into_iter().collect()
    }
}
