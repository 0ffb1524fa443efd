use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::alert::{self, AlertSettings, Verdict};
use super::cause::{Cause, CauseCode};
use super::clock::Clock;
use super::counters::{Counter, Odometer, Position, Stage};
use super::facts::{BackupFacts, GapFact, SlotFacts};
use super::progress::{self, FlushSamples};
use super::repository::{RepositoryBoard, RepositoryState};
use super::snapshot::Snapshot;
use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineId};

/// What the board is told at the start and that does not change.
pub struct BoardSetup {
    pub cluster: String,
    pub slot: String,
    pub repositories: Vec<BoardRepository>,
    pub alert: AlertSettings,
    pub clock: Arc<dyn Clock>,
}

#[derive(Clone, Debug)]
pub struct BoardRepository {
    pub name: String,
    /// For people; never a secret.
    pub url: String,
    /// Whether `archived` waits for it.
    pub required: bool,
}

/// The board. A handle: clones share it. Every call is short, does no I/O and may come from any thread, the live path's too.
#[derive(Clone)]
pub struct Board {
    shared: Arc<Shared>,
}

struct Shared {
    cluster: String,
    slot: String,
    clock: Arc<dyn Clock>,
    received: Position,
    durable: Position,
    received_bytes: Counter,
    durable_bytes: Odometer,
    archived_bytes: Odometer,
    repositories: Vec<RepositoryState>,
    /// The server waits for this agent at each commit, as its synchronous standby.
    waited_for: AtomicBool,
    /// Milliseconds in which waiting commits returned without the repositories' word.
    unguarded: Counter,
    facts: Mutex<Facts>,
}

/// Beyond it S3 refuses signatures sooner or later, and times in logs mislead.
const CLOCK_SKEW_SECONDS_MAX: f64 = 60.0;

/// A cause, and whether the log has told it as an error.
struct Standing {
    cause: Cause,
    announced: bool,
}

/// What changes seldom.
struct Facts {
    alert: AlertSettings,
    causes: BTreeMap<CauseCode, Standing>,
    connected: bool,
    system_identifier: Option<SystemIdentifier>,
    segment_size: Option<SegmentSize>,
    timeline: Option<TimelineId>,
    timeline_begin: Lsn,
    samples: FlushSamples,
    /// `received` when it was last looked at, and since when (monotonic) it has stood there.
    received_seen: (Option<Lsn>, Duration),
    /// Monotonic; `None` while not connected.
    connected_since: Option<Duration>,
    /// The server's clock when it was last told, and the monotonic time of hearing it.
    server_clock: Option<(PgTime, Duration)>,
    slot: SlotFacts,
    queue: Option<(u64, u64)>,
    spool_free_bytes: Option<u64>,
    gaps: Vec<GapFact>,
    /// A repository was asked for those of before.
    gaps_known: bool,
    /// From where on it was not proven that what is archived is of the same history as what was held.
    unproven_at: Option<Lsn>,
    diverged: Option<Lsn>,
    backup_running: bool,
    last_backup: Option<BackupFacts>,
    backup_failures: u64,
    window_start: Option<PgTime>,
    repository_errors: Vec<Option<String>>,
}

impl Board {
    /// Everything is unknown, and `not_connected` stands until the first connection: a new agent has proved nothing yet.
    pub fn new(setup: BoardSetup) -> Self {
        let now = setup.clock.wall();
        let not_connected = Cause {
            code: CauseCode::NotConnected,
            message: "the agent has started and is not connected to the server yet".into(),
            since: now,
        };
        let facts = Facts {
            alert: setup.alert,
            causes: BTreeMap::from([(CauseCode::NotConnected, Standing { cause: not_connected, announced: false })]),
            connected: false,
            system_identifier: None,
            segment_size: None,
            timeline: None,
            timeline_begin: Lsn::ZERO,
            samples: FlushSamples::default(),
            received_seen: (None, setup.clock.monotonic()),
            connected_since: None,
            server_clock: None,
            slot: SlotFacts::default(),
            queue: None,
            spool_free_bytes: None,
            gaps: Vec::new(),
            gaps_known: false,
            unproven_at: None,
            diverged: None,
            backup_running: false,
            last_backup: None,
            backup_failures: 0,
            window_start: None,
            repository_errors: vec![None; setup.repositories.len()],
        };
        let repositories = setup.repositories.into_iter().map(RepositoryState::new).collect();
        let shared = Shared {
            cluster: setup.cluster,
            slot: setup.slot,
            clock: setup.clock,
            received: Position::default(),
            durable: Position::default(),
            received_bytes: Counter::default(),
            durable_bytes: Odometer::default(),
            archived_bytes: Odometer::default(),
            repositories,
            waited_for: AtomicBool::new(false),
            unguarded: Counter::default(),
            facts: Mutex::new(facts),
        };
        Self { shared: Arc::new(shared) }
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Facts are plain values, each set in one go, so they are whole even if a thread died in between.
        self.shared.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // identity and connection

    pub fn set_identity(&self, system_identifier: SystemIdentifier, segment_size: SegmentSize) {
        let mut facts = self.facts();
        facts.system_identifier = Some(system_identifier);
        facts.segment_size = Some(segment_size);
    }

    /// The timeline that is archived now, and where it begins: its switch, or zero for the first.
    pub fn set_timeline(&self, timeline: TimelineId, begin: Lsn) {
        let mut facts = self.facts();
        if facts.timeline.is_some_and(|before| before != timeline) {
            // What is archived of another timeline behind the switch says nothing of this one.
            for repository in &self.shared.repositories {
                if repository.archived.get().is_some_and(|position| position > begin) {
                    repository.archived.set(begin);
                }
            }
        }
        (facts.timeline, facts.timeline_begin) = (Some(timeline), begin);
    }

    /// A position on `timeline` as one on the timeline that is archived now: of another one no more than what lies before the switch
    /// belongs to it.
    pub fn on_timeline(&self, timeline: TimelineId, position: Lsn) -> Lsn {
        let facts = self.facts();
        if facts.timeline.is_none_or(|of| of == timeline) { position } else { position.min(facts.timeline_begin) }
    }

    /// WAL streams. Clears `not_connected`.
    pub fn set_connected(&self) {
        let mut facts = self.facts();
        facts.connected = true;
        facts.connected_since.get_or_insert(self.shared.clock.monotonic());
        facts.clear(CauseCode::NotConnected, self.shared.clock.wall());
    }

    pub fn set_waited_for(&self, waited_for: bool) {
        self.shared.waited_for.store(waited_for, Ordering::Relaxed);
    }

    pub fn is_waited_for(&self) -> bool {
        self.shared.waited_for.load(Ordering::Relaxed)
    }

    /// Commits that waited for this agent returned for so long without the repositories' word.
    pub fn count_unguarded(&self, time: Duration) {
        self.shared.unguarded.add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    }

    /// Raises `not_connected`. The positions stay: what is held is held.
    pub fn set_disconnected(&self, message: impl Into<String>) {
        let mut facts = self.facts();
        facts.connected = false;
        self.shared.waited_for.store(false, Ordering::Relaxed);
        facts.connected_since = None;
        facts.raise(CauseCode::NotConnected, message.into(), self.shared.clock.wall(), true);
    }

    // positions

    pub fn set_received(&self, position: Lsn) {
        self.shared.received.set(position);
    }

    pub fn set_durable(&self, position: Lsn) {
        self.shared.durable.set(position);
        self.shared.durable_bytes.moved(position, position);
    }

    pub fn received(&self) -> Option<Lsn> {
        self.shared.received.get()
    }

    pub fn durable(&self) -> Option<Lsn> {
        self.shared.durable.get()
    }

    /// The lowest position of the required repositories; unknown as long as one of them is.
    pub fn archived(&self) -> Option<Lsn> {
        let required = self.shared.repositories.iter().filter(|repository| repository.fixed.required);
        let positions: Option<Vec<Lsn>> = required.map(|repository| repository.archived.get()).collect();
        positions?.into_iter().min()
    }

    /// One handle per repository, in the order of the setup.
    pub fn repositories(&self) -> Vec<RepositoryBoard> {
        (0..self.shared.repositories.len()).map(|index| RepositoryBoard::new(self.clone(), index)).collect()
    }

    pub(super) fn repository(&self, index: usize) -> &RepositoryState {
        &self.shared.repositories[index] // the list never changes, and `repositories` alone makes indices
    }

    pub(super) fn set_repository_error(&self, index: usize, error: Option<String>) {
        self.facts().repository_errors[index] = error;
    }

    /// WAL bytes taken from the server. Those of the later stages are counted by their positions.
    pub fn count_received(&self, bytes: u64) {
        self.shared.received_bytes.add(bytes);
    }

    /// A repository's position moved: counts what every required one has now.
    pub(super) fn count_archived(&self) {
        if let Some(archived) = self.archived() {
            // Shipped before it was first looked at: what lies behind the start of this agent's own WAL is its work all the same.
            let begin = self.shared.durable_bytes.begun().map_or(archived, |begun| begun.min(archived));
            self.shared.archived_bytes.moved(begin, archived);
        }
    }

    fn wal_bytes(&self, stage: Stage) -> u64 {
        match stage {
            Stage::Received => self.shared.received_bytes.get(),
            Stage::Durable => self.shared.durable_bytes.bytes(),
            Stage::Archived => self.shared.archived_bytes.bytes(),
        }
    }

    /// The server's flush position. `server_time` must have been noted *before* the position was asked for; asked every few
    /// seconds, idle or not. A position lower than the last one forgets the earlier samples: it is another history.
    pub fn note_flush_sample(&self, server_time: PgTime, flush: Lsn) {
        let monotonic = self.shared.clock.monotonic();
        self.facts().samples.note(server_time, flush, monotonic);
    }

    /// As far as the server is known to have flushed; what was received was flushed before.
    pub fn server_end(&self) -> Option<Lsn> {
        let received = self.received();
        self.facts().samples.flush().max(received)
    }

    /// Another server is asked from now on: what the one before said of its position and its clock says nothing about this one.
    pub fn forget_server(&self) {
        let mut facts = self.facts();
        facts.samples = FlushSamples::default();
        facts.server_clock = None;
        facts.slot = SlotFacts::default();
    }

    /// The server's clock, as it came in an answer or a keepalive just now. Warns when ours is far from it.
    pub fn note_server_clock(&self, server: PgTime) {
        let (monotonic, wall) = (self.shared.clock.monotonic(), self.shared.clock.wall());
        self.facts().server_clock = Some((server, monotonic));
        let skew = server.seconds_since(wall).max(wall.seconds_since(server));
        if skew > CLOCK_SKEW_SECONDS_MAX {
            let message = format!("the server's clock and this host's differ by {skew:.0} s; synchronise them (NTP)");
            self.raise(CauseCode::ClockSkew, message);
        } else {
            self.clear(CauseCode::ClockSkew);
        }
    }

    /// The server's time now, at most (never later than its clock shows); `None` before it was told.
    pub fn server_now(&self) -> Option<PgTime> {
        let monotonic = self.shared.clock.monotonic();
        let (server, heard) = self.facts().server_clock?;
        let passed = i64::try_from(monotonic.saturating_sub(heard).as_micros()).ok()?;
        Some(PgTime::from_pg_micros(server.pg_micros().saturating_add(passed)))
    }

    /// Every commit that the server acknowledged before this time is in every required repository.
    pub fn complete_until(&self) -> Option<PgTime> {
        self.complete_until_at(self.archived()?)
    }

    /// The same for whoever holds everything before `position`.
    pub fn complete_until_at(&self, position: Lsn) -> Option<PgTime> {
        self.facts().samples.complete_until(position)
    }

    // facts

    /// `None`: nothing is known of it.
    pub fn set_slot(&self, slot: Option<SlotFacts>) {
        self.facts().slot = slot.unwrap_or_default();
    }

    pub fn set_queue(&self, segments: u64, bytes: u64) {
        self.facts().queue = Some((segments, bytes));
    }

    pub fn set_spool_free(&self, bytes: Option<u64>) {
        self.facts().spool_free_bytes = bytes;
    }

    /// All gaps known. Whether they raise a cause is the caller's decision.
    pub fn set_gaps(&self, gaps: Vec<GapFact>) {
        let mut facts = self.facts();
        facts.gaps = gaps;
        facts.gaps_known = true;
    }

    /// A repository has told what gaps there are from before: what was added is all.
    pub fn set_gaps_known(&self) {
        self.facts().gaps_known = true;
    }

    /// Clears `gap`, and `slot_lost` with it, if every gap known is past.
    pub fn settle_gaps(&self, is_past: impl Fn(&GapFact) -> bool) {
        let now = self.shared.clock.wall();
        let mut facts = self.facts();
        if facts.causes.contains_key(&CauseCode::Gap) && facts.gaps.iter().all(is_past) {
            facts.clear(CauseCode::Gap, now);
            facts.clear(CauseCode::SlotLost, now);
        }
    }

    /// WAL that follows what was held has come, and the slot keeps it: a slot that was lost before has cost nothing, unless there is
    /// a gap.
    pub fn settle_slot(&self) {
        let now = self.shared.clock.wall();
        let mut facts = self.facts();
        if !facts.causes.contains_key(&CauseCode::Gap) {
            facts.clear(CauseCode::SlotLost, now);
        }
    }

    /// Raises `continuity_unproven` for what follows `at`.
    pub fn raise_unproven(&self, at: Lsn, message: impl Into<String>) {
        let now = self.shared.clock.wall();
        let mut facts = self.facts();
        facts.unproven_at = facts.unproven_at.max(Some(at));
        facts.raise(CauseCode::ContinuityUnproven, message.into(), now, true);
    }

    /// Clears it if nothing from before that position is needed any more.
    pub fn settle_unproven(&self, is_past: impl Fn(Lsn) -> bool) {
        let now = self.shared.clock.wall();
        let mut facts = self.facts();
        if facts.unproven_at.is_some_and(is_past) {
            facts.unproven_at = None;
            facts.clear(CauseCode::ContinuityUnproven, now);
        }
    }

    /// Adds a gap that was just found. False if it is known already.
    pub fn add_gap(&self, gap: GapFact) -> bool {
        let gaps = &mut self.facts().gaps;
        let span = |gap: &GapFact| (gap.timeline, gap.from_lsn, gap.to_lsn);
        let is_new = !gaps.iter().any(|known| span(known) == span(&gap));
        if is_new {
            gaps.push(gap);
        }
        is_new
    }

    /// What a window depends on besides its backup: another timeline or another gap begins or ends one.
    pub fn course(&self) -> (Option<TimelineId>, usize) {
        let facts = self.facts();
        (facts.timeline, facts.gaps.len())
    }

    /// The first position where the server's WAL differs from what is held. The caller raises the cause.
    pub fn set_diverged(&self, first_difference: Option<Lsn>) {
        self.facts().diverged = first_difference;
    }

    pub fn backup_started(&self) {
        self.facts().backup_running = true;
    }

    /// Clears `backup_failed`.
    pub fn backup_succeeded(&self, backup: BackupFacts) {
        let mut facts = self.facts();
        facts.backup_running = false;
        facts.last_backup = Some(backup);
        facts.clear(CauseCode::BackupFailed, self.shared.clock.wall());
    }

    /// Raises `backup_failed` and counts it.
    pub fn backup_failed(&self, message: impl Into<String>) {
        let mut facts = self.facts();
        facts.backup_running = false;
        facts.backup_failures += 1;
        facts.raise(CauseCode::BackupFailed, message.into(), self.shared.clock.wall(), true);
    }

    pub fn is_backup_running(&self) -> bool {
        self.facts().backup_running
    }

    /// What a repository's catalog says at the start.
    pub fn set_last_backup(&self, backup: Option<BackupFacts>) {
        self.facts().last_backup = backup;
    }

    /// The first moment that can be restored in the window that reaches the present.
    pub fn set_window_start(&self, start: Option<PgTime>) {
        self.facts().window_start = start;
    }

    // causes

    /// Keeps the first `since` and updates the message. The board logs the transition, so the caller does not.
    pub fn raise(&self, code: CauseCode, message: impl Into<String>) {
        self.facts().raise(code, message.into(), self.shared.clock.wall(), true);
    }

    pub fn clear(&self, code: CauseCode) {
        self.facts().clear(code, self.shared.clock.wall());
    }

    pub fn is_raised(&self, code: CauseCode) -> bool {
        self.facts().causes.contains_key(&code)
    }

    /// New thresholds, from the next evaluation on.
    pub fn set_alert(&self, alert: AlertSettings) {
        self.facts().alert = alert;
    }

    /// What is known now. Compares it with the thresholds first, and raises or clears `lag`, `rpo` and `slot_retention`: a snapshot
    /// never tells a state that has passed.
    pub fn snapshot(&self) -> Snapshot {
        let monotonic = self.shared.clock.monotonic();
        let wall = self.shared.clock.wall();
        let received = self.received();
        let archived = self.archived();
        let mut facts = self.facts();
        if facts.received_seen.0 != received {
            facts.received_seen = (received, monotonic);
        }
        let mut snapshot = self.collect(&facts, received, archived, monotonic);
        for verdict in alert::evaluate(&snapshot, &facts.alert) {
            match verdict {
                Verdict::Raise { code, message, settled } => facts.raise(code, message, wall, settled),
                Verdict::Clear(code) => facts.clear(code, wall),
            }
        }
        snapshot.causes = facts.causes.values().map(|standing| standing.cause.clone()).collect();
        snapshot
    }

    fn collect(&self, facts: &Facts, received: Option<Lsn>, archived: Option<Lsn>, monotonic: Duration) -> Snapshot {
        let held = progress::Held { received, archived, segment_size: facts.segment_size };
        let repositories = self.shared.repositories.iter().zip(&facts.repository_errors);
        Snapshot {
            cluster: self.shared.cluster.clone(),
            connected: facts.connected,
            connected_for: facts.connected_since.map(|since| monotonic.saturating_sub(since)),
            causes: Vec::new(),
            system_identifier: facts.system_identifier,
            timeline: facts.timeline,
            received,
            received_still_for: monotonic.saturating_sub(facts.received_seen.1),
            durable: self.durable(),
            archived,
            distance: progress::measure(&facts.samples, &held, monotonic),
            diverged: facts.diverged,
            gaps: facts.gaps.clone(),
            gaps_known: facts.gaps_known,
            slot_name: self.shared.slot.clone(),
            slot: facts.slot.clone(),
            queue: facts.queue,
            spool_free_bytes: facts.spool_free_bytes,
            wal_bytes: Stage::ALL.map(|stage| self.wal_bytes(stage)),
            repositories: repositories.map(|(state, error)| state.snapshot(error.clone())).collect(),
            unguarded: Duration::from_millis(self.shared.unguarded.get()),
            backup_running: facts.backup_running,
            last_backup: facts.last_backup.clone(),
            backup_failures: facts.backup_failures,
            window_start: facts.window_start,
        }
    }
}

impl Facts {
    /// `settled`: it is time to call it an error. Before that it stands, but the log stays calm.
    fn raise(&mut self, code: CauseCode, message: String, now: PgTime, settled: bool) {
        let standing = self.causes.entry(code).or_insert_with(|| Standing {
            cause: Cause { code, message: String::new(), since: now },
            announced: false,
        });
        standing.cause.message = message;
        if standing.announced || !settled {
            return;
        }
        // One fault with two causes is told once.
        let message = standing.cause.message.clone();
        if self.causes.iter().any(|(other, told)| *other != code && told.announced && told.cause.message == message) {
            return;
        }
        let standing = self.causes.get_mut(&code).expect("it was just entered");
        standing.announced = true;
        if code.is_unhealthy() {
            tracing::error!(event = "cause", cause = %code, "{}", standing.cause.message);
        } else {
            tracing::warn!(event = "cause", cause = %code, "{}", standing.cause.message);
        }
    }

    /// Tells the end of what was told. The message is in the log already.
    fn clear(&mut self, code: CauseCode, now: PgTime) {
        if let Some(Standing { cause, announced: true }) = self.causes.remove(&code) {
            let seconds = now.seconds_since(cause.since).max(0.0).round();
            tracing::info!(event = "cause_over", cause = %code, since = %cause.since, "over after {seconds} s");
        }
    }
}
