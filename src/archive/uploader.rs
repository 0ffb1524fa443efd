//! Ships what is spooled to one repository: several objects at once, retried without an end, proven by a read-back.
//!
//! Nothing here decides what is durable; it only learns what the repository holds. A spool file is removed when every repository
//! was seen to hold it (I8). Other content under a key of ours is never overwritten: archiving stops (I2).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::assembler::AssemblerSettings;
use super::backlog::Backlog;
use super::confirmed::Confirmed;
use super::course::Courses;
use super::pace::Pace;
use super::ship::Shipped;
use super::tail::Tail;
use super::tenure::RELEASE_LIMIT;
use super::turn::Turn;
use super::{ArchiveError, Halt, Missing};
use crate::failure::NextStep;
use crate::queue::QueueEntry;
use crate::repository::{
    Archive, LEASE_RENEW, Lease, LeaseHolder, Piece as StoredPiece, RepositoryError, RepositoryWriter,
};
use crate::spool::Spool;
use crate::storage::ObjectStore;
use crate::telemetry::{Board, CauseCode, RepositoryBoard};
use crate::wal::{Lsn, PgTime, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// The server's position is asked every two seconds, so it is seldom written more often than that.
const COVERAGE_INTERVAL: Duration = Duration::from_millis(500);
/// A server that has written nothing for so long is a quiet one, and `coverage.json` is written as seldom as `COVERAGE_QUIET` then.
pub(super) const QUIET_AFTER: Duration = Duration::from_secs(60);
pub(super) const COVERAGE_QUIET: Duration = Duration::from_secs(10);
/// How often queue figures are refreshed when nothing happens.
const IDLE_TICK: Duration = Duration::from_secs(1);
/// A small request that takes longer is not answered.
pub(super) const SILENT_AFTER: Duration = Duration::from_secs(15);
/// How long the store is not asked again what it holds.
const ASK_PAUSE: Duration = Duration::from_millis(300);
/// How often the live path is asked to compare with the server what a repository holds, which begins the stream anew.
const PROOF_PAUSE: Duration = Duration::from_secs(30);
const PROOF_PAUSE_MAX: Duration = Duration::from_secs(600);
/// How long pieces that could not be removed are left alone.
const DROP_PAUSE: Duration = Duration::from_secs(5);
/// How long a piece is left alone whose bytes could not be read.
const PIECE_PAUSE: Duration = Duration::from_millis(500);

/// What a repository may refuse while it takes the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    /// Whole segments, histories, gaps.
    Objects,
    Pieces,
    /// The lease, listings.
    Requests,
}

/// Which repositories answer with errors now, and to what; the cause names them.
#[derive(Debug, Default)]
pub struct Failing(Mutex<BTreeMap<(String, Work), String>>);

impl Failing {
    /// The names of those that fail now.
    pub(super) fn names(&self) -> BTreeSet<String> {
        let failing = self.0.lock().expect("no one panics while holding it");
        failing.keys().map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn set(&self, board: &Board, shown: &RepositoryBoard, work: Work, error: Option<String>) {
        let mut failing = self.0.lock().expect("no one panics while holding it");
        let key = (shown.name().to_owned(), work);
        match error {
            Some(message) => failing.insert(key, message),
            None => failing.remove(&key),
        };
        let own = failing.iter().find(|((name, _), _)| name == shown.name());
        shown.set_error(own.map(|(_, message)| message.clone()));
        match failing.iter().next() {
            None => board.clear(CauseCode::StoreFailing),
            Some(((name, _), message)) => {
                board.raise(CauseCode::StoreFailing, format!("repository {name}: {message}"));
            }
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
    /// WAL must be in it to be archived. One that is not holds nothing up: not the others, not base backups, not the end.
    pub required: bool,
    pub holder: LeaseHolder,
    pub spool: Spool,
    pub backlog: Arc<Backlog>,
    pub tail: Arc<Tail>,
    /// `None`: the tail is off.
    pub tail_interval: Option<Duration>,
    /// A piece is sent sooner when so many bytes wait.
    pub tail_bytes: u64,
    /// The server is told what the repositories hold: commits may wait for it.
    pub durable_in_repository: bool,
    pub pace: Pace,
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
    pub confirmed: Confirmed,
    /// While another agent holds the lease the live path stands by as well.
    pub turn: Turn,
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
}

pub(super) enum Ended {
    Shutdown,
    /// Another agent has a repository in front of this one.
    NotOurTurn,
    /// Taken by another agent, or `None`: not renewed in time, because the store did not answer.
    LeaseLost {
        by: Option<String>,
    },
    Halted,
}

/// Where one repository stands while this agent writes to it.
#[derive(Default)]
pub(super) struct Stand {
    /// What it holds in front of the first object to ship was looked at.
    joined: bool,
    joining: bool,
    /// What it is looked at for came while it was looked at.
    join_again: bool,
    /// It cannot be looked at yet.
    join_waits: bool,
    /// The segment from which on the pieces of its timeline were listed.
    listed: Option<SegmentName>,
    listing: bool,
    /// The timeline in which it was looked for pieces that a crash left.
    tidied: Option<TimelineId>,
    /// Pieces stay: this agent may not delete.
    pieces_stay: bool,
    /// When the live path was last asked for the proof that what is stored is the server's, and how long it is not asked again.
    proof_asked: Option<(Instant, Duration)>,
    /// The last look failed, or came too early.
    ask_not_before: Option<Instant>,
    /// Segments that are stored whole, whose pieces are to go once they are proven and none of them is on its way any more.
    replaced: BTreeSet<SegmentName>,
    dropping: bool,
    /// The last attempt failed.
    drop_not_before: Option<Instant>,
    /// Segments of which pieces were found then.
    in_pieces: BTreeSet<SegmentName>,
    pub(super) courses: Courses,
    /// What the repository holds without a hole.
    pub(super) reach: Lsn,
    /// When the last piece was sent.
    pub(super) piece_sent: Option<Instant>,
    /// A piece could not be read: the file is waited for.
    pub(super) piece_not_before: Option<Instant>,
    /// Small requests that are on their way, since when.
    renewing: Option<Instant>,
    covering: Option<Instant>,
    covered: Covered,
    /// The lease's renewal failed or is not answered, and that was told.
    silent: bool,
}

impl Stand {
    /// Whether it is known which pieces are there of a segment.
    pub(super) fn is_listed(&self, segment: SegmentName) -> bool {
        self.listed.is_some_and(|from| from.timeline() == segment.timeline() && from <= segment)
    }
}

/// What `coverage.json` was told last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Covered {
    pub(super) until: Option<PgTime>,
    pub(super) archived: Option<Lsn>,
    /// When the position in it last moved, and when it was last written.
    pub(super) moved: Option<Instant>,
    pub(super) written: Option<Instant>,
}

/// What became of the pieces of a segment that is stored whole.
pub(super) enum Dropped {
    Gone,
    /// This agent may not delete.
    Denied,
    Later,
}

/// What is done beside the uploads, so that none of it holds them up.
enum Chore {
    Joined(Result<bool, RepositoryError>),
    Listed {
        from: SegmentName,
        found: Result<Vec<(SegmentName, Vec<StoredPiece>)>, RepositoryError>,
    },
    Renewed(Result<(), RepositoryError>),
    Covered(Option<(PgTime, Lsn)>),
    /// Whether it may delete.
    Tidied(bool),
    Dropped {
        segment: SegmentName,
        done: Dropped,
    },
}

impl Uploader {
    pub(super) fn tell_store(&self, work: Work, error: Option<String>) {
        self.failing.set(&self.board, &self.shown, work, error);
    }

    /// Ships for as long as the lease is held.
    pub(super) async fn work(&mut self, lease: Lease) -> Ended {
        let writer = RepositoryWriter::new(self.archive.clone(), lease.clone());
        let mut ships: JoinSet<Shipped> = JoinSet::new();
        let mut chores: JoinSet<Chore> = JoinSet::new();
        let mut in_flight: Vec<String> = Vec::new();
        let mut stand = Stand::default();
        let mut backlog_changed = self.backlog.subscribe();
        let mut tail_changed = self.tail.subscribe();
        let mut renew = tokio::time::interval(LEASE_RENEW);
        let mut tick = tokio::time::interval(IDLE_TICK);
        let mut coverage = tokio::time::interval(COVERAGE_INTERVAL);
        let cancel = self.shutdown.child_token();
        let _stop_ships = cancel.clone().drop_guard();
        loop {
            self.begin_chores(&writer, &mut stand, &mut chores);
            self.show(&mut stand);
            let room = self.concurrency.saturating_sub(in_flight.len());
            for entry in self.backlog.pending(self.shown.name(), &in_flight, room) {
                in_flight.push(entry.relative.clone());
                // What lies there already must be what takes its place, or the beginning of it.
                let may_have_pieces = segment_of(&entry, self.segment_size)
                    .is_some_and(|segment| !stand.is_listed(segment) || stand.in_pieces.contains(&segment));
                ships.spawn(self.clone().ship_entry(writer.clone(), entry, may_have_pieces, cancel.clone()));
            }
            while let Some(piece) = self.next_piece(&mut stand) {
                ships.spawn(self.clone().ship_piece(writer.clone(), piece, cancel.clone()));
            }
            let due = self.piece_due(&stand).filter(|due| *due > Instant::now());
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
                () = self.shutdown.cancelled() => {
                    end_renewal(&mut chores, &mut stand).await;
                    return Ended::Shutdown;
                }
                () = self.halt.halted() => return Ended::Halted,
                () = self.turn.leaves(self.shown.name()) => return Ended::NotOurTurn,
                _ = backlog_changed.changed() => stand.join_waits = false,
                _ = tail_changed.changed() => {}
                _ = tick.tick() => self.tell_silence(&mut stand),
                _ = coverage.tick() => if stand.covering.is_none() && self.is_coverage_due(&stand.covered) {
                    stand.covering = Some(Instant::now());
                    let (uploader, writer, covered) = (self.clone(), writer.clone(), stand.covered);
                    chores.spawn(async move { Chore::Covered(uploader.put_coverage(&writer, covered).await) });
                },
                _ = renew.tick() => if stand.renewing.is_none() {
                    stand.renewing = Some(Instant::now());
                    let lease = lease.clone();
                    chores.spawn(async move { Chore::Renewed(lease.renew().await) });
                },
                Some(done) = chores.join_next() => match done {
                    Ok(chore) => if let Some(ended) = self.end_chore(chore, &mut stand) {
                        return ended;
                    },
                    Err(panic) => {
                        self.halt.stop(ArchiveError::Internal { why: panic.to_string() });
                        return Ended::Halted;
                    }
                },
                Some(shipped) = ships.join_next() => match shipped {
                    Ok(Shipped::Segment { entry }) => {
                        in_flight.retain(|name| *name != entry.relative);
                        if entry.relative.starts_with("wal/")
                            && let Some(segment) = segment_of(&entry, self.segment_size)
                            && (stand.in_pieces.remove(&segment) || self.tail_interval.is_some() || self.durable_in_repository)
                        {
                            stand.replaced.insert(segment);
                        }
                        if entry.relative.starts_with("gaps/") && !self.required {
                            // It may be a gap of this repository alone, which was not told before it is known here.
                            stand.joined = false;
                            stand.join_again = stand.joining;
                        }
                    }
                    Ok(Shipped::Released { entry }) => in_flight.retain(|name| *name != entry.relative),
                    Ok(Shipped::Piece { segment, start, end }) => {
                        self.tell_store(Work::Pieces, None);
                        self.pace.went_well();
                        stand.courses.stored(segment, start, end);
                    }
                    Ok(Shipped::PieceGone { segment, start }) => {
                        stand.courses.given_up(segment, start);
                        stand.piece_not_before = Some(Instant::now() + PIECE_PAUSE);
                    }
                    Ok(Shipped::Cancelled) => {
                        end_renewal(&mut chores, &mut stand).await;
                        return Ended::Shutdown;
                    }
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

    /// Looks what the repository holds, where that is not known yet.
    fn begin_chores(&self, writer: &RepositoryWriter, stand: &mut Stand, chores: &mut JoinSet<Chore>) {
        if stand.ask_not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        if !stand.joined && !stand.joining && !stand.join_waits {
            stand.joining = true;
            let (uploader, writer) = (self.clone(), writer.clone());
            chores.spawn(async move { Chore::Joined(uploader.join_on(&writer).await) });
        }
        if !stand.listing
            && self.first_tailed().is_some_and(|segment| !stand.is_listed(segment))
            && let Some(from) = self.pieces_needed()
        {
            stand.listing = true;
            let (uploader, writer) = (self.clone(), writer.clone());
            chores.spawn(async move { Chore::Listed { from, found: uploader.list_pieces(&writer, from).await } });
        }
        let unproven = |from: &SegmentName| self.tail.judged(self.shown.name(), from.timeline()).is_none();
        if stand.listed.is_some_and(|from| unproven(&from))
            && stand.proof_asked.is_none_or(|(at, pause)| at.elapsed() > pause)
        {
            // One that never answers in time must not disturb the others for ever.
            let pause = stand.proof_asked.map_or(PROOF_PAUSE, |(_, pause)| (pause * 2).min(PROOF_PAUSE_MAX));
            stand.proof_asked = Some((Instant::now(), pause));
            self.tail.prove_again(self.shown.name());
        }
        if stand.pieces_stay {
            stand.replaced.clear();
        }
        if !stand.dropping
            && stand.drop_not_before.is_none_or(|at| at <= Instant::now())
            && let Some(&segment) =
                stand.replaced.iter().find(|segment| self.is_proven(**segment) && !stand.courses.is_sent(**segment))
        {
            stand.dropping = true;
            let (uploader, writer) = (self.clone(), writer.clone());
            chores.spawn(async move { Chore::Dropped { segment, done: uploader.drop_pieces(&writer, segment).await } });
        }
        let untidied = |from: &SegmentName| stand.tidied != Some(from.timeline()) && self.is_proven(*from);
        if let Some(listed) = stand.listed.filter(untidied) {
            stand.tidied = Some(listed.timeline());
            let (uploader, writer) = (self.clone(), writer.clone());
            chores.spawn(async move { Chore::Tidied(uploader.tidy_pieces(&writer, listed).await) });
        }
    }

    /// Whether what is stored of the segment's timeline is known to be the server's own.
    pub(super) fn is_proven(&self, segment: SegmentName) -> bool {
        self.tail.judged(self.shown.name(), segment.timeline()) == Some(true)
    }

    /// A store that hangs fails no request for a long time; that it does not answer shows sooner (I19).
    fn tell_silence(&self, stand: &mut Stand) {
        let since = stand.renewing.into_iter().chain(stand.covering).min();
        if since.is_some_and(|since| since.elapsed() > SILENT_AFTER) && !stand.silent {
            stand.silent = true;
            self.tell_store(Work::Requests, Some(self.silence()));
        }
    }

    pub(super) fn silence(&self) -> String {
        format!(
            "{} has not answered for {} s; check that it is up and can be reached from here",
            self.archive.url(),
            SILENT_AFTER.as_secs()
        )
    }

    fn end_chore(&self, chore: Chore, stand: &mut Stand) -> Option<Ended> {
        match chore {
            Chore::Joined(Ok(joined)) => {
                // Where shipping begins is not known before the first connection, which the backlog tells.
                stand.join_waits = !joined;
                (stand.joined, stand.joining) = (joined && !std::mem::take(&mut stand.join_again), false);
                if joined && !stand.silent {
                    self.tell_store(Work::Requests, None);
                }
            }
            Chore::Listed { from, found: Ok(found) } => {
                found.iter().for_each(|(segment, pieces)| stand.courses.listed(*segment, pieces));
                stand.in_pieces.extend(found.iter().map(|(segment, _)| *segment));
                (stand.listed, stand.listing) = (Some(from), false);
                if !stand.silent {
                    self.tell_store(Work::Requests, None);
                }
            }
            Chore::Joined(Err(error)) => {
                (stand.joining, stand.ask_not_before) = (false, Some(Instant::now() + ASK_PAUSE));
                self.tell_store(Work::Requests, Some(describe(&error)));
            }
            Chore::Listed { found: Err(error), .. } => {
                (stand.listing, stand.ask_not_before) = (false, Some(Instant::now() + ASK_PAUSE));
                self.tell_store(Work::Requests, Some(describe(&error)));
            }
            Chore::Renewed(renewed) => {
                stand.renewing = None;
                match renewed {
                    Ok(()) if std::mem::take(&mut stand.silent) => self.tell_store(Work::Requests, None),
                    Ok(()) => {}
                    Err(error) if error.is_lease_lost() => return Some(Ended::LeaseLost { by: lost_to(error) }),
                    Err(error) => {
                        stand.silent = true;
                        self.tell_store(Work::Requests, Some(describe(&error)));
                    }
                }
            }
            Chore::Covered(written) => {
                stand.covering = None;
                if let Some((until, archived)) = written {
                    let now = Some(Instant::now());
                    let moved = if stand.covered.archived == Some(archived) { stand.covered.moved } else { now };
                    stand.covered = Covered { until: Some(until), archived: Some(archived), moved, written: now };
                }
            }
            Chore::Tidied(may_delete) => stand.pieces_stay |= !may_delete,
            Chore::Dropped { segment, done } => {
                stand.dropping = false;
                match done {
                    Dropped::Gone => {
                        stand.replaced.remove(&segment);
                    }
                    Dropped::Denied => stand.pieces_stay = true,
                    Dropped::Later => stand.drop_not_before = Some(Instant::now() + DROP_PAUSE),
                }
            }
        }
        None
    }

    /// A conflict, or damage that cannot be cured here: archiving stops, what is spooled stays.
    fn stop_for(&self, error: &ArchiveError, what: &str) {
        self.shown.upload_failed();
        let message = format!("repository {}: {what}: {}; {}", self.shown.name(), error.describe(), error.hint());
        let cause = match error {
            ArchiveError::Repository(error) if error.is_conflict() => CauseCode::Conflict,
            ArchiveError::Repository(_) => CauseCode::StoreFailing,
            _ => CauseCode::SpoolFailing,
        };
        self.refuse(cause, message.clone(), ArchiveError::Refused { why: message });
    }

    /// Where the first segment starts that this repository lacks, and its timeline: everything before is there or told as a gap.
    /// A segment that was lost from the spool is waited for (I3).
    pub(super) fn whole_until(&self) -> Option<(TimelineId, Lsn)> {
        let (timeline, end) = self.backlog.whole_until(self.shown.name())?;
        let timeline = TimelineId::new(timeline).ok()?;
        Some((timeline, self.missing.first_start(timeline).map_or(end, |missing| missing.min(end))))
    }

    /// Moves the figures: what this repository holds without a gap, tail included.
    fn show(&self, stand: &mut Stand) {
        if let Some((timeline, sealed)) = self.whole_until().filter(|_| stand.joined) {
            stand.courses.forget_before(timeline, sealed);
            // Pieces that were found are of nobody's history before they are proven (I1).
            let reach = match self.tail.judged(self.shown.name(), timeline) {
                Some(true) => stand.courses.reach(timeline, sealed, self.segment_size),
                Some(false) | None => sealed,
            };
            // Behind a switch the old timeline may have gone on, which says nothing of the new one.
            stand.reach = self.board.on_timeline(timeline, reach);
            self.shown.set_archived(stand.reach);
            self.confirmed.set(self.shown.name(), timeline, reach);
        }
        let (segments, bytes) = self.backlog.depth();
        self.board.set_queue(segments, bytes);
    }

    /// The spool's copy is damaged, or has vanished: it is set aside, and the live path takes the bytes again from the server (D4).
    async fn fetch_again(&self, relative: &str, error: &ArchiveError) {
        let message = format!("{relative} in the spool: {}; it is fetched again", error.describe());
        self.board.raise(CauseCode::SpoolFailing, message);
        let (backlog, spool, relative) = (self.backlog.clone(), self.spool.clone(), relative.to_owned());
        let (missing, size) = (self.missing.clone(), self.segment_size);
        let job = tokio::task::spawn_blocking(move || -> Result<(), ArchiveError> {
            let Some(entry) = backlog.entry(&relative) else { return Ok(()) };
            if spool.quarantine(&spool.folder().join(&relative))? {
                backlog.forget(&entry);
            } else {
                backlog.lose(&entry);
            }
            if let Some(segment) = segment_of(&entry, size) {
                missing.add(segment);
            } else if let Some(timeline) = history_of(&relative) {
                missing.add_history(timeline);
            }
            Ok(())
        });
        match job.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.halt.stop(error),
            Err(panic) => self.halt.stop(ArchiveError::Internal { why: panic.to_string() }),
        }
    }
}

/// A renewal that is on its way would come after the release, and hold the next agent up.
async fn end_renewal(chores: &mut JoinSet<Chore>, stand: &mut Stand) {
    let ended = async {
        while stand.renewing.is_some() {
            match chores.join_next().await {
                Some(Ok(Chore::Renewed(_))) | None => stand.renewing = None,
                Some(_) => {}
            }
        }
    };
    // One that takes longer runs out by itself.
    let _ = tokio::time::timeout(RELEASE_LIMIT, ended).await;
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

/// The timeline whose history file this is.
pub(super) fn history_of(relative: &str) -> Option<TimelineId> {
    TimelineId::from_hex(relative.strip_prefix("wal/")?.strip_suffix(".history")?).ok()
}

/// The whole segment that an entry holds, or whose last part it is.
pub(super) fn segment_of(entry: &QueueEntry, size: SegmentSize) -> Option<SegmentName> {
    let name = entry.relative.split('/').nth(2)?;
    SegmentName::parse(name.split('.').next()?, size).ok()
}
