//! A Multiboot kernel that checks the machine it runs on.
//!
//! Its command line's second word (the first is its name) says what to check: see [`tests::run`]. It starts all processors
//! that fw_cfg tells of, runs the check on them, prints what it found on the serial port, and ends the machine through
//! port 0xf4 (but for [`random`], which ends with the machine): with 0 if all was right, 1 if not, 2 if it was asked for something that it does not know.
//!
//! `meter` is no check: it measures ([`meter`]). Nor is `conformance`: it tries things and tells ([`conformance`]).
//!
//! Memory is mapped to itself. Interrupt and exception handlers have stacks of their own (IST): compiled code keeps data
//! below the stack pointer.
#![no_std]
#![no_main]

#[cfg(not(panic = "abort"))]
compile_error!("there is no unwinder here: build this binary with `--profile bare-metal`");

mod apic;
mod boot;
mod conformance;
mod cpu;
mod machine;
mod meter;
mod random;
mod runtime;
mod serial;
mod smp;
mod tasks;
mod tests;
mod traps;
mod visit;

/// Fails the check with a text, unless the condition holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            $crate::serial::print(format_args!("FAIL: {}\n", format_args!($($text)+)));
            $crate::machine::exit(1);
        }
    };
}

/// Entered by the boot code on the first processor, in 64-bit mode.
#[unsafe(no_mangle)]
extern "C" fn rust_start() -> ! {
    traps::set_up(0);
    // Where firmware has been at work its timer ticks, on vectors that are the processor's own here.
    for mask in [0x21, 0xa1] {
        cpu::outb(mask, 0xff);
    }
    let mut words = machine::command_line().split(' ').skip(1);
    let name = words.next().unwrap_or("");
    if name == "meter" {
        // On whatever machine: nothing but memory, ports and a clock is asked of it.
        meter::run(words);
        machine::exit(0);
    }
    if name == "conformance" {
        // On a CPU without any hypervisor too.
        conformance::run(words);
        machine::exit(0);
    }
    apic::enable();
    smp::start_all();
    serial::print(format_args!("{name}: {} processors\n", smp::count()));
    tests::run(name);
    serial::print(format_args!("PASS: {name}\n"));
    machine::exit(0)
}

/// Entered by the start code on any other processor, in 64-bit mode, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn rust_start_other(number: usize) -> ! {
    traps::set_up(number);
    apic::enable();
    if number == 0 {
        // The first starts this way only where it wakes.
        tests::woken();
    }
    random::again(number);
    smp::work(number)
}
