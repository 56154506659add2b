//! The MC146818 real-time clock and its CMOS memory, ports 0x70 and 0x71.
//!
//! The clock is not stepped either: the date is computed from the wall clock at the VM's start plus the VM's time. A guest
//! that sets the date changes an offset. While register B's SET bit is 1 the ten time registers hold still, and what was
//! written to them becomes the date when the bit is cleared.
//!
//! Register A's UIP bit is 1 for the last 244 µs of each second, so that a guest which saw it 0 has that long to read a
//! consistent date. The periodic, alarm and update interrupts (IRQ 8) are not wired: register C reads 0 and a driver falls
//! back to polling.

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
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
/// 32.768 kHz crystal, no periodic rate.
const A_RESET: u8 = 0x20;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
/// The battery is good.
const D_VALID: u8 = 0x80;

/// In 12-hour mode, bit 7 of the hours says p.m.
const HOURS_PM: u8 = 0x80;

const NS_PER_S: u64 = 1_000_000_000;
const UPDATE_NS: u64 = 244_000;

/// Year 1970 to 9999: outside, the date is clamped. Two-digit years and one century byte can't say more.
const MAX_SECONDS: i64 = 253_402_300_799;

/// A date in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: u16,
    month: u8,
    day: u8,
    /// 1 = Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(0, MAX_SECONDS);
        let (days, in_day) = (seconds / 86_400, seconds % 86_400);
        // Count years from March, so that the leap day is the last of the year; eras of 400 years repeat exactly.
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year: year as u16,
            month: month as u8,
            day: day as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (in_day / 3600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }

    /// Fields out of range count for what they say; the result is a date all the same.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// The clock and its memory.
#[derive(Clone, Debug)]
pub struct Cmos {
    index: u8,
    /// Unix time at VM time 0, as the guest has it.
    epoch_s: i64,
    reg_a: u8,
    reg_b: u8,
    /// The date that the registers hold while SET is 1.
    held: Option<Date>,
    memory: [u8; 128],
}

impl Cmos {
    /// A clock that shows `wall_clock_s` (Unix seconds, UTC) when the VM starts.
    pub fn new(wall_clock_s: u64) -> Self {
        Self {
            index: 0,
            epoch_s: i64::try_from(wall_clock_s).unwrap_or(MAX_SECONDS).min(MAX_SECONDS),
            reg_a: A_RESET | 0x06,
            reg_b: B_24H,
            held: None,
            memory: [0; 128],
        }
    }

    /// Writes the index, port 0x70. Bit 7 masks NMIs on a PC; this machine has no source of them.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads the selected register, port 0x71.
    pub fn read(&self, now_ns: u64) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                self.encode(self.index, self.held.unwrap_or_else(|| self.date(now_ns)))
            }
            REG_A => self.reg_a | if self.updating(now_ns) { A_UIP } else { 0 },
            REG_B => self.reg_b,
            REG_C => 0,
            REG_D => D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    /// Writes the selected register, port 0x71.
    pub fn write(&mut self, now_ns: u64, value: u8) {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let mut date = self.held.unwrap_or_else(|| self.date(now_ns));
                self.decode(self.index, value, &mut date);
                match &mut self.held {
                    Some(held) => *held = date,
                    None => self.set_date(now_ns, date),
                }
            }
            REG_A => self.reg_a = value & !A_UIP,
            REG_B => {
                // The encoding bits decide how the registers read, so they change before the date is held or let go.
                self.reg_b = value;
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
    fn dates_round_trip() {
        for seconds in (0..MAX_SECONDS).step_by(86_400 * 97 + 12_345) {
            let date = Date::from_unix(seconds);
            assert_eq!(date.to_unix(), seconds, "{date:?}");
        }
        let start = Date::from_unix(0);
        assert_eq!((start.year, start.month, start.day, start.weekday), (1970, 1, 1, 5));
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
        for _ in 0..300_000 {
            let now = random.next() >> random.below(64);
            match random.below(3) {
                0 => cmos.select(random.byte()),
                1 => cmos.write(now, random.byte()),
                _ => _ = cmos.read(now),
            }
        }
    }
}
