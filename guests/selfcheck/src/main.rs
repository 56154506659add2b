//! The init of the default Linux guest.
//!
//! As process 1 it mounts what a Linux userland expects, prints one line, and then does what the kernel command line
//! says:
//!
//! - `nestling.mode=check`: run the self-check and end the machine: power-off after `PASS`; after `FAIL` the value 1 to
//!   the debug-exit port, which makes the hypervisor's command end with status 3.
//! - `nestling.mode=forks`: fork, execute and wait for `nestling.forks=N` processes, say what that cost ([`forks`]), power-off.
//! - `nestling.mode=shell` (the default): a busybox shell with job control on the serial console; power-off when it ends.
//!
//! Any other process that runs this program (the shell's `selfcheck` command) runs the check and returns its verdict.
//!
//! `nestling.ram=PERCENT` sets how much of the available memory the check uses, `nestling.seconds=N` repeats it until
//! that much time has gone, `nestling.tty=ROWSxCOLUMNS` sets the size of the shell's terminal.
//!
//! Whoever judges a run needs two lines only: the first, which starts with [`READY_PREFIX`] and means that the kernel has
//! booted, and the last, `nestling-selfcheck: PASS …` or `nestling-selfcheck: FAIL …`. A guest that prints neither has
//! failed.

mod clock;
mod failure;
mod files;
mod forks;
mod memory;
mod parameters;
mod shell;
mod storm;
mod sys;

use std::{process::ExitCode, time::Instant};

use failure::Failure;
use parameters::{Mode, Parameters};

/// Starts the first line that this program prints as process 1.
const READY_PREFIX: &str = "nestling-init:";
/// Written to the debug-exit port after a failed check.
const FAILED: u32 = 1;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        return match verdict(&Parameters::of_this_boot()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    // A machine whose mounts fail can still say so: the kernel has opened the console for process 1.
    if let Err(cause) = sys::prepare() {
        println!("nestling-selfcheck: FAIL {cause}");
        sys::debug_exit(FAILED);
        sys::power_off();
    }
    let parameters = Parameters::of_this_boot();
    println!("{READY_PREFIX} {}", sys::describe());
    match parameters.mode {
        Mode::Check => {
            if verdict(&parameters).is_err() {
                sys::debug_exit(FAILED);
            }
        }
        Mode::Shell => shell::run(&parameters),
        Mode::Forks => {
            if let Err(failure) = forks::run(parameters.forks) {
                println!("nestling-selfcheck: FAIL {failure}");
            }
        }
    }
    sys::power_off()
}

fn verdict(parameters: &Parameters) -> Result<(), Failure> {
    let start = Instant::now();
    let mut result = check(parameters);
    let mut rounds = 1;
    while result.is_ok() && start.elapsed().as_secs() < parameters.seconds {
        println!("nestling-selfcheck: {rounds} times good, {} s", start.elapsed().as_secs());
        result = check(parameters);
        rounds += 1;
    }
    match &result {
        Ok(()) => println!("nestling-selfcheck: PASS in {:.2} s", start.elapsed().as_secs_f64()),
        Err(failure) => println!("nestling-selfcheck: FAIL {failure}"),
    }
    result
}

/// Runs the checks, from those that a broken guest fails at once to the longest. The storm comes before anything that
/// starts threads: it forks, and a fork of a threaded process may only exec.
fn check(parameters: &Parameters) -> Result<(), Failure> {
    let cpus = sys::online_cpus()?;
    println!("nestling-selfcheck: {} CPUs, {} MiB available", cpus.len(), sys::available_bytes()? >> 20);
    storm::check(&cpus)?;
    clock::check(&cpus)?;
    memory::check(&cpus, parameters.ram_percent)?;
    files::check(&cpus)
}
