//! The end after a defect of the hypervisor itself.
//!
//! Any CPU may come here at any moment: with a lock held, out of memory, with the channel's queue half written. So this
//! path takes no lock: the allocator of the image serves a panicking machine from a reserve of its own (it asks
//! [`in_progress`]), the text goes straight to the serial port behind a frame boundary, which ends whatever frame was
//! being sent, and then the machine ends. The first CPU here speaks; any other halts.

use alloc::string::ToString;
use core::fmt::Display;
use core::sync::atomic::{AtomicBool, Ordering};

use nestling_control::message::{GuestExit, LogLevel, ToCommand};

use super::instructions;
use crate::control;

/// Long enough for 16 bytes on their way to a port, also where each is an exit of this machine's own hypervisor.
const STEP_ASIDE_SPINS: u32 = 200_000;

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Whether some CPU has come here: the machine is about to end.
#[must_use]
pub fn in_progress() -> bool {
    PANICKED.load(Ordering::Relaxed)
}

/// Tells `what` and ends the machine.
pub fn stop(what: impl Display) -> ! {
    if PANICKED.swap(true, Ordering::SeqCst) {
        instructions::halt_forever();
    }
    // CPU 0 may be writing to the same port: it looks before each 16 bytes, and stops.
    for _ in 0..STEP_ASIDE_SPINS {
        core::hint::spin_loop();
    }
    let text = what.to_string();
    control::send_now(&ToCommand::Log { level: LogLevel::Error, text: text.clone() });
    control::send_now(&ToCommand::Done(GuestExit::Error { text }));
    control::end_machine(control::EndStatus::HypervisorFailed)
}
