//! What a caller does after an error. Every room's error type answers `next_step()`, without a catch-all arm, because a
//! wrong choice here loses WAL: a retry after a failed fsync, for example, may report success for bytes that are gone.

/// The next step after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextStep {
    /// The same call may work later (an outage, a timeout): try again with backoff, without an end.
    Retry,
    /// Room must be made first (disk full, spool at its bound): stop taking in more and try again when there is.
    Wait,
    /// What was written is void: take the bytes again from the server.
    FetchAgain,
    /// Going on would be wrong until an operator acts: another cluster, a conflict, a diverged history, bad settings.
    Stop,
}
