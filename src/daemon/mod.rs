//! Starts, supervises and stops the jobs of one cluster: archiving, base backups, observation, HTTP.
//!
//! Every task is named here and joined here. Shutdown comes in from outside as a token.

pub mod backups;
mod notify;
mod observe;
mod stores;

pub use stores::{open_targets, open_to_read, postgres_settings};

use notify::ServiceManager;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::archive::{ArchiveError, Archiver, ArchiverSettings, LiveSettings, OnDelay, SpoolBounds};
use crate::config::{self, BackupSettings, Durability, Settings};
use crate::monitor::{Monitor, MonitorError};
use crate::postgres::ConnectSettings;
use crate::storage::Backoff;
use crate::telemetry::{Board, BoardRepository, BoardSetup, CauseCode, SystemClock};
use crate::wal::Lsn;

/// How often the open segment is cut, and its new bytes become durable, when the tail is off.
const CUT_INTERVAL: Duration = Duration::from_secs(1);
/// A killed predecessor may need a moment to be gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// A start that is refused is refused within this time. HTTP that cannot be served is tried again as often.
const START_TIME: Duration = Duration::from_secs(5);
const EVALUATE_INTERVAL: Duration = Duration::from_secs(1);

/// What ended the daemon at its start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Postgres(#[from] crate::postgres::PostgresError),
    #[error(transparent)]
    Store(#[from] crate::storage::StorageError),
    #[error(transparent)]
    Repository(#[from] crate::repository::RepositoryError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

impl DaemonError {
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Postgres(e) => e.hint(),
            Self::Store(e) => e.hint(),
            Self::Repository(e) => e.hint(),
            Self::Archive(e) => e.hint(),
        }
    }

    /// 2 for what another configuration cures, 4 for a refusal.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Postgres(_) | Self::Store(_) | Self::Repository(_) => 2,
            Self::Archive(ArchiveError::NoConditions { .. }) => 2,
            Self::Archive(e) if e.is_refusal() => 4,
            Self::Archive(_) => 1,
        }
    }
}

/// The board of a configuration.
pub fn board(settings: &Settings, targets: &[crate::archive::Target]) -> Board {
    Board::new(BoardSetup {
        cluster: settings.archive.cluster.clone(),
        slot: settings.postgres.slot.clone(),
        repositories: targets
            .iter()
            .map(|target| BoardRepository {
                name: target.repository.name().into(),
                url: target.repository.url(),
                required: target.required,
            })
            .collect(),
        alert: settings.alert,
        clock: Arc::new(SystemClock::new()),
    })
}

/// The archiver's part of the configuration.
pub fn archiver_settings(settings: &Settings, connect: ConnectSettings) -> ArchiverSettings {
    ArchiverSettings {
        live: LiveSettings {
            connect,
            slot: settings.postgres.slot.clone(),
            create_slot: settings.postgres.create_slot,
            status_interval: settings.postgres.status_interval,
            compression: settings.archive.compression,
            compression_level: settings.archive.compression_level,
            durable_in_repository: settings.archive.durability == Durability::Repository,
            on_delay: match settings.sync.on_delay {
                config::OnDelay::Wait => OnDelay::Wait,
                config::OnDelay::Degrade => OnDelay::Degrade,
            },
            max_delay: settings.sync.max_delay,
            stop_timeout: settings.archive.stop_timeout,
            cut_interval: settings.archive.tail_interval.unwrap_or(CUT_INTERVAL),
            cut_bytes: settings.archive.tail_interval.map(|_| settings.archive.tail_bytes),
            bounds: SpoolBounds { bytes_max: settings.spool.bytes_max, free_bytes_min: settings.spool.free_bytes_min },
            retry_delay_max: settings.upload.retry_delay_max,
        },
        cluster: settings.archive.cluster.clone(),
        spool_path: settings.spool.path.clone(),
        state_path: settings.state.path.clone(),
        lock_patience: LOCK_PATIENCE,
        tail_interval: settings.archive.tail_interval,
        tail_bytes: settings.archive.tail_bytes,
        upload_concurrency: settings.upload.concurrency,
        stop_timeout: settings.archive.stop_timeout,
    }
}

/// Runs the agent until the token is cancelled. Each message on `reloads` reads the configuration again. `Err` only for what was
/// refused at the start.
pub async fn run(
    settings: Settings,
    shutdown: CancellationToken,
    reloads: tokio::sync::mpsc::Receiver<()>,
) -> Result<(), DaemonError> {
    let targets = open_targets(&settings).await?;
    let connect = postgres_settings(&settings)?;
    let board = board(&settings, &targets);
    let names: Vec<&str> = targets.iter().map(|target| target.repository.name()).collect();
    tracing::info!(
        event = "starting",
        version = env!("CARGO_PKG_VERSION"),
        cluster = settings.archive.cluster,
        slot = settings.postgres.slot,
        repositories = names.join(","),
        "walden starts"
    );
    let mut tasks = tokio::task::JoinSet::new();
    if let Some(listen) = &settings.metrics.listen {
        let first = Monitor::bind(listen, board.clone()).await;
        tasks.spawn(watchable(first, listen.clone(), board.clone(), shutdown.clone()));
    }
    let manager = Arc::new(ServiceManager::from_environment());
    tasks.spawn({
        let (manager, board, shutdown) = (manager.clone(), board.clone(), shutdown.clone());
        async move { manager.accompany(&board, shutdown).await }
    });
    tasks.spawn(evaluate(board.clone(), manager.clone(), shutdown.clone()));
    let (backup, backup_seen) = tokio::sync::watch::channel(settings.backup.clone());
    tasks.spawn(reload(settings.clone(), board.clone(), manager, backup, reloads, shutdown.clone()));
    let result = archive(&settings, connect, targets, &board, &shutdown, &mut tasks, backup_seen).await;
    shutdown.cancel();
    while let Some(ended) = tasks.join_next().await {
        if let Err(panic) = ended {
            tracing::error!(%panic, "a task panicked");
        }
    }
    result
}

async fn archive(
    settings: &Settings,
    connect: ConnectSettings,
    targets: Vec<crate::archive::Target>,
    board: &Board,
    shutdown: &CancellationToken,
    tasks: &mut tokio::task::JoinSet<()>,
    backup: tokio::sync::watch::Receiver<BackupSettings>,
) -> Result<(), DaemonError> {
    let plan = archiver_settings(settings, connect.clone());
    let mut backoff = Backoff::new(settings.upload.retry_delay_max);
    // What can heal without a new configuration is told and tried again; what cannot ends the agent here, at its start.
    let archiver = loop {
        match Archiver::start(plan.clone(), targets.clone(), board.clone(), shutdown.clone()).await {
            Ok(archiver) => break archiver,
            Err(ArchiveError::Stopping) => return Ok(()),
            Err(error) if error.is_refusal() => return Err(error.into()),
            Err(error) => board.raise(CauseCode::SpoolFailing, format!("{}; {}", error.describe(), error.hint())),
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay()) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
    };
    board.clear(CauseCode::SpoolFailing);
    let of_kind = |required: bool| -> Vec<_> {
        let archives = targets.iter().zip(&archiver.archives).filter(|(target, _)| target.required == required);
        archives.map(|(_, archive)| archive.clone()).collect()
    };
    tasks.spawn(
        backups::Backups {
            demand: archiver.tail_demand(),
            settings: settings.clone(),
            backup,
            connect: connect.clone(),
            streaming: archiver.streaming.clone(),
            archives: of_kind(true),
            optional: of_kind(false),
            segment_size: archiver.segment_size,
            board: board.clone(),
            shutdown: shutdown.clone(),
        }
        .run(),
    );
    let streaming = archiver.streaming.clone();
    tasks.spawn(observe::observe(connect, streaming, settings.clone(), board.clone(), shutdown.clone()));
    shutdown.cancelled().await;
    tracing::info!(event = "stopping", "stopping: shipping what is there");
    archiver.stopped().await;
    let shown = |position: Option<Lsn>| position.map_or("unknown".into(), |position| position.to_string());
    let (durable, archived) = (board.durable(), board.archived());
    if let (Some(held), Some(end)) =
        (durable.map(|durable| archived.map_or(durable, |archived| archived.max(durable))), board.server_end())
        && held < end
    {
        // It is safe for as long as the server is: whoever gives that up as well must hear of it.
        tracing::warn!(
            event = "left_on_server",
            "stopped before all WAL was fetched: {held} to {end} lies on the server only, whose slot keeps it; start walden again to archive it"
        );
    }
    tracing::info!(event = "stopped", durable = shown(durable), archived = shown(archived), "stopped");
    if let Some(durable) = durable.filter(|durable| archived.is_none_or(|archived| archived < *durable)) {
        // Whoever gives the host up now must hear of it.
        tracing::error!(
            event = "left_behind",
            "stopped with WAL that is not in the repository: {} to {durable} lies in the spool {} only; start walden again to ship it, and keep the spool until then",
            archived.map_or_else(|| "from an unknown position".into(), |archived| format!("from {archived}")),
            settings.spool.path.display()
        );
    }
    Ok(())
}

/// Takes over what may change while the agent runs: thresholds and the backup schedule. A broken file changes nothing.
async fn reload(
    settings: Settings,
    board: Board,
    manager: Arc<ServiceManager>,
    backup: tokio::sync::watch::Sender<BackupSettings>,
    mut reloads: tokio::sync::mpsc::Receiver<()>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            asked = reloads.recv() => if asked.is_none() { return },
            () = shutdown.cancelled() => return,
        }
        manager.reloading();
        match settings.reload() {
            Ok(new) => {
                board.set_alert(new.alert);
                backup.send_replace(new.backup.clone());
                tracing::info!(
                    event = "reloaded",
                    "configuration read again: [alert] and [backup] are in force; other changes need a restart"
                );
            }
            Err(error) => tracing::error!(
                event = "not_reloaded",
                "the configuration stays as it was: {}; {}",
                backups::describe(&error),
                error.hint()
            ),
        }
        manager.ready();
    }
}

/// Serves HTTP. Archiving matters more than being watched: while the address cannot be had, the agent goes on without, says so under
/// a cause, and tries again.
async fn watchable(first: Result<Monitor, MonitorError>, listen: String, board: Board, shutdown: CancellationToken) {
    let mut bound = first;
    let mut may_tell = false;
    loop {
        match bound {
            Ok(monitor) => {
                board.clear(CauseCode::MetricsFailing);
                tracing::info!(event = "serving", address = %monitor.address(), "serving metrics and status");
                return monitor.serve(shutdown).await;
            }
            // An agent that was started twice is refused in a moment, and that alone is what it should say.
            Err(error) if may_tell => {
                let why = backups::describe(&error);
                let message = format!(
                    "{why}; archiving goes on, but nobody can see it: no metrics, no status, no health check; {}",
                    error.hint()
                );
                board.raise(CauseCode::MetricsFailing, message);
            }
            Err(_) => may_tell = true,
        }
        tokio::select! {
            () = tokio::time::sleep(START_TIME) => {}
            () = shutdown.cancelled() => return,
        }
        bound = Monitor::bind(&listen, board.clone()).await;
    }
}

/// Alerts are judged once a second, also when nobody asks, and a service manager hears that the agent lives.
async fn evaluate(board: Board, manager: Arc<ServiceManager>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(EVALUATE_INTERVAL);
    loop {
        tokio::select! {
            _ = tick.tick() => manager.alive(&board.snapshot()),
            () = shutdown.cancelled() => return,
        }
    }
}
