//! Starts the live path and the uploaders of one cluster, after everything that can be refused was looked at.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::confirmed::Confirmed;
use super::guard::SyncGuard;
use super::held::{find_in_spool, name_finished};
use super::hosts::{OtherHosts, Streaming};
use super::identity::{self, Identity};
use super::live::{Live, LiveSettings, Way};
use super::pace::Pace;
use super::predecessors::Predecessors;
use super::records::open_backlog;
use super::tail::{Tail, TailDemand};
use super::turn::Turn;
use super::uploader::{Failing, Uploader};
use super::{ArchiveError, Halt, Missing};
use crate::disk::Disk;
use crate::repository::{Archive, LeaseHolder, Repository};
use crate::spool::{Spool, SpoolError, SpoolLock};
use crate::storage::ObjectStore;
use crate::telemetry::Board;
use crate::wal::{Lsn, SegmentSize, SystemIdentifier};

const LOCK_POLL: Duration = Duration::from_millis(50);

/// What the archiver is told by the configuration.
#[derive(Clone)]
pub struct ArchiverSettings {
    pub live: LiveSettings,
    pub cluster: String,
    pub spool_path: PathBuf,
    pub state_path: PathBuf,
    /// How long the spool's lock is waited for: a killed predecessor may need a moment to be gone.
    pub lock_patience: Duration,
    /// How often the open segment is shipped in pieces; `None`: it is not.
    pub tail_interval: Option<Duration>,
    pub tail_bytes: u64,
    pub upload_concurrency: usize,
    /// How long a stopping agent may still ship.
    pub stop_timeout: Duration,
}

/// One repository to write to.
#[derive(Clone)]
pub struct Target {
    pub repository: Repository,
    pub store: Arc<dyn ObjectStore>,
    pub required: bool,
    /// The operator vouches that nobody else writes.
    pub single_writer: bool,
}

/// A running archiver. Dropping it does not stop it: cancel the token and call `stopped`.
pub struct Archiver {
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    /// Reading handles, in the order of the targets.
    pub archives: Vec<Archive>,
    pub halt: Halt,
    /// From which host WAL comes, or came last; `None` before the first stream.
    pub streaming: watch::Receiver<Option<Streaming>>,
    uploaders: JoinSet<()>,
    uploads_stop: CancellationToken,
    backlog: Arc<Backlog>,
    tail: Arc<Tail>,
    board: Board,
    live: JoinHandle<()>,
    failing: Arc<Failing>,
    stop_timeout: Duration,
    _lock: SpoolLock,
}

impl Archiver {
    /// Begins to archive. Waits for the server if nothing tells yet which cluster it is, and for the repositories if only they know
    /// where to go on. `Err` with `NextStep::Stop` is a refusal.
    pub async fn start(
        settings: ArchiverSettings,
        targets: Vec<Target>,
        board: Board,
        shutdown: CancellationToken,
    ) -> Result<Self, ArchiveError> {
        let disk = Disk::default();
        let (lock, agent) = {
            let (disk, root, patience) = (disk.clone(), settings.spool_path.clone(), settings.lock_patience);
            let cluster = settings.cluster.clone();
            blocking(move || {
                let lock = lock_spool(&disk, &root, patience)?;
                Spool::check_private(&disk, &root, &cluster)?;
                Ok((lock, Spool::agent_id(&disk, &root)?))
            })
            .await?
        };
        let identity = identity::find(&disk, &settings, &board, &shutdown).await?;
        let Identity { system, segment_size, .. } = identity;
        board.set_identity(system, segment_size);
        // Nothing is made for a cluster that may be refused.
        if identity.is_new_here() {
            identity::check_stores(&settings, &targets, &identity, true, &board, &shutdown).await?;
        }
        let spool = Spool::open(disk.clone(), &settings.spool_path, &settings.cluster, system)?;
        // The backlog lists them. What cannot be read now is told by the live path, which looks again.
        let held = || {
            name_finished(&spool, system, segment_size)?;
            Ok::<_, ArchiveError>(find_in_spool(&spool, system, segment_size)?.held)
        };
        if !identity.is_new_here() {
            let is_empty = matches!(held(), Ok(None));
            identity::check_stores(&settings, &targets, &identity, is_empty, &board, &shutdown).await?;
        }

        let archives: Vec<Archive> = targets.iter().map(|target| target.repository.bind(system)).collect();
        let missing = Missing::default();
        let backlog = {
            let (disk, state, spool, missing) = (disk, settings.state_path.clone(), spool.clone(), missing.clone());
            let named = targets.iter().map(|target| (target.repository.name().to_owned(), target.required)).collect();
            blocking(move || open_backlog(&disk, &state, &spool, system, segment_size, named, &missing)).await?
        };
        // Again, since what was damaged was set aside.
        if let Ok(Some(held)) = held() {
            backlog.set_sealed_end(held.timeline.get(), held.sealed_end);
            // Also where the server cannot be reached: who stops the agent must hear what lies in the spool alone.
            board.set_durable(held.end);
        }

        let tail = Tail::new();
        let halt = Halt::default();
        let required =
            targets.iter().filter(|target| target.required).map(|target| target.repository.name().to_owned());
        let turn = Turn::new(required.clone());
        let confirmed = Confirmed::new(required);
        let (wal, wal_seen) = watch::channel(None);
        let failing = Arc::new(Failing::default());
        let uploads_stop = CancellationToken::new();
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let mut uploaders = JoinSet::new();
        let boards: HashMap<String, _> = board.repositories().into_iter().map(|r| (r.name().to_owned(), r)).collect();
        for (target, archive) in targets.iter().zip(&archives) {
            let shown = boards.get(target.repository.name()).cloned().ok_or_else(|| ArchiveError::Internal {
                why: format!("repository {} is not on the board", target.repository.name()),
            })?;
            uploaders.spawn(
                Uploader {
                    archive: archive.clone(),
                    store: target.store.clone(),
                    probe_prefix: format!("{}/walden-check/", settings.cluster),
                    single_writer: target.single_writer,
                    required: target.required,
                    holder: LeaseHolder { agent: agent.clone(), host: host.clone() },
                    spool: spool.clone(),
                    backlog: backlog.clone(),
                    tail: tail.clone(),
                    tail_interval: settings.tail_interval,
                    tail_bytes: settings.tail_bytes,
                    durable_in_repository: settings.live.durable_in_repository,
                    pace: Pace::default(),
                    wal: wal_seen.clone(),
                    board: board.clone(),
                    shown,
                    failing: failing.clone(),
                    concurrency: settings.upload_concurrency,
                    retry_delay_max: settings.live.retry_delay_max,
                    halt: halt.clone(),
                    shutdown: uploads_stop.clone(),
                    missing: missing.clone(),
                    confirmed: confirmed.clone(),
                    turn: turn.clone(),
                    system,
                    segment_size,
                }
                .run(),
            );
        }
        let (streaming, streaming_seen) = watch::channel(None);
        let hosts = OtherHosts {
            settings: settings.live.clone(),
            system,
            segment_size,
            board: board.clone(),
            streaming: streaming_seen.clone(),
            shutdown: shutdown.clone(),
        };
        uploaders.spawn(hosts.run());
        // One that is not required and away keeps nothing from the others.
        let (mut first, others): (Vec<Target>, Vec<Target>) =
            targets.iter().cloned().partition(|target| target.required);
        first.extend(others);
        let predecessors = Predecessors {
            settings: settings.clone(),
            system,
            targets: first,
            holder: LeaseHolder { agent, host },
            board: board.clone(),
            shutdown: shutdown.clone(),
            seekers: BTreeMap::new(),
        };
        uploaders.spawn(predecessors.run());
        let live = Live {
            settings: settings.live.clone(),
            system,
            segment_size,
            spool,
            archives: archives.iter().cloned().zip(targets.iter().map(|target| target.required)).collect(),
            stores: tokio::runtime::Handle::current(),
            backlog: backlog.clone(),
            tail: tail.clone(),
            board: board.clone(),
            wal,
            confirmed: confirmed.subscribe(),
            turn,
            halt: halt.clone(),
            shutdown,
            held_remotely: None,
            histories_spooled: BTreeMap::new(),
            missing,
            way: Way::Overlapping,
            host: 0,
            avoid: None,
            streaming,
            timeline_begin: Lsn::ZERO,
            slot_at: Lsn::ZERO,
            guard: SyncGuard::new(settings.live.on_delay, settings.live.max_delay),
        };
        let live = std::thread::Builder::new()
            .name("walden-receive".into())
            .spawn(move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(live.run()),
                Err(error) => live.halt.stop(ArchiveError::Internal { why: error.to_string() }),
            })
            .map_err(|error| ArchiveError::Internal { why: error.to_string() })?;
        let stop_timeout = settings.stop_timeout;
        Ok(Self {
            system,
            segment_size,
            archives,
            halt,
            streaming: streaming_seen,
            uploaders,
            uploads_stop,
            backlog,
            tail,
            board,
            live,
            failing,
            stop_timeout,
            _lock: lock,
        })
    }

    /// For base backups, which wait for the WAL through their stop LSN.
    pub fn tail_demand(&self) -> TailDemand {
        TailDemand::new(self.tail.clone())
    }

    /// Waits for the live path to end after the token was cancelled, ships what is durable within the bound, then ends the uploads.
    pub async fn stopped(mut self) {
        // The live path waits no longer than that either.
        let deadline = tokio::time::Instant::now() + self.stop_timeout;
        let live = self.live;
        if tokio::task::spawn_blocking(move || live.join()).await.is_err() {
            tracing::error!("the live path's thread could not be joined");
        }
        self.tail.send_the_rest();
        let mut changed = self.backlog.subscribe();
        loop {
            // One that is not required holds the end up only while it takes what it gets.
            let segments = self.backlog.waiting(&self.failing.names());
            let shipped = self
                .board
                .durable()
                .is_none_or(|durable| self.board.archived().is_some_and(|archived| archived >= durable));
            if (segments == 0 && (shipped || self.tail.segment().is_none())) || self.halt.reason().is_some() {
                break;
            }
            let step = tokio::time::Instant::now() + Duration::from_millis(100);
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep_until(step.min(deadline)) => {}
            }
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(segments, "stopping with WAL that is not in the repository yet; it stays in the spool");
                break;
            }
        }
        self.uploads_stop.cancel();
        while let Some(ended) = self.uploaders.join_next().await {
            if let Err(panic) = ended {
                tracing::error!(%panic, "an uploader panicked");
            }
        }
    }
}

fn lock_spool(disk: &Disk, root: &std::path::Path, patience: Duration) -> Result<SpoolLock, SpoolError> {
    let deadline = std::time::Instant::now() + patience;
    loop {
        match Spool::lock(disk, root) {
            Err(SpoolError::InUse { .. }) if std::time::Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            other => return other,
        }
    }
}

async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ArchiveError> {
    let done = tokio::task::spawn_blocking(job).await;
    done.map_err(|panic| ArchiveError::Internal { why: panic.to_string() })?
}
