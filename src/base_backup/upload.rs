//! The parts of a backup to the repositories, several at a time, each tried again until it is stored or the backup is given up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::failure::NextStep;
use crate::repository::{BackupWriter, RepositoryError, StoredPart};
use crate::storage::{Backoff, Body, MultipartUpload, StorageError};

use super::BackupError;
use super::parts::Part;
use super::places::Place;

/// Tries for what cannot be expected to heal by waiting, such as a checksum that the store did not accept.
const DOUBTFUL_TRIES: u32 = 5;
/// Tries to complete an object whose parts are all stored. Some stores forget a started upload; then only a new backup helps.
const COMPLETE_TRIES: u32 = 30;
const ABORT_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct Uploader {
    pub(super) places: Vec<Place>,
    /// Parts in memory at most, those being sent included.
    pub(super) parts_in_flight: usize,
    pub(super) retry_delay_max: Duration,
    pub(super) stop: CancellationToken,
}

/// A part on its way, and its place among those in flight.
struct Sent {
    part: Part,
    permit: OwnedSemaphorePermit,
}

impl Uploader {
    /// Stores every part that comes; gives what was stored, by name. After an error nothing is left running.
    pub(super) async fn run(
        self,
        mut parts: mpsc::Receiver<Part>,
    ) -> Result<BTreeMap<String, StoredPart>, BackupError> {
        let mut objects = JoinSet::new();
        let work = self.route(&mut parts, &mut objects).await;
        // No more is taken: the encoder notices and ends.
        drop(parts);
        if work.is_err() {
            self.stop.cancel();
            while objects.join_next().await.is_some() {}
        }
        work
    }

    async fn route(
        &self,
        parts: &mut mpsc::Receiver<Part>,
        objects: &mut JoinSet<Result<StoredPart, BackupError>>,
    ) -> Result<BTreeMap<String, StoredPart>, BackupError> {
        let places = Arc::new(Semaphore::new(self.parts_in_flight.max(1)));
        let mut stored = BTreeMap::new();
        let mut current: Option<mpsc::UnboundedSender<Sent>> = None;
        loop {
            let next = async {
                let permit = places.clone().acquire_owned().await.ok()?;
                parts.recv().await.map(|part| Sent { part, permit })
            };
            let sent = tokio::select! {
                biased;
                Some(object) = objects.join_next() => {
                    let object: StoredPart = joined(object)?;
                    stored.insert(object.key.clone(), object);
                    continue;
                }
                sent = next => sent,
            };
            let Some(sent) = sent else { break };
            let last = sent.part.whole.is_some();
            let channel = current.take().unwrap_or_else(|| {
                // Bounded by the places: every part in it holds one.
                let (channel, receiver) = mpsc::unbounded_channel();
                let object =
                    Object { places: self.places.clone(), delay_max: self.retry_delay_max, stop: self.stop.clone() };
                objects.spawn(object.store(receiver));
                channel
            });
            // If the object's task has ended, its error is what the next turn finds.
            let _ = channel.send(sent);
            current = (!last).then_some(channel);
        }
        drop(current);
        while let Some(object) = objects.join_next().await {
            let object = joined(object)?;
            stored.insert(object.key.clone(), object);
        }
        Ok(stored)
    }
}

fn joined(result: Result<Result<StoredPart, BackupError>, tokio::task::JoinError>) -> Result<StoredPart, BackupError> {
    result.unwrap_or_else(|error| Err(BackupError::Internal { why: error.to_string() }))
}

/// One object's upload to each place; `None` where it is left out.
type Uploads = Vec<Option<Arc<dyn MultipartUpload>>>;

/// One object of the backup on its way to every repository.
#[derive(Clone)]
struct Object {
    places: Vec<Place>,
    delay_max: Duration,
    stop: CancellationToken,
}

impl Object {
    async fn store(self, mut parts: mpsc::UnboundedReceiver<Sent>) -> Result<StoredPart, BackupError> {
        let Some(first) = parts.recv().await else { return Err(BackupError::Cancelled) };
        if let Some(whole) = first.part.whole.clone() {
            let body = Body::Bytes(first.part.bytes.clone());
            try_join_all(self.places.iter().map(|place| {
                let put = || place.writer.put(&whole.key, &body, whole.stored_bytes, whole.stored_crc32);
                self.until_done(place, None, put)
            }))
            .await?;
            return Ok(whole);
        }
        let name = first.part.object.clone();
        let begun =
            self.places.iter().map(|place| self.until_done(place, None, || place.writer.begin_multipart(&name)));
        let uploads: Uploads = try_join_all(begun).await?.into_iter().map(|begun| begun.map(Arc::from)).collect();
        let outcome = self.send_parts(&uploads, first, &mut parts).await;
        for (place, upload) in self.places.iter().zip(&uploads) {
            if let Some(upload) = upload.as_ref().filter(|_| outcome.is_err() || place.is_left_out()) {
                // Best effort: stores are told to forget unfinished uploads after some days (docs/operations.md).
                let _ = tokio::time::timeout(ABORT_LIMIT, upload.abort()).await;
            }
        }
        outcome
    }

    async fn send_parts(
        &self,
        uploads: &Uploads,
        first: Sent,
        parts: &mut mpsc::UnboundedReceiver<Sent>,
    ) -> Result<StoredPart, BackupError> {
        let mut sending: JoinSet<Result<(), BackupError>> = JoinSet::new();
        let mut next = Some(first);
        let whole = loop {
            let Some(Sent { part, permit }) = next else {
                // The encoder stopped in the middle; its error is the one to tell.
                return Err(BackupError::Cancelled);
            };
            let (object, uploads) = (self.clone(), uploads.clone());
            let (number, bytes, crc32, whole) = (part.number, part.bytes, part.crc32, part.whole);
            sending.spawn(async move {
                let sent = object.send_part(&uploads, number, bytes, crc32).await;
                drop(permit);
                sent
            });
            if let Some(whole) = whole {
                break whole;
            }
            next = loop {
                tokio::select! {
                    biased;
                    Some(sent) = sending.join_next() => sent.map_err(|e| BackupError::Internal { why: e.to_string() })??,
                    part = parts.recv() => break part,
                }
            };
        };
        while let Some(sent) = sending.join_next().await {
            sent.map_err(|e| BackupError::Internal { why: e.to_string() })??;
        }
        let completed = self.begun(uploads).map(|(place, upload)| {
            let whole = &whole;
            self.until_done(place, Some(COMPLETE_TRIES), move || complete(&place.writer, upload.as_ref(), whole))
        });
        try_join_all(completed).await?;
        Ok(whole)
    }

    async fn send_part(&self, uploads: &Uploads, number: u32, bytes: Bytes, crc32: u32) -> Result<(), BackupError> {
        try_join_all(self.begun(uploads).map(|(place, upload)| {
            self.until_done(place, None, || {
                let (upload, bytes) = (upload.clone(), bytes.clone());
                async move { upload.put_part(number, bytes, crc32).await.map_err(RepositoryError::from) }
            })
        }))
        .await
        .map(|_| ())
    }

    /// Those that have begun the object.
    fn begun<'a>(&'a self, uploads: &'a Uploads) -> impl Iterator<Item = (&'a Place, &'a Arc<dyn MultipartUpload>)> {
        self.places.iter().zip(uploads).filter_map(|(place, upload)| Some((place, upload.as_ref()?)))
    }

    async fn until_done<T, F>(
        &self,
        place: &Place,
        tries_max: Option<u32>,
        call: impl Fn() -> F,
    ) -> Result<Option<T>, BackupError>
    where
        F: Future<Output = Result<T, RepositoryError>>,
    {
        place.until_done(&self.stop, self.delay_max, tries_max, call).await
    }
}

/// Makes an object appear whose parts are all stored. If the answer to an earlier try was lost, the upload is over and the object is there.
async fn complete(
    writer: &BackupWriter,
    upload: &dyn MultipartUpload,
    whole: &StoredPart,
) -> Result<(), RepositoryError> {
    let (size, crc32) = (whole.stored_bytes, whole.stored_crc32);
    let Err(error) = writer.complete(&whole.key, upload, size, crc32).await else { return Ok(()) };
    match writer.archive().holds(&writer.key(&whole.key), size, crc32).await {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(error),
    }
}

/// What a call gave, or `Cancelled`.
async fn unless_stopped<T>(
    stop: &CancellationToken,
    call: impl Future<Output = Result<T, RepositoryError>>,
) -> Result<Result<T, RepositoryError>, BackupError> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(BackupError::Cancelled),
        result = call => Ok(result),
    }
}

/// Calls until it works, with growing delays and without an end, unless `tries_max` sets one; an error that no retry can heal ends it,
/// and so does `stop`.
pub(super) async fn until_done<T, F>(
    stop: &CancellationToken,
    delay_max: Duration,
    tries_max: Option<u32>,
    call: impl Fn() -> F,
) -> Result<T, BackupError>
where
    F: Future<Output = Result<T, RepositoryError>>,
{
    let mut backoff = Backoff::new(delay_max);
    loop {
        let error = match unless_stopped(stop, call()).await? {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let tries_max = match error.next_step() {
            NextStep::Stop => Some(0),
            NextStep::FetchAgain => Some(DOUBTFUL_TRIES),
            NextStep::Retry | NextStep::Wait => tries_max,
        };
        if tries_max.is_some_and(|max| backoff.attempts() + 1 >= max) {
            return Err(error.into());
        }
        let delay = match &error {
            RepositoryError::Storage(StorageError::Throttled { .. }) => backoff.next_delay_throttled(),
            _ => backoff.next_delay(),
        };
        // The first failure and then now and then: an outage of hours is not a line per second.
        if backoff.attempts().is_power_of_two() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                attempts = backoff.attempts(),
                "storing a part of the base backup failed; trying again"
            );
        }
        tokio::select! {
            () = stop.cancelled() => return Err(BackupError::Cancelled),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

/// Calls until it works, as long as its error may pass by itself and `deadline` has not come.
pub(super) async fn until_due<T, F>(
    stop: &CancellationToken,
    delay_max: Duration,
    deadline: Instant,
    call: impl Fn() -> F,
) -> Result<T, BackupError>
where
    F: Future<Output = Result<T, RepositoryError>>,
{
    let mut backoff = Backoff::new(delay_max);
    loop {
        let error = match unless_stopped(stop, call()).await? {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let delay = backoff.next_delay();
        if !error.may_pass() || Instant::now() + delay >= deadline {
            return Err(error.into());
        }
        tokio::select! {
            () = stop.cancelled() => return Err(BackupError::Cancelled),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
