//! WAL that is lost is told, never passed over (I3): what is held of the broken segment is kept as a piece, the gap becomes an
//! object of its own, and archiving goes on behind it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::ArchiveError;
use super::assembler::{Assembler, AssemblerSettings, Command};
use super::held::{Held, HeldBytes, HeldPart, Reach};
use super::live::{Live, Way, small_entry};
use super::start::Start;
use crate::postgres::ReplicationConnection;
use crate::queue::QueueEntry;
use crate::repository::{Archive, Catalog, Gap, RepositoryError};
use crate::seal::Compression;
use crate::spool::{OpenSegment, Spool};
use crate::telemetry::{Board, CauseCode, GapFact};
use crate::wal::{Lsn, PgTime, SegmentName, SystemIdentifier, TimelineId};

/// How long a store may take to say what it holds before a gap is recorded without its word.
const ASK_LIMIT: Duration = Duration::from_secs(15);

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
        if self.go_on_behind_repositories(&start).await? {
            self.way = Way::Overlapping;
            return Err(ArchiveError::FetchAgain);
        }
        let mut slot = self.ensure_slot(connection).await?;
        let useless = slot_lost || slot.is_none_or(|reserved| self.segment_size.start_of(reserved) <= start.held_end);
        if useless && !self.settings.create_slot {
            return Err(ArchiveError::NoSlot { name: self.settings.slot.clone() });
        }
        if useless {
            // It was invalidated, or stands where the server has no WAL any more: a new one reserves what there is.
            let message = format!("slot \"{}\" did not keep the WAL ({why}); it is made anew", self.settings.slot);
            self.board.raise(CauseCode::SlotLost, message);
            connection.drop_slot(&self.settings.slot).await?;
            slot = self.ensure_slot(connection).await?;
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

    /// Another agent may have archived meanwhile, or the spool is an old one: what a repository holds need not come from the server.
    /// True if one holds more; the next session goes on there. Those that hold less have a gap.
    async fn go_on_behind_repositories(&mut self, start: &Start) -> Result<bool, ArchiveError> {
        let asked = tokio::time::timeout(ASK_LIMIT, self.ask_repositories(Reach::Furthest)).await;
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
        let Some(HeldPart::Open { start, found, .. }) = held.parts.last().filter(|part| part.end() > part.start())
        else {
            return Ok(());
        };
        let (start, old_path) = (*start, found.path.clone());
        let end = end.min(held.end);
        if end <= start {
            return Ok(());
        }
        let segment = SegmentName::holding(held.timeline, start, self.segment_size);
        let indexer = self.indexer_at(held.timeline, start, held.open_record, &held.parts, held.max_time).await?;
        let mut assembler =
            Assembler::new(settings.clone(), self.spool.clone(), indexer, segment, start, BTreeSet::new())?;
        let parts = vec![held.parts.last().expect("just seen").clone()];
        let mut bytes = HeldBytes::read(self.spool.clone(), self.system, parts, start, end, &self.stores);
        while let Some(chunk) = bytes.next().await? {
            let left = usize::try_from(end.bytes_since(assembler.position())).unwrap_or(usize::MAX);
            assembler.feed(&chunk[..chunk.len().min(left)])?;
        }
        assembler.end_timeline()?;
        let mut open: Option<OpenSegment> = None;
        for command in assembler.take_commands() {
            match command {
                Command::Begin { path, .. } => open = Some(OpenSegment::create(self.spool.disk(), &path)?),
                Command::Append(bytes) => open.as_mut().expect("begun first").append(&bytes)?,
                Command::Mark { .. } => {}
                Command::Seal { name, frames, .. } => {
                    let file = open.as_mut().expect("begun first");
                    file.finish(&frames)?;
                    self.spool.name_sealed(file.path(), &name)?;
                    self.spool.sync_names(&name)?;
                    self.backlog.insert(&[QueueEntry {
                        timeline: name.timeline.get(),
                        order: name.order,
                        relative: name.relative,
                        stored_size: frames.stored_size,
                        crc32: frames.object_crc32,
                        stored_in: Vec::new(),
                    }]);
                }
            }
        }
        self.spool.remove_open(&old_path)?;
        Ok(())
    }
}

pub fn gap_of(system: SystemIdentifier, timeline: TimelineId, from: Lsn, to: Lsn, reason: &str) -> Gap {
    let since = PgTime::from_timestamp(jiff::Timestamp::now());
    Gap { format: 1, system_identifier: system, timeline, from_lsn: from, to_lsn: to, since, reason: reason.into() }
}

/// Shows a gap that was just found, under its cause.
pub fn tell_gap(board: &Board, gap: &Gap) {
    let Gap { timeline, from_lsn, to_lsn, since, .. } = *gap;
    board.add_gap(GapFact { timeline, from_lsn, to_lsn, since, reason: gap.reason.clone() });
    board.raise(
        CauseCode::Gap,
        format!(
            "the WAL from {from_lsn} to {to_lsn} on timeline {timeline} is lost ({}); no moment from there to the next base backup can be restored: take one",
            gap.reason
        ),
    );
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
