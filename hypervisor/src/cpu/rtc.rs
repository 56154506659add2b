//! The machine's real-time clock (MC146818), read once to give a guest its date.

use super::instructions::{inb, outb};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const UPDATING: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
const PM: u8 = 1 << 7;
/// Readings of the clock until two agree. Without a clock they agree at once.
const TRIES: u32 = 1000;

fn read(register: u8) -> u8 {
    // SAFETY: nobody else uses the clock's ports; bit 7 of the index stays 0 and NMIs stay enabled.
    unsafe {
        outb(INDEX, register);
        inb(DATA)
    }
}

/// Seconds, minutes, hours, day, month, year of the century.
fn registers() -> [u8; 6] {
    [0x00, 0x02, 0x04, 0x07, 0x08, 0x09].map(read)
}

/// Seconds since 1970, UTC, as the clock has it; 0 when it makes no sense.
#[must_use]
pub fn unix_seconds() -> u64 {
    let mut last = registers();
    for _ in 0..TRIES {
        if read(STATUS_A) & UPDATING != 0 {
            continue;
        }
        let now = registers();
        if now == last {
            break;
        }
        last = now;
    }
    convert(last, read(STATUS_B)).unwrap_or(0)
}

fn convert(registers: [u8; 6], status_b: u8) -> Option<u64> {
    let number = |value: u8| {
        let value = u64::from(value);
        if status_b & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    };
    let [second, minute, hour, day, month, year] = registers;
    let mut hours = number(hour & !PM);
    if status_b & HOURS_24 == 0 {
        hours = hours % 12 + if hour & PM != 0 { 12 } else { 0 };
    }
    let (day, month, year) = (number(day), number(month), 2000 + number(year));
    if !(1..=31).contains(&day) || !(1..=12).contains(&month) || hours > 23 {
        return None;
    }
    let days = days_since_1970(year, month, day);
    Some(((days * 24 + hours) * 60 + number(minute)) * 60 + number(second))
}

/// Days to a date of the Gregorian calendar, for years from 1970 on.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let past = year - 1;
    let leap_days = past / 4 - past / 100 + past / 400 - (1969 / 4 - 1969 / 100 + 1969 / 400);
    (year - 1970) * 365 + leap_days + BEFORE_MONTH[month as usize - 1] + u64::from(leap && month > 2) + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_in_both_notations() {
        // 2026-11-22 19:40:05 UTC.
        assert_eq!(convert([0x05, 0x40, 0x19, 0x22, 0x11, 0x26], HOURS_24), Some(1_795_376_405));
        assert_eq!(convert([5, 40, 7 | PM, 22, 11, 26], BINARY), Some(1_795_376_405));
        assert_eq!(convert([0, 0, 0, 0x29, 0x02, 0x24], HOURS_24), Some(1_709_164_800));
        assert_eq!(convert([0xff; 6], 0xff), None);
    }
}
