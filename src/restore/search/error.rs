use crate::wal::{Lsn, PageError, PgTime};

/// Why a search gave no cut.
#[derive(Debug, thiserror::Error)]
pub enum SearchError<E: std::error::Error + 'static> {
    #[error(transparent)]
    Source(E),
    #[error("stored WAL is damaged")]
    Page(#[from] PageError),
    #[error("the stored object with the WAL at {at} ends before {expected}")]
    Short { at: Lsn, expected: Lsn },
    #[error("the stored object that should begin with the WAL at {at} holds something else")]
    WrongObject { at: Lsn },
    #[error("the header of a stored object names a record at {at} that its WAL does not have")]
    MissingRecord { at: Lsn },
    #[error("the stored WAL objects do not follow each other at {at}")]
    NotContiguous { at: Lsn },
    #[error("no complete WAL record is held")]
    NothingHeld,
    #[error("the target lies before {from}, where the held WAL begins")]
    BeforeRange { from: Lsn },
    #[error(
        "a transaction that ended at {time}, after the target, lies before {from}, where the WAL of the first backup begins that could be used"
    )]
    BeforeTime { time: PgTime, from: Lsn },
    #[error("the target {lsn} lies beyond {end}, where the held WAL ends")]
    BeyondEnd { lsn: Lsn, end: Lsn },
    #[error("no commit or abort of transaction {xid} is held")]
    XidNotFound { xid: u32 },
    #[error("no restore point \"{name}\" is held")]
    NameNotFound { name: String },
    #[error("{what} occurs more than once, at {}", list(lsns))]
    Repeated { what: String, lsns: Vec<Lsn> },
}

fn list(lsns: &[Lsn]) -> String {
    lsns.iter().map(Lsn::to_string).collect::<Vec<_>>().join(", ")
}

impl<E: std::error::Error + 'static> SearchError<E> {
    /// The target cannot be reached with what is held.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::NothingHeld
            | Self::BeforeRange { .. }
            | Self::BeforeTime { .. }
            | Self::BeyondEnd { .. }
            | Self::XidNotFound { .. }
            | Self::NameNotFound { .. }
            | Self::Repeated { .. } => true,
            Self::Source(_)
            | Self::Page(_)
            | Self::Short { .. }
            | Self::WrongObject { .. }
            | Self::MissingRecord { .. }
            | Self::NotContiguous { .. } => false,
        }
    }

    /// A stored object is not what it says it is. A source's own errors are the source's to judge.
    pub fn is_damaged(&self) -> bool {
        match self {
            Self::Page(_) | Self::Short { .. } | Self::WrongObject { .. } | Self::MissingRecord { .. } => true,
            Self::Source(_)
            | Self::NotContiguous { .. }
            | Self::NothingHeld
            | Self::BeforeRange { .. }
            | Self::BeforeTime { .. }
            | Self::BeyondEnd { .. }
            | Self::XidNotFound { .. }
            | Self::NameNotFound { .. }
            | Self::Repeated { .. } => false,
        }
    }

    /// What to do, in one sentence; `None` for a source's own errors.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Source(_) => return None,
            Self::Page(_) | Self::Short { .. } | Self::WrongObject { .. } | Self::MissingRecord { .. } => {
                "run `walden verify`, or read from another repository"
            }
            Self::NotContiguous { .. } => "plan again: the archive has changed meanwhile",
            Self::NothingHeld | Self::BeforeRange { .. } | Self::BeyondEnd { .. } => {
                "choose a target inside one of the windows that `walden list` shows"
            }
            Self::BeforeTime { .. } => {
                "choose a later time; if the clock was wrong then, an LSN inside one of the windows that `walden list` shows"
            }
            Self::XidNotFound { .. } | Self::NameNotFound { .. } => {
                "check the target, or choose a time or an LSN inside one of the windows that `walden list` shows"
            }
            Self::Repeated { .. } => "give the one that is meant as `--target-lsn`",
        })
    }

    pub(super) fn repeated(what: String, found: &[(usize, Lsn)]) -> Self {
        Self::Repeated { what, lsns: found.iter().map(|&(_, lsn)| lsn).collect() }
    }
}
