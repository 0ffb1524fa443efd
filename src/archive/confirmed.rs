//! What the required repositories hold, as their uploaders learn it: what `durability = "repository"` may confirm.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

use crate::wal::{Lsn, TimelineId};

/// By repository; `None` while it is not known.
type Positions = BTreeMap<String, Option<(TimelineId, Lsn)>>;

/// Clones share it.
#[derive(Clone, Debug)]
pub struct Confirmed(Arc<watch::Sender<Positions>>);

impl Confirmed {
    /// `required`: names of the repositories that count.
    pub fn new(required: impl IntoIterator<Item = String>) -> Self {
        Self(Arc::new(watch::Sender::new(required.into_iter().map(|name| (name, None)).collect())))
    }

    /// The repository holds everything up to `position` on `timeline`.
    pub fn set(&self, repository: &str, timeline: TimelineId, position: Lsn) {
        self.0.send_if_modified(|positions| {
            let Some(known) = positions.get_mut(repository) else { return false };
            known.replace((timeline, position)) != Some((timeline, position))
        });
    }

    pub fn subscribe(&self) -> ConfirmedWatch {
        ConfirmedWatch(self.0.subscribe())
    }
}

#[derive(Clone, Debug)]
pub struct ConfirmedWatch(watch::Receiver<Positions>);

impl ConfirmedWatch {
    /// What all of them hold on `timeline`. A position on another timeline says nothing: behind a switch it may be higher.
    pub fn on(&self, timeline: TimelineId) -> Option<Lsn> {
        lowest(&self.0.borrow(), timeline)
    }

    /// Waits for a change; for ever if there is none to come.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

fn lowest(positions: &Positions, timeline: TimelineId) -> Option<Lsn> {
    let on_it =
        |known: &Option<(TimelineId, Lsn)>| known.filter(|(of, _)| *of == timeline).map(|(_, position)| position);
    positions.values().map(on_it).collect::<Option<Vec<Lsn>>>()?.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_all_counts_and_only_on_the_same_timeline() {
        let (one, two) = (TimelineId::FIRST, TimelineId::new(2).expect("2"));
        let confirmed = Confirmed::new(["a".to_owned(), "b".to_owned()]);
        let watch = confirmed.subscribe();
        confirmed.set("a", one, Lsn::new(100));
        assert_eq!(watch.on(one), None, "the other is not known");
        confirmed.set("b", one, Lsn::new(70));
        confirmed.set("optional", one, Lsn::new(1));
        assert_eq!(watch.on(one), Some(Lsn::new(70)));
        assert_eq!(watch.on(two), None, "what was held before the switch confirms nothing behind it");
        confirmed.set("a", two, Lsn::new(90));
        assert_eq!((watch.on(one), watch.on(two)), (None, None));
        confirmed.set("b", two, Lsn::new(95));
        assert_eq!(watch.on(two), Some(Lsn::new(90)));
    }
}
