use crate::failure::NextStep;
use crate::seal::SealError;
use crate::storage::StorageError;
use crate::wal::{Lsn, SegmentSize, SystemIdentifier, TimelineId, WalError};

/// What can go wrong between Walden and what it stores.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error(
        "\"{name}\" cannot be a cluster's name (1 to 64 letters, digits, '.', '_' or '-', not beginning with '.' or '-')"
    )]
    ClusterName { name: String },
    #[error("\"{text}\" is not the id of a backup (such as 20261120T020000Z-full)")]
    BackupId { text: String },
    #[error("{url} holds no cluster \"{cluster}\"")]
    NoCluster { url: String, cluster: String },
    #[error("cluster \"{cluster}\" at {url} holds several systems: {}", list(found))]
    SeveralSystems { url: String, cluster: String, found: Vec<SystemIdentifier> },
    #[error("cluster \"{cluster}\" at {url} has no system {wanted}, only {}", list(found))]
    NoSystem { url: String, cluster: String, wanted: SystemIdentifier, found: Vec<SystemIdentifier> },
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("{url}: {key} is damaged")]
    Damaged {
        url: String,
        key: String,
        #[source]
        source: SealError,
    },
    #[error("{url}: {key} cannot be read: {why}")]
    Unreadable { url: String, key: String, why: String },
    #[error("{url}: {key} has format {format}, and this release of Walden knows format {known}")]
    NewerFormat { url: String, key: String, format: u32, known: u32 },
    #[error("{url}: {key} says that it is {found}, not {expected}")]
    Identity { url: String, key: String, found: String, expected: String },
    #[error("{url}: {key} exists with other bytes than those to store; they differ from {at} on")]
    Conflict { url: String, key: String, at: Lsn },
    #[error("{url}: {key} exists with another content than the one to store")]
    OtherContent { url: String, key: String },
    #[error("{url}: {key} exists with bytes that are not the WAL to store: {why}")]
    Occupied { url: String, key: String, why: String },
    #[error("{url}: two stored pieces of WAL that overlap differ at {at}: {first} and {second}")]
    PiecesDiffer { url: String, first: String, second: String, at: Lsn },
    #[error("{url}: two sizes of WAL segments are found, {first:?} and {second:?}")]
    SegmentSizes { url: String, first: SegmentSize, second: SegmentSize },
    #[error("{url}: the history of timeline {timeline} cannot be read")]
    History {
        url: String,
        timeline: TimelineId,
        #[source]
        source: WalError,
    },
    #[error("the lease of {url} is not ours any more{}", by.as_deref().map(|by| format!(", it belongs to {by}")).unwrap_or_default())]
    LeaseLost { url: String, by: Option<String> },
    #[error("{url}: {what} was changed by another writer again and again")]
    Contended { url: String, what: String },
    #[error("the pieces of {segment} stay, since the whole segment is not in {url}")]
    SegmentMissing { url: String, segment: String },
    #[error("the local copy of {key} cannot be read")]
    Local {
        key: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the local copy of {key} is damaged")]
    LocalDamaged {
        key: String,
        #[source]
        source: SealError,
    },
    #[error("the local copy of {key} says that it is {found}, not {expected}")]
    LocalIdentity { key: String, found: String, expected: String },
}

fn list(found: &[SystemIdentifier]) -> String {
    found.iter().map(SystemIdentifier::to_string).collect::<Vec<_>>().join(", ")
}

impl RepositoryError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Storage(error) => error.next_step(),
            Self::Contended { .. } | Self::SegmentMissing { .. } => NextStep::Retry,
            // The server, or another copy in the spool, still has the bytes.
            Self::LocalDamaged { .. } | Self::LocalIdentity { .. } => NextStep::FetchAgain,
            Self::Local { .. } => NextStep::Retry,
            // Bytes may be changed on their way, and an object may be mended: what could be read once can be read again (I21).
            Self::Damaged { .. } | Self::Unreadable { .. } | Self::Identity { .. } | Self::History { .. } => {
                NextStep::Retry
            }
            // Whoever lost the lease stands by until it can be taken again; it must not go on writing.
            Self::LeaseLost { .. } => NextStep::Stop,
            Self::ClusterName { .. }
            | Self::BackupId { .. }
            | Self::NoCluster { .. }
            | Self::SeveralSystems { .. }
            | Self::NoSystem { .. }
            | Self::NewerFormat { .. }
            | Self::Conflict { .. }
            | Self::OtherContent { .. }
            | Self::Occupied { .. }
            | Self::PiecesDiffer { .. }
            | Self::SegmentSizes { .. } => NextStep::Stop,
        }
    }

    /// Whether it may be over in a moment by itself.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Storage(error) => error.may_pass(),
            Self::Contended { .. } => true,
            _ => false,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::ClusterName { .. } => "correct `archive.cluster`",
            Self::BackupId { .. } => "take the id from `walden list`",
            Self::NoCluster { .. } => {
                "check `archive.cluster` and the repository's path, bucket and prefix, or archive something first with `walden run`"
            }
            Self::SeveralSystems { .. } => "choose one with `--system-identifier`",
            Self::NoSystem { .. } => "check `--system-identifier` and `archive.cluster`",
            Self::Storage(error) => error.hint(),
            Self::Damaged { .. } | Self::Unreadable { .. } | Self::Identity { .. } | Self::History { .. } => {
                "take the object from another repository or an older version of it"
            }
            Self::NewerFormat { .. } => "use the newest release of Walden",
            Self::Conflict { .. } | Self::OtherContent { .. } | Self::PiecesDiffer { .. } => {
                "two histories meet under one name: nothing was overwritten; find out which server or copy is the right one"
            }
            Self::Occupied { .. } => {
                "nothing was overwritten: find out what wrote it, move it away if it does not belong there, and restart Walden"
            }
            Self::SegmentSizes { .. } => "two clusters meet under one name: give one of them another `archive.cluster`",
            Self::LeaseLost { .. } => {
                "stop the other agent, or leave it to it: this one takes over when it falls silent"
            }
            Self::Contended { .. } => "look for a second agent that writes to the same repository",
            Self::SegmentMissing { .. } => "nothing: it is tried again when the segment is stored",
            Self::Local { .. } => "check the spool's disk and the owner and mode of its files",
            Self::LocalDamaged { .. } | Self::LocalIdentity { .. } => {
                "check the spool's disk; the bytes are taken again from the server"
            }
        }
    }

    /// Same name, other bytes (I2): that timeline stops.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::Conflict { .. } | Self::OtherContent { .. } | Self::Occupied { .. } | Self::PiecesDiffer { .. }
        )
    }

    pub fn is_lease_lost(&self) -> bool {
        matches!(self, Self::LeaseLost { .. })
    }

    /// A stored object is damaged or missing, as opposed to a store that cannot be reached.
    pub fn is_damaged(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::Unreadable { .. }
                | Self::Identity { .. }
                | Self::PiecesDiffer { .. }
                | Self::History { .. }
                | Self::Storage(
                    StorageError::Damaged { .. } | StorageError::NotFound { .. } | StorageError::TooLarge { .. }
                )
        )
    }

    /// A definite answer that the object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Storage(StorageError::NotFound { .. }))
    }
}
