//! ACPI fixed hardware: the PM1a event and control registers and the power management timer.
//!
//! Layout (ACPI 6.5, 4.8.3): status and enable (16 bits each) at offset 0, control (16 bits) at 4, the timer (32 bits) at
//! 8. The machine starts in ACPI mode (SCI_EN reads 1, there is no SMI command port), so the guest has nothing to switch.
//! The interrupt, [`Pm::sci`], is a level: any status bit whose enable bit is set.
//!
//! Writing SLP_EN with a sleep type that the DSDT names, by `\_S5` or `\_S3`, is for the caller to carry out. Other sleep
//! types are not offered and do nothing. Out of S3 a machine is woken by the clock's alarm, if its enable bit is set, or by
//! the power button; the status bits say by which ([`Pm::wake`]).

use serde::{Deserialize, Serialize};

use super::saved::{BadState, require};
use super::{Width, ns_to_ticks, ticks_to_ns_ceil};

/// First port of the register block.
pub const PM_BASE: u16 = 0x600;
/// Ports in the block.
pub const PM_LENGTH: u16 = 12;
/// Offset of PM1a_EVT, 4 ports.
pub const PM_EVENT: u16 = 0;
/// Offset of PM1a_CNT, 2 ports.
pub const PM_CONTROL: u16 = 4;
/// Offset of PM_TMR, 4 ports.
pub const PM_TIMER: u16 = 8;
/// Rate of PM_TMR, ACPI 4.8.2.1.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// SLP_TYP of soft-off, which `\_S5` gives to the guest.
pub const SLEEP_TYPE_S5: u8 = 5;
/// SLP_TYP of suspend to RAM, which `\_S3` gives to the guest where it is offered.
pub const SLEEP_TYPE_S3: u8 = 1;

const STATUS_TIMER: u16 = 1 << 0;
const STATUS_POWER_BUTTON: u16 = 1 << 8;
const STATUS_ALARM: u16 = 1 << 10;
const STATUS_WAKE: u16 = 1 << 15;
const ENABLE_MASK: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
const CONTROL_SCI_EN: u16 = 1 << 0;
const CONTROL_SLP_EN: u16 = 1 << 13;
/// BM_RLD and SLP_TYP; GBL_RLS and SLP_EN are write-only.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << 10;

/// The register block.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Pm {
    status: u16,
    enable: u16,
    control: u16,
    /// How often the top bit of the timer had changed when that was last looked at.
    carries_seen: u64,
}

/// What a write asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PmRequest {
    /// Nothing beyond the registers.
    None,
    /// Soft-off.
    PowerOff,
    /// Suspend to RAM.
    Suspend,
}

impl Pm {
    /// The block after power-on.
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses what no such block was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("power management", "time", self.carries_seen < 1 << 32)?;
        require("power management", "registers", self.enable & !ENABLE_MASK == 0 && self.control & !CONTROL_KEPT == 0)
    }

    /// Brings the timer's status bit up to date.
    pub fn poll(&mut self, now_ns: u64) {
        let carries = ns_to_ticks(now_ns, PM_TIMER_HZ) >> 31;
        if carries > self.carries_seen {
            self.carries_seen = carries;
            self.status |= STATUS_TIMER;
        }
    }

    /// When the timer's top bit changes next; only asked for while that raises an interrupt.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        if self.enable & STATUS_TIMER == 0 || self.status & STATUS_TIMER != 0 {
            return None;
        }
        Some(ticks_to_ns_ceil((self.carries_seen + 1) << 31, PM_TIMER_HZ))
    }

    /// The level of the system control interrupt.
    pub fn sci(&self) -> bool {
        self.status & self.enable != 0
    }

    /// Whether a machine that sleeps is to wake, where the clock's alarm goes off or does not.
    pub fn wakes(&self, alarm: bool) -> bool {
        alarm && self.enable & STATUS_ALARM != 0 || self.status & STATUS_POWER_BUTTON != 0
    }

    /// It wakes: the status says so, and whether it was by the alarm.
    pub fn wake(&mut self, alarm: bool) {
        self.status |= STATUS_WAKE | if alarm { STATUS_ALARM } else { 0 };
    }

    /// The operator presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= STATUS_POWER_BUTTON;
    }

    /// Reads `width` at `offset` (below [`PM_LENGTH`]) from [`PM_BASE`]. Bytes outside a register read as ones.
    pub fn read(&mut self, now_ns: u64, offset: u16, width: Width) -> u32 {
        self.poll(now_ns);
        let timer = (ns_to_ticks(now_ns, PM_TIMER_HZ) as u32).to_le_bytes();
        let [status, enable, control] = [self.status, self.enable, self.control | CONTROL_SCI_EN].map(u16::to_le_bytes);
        (0..width.bytes()).fold(0, |value, lane| {
            let at = offset.wrapping_add(lane);
            let byte = match at {
                0..2 => status[usize::from(at)],
                2..4 => enable[usize::from(at - 2)],
                PM_CONTROL..6 => control[usize::from(at - PM_CONTROL)],
                PM_TIMER..PM_LENGTH => timer[usize::from(at - PM_TIMER)],
                _ => 0xff,
            };
            value | u32::from(byte) << (8 * lane)
        })
    }

    /// Writes `width` at `offset` from [`PM_BASE`].
    pub fn write(&mut self, now_ns: u64, offset: u16, width: Width, value: u32) -> PmRequest {
        self.poll(now_ns);
        let mut sleep = false;
        for lane in 0..width.bytes() {
            let byte = (value >> (8 * lane)) as u8;
            let at = offset.wrapping_add(lane);
            let shifted = |low: u16| u16::from(byte) << (8 * (at - low));
            let kept = |register: u16, low: u16| register & !(0xff << (8 * (at - low)));
            match at {
                // Status bits are cleared by writing ones.
                0..2 => self.status &= !shifted(0),
                2..4 => self.enable = (kept(self.enable, 2) | shifted(2)) & ENABLE_MASK,
                PM_CONTROL..6 => {
                    let written = shifted(PM_CONTROL);
                    self.control = (kept(self.control, PM_CONTROL) | written) & CONTROL_KEPT;
                    sleep |= written & CONTROL_SLP_EN != 0;
                }
                _ => {}
            }
        }
        match (self.control >> 10 & 7) as u8 {
            SLEEP_TYPE_S5 if sleep => PmRequest::PowerOff,
            SLEEP_TYPE_S3 if sleep => PmRequest::Suspend,
            _ => PmRequest::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    #[test]
    fn soft_off_needs_type_and_enable() {
        let mut pm = Pm::new();
        let off = u32::from(SLEEP_TYPE_S5) << 10;
        assert_eq!(pm.read(0, PM_CONTROL, Width::Word), 1, "ACPI mode from the start");
        // ACPICA writes the type first, then the type with SLP_EN.
        assert_eq!(pm.write(0, PM_CONTROL, Width::Word, off), PmRequest::None);
        assert_eq!(pm.write(0, PM_CONTROL, Width::Word, 1 << 13), PmRequest::None, "type 0 is not offered");
        assert_eq!(pm.write(0, PM_CONTROL, Width::Word, off | 1 << 13), PmRequest::PowerOff);
        assert_eq!(pm.write(0, PM_CONTROL + 1, Width::Byte, (off | 1 << 13) >> 8), PmRequest::PowerOff);
        assert_eq!(pm.read(0, PM_CONTROL, Width::Word), off | 1, "SLP_EN reads 0");
    }

    #[test]
    fn timer_counts_and_carries() {
        let mut pm = Pm::new();
        assert_eq!(pm.read(1_000_000_000, PM_TIMER, Width::Dword), PM_TIMER_HZ as u32);
        assert_eq!(pm.next_deadline_ns(), None);
        pm.write(0, 2, Width::Word, 1);
        let carry = pm.next_deadline_ns().expect("the timer interrupt is enabled");
        pm.poll(carry - 1);
        assert!(!pm.sci());
        pm.poll(carry);
        assert!(pm.sci());
        assert_eq!(pm.read(carry, PM_TIMER, Width::Dword), 1 << 31);
        pm.write(carry, PM_EVENT, Width::Word, 1);
        assert!(!pm.sci());
        assert!(pm.next_deadline_ns() > Some(carry));
    }

    #[test]
    fn power_button_raises_sci_once_enabled_and_is_cleared_by_a_one() {
        let mut pm = Pm::new();
        pm.press_power_button();
        assert!(!pm.sci());
        pm.write(0, 2, Width::Word, 1 << 8);
        assert!(pm.sci());
        assert_eq!(pm.read(0, PM_EVENT, Width::Dword), 0x0100_0100);
        pm.write(0, PM_EVENT, Width::Word, 1 << 8);
        assert!(!pm.sci());
    }

    #[test]
    fn sleep_and_what_ends_it() {
        let mut pm = Pm::new();
        let suspend = u32::from(SLEEP_TYPE_S3) << 10 | 1 << 13;
        assert_eq!(pm.write(0, PM_CONTROL, Width::Word, suspend), PmRequest::Suspend);
        assert!(!pm.wakes(true) && !pm.wakes(false), "the alarm is not enabled");
        pm.write(0, 2, Width::Word, 1 << 10);
        assert!(pm.wakes(true) && !pm.wakes(false));
        pm.wake(true);
        assert_eq!(pm.read(0, PM_EVENT, Width::Word), 1 << 15 | 1 << 10);
        assert!(pm.sci(), "the alarm is an event like others");
        pm.write(0, PM_EVENT, Width::Word, 1 << 15 | 1 << 10);
        assert!(!pm.sci());
        pm.press_power_button();
        assert!(pm.wakes(false));
        pm.wake(false);
        assert_eq!(pm.read(0, PM_EVENT, Width::Word), 1 << 15 | 1 << 8);
    }

    #[test]
    fn random_access_never_panics() {
        let mut random = Random::new(5);
        let mut pm = Pm::new();
        for _ in 0..200_000 {
            let now = random.next() >> random.below(64);
            let width = [Width::Byte, Width::Word, Width::Dword][random.below(3) as usize];
            let offset = random.next() as u16;
            let offset = if random.below(8) == 0 { offset } else { offset % PM_LENGTH };
            if random.below(2) == 0 {
                assert_eq!(pm.read(now, offset, width) & !width.mask(), 0);
            } else {
                pm.write(now, offset, width, random.next() as u32);
            }
        }
    }
}
