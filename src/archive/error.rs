use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::assembler::AssembleError;
use super::sealer::DiskFailure;
use crate::failure::NextStep;
use crate::postgres::PostgresError;
use crate::queue::QueueError;
use crate::repository::RepositoryError;
use crate::seal::SealError;
use crate::spool::SpoolError;
use crate::wal::{Lsn, PageError, SegmentName, SystemIdentifier, TimelineId, WalError};

/// Why the live path cannot go on as it is.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Disk(Arc<DiskFailure>),
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error("the server does not answer: nothing came for {seconds} s")]
    Silent { seconds: u64 },
    #[error("WAL that is needed is gone from the server: {why}")]
    WalGone { why: String },
    #[error("a spooled segment was lost; it is fetched again")]
    FetchAgain,
    #[error("a repository goes on where the open segment is not cut; it is received again")]
    CutAgain,
    #[error("another agent holds the lease")]
    NotOurTurn,
    #[error("the server ended the stream")]
    StreamEnded,
    #[error("the server shuts down and waits for WAL to be confirmed that cannot be confirmed now")]
    ServerStops,
    #[error("the server sent WAL from {found} where {expected} follows")]
    Jump { expected: Lsn, found: Lsn },
    #[error("the server's WAL differs from what is held, first at {at}: it has another history")]
    Diverged { at: Lsn },
    #[error("the server is at {server}, behind the end of what is held, {held}")]
    Behind { server: Lsn, held: Lsn },
    #[error("the server is on timeline {server}, and timeline {held} is held, which came after it{}", left_at(*.switch))]
    OlderTimeline { server: u32, held: u32, switch: Option<Lsn> },
    #[error("timeline {timeline} of the server is not the one that is held: they differ from {at} on")]
    OtherHistory { timeline: u32, at: Lsn },
    #[error("the server is on timeline {server}, what is held is on timeline {held}, and they have no common history")]
    OtherBranch { server: u32, held: u32 },
    #[error("the server has system identifier {found}, but this cluster's WAL is of {expected}")]
    OtherCluster { found: SystemIdentifier, expected: SystemIdentifier },
    #[error("slot \"{name}\" does not exist and postgres.create_slot is false")]
    NoSlot { name: String },
    #[error("slot \"{name}\" does not keep the WAL that is needed ({why}), and postgres.create_slot is false")]
    SlotUseless { name: String, why: String },
    #[error("slot \"{name}\" is a logical one")]
    LogicalSlot { name: String },
    #[error("{url} does not honour conditional writes, so another writer could not be noticed")]
    NoConditions { url: String },
    #[error("{why}")]
    Unadopted { why: String },
    #[error("archiving is stopped: {why}")]
    Refused { why: String },
    #[error("cannot remove {}", path.display())]
    Remove { path: PathBuf, source: std::io::Error },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{key} was stored, but a look at it does not show it")]
    NotThere { key: String },
    #[error("what a repository holds is not known, and without it nobody can tell which history this is")]
    StoreSilent,
    #[error("stopping")]
    Stopping,
    #[error("internal error: {why}")]
    Internal { why: String },
}

impl From<PageError> for ArchiveError {
    fn from(error: PageError) -> Self {
        Self::Assemble(error.into())
    }
}

impl From<SealError> for ArchiveError {
    fn from(error: SealError) -> Self {
        Self::Assemble(error.into())
    }
}

impl ArchiveError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Postgres(e) => e.next_step(),
            Self::Repository(e) => e.next_step(),
            Self::Spool(e) => e.next_step(),
            Self::Queue(e) => e.next_step(),
            Self::Disk(e) => e.next_step(),
            // A stream that does not fit may be a damaged connection; the same bytes again are another matter.
            Self::Assemble(_)
            | Self::Silent { .. }
            | Self::StreamEnded
            | Self::ServerStops
            | Self::FetchAgain
            | Self::CutAgain
            | Self::NotOurTurn
            | Self::StoreSilent
            | Self::WalGone { .. }
            | Self::Unadopted { .. }
            | Self::Jump { .. } => NextStep::Retry,
            // A standby that has not caught up is waited for.
            Self::Behind { .. } | Self::OlderTimeline { .. } => NextStep::Retry,
            Self::NoSlot { .. } | Self::SlotUseless { .. } | Self::LogicalSlot { .. } => NextStep::Retry,
            Self::Remove { .. } | Self::Read { .. } | Self::NotThere { .. } | Self::Stopping | Self::Wal(_) => {
                NextStep::Retry
            }
            Self::Diverged { .. }
            | Self::OtherHistory { .. }
            | Self::OtherBranch { .. }
            | Self::OtherCluster { .. } => NextStep::Stop,
            Self::NoConditions { .. } | Self::Refused { .. } | Self::Internal { .. } => NextStep::Stop,
        }
    }

    /// Going on would be wrong until an operator acts, as opposed to what failed or should not happen.
    pub fn is_refusal(&self) -> bool {
        self.next_step() == NextStep::Stop && !matches!(self, Self::Internal { .. })
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Postgres(e) => e.hint(),
            Self::Repository(e) => e.hint(),
            Self::Spool(e) => e.hint(),
            Self::Queue(e) => e.hint(),
            Self::Disk(e) => e.hint(),
            Self::Assemble(_) | Self::Jump { .. } => {
                "if it stays, compare the server's WAL with pg_waldump and check its disk"
            }
            Self::Silent { .. } | Self::StreamEnded => {
                "check the network between here and the server; the connection is made again"
            }
            Self::ServerStops => {
                "nothing: it is let go, and its slot keeps the WAL; the connection is made again once the server is up"
            }
            Self::Diverged { .. } | Self::OtherHistory { .. } | Self::OtherBranch { .. } => {
                "nothing of it is archived: connect to the right server, or archive this one under another archive.cluster"
            }
            Self::OlderTimeline { .. } => {
                "it is waited for, or for another host of postgres.url: a server that was left behind by a promotion must be rewound or made anew; one that is to go on beside the newer timeline needs its own archive.cluster"
            }
            Self::Behind { .. } => {
                "if it is a standby, it is waited for; if it was restored from a backup, archive it under another archive.cluster"
            }
            Self::OtherCluster { .. } => {
                "correct postgres.url, or give this cluster its own archive.cluster; if it has replaced the other one, `walden adopt --system-identifier` with its number lets it archive here"
            }
            Self::NoSlot { .. } => {
                "create it with pg_create_physical_replication_slot(name, true), or set postgres.create_slot = true"
            }
            Self::SlotUseless { .. } => {
                "drop it with pg_drop_replication_slot(name), create it anew with pg_create_physical_replication_slot(name, true), and take a base backup if a gap is told then"
            }
            Self::LogicalSlot { .. } => "choose another postgres.slot",
            Self::NoConditions { .. } => {
                "if this agent is the only writer, set single_writer = true for the repository; else use another store"
            }
            Self::Unadopted { .. } => {
                "it stays in the spool; see that no agent archives the old cluster any more, and that `walden adopt` was run with every repository configured"
            }
            Self::Refused { .. } => "see the cause in `walden status`; restart Walden once it is settled",
            Self::NotThere { .. } => "it is stored again; if it stays, the store loses what it confirms",
            Self::Remove { .. } | Self::Read { .. } => "check the owner and the mode of the spool",
            Self::WalGone { .. } => "archiving goes on behind what is lost; take a base backup",
            Self::FetchAgain => "check the spool's disk",
            Self::CutAgain => "nothing: the stream begins again by itself",
            Self::StoreSilent => "check that every repository is up and can be reached from here; it is asked again",
            Self::NotOurTurn => "nothing: this agent takes over when the other one falls silent",
            Self::Stopping => "nothing: Walden is stopping",
            Self::Wal(_) | Self::Internal { .. } => "report it: this should not happen",
        }
    }

    /// The message with all its causes, in one line.
    pub fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.ends_with(&cause_text) {
                text.push_str(&format!(": {cause_text}"));
            }
            source = cause.source();
        }
        text
    }
}

fn left_at(switch: Option<Lsn>) -> String {
    switch.map_or(String::new(), |switch| format!(" and left it at {switch}"))
}

/// Stops archiving for good, from wherever it was found that going on would be wrong. The first reason counts.
#[derive(Clone, Debug)]
pub struct Halt(Arc<watch::Sender<Option<Arc<ArchiveError>>>>);

impl Default for Halt {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Halt {
    pub fn stop(&self, why: ArchiveError) {
        self.0.send_if_modified(|reason| {
            let first = reason.is_none();
            if first {
                tracing::error!(hint = why.hint(), "archiving stops: {}", why.describe());
                *reason = Some(Arc::new(why));
            }
            first
        });
    }

    pub fn reason(&self) -> Option<Arc<ArchiveError>> {
        self.0.borrow().clone()
    }

    /// Waits until archiving is stopped.
    pub async fn halted(&self) {
        let mut reason = self.0.subscribe();
        // The sender lives as long as this handle.
        let _ = reason.wait_for(Option::is_some).await;
    }
}

/// What was held and is not any more: the live path asks the server for it again.
#[derive(Clone, Debug)]
pub struct Missing {
    segments: Arc<watch::Sender<BTreeSet<SegmentName>>>,
    histories: Arc<Mutex<BTreeSet<TimelineId>>>,
}

impl Default for Missing {
    fn default() -> Self {
        Self { segments: Arc::new(watch::Sender::new(BTreeSet::new())), histories: Arc::default() }
    }
}

impl Missing {
    pub fn add(&self, segment: SegmentName) {
        self.segments.send_modify(|missing| {
            missing.insert(segment);
        });
    }

    /// A history file was lost: the stream begins again, and with it the look at the server's chain.
    pub fn add_history(&self, timeline: TimelineId) {
        self.histories.lock().expect("no one panics while holding it").insert(timeline);
        self.segments.send_modify(|_| {});
    }

    /// Those that were lost since the last call.
    pub fn take_histories(&self) -> BTreeSet<TimelineId> {
        std::mem::take(&mut *self.histories.lock().expect("no one panics while holding it"))
    }

    pub fn extend(&self, segments: impl IntoIterator<Item = SegmentName>) {
        segments.into_iter().for_each(|segment| self.add(segment));
    }

    pub fn remove(&self, segment: SegmentName) {
        self.segments.send_if_modified(|missing| {
            missing.remove(&segment);
            false
        });
    }

    /// `[from, to)` of a timeline is told as a gap, and what comes before `from` is held: nothing in it is waited for any more.
    pub fn is_told(&self, timeline: TimelineId, from: Lsn, to: Lsn) {
        self.segments.send_if_modified(|missing| {
            missing.retain(|segment| segment.timeline() != timeline || segment.end() <= from || segment.end() > to);
            false
        });
    }

    /// Where the first one starts: what lies behind it is not held without a hole.
    pub fn first_start(&self, timeline: TimelineId) -> Option<Lsn> {
        self.first(timeline).map(|segment| segment.start())
    }

    pub fn first(&self, timeline: TimelineId) -> Option<SegmentName> {
        self.segments.borrow().iter().find(|segment| segment.timeline() == timeline).copied()
    }

    /// Those of timelines before this one.
    pub fn before(&self, timeline: TimelineId) -> Vec<SegmentName> {
        self.segments.borrow().iter().filter(|segment| segment.timeline() < timeline).copied().collect()
    }

    pub fn subscribe(&self) -> watch::Receiver<BTreeSet<SegmentName>> {
        self.segments.subscribe()
    }
}
