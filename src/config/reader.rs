use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::ConfigError;
use super::keys;
use super::raw::{Entry, Origin, Section, clip};
use super::value::{self, Scalar};

/// Reads the values of one section, checks their form and range, and names the setting and its origin when they are wrong.
pub struct Reader<'a> {
    section: &'static str,
    given: Option<&'a Section>,
    base: &'a Path,
}

impl<'a> Reader<'a> {
    /// `base`: where relative paths start.
    pub fn new(section: &'static str, given: Option<&'a Section>, base: &'a Path) -> Self {
        Self { section, given, base }
    }

    pub fn is_given(&self, name: &str) -> bool {
        self.given.is_some_and(|given| given.contains_key(name))
    }

    pub fn origin(&self, name: &str) -> Origin {
        self.given.and_then(|given| given.get(name)).map_or(Origin::Default, |entry| entry.origin.clone())
    }

    fn entry(&self, name: &'static str) -> Entry {
        if let Some(entry) = self.given.and_then(|given| given.get(name)) {
            return entry.clone();
        }
        let key = keys::find(self.section, name).expect("every setting that is read is in the table");
        Entry { value: Scalar::from_text(key.default), text: None, origin: Origin::Default }
    }

    /// An error about this setting. One that is missing is told by the place of another one beside it.
    pub fn wrong(&self, name: &str, why: impl Into<String>) -> ConfigError {
        let beside = || self.given.and_then(|given| given.values().next()).map(|entry| entry.origin.clone());
        let origin = match self.origin(name) {
            Origin::Default => beside().unwrap_or(Origin::Default),
            own => own,
        };
        ConfigError::Value { key: format!("{}.{name}", self.section), origin, why: why.into() }
    }

    fn wrong_kind(&self, name: &str, expected: &str, found: &Scalar) -> ConfigError {
        match found {
            // A secret put in the wrong place must not be shown, so neither is any other text.
            Scalar::Text(_) => self.wrong(name, format!("must be {expected}")),
            found => self.wrong(name, format!("must be {expected}, not {}", found.kind())),
        }
    }

    fn negative(&self, name: &str) -> ConfigError {
        self.wrong(name, "must not be negative")
    }

    pub fn text(&self, name: &'static str) -> Result<String, ConfigError> {
        let entry = self.entry(name);
        let text = match (entry.value, entry.text) {
            (Scalar::Text(text), _) => text,
            (_, Some(text)) => text,
            (other, None) => return Err(self.wrong_kind(name, "a text in quotation marks", &other)),
        };
        if text.contains('\0') {
            return Err(self.wrong(name, "holds a NUL character"));
        }
        Ok(text)
    }

    /// `None` for the empty text.
    pub fn optional_text(&self, name: &'static str) -> Result<Option<String>, ConfigError> {
        Ok(Some(self.text(name)?).filter(|text| !text.is_empty()))
    }

    /// One of a few words.
    pub fn word<T: Copy>(&self, name: &'static str, words: &[(&str, T)]) -> Result<T, ConfigError> {
        let text = self.text(name)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, meaning)| *meaning);
        found.ok_or_else(|| {
            let words: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            self.wrong(name, format!("must be {}, not \"{}\"", words.join(" or "), clip(&text)))
        })
    }

    pub fn flag(&self, name: &'static str) -> Result<bool, ConfigError> {
        match self.entry(name).value {
            Scalar::Bool(value) => Ok(value),
            other => Err(self.wrong_kind(name, "true or false", &other)),
        }
    }

    pub fn number(&self, name: &'static str, range: RangeInclusive<i64>) -> Result<i64, ConfigError> {
        match self.entry(name).value {
            Scalar::Integer(value) if range.contains(&value) => Ok(value),
            Scalar::Integer(value) => {
                Err(self.wrong(name, format!("must be from {} to {}, not {value}", range.start(), range.end())))
            }
            other => Err(self.wrong_kind(name, "a whole number", &other)),
        }
    }

    /// Seconds, or a text with a unit.
    pub fn duration(&self, name: &'static str, range: RangeInclusive<Duration>) -> Result<Duration, ConfigError> {
        const FORM: &str = "seconds or a time such as \"500ms\", \"15m\" or \"14d\"";
        let found = self.entry(name).value;
        let duration = match &found {
            Scalar::Text(text) => value::duration(text),
            Scalar::Integer(seconds) if *seconds < 0 => return Err(self.negative(name)),
            Scalar::Integer(seconds) => value::seconds(*seconds as f64), // exact below 2^53, and the range ends below
            Scalar::Float(seconds) => value::seconds(*seconds),
            _ => None,
        };
        let duration = duration.ok_or_else(|| self.wrong_kind(name, FORM, &found))?;
        if !range.contains(&duration) {
            let ends = [*range.start(), *range.end()].map(value::duration_text);
            let found = value::duration_text(duration);
            return Err(self.wrong(name, format!("must be from {} to {}, not {found}", ends[0], ends[1])));
        }
        Ok(duration)
    }

    /// As `duration`, but 0 means off.
    pub fn duration_or_off(
        &self,
        name: &'static str,
        range: RangeInclusive<Duration>,
    ) -> Result<Option<Duration>, ConfigError> {
        match self.duration(name, Duration::ZERO..=Duration::MAX)? {
            Duration::ZERO => Ok(None),
            _ => self.duration(name, range).map(Some),
        }
    }

    /// Bytes, or a text with a unit.
    pub fn bytes(&self, name: &'static str, range: RangeInclusive<u64>) -> Result<u64, ConfigError> {
        const FORM: &str = "bytes or a size such as \"64MiB\" (units: KiB, MiB, GiB, TiB)";
        let found = self.entry(name).value;
        let bytes = match &found {
            Scalar::Text(text) => value::bytes(text),
            Scalar::Integer(bytes) if *bytes < 0 => return Err(self.negative(name)),
            Scalar::Integer(bytes) => u64::try_from(*bytes).ok(),
            _ => None,
        };
        let bytes = bytes.ok_or_else(|| self.wrong_kind(name, FORM, &found))?;
        if !range.contains(&bytes) {
            let readable = |bytes| bytesize::ByteSize::b(bytes).display().iec().to_string();
            let [low, high, found] = [*range.start(), *range.end(), bytes].map(readable);
            return Err(self.wrong(name, format!("must be from {low} to {high}, not {found}")));
        }
        Ok(bytes)
    }

    pub fn bytes_or_off(&self, name: &'static str, range: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
        match self.bytes(name, 0..=u64::MAX)? {
            0 => Ok(None),
            _ => self.bytes(name, range).map(Some),
        }
    }

    /// Absolute.
    pub fn path(&self, name: &'static str) -> Result<PathBuf, ConfigError> {
        self.optional_path(name)?.ok_or_else(|| self.wrong(name, "must name a path"))
    }

    /// Absolute; `None` for the empty text.
    pub fn optional_path(&self, name: &'static str) -> Result<Option<PathBuf>, ConfigError> {
        let Some(text) = self.optional_text(name)? else { return Ok(None) };
        let path: PathBuf = self.base.join(text).components().collect(); // without `.` and doubled slashes
        match path.to_str() {
            Some(_) => Ok(Some(path)),
            None => Err(self.wrong(name, "lies in a folder whose name is not UTF-8")),
        }
    }
}
