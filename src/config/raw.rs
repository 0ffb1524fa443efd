//! What was given for each setting, and where, before it is known whether it makes sense.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::keys::{self, REPOSITORY};
use super::value::Scalar;

/// Repositories at most.
pub const REPOSITORIES_MAX: usize = 16;

/// Where a value came from, for messages.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    File { path: PathBuf, line: usize },
    Environment(String),
    Flag(&'static str),
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{} line {line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Default => f.write_str("default"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub value: Scalar,
    /// The text as it was given, where the form was not chosen by the user: in the environment and in flags `123` may be meant
    /// as a name.
    pub text: Option<String>,
    pub origin: Origin,
}

/// The settings given of one section, by name.
pub type Section = BTreeMap<&'static str, Entry>;

#[derive(Debug, Default)]
pub struct Raw {
    pub sections: BTreeMap<&'static str, Section>,
    pub repositories: Vec<Section>,
}

impl Raw {
    /// Reads a file's text. `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let line_of = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line_of(error.span().map_or(0, |span| span.start)),
            why: error.message().replace('\n', ", "),
        })?;
        let file = File { path, line_of: &line_of };
        let mut raw = Self::default();
        for (name, value) in document.get_ref() {
            let origin = file.origin(name);
            let Some(section) = keys::section(name.get_ref()) else {
                return Err(file.unknown_top_level(name, value));
            };
            if section == REPOSITORY {
                raw.repositories = file.repositories(value, &origin)?;
            } else {
                let table = value.get_ref().as_table().ok_or_else(|| ConfigError::Value {
                    key: section.into(),
                    origin,
                    why: format!("is a section: write [{section}] on a line of its own"),
                })?;
                raw.sections.insert(section, file.section(section, table)?);
            }
        }
        Ok(raw)
    }

    pub fn set(&mut self, section: &'static str, name: &'static str, entry: Entry) {
        self.sections.entry(section).or_default().insert(name, entry);
    }
}

/// A file while it is read.
struct File<'a> {
    path: &'a Path,
    line_of: &'a dyn Fn(usize) -> usize,
}

impl File<'_> {
    fn origin<T>(&self, at: &Spanned<T>) -> Origin {
        Origin::File { path: self.path.to_owned(), line: (self.line_of)(at.span().start) }
    }

    fn unknown_top_level<T: AsRef<str>>(&self, name: &Spanned<T>, value: &Spanned<DeValue<'_>>) -> ConfigError {
        let written = name.get_ref().as_ref();
        let is_section = value.get_ref().is_table() || value.get_ref().is_array();
        let nearest = if is_section { keys::nearest_section(written).to_owned() } else { keys::nearest(written) };
        ConfigError::UnknownKey { key: clip(written), origin: self.origin(name), nearest }
    }

    fn repositories(&self, value: &Spanned<DeValue<'_>>, origin: &Origin) -> Result<Vec<Section>, ConfigError> {
        let wrong = |why: String| ConfigError::Value { key: REPOSITORY.into(), origin: origin.clone(), why };
        let tables = value.get_ref().as_array().ok_or_else(|| wrong("is a list: write [[repository]]".into()))?;
        let mut repositories = Vec::new();
        for table in tables.iter() {
            if repositories.len() == REPOSITORIES_MAX {
                return Err(wrong(format!("stands more than {REPOSITORIES_MAX} times")));
            }
            let table =
                table.get_ref().as_table().ok_or_else(|| wrong("is a list of tables: write [[repository]]".into()))?;
            repositories.push(self.section(REPOSITORY, table)?);
        }
        Ok(repositories)
    }

    fn section(&self, section: &'static str, table: &DeTable<'_>) -> Result<Section, ConfigError> {
        let mut entries = Section::new();
        for (name, value) in table {
            let Some(key) = keys::find(section, name.get_ref()) else {
                let written = format!("{section}.{}", clip(name.get_ref()));
                let nearest = keys::nearest(&written);
                return Err(ConfigError::UnknownKey { key: written, origin: self.origin(name), nearest });
            };
            let value = Scalar::from_toml(value.get_ref());
            entries.insert(key.name, Entry { value, text: None, origin: self.origin(name) });
        }
        Ok(entries)
    }
}

/// What is shown of a name that somebody else wrote: one line, not too long.
pub fn clip(written: &str) -> String {
    written.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect()
}
