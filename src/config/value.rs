//! What a value's text means.

use std::time::Duration;

use toml::de::DeValue;

/// A value before it is known what it is for.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    /// An array, a table or a date: no setting is one. Its kind in words.
    Other(&'static str),
}

impl Scalar {
    pub fn from_toml(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.as_ref().to_owned()),
            // Beyond 64 bits it is beyond every setting's range; said as a number that no range holds.
            DeValue::Integer(number) => {
                Self::Integer(i64::from_str_radix(number.as_str(), number.radix()).unwrap_or(i64::MAX))
            }
            DeValue::Float(number) => number.as_str().parse().map_or(Self::Other("a number"), Self::Float),
            DeValue::Boolean(value) => Self::Bool(*value),
            DeValue::Datetime(_) => Self::Other("a date"),
            DeValue::Array(_) => Self::Other("an array"),
            DeValue::Table(_) => Self::Other("a table"),
        }
    }

    /// TOML if it parses, else text: how the environment is read.
    pub fn from_text(text: &str) -> Self {
        match DeValue::parse(text) {
            Ok(value) => Self::from_toml(value.get_ref()),
            Err(_) => Self::Text(text.to_owned()),
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Integer(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::Other(kind) => kind,
        }
    }
}

/// A number and the unit behind it, without what may stand between them. `None` without digits.
fn split_unit(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (!number.is_empty()).then(|| (number, unit.trim()))
}

/// `"500ms"`, `"1s"`, `"15m"`, `"12h"`, `"14d"`; without a unit seconds. At most 100 years.
pub fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = split_unit(text)?;
    let factor = match unit {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    seconds(number.parse::<f64>().ok()? * factor)
}

/// Rounded to the millisecond, since nothing is set finer; `None` below 0 or above 100 years.
pub fn seconds(seconds: f64) -> Option<Duration> {
    const MAX: f64 = 100.0 * 366.0 * 86_400.0;
    (0.0..=MAX).contains(&seconds).then(|| Duration::from_millis((seconds * 1000.0).round() as u64)) // in range
}

/// Bytes, or `"64MiB"`: a whole number with `B`, `KiB`, `MiB`, `GiB` or `TiB`. `MB` is refused rather than read in one of
/// its two meanings.
pub fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// How a duration is written in a file: in the largest unit of which it has a whole number.
pub fn duration_text(duration: Duration) -> String {
    if duration.subsec_millis() != 0 {
        return format!("{}ms", duration.as_millis());
    }
    match duration.as_secs() {
        0 => "0s".into(),
        seconds if seconds % 86_400 == 0 => format!("{}d", seconds / 86_400),
        seconds if seconds % 3600 == 0 => format!("{}h", seconds / 3600),
        seconds if seconds % 60 == 0 => format!("{}m", seconds / 60),
        seconds => format!("{seconds}s"),
    }
}
