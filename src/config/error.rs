use std::io;
use std::path::PathBuf;

use super::raw::Origin;
use crate::failure::NextStep;

/// Settings that cannot be used. Always the operator's turn: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("there is no configuration file {}", path.display())]
    Missing { path: PathBuf },
    #[error("cannot read the configuration file {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{} line {line} is not TOML: {why}", path.display())]
    Syntax { path: PathBuf, line: usize, why: String },
    #[error("{origin}: there is no setting \"{key}\" (did you mean \"{nearest}\"?)")]
    UnknownKey { key: String, origin: Origin, nearest: String },
    #[error("{origin}: {key} {why}")]
    Value { key: String, origin: Origin, why: String },
    #[error("there is no repository \"{name}\"; the settings have {}", known.join(", "))]
    UnknownRepository { name: String, known: Vec<String> },
    #[error("{why}")]
    Together { why: String },
    #[error("cannot tell the working directory")]
    WorkingDirectory { source: io::Error },
}

impl ConfigError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Missing { .. }
            | Self::Unreadable { .. }
            | Self::Syntax { .. }
            | Self::UnknownKey { .. }
            | Self::Value { .. }
            | Self::UnknownRepository { .. }
            | Self::Together { .. }
            | Self::WorkingDirectory { .. } => NextStep::Stop,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "correct --config or WALDEN_CONFIG, or leave it out to run with the defaults",
            Self::Unreadable { .. } => "check the file's owner and mode, and that it is a text file",
            Self::Syntax { .. } => "correct the line; text values need quotation marks",
            Self::UnknownKey { .. } => "correct or remove it; config/walden.toml lists every setting",
            Self::Value { .. } => "correct the value; config/walden.toml explains every setting",
            Self::UnknownRepository { .. } => "give one of these names, or s3://bucket/prefix or a path with a slash",
            Self::Together { .. } => "change one of the settings named",
            Self::WorkingDirectory { .. } => "start Walden in a directory that exists, or give absolute paths",
        }
    }
}
