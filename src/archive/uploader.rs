//! Ships what is spooled to one repository: several objects at once, retried without an end, proven by a read-back.
//!
//! Nothing here decides what is durable; it only learns what the repository holds. A spool file is removed when every repository
//! was seen to hold it (I8). Other content under a key of ours is never overwritten: archiving stops (I2).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::assembler::AssemblerSettings;
use super::backlog::Backlog;
use super::gap::{gap_of, show_gaps, tell_gap};
use super::ship::Shipped;
use super::tail::{Piece, Tail};
use super::turn::Turn;
use super::{ArchiveError, Halt, Missing};
use crate::failure::NextStep;
use crate::queue::QueueEntry;
use crate::repository::{
    Archive, Coverage, Lease, LeaseAttempt, LeaseHolder, LeaseSeeker, PieceChain, RepositoryError, RepositoryWriter,
};
use crate::seal::Compression;
use crate::spool::Spool;
use crate::storage::{Backoff, ObjectStore};
use crate::telemetry::{Board, CauseCode, RepositoryBoard};
use crate::wal::{Lsn, PgTime, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

const LEASE_TTL: Duration = Duration::from_secs(30);
const LEASE_POLL: Duration = Duration::from_secs(5);
const LEASE_RENEW: Duration = Duration::from_secs(10);
/// The server's position is asked every two seconds, so it is seldom written more often than that.
const COVERAGE_INTERVAL: Duration = Duration::from_millis(500);
/// How often queue figures are refreshed when nothing happens.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// How long a stopping agent tries to give the lease back.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);
/// How long a piece is left alone whose bytes could not be read.
const PIECE_PAUSE: Duration = Duration::from_millis(500);

/// Which repositories answer with errors now; the cause names them.
#[derive(Debug, Default)]
pub struct Failing(Mutex<BTreeMap<String, String>>);

impl Failing {
    pub(super) fn set(&self, board: &Board, shown: &RepositoryBoard, error: Option<String>) {
        let mut failing = self.0.lock().expect("no one panics while holding it");
        match &error {
            Some(message) => failing.insert(shown.name().into(), message.clone()),
            None => failing.remove(shown.name()),
        };
        shown.set_error(error);
        match failing.iter().next() {
            None => board.clear(CauseCode::StoreFailing),
            Some((name, message)) => board.raise(CauseCode::StoreFailing, format!("repository {name}: {message}")),
        }
    }
}

/// What every uploader needs; one per repository.
#[derive(Clone)]
pub struct Uploader {
    pub archive: Archive,
    pub store: Arc<dyn ObjectStore>,
    /// Where the store's abilities are tried out.
    pub probe_prefix: String,
    pub single_writer: bool,
    pub holder: LeaseHolder,
    pub spool: Spool,
    pub backlog: Arc<Backlog>,
    pub tail: Arc<Tail>,
    pub tail_on: bool,
    /// Known from the first connection on; tail pieces wait for it.
    pub wal: watch::Receiver<Option<AssemblerSettings>>,
    pub board: Board,
    pub shown: RepositoryBoard,
    pub failing: Arc<Failing>,
    pub concurrency: usize,
    pub retry_delay_max: Duration,
    pub halt: Halt,
    pub shutdown: CancellationToken,
    pub missing: Missing,
    /// Lowest position that every required repository holds; for `durability = "repository"`.
    pub archived: Arc<watch::Sender<Option<Lsn>>>,
    /// While another agent holds the lease the live path stands by as well.
    pub turn: Turn,
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
}

enum Ended {
    Shutdown,
    /// Taken by another agent, or `None`: not renewed in time, because the store did not answer.
    LeaseLost {
        by: Option<String>,
    },
    Halted,
}

/// Where one repository stands while this agent writes to it.
struct Course {
    /// What it holds in front of the first object to ship was looked at.
    joined: bool,
    /// The segment whose pieces are being shipped and where the next one starts.
    piece_at: Option<(SegmentName, u64)>,
    /// The same of the segment before: until it is stored whole, its pieces are what there is of it.
    piece_before: Option<(SegmentName, u64)>,
    piece_in_flight: bool,
    /// A piece could not be read: the file is waited for.
    piece_not_before: Option<Instant>,
}

impl Uploader {
    /// Runs until the shutdown, or until something happened that only an operator can judge.
    pub async fn run(mut self) {
        loop {
            let Some(lease) = self.take_lease().await else { return };
            tracing::info!(event = "lease_taken", repository = self.shown.name(), "this agent holds the lease");
            let shutdown = self.shutdown.clone();
            // A store that hangs must not hold up the end.
            let ended = tokio::select! {
                ended = self.work(lease.clone()) => ended,
                () = shutdown.cancelled() => Ended::Shutdown,
            };
            let name = self.shown.name();
            match ended {
                Ended::LeaseLost { by: Some(by) } => {
                    let message = format!("repository {name}: {by} took the lease; stop one of the two agents");
                    self.board.raise(CauseCode::LeaseLost, message);
                }
                Ended::LeaseLost { by: None } => {
                    tracing::info!(event = "lease_expired", repository = name, "the lease ran out; taking it again")
                }
                Ended::Shutdown | Ended::Halted => {
                    match tokio::time::timeout(RELEASE_LIMIT, lease.release()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::debug!(repository = name, %error, "the lease was not released; it runs out");
                        }
                        Err(_) => tracing::debug!(repository = name, "the lease was not released in time; it runs out"),
                    }
                    return;
                }
            }
        }
    }

    async fn take_lease(&mut self) -> Option<Lease> {
        let mut seeker = LeaseSeeker::new(self.archive.clone(), self.holder.clone(), LEASE_TTL);
        let mut backoff = Backoff::new(self.retry_delay_max);
        let mut probed = false;
        loop {
            let attempt = async {
                if !probed {
                    let abilities = self.store.probe(&self.probe_prefix).await?;
                    if !(abilities.prove_one_writer() || self.single_writer) {
                        self.halt.stop(ArchiveError::NoConditions { url: self.archive.url() });
                    }
                    self.refuse_other_cluster().await?;
                    probed = true;
                }
                seeker.try_take().await
            };
            let attempt = tokio::select! {
                attempt = attempt => attempt,
                () = self.shutdown.cancelled() => return None,
                () = self.halt.halted() => return None,
            };
            let delay = match attempt {
                Ok(LeaseAttempt::Taken(lease)) => {
                    self.turn.is_ours(self.shown.name());
                    self.board.clear(CauseCode::LeaseHeld);
                    self.board.clear(CauseCode::LeaseLost);
                    self.failing.set(&self.board, &self.shown, None);
                    return Some(lease);
                }
                Ok(LeaseAttempt::HeldByOther { agent, host, renewed }) => {
                    let name = self.shown.name();
                    self.turn.is_anothers(name);
                    let why = format!(
                        "repository {name}: agent {agent} on {host} holds the lease (renewed {renewed}), and this one stands by; \
                         nothing, if that is the agent that should archive; else stop it, and this one takes over {} s later",
                        LEASE_TTL.as_secs()
                    );
                    self.board.raise(CauseCode::LeaseHeld, why);
                    LEASE_POLL
                }
                Err(error) => {
                    self.turn.is_unanswered(self.shown.name());
                    self.failing.set(&self.board, &self.shown, Some(describe(&error)));
                    backoff.next_delay()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.shutdown.cancelled() => return None,
            }
        }
    }

    /// Another cluster under the name is looked for before the first write: at the start the store may not have answered (I6).
    async fn refuse_other_cluster(&self) -> Result<(), RepositoryError> {
        let succession = self.archive.repository().succession().await?;
        if let Some(expected) = succession.kept_by(self.system) {
            let error = ArchiveError::OtherCluster { found: self.system, expected };
            self.board.raise(CauseCode::OtherCluster, format!("{}; {}", error.describe(), error.hint()));
            self.halt.stop(error);
        }
        Ok(())
    }

    async fn work(&mut self, lease: Lease) -> Ended {
        let writer = RepositoryWriter::new(self.archive.clone(), lease.clone());
        self.drop_stale_pieces(&writer).await;
        let mut ships: JoinSet<Shipped> = JoinSet::new();
        let mut in_flight: Vec<String> = Vec::new();
        let mut course = Course {
            joined: false,
            piece_at: None,
            piece_before: None,
            piece_in_flight: false,
            piece_not_before: None,
        };
        let mut backlog_changed = self.backlog.subscribe();
        let mut tail_changed = self.tail.subscribe();
        let mut renew = tokio::time::interval(LEASE_RENEW);
        let mut tick = tokio::time::interval(IDLE_TICK);
        let mut coverage = tokio::time::interval(COVERAGE_INTERVAL);
        let mut covered: Option<PgTime> = None;
        let cancel = self.shutdown.child_token();
        let _stop_ships = cancel.clone().drop_guard();
        loop {
            if !course.joined {
                match self.join_on(&writer).await {
                    Ok(joined) => course.joined = joined,
                    Err(error) => self.failing.set(&self.board, &self.shown, Some(describe(&error))),
                }
            }
            self.show(&course);
            let room = self.concurrency.saturating_sub(in_flight.len());
            for entry in self.backlog.pending(self.shown.name(), &in_flight, room) {
                in_flight.push(entry.relative.clone());
                ships.spawn(self.clone().ship_entry(writer.clone(), entry, cancel.clone()));
            }
            if self.tail_on
                && !course.piece_in_flight
                && course.piece_not_before.is_none_or(|at| Instant::now() >= at)
                && let Some(piece) = self.next_piece(&writer, &mut course).await
            {
                course.piece_in_flight = true;
                ships.spawn(self.clone().ship_piece(writer.clone(), piece, cancel.clone()));
            }
            tokio::select! {
                () = self.shutdown.cancelled() => {
                    self.put_coverage(&writer, &mut covered).await;
                    return Ended::Shutdown;
                }
                () = self.halt.halted() => return Ended::Halted,
                _ = backlog_changed.changed() => {}
                _ = tail_changed.changed() => {}
                _ = tick.tick() => {}
                _ = coverage.tick() => self.put_coverage(&writer, &mut covered).await,
                _ = renew.tick() => if let Err(error) = lease.renew().await {
                    if error.is_lease_lost() {
                        return Ended::LeaseLost { by: lost_to(error) };
                    }
                    self.failing.set(&self.board, &self.shown, Some(describe(&error)));
                },
                Some(shipped) = ships.join_next() => match shipped {
                    Ok(Shipped::Segment { entry, took }) => {
                        in_flight.retain(|name| *name != entry.relative);
                        self.settle(&entry, took).await;
                        if entry.relative.starts_with("wal/") && let Some(segment) = segment_of(&entry, self.segment_size) {
                            self.drop_pieces(&writer, segment).await;
                        }
                    }
                    Ok(Shipped::Piece { segment, end }) => {
                        course.piece_in_flight = false;
                        self.failing.set(&self.board, &self.shown, None);
                        if course.piece_at.is_some_and(|(at, _)| at == segment) {
                            course.piece_at = Some((segment, end));
                        }
                    }
                    Ok(Shipped::PieceGone) => {
                        course.piece_in_flight = false;
                        course.piece_not_before = Some(Instant::now() + PIECE_PAUSE);
                    }
                    Ok(Shipped::Cancelled) => return Ended::Shutdown,
                    Ok(Shipped::Failed { error: ArchiveError::Repository(error), what }) if error.is_lease_lost() => {
                        tracing::debug!(%what, "not written: the lease is lost");
                        return Ended::LeaseLost { by: lost_to(error) };
                    }
                    Ok(Shipped::Failed { error, what }) if error.next_step() == NextStep::FetchAgain => {
                        in_flight.retain(|name| *name != what);
                        self.fetch_again(&what, &error).await;
                    }
                    Ok(Shipped::Failed { error, what }) => {
                        self.stop_for(&error, &what);
                        return Ended::Halted;
                    }
                    Err(panic) => {
                        self.halt.stop(ArchiveError::Internal { why: panic.to_string() });
                        return Ended::Halted;
                    }
                },
            }
        }
    }

    /// A conflict, or damage that cannot be cured here: archiving stops, what is spooled stays.
    fn stop_for(&self, error: &ArchiveError, what: &str) {
        self.shown.upload_failed();
        let message = format!("repository {}: {what}: {}; {}", self.shown.name(), error.describe(), error.hint());
        if matches!(error, ArchiveError::Repository(error) if error.is_conflict()) {
            self.board.raise(CauseCode::Conflict, message.clone());
        } else {
            self.board.raise(CauseCode::SpoolFailing, message.clone());
        }
        self.halt.stop(ArchiveError::Refused { why: message });
    }

    /// Tells the repository until when everything is held. A hint for readers, so a failure is only noted.
    async fn put_coverage(&self, writer: &RepositoryWriter, written: &mut Option<PgTime>) {
        let (Some(complete_until), Some(archived_lsn)) = (self.board.complete_until(), self.board.archived()) else {
            return;
        };
        let Some((timeline, _)) = self.backlog.sealed_end() else { return };
        let Ok(timeline) = TimelineId::new(timeline) else { return };
        if written.is_some_and(|written| written >= complete_until) {
            return;
        }
        let coverage = Coverage {
            format: 1,
            system_identifier: self.system,
            timeline,
            complete_until,
            archived_lsn,
            updated: PgTime::from_timestamp(jiff::Timestamp::now()),
        };
        match writer.put_coverage(&coverage).await {
            Ok(()) => {
                *written = Some(complete_until);
                self.shown.set_covered(complete_until);
            }
            Err(error) => tracing::debug!(repository = self.shown.name(), %error, "coverage.json was not written"),
        }
    }

    /// Where the first segment starts that this repository lacks, and its timeline: everything before is there or told as a gap.
    /// A segment that was lost from the spool is waited for (I3).
    fn whole_until(&self) -> Option<(TimelineId, Lsn)> {
        let (timeline, end) = self.backlog.first_lacking(self.shown.name()).or(self.backlog.sealed_end())?;
        let timeline = TimelineId::new(timeline).ok()?;
        Some((timeline, self.missing.first_start(timeline).map_or(end, |missing| missing.min(end))))
    }

    /// Looks whether the repository holds what comes before the first object to ship. It may be a new one, or have been away while
    /// the spool was lost: nothing is taken for granted (I3). False while it is not known where shipping begins.
    async fn join_on(&self, writer: &RepositoryWriter) -> Result<bool, RepositoryError> {
        let Some((timeline, from)) = self.whole_until() else { return Ok(false) };
        let from = self.segment_size.start_of(from);
        let archive = writer.archive();
        if !archive.gaps(self.segment_size).await?.is_empty() {
            show_gaps(&self.board, &archive.catalog().await?);
        }
        if let Some(before) = from.get().checked_sub(self.segment_size.get()) {
            let before = SegmentName::holding(timeline, Lsn::new(before), self.segment_size);
            for compression in [Compression::Lz4, Compression::Zstd] {
                if archive.head(&archive.keys().segment(before, compression)).await?.is_some() {
                    return Ok(true);
                }
            }
        }
        let catalog = archive.catalog().await?;
        let held = catalog.timelines.get(&timeline).and_then(|wal| wal.last_byte());
        // Nothing of the timeline: the repository begins here, or the timeline does.
        let Some(held) = held.filter(|held| *held < from) else { return Ok(true) };
        let known =
            catalog.gaps.iter().any(|gap| gap.timeline == timeline && gap.from_lsn <= held && from <= gap.to_lsn);
        if !known {
            let reason = format!("repository {} does not have it, and the spool neither", self.shown.name());
            let gap = gap_of(self.system, timeline, held, from, &reason);
            writer.put_gap(&gap).await?;
            tell_gap(&self.board, &gap);
        }
        Ok(true)
    }

    /// Moves the figures: what this repository holds without a gap, tail included.
    fn show(&self, course: &Course) {
        if let Some((_, sealed)) = self.whole_until().filter(|_| course.joined) {
            let pieces = course.piece_before.into_iter().chain(course.piece_at);
            let behind_it = pieces.filter(|(segment, _)| segment.start() == self.segment_size.start_of(sealed));
            let archived =
                behind_it.fold(sealed, |end, (segment, piece)| end.max(Lsn::new(segment.start().get() + piece)));
            self.shown.set_archived(archived);
            let lowest = self.board.archived();
            self.archived.send_if_modified(|known| std::mem::replace(known, lowest) != lowest);
        }
        let (segments, bytes) = self.backlog.depth();
        self.board.set_queue(segments, bytes);
    }

    /// The next piece to ship, or nothing new. On another segment, first asks what the repository has of it.
    async fn next_piece(&self, writer: &RepositoryWriter, course: &mut Course) -> Option<Piece> {
        let settings = self.wal.borrow().clone()?;
        let segment = self.tail.segment()?;
        // A timeline's history comes first (I10).
        if self.backlog.lacks_history(self.shown.name(), segment.timeline()) {
            return None;
        }
        if course.piece_at.is_none_or(|(at, _)| at != segment) {
            // A writer lists a segment's pieces before its first write and goes on at their contiguous end.
            match writer.archive().pieces(segment).await {
                Ok(pieces) => {
                    course.piece_before = course.piece_at;
                    course.piece_at = Some((segment, u64::from(PieceChain::of(&pieces).end)));
                }
                Err(error) => {
                    self.failing.set(&self.board, &self.shown, Some(describe(&error)));
                    return None;
                }
            }
        }
        let (_, from) = course.piece_at?;
        self.tail.piece(&settings, segment, from)
    }

    /// The spool's copy is damaged: it is set aside, and the live path takes the bytes again from the server (D4).
    async fn fetch_again(&self, relative: &str, error: &ArchiveError) {
        let message = format!("{relative} in the spool: {}; it is set aside and fetched again", error.describe());
        self.board.raise(CauseCode::SpoolFailing, message);
        let (backlog, spool, relative) = (self.backlog.clone(), self.spool.clone(), relative.to_owned());
        let (missing, size) = (self.missing.clone(), self.segment_size);
        let job = tokio::task::spawn_blocking(move || -> Result<(), ArchiveError> {
            let Some(entry) = backlog.entry(&relative) else { return Ok(()) };
            spool.quarantine(&spool.folder().join(&relative))?;
            backlog.forget(&entry);
            if let Some(segment) = segment_of(&entry, size) {
                missing.add(segment);
            }
            Ok(())
        });
        match job.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.halt.stop(error),
            Err(panic) => self.halt.stop(ArchiveError::Internal { why: panic.to_string() }),
        }
    }

    /// Notes a stored object; removes from the spool what every repository holds.
    async fn settle(&self, entry: &QueueEntry, took: Duration) {
        self.failing.set(&self.board, &self.shown, None);
        self.shown.observe_upload(took);
        tracing::debug!(
            event = "uploaded",
            repository = self.shown.name(),
            object = entry.relative,
            bytes = entry.stored_size,
            seconds = took.as_secs_f64(),
            "stored"
        );
        if entry.relative.starts_with("wal/") && segment_of(entry, self.segment_size).is_some() {
            self.shown.segment_archived();
        }
        let (backlog, spool, entry, name) =
            (self.backlog.clone(), self.spool.clone(), entry.clone(), self.shown.name().to_owned());
        let job = tokio::task::spawn_blocking(move || -> Result<(), ArchiveError> {
            backlog.confirm(&entry, &name);
            for done in backlog.removable() {
                spool
                    .disk()
                    .remove(&spool.folder().join(&done.relative))
                    .map_err(|source| ArchiveError::Remove { path: spool.folder().join(&done.relative), source })?;
                backlog.forget(&done);
            }
            Ok(())
        });
        match job.await {
            Ok(Ok(())) => {}
            // The object is stored; only the spool's copy stays longer, and a restart sends it again.
            Ok(Err(error)) => tracing::warn!(%error, "a stored object stays in the spool"),
            Err(panic) => self.halt.stop(ArchiveError::Internal { why: panic.to_string() }),
        }
    }

    /// Pieces that outlived their segment, because the agent died between the two.
    async fn drop_stale_pieces(&self, writer: &RepositoryWriter) {
        let Some((timeline, _)) = self.backlog.sealed_end() else { return };
        let Ok(timeline) = TimelineId::new(timeline) else { return };
        let prefix = format!("{}{}/", writer.archive().keys().tail_prefix(), timeline.to_hex());
        match writer.archive().list_folders(&prefix).await {
            Ok(folders) => {
                for name in
                    folders.iter().filter_map(|f| SegmentName::parse(f.trim_end_matches('/'), self.segment_size).ok())
                {
                    // Refused by itself unless the whole segment is stored.
                    if let Err(error) = writer.delete_pieces(name).await {
                        tracing::debug!(segment = %name, %error, "tail pieces stay in the repository");
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "old tail pieces were not looked for"),
        }
    }

    /// The whole segment has replaced its pieces. Without the right to delete they stay, which does no harm.
    async fn drop_pieces(&self, writer: &RepositoryWriter, segment: SegmentName) {
        if self.tail_on
            && let Err(error) = writer.delete_pieces(segment).await
        {
            tracing::debug!(%segment, %error, "tail pieces stay in the repository");
        }
    }
}

/// Who has the lease now, if it was taken and did not only run out.
fn lost_to(error: RepositoryError) -> Option<String> {
    match error {
        RepositoryError::LeaseLost { by, .. } => by,
        _ => None,
    }
}

/// The message with its causes, then what to do.
pub fn describe(error: &RepositoryError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    format!("{text}; {}", error.hint())
}

/// The whole segment that an entry holds, or whose last part it is.
pub(super) fn segment_of(entry: &QueueEntry, size: SegmentSize) -> Option<SegmentName> {
    let name = entry.relative.split('/').nth(2)?;
    SegmentName::parse(name.split('.').next()?, size).ok()
}
