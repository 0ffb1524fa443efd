use std::io;
use std::path::PathBuf;

use crate::failure::NextStep;
use crate::repository::{RepositoryError, Window};
use crate::seal::SealError;
use crate::wal::SegmentName;

/// Why a restore, a plan or a fetch did not come about.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{why}")]
    Target { why: String, hint: &'static str },
    #[error("the target cannot be reached: {why}")]
    Unreachable { why: String, hint: &'static str, windows: Vec<Window> },
    #[error("{} is not empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("a PostgreSQL server may be running in {} (postmaster.pid names process {pid})", path.display())]
    ServerRunning { path: PathBuf, pid: i32 },
    #[error("{what}")]
    Refused { what: String, hint: &'static str },
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("stored WAL is damaged: {why}")]
    DamagedWal { why: String },
    #[error("the beginning of {segment} is not stored, and pieces that follow it are: it is on its way, or was lost")]
    Incomplete { segment: SegmentName },
    #[error("{key} of backup {backup} is damaged")]
    DamagedPart {
        backup: String,
        key: String,
        #[source]
        source: SealError,
    },
    #[error("backup {backup} is damaged: {why}")]
    DamagedBackup { backup: String, why: String },
    #[error("the backup cannot be used: {why}")]
    UnreadableBackup { why: String },
    #[error("{} cannot be {what}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("PostgreSQL {what}")]
    Server { what: String, hint: &'static str },
    #[error("the plan in {} cannot be read: {why}", path.display())]
    PlanFile { path: PathBuf, why: String },
    #[error("the archive changed while it was read: {what}")]
    Changed { what: String },
    #[error("no answer came within {seconds} s")]
    Timeout { seconds: u64 },
}

impl RestoreError {
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Repository(error) => error.next_step(),
            Self::Changed { .. } | Self::Timeout { .. } | Self::Incomplete { .. } => NextStep::Retry,
            Self::Io { .. } => NextStep::Wait,
            Self::Target { .. }
            | Self::Unreachable { .. }
            | Self::NotEmpty { .. }
            | Self::ServerRunning { .. }
            | Self::Refused { .. }
            | Self::DamagedWal { .. }
            | Self::DamagedPart { .. }
            | Self::DamagedBackup { .. }
            | Self::UnreadableBackup { .. }
            | Self::Server { .. }
            | Self::PlanFile { .. } => NextStep::Stop,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Target { hint, .. }
            | Self::Unreachable { hint, .. }
            | Self::Refused { hint, .. }
            | Self::Server { hint, .. } => hint,
            Self::NotEmpty { .. } => "choose another directory, or give `--force`: it is renamed then, never deleted",
            Self::ServerRunning { .. } => "stop the server, or remove postmaster.pid if it is a leftover",
            Self::Repository(error) => error.hint(),
            Self::DamagedWal { .. }
            | Self::DamagedPart { .. }
            | Self::DamagedBackup { .. }
            | Self::UnreadableBackup { .. } => {
                "restore from another repository (`--repository`) or an older backup (`--backup`)"
            }
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotADirectory => "choose another directory: a file stands in its way",
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "make room there, or choose another directory"
                }
                io::ErrorKind::ReadOnlyFilesystem => "choose a directory on a file system that can be written to",
                _ => "let the user that runs Walden own the directory, or choose another one",
            },
            Self::Incomplete { .. } => {
                "let the agent run, which stores it; if the agent is gone, restore with `walden restore`, which leaves out what was never acknowledged"
            }
            Self::PlanFile { .. } => "run `walden restore` again: it makes a new plan",
            Self::Changed { .. } => "run it again",
            Self::Timeout { .. } => "check that the store is up, or raise `restore.fetch_timeout`",
        }
    }

    /// The exit status of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Target { .. } => 2,
            Self::Unreachable { .. } => 3,
            Self::NotEmpty { .. } | Self::ServerRunning { .. } | Self::Refused { .. } => 4,
            Self::DamagedWal { .. }
            | Self::Incomplete { .. }
            | Self::DamagedPart { .. }
            | Self::DamagedBackup { .. }
            | Self::UnreadableBackup { .. } => 5,
            Self::Repository(error) => repository_exit_code(error),
            Self::Io { .. } | Self::Server { .. } | Self::PlanFile { .. } | Self::Changed { .. } => 1,
            Self::Timeout { .. } => 1,
        }
    }
}

/// The exit status of a reading command that ends with a repository's error.
pub fn repository_exit_code(error: &RepositoryError) -> u8 {
    match error {
        RepositoryError::ClusterName { .. }
        | RepositoryError::BackupId { .. }
        | RepositoryError::SeveralSystems { .. }
        | RepositoryError::NoSystem { .. } => 2,
        error if error.is_damaged() || error.is_conflict() => 5,
        RepositoryError::SegmentSizes { .. } => 5,
        _ => 1,
    }
}

/// An error and its causes in one line, for logs.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
