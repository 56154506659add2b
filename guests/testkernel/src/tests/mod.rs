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
mod registers;
mod sleep;
mod timers;
mod windows;

use crate::{check, machine, random, serial};

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

/// Suites, each of all checks of one kind: what a loader hands over, devices, modes of the processor, instructions that are
/// executed in software, events.
const SUITES: [(&str, &[&str]); 5] = [
    ("image", &["handover"]),
    ("devices", &["platform", "apic", "ioapic", "flush", "timers"]),
    ("cpu", &["registers", "modes"]),
    ("emulation", &["mmio"]),
    ("delivery", &["events"]),
];

/// Runs the suite or the check of that name.
pub(crate) fn run(name: &str) {
    let Some((_, checks)) = SUITES.iter().find(|(suite, _)| *suite == name) else { return check(name) };
    for name in *checks {
        check(name);
        serial::print(format_args!("good: {name}\n"));
    }
}

/// The first processor has been started again: the machine has slept.
pub(crate) fn woken() -> ! {
    sleep::woken()
}

fn check(name: &str) {
    match name {
        "handover" => platform::handover(),
        "mmio" => mmio::run(),
        "apic" => apic::run(),
        "ioapic" => ioapic::run(),
        "timers" => timers::run(),
        "platform" => platform::run(),
        "flush" => flush::run(),
        "modes" => modes::run(),
        "registers" => registers::run(),
        "events" => events::run(),
        "hostile" => hostile::run(),
        "random" => random::run(),
        "sleep" => sleep::run(),
        "triple" => events::triple_fault(),
        "fail" => check!(false, "as asked"),
        "shutdown" => platform::shut_down(),
        _ => machine::exit(2),
    }
}
