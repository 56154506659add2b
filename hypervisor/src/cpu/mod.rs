//! The CPU itself: descriptor tables, interrupts, the local APIC, clocks, and what each CPU keeps about itself.
//!
//! Rules that all Rust code of the hypervisor relies on:
//!
//! - **IF is 0** while Rust runs. Interrupts are taken in three places only: [`instructions::interrupt_window`],
//!   [`instructions::halt`], and while a guest runs (where they are exits). A handler therefore never meets a lock held
//!   on its own CPU, and may change caller-saved registers.
//! - **NMIs come at any time** outside guest entry. Their handler is six instructions of assembly that touch nothing but
//!   one counter: it is how [`barrier`] makes every CPU execute a fence.
//! - **Every gate has a stack of its own** (IST): the prebuilt `core` uses the red zone, so no handler may run on the
//!   stack it interrupts.
//! - An **exception** in the hypervisor is a defect of the hypervisor: [`panic::stop`].

pub mod apic;
pub mod barrier;
pub mod clock;
pub mod extended;
pub mod instructions;
pub mod local;
pub mod panic;
pub mod power;
pub mod rtc;
mod tables;
mod traps;

pub use tables::load;

/// Interrupt vectors of the hypervisor. Above the exceptions and legacy ranges; the value's high nibble is the priority.
pub mod vector {
    /// This CPU's one-shot timer.
    pub const TIMER: u8 = 0xf0;
    /// Another CPU wants this one to look at its requests.
    pub const KICK: u8 = 0xf1;
    /// The APIC's spurious interrupt.
    pub const SPURIOUS: u8 = 0xff;
}

/// How many CPUs are used; more stay parked where the firmware left them.
pub const MAX_CPUS: usize = 64;
