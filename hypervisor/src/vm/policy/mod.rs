//! What the guest's CPU claims to be and to have: CPUID leaves, MSRs, the paravirtual clock.
//!
//! Everything is an explicit list. A CPUID bit that is not listed is 0; an MSR that is not listed raises #GP and is
//! reported once. So a new host CPU never adds anything to a guest by itself.

pub mod cpuid;
pub mod kvmclock;
pub mod msr;
pub mod msr_list;
pub mod mtrr;
