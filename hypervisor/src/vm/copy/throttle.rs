//! Keeping a guest from running for a part of its time, so that it writes less than is copied.
//!
//! Time is cut into turns of [`TURN_US`]; at the start of each the vCPUs stand still for as many percent of it as the
//! throttle says, and run for the rest. Whoever copies looks at the clock between two messages and while it waits for room,
//! so that however slow the other side is, no vCPU stands still for longer than its part of a turn and the making of one
//! message.

use super::send::{Copy, Stop};
use crate::cpu::{clock, instructions};

/// One turn, in microseconds.
const TURN_US: u64 = 100_000;

/// How much a guest is kept from running.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    percent: u8,
    /// The TSC when it was set.
    since: u64,
    /// The vCPUs stand still because of it.
    holds: bool,
}

/// Whether vCPUs stand still so many microseconds after the start of a throttle of `percent`.
const fn stands_still(percent: u8, us: u64) -> bool {
    us % TURN_US < TURN_US / 100 * percent as u64
}

impl Copy<'_> {
    /// Keeps the guest from running for `percent` of the time from now on; 0 lets it run.
    pub(super) fn set_throttle(&mut self, percent: u8) -> Result<(), Stop> {
        self.throttle = Throttle { percent, since: instructions::rdtsc(), holds: self.throttle.holds };
        self.take_turn()
    }

    /// To be called often: lets the vCPUs stand still or run, as it is their turn.
    pub(super) fn take_turn(&mut self) -> Result<(), Stop> {
        if self.throttle.percent == 0 && !self.throttle.holds {
            return Ok(());
        }
        let us = clock::us_from_tsc(instructions::rdtsc() - self.throttle.since);
        match (stands_still(self.throttle.percent, us), self.throttle.holds) {
            (true, false) => {
                self.throttle.holds = true;
                self.stop_vcpus()?;
            }
            (false, true) => {
                self.throttle.holds = false;
                self.start_vcpus();
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_stands_still_for_its_part_of_every_turn_and_no_longer() {
        for percent in (0..=100).step_by(10) {
            let (mut total, mut run, mut longest) = (0, 0, 0);
            for us in (0..10 * TURN_US).step_by(1000) {
                run = if stands_still(percent, us) { run + 1000 } else { 0 };
                total += if run > 0 { 1000 } else { 0 };
                longest = longest.max(run);
            }
            assert_eq!(total, 10 * TURN_US * u64::from(percent) / 100, "{percent}");
            assert!(percent == 100 || longest == TURN_US * u64::from(percent) / 100, "{percent}: {longest}");
        }
    }
}
