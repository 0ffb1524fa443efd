//! Where a base backup goes: into every required repository, and into others for as long as they keep up. One that does not is left
//! out of this backup, with a warning; what it got has no `backup.json` and so is no backup.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::BackupError;
use super::upload::until_done;
use crate::repository::{BackupWriter, RepositoryError};
use crate::wal::{Lsn, SegmentSize, TimelineId};

const PATIENCE: Duration = Duration::from_secs(60);
/// The same for the first request, and how often it is tried: one that is down is left out soon.
pub(super) const FIRST_PATIENCE: Duration = Duration::from_secs(10);
pub(super) const FIRST_TRIES: u32 = 4;
/// How often it is looked whether its WAL has come.
const WAL_POLL: Duration = Duration::from_millis(500);

/// One repository of a backup. Clones share whether it is left out.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) writer: BackupWriter,
    pub(super) required: bool,
    pub(super) left_out: Arc<AtomicBool>,
    /// How long it may take for each request, tries included, and for its WAL to come, if it is not required.
    pub(super) patience: Duration,
}

impl Place {
    pub(super) fn new(writer: BackupWriter, required: bool) -> Self {
        Self { writer, required, left_out: Arc::default(), patience: PATIENCE }
    }

    pub(super) fn is_left_out(&self) -> bool {
        self.left_out.load(Ordering::Relaxed)
    }

    /// As `until_done`, for as long as it may take here. `None`: it is left out.
    pub(super) async fn until_done<T, F>(
        &self,
        stop: &CancellationToken,
        delay_max: Duration,
        tries_max: Option<u32>,
        call: impl Fn() -> F,
    ) -> Result<Option<T>, BackupError>
    where
        F: Future<Output = Result<T, RepositoryError>>,
    {
        if self.is_left_out() {
            return Ok(None);
        }
        let done = until_done(stop, delay_max, tries_max, call);
        if self.required {
            return done.await.map(Some);
        }
        match tokio::time::timeout(self.patience, done).await {
            Ok(Ok(value)) => Ok(Some(value)),
            Ok(Err(BackupError::Cancelled)) => Err(BackupError::Cancelled),
            Ok(Err(error)) => Ok(self.leave_out(&describe(&error))),
            Err(_) => Ok(self.leave_out(&format!("no answer within {} s", self.patience.as_secs()))),
        }
    }

    /// Waits until the WAL that the backup needs is in this repository, which nobody else has waited for.
    pub(super) async fn wait_for_wal(
        &self,
        stop: &CancellationToken,
        (timeline, start, end): (TimelineId, Lsn, Lsn),
        size: SegmentSize,
    ) -> Result<(), BackupError> {
        let deadline = Instant::now() + self.patience;
        while !self.required && !self.is_left_out() {
            let archive = self.writer.archive();
            let asked = tokio::time::timeout(self.patience, archive.archived_from(timeline, start, size));
            let asked = tokio::select! {
                asked = asked => asked,
                () = stop.cancelled() => return Err(BackupError::Cancelled),
            };
            if matches!(asked, Ok(Ok(archived)) if archived.end >= end) {
                break;
            }
            if Instant::now() >= deadline {
                self.leave_out::<()>(&format!("it does not have the WAL through {end}"));
            }
            tokio::time::sleep(WAL_POLL).await;
        }
        Ok(())
    }

    fn leave_out<T>(&self, why: &str) -> Option<T> {
        if !self.left_out.swap(true, Ordering::Relaxed) {
            left_out(self.writer.archive().repository().name(), why);
        }
        None
    }
}

/// Says it once.
pub(super) fn left_out(repository: &str, why: &str) {
    tracing::warn!(
        event = "backup_left_out",
        "the base backup goes on without repository {repository}, which is not required: {why}"
    );
}

pub(super) fn describe(error: &BackupError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
