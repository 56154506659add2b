//! The VM's time: nanoseconds since its first entry, from the TSC, which runs at the same rate and from the same zero
//! on all CPUs.

use crate::cpu::{clock, instructions};
use crate::devices::Now;

const NS_PER_MS: u128 = 1_000_000;
const SHIFT: u32 = 32;

/// A clock that every CPU may read.
#[derive(Clone, Copy, Debug)]
pub struct VmClock {
    start: u64,
    /// Nanoseconds a tick, in units of 2^-32.
    ns_per_tick: u64,
    /// Ticks a nanosecond, in units of 2^-32.
    ticks_per_ns: u64,
}

impl VmClock {
    /// A clock that starts at TSC value `start`, for a TSC of `khz`.
    #[must_use]
    pub const fn new(start: u64, khz: u64) -> Self {
        let khz = if khz == 0 { 1 } else { khz };
        Self {
            start,
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
    pub const fn started(&self) -> u64 {
        self.start
    }

    /// Nanoseconds at a TSC value.
    #[inline]
    #[must_use]
    pub const fn ns(&self, tsc: u64) -> u64 {
        ((tsc.saturating_sub(self.start) as u128 * self.ns_per_tick as u128) >> SHIFT) as u64
    }

    /// Nanoseconds in that many ticks.
    #[must_use]
    pub const fn ns_in(&self, ticks: u64) -> u64 {
        ((ticks as u128 * self.ns_per_tick as u128) >> SHIFT) as u64
    }

    /// The TSC value at which [`VmClock::ns`] reaches `ns`, to a billionth part: who waits that long looks at the clock, and
    /// may have to wait a moment more.
    #[must_use]
    pub const fn tsc(&self, ns: u64) -> u64 {
        let ticks = (ns as u128 * (self.ticks_per_ns as u128 + 1)) >> SHIFT;
        let ticks = if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 };
        self.start.saturating_add(ticks).saturating_add(1)
    }

    /// Now; the TSC is the host's.
    #[inline]
    #[must_use]
    pub fn now(&self) -> Now {
        let tsc = instructions::rdtsc();
        Now { ns: self.ns(tsc), tsc }
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
    fn far_deadlines_do_not_wrap() {
        assert_eq!(VmClock::new(1 << 60, 3_000_000).tsc(u64::MAX), u64::MAX);
        assert_eq!(VmClock::new(100, 1_000_000).ns(50), 0);
    }
}
