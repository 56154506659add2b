//! The two halves of the asymmetric fence on a hosted machine.
//!
//! [`Fences::Membarrier`] makes the reader's half a compiler fence and lets the kernel interrupt every running thread
//! of the process for the writer's half (`membarrier(2)`, private expedited).

#![expect(unsafe_code, reason = "one system call")]

use std::sync::atomic::{Ordering, compiler_fence, fence};

const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;

/// Which pair of fences a machine uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fences {
    /// A full fence on both sides.
    Full,
    /// A compiler fence for readers, `membarrier(2)` for writers.
    Membarrier,
}

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: the call takes three integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

impl Fences {
    /// The asymmetric pair if the kernel has it.
    pub fn asymmetric() -> Option<Self> {
        membarrier(REGISTER_PRIVATE_EXPEDITED).then_some(Self::Membarrier)
    }

    pub(super) fn light(self) {
        match self {
            Self::Full => fence(Ordering::SeqCst),
            Self::Membarrier => compiler_fence(Ordering::SeqCst),
        }
    }

    pub(super) fn heavy(self) {
        match self {
            Self::Full => fence(Ordering::SeqCst),
            Self::Membarrier => assert!(membarrier(PRIVATE_EXPEDITED), "membarrier was registered"),
        }
    }
}
