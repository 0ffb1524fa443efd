//! Is the server's WAL the one that is held? Segments compared on a connection of their own, beside the stream: for a server that is
//! behind what is held, for one that went on elsewhere, and to find where two histories part (I6, I7).

use std::time::Duration;

use super::ArchiveError;
use super::held::{Held, HeldBytes, HeldPart};
use super::live::Live;
use crate::postgres::{ReplicationConnection, StartOutcome, WalMessage};
use crate::repository::{PieceChain, WalObject, WalObjectKind};
use crate::seal::Compression;
use crate::spool::Spool;
use crate::storage::StorageError;
use crate::wal::{Lsn, PgTime, SegmentName, TimelineHistory, TimelineId};

/// For the comparison of one segment; a large one that takes longer is told as unknown.
const COMPARE_LIMIT: Duration = Duration::from_secs(60);
/// For the search of the first difference: an alarm must not wait for it longer than that.
const SEARCH_LIMIT: Duration = Duration::from_secs(10);
/// How long a store may take to say what it holds of a segment.
const ASK_LIMIT: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Equal,
    /// From here on.
    Differs(Lsn),
    /// Nobody holds it, by the word of every repository.
    NotHeld,
    /// The server does not have it any more.
    Gone,
    /// A repository or the server does not answer.
    Unknown,
}

/// What is held of a segment, and what the one before it knew.
pub(super) struct HeldSegment {
    pub parts: Vec<HeldPart>,
    /// Everything from the segment's start to here is held.
    pub end: Lsn,
    /// No repository failed to answer.
    pub is_known: bool,
}

impl Live {
    /// Compares what the server has of a segment, up to `until`, with what is held of it.
    pub(super) async fn compare_segment(
        &self,
        segment: SegmentName,
        until: Lsn,
        parts: &[HeldPart],
    ) -> Result<Compared, ArchiveError> {
        let held = self.held_segment(segment, parts).await?;
        let until = until.min(held.end);
        if until <= segment.start() {
            return Ok(if held.is_known { Compared::NotHeld } else { Compared::Unknown });
        }
        self.compare_parts(segment.timeline(), segment.start(), until, held.parts).await
    }

    /// Compares what the server has of `[from, until)` in one segment with `parts`, the first of which begins at `from`.
    pub(super) async fn compare_parts(
        &self,
        timeline: TimelineId,
        from: Lsn,
        until: Lsn,
        parts: Vec<HeldPart>,
    ) -> Result<Compared, ArchiveError> {
        let compared = tokio::time::timeout(COMPARE_LIMIT, self.compare_with_server(timeline, from, until, parts));
        let compared = tokio::select! {
            compared = compared => compared,
            () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
        };
        match compared {
            Ok(Ok(compared)) => Ok(compared),
            Ok(Err(ArchiveError::Diverged { at })) => Ok(Compared::Differs(at)),
            // WAL that was removed is no proof of anything, nor is a connection that was lost.
            Ok(Err(ArchiveError::Postgres(error))) if error.is_wal_removed() => Ok(Compared::Gone),
            Ok(Err(ArchiveError::Postgres(error))) => {
                tracing::debug!(%from, %error, "it could not be compared with the server's");
                Ok(Compared::Unknown)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Ok(Compared::Unknown),
        }
    }

    async fn compare_with_server(
        &self,
        timeline: TimelineId,
        from: Lsn,
        until: Lsn,
        parts: Vec<HeldPart>,
    ) -> Result<Compared, ArchiveError> {
        let connection = ReplicationConnection::connect(&self.connected_host()).await?;
        let mut held = HeldBytes::read(self.spool.clone(), self.system, parts, from, until, &self.stores);
        // Without a slot: nothing is confirmed, so no slot moves.
        let started = connection.start_replication(None, from, timeline).await?;
        let StartOutcome::Streaming(mut stream) = started else { return Ok(Compared::Unknown) };
        while stream.next_lsn() < until {
            let bytes = match stream.next_message()? {
                Some(WalMessage::Data { start, bytes, .. }) => Some((start, bytes.to_vec())),
                Some(WalMessage::Keepalive { .. }) => continue,
                // A timeline that the server left before: what was compared up to there is all there is.
                Some(WalMessage::EndOfTimeline) => break,
                None => None,
            };
            let Some((start, bytes)) = bytes else {
                stream.fill().await?;
                continue;
            };
            let mut done = 0;
            while done < bytes.len() {
                match held.compare(Lsn::new(start.get() + done as u64), &bytes[done..]).await? {
                    Some(equal) => done += equal,
                    None => break,
                }
            }
        }
        Ok(Compared::Equal)
    }

    /// Compares what lies before `end` in its segment beside the stream, which compares nothing of it, or so little that two histories
    /// may have it in common. False if it could not be compared.
    pub(super) async fn prove_before(
        &self,
        timeline: TimelineId,
        end: Lsn,
        parts: &[HeldPart],
    ) -> Result<bool, ArchiveError> {
        let Some(last) = end.get().checked_sub(1) else { return Ok(true) };
        let segment = SegmentName::holding(timeline, Lsn::new(last), self.segment_size);
        match self.compare_segment(segment, end, parts).await? {
            Compared::Differs(at) => Err(ArchiveError::Diverged { at }),
            Compared::Gone | Compared::Unknown => Ok(false),
            Compared::Equal | Compared::NotHeld => Ok(true),
        }
    }

    /// What follows `at` is archived, and nothing proves that it is of the same history.
    pub(super) fn tell_unproven(&self, at: Lsn) {
        let message = format!(
            "what is held before {at} could not be compared with the server's WAL: the server no longer has it, or no repository showed it; a new base backup makes what follows independent of it"
        );
        self.board.raise_unproven(at, message);
    }

    /// What is held of a segment: in the parts at hand, in the spool, or in a repository.
    pub(super) async fn held_segment(
        &self,
        segment: SegmentName,
        parts: &[HeldPart],
    ) -> Result<HeldSegment, ArchiveError> {
        let inside = |part: &&HeldPart| part.start() >= segment.start() && part.end() <= segment.end();
        let at_hand: Vec<HeldPart> = parts.iter().filter(inside).cloned().collect();
        if at_hand.first().is_some_and(|part| part.start() == segment.start()) {
            let end = at_hand.last().map_or(segment.start(), HeldPart::end);
            return Ok(HeldSegment { parts: at_hand, end, is_known: true });
        }
        for compression in [Compression::Lz4, Compression::Zstd] {
            let name = Spool::segment(segment, compression);
            if self.spool.path_of(&name).exists() {
                let (start, end) = (segment.start(), segment.end());
                return Ok(HeldSegment { parts: vec![HeldPart::Spooled { start, end, name }], end, is_known: true });
            }
        }
        let mut is_known = true;
        for (archive, _) in &self.archives {
            let asked = archive.clone();
            let look = self.stores.spawn(async move { stored_parts(&asked, segment).await });
            let looked = tokio::select! {
                looked = tokio::time::timeout(ASK_LIMIT, look) => looked,
                () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
            };
            match looked {
                Ok(Ok(Ok(parts))) if !parts.is_empty() => {
                    let end = parts.last().map_or(segment.start(), HeldPart::end);
                    return Ok(HeldSegment { parts, end, is_known: true });
                }
                Ok(Ok(Ok(_))) => {}
                Ok(Ok(Err(error))) => {
                    is_known = false;
                    tracing::debug!(%segment, %error, "what is stored of it is not known");
                }
                Ok(Err(_)) | Err(_) => is_known = false,
            }
        }
        Ok(HeldSegment { parts: Vec::new(), end: segment.start(), is_known })
    }

    /// Where the two histories part, given that `at` differs: from the segment with `at` back to one that is equal. Bounded; what was
    /// found until then counts.
    pub(super) async fn first_difference(&self, at: Lsn) -> Lsn {
        let Ok(held) = self.held_now() else { return at };
        let Some(held) = held.or_else(|| self.held_remotely.clone()) else { return at };
        let mut first = at;
        let search = self.search_back(&held, &mut first);
        let _ = tokio::time::timeout(SEARCH_LIMIT, search).await;
        first
    }

    async fn search_back(&self, held: &Held, first: &mut Lsn) {
        let size = self.segment_size;
        let mut differing = size.start_of(*first);
        let mut step = 1_u64;
        let mut equal: Option<Lsn> = None;
        // Further and further back until a segment is equal, then halfway between.
        loop {
            let floor = equal.map_or(0, |equal| equal.get() + size.get());
            if differing.get() <= floor {
                return;
            }
            let between = (differing.get() - floor) / size.get();
            let back = if equal.is_some() { between.div_ceil(2) } else { step.min(between) };
            let start = Lsn::new(differing.get() - back * size.get());
            let segment = SegmentName::holding(held.timeline, start, size);
            match self.compare_segment(segment, segment.end(), &held.parts).await {
                Ok(Compared::Differs(at)) => {
                    (*first, differing) = (at, start);
                    step = step.saturating_mul(2);
                }
                Ok(Compared::Equal) => equal = Some(start),
                // Not at hand any more on one of the two sides: nearer ones may be.
                Ok(Compared::NotHeld | Compared::Gone | Compared::Unknown) if back > 1 => equal = Some(start),
                Ok(Compared::NotHeld | Compared::Gone | Compared::Unknown) | Err(_) => return,
            }
        }
    }

    /// The server is behind what is held. One that has other bytes is no standby that will catch up.
    pub(super) async fn judge_behind(&self, held: &Held, server: Lsn) -> ArchiveError {
        let behind = ArchiveError::Behind { server, held: held.end };
        let Some(last) = server.get().checked_sub(1) else { return behind };
        let segment = SegmentName::holding(held.timeline, Lsn::new(last), self.segment_size);
        match self.compare_segment(segment, server, &held.parts).await {
            Ok(Compared::Differs(at)) => ArchiveError::Diverged { at },
            Ok(Compared::Equal | Compared::NotHeld | Compared::Gone | Compared::Unknown) => behind,
            Err(error) => error,
        }
    }

    /// Of a branch, the newest ancestor whose WAL is held up to where the branch leaves it, and where that is.
    pub(super) async fn newest_common(
        &self,
        history: &TimelineHistory,
    ) -> Result<Option<(TimelineId, Lsn)>, ArchiveError> {
        for ancestor in history.ancestors().iter().rev() {
            let Some(last) = ancestor.switch.get().checked_sub(1) else { continue };
            let segment = SegmentName::holding(ancestor.timeline, Lsn::new(last), self.segment_size);
            let held = self.held_segment(segment, &[]).await?;
            if held.end < ancestor.switch {
                if !held.is_known {
                    // Without its answer nobody can tell that there is no common history.
                    return Err(ArchiveError::StoreSilent);
                }
                continue;
            }
            return match self.compare_segment(segment, ancestor.switch, &[]).await? {
                Compared::Differs(at) => Err(ArchiveError::Diverged { at }),
                Compared::Equal | Compared::NotHeld | Compared::Gone | Compared::Unknown => {
                    Ok(Some((ancestor.timeline, ancestor.switch)))
                }
            };
        }
        Ok(None)
    }

    /// The highest commit time on a branch before `position`, a segment's start, and where a record begins that reaches over it.
    pub(super) async fn before(&self, timeline: TimelineId, position: Lsn) -> (Option<PgTime>, Option<Lsn>) {
        let Some(before) = position.get().checked_sub(self.segment_size.get()) else { return (None, None) };
        let segment = SegmentName::holding(timeline, Lsn::new(before), self.segment_size);
        let Ok(held) = self.held_segment(segment, &[]).await else { return (None, None) };
        // Where it is held in pieces, the last one knows of all.
        let header = match held.parts.last() {
            Some(HeldPart::Spooled { name, .. }) => self.spool.read_header(name, self.system).ok(),
            Some(HeldPart::Stored { object, archive, .. }) => {
                let (object, archive) = (*object, archive.clone());
                let asked = self.stores.spawn(async move { archive.header(&object).await });
                match tokio::time::timeout(ASK_LIMIT, asked).await {
                    Ok(Ok(Ok(header))) => Some(header),
                    _ => None,
                }
            }
            Some(HeldPart::Open { .. }) | None => None,
        };
        header.map_or((None, None), |header| (header.summary.max_time, header.summary.open_record))
    }
}

/// The whole segment, or its pieces from the start on.
pub(super) async fn stored_parts(
    archive: &crate::repository::Archive,
    segment: SegmentName,
) -> Result<Vec<HeldPart>, crate::repository::RepositoryError> {
    let part = |kind, compression, start, end| {
        let object = WalObject { segment, kind, compression, valid_until: end };
        HeldPart::Stored { start, end, object, archive: archive.clone() }
    };
    for compression in [Compression::Lz4, Compression::Zstd] {
        match archive.head(&archive.keys().segment(segment, compression)).await {
            Ok(Some(_)) => return Ok(vec![part(WalObjectKind::Segment, compression, segment.start(), segment.end())]),
            Ok(None) | Err(crate::repository::RepositoryError::Storage(StorageError::NotFound { .. })) => {}
            Err(error) => return Err(error),
        }
    }
    let mut parts: Vec<HeldPart> = Vec::new();
    for piece in PieceChain::of(&archive.pieces(segment).await?).pieces {
        let end = parts.last().map_or(segment.start(), HeldPart::end);
        // Pieces that overlap say the same twice: the chain goes on with the one that begins where it stands.
        if piece.start_lsn() == end {
            let kind = WalObjectKind::Piece { start: piece.start, end: piece.end };
            parts.push(part(kind, piece.compression, piece.start_lsn(), piece.end_lsn()));
        }
    }
    Ok(parts)
}
