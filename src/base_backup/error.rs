use std::time::Duration;

use crate::failure::NextStep;
use crate::postgres::{ControlFileError, PostgresError};
use crate::repository::RepositoryError;
use crate::seal::SealError;
use crate::storage::BoxError;
use crate::wal::{Lsn, SystemIdentifier};

/// Why a base backup failed. Whatever it was, no backup exists and another one may be taken.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("the base backup failed")]
    Postgres(#[source] PostgresError),
    #[error("storing the base backup failed")]
    Repository(#[source] RepositoryError),
    #[error("compressing the base backup failed")]
    Seal(#[source] SealError),
    #[error("the server's archive cannot be read: {why}")]
    Tar { why: String },
    #[error("the server's backup_manifest cannot be read: {why}")]
    Manifest { why: String },
    #[error("{path} is not what the server read from its disk: size or CRC-32C differ from backup_manifest")]
    Damaged { path: String },
    #[error("the backup's pg_control cannot be used")]
    ControlFile(#[source] ControlFileError),
    #[error("the backup has no global/pg_control")]
    NoControlFile,
    #[error("the server is cluster {found}, but the backup was to be of cluster {expected}")]
    OtherCluster { expected: SystemIdentifier, found: SystemIdentifier },
    #[error("{volume} needs more than {parts_max} parts")]
    TooLarge { volume: String, parts_max: u32 },
    #[error("the WAL through {stop_lsn} did not reach the repository within {} s", limit.as_secs())]
    WalTimeout { stop_lsn: Lsn, limit: Duration },
    #[error("the WAL through {stop_lsn} cannot reach the repository")]
    Wal { stop_lsn: Lsn, source: BoxError },
    #[error("the base backup was cancelled")]
    Cancelled,
    #[error("the base backup ended unexpectedly: {why}")]
    Internal { why: String },
}

impl BackupError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Postgres(error) => error.next_step(),
            Self::Repository(error) => error.next_step(),
            Self::OtherCluster { .. } => NextStep::Stop,
            // A new backup takes everything again.
            Self::Seal(_)
            | Self::Tar { .. }
            | Self::Manifest { .. }
            | Self::Damaged { .. }
            | Self::ControlFile(_)
            | Self::NoControlFile
            | Self::WalTimeout { .. }
            | Self::Wal { .. }
            | Self::Cancelled
            | Self::Internal { .. } => NextStep::Retry,
            Self::TooLarge { .. } => NextStep::Stop,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Postgres(error) => error.hint(),
            Self::Repository(error) => error.hint(),
            Self::Seal(error) => error.hint(),
            Self::Tar { .. } => "take the backup again; if it stays, look for something that changes bytes on the way",
            Self::Manifest { .. } => "take the backup again; if it stays, this version of PostgreSQL is not supported",
            Self::Damaged { .. } => {
                "bytes changed between the server and here: check memory and network of both hosts, then take it again"
            }
            Self::ControlFile(_) | Self::NoControlFile => "check that this version of PostgreSQL is supported",
            Self::OtherCluster { .. } => "check postgres.url and archive.cluster: one of them means another server",
            Self::TooLarge { .. } => "set backup.volume_bytes lower, and move huge files out of the data directory",
            Self::WalTimeout { .. } | Self::Wal { .. } => {
                "check that `walden run` archives (walden status), or raise backup.wal_timeout"
            }
            Self::Cancelled => "take it again when you want it",
            Self::Internal { .. } => "report it: this should not happen",
        }
    }
}

impl From<PostgresError> for BackupError {
    fn from(error: PostgresError) -> Self {
        Self::Postgres(error)
    }
}

impl From<RepositoryError> for BackupError {
    fn from(error: RepositoryError) -> Self {
        Self::Repository(error)
    }
}

impl From<SealError> for BackupError {
    fn from(error: SealError) -> Self {
        Self::Seal(error)
    }
}
