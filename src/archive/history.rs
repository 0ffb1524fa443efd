//! Timeline history files: the whole chain that the server has is held before anything of its timelines is confirmed (I10), and a
//! number means one history only (I2).

use std::time::Duration;

use super::ArchiveError;
use super::live::{Live, small_entry};
use crate::postgres::ReplicationConnection;
use crate::repository::Archive;
use crate::spool::Spool;
use crate::wal::{Lsn, TimelineHistory, TimelineId};

/// How long a store may take to show a history file before the stream goes on without its word.
const ASK_LIMIT: Duration = Duration::from_secs(5);

impl Live {
    /// A number that another promotion was given as well: nothing of this one is streamed (I2, I10). A store that does not answer
    /// holds nothing up, since its object is never overwritten.
    async fn refuse_other_history(
        &self,
        timeline: TimelineId,
        content: &[u8],
        answering: &mut Vec<Archive>,
    ) -> Result<(), ArchiveError> {
        let mut held = vec![std::fs::read(self.spool.path_of(&Spool::history(timeline))).ok()];
        for archive in std::mem::take(answering) {
            let asked = archive.clone();
            let asked = self.stores.spawn(async move { asked.history(timeline).await });
            match tokio::time::timeout(ASK_LIMIT, asked).await {
                Ok(Ok(Ok(found))) => {
                    held.push(found.map(|bytes| bytes.to_vec()));
                    answering.push(archive);
                }
                // It is not asked for the others: a chain may be long.
                _ => tracing::debug!(%timeline, "the stored history file is not known"),
            }
        }
        match held.into_iter().flatten().find(|other| other != content) {
            Some(other) => Err(other_history(timeline, content, &other)),
            None => Ok(()),
        }
    }

    /// The same for a timeline of the server and all before it, storing nothing.
    pub(super) async fn refuse_other_chain(
        &self,
        connection: &mut ReplicationConnection,
        last: TimelineId,
    ) -> Result<(), ArchiveError> {
        let Some(chain) = self.history(connection, last).await? else { return Ok(()) };
        let mut answering: Vec<Archive> = self.archives.iter().map(|(archive, _)| archive.clone()).collect();
        for timeline in timelines_of(&chain) {
            if let Some(content) = connection.timeline_history(timeline).await? {
                self.refuse_other_history(timeline, &content, &mut answering).await?;
            }
        }
        Ok(())
    }

    /// How a timeline that is held came to be, by the spool's copy of its history file or a repository's. `None`: nobody tells.
    pub(super) async fn stored_history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        let parse = |content: &[u8]| TimelineHistory::parse(timeline, content).ok();
        if let Ok(content) = std::fs::read(self.spool.path_of(&Spool::history(timeline))) {
            return parse(&content);
        }
        for (archive, _) in &self.archives {
            let asked = archive.clone();
            let asked = self.stores.spawn(async move { asked.history(timeline).await });
            match tokio::time::timeout(ASK_LIMIT, asked).await {
                Ok(Ok(Ok(Some(content)))) => return parse(&content),
                Ok(Ok(Ok(None))) => {}
                _ => tracing::debug!(%timeline, "the stored history file is not known"),
            }
        }
        None
    }

    /// All that the spool and the repositories have, of those repositories that answer.
    pub(super) async fn stored_histories(&self) -> Vec<TimelineHistory> {
        let mut histories = Vec::new();
        for (name, _) in self.spool.contents(self.segment_size).map(|contents| contents.sealed).unwrap_or_default() {
            if name.relative.ends_with(".history")
                && let Ok(content) = std::fs::read(self.spool.path_of(&name))
            {
                histories.extend(TimelineHistory::parse(name.timeline, &content));
            }
        }
        for (archive, _) in &self.archives {
            let asked = archive.clone();
            let asked = self.stores.spawn(async move { asked.catalog().await });
            match tokio::time::timeout(ASK_LIMIT, asked).await {
                Ok(Ok(Ok(catalog))) => histories.extend(catalog.timelines.into_values().filter_map(|wal| wal.history)),
                _ => tracing::debug!("the stored history files are not known"),
            }
        }
        histories
    }

    pub(super) async fn history(
        &self,
        connection: &mut ReplicationConnection,
        timeline: TimelineId,
    ) -> Result<Option<TimelineHistory>, ArchiveError> {
        if timeline == TimelineId::FIRST {
            return Ok(Some(TimelineHistory::without_ancestors(timeline)));
        }
        let Some(content) = connection.timeline_history(timeline).await? else { return Ok(None) };
        Ok(Some(TimelineHistory::parse(timeline, &content)?))
    }

    /// Spools the history files of the chain that the server has, before anything of their timelines is confirmed (I10).
    pub(super) async fn store_histories(
        &mut self,
        connection: &mut ReplicationConnection,
        first: TimelineId,
        last: TimelineId,
    ) -> Result<(), ArchiveError> {
        let Some(chain) = self.history(connection, last).await? else { return Ok(()) };
        let mut answering: Vec<Archive> = self.archives.iter().map(|(archive, _)| archive.clone()).collect();
        for lost in self.missing.take_histories() {
            self.histories_spooled.remove(&lost);
        }
        for timeline in timelines_of(&chain) {
            // Asked for each time: the next server that is reached may have another one under the same number.
            let content = connection.timeline_history(timeline).await?;
            match (content, self.histories_spooled.get(&timeline)) {
                (Some(content), Some(spooled)) if content != *spooled => {
                    return Err(other_history(timeline, &content, spooled));
                }
                (_, Some(_)) => {}
                (Some(content), None) => {
                    self.refuse_other_history(timeline, &content, &mut answering).await?;
                    let name = self.spool.write_small(Spool::history(timeline), &content)?;
                    self.backlog.insert(&[small_entry(&name, &content)]);
                    self.histories_spooled.insert(timeline, content);
                }
                // The newest one has the whole chain.
                (None, None) => {
                    tracing::info!(%timeline, streaming = %first, "the server no longer has this history file")
                }
            }
        }
        Ok(())
    }
}

fn other_history(timeline: TimelineId, ours: &[u8], theirs: &[u8]) -> ArchiveError {
    let at = match (TimelineHistory::parse(timeline, ours), TimelineHistory::parse(timeline, theirs)) {
        (Ok(ours), Ok(theirs)) => parting(&ours, &theirs),
        _ => Lsn::ZERO,
    };
    ArchiveError::OtherHistory { timeline: timeline.get(), at }
}

/// Those with a history file, oldest first.
fn timelines_of(chain: &TimelineHistory) -> Vec<TimelineId> {
    let timelines = chain.ancestors().iter().map(|ancestor| ancestor.timeline).chain([chain.timeline()]);
    timelines.filter(|timeline| *timeline != TimelineId::FIRST).collect()
}

/// The first position that two histories of one timeline give to different timelines; where both end alike, the last switch.
fn parting(one: &TimelineHistory, other: &TimelineHistory) -> Lsn {
    let mut switches: Vec<Lsn> =
        one.ancestors().iter().chain(other.ancestors()).map(|ancestor| ancestor.switch).collect();
    switches.sort_unstable();
    let differs = |at: &&Lsn| one.timeline_at(**at) != other.timeline_at(**at);
    switches.iter().find(differs).or(switches.last()).copied().unwrap_or(Lsn::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_histories_of_one_number_part_at_the_earlier_switch() {
        let history = |content: &str| TimelineHistory::parse(TimelineId::new(4).unwrap(), content.as_bytes()).unwrap();
        let at = |one: &str, other: &str| parting(&history(one), &history(other)).to_string();
        assert_eq!(at("1\t0/5000000\tx\n", "1\t0/6000000\tx\n"), "0/5000000");
        assert_eq!(at("1\t0/5000000\tx\n2\t0/7000000\tx\n", "1\t0/5000000\tx\n"), "0/5000000");
        assert_eq!(at("1\t0/5000000\tx\n2\t0/7000000\tx\n", "1\t0/5000000\tx\n2\t0/8000000\tx\n"), "0/7000000");
        assert_eq!(at("1\t0/5000000\tx\n", "1\t0/5000000\tanother reason\n"), "0/5000000");
    }
}
