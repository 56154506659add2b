//! The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.
//!
//! The clock is not stepped either: the date is computed from the wall clock at the VM's start plus the VM's time. A guest
//! that sets the date changes an offset. While register B's SET bit is 1 the ten time registers hold still, and what was
//! written to them becomes the date when the bit is cleared.
//!
//! Register A's UIP bit is 1 for the last 244 µs of each second, so that a guest which saw it 0 has that long to read a
//! consistent date.
//!
//! Three things set flags in register C: the end of each second's update, the alarm, and the periodic rate of register A.
//! A flag whose enable bit in register B is 1 raises the interrupt, [`Cmos::interrupt`], until register C is read, which
//! clears them all. So a source that is not served has no further deadline, and a guest that asks for 8192 interrupts a
//! second gets no more than it takes.

use serde::{Deserialize, Serialize};

mod date;

use super::saved::{BadState, LATEST_NS, bytes, require};
use super::{NS_PER_S, ns_to_ticks, ticks_to_ns_ceil};
use date::{Date, MAX_SECONDS};

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;

const A_UIP: u8 = 0x80;
/// 32.768 kHz crystal, periodic rate 1024 Hz.
const A_RESET: u8 = 0x26;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 0x80;
/// Periodic, alarm and update-ended: the same bits enable in B and flag in C.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATED: u8 = 0x10;
const SOURCES: u8 = PERIODIC | ALARM | UPDATED;
/// C: an enabled source has its flag set.
const C_IRQ: u8 = 0x80;
/// An alarm register with both top bits set matches everything.
const ALARM_ANY: u8 = 0xc0;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
/// The battery is good.
const D_VALID: u8 = 0x80;

/// In 12-hour mode, bit 7 of the hours says p.m.
const HOURS_PM: u8 = 0x80;

const UPDATE_NS: u64 = 244_000;

/// The clock and its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cmos {
    index: u8,
    /// Unix time at VM time 0, as the guest has it.
    epoch_s: i64,
    reg_a: u8,
    reg_b: u8,
    /// The date that the registers hold while SET is 1.
    held: Option<Date>,
    /// Flags of register C.
    flags: u8,
    /// The last second, of the VM's time, whose end has been looked at.
    seconds_seen: u64,
    /// How many periods of the periodic rate have been looked at, since the VM's start.
    periods_seen: u64,
    #[serde(with = "bytes")]
    memory: [u8; 128],
}

impl Cmos {
    /// A clock that shows `wall_clock_s` (Unix seconds, UTC) when the VM starts.
    pub fn new(wall_clock_s: u64) -> Self {
        Self {
            index: 0,
            epoch_s: i64::try_from(wall_clock_s).unwrap_or(MAX_SECONDS).min(MAX_SECONDS),
            reg_a: A_RESET,
            reg_b: B_24H,
            held: None,
            flags: 0,
            seconds_seen: 0,
            periods_seen: 0,
            memory: [0; 128],
        }
    }

    /// Refuses what no clock was ever in.
    ///
    /// # Errors
    /// What is impossible.
    pub fn check(&self) -> Result<(), BadState> {
        require("clock", "index", usize::from(self.index) < self.memory.len())?;
        // Dates before 1970 come of a guest that sets its clock back after a long run.
        require("clock", "epoch", self.epoch_s.unsigned_abs() <= MAX_SECONDS.unsigned_abs())?;
        let soon = self.seconds_seen <= LATEST_NS / NS_PER_S && self.periods_seen <= LATEST_NS;
        require("clock", "time", soon)
    }

    /// The guest has slept while that many seconds went by outside: its date goes on with them.
    pub fn catch_up(&mut self, seconds: u64) {
        if self.held.is_none() {
            self.epoch_s = self.epoch_s.saturating_add_unsigned(seconds).min(MAX_SECONDS);
        }
    }

    /// Writes the index, port 0x70. Bit 7 masks NMIs on a PC; this machine has no source of them.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Lets time pass: sets the flags of what has happened.
    pub fn poll(&mut self, now_ns: u64) {
        let seconds = now_ns / NS_PER_S;
        if seconds > self.seconds_seen {
            if self.held.is_none() {
                self.flags |= UPDATED;
                if self.seconds_to_alarm().is_some_and(|ahead| self.seconds_seen + ahead <= seconds) {
                    self.flags |= ALARM;
                }
            }
            self.seconds_seen = seconds;
        }
        if let Some(hz) = self.periodic_hz() {
            let periods = ns_to_ticks(now_ns, hz);
            if periods > self.periods_seen {
                self.flags |= PERIODIC;
                self.periods_seen = periods;
            }
        }
    }

    /// When [`Self::poll`] would raise the interrupt next, in VM nanoseconds.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let awaited = self.reg_b & SOURCES & !self.flags;
        let second = |ahead: u64| (self.seconds_seen + ahead).saturating_mul(NS_PER_S);
        let running = self.held.is_none();
        let updated = (awaited & UPDATED != 0 && running).then(|| second(1));
        let alarm = if awaited & ALARM != 0 && running { self.seconds_to_alarm().map(second) } else { None };
        let periodic = if awaited & PERIODIC != 0 { self.periodic_hz() } else { None };
        let periodic = periodic.map(|hz| ticks_to_ns_ceil(self.periods_seen + 1, hz));
        [updated, alarm, periodic].into_iter().flatten().min()
    }

    /// Whether the alarm has gone off, and was not served yet.
    pub fn alarm(&self) -> bool {
        self.flags & self.reg_b & ALARM != 0
    }

    /// The level of the interrupt pin, IRQ 8.
    pub fn interrupt(&self) -> bool {
        self.flags & self.reg_b & SOURCES != 0
    }

    /// Reads the selected register, port 0x71.
    pub fn read(&mut self, now_ns: u64) -> u8 {
        self.poll(now_ns);
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                self.encode(self.index, self.held.unwrap_or_else(|| self.date(now_ns)))
            }
            REG_A => self.reg_a | if self.updating(now_ns) { A_UIP } else { 0 },
            REG_B => self.reg_b,
            REG_C => {
                let irq = if self.interrupt() { C_IRQ } else { 0 };
                core::mem::take(&mut self.flags) | irq
            }
            REG_D => D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    /// Writes the selected register, port 0x71.
    pub fn write(&mut self, now_ns: u64, value: u8) {
        self.poll(now_ns);
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let mut date = self.held.unwrap_or_else(|| self.date(now_ns));
                self.decode(self.index, value, &mut date);
                match &mut self.held {
                    Some(held) => *held = date,
                    None => self.set_date(now_ns, date),
                }
            }
            REG_A => {
                self.reg_a = value & !A_UIP;
                self.periods_seen = self.periodic_hz().map_or(0, |hz| ns_to_ticks(now_ns, hz));
            }
            REG_B => {
                // The encoding bits decide how the registers read, so they change before the date is held or let go.
                // Holding the date turns the update interrupt off.
                self.reg_b = if value & B_SET != 0 { value & !UPDATED } else { value };
                match (value & B_SET != 0, self.held) {
                    (true, None) => self.held = Some(self.date(now_ns)),
                    (false, Some(date)) => {
                        self.held = None;
                        self.set_date(now_ns, date);
                    }
                    _ => {}
                }
            }
            REG_C | REG_D => {}
            index => self.memory[usize::from(index)] = value,
        }
    }

    /// Periodic rate; the two fastest settings repeat slower ones when the crystal is the usual one.
    fn periodic_hz(&self) -> Option<u64> {
        match self.reg_a & A_RATE {
            0 => None,
            rate @ 1..=2 => Some(256 >> (rate - 1)),
            rate => Some(32_768 >> (rate - 1)),
        }
    }

    /// How many seconds after [`Self::seconds_seen`] the alarm goes off, 1 to a day; `None` if its registers hold what no
    /// time of day can match.
    fn seconds_to_alarm(&self) -> Option<u64> {
        let matches = |register: u8, alarm: u8, value: u8| {
            let wanted = self.memory[usize::from(alarm)];
            let date = Date { hour: value, minute: value, second: value, ..Date::from_unix(0) };
            wanted >= ALARM_ANY || wanted == self.encode(register, date)
        };
        let second = |value| matches(SECONDS, SECONDS_ALARM, value);
        let minute = |value| matches(MINUTES, MINUTES_ALARM, value);
        let hour = |value| matches(HOURS, HOURS_ALARM, value);
        let first_second = (0..60).find(|value| second(*value))?;
        let first_minute = (0..60).find(|value| minute(*value))?;
        let now = Date::from_unix(self.epoch_s.saturating_add_unsigned(self.seconds_seen));
        let since_midnight =
            |hour: u8, minute: u8, second: u8| u64::from(hour) * 3600 + u64::from(minute) * 60 + u64::from(second);
        let from = since_midnight(now.hour, now.minute, now.second);
        // In this minute, else in this hour, else in a later one: the first that matches.
        let soon = |(h, m, s): (u8, u8, u8)| since_midnight(h, m, s) - from;
        if hour(now.hour) {
            if minute(now.minute)
                && let Some(at) = (now.second + 1..60).find(|value| second(*value))
            {
                return Some(soon((now.hour, now.minute, at)));
            }
            if let Some(at) = (now.minute + 1..60).find(|value| minute(*value)) {
                return Some(soon((now.hour, at, first_second)));
            }
        }
        (1..=24).find_map(|ahead| {
            let at = (now.hour + ahead) % 24;
            let day = if now.hour + ahead >= 24 { 86_400 } else { 0 };
            hour(at).then(|| since_midnight(at, first_minute, first_second) + day - from)
        })
    }

    fn date(&self, now_ns: u64) -> Date {
        Date::from_unix(self.epoch_s.saturating_add((now_ns / NS_PER_S) as i64))
    }

    fn set_date(&mut self, now_ns: u64, date: Date) {
        self.epoch_s = date.to_unix().saturating_sub((now_ns / NS_PER_S) as i64);
    }

    fn updating(&self, now_ns: u64) -> bool {
        self.held.is_none() && now_ns % NS_PER_S >= NS_PER_S - UPDATE_NS
    }

    fn pack(&self, value: u8) -> u8 {
        if self.reg_b & B_BINARY != 0 { value } else { (value / 10 % 10) * 16 + value % 10 }
    }

    fn unpack(&self, value: u8) -> u8 {
        if self.reg_b & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode(&self, register: u8, date: Date) -> u8 {
        match register {
            SECONDS => self.pack(date.second),
            MINUTES => self.pack(date.minute),
            HOURS if self.reg_b & B_24H != 0 => self.pack(date.hour),
            HOURS => {
                let twelve = if date.hour.is_multiple_of(12) { 12 } else { date.hour % 12 };
                self.pack(twelve) | if date.hour >= 12 { HOURS_PM } else { 0 }
            }
            WEEKDAY => self.pack(date.weekday),
            DAY => self.pack(date.day),
            MONTH => self.pack(date.month),
            YEAR => self.pack((date.year % 100) as u8),
            _ => self.pack((date.year / 100) as u8),
        }
    }

    fn decode(&self, register: u8, value: u8, date: &mut Date) {
        match register {
            SECONDS => date.second = self.unpack(value),
            MINUTES => date.minute = self.unpack(value),
            HOURS if self.reg_b & B_24H != 0 => date.hour = self.unpack(value),
            HOURS => date.hour = self.unpack(value & !HOURS_PM) % 12 + if value & HOURS_PM != 0 { 12 } else { 0 },
            WEEKDAY => date.weekday = self.unpack(value),
            DAY => date.day = self.unpack(value),
            MONTH => date.month = self.unpack(value),
            YEAR => date.year = date.year / 100 * 100 + u16::from(self.unpack(value) % 100),
            _ => date.year = u16::from(self.unpack(value) % 100) * 100 + date.year % 100,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Random;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP: u64 = 1_709_251_198;

    fn get(cmos: &mut Cmos, now: u64, register: u8) -> u8 {
        cmos.select(register);
        cmos.read(now)
    }

    fn put(cmos: &mut Cmos, now: u64, register: u8, value: u8) {
        cmos.select(register);
        cmos.write(now, value);
    }

    fn all(cmos: &mut Cmos, now: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|register| get(cmos, now, register))
    }

    #[test]
    fn reads_the_date_in_bcd_and_rolls_over() {
        let mut cmos = Cmos::new(LEAP);
        assert_eq!(all(&mut cmos, 0), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(all(&mut cmos, 2 * NS_PER_S), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn binary_and_twelve_hours() {
        let mut cmos = Cmos::new(LEAP);
        put(&mut cmos, 0, REG_B, B_BINARY);
        assert_eq!(all(&mut cmos, 0), [20, 24, 2, 29, 5, 11 | HOURS_PM, 59, 58]);
        assert_eq!(get(&mut cmos, 2 * NS_PER_S, HOURS), 12, "midnight is 12 a.m.");
    }

    #[test]
    fn update_in_progress_just_before_the_second() {
        let mut cmos = Cmos::new(LEAP);
        assert_eq!(get(&mut cmos, 0, REG_A) & A_UIP, 0);
        assert_eq!(get(&mut cmos, NS_PER_S - UPDATE_NS - 1, REG_A) & A_UIP, 0);
        assert_eq!(get(&mut cmos, NS_PER_S - UPDATE_NS, REG_A) & A_UIP, A_UIP);
        assert_eq!(get(&mut cmos, NS_PER_S - 1, SECONDS), 0x58);
        assert_eq!(get(&mut cmos, NS_PER_S, REG_A) & A_UIP, 0);
    }

    #[test]
    fn set_holds_and_commits() {
        let mut cmos = Cmos::new(LEAP);
        put(&mut cmos, 0, REG_B, B_SET | B_24H);
        assert_eq!(get(&mut cmos, 10 * NS_PER_S, SECONDS), 0x58, "held");
        assert_eq!(get(&mut cmos, NS_PER_S - 1, REG_A) & A_UIP, 0);
        for (register, value) in
            [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
        {
            put(&mut cmos, 10 * NS_PER_S, register, value);
        }
        put(&mut cmos, 10 * NS_PER_S, REG_B, B_24H);
        assert_eq!(all(&mut cmos, 11 * NS_PER_S), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    }

    #[test]
    fn update_interrupt_once_a_second_until_served() {
        let mut cmos = Cmos::new(LEAP);
        assert_eq!(cmos.next_deadline_ns(), None);
        put(&mut cmos, 100, REG_B, B_24H | UPDATED);
        assert_eq!(cmos.next_deadline_ns(), Some(NS_PER_S));
        cmos.poll(NS_PER_S - 1);
        assert!(!cmos.interrupt());
        cmos.poll(NS_PER_S);
        assert!(cmos.interrupt());
        assert_eq!(cmos.next_deadline_ns(), None, "nothing new to say until it is served");
        assert_eq!(get(&mut cmos, NS_PER_S, REG_C), C_IRQ | UPDATED | PERIODIC);
        assert!(!cmos.interrupt());
        assert_eq!(get(&mut cmos, NS_PER_S, REG_C), 0);
        assert_eq!(cmos.next_deadline_ns(), Some(2 * NS_PER_S));
        put(&mut cmos, NS_PER_S, REG_B, B_24H | B_SET | UPDATED);
        assert_eq!(cmos.next_deadline_ns(), None, "no updates while the date is held");
    }

    #[test]
    fn periodic_interrupt_has_the_rate_of_register_a() {
        let mut cmos = Cmos::new(LEAP);
        for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
            put(&mut cmos, 0, REG_A, 0x20 | rate);
            put(&mut cmos, 0, REG_B, B_24H | PERIODIC);
            let period = ticks_to_ns_ceil(1, hz);
            assert_eq!(cmos.next_deadline_ns(), Some(period), "rate {rate}");
        }
        put(&mut cmos, 0, REG_A, 0x20);
        assert_eq!(cmos.next_deadline_ns(), None);
    }

    /// The alarm against a search of each second of two days, in both encodings.
    #[test]
    fn alarm_goes_off_at_the_first_match() {
        let mut random = Random::new(11);
        for round in 0..40 {
            let mut cmos = Cmos::new(LEAP + random.below(86_400));
            let mode = [B_24H, B_24H | B_BINARY, B_BINARY, 0][round % 4];
            put(&mut cmos, 0, REG_B, mode | ALARM);
            for (alarm, register) in [(SECONDS_ALARM, SECONDS), (MINUTES_ALARM, MINUTES), (HOURS_ALARM, HOURS)] {
                let value =
                    if random.below(3) == 0 { 0xff } else { get(&mut cmos, random.below(86_400) * NS_PER_S, register) };
                cmos.memory[usize::from(alarm)] = value;
            }
            cmos.flags = 0;
            cmos.seconds_seen = 0;
            let wanted = [(SECONDS_ALARM, SECONDS), (MINUTES_ALARM, MINUTES), (HOURS_ALARM, HOURS)];
            let first = (1..=86_400).find(|second| {
                let date = cmos.date(second * NS_PER_S);
                wanted.iter().all(|(alarm, register)| {
                    let value = cmos.memory[usize::from(*alarm)];
                    value >= ALARM_ANY || value == cmos.encode(*register, date)
                })
            });
            assert_eq!(cmos.next_deadline_ns(), first.map(|second| second * NS_PER_S), "{:x?}", &cmos.memory[..6]);
            let at = cmos.next_deadline_ns().expect("these alarms match");
            cmos.poll(at - 1);
            assert!(!cmos.interrupt());
            cmos.poll(at);
            assert!(cmos.interrupt());
        }
    }

    #[test]
    fn an_alarm_that_nothing_matches_never_wakes() {
        let mut cmos = Cmos::new(LEAP);
        put(&mut cmos, 0, REG_B, B_24H | ALARM);
        for (alarm, value) in [(SECONDS_ALARM, 0x61), (MINUTES_ALARM, 0x60), (HOURS_ALARM, 0x24)] {
            for other in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
                put(&mut cmos, 0, other, 0xff);
            }
            put(&mut cmos, 0, alarm, value);
            assert_eq!(cmos.next_deadline_ns(), None);
        }
    }

    #[test]
    fn battery_is_good_and_memory_keeps() {
        let mut cmos = Cmos::new(0);
        assert_eq!(get(&mut cmos, 0, REG_D), D_VALID);
        put(&mut cmos, 0, 0x0f, 0x0a);
        assert_eq!(get(&mut cmos, 0, 0x0f), 0x0a);
        put(&mut cmos, 0, REG_D, 0);
        assert_eq!(get(&mut cmos, 0, REG_D), D_VALID);
    }

    #[test]
    fn random_access_never_panics() {
        let mut random = Random::new(4);
        let mut cmos = Cmos::new(u64::MAX);
        let mut now = 0u64;
        for step in 0..60_000u64 {
            now = now.saturating_add(if step == 59_000 { u64::MAX } else { random.of_any_length(45) });
            cmos.poll(now);
            assert!(now == u64::MAX || cmos.next_deadline_ns().is_none_or(|deadline| deadline > now));
            match random.below(3) {
                0 => cmos.select(random.byte() & if random.below(2) == 0 { 0x0f } else { 0xff }),
                1 => cmos.write(now, random.byte()),
                _ => _ = cmos.read(now),
            }
        }
    }
}
