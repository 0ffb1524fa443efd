//! Reads a target time. It carries its zone, or `--time-zone` gives one; nothing is ever taken to be local by itself (I14).

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};

use super::RestoreError;
use crate::wal::PgTime;

const FORMS: &str =
    "write it as 2026-11-20T02:00:00Z, 2026-11-20 02:00:00+01, or without a zone but with `--time-zone Europe/Berlin`";
const LENGTH_MAX: usize = 128;

/// Parses `YYYY-MM-DD HH:MM[:SS[.ffffff]]` (`T` or a space between), followed by `Z`, `UTC`, `GMT`, an offset, or a zone's name such
/// as `Europe/Berlin`. Without any of these `time_zone` says what is meant. A local time that does not exist or occurs twice is
/// refused, since each choice could be the wrong one.
pub fn parse_target_time(text: &str, time_zone: Option<&str>) -> Result<PgTime, RestoreError> {
    let wrong = |why: &str| RestoreError::Target { why: format!("\"{}\": {why}", shortened(text)), hint: FORMS };
    let trimmed = text.trim();
    if trimmed.is_empty() || trimmed.len() > LENGTH_MAX || !trimmed.is_ascii() {
        return Err(wrong("this is not a time"));
    }
    let (date, rest) = trimmed.split_at_checked(10).ok_or_else(|| wrong("this is not a date and a time of day"))?;
    let rest = rest.strip_prefix(['T', 't', ' ']).ok_or_else(|| wrong("a time of day is missing"))?;
    let clock_end = rest.find(|c: char| !(c.is_ascii_digit() || c == ':' || c == '.')).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at(clock_end);
    let civil = parse_civil(date, clock).map_err(wrong)?;
    let zone = match (zone.trim(), time_zone) {
        ("", None) => {
            return Err(wrong("the time has no zone, and guessing one could restore the wrong state"));
        }
        ("", Some(zone)) => parse_zone(zone.trim()).map_err(wrong)?,
        (zone, _) => parse_zone(zone).map_err(wrong)?,
    };
    let timestamp = match zone {
        Zone::Offset(offset) => offset.to_timestamp(civil).map_err(|_| wrong("this time is out of range"))?,
        Zone::Named(zone) => match zone.to_ambiguous_timestamp(civil).offset() {
            AmbiguousOffset::Unambiguous { offset } => {
                offset.to_timestamp(civil).map_err(|_| wrong("this time is out of range"))?
            }
            AmbiguousOffset::Gap { .. } => {
                return Err(wrong(
                    "this local time does not exist: the clocks were put forward over it; give an offset",
                ));
            }
            AmbiguousOffset::Fold { before, after } => {
                let why = format!(
                    "this local time is ambiguous, since it occurred twice when the clocks were put back; give the offset, {before} or {after}"
                );
                return Err(wrong(&why));
            }
        },
    };
    Ok(PgTime::from_timestamp(timestamp))
}

enum Zone {
    Offset(Offset),
    Named(TimeZone),
}

fn parse_civil(date: &str, clock: &str) -> Result<DateTime, &'static str> {
    const NOT: &str = "this is not a date and a time of day";
    let number = |digits: &str, length: usize| {
        let plain = digits.len() == length && digits.bytes().all(|b| b.is_ascii_digit());
        if plain { digits.parse::<i16>().map_err(|_| NOT) } else { Err(NOT) }
    };
    let mut parts = date.split('-');
    let (Some(year), Some(month), Some(day), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(NOT);
    };
    let (year, month, day) = (number(year, 4)?, number(month, 2)?, number(day, 2)?);
    let (clock, fraction) = match clock.split_once('.') {
        Some((clock, fraction)) => (clock, Some(fraction)),
        None => (clock, None),
    };
    let mut parts = clock.split(':');
    let (Some(hour), Some(minute), second, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(NOT);
    };
    let (hour, minute) = (number(hour, 2)?, number(minute, 2)?);
    let second = match second {
        Some(second) => number(second, 2)?,
        None if fraction.is_some() => return Err(NOT),
        None => 0,
    };
    if second == 60 {
        return Err("PostgreSQL has no leap seconds; give the second before or after");
    }
    let nanosecond = match fraction {
        None => 0,
        Some(digits) => {
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(NOT);
            }
            if digits.bytes().skip(6).any(|b| b != b'0') {
                return Err(
                    "PostgreSQL's times have microseconds, so more than six digits after the point mean nothing",
                );
            }
            let six: String = digits.chars().chain(std::iter::repeat('0')).take(6).collect();
            six.parse::<i32>().map_err(|_| NOT)? * 1000
        }
    };
    let small = |n: i16| i8::try_from(n).map_err(|_| NOT);
    DateTime::new(year, small(month)?, small(day)?, small(hour)?, small(minute)?, small(second)?, nanosecond)
        .map_err(|_| "there is no such date or time of day")
}

/// `Z`, `UTC`, `GMT`, `+02`, `+0200`, `+02:00`, or a name with a slash. Abbreviations such as `CET` or `EST` mean different offsets to
/// different programs, and would shift the target silently.
fn parse_zone(text: &str) -> Result<Zone, &'static str> {
    if ["z", "utc", "gmt"].contains(&text.to_ascii_lowercase().as_str()) {
        return Ok(Zone::Offset(Offset::UTC));
    }
    if let Some(digits) = text.strip_prefix(['+', '-']) {
        return parse_offset(digits, text.starts_with('-')).map(Zone::Offset);
    }
    let name = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if !name.contains('/') {
        return Err("its zone is not one of Z, UTC, an offset such as +01:00, or a name such as Europe/Berlin");
    }
    TimeZone::get(name).map(Zone::Named).map_err(|_| "its time zone is not known here")
}

fn parse_offset(digits: &str, negative: bool) -> Result<Offset, &'static str> {
    const NOT: &str = "its offset is not one (such as +01:00)";
    let plain: String = match digits.split(':').collect::<Vec<_>>().as_slice() {
        [whole] => (*whole).into(),
        [hours, minutes] if hours.len() == 2 && minutes.len() == 2 => format!("{hours}{minutes}"),
        _ => return Err(NOT),
    };
    let plain = match plain.len() {
        1 => format!("0{plain}00"),
        2 => format!("{plain}00"),
        4 => plain,
        _ => return Err(NOT),
    };
    if !plain.bytes().all(|b| b.is_ascii_digit()) {
        return Err(NOT);
    }
    let number = |range: std::ops::Range<usize>| plain[range].parse::<i32>().map_err(|_| NOT);
    let (hours, minutes) = (number(0..2)?, number(2..4)?);
    // The bounds of PostgreSQL: MAX_TZDISP_HOUR in src/include/datatype/timestamp.h.
    if hours > 15 || minutes > 59 {
        return Err(NOT);
    }
    let seconds = hours * 3600 + minutes * 60;
    Offset::from_seconds(if negative { -seconds } else { seconds }).map_err(|_| NOT)
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utc(text: &str, zone: Option<&str>) -> Result<String, String> {
        parse_target_time(text, zone).map(|time| time.to_string()).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    }

    #[test]
    fn a_time_with_its_zone_is_read() {
        for (text, expected) in [
            ("2026-11-20T02:00:00Z", "2026-11-20T02:00:00.000000Z"),
            ("2026-11-20t02:00:00z", "2026-11-20T02:00:00.000000Z"),
            ("2026-11-20 02:00:00 UTC", "2026-11-20T02:00:00.000000Z"),
            ("2026-11-20 02:00:00.5+00", "2026-11-20T02:00:00.500000Z"),
            ("2026-11-20 02:00:00.123456+01", "2026-11-20T01:00:00.123456Z"),
            ("2026-11-20 02:00:00.123456000+01", "2026-11-20T01:00:00.123456Z"),
            ("2026-11-20 02:00:00 -05:30", "2026-11-20T07:30:00.000000Z"),
            ("2026-11-20T02:00:00+0530", "2026-11-19T20:30:00.000000Z"),
            ("2026-11-20 02:00 Europe/Berlin", "2026-11-20T01:00:00.000000Z"),
            ("2026-07-20 02:00:00[Europe/Berlin]", "2026-07-20T00:00:00.000000Z"),
            ("  2026-11-20 02:00:00Z  ", "2026-11-20T02:00:00.000000Z"),
        ] {
            assert_eq!(utc(text, None).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_time_without_zone_needs_one_to_be_named() {
        assert!(utc("2026-11-20 02:00:00", None).unwrap_err().contains("has no zone"));
        assert_eq!(utc("2026-11-20 02:00:00", Some("Europe/Berlin")).unwrap(), "2026-11-20T01:00:00.000000Z");
        assert_eq!(utc("2026-11-20 02:00:00", Some("UTC")).unwrap(), "2026-11-20T02:00:00.000000Z");
        assert_eq!(utc("2026-11-20 02:00:00", Some("-03:00")).unwrap(), "2026-11-20T05:00:00.000000Z");
        // The zone in the text counts.
        assert_eq!(utc("2026-11-20 02:00:00Z", Some("Europe/Berlin")).unwrap(), "2026-11-20T02:00:00.000000Z");
    }

    #[test]
    fn a_local_time_that_is_missing_or_double_is_refused() {
        let zone = Some("Europe/Berlin");
        assert!(utc("2026-10-25 02:30:00", zone).unwrap_err().contains("occurred twice"));
        assert!(utc("2026-10-25 02:30:00 Europe/Berlin", None).unwrap_err().contains("occurred twice"));
        assert!(utc("2026-03-29 02:30:00", zone).unwrap_err().contains("does not exist"));
        assert_eq!(utc("2026-10-25 02:30:00+02", zone).unwrap(), "2026-10-25T00:30:00.000000Z");
        assert_eq!(utc("2026-10-25 02:30:00+01", zone).unwrap(), "2026-10-25T01:30:00.000000Z");
        assert_eq!(utc("2026-10-25 03:00:00", zone).unwrap(), "2026-10-25T02:00:00.000000Z");
        assert_eq!(utc("2026-10-25 01:59:59.999999", zone).unwrap(), "2026-10-24T23:59:59.999999Z");
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for text in [
            "",
            "yesterday",
            "now",
            "infinity",
            "1763600000",
            "2026-11-20",
            "2026-11-20Z",
            "20-11-2026 02:00:00Z",
            "2026-13-20 02:00:00Z",
            "2026-02-29 02:00:00Z",
            "2026-11-20 24:00:00Z",
            "2026-11-20 02:60:00Z",
            "2026-11-20 02:00:60Z",
            "2026-11-20 02:00:00.Z",
            "2026-11-20 02:00:00.1234567Z",
            "2026-11-20 02Z",
            "2026-11-20 02:00:00 CET",
            "2026-11-20 02:00:00 EST",
            "2026-11-20 02:00:00 Mars/Olympus",
            "2026-11-20 02:00:00+25:00",
            "2026-11-20 02:00:00+1:0",
            "2026-11-20 02:00:00+",
            "2026-11-20 02:00:00Zjunk",
            "2026-11-20 02:00:00 ../../etc/passwd",
            "2026-11-20 02:00:00\u{2212}01",
            "2026-11-2\u{e9} 02:00:00Z",
        ] {
            assert!(utc(text, None).is_err(), "{text}");
        }
        assert!(utc(&"9".repeat(10_000), None).unwrap_err().len() < 300);
    }
}
