//! Whose turn it is to archive, as the required repositories' leases tell (I20).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// How long the first answer of a store is waited for. One that does not answer holds nothing up (I11).
const FIRST_ANSWER: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    Unknown,
    /// Ours, or the store does not answer.
    Free,
    /// Another agent holds the lease.
    Taken,
}

/// Shared by the uploaders, who learn it, and the live path, which stands by while another agent archives. Clones share it.
#[derive(Clone, Debug)]
pub struct Turn(Arc<watch::Sender<BTreeMap<String, Seat>>>);

impl Turn {
    /// `required`: names of the repositories that count.
    pub fn new(required: impl IntoIterator<Item = String>) -> Self {
        Self(Arc::new(watch::Sender::new(required.into_iter().map(|name| (name, Seat::Unknown)).collect())))
    }

    fn set(&self, repository: &str, change: impl FnOnce(Seat) -> Seat) {
        self.0.send_if_modified(|seats| {
            let Some(seat) = seats.get_mut(repository) else { return false };
            let new = change(*seat);
            std::mem::replace(seat, new) != new
        });
    }

    pub fn is_ours(&self, repository: &str) {
        self.set(repository, |_| Seat::Free);
    }

    pub fn is_anothers(&self, repository: &str) {
        self.set(repository, |_| Seat::Taken);
    }

    /// The store does not answer: what was known stays, and what was not is not waited for.
    pub fn is_unanswered(&self, repository: &str) {
        self.set(repository, |seat| if seat == Seat::Unknown { Seat::Free } else { seat });
    }

    /// Waits until no other agent archives.
    pub async fn comes(&self) {
        let mut seats = self.0.subscribe();
        let known = |seats: &BTreeMap<String, Seat>| seats.values().all(|seat| *seat != Seat::Unknown);
        // Without an answer in time: no other agent is known.
        let _ = tokio::time::timeout(FIRST_ANSWER, seats.wait_for(known)).await;
        // The sender lives as long as this handle.
        let _ = seats.wait_for(|seats| !seats.values().any(|seat| *seat == Seat::Taken)).await;
    }

    /// Waits until another agent archives.
    pub async fn is_lost(&self) {
        let mut seats = self.0.subscribe();
        let _ = seats.wait_for(|seats| seats.values().any(|seat| *seat == Seat::Taken)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_agent_is_waited_for_and_a_silent_store_is_not() {
        let turn = Turn::new(["a".to_owned(), "b".to_owned()]);
        turn.is_ours("a");
        turn.is_unanswered("b");
        turn.comes().await;
        turn.is_anothers("b");
        turn.is_lost().await;
        turn.is_unanswered("b");
        assert!(tokio::time::timeout(Duration::from_millis(50), turn.comes()).await.is_err());
        turn.is_ours("b");
        turn.comes().await;
        // One that is not required does not count.
        turn.is_anothers("optional");
        turn.comes().await;
    }
}
