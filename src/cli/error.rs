use std::error::Error;
use std::fmt;

use serde_json::{Value, json};

use super::exit;
use crate::config::ConfigError;

/// How a command ends when it fails: its exit code, and one line that says what, why and what to do.
#[derive(Debug)]
pub struct CliError {
    pub code: u8,
    /// What and why, one line.
    pub message: String,
    /// What to do, one sentence.
    pub hint: String,
    /// With code 3: from when to when any moment can be restored.
    pub windows: Option<Value>,
}

impl CliError {
    pub fn new(code: u8, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code, message: one_line(&message.into()), hint: one_line(&hint.into()), windows: None }
    }

    /// A room's error: the message is its own and those of its sources, from the outside in.
    pub fn from_error(code: u8, error: &(dyn Error + 'static), hint: impl Into<String>) -> Self {
        Self::new(code, chain(error), hint)
    }

    pub fn with_windows(mut self, windows: Value) -> Self {
        self.windows = Some(windows);
        self
    }

    /// `{"schema", "error": {"code", "message", "hint"}}`; code 3 adds `windows`, inside `error` and, for those who look for it where
    /// `list` has it, beside it.
    pub fn to_json(&self) -> Value {
        let error = json!({ "code": self.code, "message": self.message, "hint": self.hint });
        let mut document = json!({ "schema": 1, "error": error });
        if self.code == exit::UNREACHABLE {
            let windows = self.windows.clone().unwrap_or_else(|| json!([]));
            document["error"]["windows"] = windows.clone();
            document["windows"] = windows;
        }
        document
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "; {}", self.hint) }
    }
}

impl Error for CliError {}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::from_error(exit::USAGE, &error, error.hint())
    }
}

impl From<anyhow::Error> for CliError {
    fn from(error: anyhow::Error) -> Self {
        Self::from_error(exit::FAILED, error.as_ref(), "")
    }
}

/// An error and its sources, from the outside in, joined by colons. A source that its wrapper already told is not repeated.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let told = inner.to_string();
        if !text.contains(&told) {
            text.push_str(": ");
            text.push_str(&told);
        }
        source = inner.source();
    }
    text
}

/// Messages may hold what a server or a file said: one line, without control characters.
pub(super) fn one_line(text: &str) -> String {
    let spaced: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    spaced.split_whitespace().collect::<Vec<_>>().join(" ")
}
