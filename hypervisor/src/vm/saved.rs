//! A VM as it is kept while it does not run: everything but its memory.
//!
//! The form is versioned by [`VERSION`] and by nothing else: it changes with every change of what is in it, and another
//! version is refused. Everything that comes back is checked: that it belongs to a machine like this one
//! ([`SavedMachine::fits`]), and, by each part for itself, that it is a state in which it can be
//! ([`crate::devices::saved`]).
//!
//! **Time.** The VM's time and the guest's TSC go on where they stopped: for the guest's clocks the time in between did
//! not happen. The date of the real-time clock goes on with the world outside.
//!
//! **The CPU.** A guest has been told what its CPU can do, and goes on only where the same is offered. Its TSC rate is kept,
//! and so is everything that was computed from it; the rate of the new machine may differ by [`TOLERANCE_PPM`], which
//! two measurements of one rate do.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use nestling_control::config::GuestKind;
use serde::{Deserialize, Serialize};

use super::guest_cpu::CpuState;
use super::policy::msr::SavedMsrs;
use super::vcpu::Activity;
use crate::cpu::extended;
use crate::devices::lapic::Lapic;
use crate::devices::platform::Platform;
use crate::devices::saved::BadState;

/// The version of the form.
pub const VERSION: u32 = 2;
/// How far the rate of the TSC may be from the one that the guest was told, in parts of a million.
pub const TOLERANCE_PPM: u64 = 2_000;
/// The most bytes that a saved machine may have.
pub const MAX_BYTES: usize = 4 << 20;

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedVcpu {
    pub(super) cpu: CpuState,
    pub(super) extended: extended::State,
    pub(super) lapic: Lapic,
    pub(super) msrs: SavedMsrs,
    pub(super) activity: Activity,
    pub(super) nmis: u8,
    pub(super) started: bool,
}

/// What a guest's machine is like, as far as the guest can tell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Likeness {
    /// Kind of machine.
    pub kind: GuestKind,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// What CPUID says of features: (leaf, EAX, EBX, ECX, EDX), reduced to the bits that are features.
    pub features: Vec<[u32; 5]>,
}

/// All vCPUs and devices.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedMachine {
    /// [`VERSION`]. First, and alone decisive about what follows.
    pub version: u32,
    /// The machine.
    pub likeness: Likeness,
    /// Rate of the guest's TSC in kHz.
    pub tsc_khz: u64,
    /// Ticks since VM time 0.
    pub ticks: u64,
    /// Unix seconds outside at this moment.
    pub saved_at_s: u64,
    /// Unix seconds outside at VM time 0, as the guest was told.
    pub wall_clock_s: u64,
    /// When the console showed the ready marker, in VM nanoseconds.
    pub ready_ns: Option<u64>,
    /// What the console has shown of a line that has not ended.
    pub line: Vec<u8>,
    /// The port devices.
    pub platform: Platform,
    /// The vCPUs, by number.
    pub vcpus: Vec<SavedVcpu>,
}

/// Why a saved machine cannot be run here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unfit {
    /// Not a saved machine at all.
    Garbage,
    /// A saved machine of another version.
    Version(u32),
    /// It is larger than one can be.
    TooLarge,
    /// It has other RAM, in bytes: there, here.
    Memory(u64, u64),
    /// It has another number of vCPUs: there, here.
    Vcpus(u32, u32),
    /// It is another kind of machine.
    Kind,
    /// Its CPU has other features: leaf, there, here.
    Features(u32, [u32; 4], [u32; 4]),
    /// Its TSC runs at another rate, in kHz: there, here.
    Tsc(u64, u64),
    /// A part of it is impossible.
    Bad(BadState),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Garbage => write!(f, "not the state of a machine"),
            Self::Version(found) => write!(f, "a machine's state of version {found}, this is version {VERSION}"),
            Self::TooLarge => write!(f, "more than {} MiB of machine state", MAX_BYTES >> 20),
            Self::Memory(there, here) => {
                write!(f, "a guest with {} MiB of memory, this one has {} MiB", there >> 20, here >> 20)
            }
            Self::Vcpus(there, here) => write!(f, "a guest with {there} vCPUs, this one has {here}"),
            Self::Kind => write!(f, "another kind of machine"),
            Self::Features(leaf, there, here) => {
                write!(f, "a CPU with other features (CPUID {leaf:#x}: {there:08x?} there, {here:08x?} here)")
            }
            Self::Tsc(there, here) => write!(f, "a TSC of {there} kHz, here it runs at {here} kHz"),
            Self::Bad(bad) => write!(f, "{bad}"),
        }
    }
}

impl From<BadState> for Unfit {
    fn from(bad: BadState) -> Self {
        Self::Bad(bad)
    }
}

impl SavedMachine {
    /// As bytes.
    ///
    /// # Errors
    /// No memory for them, as text for the operator.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        postcard::to_allocvec(self).map_err(|error| alloc::format!("the machine's state: {error}"))
    }

    /// From bytes. What they say is not checked yet.
    ///
    /// # Errors
    /// They are not such a state.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Unfit> {
        if bytes.len() > MAX_BYTES {
            return Err(Unfit::TooLarge);
        }
        let (version, _) = postcard::take_from_bytes::<u32>(bytes).map_err(|_| Unfit::Garbage)?;
        if version != VERSION {
            return Err(Unfit::Version(version));
        }
        match postcard::take_from_bytes::<Self>(bytes) {
            Ok((machine, [])) => Ok(machine),
            _ => Err(Unfit::Garbage),
        }
    }

    /// Whether it can go on in a machine that is `here` like, whose TSC runs at `tsc_khz`.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn fits(&self, here: &Likeness, tsc_khz: u64) -> Result<(), Unfit> {
        let there = &self.likeness;
        if there.vcpus != here.vcpus || self.vcpus.len() != here.vcpus as usize {
            return Err(Unfit::Vcpus(self.vcpus.len().max(there.vcpus as usize) as u32, here.vcpus));
        }
        if there.memory_bytes != here.memory_bytes {
            return Err(Unfit::Memory(there.memory_bytes, here.memory_bytes));
        }
        if there.kind != here.kind {
            return Err(Unfit::Kind);
        }
        if there.features.len() != here.features.len() {
            return Err(Unfit::Garbage);
        }
        if let Some((there, here)) = there.features.iter().zip(&here.features).find(|(there, here)| there != here) {
            let [leaf, there @ ..] = *there;
            let [_, here @ ..] = *here;
            return Err(Unfit::Features(leaf, there, here));
        }
        let apart = u128::from(self.tsc_khz.abs_diff(tsc_khz)) * 1_000_000;
        if self.tsc_khz == 0 || apart > u128::from(tsc_khz) * u128::from(TOLERANCE_PPM) {
            return Err(Unfit::Tsc(self.tsc_khz, tsc_khz));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::devices::board::BoardConfig;
    use crate::devices::platform::PlatformConfig;
    use crate::devices::testing::Random;

    fn likeness() -> Likeness {
        let features = vec![[1, 0, 0, 0xff, 3], [7, 0, 5, 0, 0]];
        Likeness { kind: GuestKind::Multiboot, memory_bytes: 64 << 20, vcpus: 0, features }
    }

    fn machine() -> SavedMachine {
        let board = Some(BoardConfig { ram_bytes: 64 << 20, vcpus: 1 });
        SavedMachine {
            version: VERSION,
            likeness: likeness(),
            tsc_khz: 2_500_000,
            ticks: 12_345,
            saved_at_s: 1_700_000_000,
            wall_clock_s: 1_600_000_000,
            ready_ns: Some(7),
            line: b"nestling-selfch".to_vec(),
            platform: Platform::new(PlatformConfig { board, ..PlatformConfig::default() }),
            vcpus: Vec::new(),
        }
    }

    #[test]
    fn a_machine_comes_back_as_it_was() {
        let bytes = machine().to_bytes().unwrap();
        let again = SavedMachine::from_bytes(&bytes).unwrap();
        assert_eq!(again.to_bytes().unwrap(), bytes);
        assert_eq!(again.fits(&likeness(), 2_500_000), Ok(()));
        assert_eq!((again.ticks, again.line.as_slice()), (12_345, b"nestling-selfch".as_slice()));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let there = machine();
        let with = |change: &dyn Fn(&mut Likeness)| {
            let mut here = likeness();
            change(&mut here);
            there.fits(&here, 2_500_000).expect_err("does not fit")
        };
        assert_eq!(with(&|here| here.vcpus = 2), Unfit::Vcpus(0, 2));
        assert_eq!(with(&|here| here.memory_bytes = 128 << 20), Unfit::Memory(64 << 20, 128 << 20));
        assert_eq!(with(&|here| here.kind = GuestKind::Linux), Unfit::Kind);
        assert_eq!(with(&|here| here.features[1][2] = 4), Unfit::Features(7, [0, 5, 0, 0], [0, 4, 0, 0]));
        assert_eq!(with(&|here| here.features.truncate(1)), Unfit::Garbage);
        for khz in [2_504_000, 2_496_000] {
            assert_eq!(there.fits(&likeness(), khz), Ok(()), "two measurements of one rate");
        }
        for khz in [2_600_000, 2_400_000, 0] {
            assert_eq!(there.fits(&likeness(), khz), Err(Unfit::Tsc(2_500_000, khz)));
        }
    }

    #[test]
    fn other_versions_and_other_bytes_are_no_machine() {
        let refused = |bytes: &[u8]| SavedMachine::from_bytes(bytes).expect_err("refused");
        let good = machine().to_bytes().unwrap();
        let mut bytes = good.clone();
        bytes[0] += 1;
        assert_eq!(refused(&bytes), Unfit::Version(VERSION + 1));
        bytes = good.clone();
        bytes.push(0);
        assert_eq!(refused(&bytes), Unfit::Garbage, "something left over");
        for length in (0..good.len()).filter(|length| *length < 600 || length % 997 == 0) {
            assert_eq!(refused(&good[..length]), Unfit::Garbage, "cut off at {length}");
        }
        assert_eq!(refused(&vec![1; MAX_BYTES + 1]), Unfit::TooLarge);
        let mut random = Random::new(5);
        for _ in 0..2_000 {
            let mut bytes = good.clone();
            bytes[1 + random.below(500) as usize] = random.byte();
            if let Ok(machine) = SavedMachine::from_bytes(&bytes) {
                let _ = machine.fits(&likeness(), 2_500_000);
            }
        }
    }
}
