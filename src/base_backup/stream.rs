//! The way from the server to compressed parts: one thread that receives, checks, splits and compresses in cache.
//!
//! Handing the bytes to another thread would cost half as much again (docs/performance.md); so this one has a runtime of its own,
//! and the shared runtime's workers never compress.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::postgres::{BackupEvent, BackupOptions, ConnectSettings, ControlFile, ReplicationConnection, Tablespace};
use crate::seal::Compression;
use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineId};

use super::manifest::{Fingerprints, ManifestReader};
use super::parts::{Part, PartEncoder};
use super::splitter::Splitter;
use super::{BackupError, Progress, Stage};

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
pub(super) const MANIFEST: &str = "backup_manifest";

pub(super) type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;
pub(super) type Clock = Arc<dyn Fn() -> PgTime + Send + Sync>;

pub(super) struct StreamJob {
    pub(super) settings: ConnectSettings,
    pub(super) expected: SystemIdentifier,
    pub(super) options: BackupOptions,
    pub(super) volume_bytes: u64,
    pub(super) compression: Compression,
    pub(super) compression_level: i32,
    pub(super) clock: Clock,
    pub(super) progress: ProgressSink,
    pub(super) stop: CancellationToken,
}

/// What the server told of a backup that came whole.
pub(super) struct Streamed {
    pub(super) server_version: u32,
    pub(super) segment_size: SegmentSize,
    pub(super) start_timeline: TimelineId,
    pub(super) start_lsn: Lsn,
    pub(super) start_time: PgTime,
    pub(super) stop_timeline: TimelineId,
    pub(super) stop_lsn: Lsn,
    pub(super) stop_time: PgTime,
    pub(super) tablespaces: Vec<Tablespace>,
    pub(super) control: ControlFile,
    pub(super) raw_bytes: u64,
    /// What the server said of pages whose checksum is wrong.
    pub(super) checksum_failures: Vec<String>,
}

/// Runs the job on a thread of its own. The sender is dropped when the last part was given.
pub(super) fn spawn(job: StreamJob, parts: mpsc::Sender<Part>) -> oneshot::Receiver<Result<Streamed, BackupError>> {
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = sender.send(Err(BackupError::Internal { why: error.to_string() }));
                return;
            }
        };
        let stop = job.stop.clone();
        let result = runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop.cancelled() => Err(BackupError::Cancelled),
                result = job.run(parts) => result,
            }
        });
        // A name that is still being looked up must not hold the thread.
        runtime.shutdown_background();
        // Nobody waits any more if the backup was given up.
        let _ = sender.send(result);
    };
    if let Err(error) = std::thread::Builder::new().name("base-backup".into()).spawn(work) {
        let (sender, failed) = oneshot::channel();
        let _ = sender.send(Err(BackupError::Internal { why: error.to_string() }));
        return failed;
    }
    receiver
}

/// What is being read.
enum Reading {
    Archives(Box<Splitter>),
    Manifest(Box<Manifest>),
}

struct Manifest {
    parts: PartEncoder,
    reader: ManifestReader,
    control: ControlFile,
}

impl StreamJob {
    async fn run(self, parts: mpsc::Sender<Part>) -> Result<Streamed, BackupError> {
        let mut connection = ReplicationConnection::connect(&self.settings).await?;
        let found = connection.identify_system().await?.system_identifier;
        self.check_identity(found)?;
        let segment_size = connection.segment_size().await?;
        let server_version = connection.server_version();
        (self.progress)(Progress { stage: Stage::Checkpoint, bytes_done: 0, bytes_total: 0 });
        let mut backup = connection.base_backup(&self.options).await?;
        let start_time = (self.clock)();
        let bytes_total = backup.tablespaces.iter().map(|tablespace| tablespace.size_bytes).sum();
        let encoder = PartEncoder::new(self.compression, self.compression_level)?;
        let mut reading = Reading::Archives(Box::new(Splitter::new(self.volume_bytes, encoder)));
        let (mut raw_bytes, mut told) = (0, Instant::now());
        let (stop_lsn, stop_timeline) = loop {
            match (backup.next().await?, &mut reading) {
                (BackupEvent::Archive { tablespace }, Reading::Archives(splitter)) => {
                    splitter.begin_archive(tablespace)?;
                }
                (BackupEvent::Data(bytes), Reading::Archives(splitter)) => {
                    splitter.push(bytes)?;
                    raw_bytes += bytes.len() as u64;
                }
                (BackupEvent::Manifest(bytes), Reading::Manifest(manifest)) => {
                    manifest.reader.push(bytes)?;
                    manifest.parts.write(bytes)?;
                }
                (BackupEvent::ManifestBegins, Reading::Archives(_)) => reading = self.begin_manifest(reading)?,
                (BackupEvent::End { stop_lsn, stop_timeline }, _) => break (stop_lsn, stop_timeline),
                _ => return Err(BackupError::Tar { why: "the backup's parts came in the wrong order".into() }),
            }
            send_ready(reading.parts(), &parts).await?;
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                (self.progress)(Progress { stage: Stage::Copy, bytes_done: raw_bytes, bytes_total });
            }
        };
        let stop_time = (self.clock)();
        let warnings = backup.take_warnings();
        let checksum_failures = if backup.pages_damaged() {
            warnings
        } else {
            warnings.iter().for_each(|warning| tracing::warn!("the server said during the base backup: {warning}"));
            Vec::new()
        };
        let Reading::Manifest(manifest) = reading else {
            return Err(BackupError::Manifest { why: "the server sent none".into() });
        };
        let Manifest { parts: mut encoder, reader, control } = *manifest;
        reader.finish()?;
        encoder.finish()?;
        send_ready(&mut encoder, &parts).await?;
        (self.progress)(Progress { stage: Stage::Copy, bytes_done: raw_bytes, bytes_total });
        self.check_identity(control.system_identifier)?;
        Ok(Streamed {
            server_version,
            segment_size,
            start_timeline: backup.start_timeline,
            start_lsn: backup.start_lsn,
            start_time,
            stop_timeline,
            stop_lsn,
            stop_time,
            tablespaces: backup.tablespaces,
            control,
            raw_bytes,
            checksum_failures,
        })
    }

    fn check_identity(&self, found: SystemIdentifier) -> Result<(), BackupError> {
        if found == self.expected {
            return Ok(());
        }
        Err(BackupError::OtherCluster { expected: self.expected, found })
    }

    /// The archives are at an end: the last volume is closed, and what came can be compared.
    fn begin_manifest(&self, reading: Reading) -> Result<Reading, BackupError> {
        let Reading::Archives(mut splitter) = reading else {
            return Err(BackupError::Manifest { why: "it came twice".into() });
        };
        let (control, files): (ControlFile, Fingerprints) = splitter.finish()?;
        let mut parts = splitter.into_parts();
        parts.begin(MANIFEST);
        Ok(Reading::Manifest(Box::new(Manifest { parts, reader: ManifestReader::new(files), control })))
    }
}

impl Reading {
    fn parts(&mut self) -> &mut PartEncoder {
        match self {
            Self::Archives(splitter) => splitter.parts(),
            Self::Manifest(manifest) => &mut manifest.parts,
        }
    }
}

/// Waits while as many parts as may be in memory are.
async fn send_ready(encoder: &mut PartEncoder, parts: &mpsc::Sender<Part>) -> Result<(), BackupError> {
    while let Some(part) = encoder.take_ready() {
        // Nobody takes it: the upload has failed, and tells why.
        parts.send(part).await.map_err(|_| BackupError::Cancelled)?;
    }
    Ok(())
}
