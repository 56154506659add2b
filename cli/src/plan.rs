//! A run, checked: everything that can be refused is refused here, before anything is installed, built or started.

use std::time::Duration;

use nestling_control::config::GuestKind;

use crate::{
    accel::{self, Acceleration},
    args::{Accel, Mode, RunArgs},
    copy::stream::Header,
    error::Error,
    guest::plan::{GuestPlan, Seat},
    setup,
};

/// The default of `--timeout` in check mode and for Multiboot images.
const CHECK_TIMEOUT: Duration = Duration::from_secs(300);

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

    /// A run that goes on with the guest of a copy.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn resumed(args: &RunArgs, header: &Header) -> Result<Self, Error> {
        let guest = GuestPlan::resumed(&args.guest, header)?;
        let timeout = args.timeout.or((guest.mode == Mode::Check).then_some(CHECK_TIMEOUT));
        let plan = Self { guest, acceleration: acceleration(args.accel)?, timeout, verbose: args.verbose };
        plan.check_host_memory()?;
        Ok(plan)
    }

    /// Whether this host has the memory.
    ///
    /// # Errors
    /// If it has not.
    pub fn check_host_memory(&self) -> Result<(), Error> {
        let needed = self.guest.machine_memory_bytes(0);
        match setup::available_memory_bytes() {
            Some(available) if available < needed => Err(Error::HostMemory { needed, available }),
            _ => Ok(()),
        }
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
