//! WAL that is lost is told, never passed over (I3): what is held of the broken segment is kept as a piece, the gap becomes an
//! object of its own, and archiving goes on behind it.

use std::time::Duration;

use super::ArchiveError;
use super::assembler::AssemblerSettings;
use super::held::{Held, Reach};
use super::live::{Live, Way, small_entry};
use super::start::Start;
use crate::postgres::{PostgresError, ReplicationConnection, SlotState, Sql, StartOutcome, WalMessage};
use crate::queue::QueueEntry;
use crate::repository::{Archive, Catalog, Gap, RepositoryError};
use crate::seal::Compression;
use crate::spool::Spool;
use crate::telemetry::{Board, CauseCode, GapFact};
use crate::wal::{Lsn, PgTime, SegmentName, SystemIdentifier, TimelineId};

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
        if let Some(segment) = self.missing.first(start.timeline).filter(|segment| segment.start() == start.position) {
            self.missing.remove(segment);
            if !self.is_archived(segment).await {
                let reason = "it was lost from the spool and from the server";
                self.record_gap(start.timeline, segment.start(), segment.end(), reason, Vec::new())?;
            }
            self.way = Way::Overlapping;
            return Err(ArchiveError::FetchAgain);
        }
        if !slot_lost && let Some(position) = self.comes_after_all(&start).await? {
            tracing::warn!(%position, "the server has the WAL after all, which it had called removed a moment ago");
            return Ok(Start { position, ..start });
        }
        if self.go_on_behind_repositories(connection, &start).await? {
            self.way = Way::Overlapping;
            return Err(ArchiveError::FetchAgain);
        }
        let mut slot = self.slot_position(connection).await?;
        let useless = slot_lost || slot.is_none_or(|reserved| self.segment_size.start_of(reserved) <= start.held_end);
        if useless && !self.settings.create_slot {
            return Err(ArchiveError::NoSlot { name: self.settings.slot.clone() });
        }
        if useless {
            // It was invalidated, or stands where the server has no WAL any more: a new one reserves what there is.
            let message = format!("slot \"{}\" did not keep the WAL ({why}); it is made anew", self.settings.slot);
            self.board.raise(CauseCode::SlotLost, message);
            connection.drop_slot(&self.settings.slot).await?;
            slot = self.slot_position(connection).await?;
        }
        let info = connection.identify_system().await?;
        // The segment with the slot's position is whole on the server.
        let behind = self.segment_size.start_of(slot.unwrap_or(info.flush_lsn));
        if behind <= start.held_end {
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
        self.record_gap(start.timeline, start.held_end, behind, why, Vec::new())?;
        let history = self.history(connection, info.timeline).await?;
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

    /// Where the slot holds WAL from; made if it is not there. Before 15 only SQL tells it: without, a slot that is good may be made
    /// anew, and the gap be larger than it had to be.
    async fn slot_position(&self, connection: &mut ReplicationConnection) -> Result<Option<Lsn>, ArchiveError> {
        if let Some(position) = self.ensure_slot(connection).await? {
            return Ok(Some(position));
        }
        let connect = self.settings.connect.this_host(self.host);
        let asked = Sql::slot_state(&connect, &self.settings.slot);
        match tokio::time::timeout(ASK_LIMIT, asked).await {
            Ok(SlotState::Exists { restart_lsn, .. }) => Ok(restart_lsn),
            _ => Ok(None),
        }
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

    /// Whether some repository is seen to hold the segment after all.
    async fn is_archived(&self, segment: SegmentName) -> bool {
        for (archive, _) in &self.archives {
            if self.is_archived_in(archive, segment).await {
                return true;
            }
        }
        false
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

/// Shows the gaps of an archive at the start of the agent. Those with a backup behind them are history: shown, no alarm.
pub fn show_gaps(board: &Board, catalog: &Catalog) {
    for gap in catalog.open_gaps() {
        if catalog.backups.iter().any(|backup| backup.start_lsn >= gap.to_lsn) {
            let Gap { timeline, from_lsn, to_lsn, since, reason, .. } = gap;
            board.add_gap(GapFact { timeline, from_lsn, to_lsn, since, reason });
        } else {
            tell_gap(board, &gap);
        }
    }
}
