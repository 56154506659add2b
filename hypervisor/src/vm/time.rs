//! The VM's time: nanoseconds since its first entry, from the TSC, which runs at the same rate and from the same zero
//! on all CPUs.
//!
//! While a guest is held ([`super::pause`]) its time stands still, and its TSC with it: whoever holds it moves the zero of
//! both by the same number of ticks when it goes on. So nothing jumps, and what the guest was told of its clock stays
//! true. The same is done with a guest that goes on elsewhere; the rate is then that of the machine on which it
//! started, as its timers, its TSC and its clock must agree with one another before all.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{clock, instructions};
use crate::devices::Now;

const NS_PER_MS: u128 = 1_000_000;
const SHIFT: u32 = 32;

/// A clock that every CPU may read.
#[derive(Debug)]
pub struct VmClock {
    /// The TSC value at VM time 0. Changes only while no vCPU runs.
    start: AtomicU64,
    khz: u64,
    /// Nanoseconds a tick, in units of 2^-32.
    ns_per_tick: u64,
    /// Ticks a nanosecond, in units of 2^-32.
    ticks_per_ns: u64,
}

impl Clone for VmClock {
    fn clone(&self) -> Self {
        Self { start: AtomicU64::new(self.started()), ..Self::new(0, self.khz) }
    }
}

impl VmClock {
    /// A clock that starts at TSC value `start`, for a TSC of `khz`.
    #[must_use]
    pub const fn new(start: u64, khz: u64) -> Self {
        let khz = if khz == 0 { 1 } else { khz };
        Self {
            start: AtomicU64::new(start),
            khz,
            ns_per_tick: ((NS_PER_MS << SHIFT) / khz as u128) as u64,
            ticks_per_ns: (((khz as u128) << SHIFT) / NS_PER_MS) as u64,
        }
    }

    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self::new(instructions::rdtsc(), clock::tsc_khz())
    }

    /// The TSC value at VM time 0.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    /// The rate of the guest's TSC in kHz.
    #[must_use]
    pub const fn khz(&self) -> u64 {
        self.khz
    }

    /// Lets the VM's time go on from where `ticks` had passed since its zero, now. While no vCPU runs.
    pub fn go_on_from(&self, ticks: u64) {
        self.start.store(instructions::rdtsc().wrapping_sub(ticks), Ordering::Relaxed);
    }

    /// Ticks since VM time 0.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        instructions::rdtsc().wrapping_sub(self.started())
    }

    /// Nanoseconds at a TSC value.
    #[inline]
    #[must_use]
    pub fn ns(&self, tsc: u64) -> u64 {
        // The zero may lie before that of this machine's TSC.
        let ticks = (tsc.wrapping_sub(self.started()) as i64).max(0);
        ((ticks as u128 * self.ns_per_tick as u128) >> SHIFT) as u64
    }

    /// Nanoseconds in that many ticks.
    #[must_use]
    pub const fn ns_in(&self, ticks: u64) -> u64 {
        ((ticks as u128 * self.ns_per_tick as u128) >> SHIFT) as u64
    }

    /// The TSC value at which [`VmClock::ns`] reaches `ns`, to a billionth part: who waits that long looks at the clock, and
    /// may have to wait a moment more.
    #[must_use]
    pub fn tsc(&self, ns: u64) -> u64 {
        let ticks = (ns as u128 * (self.ticks_per_ns as u128 + 1)) >> SHIFT;
        let ticks = if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 };
        let deadline = i128::from(self.started() as i64) + i128::from(ticks) + 1;
        u64::try_from(deadline.max(0)).unwrap_or(u64::MAX)
    }

    /// Now; the TSC is the host's.
    #[inline]
    #[must_use]
    pub fn now(&self) -> Now {
        let tsc = instructions::rdtsc();
        Now { ns: self.ns(tsc), tsc }
    }

    /// Now; the TSC is that of a vCPU that adds `tsc_offset` to the host's.
    #[inline]
    #[must_use]
    pub fn now_for(&self, tsc_offset: u64) -> Now {
        let now = self.now();
        Now { ns: now.ns, tsc: now.tsc.wrapping_add(tsc_offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_met_to_a_billionth() {
        for khz in [800_000, 999_999, 2_695_917, 4_000_000] {
            let clock = VmClock::new(12_345, khz);
            for ns in [0, 1, 999, 1_000_000, 123_456_789_012, 1 << 50] {
                let tsc = clock.tsc(ns);
                assert!(clock.ns(tsc) + ns / 500_000_000 + 1 >= ns, "{khz} kHz: {ns} ns came too early");
                assert!(clock.ns(tsc) <= ns + 2_000 + ns / 500_000_000, "{khz} kHz: {ns} ns came late");
            }
        }
    }

    #[test]
    fn a_zero_before_the_machines_own_is_one_as_well() {
        let clock = VmClock::new(1_000u64.wrapping_sub(5_000_000), 1_000_000);
        assert_eq!(clock.ns(1_000), 5_000_000);
        assert!(clock.tsc(5_000_500).abs_diff(1_500) <= 2 && clock.tsc(10) == 0, "{}", clock.tsc(5_000_500));
    }

    #[test]
    fn far_deadlines_do_not_wrap() {
        assert_eq!(VmClock::new(1 << 60, 3_000_000).tsc(u64::MAX), u64::MAX);
        assert_eq!(VmClock::new(100, 1_000_000).ns(50), 0);
    }
}
