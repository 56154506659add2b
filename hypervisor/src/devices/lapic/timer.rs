//! The timer of a local APIC.
//!
//! In one-shot and periodic mode it counts nanoseconds: the clock that feeds the divider runs at 1 GHz, which is also what
//! the guest is told. In TSC-deadline mode it compares with the guest's TSC. Periods that were missed are one expiry.

use serde::{Deserialize, Serialize};

use crate::devices::saved::{BadState, require};
use crate::devices::{Now, ticks_to_ns_ceil};

/// The shortest period that a periodic timer keeps: a guest that asks for less gets this, so that it can't hold its host
/// CPU in timer interrupts.
const MIN_PERIOD_NS: u64 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl TimerMode {
    pub(super) const fn from_lvt(entry: u32) -> Self {
        match entry >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Timer {
    tsc_khz: u64,
    initial: u32,
    divide: u32,
    /// One-shot and periodic: when the count reaches 0.
    expires_ns: Option<u64>,
    /// TSC-deadline: 0 is disarmed.
    deadline_tsc: u64,
}

impl Timer {
    pub(super) fn new(tsc_khz: u64) -> Self {
        Self { tsc_khz: tsc_khz.max(1), initial: 0, divide: 0, expires_ns: None, deadline_tsc: 0 }
    }

    pub(super) fn check(&self, tsc_khz: u64) -> Result<(), BadState> {
        require("local APIC", "timer rate", self.tsc_khz == tsc_khz.max(1))
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.tsc_khz);
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide_register(&self) -> u32 {
        self.divide
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        self.deadline_tsc
    }

    pub(super) fn arm_tsc(&mut self, deadline: u64) {
        self.deadline_tsc = deadline;
    }

    /// Disarms whatever is armed.
    pub(super) fn stop(&mut self) {
        self.initial = 0;
        self.expires_ns = None;
        self.deadline_tsc = 0;
    }

    /// Writes the initial count, which starts the timer, or stops it when 0. Ignored in TSC-deadline mode.
    pub(super) fn start(&mut self, now: Now, count: u32, mode: TimerMode) {
        if mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.expires_ns = (count != 0).then(|| now.ns.saturating_add(self.period_ns(mode)));
    }

    /// Writes the divider; what is left of the count goes on at the new rate.
    pub(super) fn set_divide(&mut self, now: Now, register: u32, mode: TimerMode) {
        let left = self.current(now, mode);
        self.divide = register;
        if self.expires_ns.is_some() {
            self.expires_ns = Some(now.ns.saturating_add(u64::from(left) * self.divisor()));
        }
    }

    /// The current count.
    pub(super) fn current(&self, now: Now, mode: TimerMode) -> u32 {
        if mode == TimerMode::TscDeadline {
            return 0;
        }
        let left = self.expires_ns.map_or(0, |at| at.saturating_sub(now.ns)).div_ceil(self.divisor());
        u32::try_from(left).unwrap_or(u32::MAX).min(self.initial)
    }

    /// Whether the timer has expired; it is then disarmed, or started over in periodic mode.
    pub(super) fn expire(&mut self, now: Now, mode: TimerMode) -> bool {
        if mode == TimerMode::TscDeadline {
            let expired = self.deadline_tsc != 0 && now.tsc >= self.deadline_tsc;
            if expired {
                self.deadline_tsc = 0;
            }
            return expired;
        }
        let Some(at) = self.expires_ns.filter(|at| now.ns >= *at) else { return false };
        self.expires_ns = (mode == TimerMode::Periodic).then(|| {
            let period = self.period_ns(mode);
            at.saturating_add(((now.ns - at) / period + 1).saturating_mul(period))
        });
        true
    }

    /// When the timer expires, in VM nanoseconds.
    pub(super) fn deadline_ns(&self, now: Now, mode: TimerMode) -> Option<u64> {
        match mode {
            TimerMode::TscDeadline if self.deadline_tsc == 0 => None,
            TimerMode::TscDeadline => {
                let ticks = self.deadline_tsc.saturating_sub(now.tsc);
                Some(now.ns.saturating_add(ticks_to_ns_ceil(ticks, self.tsc_khz.saturating_mul(1000))))
            }
            _ => self.expires_ns,
        }
    }

    /// Divide configuration, bits 3, 1 and 0: 2, 4, 8 … 128, and 1 for all ones.
    fn divisor(&self) -> u64 {
        let bits = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((bits + 1) & 7)
    }

    fn period_ns(&self, mode: TimerMode) -> u64 {
        let period = u64::from(self.initial) * self.divisor();
        if mode == TimerMode::Periodic { period.max(MIN_PERIOD_NS) } else { period }
    }
}
