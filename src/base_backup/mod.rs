//! One base backup: BASE_BACKUP stream to compressed volumes and a manifest in every repository, then `backup.json`.
//!
//! ```text
//! server ─▶ tar reader ─▶ splitter ─▶ encoder ─▶ parts ─▶ uploads, several at a time ─▶ wait for the WAL ─▶ backup.json
//!              └ CRC-32C of each file ─▶ compared with the server's own manifest
//! ```
//!
//! - A backup exists when its `backup.json` exists, written last, after every part is stored and the WAL through its stop LSN is
//!   archived (I16). A backup that fails or is cancelled leaves no `backup.json`, and what it stored is removed as far as possible.
//! - Memory is bounded by the parts in flight, not by the database; only 8 bytes per file are kept (I17).
//! - The server's tar and manifest are not trusted: names that leave the data directory, links, lying sizes and checksums are errors.
//! - A part that cannot be stored is tried again without an end, with growing delays; the server waits meanwhile. Only the first
//!   contact may have a bound: whoever waits for a command is told of a wrong key or bucket at once.
//!
//! What the volumes look like is in docs/format.md. Not here: when to take a backup, and who archives the WAL.

mod error;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod manifest;
mod parts;
mod places;
mod splitter;
mod stream;
mod tar_reader;
mod upload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::postgres::{BackupOptions, ConnectSettings};
use crate::repository::{Archive, BackupId, BackupJson, BackupTablespace, RequiredSettings, StoredPart};
use crate::seal::Compression;
use crate::storage::BoxError;
use crate::wal::{Lsn, PgTime, TimelineId};

pub use error::BackupError;

use places::{FIRST_PATIENCE, FIRST_TRIES, Place};
use stream::{StreamJob, Streamed};
use upload::{Uploader, until_done, until_due};

/// Larger volumes would need more parts than a store takes.
const VOLUME_BYTES_MAX: u64 = 64 << 30;
/// Parts on their way at most. With one that waits and one being filled, that is 48 MiB.
const PARTS_IN_FLIGHT_MAX: usize = 4;
/// How long removing a failed backup may take; a cancelled one is in a hurry.
const DISCARD_LIMIT: Duration = Duration::from_secs(60);
const DISCARD_LIMIT_CANCELLED: Duration = Duration::from_secs(5);

/// What to back up, and how.
#[derive(Clone)]
pub struct BackupRequest {
    pub settings: ConnectSettings,
    /// Where to: each of one cluster, the one that the server must be. The backup is complete when it is in all of them.
    pub archives: Vec<Archive>,
    /// Into these too, for as long as they keep up.
    pub optional: Vec<Archive>,
    /// The user's own word for it.
    pub label: Option<String>,
    pub fast_checkpoint: bool,
    /// Bytes per second; `None` is unlimited.
    pub max_rate: Option<u64>,
    /// Raw bytes of a volume; only a single file may pass it.
    pub volume_bytes: u64,
    pub compression: Compression,
    /// 0 is the codec's fastest useful one.
    pub compression_level: i32,
    pub upload_concurrency: usize,
    pub retry_delay_max: Duration,
    /// How long a repository that does not answer is waited for before the first byte is asked for; what cannot pass by itself ends
    /// the backup at once then. `None`: without an end.
    pub first_contact: Option<Duration>,
    /// How long to wait for the WAL through the stop LSN.
    pub wal_timeout: Duration,
    /// The server's time where it is known, else the agent's.
    pub clock: Arc<dyn Fn() -> PgTime + Send + Sync>,
}

/// Told several times a second while bytes come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub stage: Stage,
    /// Raw bytes received.
    pub bytes_done: u64,
    /// The server's estimate; `bytes_done` may pass it a little.
    pub bytes_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The server makes its checkpoint; spread, this takes minutes.
    Checkpoint,
    Copy,
    /// All is received; the last parts are on their way.
    Upload,
    /// All is stored; the WAL through the stop LSN is awaited.
    Wal,
}

/// Whoever archives the WAL: a running agent, or a receiver that the command has started.
#[async_trait]
pub trait WalWaiter: Send + Sync {
    /// Returns when every required repository holds the WAL of `timeline`'s branch from `start` through `stop`. Time is bounded by the caller,
    /// which drops the call then.
    async fn wait_archived(&self, timeline: TimelineId, start: Lsn, stop: Lsn) -> Result<(), BoxError>;
}

/// Takes one base backup into every required repository, and into others that keep up. Returns what was written as `backup.json`.
///
/// Cancelling `cancel`, or dropping the call, ends it soon; cancelling also removes what was stored.
pub async fn take(
    request: BackupRequest,
    wal: &dyn WalWaiter,
    progress: Arc<dyn Fn(Progress) + Send + Sync>,
    cancel: CancellationToken,
) -> Result<BackupJson, BackupError> {
    let stop = cancel.child_token();
    // Should this call be dropped, the thread and the uploads end as well.
    let _stop_on_drop = stop.clone().drop_guard();
    let places = places(&request, &stop).await?;
    let outcome = take_with(&request, &places, wal, progress, &stop).await;
    let is_over = |place: &&Place| outcome.is_err() || place.is_left_out();
    for Place { writer, .. } in places.iter().filter(is_over) {
        let hurry = cancel.is_cancelled() || outcome.is_ok();
        let limit = if hurry { DISCARD_LIMIT_CANCELLED } else { DISCARD_LIMIT };
        // Without backup.json there is no backup; what stays only takes room.
        match tokio::time::timeout(limit, writer.discard()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(
                backup = %writer.id(),
                error = &error as &dyn std::error::Error,
                "the failed base backup could not be removed from the repository"
            ),
            Err(_) => tracing::warn!(backup = %writer.id(), "removing the failed base backup took too long"),
        }
    }
    outcome
}

/// A writer per repository, all under one id: the start time's second, or the next one that is free in all of them.
async fn places(request: &BackupRequest, stop: &CancellationToken) -> Result<Vec<Place>, BackupError> {
    let mut id = BackupId::full_at((request.clock)());
    let deadline = request.first_contact.map(|patience| Instant::now() + patience);
    let mut optional = request.optional.clone();
    loop {
        let mut places: Vec<Place> = Vec::new();
        for archive in &request.archives {
            let writer = || archive.backup_writer(id.clone());
            let writer = match deadline {
                None => until_done(stop, request.retry_delay_max, None, writer).await?,
                Some(deadline) => until_due(stop, request.retry_delay_max, deadline, writer).await?,
            };
            id = writer.id().clone();
            places.push(Place::new(writer, true));
        }
        let mut answering = Vec::new();
        for archive in optional {
            let writer = || archive.backup_writer(id.clone());
            let asked = until_done(stop, request.retry_delay_max, Some(FIRST_TRIES), writer);
            let name = archive.repository().name();
            match tokio::time::timeout(FIRST_PATIENCE, asked).await {
                Ok(Ok(writer)) => {
                    id = writer.id().clone();
                    places.push(Place::new(writer, false));
                    answering.push(archive);
                }
                Ok(Err(BackupError::Cancelled)) => return Err(BackupError::Cancelled),
                Ok(Err(error)) => places::left_out(name, &places::describe(&error)),
                Err(_) => {
                    places::left_out(name, &format!("no answer within {} s", FIRST_PATIENCE.as_secs()));
                }
            }
        }
        optional = answering;
        if places.iter().all(|place| *place.writer.id() == id) {
            return Ok(places);
        }
    }
}

async fn take_with(
    request: &BackupRequest,
    places: &[Place],
    wal: &dyn WalWaiter,
    progress: Arc<dyn Fn(Progress) + Send + Sync>,
    stop: &CancellationToken,
) -> Result<BackupJson, BackupError> {
    let begun = Instant::now();
    let (Some(archive), Some(Place { writer, .. })) = (request.archives.first(), places.first()) else {
        return Err(BackupError::Internal { why: "no repository was given".into() });
    };
    let max_rate_kib = request.max_rate.map(|rate| u32::try_from(rate / 1024).unwrap_or(u32::MAX));
    let job = StreamJob {
        settings: request.settings.clone(),
        expected: archive.keys().system(),
        options: BackupOptions {
            label: request.label.clone().unwrap_or_else(|| format!("walden {}", writer.id())),
            fast_checkpoint: request.fast_checkpoint,
            max_rate_kib,
            manifest: true,
        },
        volume_bytes: request.volume_bytes.min(VOLUME_BYTES_MAX),
        compression: request.compression,
        compression_level: request.compression_level,
        clock: request.clock.clone(),
        progress: progress.clone(),
        stop: stop.clone(),
    };
    let uploader = Uploader {
        places: places.to_vec(),
        parts_in_flight: request.upload_concurrency.clamp(1, PARTS_IN_FLIGHT_MAX),
        retry_delay_max: request.retry_delay_max,
        stop: stop.clone(),
    };
    let (streamed, stored) = copy(job, uploader).await?;
    let told = |stage| {
        progress(Progress { stage, bytes_done: streamed.raw_bytes, bytes_total: streamed.raw_bytes });
    };
    told(Stage::Wal);
    wait_for_wal(request, wal, &streamed, stop).await?;
    let backup = describe(request, writer.id().clone(), &streamed, stored, begun.elapsed())?;
    for place in places {
        let branch = (streamed.stop_timeline, streamed.start_lsn, streamed.stop_lsn);
        place.wait_for_wal(stop, branch, streamed.segment_size).await?;
        place.until_done(stop, request.retry_delay_max, None, || place.writer.finish(&backup)).await?;
    }
    Ok(backup)
}

/// Receives and uploads at the same time. Of two errors the one that came first is told: the other side only noticed.
async fn copy(job: StreamJob, uploader: Uploader) -> Result<(Streamed, BTreeMap<String, StoredPart>), BackupError> {
    let progress = job.progress.clone();
    // One part waits here while the next is filled, beside those in flight.
    let (sender, receiver) = mpsc::channel(1);
    let streamed = async {
        let streamed = match stream::spawn(job, sender).await {
            Ok(streamed) => streamed,
            Err(_) => Err(BackupError::Internal { why: "the backup's thread ended".into() }),
        };
        if let Ok(streamed) = &streamed {
            let (stage, bytes) = (Stage::Upload, streamed.raw_bytes);
            progress(Progress { stage, bytes_done: bytes, bytes_total: bytes });
        }
        streamed
    };
    match tokio::join!(streamed, uploader.run(receiver)) {
        (Ok(streamed), Ok(stored)) => Ok((streamed, stored)),
        (Err(BackupError::Cancelled), Err(error)) | (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

async fn wait_for_wal(
    request: &BackupRequest,
    wal: &dyn WalWaiter,
    streamed: &Streamed,
    stop: &CancellationToken,
) -> Result<(), BackupError> {
    let (stop_lsn, limit) = (streamed.stop_lsn, request.wal_timeout);
    let waited = wal.wait_archived(streamed.stop_timeline, streamed.start_lsn, stop_lsn);
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(BackupError::Cancelled),
        waited = tokio::time::timeout(limit, waited) => match waited {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(BackupError::Wal { stop_lsn, source }),
            Err(_) => Err(BackupError::WalTimeout { stop_lsn, limit }),
        },
    }
}

/// `backup.json` (docs/format.md, section 3).
fn describe(
    request: &BackupRequest,
    id: BackupId,
    streamed: &Streamed,
    mut stored: BTreeMap<String, StoredPart>,
    duration: Duration,
) -> Result<BackupJson, BackupError> {
    let manifest = stored.remove(&format!("{}.{}", stream::MANIFEST, request.compression.suffix()));
    let manifest = manifest.ok_or_else(|| BackupError::Internal { why: "the manifest was not stored".into() })?;
    // Their names are in the order of their numbers.
    let volumes: Vec<StoredPart> = stored.into_values().collect();
    let control = &streamed.control;
    let tablespaces = streamed.tablespaces.iter().filter_map(|tablespace| {
        let (oid, location) = (tablespace.oid?, tablespace.location.clone()?);
        Some(BackupTablespace { oid, location })
    });
    Ok(BackupJson {
        format: crate::repository::FORMAT,
        kind: id.kind().to_owned(),
        id,
        system_identifier: control.system_identifier,
        wal_segment_size: streamed.segment_size,
        start_timeline: streamed.start_timeline,
        stop_timeline: streamed.stop_timeline,
        timeline: streamed.stop_timeline,
        start_lsn: streamed.start_lsn,
        stop_lsn: streamed.stop_lsn,
        start_time: streamed.start_time,
        stop_time: streamed.stop_time,
        postgres_version: streamed.server_version,
        size_bytes: volumes.iter().map(|volume| volume.raw_bytes).sum(),
        stored_bytes: volumes.iter().map(|volume| volume.stored_bytes).sum(),
        parent: None,
        label: request.label.clone(),
        duration_seconds: duration.as_secs_f64(),
        required_settings: RequiredSettings {
            max_connections: control.max_connections,
            max_worker_processes: control.max_worker_processes,
            max_wal_senders: control.max_wal_senders,
            max_prepared_transactions: control.max_prepared_xacts,
            max_locks_per_transaction: control.max_locks_per_xact,
        },
        tablespaces: tablespaces.collect(),
        volumes,
        manifest: Some(manifest),
        checksum_failures: streamed.checksum_failures.clone(),
    })
}
