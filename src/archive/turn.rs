//! Whose turn it is to archive, as the required repositories' leases tell (I20).
//!
//! Of two agents that each had one of two leases neither would ever archive. So the leases are taken in one order, that of the
//! repositories' names and the required ones first: whoever sees an earlier one taken gives the later ones back, and waits.

use std::collections::BTreeMap;
use std::ops::Bound;
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

type Seats = BTreeMap<String, Seat>;

/// Those in front of `repository`; all of them for one that is not required, and for `None`, the live path.
fn before<'a>(seats: &'a Seats, repository: Option<&str>) -> impl Iterator<Item = Seat> + use<'a> {
    let end = repository.filter(|name| seats.contains_key(*name)).map_or(Bound::Unbounded, Bound::Excluded);
    seats.range::<str, _>((Bound::Unbounded, end)).map(|(_, seat)| *seat)
}

/// Shared by the uploaders, who learn it, and the live path, which stands by while another agent archives. Clones share it.
#[derive(Clone, Debug)]
pub struct Turn(Arc<watch::Sender<Seats>>);

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

    /// The lease was given back.
    pub fn is_given_back(&self, repository: &str) {
        self.set(repository, |_| Seat::Unknown);
    }

    /// Waits until no other agent archives.
    pub async fn comes(&self) {
        self.comes_before(None).await;
    }

    /// Waits until another agent archives.
    pub async fn is_lost(&self) {
        self.is_lost_before(None).await;
    }

    /// Waits until no other agent has a repository in front of this one.
    pub async fn comes_to(&self, repository: &str) {
        self.comes_before(Some(repository)).await;
    }

    /// Waits until another agent has a repository in front of this one.
    pub async fn leaves(&self, repository: &str) {
        self.is_lost_before(Some(repository)).await;
    }

    async fn comes_before(&self, repository: Option<&str>) {
        let mut seats = self.0.subscribe();
        let known = |seats: &Seats| before(seats, repository).all(|seat| seat != Seat::Unknown);
        // Without an answer in time: no other agent is known.
        let _ = tokio::time::timeout(FIRST_ANSWER, seats.wait_for(known)).await;
        // The sender lives as long as this handle.
        let _ = seats.wait_for(|seats| before(seats, repository).all(|seat| seat != Seat::Taken)).await;
    }

    async fn is_lost_before(&self, repository: Option<&str>) {
        let mut seats = self.0.subscribe();
        let _ = seats.wait_for(|seats| before(seats, repository).any(|seat| seat == Seat::Taken)).await;
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

    #[tokio::test]
    async fn leases_are_taken_in_one_order_and_given_back_in_it() {
        let turn = Turn::new(["b".to_owned(), "a".to_owned()]);
        turn.comes_to("a").await;
        let blocked = async |name: &str| {
            let waited = tokio::time::timeout(Duration::from_millis(20), turn.comes_to(name)).await;
            let left = tokio::time::timeout(Duration::from_millis(20), turn.leaves(name)).await;
            (waited.is_err(), left.is_ok())
        };
        // The first one is not known yet: it is waited for, and nothing is given back.
        assert_eq!((blocked("a").await, blocked("b").await), ((false, false), (true, false)));
        turn.is_ours("a");
        assert_eq!((blocked("b").await, blocked("optional").await), ((false, false), (true, false)));
        turn.is_anothers("b");
        // The one behind it blocks none in front, so one agent gets both.
        assert_eq!((blocked("a").await, blocked("b").await), ((false, false), (false, false)));
        assert_eq!(blocked("optional").await, (true, true));
        turn.is_anothers("a");
        turn.is_ours("b");
        assert_eq!((blocked("a").await, blocked("b").await), ((false, false), (true, true)));
        turn.is_given_back("b");
        turn.is_ours("a");
        assert_eq!(blocked("b").await, (false, false));
    }
}
