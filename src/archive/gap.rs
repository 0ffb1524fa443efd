//! WAL that is lost is told, never passed over (I3): what is held of the broken segment is kept as a piece, the gap becomes an
//! object of its own, and archiving goes on behind it.

use std::time::Duration;

use super::ArchiveError;
use super::assembler::AssemblerSettings;
use super::held::{Held, Reach};
use super::live::{Live, Way, small_entry};
use super::start::Start;
use crate::postgres::{PostgresError, ReplicationConnection, StartOutcome, WalMessage};
use crate::queue::QueueEntry;
use crate::repository::{Archive, Catalog, Gap, RepositoryError};
use crate::seal::Compression;
use crate::spool::Spool;
use crate::telemetry::{Board, CauseCode, GapFact};
use crate::wal::{Lsn, PgTime, SegmentName, SegmentSize, SystemIdentifier, TimelineHistory, TimelineId};

/// How long a store may take to say what it holds before a gap is recorded without its word.
const ASK_LIMIT: Duration = Duration::from_secs(15);

/// How often, and how far apart, WAL is asked for again that the server has called removed.
const SECOND_LOOKS: u32 = 4;
const SECOND_LOOK_PAUSE: Duration = Duration::from_millis(700);
const SECOND_LOOK_LIMIT: Duration = Duration::from_secs(2);

impl Live {
    /// WAL that follows what is held is gone from the server. If a repository holds more, archiving goes on behind that; else the gap
    /// is recorded, and archiving goes on behind it.
    pub(super) async fn start_behind_gap(
        &mut self,
        connection: &mut ReplicationConnection,
        start: Start,
        settings: &AssemblerSettings,
        why: &str,
        slot_lost: bool,
    ) -> Result<Start, ArchiveError> {
        if slot_lost {
            // It keeps nothing, but the server may have the WAL all the same: a new slot keeps that while it is looked for.
            self.board.raise(CauseCode::SlotLost, self.made_anew(why));
            self.renew_slot(connection, why).await?;
            if let Some(position) = self.comes_after_all(&start).await? {
                tracing::warn!(%position, "the slot was lost, but the server still has the WAL");
                return Ok(self.start_at(start, position));
            }
        }
        if let Some(segment) = self.missing.first(start.timeline).filter(|segment| segment.start() == start.position) {
            self.missing.remove(segment);
            let held_in = self.archived_in(segment).await;
            if held_in.len() < self.archives.len() {
                let reason = match held_in.is_empty() {
                    true => "it was lost from the spool and from the server",
                    false => "only some repositories hold it: it was lost from the spool and from the server",
                };
                self.record_gap(start.timeline, segment.start(), segment.end(), reason, held_in)?;
            }
            self.way = Way::Overlapping;
            return Err(ArchiveError::FetchAgain);
        }
        if !slot_lost && let Some(position) = self.comes_after_all(&start).await? {
            tracing::warn!(%position, "the server has the WAL after all, which it had called removed a moment ago");
            return Ok(self.start_at(start, position));
        }
        if self.go_on_behind_repositories(connection, &start).await? {
            self.way = Way::Overlapping;
            return Err(ArchiveError::FetchAgain);
        }
        let mut slot = self.slot_position(connection).await?;
        let is_useless = |reserved: Lsn| self.segment_size.start_of(reserved) <= start.held_end;
        if !slot_lost && slot.is_none_or(is_useless) {
            // It was invalidated, or stands where the server has no WAL any more: a new one reserves what there is.
            self.board.raise(CauseCode::SlotLost, self.made_anew(why));
            slot = self.renew_slot(connection, why).await?;
        }
        let info = connection.identify_system().await?;
        // The segment with the slot's position is whole on the server.
        let behind = self.segment_size.start_of(slot.unwrap_or(info.flush_lsn));
        if behind <= start.held_end {
            // So the server has what follows: this slot is a good one, and is begun with as always.
            self.way = Way::Overlapping;
            return Err(ArchiveError::WalGone { why: why.into() });
        }
        let held = Held {
            timeline: start.timeline,
            sealed_end: start.sealed_until,
            end: start.held_end,
            parts: start.parts.clone(),
            closed: false,
            max_time: start.max_time,
            open_record: start.open_record,
        };
        self.seal_partial(settings, &held, start.held_end).await?;
        let history = self.history(connection, info.timeline).await?;
        for (timeline, from, to) in
            by_timeline(history.as_ref(), start.timeline, (start.held_end, behind), self.segment_size)
        {
            self.record_gap(timeline, from, to, why, Vec::new())?;
        }
        let timeline = history.map_or(info.timeline, |history| history.timeline_at(behind));
        Ok(Start {
            timeline,
            position: behind,
            without_overlap: behind,
            sealed_until: behind,
            held_end: behind,
            parts: Vec::new(),
            max_time: start.max_time,
            open_record: None,
        })
    }

    /// A gap is for good, and the slot that is dropped then may hold the WAL: so the server is asked again, some moments later, on a
    /// connection of its own. One that was promoted in this moment has said "already removed" of a segment that it made right then.
    /// From where it comes: with the overlap, or without. `None`: it is gone.
    pub(super) async fn comes_after_all(&self, start: &Start) -> Result<Option<Lsn>, ArchiveError> {
        let mut seen = None;
        for _ in 0..SECOND_LOOKS {
            tokio::select! {
                () = tokio::time::sleep(SECOND_LOOK_PAUSE) => {}
                () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
            }
            seen = self.where_it_comes(start).await?;
            if seen == Some(start.position) {
                break;
            }
        }
        Ok(seen)
    }

    async fn where_it_comes(&self, start: &Start) -> Result<Option<Lsn>, ArchiveError> {
        let look = async {
            match self.comes_from(start.without_overlap, start.timeline).await {
                Err(error) if error.is_wal_removed() => return Ok(None),
                other => other?,
            }
            let with_overlap = start.position != start.without_overlap
                && self.comes_from(start.position, start.timeline).await.is_ok();
            Ok(Some(if with_overlap { start.position } else { start.without_overlap }))
        };
        tokio::select! {
            looked = look => looked,
            () = self.shutdown.cancelled() => Err(ArchiveError::Stopping),
        }
    }

    /// Without a slot: nothing is confirmed, so none moves.
    async fn comes_from(&self, position: Lsn, timeline: TimelineId) -> Result<(), PostgresError> {
        let connection = ReplicationConnection::connect(&self.connected_host()).await?;
        let StartOutcome::Streaming(mut stream) = connection.start_replication(None, position, timeline).await? else {
            return Ok(());
        };
        let first = async {
            loop {
                match stream.next_message()? {
                    Some(WalMessage::Data { .. } | WalMessage::EndOfTimeline) => return Ok(()),
                    Some(WalMessage::Keepalive { .. }) => {}
                    None => stream.fill().await?,
                }
            }
        };
        // One that has nothing to send yet has nothing removed either.
        tokio::time::timeout(SECOND_LOOK_LIMIT, first).await.unwrap_or(Ok(()))
    }

    /// Another agent may have archived meanwhile, or the spool is an old one: what a repository holds need not come from the server.
    /// True if one holds more; the next session goes on there. Those that hold less have a gap.
    async fn go_on_behind_repositories(
        &mut self,
        connection: &mut ReplicationConnection,
        start: &Start,
    ) -> Result<bool, ArchiveError> {
        // Of the server's own branch only: what another one holds is nothing to go on behind.
        let server = connection.identify_system().await?.timeline;
        let Some(history) = self.history(connection, server).await? else { return Ok(false) };
        let branch = history.ancestors().iter().map(|ancestor| ancestor.timeline).chain([server]).collect();
        let asked = tokio::time::timeout(ASK_LIMIT, self.ask_repositories(Reach::Furthest, Some(branch))).await;
        let remote = match asked {
            Ok(Ok(Some(remote))) => remote,
            Ok(Err(ArchiveError::Stopping)) => return Err(ArchiveError::Stopping),
            // A store that does not answer holds nothing up: readers subtract from a gap what is there after all.
            Ok(Ok(None) | Err(_)) | Err(_) => return Ok(false),
        };
        let (timeline, end) = (remote.held.timeline, remote.held.end);
        if (timeline, end) <= (start.timeline, start.held_end) {
            return Ok(false);
        }
        tracing::warn!(%timeline, at = %end, "a repository holds more than the spool: going on behind it");
        let lacking =
            self.archives.iter().filter(|(a, _)| !remote.in_repositories.iter().any(|n| n == a.repository().name()));
        if lacking.count() > 0 && timeline == start.timeline {
            let reason = "only some repositories hold it, and the server does not";
            self.record_gap(timeline, start.held_end, end, reason, remote.in_repositories)?;
        }
        self.held_remotely = Some(remote.held);
        Ok(true)
    }

    /// The repositories that are seen to hold the segment after all.
    async fn archived_in(&self, segment: SegmentName) -> Vec<String> {
        let mut names = Vec::new();
        for (archive, _) in &self.archives {
            if self.is_archived_in(archive, segment).await {
                names.push(archive.repository().name().to_owned());
            }
        }
        names
    }

    async fn is_archived_in(&self, archive: &Archive, segment: SegmentName) -> bool {
        let archive = archive.clone();
        let asked = self.stores.spawn(async move {
            for compression in [Compression::Lz4, Compression::Zstd] {
                if archive.head(&archive.keys().segment(segment, compression)).await?.is_some() {
                    return Ok::<_, RepositoryError>(true);
                }
            }
            Ok(false)
        });
        matches!(tokio::time::timeout(ASK_LIMIT, asked).await, Ok(Ok(Ok(true))))
    }

    /// Segments that were once set aside, and that every repository holds since or knows as a gap, are not missing.
    pub(super) async fn forget_archived(&self, timeline: TimelineId) {
        while let Some(segment) = self.missing.first(timeline) {
            for (archive, _) in &self.archives {
                if !self.is_archived_in(archive, segment).await && !self.is_told_in(archive, segment).await {
                    return;
                }
            }
            self.missing.remove(segment);
        }
    }

    async fn is_told_in(&self, archive: &Archive, segment: SegmentName) -> bool {
        let archive = archive.clone();
        let asked = self.stores.spawn(async move { archive.gaps(segment.size()).await });
        let Ok(Ok(Ok(gaps))) = tokio::time::timeout(ASK_LIMIT, asked).await else { return false };
        let covers = |gap: &Gap| gap.from_lsn <= segment.start() && segment.end() <= gap.to_lsn;
        gaps.iter().any(|gap| gap.timeline == segment.timeline() && covers(gap))
    }

    /// Records that `[from, to)` of a timeline is lost. Durable on return; the uploaders bring it to the repositories but those
    /// `held_in`, which hold that WAL. The same gap again is fine.
    pub(super) fn record_gap(
        &self,
        timeline: TimelineId,
        from: Lsn,
        to: Lsn,
        reason: &str,
        held_in: Vec<String>,
    ) -> Result<(), ArchiveError> {
        if from >= to {
            return Ok(()); // nothing had been held, so nothing was promised and nothing is lost
        }
        let gap = gap_of(self.system, timeline, from, to, reason);
        let content = gap.to_json();
        let name = Spool::gap(timeline, from, to);
        if self.backlog.entry(&name.relative).is_none() {
            let name = self.spool.write_small(name, &content)?;
            self.backlog.insert(&[QueueEntry { stored_in: held_in, ..small_entry(&name, &content) }]);
        }
        self.missing.is_told(timeline, from, to);
        tell_gap(&self.board, &gap);
        Ok(())
    }

    /// Keeps what is held of a segment that will never be whole, up to `end`, as one piece from the segment's start.
    pub(super) async fn seal_partial(
        &self,
        settings: &AssemblerSettings,
        held: &Held,
        end: Lsn,
    ) -> Result<(), ArchiveError> {
        let Some(closed) = self.held_wal().close(settings, held, end).await? else { return Ok(()) };
        self.backlog.insert(&[closed.entry]);
        Ok(self.spool.remove_open(&closed.open)?)
    }
}

/// A gap that reaches over the ends of timelines, by timeline: readers look for it on the one that a segment is of.
fn by_timeline(
    history: Option<&TimelineHistory>,
    mut timeline: TimelineId,
    (mut from, to): (Lsn, Lsn),
    size: SegmentSize,
) -> Vec<(TimelineId, Lsn, Lsn)> {
    let mut parts = Vec::new();
    while let Some(history) = history
        && let Some((_, Some(switch))) = history.range_of(timeline)
        && switch < to
    {
        parts.push((timeline, from, switch));
        timeline = history.timeline_at(switch);
        from = size.start_of(switch);
    }
    parts.push((timeline, from, to));
    parts
}

pub fn gap_of(system: SystemIdentifier, timeline: TimelineId, from: Lsn, to: Lsn, reason: &str) -> Gap {
    let since = PgTime::from_timestamp(jiff::Timestamp::now());
    Gap { format: 1, system_identifier: system, timeline, from_lsn: from, to_lsn: to, since, reason: reason.into() }
}

/// Shows a gap that was just found, under its cause.
pub fn tell_gap(board: &Board, gap: &Gap) {
    let Gap { timeline, from_lsn, to_lsn, since, .. } = *gap;
    let is_new = board.add_gap(GapFact { timeline, from_lsn, to_lsn, since, reason: gap.reason.clone() });
    let message = format!(
        "the WAL from {from_lsn} to {to_lsn} on timeline {timeline} is lost ({}); no moment from there to the next base backup can be restored: take one",
        gap.reason
    );
    if is_new && board.is_raised(CauseCode::Gap) {
        // The cause stands already, for another gap, so that raising it says nothing.
        tracing::error!(event = "gap", "{message}");
    }
    board.raise(CauseCode::Gap, message);
}

/// Shows the gaps of an archive at the start of the agent. Those that the present branch has a backup behind are history: shown, no
/// alarm. As long as the branch is not known, they are no history.
pub fn show_gaps(board: &Board, catalog: &Catalog) {
    let branch = board.course().0.or(catalog.current_timeline()).and_then(|timeline| catalog.history(timeline));
    let is_past = |gap: &Gap| {
        let on_branch = |branch| catalog.is_past(branch, gap.timeline, (gap.from_lsn, gap.to_lsn));
        branch.as_ref().is_some_and(on_branch)
    };
    for gap in catalog.open_gaps() {
        if is_past(&gap) {
            let Gap { timeline, from_lsn, to_lsn, since, reason, .. } = gap;
            board.add_gap(GapFact { timeline, from_lsn, to_lsn, since, reason });
        } else {
            tell_gap(board, &gap);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was recorded on the old timeline whole, where nobody looks for the segments of the new one (I3).
    #[test]
    fn a_gap_over_a_switch_is_told_on_both_timelines() {
        let (one, two, three) = (TimelineId::FIRST, TimelineId::new(2).unwrap(), TimelineId::new(3).unwrap());
        let size = SegmentSize::new(1 << 20).unwrap();
        let history = TimelineHistory::parse(three, b"1\t0/2080000\tx\n2\t0/4000000\tx\n").unwrap();
        let split = |from: u64, to: u64| by_timeline(Some(&history), one, (Lsn::new(from), Lsn::new(to)), size);
        let lsn = Lsn::new;
        assert_eq!(split(0x100_0000, 0x200_0000), [(one, lsn(0x100_0000), lsn(0x200_0000))]);
        assert_eq!(
            split(0x100_0000, 0x500_0000),
            [
                (one, lsn(0x100_0000), lsn(0x208_0000)),
                (two, lsn(0x200_0000), lsn(0x400_0000)),
                (three, lsn(0x400_0000), lsn(0x500_0000)),
            ]
        );
        assert_eq!(by_timeline(None, one, (lsn(1), lsn(9)), size), [(one, lsn(1), lsn(9))]);
    }
}
