//! The first contact with a repository, for commands that somebody waits for: what cannot pass by itself is told at once, what may
//! pass is waited for a moment.

use std::time::{Duration, Instant};

use crate::archive::Target;
use crate::config::Settings;
use crate::repository::RepositoryError;
use crate::storage::{Backoff, StorageError};

/// How long a repository that does not answer is waited for.
const PATIENCE_MAX: Duration = Duration::from_secs(30);
/// Delays between two tries.
const DELAY_MAX: Duration = Duration::from_secs(5);

/// No longer than one request may take.
pub fn patience(settings: &Settings) -> Duration {
    settings.upload.request_timeout.min(PATIENCE_MAX)
}

/// Asks until an answer comes, or an error that waiting does not heal. Says meanwhile why it waits.
pub async fn first<T, F>(target: &Target, patience: Duration, ask: impl Fn() -> F) -> Result<T, RepositoryError>
where
    F: Future<Output = Result<T, RepositoryError>>,
{
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::new(DELAY_MAX);
    let mut last = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match tokio::time::timeout(left, ask()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(_) => return Err(last.unwrap_or_else(|| silent(target, patience))),
        };
        let delay = backoff.next_delay();
        let left = deadline.saturating_duration_since(Instant::now());
        if !error.may_pass() || left <= delay {
            return Err(error);
        }
        if backoff.attempts().is_power_of_two() {
            let (name, seconds) = (target.repository.name(), left.as_secs().max(1));
            tracing::warn!("trying again for up to {seconds} s: repository {name}: {}", super::error::chain(&error));
        }
        last = Some(error);
        tokio::time::sleep(delay).await;
    }
}

fn silent(target: &Target, patience: Duration) -> RepositoryError {
    let why = format!("no answer came within {} s", patience.as_secs());
    StorageError::Unavailable {
        url: target.repository.url(),
        what: "the first request".into(),
        source: Some(why.into()),
    }
    .into()
}
