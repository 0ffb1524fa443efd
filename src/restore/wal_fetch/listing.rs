//! Without a plan: what a complete listing of the repository proves about a file.

use std::path::Path;

use super::delivery::{deliver_bytes, deliver_chain, deliver_whole};
use super::patience::patiently;
use super::{FetchOutcome, FetchRequest, WalFile, absent, missing, parse_name};
use crate::repository::{Archive, ParsedKey, Piece, PieceChain, Repository, RepositoryError};
use crate::restore::RestoreError;
use crate::seal::{Compression, HEADER_LEN, ObjectHeader};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// Without a plan: the first repository that has the file delivers it; absent is only what every one of them proves absent.
pub(super) async fn by_listing(
    repositories: &[Repository],
    request: &FetchRequest,
) -> Result<FetchOutcome, RestoreError> {
    let file = parse_name(&request.name)?;
    patiently(request.patience, || async move {
        let (mut proofs, mut failed): (u32, Option<RestoreError>) = (0, None);
        for repository in repositories {
            let attempt = async {
                let archive = repository.choose(request.system).await?;
                match file {
                    WalFile::History(timeline) => history_by_asking(&archive, timeline, &request.path).await,
                    WalFile::Segment(name) => segment_by_listing(&archive, name, &request.path).await,
                }
            };
            match attempt.await {
                Ok(FetchOutcome::Delivered) => return Ok(FetchOutcome::Delivered),
                Ok(FetchOutcome::ProvenAbsent) => proofs += 1,
                Err(error) => {
                    tracing::debug!(repository = repository.name(), %error, "not delivered from this repository");
                    failed.get_or_insert(error);
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None if proofs > 0 => Ok(absent("every repository proves it absent")),
            None => Err(RestoreError::Target { why: "no repository is configured".into(), hint: "configure one" }),
        }
    })
    .await
}

async fn history_by_asking(archive: &Archive, timeline: TimelineId, path: &Path) -> Result<FetchOutcome, RestoreError> {
    match archive.history(timeline).await? {
        Some(bytes) => deliver_bytes(&bytes, path).map(|()| FetchOutcome::Delivered),
        None => Ok(absent("the store has no such history file")),
    }
}

async fn segment_by_listing(archive: &Archive, name: &str, path: &Path) -> Result<FetchOutcome, RestoreError> {
    // The key does not depend on the segment size; the object itself tells it.
    let smallest = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    let guess = SegmentName::parse(name, smallest).map_err(|_| missing(archive, name))?;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let key = archive.keys().segment(guess, compression);
        if archive.head(&key).await?.is_some() {
            let size = segment_size_of(archive, &key).await?;
            let segment = parse_sized(archive, name, size)?;
            deliver_whole(archive, segment, compression, path).await?;
            return Ok(FetchOutcome::Delivered);
        }
    }
    let timeline = guess.timeline();
    // Pieces go once their segment is stored whole: in this order one of the two is seen.
    let pieces = archive.list(&archive.keys().tail_timeline_prefix(timeline), None).await?;
    let segments = archive.list(&archive.keys().timeline_prefix(timeline), None).await?;
    let Some(any) = segments.iter().chain(&pieces).find(|object| object.size >= HEADER_LEN as u64) else {
        return nothing_of(archive, timeline).await;
    };
    let size = segment_size_of(archive, &any.key).await?;
    let segment = parse_sized(archive, name, size)?;
    let mut held = Held::default();
    for object in segments.iter().chain(&pieces) {
        match ParsedKey::parse(archive.keys(), &object.key, size) {
            ParsedKey::Segment { name, .. } => held.note(name, name.end()),
            ParsedKey::Piece { segment: of, start, end, compression } => {
                let piece = Piece { segment: of, start, end, compression, stored_bytes: object.size };
                held.note(of, piece.end_lsn());
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
            deliver_chain(archive, segment, &chain, path).await?;
            Ok(FetchOutcome::Delivered)
        }
        Judgement::Absent(proof) => Ok(absent(proof)),
        Judgement::Missing(why) => Err(RestoreError::DamagedWal { why: format!("{segment} {why}") }),
    }
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
async fn nothing_of(archive: &Archive, timeline: TimelineId) -> Result<FetchOutcome, RestoreError> {
    if timeline == TimelineId::FIRST || archive.history(timeline).await?.is_some() {
        return Ok(absent("a complete listing shows nothing of this timeline"));
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
    last_segment: Option<SegmentName>,
    last_byte: Lsn,
    /// Of the wanted segment.
    pub(super) pieces: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is the open one: its bytes from the beginning on.
    Open(PieceChain),
    Absent(&'static str),
    Missing(&'static str),
}

impl Held {
    pub(super) fn note(&mut self, segment: SegmentName, end: Lsn) {
        self.last_segment = self.last_segment.max(Some(segment));
        self.last_byte = self.last_byte.max(end);
    }

    /// Judges a segment that is not held whole. `begin` is where the timeline begins.
    pub(super) fn judge(&self, segment: SegmentName, begin: Lsn) -> Judgement {
        let later = self.last_segment.is_some_and(|last| last > segment);
        if segment.start() < segment.size().start_of(begin) {
            return Judgement::Absent("it lies before the timeline's beginning");
        }
        let chain = PieceChain::of(&self.pieces);
        // Held to its end in pieces: the next one was begun before it was stored whole.
        let is_whole = u64::from(chain.end) == segment.size().get();
        if is_whole || chain.end > 0 && chain.unreachable.is_empty() && !later {
            return Judgement::Open(chain);
        }
        if segment.start() >= self.last_byte {
            return Judgement::Absent("it lies behind the last byte that is stored of its timeline");
        }
        Judgement::Missing("is not there, although later WAL is")
    }
}
