use std::fmt;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

/// When to do something again and again: a cron pattern of five fields, in UTC.
#[derive(Clone)]
pub struct Schedule {
    cron: Cron,
    text: String,
}

impl Schedule {
    /// `Err` is why it is not a pattern, or that it has no moment: nobody would notice that nothing is ever done.
    pub fn parse(text: &str) -> Result<Self, String> {
        let cron = parse(text)?;
        if has_moments(text)? {
            Ok(Self { cron, text: text.to_owned() })
        } else {
            Err("there is no such moment".into())
        }
    }

    /// The first moment after `now`. `None` if it lies beyond the calendar of the pattern's library (year 5000).
    pub fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        let now = now.to_zoned(TimeZone::UTC);
        self.cron.find_next_occurrence(&now, false).ok().map(|next| next.timestamp())
    }
}

fn parse(text: &str) -> Result<Cron, String> {
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    parser.parse(text).map_err(|error| error.to_string().trim_end_matches('.').to_owned())
}

/// Whether some minute of a day and some day of the calendar fit. The library would look for it through three thousand years.
fn has_moments(text: &str) -> Result<bool, String> {
    // Whatever Unicode calls a space, as the library does.
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [minute, hour, day, month, weekday] = fields[..] else { return Ok(fields.len() == 1) }; // a word such as @daily
    let fits = |cron: &Cron, at: DateTime| {
        let zoned = at.to_zoned(TimeZone::UTC);
        zoned.is_ok_and(|zoned| cron.is_time_matching(&zoned).unwrap_or(false))
    };
    let begin = DateTime::constant(2026, 1, 1, 0, 0, 0, 0);
    let clock = parse(&format!("{minute} {hour} * * *"))?;
    let calendar = parse(&format!("0 0 {day} {month} {weekday}"))?;
    // 29 February comes back on the same weekday after 40 years at most (it did from 1880 to 1920).
    let minutes = begin.series(Span::new().minutes(1)).take(24 * 60);
    let days = begin.series(Span::new().days(1)).take(41 * 366);
    Ok(minutes.into_iter().any(|at| fits(&clock, at)) && days.into_iter().any(|at| fits(&calendar, at)))
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
