//! What ends a run as if the CPU had found the guest's state wrong.
//!
//! A write to CR3 or CR4 of a bit that does not exist is #GP (APM vol. 2, 3.1.2 and 3.1.3). QEMU's emulation (7.2) makes an
//! exit of it, with the code of a state that VMRUN refuses, RIP at the instruction and nothing changed; where that is so,
//! the guest is given its #GP here. A CPU has no such exit.
//!
//! A state that VMRUN really refuses may have its RIP at such an instruction as well, and would be refused again with the
//! #GP on its way in, for ever. So this many in a row, with no exit of another kind between them, are believed.

use super::exit::{self, Exit, Raised};
use super::guest_cpu::GuestCpu;
use super::handle::Next;
use super::vcpu::Vcpu;
use crate::emulate::{Kind, Seen};

const BELIEVED: u32 = 1_000;

/// Exits of this kind in a row.
#[derive(Debug, Default)]
pub(super) struct Refused {
    count: u32,
    /// Exits of other kinds until then.
    others: u64,
}

impl Refused {
    /// One more; says whether it is believed.
    fn is_believed(&mut self, exits: &[u64; exit::KINDS]) -> bool {
        let others = exits.iter().sum::<u64>() - exits[Exit::Invalid.index()];
        self.count = if others == self.others { self.count + 1 } else { 1 };
        self.others = others;
        self.count <= BELIEVED
    }
}

impl<C: GuestCpu> Vcpu<C> {
    /// The CPU, or what stands for one, does not go on with the guest as it is.
    #[cold]
    pub(super) fn refused(&mut self) -> Next {
        match self.see() {
            Some(Seen { what: Kind::WriteControl, .. }) if self.refused.is_believed(&self.exits) => {
                self.cpu.raise(Raised::GeneralProtection);
                Next::Continue
            }
            _ => self.unexpected(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_is_refused_for_ever_is_not_believed_for_ever() {
        let mut refused = Refused::default();
        let mut exits = [0; exit::KINDS];
        for round in 0..3 {
            exits[Exit::Cpuid.index()] += 1;
            for number in 0..BELIEVED {
                exits[Exit::Invalid.index()] += 1;
                assert!(refused.is_believed(&exits), "{round}: {number}");
            }
        }
        assert!(!refused.is_believed(&exits));
    }
}
