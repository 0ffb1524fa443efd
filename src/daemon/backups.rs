//! Base backups of a running agent: the first one, those on schedule, and one behind a gap.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::archive::Streaming;
use crate::archive::TailDemand;
use crate::base_backup::{self, BackupError, BackupRequest, Progress, WalWaiter};
use crate::config::{BackupSettings, Checkpoint, Settings};
use crate::postgres::ConnectSettings;
use crate::repository::{Archive, BackupId, BackupJson, RepositoryError};
use crate::storage::{Backoff, BoxError};
use crate::telemetry::{BackupFacts, Board, CauseCode};
use crate::wal::{Lsn, PgTime, SegmentSize, TimelineId};

/// How often the repository is looked at while the WAL of a backup is awaited.
const WAL_POLL: Duration = Duration::from_millis(500);
/// How often it is looked whether somebody else took a backup, or removed one: one listing of their names.
const NAMES_POLL: Duration = Duration::from_secs(20);
/// The same, after a store did not answer.
const LOOK_RETRY: Duration = Duration::from_secs(5);
/// How often it is looked whether a backup is due.
const DUE_POLL: Duration = Duration::from_secs(1);

/// What to do about pages whose checksum is wrong. The backup is kept: it is the best that the server has to give.
pub const PAGES_HINT: &str = "keep the older backups; `SELECT pg_filenode_relation(0, FILE)` in that database names the relation to repair or restore";

/// Waits for WAL by what the repositories themselves show, whoever brings it there.
pub struct StoredWal {
    /// The required ones.
    pub archives: Vec<Archive>,
    pub segment_size: SegmentSize,
    /// Where this process archives it.
    pub demand: Option<TailDemand>,
}

#[async_trait]
impl WalWaiter for StoredWal {
    async fn wait_archived(&self, timeline: TimelineId, start: Lsn, stop: Lsn) -> Result<(), BoxError> {
        if let Some(demand) = &self.demand {
            demand.ship_through(stop);
        }
        for archive in &self.archives {
            loop {
                match archive.holds_wal(timeline, start, stop, self.segment_size).await {
                    Ok(true) => break,
                    Ok(false) => {}
                    // All is copied by now: a store that is away for a moment must not undo it. The caller's bound holds.
                    Err(error) if error.may_pass() => {
                        tracing::debug!(%error, "it is not known yet how far the WAL is archived");
                    }
                    Err(error) => return Err(error.into()),
                }
                tokio::time::sleep(WAL_POLL).await;
            }
        }
        Ok(())
    }
}

/// What a backup is told by the configuration. The archives: those that it must be in, and others.
pub fn request(
    settings: &Settings,
    backup: &BackupSettings,
    connect: ConnectSettings,
    (archives, optional): (Vec<Archive>, Vec<Archive>),
    label: Option<String>,
    board: &Board,
) -> BackupRequest {
    let board = board.clone();
    BackupRequest {
        settings: connect,
        archives,
        optional,
        label,
        fast_checkpoint: backup.checkpoint == Checkpoint::Fast,
        max_rate: backup.max_rate,
        volume_bytes: backup.volume_bytes,
        compression: settings.archive.compression,
        compression_level: settings.archive.compression_level,
        upload_concurrency: settings.upload.concurrency,
        retry_delay_max: settings.upload.retry_delay_max,
        first_contact: None,
        wal_timeout: backup.wal_timeout,
        clock: Arc::new(move || board.server_now().unwrap_or_else(|| PgTime::from_timestamp(jiff::Timestamp::now()))),
    }
}

/// What the repository's backups and their windows were judged by.
struct Seen {
    /// The timeline and the number of gaps.
    course: (Option<TimelineId>, usize),
    /// `None`: not known.
    backups: Option<(Vec<BackupId>, Option<BackupId>)>,
}

/// Takes the backups of a running agent, one at a time.
pub struct Backups {
    pub demand: TailDemand,
    pub settings: Settings,
    pub backup: watch::Receiver<BackupSettings>,
    pub connect: ConnectSettings,
    /// The host that WAL comes from: a backup is taken from the same.
    pub streaming: watch::Receiver<Option<Streaming>>,
    /// The required ones. What is shown of backups is what the first of them holds.
    pub archives: Vec<Archive>,
    pub optional: Vec<Archive>,
    pub segment_size: SegmentSize,
    pub board: Board,
    pub shutdown: CancellationToken,
}

impl Backups {
    pub async fn run(mut self) {
        let Some(mut wanted) = self.look_at_repositories().await else { return };
        let mut backoff = Backoff::new(self.settings.upload.retry_delay_max);
        let mut last_look = jiff::Timestamp::now();
        let mut not_before = tokio::time::Instant::now();
        let mut seen = Seen { course: self.board.course(), backups: None };
        let mut look_after = tokio::time::Instant::now() + NAMES_POLL;
        // How many gaps were known when the last backup of this agent began: that is the answer to them, and one is enough.
        let mut answered = None;
        loop {
            tokio::select! {
                () = tokio::time::sleep(DUE_POLL) => {}
                () = self.shutdown.cancelled() => return,
            }
            if self.board.course() != seen.course || tokio::time::Instant::now() >= look_after {
                // A store that hangs must not hold up the end.
                look_after = tokio::time::Instant::now()
                    + tokio::select! {
                        pause = self.look_again(&mut seen) => pause,
                        () = self.shutdown.cancelled() => return,
                    };
            }
            let now = jiff::Timestamp::now();
            let settings = self.backup.borrow_and_update().clone();
            let due = settings
                .schedule
                .as_ref()
                .and_then(|schedule| schedule.next_after(last_look))
                .is_some_and(|at| at <= now);
            last_look = now;
            let (_, gaps) = self.board.course();
            wanted |= due || (settings.initial && self.board.is_raised(CauseCode::Gap) && answered != Some(gaps));
            // Without a stream the WAL of a backup would not come.
            if !wanted || tokio::time::Instant::now() < not_before || self.board.is_raised(CauseCode::NotConnected) {
                continue;
            }
            match self.take(&settings).await {
                Ok(_) => {
                    (wanted, answered) = (false, Some(gaps));
                    backoff.reset();
                    if self.look_at_repositories().await.is_none() {
                        return;
                    }
                }
                Err(_) if self.shutdown.is_cancelled() => return,
                Err(error) => {
                    self.board.backup_failed(format!("{}; {}", describe(&error), error.hint()));
                    not_before = tokio::time::Instant::now() + backoff.next_delay();
                }
            }
        }
    }

    async fn take(&self, backup: &BackupSettings) -> Result<BackupJson, BackupError> {
        self.board.backup_started();
        let demand = Some(self.demand.clone());
        let wal = StoredWal { archives: self.archives.clone(), segment_size: self.segment_size, demand };
        let streamed = *self.streaming.borrow();
        let connect = streamed.map_or(self.connect.clone(), |streaming| self.connect.this_host(streaming.host));
        let archives = (self.archives.clone(), self.optional.clone());
        let request = request(&self.settings, backup, connect, archives, None, &self.board);
        tracing::info!(event = "backup_begun", "base backup begins");
        let json = base_backup::take(request, &wal, Arc::new(|_: Progress| {}), self.shutdown.child_token()).await?;
        let seconds = (json.duration_seconds * 10.0).round() / 10.0;
        tracing::info!(event = "backup_ended", id = %json.id, bytes = json.size_bytes, seconds, "base backup is complete");
        self.board.backup_succeeded(facts(&json));
        Ok(json)
    }

    /// Shows the last backup and the window to the present. `Some(true)` if the first repository has no backup that reaches it.
    async fn look_at_repositories(&self) -> Option<bool> {
        let mut backoff = Backoff::new(self.settings.upload.retry_delay_max);
        loop {
            let looked = tokio::select! {
                looked = self.look_once() => looked,
                () = self.shutdown.cancelled() => return None,
            };
            let error = match looked {
                Ok(usable) => return Some(self.backup.borrow().initial && !usable),
                Err(error) => error,
            };
            tracing::debug!(%error, "the repository's backups are not known");
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                () = self.shutdown.cancelled() => return None,
            }
        }
    }

    /// Backups that others take or remove are shown too, and so is a window that a gap or another timeline ended. Returns how long
    /// not to look again.
    async fn look_again(&self, seen: &mut Seen) -> Duration {
        let course = self.board.course();
        let is_known = seen.course == course && seen.backups.is_some();
        *seen = match self.names().await {
            Ok(names) if is_known && seen.backups.as_ref() == Some(&names) => return NAMES_POLL,
            Ok(names) => Seen { course, backups: self.look_once().await.is_ok().then_some(names) },
            Err(_) => Seen { course, backups: None },
        };
        if seen.backups.is_some() { NAMES_POLL } else { LOOK_RETRY }
    }

    /// The ids in the first repository, and the newest of those that exist: an id without its `backup.json` is none yet.
    async fn names(&self) -> Result<(Vec<BackupId>, Option<BackupId>), RepositoryError> {
        let Some(archive) = self.archives.first() else { return Ok((Vec::new(), None)) };
        let ids = archive.backup_ids().await?;
        for id in ids.iter().rev() {
            if archive.backup(id).await?.is_some() {
                let newest = id.clone();
                return Ok((ids, Some(newest)));
            }
        }
        Ok((ids, None))
    }

    async fn look_once(&self) -> Result<bool, RepositoryError> {
        let Some(archive) = self.archives.first() else { return Ok(true) };
        let catalog = archive.catalog().await?;
        self.board.set_last_backup(catalog.backups.last().map(facts));
        match catalog.backups.last().and_then(BackupJson::pages_damaged) {
            Some(what) => self.board.raise(CauseCode::PagesDamaged, format!("{what}; {PAGES_HINT}")),
            None => self.board.clear(CauseCode::PagesDamaged),
        }
        // The window that reaches the present is the one that ends last on the timeline that is archived now.
        let newest = self.board.course().0.or(catalog.current_timeline());
        if let Some(branch) = newest.and_then(|timeline| catalog.history(timeline)) {
            // Every moment behind a backup can be restored whatever was lost before it, whoever took it; the gap itself stays in the
            // lists.
            self.board.settle_gaps(|gap| catalog.is_past(&branch, gap.timeline, (gap.from_lsn, gap.to_lsn)));
            self.board.settle_unproven(|at| catalog.begins_behind(&branch, at));
        }
        let windows = catalog.windows();
        let present =
            windows.iter().filter(|window| Some(window.timeline) == newest).max_by_key(|window| window.to_lsn);
        let end = newest.and_then(|timeline| catalog.timelines.get(&timeline)).and_then(|wal| wal.last_byte());
        let present = present.filter(|window| Some(window.to_lsn) == end);
        self.board.set_window_start(present.and_then(|window| window.from_time));
        Ok(present.is_some())
    }
}

fn facts(json: &BackupJson) -> BackupFacts {
    BackupFacts {
        id: json.id.to_string(),
        timeline: json.timeline,
        start_lsn: json.start_lsn,
        stop_lsn: json.stop_lsn,
        start_time: json.start_time,
        stop_time: json.stop_time,
        duration_seconds: json.duration_seconds,
        size_bytes: json.size_bytes,
        stored_bytes: json.stored_bytes,
    }
}

/// The message with its causes, in one line.
pub fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(&format!(": {cause_text}"));
        }
        source = cause.source();
    }
    text
}
