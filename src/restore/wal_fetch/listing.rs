//! Without a plan: what a complete listing of the repository proves about a file.

use std::path::Path;
use std::sync::Arc;

use super::delivery::{deliver_bytes, deliver_chain, deliver_whole};
use super::patience::{Progress, patiently};
use super::{FetchOutcome, FetchRequest, WalFile, absent, missing, parse_name};
use crate::repository::{Archive, ParsedKey, Piece, PieceChain, Repository, RepositoryError};
use crate::restore::RestoreError;
use crate::seal::{Compression, HEADER_LEN, ObjectHeader};
use crate::storage::ObjectInfo;
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// What one repository says of a file.
enum Answer {
    Delivered,
    Absent(&'static str),
    /// Not delivered yet: another repository may have more of it.
    Open(OpenSegment),
}

/// A segment of which the beginning is held.
struct OpenSegment {
    archive: Archive,
    segment: SegmentName,
    chain: PieceChain,
}

/// Without a plan: the first repository that has the file whole delivers it. Of an open segment the one that has most of it does, and
/// absent is only what every one of them proves absent: both end the WAL, so no repository may have failed to answer.
pub(super) async fn by_listing(
    repositories: &[Repository],
    request: &FetchRequest,
) -> Result<FetchOutcome, RestoreError> {
    let file = parse_name(&request.name)?;
    patiently(request.patience, |progress| async move {
        let (mut proofs, mut failed): (u32, Option<RestoreError>) = (0, None);
        let mut open: Option<OpenSegment> = None;
        for repository in repositories {
            let attempt = async {
                let archive = repository.choose(request.system).await?;
                match file {
                    WalFile::History(timeline) => history_by_asking(&archive, timeline, &request.path, &progress).await,
                    WalFile::Segment(name) => segment_by_listing(&archive, name, &request.path, &progress).await,
                }
            };
            match attempt.await {
                Ok(Answer::Delivered) => return Ok(FetchOutcome::Delivered),
                Ok(Answer::Absent(proof)) => {
                    tracing::debug!(repository = repository.name(), proof, "not there");
                    proofs += 1;
                }
                Ok(Answer::Open(found)) => {
                    if open.as_ref().is_none_or(|known| known.chain.end < found.chain.end) {
                        open = Some(found);
                    }
                }
                Err(error) => {
                    tracing::debug!(repository = repository.name(), %error, "not delivered from this repository");
                    failed.get_or_insert(error);
                }
            }
        }
        match (failed, open) {
            (Some(error), Some(open)) => {
                tracing::warn!(
                    "repository {} holds the beginning of {}; another one, which cannot be read now, may hold more (--repository {} asks the first alone)",
                    open.archive.repository().name(),
                    open.segment,
                    open.archive.repository().name()
                );
                Err(error)
            }
            (Some(error), None) => Err(error),
            (None, Some(open)) => {
                deliver_chain(&open.archive, open.segment, &open.chain, &request.path, &progress).await?;
                Ok(FetchOutcome::Delivered)
            }
            (None, None) if proofs > 0 => Ok(absent("every repository proves it absent")),
            (None, None) => {
                Err(RestoreError::Target { why: "no repository is configured".into(), hint: "configure one" })
            }
        }
    })
    .await
}

async fn history_by_asking(
    archive: &Archive,
    timeline: TimelineId,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<Answer, RestoreError> {
    match archive.history(timeline).await? {
        Some(bytes) => deliver_bytes(&bytes, path, progress).map(|()| Answer::Delivered),
        None => Ok(Answer::Absent("the store has no such history file")),
    }
}

async fn segment_by_listing(
    archive: &Archive,
    name: &str,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<Answer, RestoreError> {
    // The key does not depend on the segment size; the object itself tells it.
    let smallest = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    let guess = SegmentName::parse(name, smallest).map_err(|_| missing(archive, name))?;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let key = archive.keys().segment(guess, compression);
        if archive.head(&key).await?.is_some() {
            let size = segment_size_of(archive, &key).await?;
            let segment = parse_sized(archive, name, size)?;
            deliver_whole(archive, segment, compression, path, progress).await?;
            return Ok(Answer::Delivered);
        }
    }
    let timeline = guess.timeline();
    // First, so that what it tells of was there when the WAL is listed.
    let told = told_until(archive, timeline).await?;
    // Pieces go once their segment is stored whole: in this order one of the two is seen.
    let pieces = archive.list(&archive.keys().tail_timeline_prefix(timeline), None).await?;
    let segments = archive.list(&archive.keys().timeline_prefix(timeline), None).await?;
    let Some(any) = segments.iter().chain(&pieces).find(|object| is_wal(archive, object)) else {
        return nothing_of(archive, timeline).await;
    };
    let size = segment_size_of(archive, &any.key).await?;
    let segment = parse_sized(archive, name, size)?;
    let mut held = Held { told, ..Held::default() };
    for object in segments.iter().chain(&pieces) {
        match ParsedKey::parse(archive.keys(), &object.key, size) {
            ParsedKey::Segment { name, .. } => held.note_segment(name),
            ParsedKey::Piece { segment: of, start, end, compression } => {
                let piece = Piece { segment: of, start, end, compression, stored_bytes: object.size };
                held.note_piece(piece);
                if of == segment {
                    held.pieces.push(piece);
                }
            }
            _ => {}
        }
    }
    let begin = begin_of(archive, timeline).await?;
    match held.judge(segment, begin) {
        Judgement::Open(chain) => {
            archive.check_overlaps(segment).await?;
            if u64::from(chain.end) < size.get() {
                return Ok(Answer::Open(OpenSegment { archive: archive.clone(), segment, chain }));
            }
            deliver_chain(archive, segment, &chain, path, progress).await?;
            Ok(Answer::Delivered)
        }
        Judgement::Absent(proof) => Ok(Answer::Absent(proof)),
        Judgement::Missing(why) => Err(RestoreError::DamagedWal { why: format!("{segment} {why}") }),
        Judgement::Incomplete => Err(RestoreError::Incomplete { segment }),
    }
}

/// Through where `coverage.json` tells of WAL on the timeline. Only a hint: one that cannot be understood tells nothing.
async fn told_until(archive: &Archive, timeline: TimelineId) -> Result<Option<Lsn>, RestoreError> {
    match archive.coverage().await {
        Ok(coverage) => Ok(coverage.filter(|told| told.timeline == timeline).map(|told| told.archived_lsn)),
        Err(error) if error.is_damaged() || matches!(error, RepositoryError::NewerFormat { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether an object is one of WAL, and not too short to be one; its name alone does not tell the segment size.
fn is_wal(archive: &Archive, object: &ObjectInfo) -> bool {
    let sizes = [1 << 20, 1 << 30].map(|bytes| SegmentSize::new(bytes).expect("the smallest and the largest size"));
    let parsed = sizes.map(|size| ParsedKey::parse(archive.keys(), &object.key, size));
    object.size >= HEADER_LEN as u64
        && parsed.iter().any(|key| matches!(key, ParsedKey::Segment { .. } | ParsedKey::Piece { .. }))
}

fn parse_sized(archive: &Archive, name: &str, size: SegmentSize) -> Result<SegmentName, RestoreError> {
    SegmentName::parse(name, size).map_err(|_| RestoreError::Target {
        why: format!("{name} is not the name of a segment of {} bytes, as {} has them", size.get(), archive.url()),
        hint: "check that this is the archive of this server",
    })
}

async fn segment_size_of(archive: &Archive, key: &str) -> Result<SegmentSize, RestoreError> {
    let head = archive.get_range(key, 0, HEADER_LEN as u64).await?;
    let header = ObjectHeader::parse(&head).map_err(|source| {
        RestoreError::Repository(RepositoryError::Damaged { url: archive.url(), key: key.into(), source })
    })?;
    Ok(header.segment_size)
}

/// Nothing at all is held of a timeline: absent if the timeline is one that we know, else more likely the wrong archive.
async fn nothing_of(archive: &Archive, timeline: TimelineId) -> Result<Answer, RestoreError> {
    if timeline == TimelineId::FIRST || archive.history(timeline).await?.is_some() {
        return Ok(Answer::Absent("a complete listing shows nothing of this timeline"));
    }
    Err(RestoreError::Target {
        why: format!("nothing is known of timeline {timeline} in {}", archive.url()),
        hint: "check that this is the archive of this server",
    })
}

/// Where a timeline's own WAL begins: at the switch to it.
async fn begin_of(archive: &Archive, timeline: TimelineId) -> Result<Lsn, RestoreError> {
    let Some(bytes) = archive.history(timeline).await? else { return Ok(Lsn::ZERO) };
    let history = TimelineHistory::parse(timeline, &bytes).map_err(|source| RepositoryError::History {
        url: archive.url(),
        timeline,
        source,
    })?;
    Ok(history.parent().map_or(Lsn::ZERO, |parent| parent.switch))
}

/// What a complete listing shows of one timeline.
#[derive(Debug, Default)]
pub(super) struct Held {
    last_whole: Option<SegmentName>,
    last_in_pieces: Option<SegmentName>,
    last_byte: Lsn,
    /// Of the wanted segment.
    pub(super) pieces: Vec<Piece>,
    /// Through where the archive tells of WAL on the timeline.
    pub(super) told: Option<Lsn>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is the open one: its bytes from the beginning on.
    Open(PieceChain),
    Absent(&'static str),
    Missing(&'static str),
    /// Pieces of it are there, and its beginning is not: perhaps not yet.
    Incomplete,
}

impl Held {
    pub(super) fn note_segment(&mut self, segment: SegmentName) {
        self.last_whole = self.last_whole.max(Some(segment));
        self.last_byte = self.last_byte.max(segment.end());
    }

    pub(super) fn note_piece(&mut self, piece: Piece) {
        self.last_in_pieces = self.last_in_pieces.max(Some(piece.segment));
        self.last_byte = self.last_byte.max(piece.end_lsn());
    }

    /// Judges a segment that is not held whole. `begin` is where the timeline begins.
    ///
    /// Several pieces are on their way at once, so there may be a hole among those that are stored; what lies behind it was not
    /// acknowledged and does not count (docs/format.md), unless the archive tells of it: then it was there, and is lost.
    pub(super) fn judge(&self, segment: SegmentName, begin: Lsn) -> Judgement {
        if segment.start() < segment.size().start_of(begin) {
            return Judgement::Absent("it lies before the timeline's beginning");
        }
        let chain = PieceChain::of(&self.pieces);
        let end = Lsn::new(segment.start().get() + u64::from(chain.end));
        // Held to its end in pieces: the next one was begun before it was stored whole.
        if end == segment.end() {
            return Judgement::Open(chain);
        }
        let later = |last: Option<SegmentName>| last.is_some_and(|last| last > segment);
        let (whole_later, pieces_later) = (later(self.last_whole), later(self.last_in_pieces));
        let goes_on = match self.told {
            _ if whole_later => true,
            Some(told) => told > end && (pieces_later || !chain.unreachable.is_empty()),
            // Pieces of a later segment prove as little as those behind a hole, but only where the archive says so.
            None => pieces_later,
        };
        if !goes_on && !self.pieces.is_empty() {
            return if chain.end > 0 { Judgement::Open(chain) } else { Judgement::Incomplete };
        }
        if segment.start() >= self.last_byte {
            return Judgement::Absent("it lies behind the last byte that is stored of its timeline");
        }
        Judgement::Missing("is not there, although later WAL is")
    }
}
