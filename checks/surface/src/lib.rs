//! Everything that a guest can touch of its hypervisor's devices, touched at random: ports, device memory, model-specific
//! registers, CPUID, local APICs; with time passing, interrupts taken, consoles read and typed at in between.
//!
//! The devices are the hypervisor's own ([`nestling_hypervisor::devices`]), put together as its VM puts them together
//! ([`machine`]). What is done comes from a [`source::Source`]: numbers from a seed, or the bytes of a fuzzer. After each
//! step [`machine::Machine::check`] asks what must hold whatever the guest did:
//!
//! - no deadline lies in the past once time was let pass: else a vCPU would poll for ever;
//! - what an APIC offers is above its priority, and acknowledging gives just that;
//! - messages, remembered surprises and console output stay within their bounds;
//! - CPUID never offers what the guest must not have.
//!
//! What else is fed to hypervisor and command from outside has a function each in [`targets`], for a fuzzer with coverage
//! (`fuzz/`) and for the tests.
//!
//! A step that panics names itself: the same seed and number of steps do it again.
#![forbid(unsafe_code)]

pub mod machine;
pub mod source;
pub mod targets;

use machine::Machine;
use source::Source;

/// Runs `steps` steps from `source`, or as many as it has choices for; returns how many accesses there were.
///
/// # Panics
/// Where something does not hold.
pub fn run(source: &mut impl Source, steps: u64) -> u64 {
    let mut machine = Machine::new(source);
    let mut before = 0;
    for _ in 0..steps {
        if source.is_empty() {
            break;
        }
        machine.step(source);
        machine.check();
        if machine.has_ended() {
            before += machine.accesses;
            machine = Machine::new(source);
        }
    }
    before + machine.accesses
}

#[cfg(test)]
mod tests {
    use super::*;
    use source::Seeded;

    #[test]
    fn a_hundred_thousand_accesses() {
        let accesses: u64 = (0..10).map(|seed| run(&mut Seeded::new(seed), 15_000)).sum();
        assert!(accesses > 90_000, "{accesses} accesses");
    }

    #[test]
    fn the_same_seed_does_the_same() {
        assert_eq!(run(&mut Seeded::new(7), 5_000), run(&mut Seeded::new(7), 5_000));
    }

    #[test]
    fn bytes_run_dry() {
        assert!(run(&mut source::Bytes::new(&[0x5a; 300]), u64::MAX) < 300);
    }
}
