//! What an uploader does beside the uploads: looks what a repository holds, tells what it covers, removes what was replaced.

use std::collections::BTreeMap;
use std::time::Instant;

use super::gap::{gap_of, show_gaps, tell_gap};
use super::uploader::{COVERAGE_QUIET, Covered, Dropped, QUIET_AFTER, Uploader};
use crate::repository::{Coverage, ParsedKey, Piece, RepositoryError, RepositoryWriter};
use crate::seal::Compression;
use crate::storage::StorageError;
use crate::wal::{Lsn, PgTime, SegmentName, TimelineId};

/// Segments that are looked at for pieces that a crash left, at most; and without any one after the other.
const TIDIED_MAX: usize = 256;
const TIDIED_EMPTY: usize = 4;

impl Uploader {
    /// Whether there is something new to tell. A quiet server's moments are told less often: each is a request.
    pub(super) fn is_coverage_due(&self, covered: &Covered) -> bool {
        let Some((until, archived)) = self.coverage() else { return false };
        if covered.until.is_some_and(|written| written >= until) {
            return false;
        }
        let is_quiet = covered.archived == Some(archived) && covered.moved.is_some_and(|at| at.elapsed() > QUIET_AFTER);
        let spacing = if is_quiet { COVERAGE_QUIET } else { self.pace.spacing() };
        covered.written.is_none_or(|at: Instant| at.elapsed() >= spacing)
    }

    /// Until when everything is held here, and up to where: never more than the required repositories hold, nor than this one, which
    /// may lag behind them if it is not required.
    fn coverage(&self) -> Option<(PgTime, Lsn)> {
        let archived = self.board.archived()?.min(self.shown.archived()?);
        Some((self.board.complete_until_at(archived)?, archived))
    }

    /// Tells the repository until when everything is held. A hint for readers, so a failure is only noted.
    pub(super) async fn put_coverage(&self, writer: &RepositoryWriter, covered: Covered) -> Option<(PgTime, Lsn)> {
        let (complete_until, archived_lsn) = self.coverage()?;
        let timeline = TimelineId::new(self.backlog.sealed_end()?.0).ok()?;
        if covered.until.is_some_and(|written| written >= complete_until) {
            return None;
        }
        let coverage = Coverage {
            format: 1,
            system_identifier: self.system,
            timeline,
            complete_until,
            archived_lsn,
            updated: PgTime::from_timestamp(jiff::Timestamp::now()),
        };
        match writer.put_coverage(&coverage).await {
            Ok(()) => {
                self.shown.set_covered(complete_until);
                Some((complete_until, archived_lsn))
            }
            Err(error) => {
                tracing::debug!(repository = self.shown.name(), %error, "coverage.json was not written");
                None
            }
        }
    }

    /// Looks whether the repository holds what comes before the first object to ship. It may be a new one, or have been away while
    /// the spool was lost: nothing is taken for granted (I3). False while it is not known where shipping begins.
    pub(super) async fn join_on(&self, writer: &RepositoryWriter) -> Result<bool, RepositoryError> {
        let Some((timeline, from)) = self.whole_until() else { return Ok(false) };
        let from = self.segment_size.start_of(from);
        let archive = writer.archive();
        if !archive.gaps(self.segment_size).await?.is_empty() {
            show_gaps(&self.board, &archive.catalog().await?);
        }
        self.board.set_gaps_known();
        if let Some(before) = from.get().checked_sub(self.segment_size.get()) {
            let before = SegmentName::holding(timeline, Lsn::new(before), self.segment_size);
            for compression in [Compression::Lz4, Compression::Zstd] {
                if archive.head(&archive.keys().segment(before, compression)).await?.is_some() {
                    return Ok(true);
                }
            }
        }
        let catalog = archive.catalog().await?;
        let held = catalog.timelines.get(&timeline).and_then(|wal| wal.last_byte_before(from));
        // Nothing of the timeline: the repository begins here, or the timeline does.
        let Some(held) = held.filter(|held| *held < from) else { return Ok(true) };
        // A repository that was put back as it was lacks what it was seen to hold: what the spool has of it is no gap.
        let (backlog, name) = (self.backlog.clone(), self.shown.name().to_owned());
        let doubt = move || backlog.doubt(&name, timeline, held, from);
        if tokio::task::spawn_blocking(doubt).await.unwrap_or(false) {
            return Ok(false);
        }
        let known =
            catalog.gaps.iter().any(|gap| gap.timeline == timeline && gap.from_lsn <= held && from <= gap.to_lsn);
        if !known {
            let reason = format!("repository {} does not have it, and the spool neither", self.shown.name());
            let gap = gap_of(self.system, timeline, held, from, &reason);
            writer.put_gap(&gap).await?;
            tell_gap(&self.board, &gap);
        }
        Ok(true)
    }

    /// The first segment of the open one's timeline that is shipped in pieces.
    pub(super) fn first_tailed(&self) -> Option<SegmentName> {
        let open = self.tail.segment()?;
        let tailed = self.tail.segments().into_iter().map(|tailed| tailed.segment);
        tailed.filter(|segment| segment.timeline() == open.timeline()).chain([open]).min()
    }

    /// From where on it must be known which pieces are there: that segment, or the first one before it that is not there whole.
    pub(super) fn pieces_needed(&self) -> Option<SegmentName> {
        let first = self.first_tailed()?;
        let timeline = first.timeline();
        let lacking = self.backlog.first_lacking(self.shown.name()).filter(|(of, _)| *of == timeline.get());
        let lacking = lacking.map(|(_, start)| SegmentName::holding(timeline, start, self.segment_size));
        lacking.into_iter().chain([first]).min()
    }

    /// The pieces that are there of a segment's timeline from that segment on, by segment. What lies before it is stored whole, and may
    /// be as much as was ever archived, where nobody may delete.
    pub(super) async fn list_pieces(
        &self,
        writer: &RepositoryWriter,
        from: SegmentName,
    ) -> Result<Vec<(SegmentName, Vec<Piece>)>, RepositoryError> {
        let archive = writer.archive();
        let mut found: BTreeMap<SegmentName, Vec<Piece>> = BTreeMap::new();
        let prefix = archive.keys().tail_timeline_prefix(from.timeline());
        // "<segment>" sorts before "<segment>/" and after every key of the segment before it.
        for object in archive.list(&prefix, Some(&format!("{prefix}{from}"))).await? {
            let parsed = ParsedKey::parse(archive.keys(), &object.key, self.segment_size);
            if let ParsedKey::Piece { segment, start, end, compression } = parsed {
                let piece = Piece { segment, start, end, compression, stored_bytes: object.size };
                found.entry(segment).or_default().push(piece);
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Removes pieces whose segment is there whole, of the segments right before `until`: the agent that wrote them died between the
    /// two. False: it may not delete.
    pub(super) async fn tidy_pieces(&self, writer: &RepositoryWriter, until: SegmentName) -> bool {
        let (mut segment, mut empty) = (until, 0);
        for _ in 0..TIDIED_MAX {
            let Some(before) = segment.start().get().checked_sub(self.segment_size.get()) else { break };
            segment = SegmentName::holding(until.timeline(), Lsn::new(before), self.segment_size);
            match writer.archive().pieces(segment).await {
                Ok(pieces) if pieces.is_empty() => empty += 1,
                Ok(_) => match self.drop_pieces(writer, segment).await {
                    Dropped::Denied => return false,
                    Dropped::Gone | Dropped::Later => empty = 0,
                },
                // The next lease brings the next look.
                Err(_) => break,
            }
            if empty == TIDIED_EMPTY {
                break;
            }
        }
        true
    }

    /// The whole segment has replaced its pieces. Without the right to delete they stay, which does no harm.
    pub(super) async fn drop_pieces(&self, writer: &RepositoryWriter, segment: SegmentName) -> Dropped {
        // Refused by itself unless the whole segment is stored.
        match writer.delete_pieces(segment).await {
            Ok(_) | Err(RepositoryError::SegmentMissing { .. }) => Dropped::Gone,
            Err(error) => {
                tracing::debug!(%segment, %error, "tail pieces stay in the repository");
                match error {
                    RepositoryError::Storage(StorageError::Denied { .. }) => Dropped::Denied,
                    _ => Dropped::Later,
                }
            }
        }
    }
}
