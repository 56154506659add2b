//! The checks, one file each.

mod apic;
mod events;
mod flush;
mod hostile;
mod ioapic;
mod legacy;
mod memory;
mod mmio;
mod modes;
mod platform;
mod timers;
mod windows;

use crate::{check, machine, random};

/// Executes instructions of which one raises an exception, and goes on behind them. Operands are as of `asm!`.
macro_rules! provoke {
    ([$($instruction:expr),+ $(,)?] $($operands:tt)*) => {{
        let resume = $crate::traps::resume_at();
        core::arch::asm!(
            "lea {scratch}, [rip + 55f]",
            "mov [{resume}], {scratch}",
            $($instruction,)+
            "mov qword ptr [{resume}], 0",
            "55:",
            scratch = out(reg) _,
            resume = in(reg) resume,
            $($operands)*
        );
    }};
}
pub(crate) use provoke;

/// Runs the check of that name.
pub(crate) fn run(name: &str) {
    match name {
        "mmio" => mmio::run(),
        "apic" => apic::run(),
        "ioapic" => ioapic::run(),
        "timers" => timers::run(),
        "platform" => platform::run(),
        "flush" => flush::run(),
        "modes" => modes::run(),
        "events" => events::run(),
        "hostile" => hostile::run(),
        "random" => random::run(),
        "triple" => events::triple_fault(),
        "fail" => check!(false, "as asked"),
        "shutdown" => platform::shut_down(),
        _ => machine::exit(2),
    }
}
