//! What is worth waiting out, and for how long.

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::FetchOutcome;
use crate::failure::NextStep;
use crate::repository::RepositoryError;
use crate::restore::RestoreError;
use crate::storage::{Backoff, StorageError};

/// Tries for what will hardly change by itself: an object that is missing or damaged, perhaps only on its way.
const FEW_TRIES: u32 = 3;
const DELAY_MAX: Duration = Duration::from_secs(5);

/// When something came last. An attempt is not given up as long as bytes come.
#[derive(Debug)]
pub(super) struct Progress(Mutex<Instant>);

impl Progress {
    pub(super) fn note(&self) {
        *self.0.lock().expect("nothing panics while it holds it") = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().expect("nothing panics while it holds it")
    }
}

/// Repeats what may pass by itself until `patience` is over. One attempt that goes on may take longer: it is silence that is bounded.
pub(super) async fn patiently<F: Future<Output = Result<FetchOutcome, RestoreError>>>(
    patience: Duration,
    mut attempt: impl FnMut(Arc<Progress>) -> F,
) -> Result<FetchOutcome, RestoreError> {
    let started = Instant::now();
    let progress = Arc::new(Progress(Mutex::new(started)));
    let (mut backoff, mut tries, mut told) = (Backoff::new(DELAY_MAX), 0, String::new());
    let mut last = None;
    loop {
        let mut running = pin!(attempt(progress.clone()));
        let error = loop {
            let left = patience.saturating_sub(progress.last().elapsed());
            match tokio::time::timeout(left, &mut running).await {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(error)) => break error,
                Err(_) if progress.last().elapsed() < patience => {}
                // What was answered before says more than that time is over.
                Err(_) => return Err(last.unwrap_or(RestoreError::Timeout { seconds: patience.as_secs() })),
            }
        };
        tries += 1;
        let tries_max = match persistence(&error) {
            Persistence::UntilPatienceEnds => u32::MAX,
            Persistence::FewTries => FEW_TRIES,
            Persistence::None => 1,
        };
        let delay = backoff.next_delay();
        if tries >= tries_max || started.elapsed() + delay >= patience {
            return Err(error);
        }
        // Into PostgreSQL's log, and the same words once only.
        let why = crate::restore::error::with_sources(&error);
        if why != told {
            tracing::warn!("trying again for {} s: {why}", patience.as_secs());
            told = why;
        }
        last = Some(error);
        tokio::time::sleep(delay).await;
    }
}

/// How long an error is worth waiting out. PostgreSQL stops at 255, and an operator starts it again when the cause is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Persistence {
    /// An outage: nothing was answered, or "later"; what is on its way.
    UntilPatienceEnds,
    /// An answer that says no, or bytes that are wrong, perhaps only on their way.
    FewTries,
    /// It will be the same each time.
    None,
}

pub(super) fn persistence(error: &RestoreError) -> Persistence {
    let of_disk = |source: &std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Persistence::UntilPatienceEnds,
        _ => Persistence::None,
    };
    match error {
        RestoreError::Repository(RepositoryError::Storage(error)) => match error {
            StorageError::Unavailable { .. } | StorageError::Throttled { .. } => Persistence::UntilPatienceEnds,
            StorageError::Settings { .. } => Persistence::None,
            StorageError::NotFound { .. }
            | StorageError::Denied { .. }
            | StorageError::NoBucket { .. }
            | StorageError::NotAStore { .. }
            | StorageError::Refused { .. }
            | StorageError::UploadGone { .. }
            | StorageError::Full { .. }
            | StorageError::Damaged { .. }
            | StorageError::TooLarge { .. }
            | StorageError::SourceDamaged { .. } => Persistence::FewTries,
        },
        RestoreError::Repository(RepositoryError::Local { source, .. }) | RestoreError::Io { source, .. } => {
            of_disk(source)
        }
        // Pieces are stored several at once, and the first of them comes last now and then.
        RestoreError::Incomplete { .. } => Persistence::UntilPatienceEnds,
        error if error.exit_code() == 5 || error.next_step() == NextStep::Retry => Persistence::FewTries,
        _ => Persistence::None,
    }
}
