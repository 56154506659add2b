//! A run, checked: everything that can be refused is refused here, before anything is installed, built or started.

use std::time::Duration;

use nestling_control::config::GuestKind;

use crate::{
    accel::{self, Acceleration},
    args::{Accel, Mode, RunArgs},
    error::Error,
    guest::plan::{GuestPlan, Seat},
    setup,
};

/// The default of `--timeout` in check mode and for Multiboot images.
const CHECK_TIMEOUT: Duration = Duration::from_secs(300);

/// What the hypervisor itself needs beside the guest's memory, in bytes: its image, heap, stacks, and page tables for
/// huge-page-less guests (1/512 of the guest's memory, which [`Plan::host_memory_bytes`] adds).
const HYPERVISOR_BYTES: u64 = 160 << 20;

/// A run that may be prepared.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its guest.
    pub guest: GuestPlan,
    /// How QEMU runs.
    pub acceleration: Acceleration,
    /// When to give up.
    pub timeout: Option<Duration>,
    /// Show all that the hypervisor says.
    pub verbose: bool,
}

impl Plan {
    /// Checks what was asked for.
    ///
    /// # Errors
    /// The first thing that cannot be done, by the option that asked for it.
    pub fn new(args: &RunArgs, seat: Seat) -> Result<Self, Error> {
        let guest = GuestPlan::new(&args.guest, seat)?;
        let acceleration = acceleration(args.accel)?;
        let limited = guest.mode == Mode::Check || guest.config.kind == GuestKind::Multiboot;
        let timeout = args.timeout.or(limited.then_some(CHECK_TIMEOUT));
        let plan = Self { guest, acceleration, timeout, verbose: args.verbose };
        plan.check_host_memory()?;
        Ok(plan)
    }

    /// Whether this host has the memory.
    ///
    /// # Errors
    /// If it has not.
    pub fn check_host_memory(&self) -> Result<(), Error> {
        let needed = self.host_memory_bytes(0);
        match setup::available_memory_bytes() {
            Some(available) if available < needed => Err(Error::HostMemory { needed, available }),
            _ => Ok(()),
        }
    }

    /// Memory of QEMU's machine, in bytes: the guest's, what maps it, the hypervisor's own, and the bundle.
    ///
    /// A 1 GiB mapping needs a host gibibyte that is whole and aligned; one more is added, as the hypervisor's own use
    /// breaks the first.
    #[must_use]
    pub fn host_memory_bytes(&self, bundle_bytes: u64) -> u64 {
        use nestling_control::config::HugePages;
        let guest = self.guest.config.memory_bytes;
        let guest = match self.guest.config.huge_pages {
            HugePages::G1 => guest.next_multiple_of(1 << 30) + (1 << 30),
            HugePages::None | HugePages::M2 => guest,
        };
        guest + guest / 256 + HYPERVISOR_BYTES + bundle_bytes.next_multiple_of(1 << 20)
    }
}

/// How QEMU is to run.
///
/// # Errors
/// If hardware virtualisation was demanded where it cannot be had.
pub fn acceleration(asked: Accel) -> Result<Acceleration, Error> {
    match (asked, accel::nested_svm()) {
        (Accel::Tcg, _) | (Accel::Auto, Err(_)) => Ok(Acceleration::Tcg),
        (Accel::Counted, _) => Ok(Acceleration::Counted),
        (Accel::Kvm, Err(reason)) => Err(Error::NoKvm(reason)),
        (Accel::Kvm | Accel::Auto, Ok(())) => Ok(Acceleration::Kvm),
    }
}
