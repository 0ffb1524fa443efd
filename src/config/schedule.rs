use std::fmt;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// When to do something again and again: a cron pattern of five fields, in UTC.
#[derive(Clone)]
pub struct Schedule {
    cron: Cron,
    text: String,
}

impl Schedule {
    /// `Err` is why it is not a pattern.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| error.to_string().trim_end_matches('.').to_owned())?;
        Ok(Self { cron, text: text.to_owned() })
    }

    /// The first moment after `now`. `None` if there is none in the next centuries (30 February).
    pub fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        let now = now.to_zoned(TimeZone::UTC);
        self.cron.find_next_occurrence(&now, false).ok().map(|next| next.timestamp())
    }
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
