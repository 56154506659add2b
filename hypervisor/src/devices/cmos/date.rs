//! Dates as the clock's registers hold them, and Unix time.

use serde::{Deserialize, Serialize};

/// 9999-12-31 23:59:59. Dates before 1970 and after this are clamped: two-digit years and one century byte can't say more.
pub(super) const MAX_SECONDS: i64 = 253_402_300_799;

/// A date in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Date {
    pub(super) year: u16,
    pub(super) month: u8,
    pub(super) day: u8,
    /// 1 = Sunday.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

impl Date {
    pub(super) fn from_unix(seconds: i64) -> Self {
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
    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_round_trip() {
        for seconds in (0..MAX_SECONDS).step_by(86_400 * 97 + 12_345) {
            let date = Date::from_unix(seconds);
            assert_eq!(date.to_unix(), seconds, "{date:?}");
        }
        let start = Date::from_unix(0);
        assert_eq!((start.year, start.month, start.day, start.weekday), (1970, 1, 1, 5));
        assert_eq!(Date::from_unix(i64::MIN), start);
        assert_eq!(Date::from_unix(i64::MAX).year, 9999);
    }
}
