//! Serves PostgreSQL's `restore_command`: one file, delivered whole and verified, or proven absent, or an error.
//!
//! "Absent" ends a recovery and opens the database, so it must be proven (I12): by the plan, by a definite answer for a history file, or by
//! a complete listing. One function alone may say it: [`absent`].

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::RestoreError;
use super::plan_file::{Needed, PlanFile, PlannedHistory, PlannedTail};
use crate::disk::Disk;
use crate::failure::NextStep;
use crate::repository::{Archive, ParsedKey, Piece, PieceChain, Repository, RepositoryError, WalObject, WalObjectKind};
use crate::seal::{Compression, HEADER_LEN, ObjectHeader};
use crate::storage::{Backoff, StorageError};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineHistory, TimelineId};

/// Tries for what will hardly change by itself: an object that is missing or damaged, perhaps only on its way.
const FEW_TRIES: u32 = 3;
const DELAY_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct FetchRequest {
    pub plan: Option<PlanFile>,
    /// Chooses the system where there is no plan and several archived under the name.
    pub system: Option<SystemIdentifier>,
    /// `%f`, not checked yet.
    pub name: String,
    /// `%p`.
    pub path: PathBuf,
    /// How long an outage is waited out.
    pub patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOutcome {
    Delivered,
    ProvenAbsent,
}

/// The only place where "absent" is said. Every caller has a proof, and names it for the log.
fn absent(proof: &str) -> FetchOutcome {
    tracing::debug!(proof, "the file does not exist");
    FetchOutcome::ProvenAbsent
}

/// Delivers one file. Errors are never taken for absence.
pub async fn wal_fetch(repositories: &[Repository], request: &FetchRequest) -> Result<FetchOutcome, RestoreError> {
    match &request.plan {
        Some(plan) => by_plan(repositories, plan, request).await,
        None => by_listing(repositories, request).await,
    }
}

/// What a name asks for. Anything else PostgreSQL does not ask for in a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WalFile<'a> {
    History(TimelineId),
    Segment(&'a str),
}

fn parse_name(name: &str) -> Result<WalFile<'_>, RestoreError> {
    let unknown = || RestoreError::Target {
        why: format!(
            "\"{}\" is not the name of a WAL segment or a history file",
            name.chars().take(64).collect::<String>()
        ),
        hint: "PostgreSQL gives the name as %f",
    };
    if let Some(timeline) = name.strip_suffix(".history") {
        return TimelineId::from_hex(timeline).map(WalFile::History).map_err(|_| unknown());
    }
    // The largest number of segments in 4 GiB, so every real name parses.
    let smallest = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    SegmentName::parse(name, smallest).map(|_| WalFile::Segment(name)).map_err(|_| unknown())
}

/// What a plan says about a name, without asking any store.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision<'a> {
    Whole(SegmentName, Compression),
    Tail(SegmentName, &'a PlannedTail),
    History(&'a PlannedHistory),
    /// PostgreSQL chooses its new timeline from the answer, so it must be today's.
    AskHistory(TimelineId),
    Absent(&'static str),
    Refused(&'static str),
}

fn decide<'a>(plan: &'a PlanFile, name: &str) -> Result<Decision<'a>, RestoreError> {
    Ok(match parse_name(name)? {
        WalFile::History(TimelineId::FIRST) => Decision::Absent("timeline 1 has no history"),
        WalFile::History(timeline) => match plan.histories.iter().find(|history| history.timeline == timeline) {
            Some(history) => Decision::History(history),
            None if timeline == plan.timeline => Decision::Refused("the plan has no history of its own timeline"),
            None => Decision::AskHistory(timeline),
        },
        WalFile::Segment(name) => {
            let segment = match SegmentName::parse(name, plan.segment_size) {
                Ok(segment) => segment,
                Err(_) => return Ok(Decision::Refused("the plan is one of a cluster with larger segments")),
            };
            match plan.needs(segment) {
                Some(Needed::Whole(compression)) => Decision::Whole(segment, compression),
                Some(Needed::Tail(tail)) => Decision::Tail(segment, tail),
                None => decide_other(plan, segment),
            }
        }
    })
}

/// A segment that the plan does not need.
fn decide_other(plan: &PlanFile, segment: SegmentName) -> Decision<'static> {
    let (first, end) = plan.range();
    if segment.start() >= end {
        // PostgreSQL 15 and later read ahead beyond the target; an error here would kill a recovery that is done.
        return Decision::Absent("it lies behind the last segment of the plan");
    }
    if !plan.is_on_branch(segment.timeline()) {
        return Decision::Refused("its timeline is not on the branch of the plan");
    }
    if segment.start() < first {
        return Decision::Refused("it lies before the first segment of the plan");
    }
    match plan.timeline_of(segment.start()) {
        // PostgreSQL asks for the newest timeline first; the plan takes this part of the WAL from an older one.
        Some(planned) if planned < segment.timeline() => Decision::Absent("the plan takes it from an older timeline"),
        _ => Decision::Refused("the plan takes this part of the WAL from another timeline"),
    }
}

async fn by_plan(
    repositories: &[Repository],
    plan: &PlanFile,
    request: &FetchRequest,
) -> Result<FetchOutcome, RestoreError> {
    let decision = decide(plan, &request.name)?;
    if let Decision::Absent(proof) = decision {
        return Ok(absent(proof));
    }
    if let Decision::Refused(why) = decision {
        return Err(RestoreError::Target {
            why: format!("{} is refused: {why}", request.name),
            hint: "plan again with `walden restore`",
        });
    }
    let found = repositories
        .iter()
        .find(|repository| repository.name() == plan.repository && repository.cluster() == plan.cluster);
    // Renamed since: if there is only one, it is meant; everything read is checked to be of the planned system.
    let repository = found.or(match repositories {
        [only] => Some(only),
        _ => None,
    });
    let Some(repository) = repository else {
        return Err(RestoreError::Target {
            why: format!("repository \"{}\" of the plan is not configured", plan.repository),
            hint: "configure it under this name, or plan again with `walden restore`",
        });
    };
    let archive = repository.bind(plan.system_identifier);
    patiently(request.patience, || carry_out(&archive, &decision, &request.path)).await
}

async fn carry_out(archive: &Archive, decision: &Decision<'_>, path: &Path) -> Result<FetchOutcome, RestoreError> {
    match decision {
        Decision::Whole(segment, compression) => deliver_whole(archive, *segment, *compression, path).await?,
        Decision::Tail(segment, tail) => deliver_tail(archive, *segment, tail, path).await?,
        Decision::History(planned) => {
            let Some(bytes) = archive.history(planned.timeline).await? else {
                return Err(missing(archive, &planned.timeline.history_file_name()));
            };
            if bytes.len() as u64 != planned.size || crc32fast::hash(&bytes) != planned.crc32 {
                let what = format!("{} is not what it was", planned.timeline.history_file_name());
                return Err(RestoreError::DamagedWal { why: what });
            }
            deliver_bytes(&bytes, path)?;
        }
        Decision::AskHistory(timeline) => match archive.history(*timeline).await? {
            Some(bytes) => deliver_bytes(&bytes, path)?,
            None => return Ok(absent("the store has no such history file")),
        },
        Decision::Absent(proof) => return Ok(absent(proof)),
        Decision::Refused(why) => return Err(RestoreError::DamagedWal { why: (*why).into() }),
    }
    Ok(FetchOutcome::Delivered)
}

fn missing(archive: &Archive, name: &str) -> RestoreError {
    let source = crate::storage::StorageError::NotFound { url: archive.url(), key: name.into() };
    RestoreError::Repository(source.into())
}

/// Repeats what may pass by itself until `patience` is over.
async fn patiently<F: Future<Output = Result<FetchOutcome, RestoreError>>>(
    patience: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<FetchOutcome, RestoreError> {
    let started = Instant::now();
    let (mut backoff, mut tries) = (Backoff::new(DELAY_MAX), 0);
    loop {
        let error = match tokio::time::timeout(patience.saturating_sub(started.elapsed()), attempt()).await {
            Ok(Ok(outcome)) => return Ok(outcome),
            Ok(Err(error)) => error,
            Err(_) => return Err(RestoreError::Timeout { seconds: patience.as_secs() }),
        };
        tries += 1;
        let tries_max = match persistence(&error) {
            Persistence::UntilPatienceEnds => u32::MAX,
            Persistence::FewTries => FEW_TRIES,
            Persistence::None => 1,
        };
        let delay = backoff.next_delay();
        if tries >= tries_max || started.elapsed() + delay >= patience {
            return Err(error);
        }
        tracing::warn!(error = %crate::restore::error::with_sources(&error), "trying again");
        tokio::time::sleep(delay).await;
    }
}

/// How long an error is worth waiting out. PostgreSQL stops at 255, and an operator starts it again when the cause is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Persistence {
    /// An outage: nothing was answered, or "later".
    UntilPatienceEnds,
    /// An answer that says no, or bytes that are wrong, perhaps only on their way.
    FewTries,
    /// It will be the same each time.
    None,
}

fn persistence(error: &RestoreError) -> Persistence {
    let of_disk = |source: &std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Persistence::UntilPatienceEnds,
        _ => Persistence::None,
    };
    match error {
        RestoreError::Repository(RepositoryError::Storage(error)) => match error {
            StorageError::Unavailable { .. } | StorageError::Throttled { .. } => Persistence::UntilPatienceEnds,
            StorageError::Settings { .. } => Persistence::None,
            StorageError::NotFound { .. }
            | StorageError::Denied { .. }
            | StorageError::NoBucket { .. }
            | StorageError::Full { .. }
            | StorageError::Damaged { .. }
            | StorageError::TooLarge { .. }
            | StorageError::SourceDamaged { .. } => Persistence::FewTries,
        },
        RestoreError::Repository(RepositoryError::Local { source, .. }) | RestoreError::Io { source, .. } => {
            of_disk(source)
        }
        error if error.exit_code() == 5 || error.next_step() == NextStep::Retry => Persistence::FewTries,
        _ => Persistence::None,
    }
}

/// A file that becomes visible only when it is whole. Dropped before, it leaves nothing.
struct Delivery {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Delivery {
    fn begin(path: &Path) -> Result<Self, RestoreError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".walden-tmp");
        let temporary = PathBuf::from(name);
        // Left over from a run that was killed; PostgreSQL runs one at a time for a path.
        Disk::default().remove(&temporary).map_err(RestoreError::io("removed", &temporary))?;
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&temporary);
        let file = file.map_err(RestoreError::io("created", &temporary))?;
        // PostgreSQL's own mode for WAL files in a directory that only its owner may read.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        file.set_permissions(mode).map_err(RestoreError::io("created", &temporary))?;
        Ok(Self { file, temporary, path: path.into(), done: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), RepositoryError> {
        self.file.write_all(bytes).map_err(|source| self.local(source))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RepositoryError> {
        self.file.write_all_at(bytes, offset).map_err(|source| self.local(source))
    }

    fn local(&self, source: std::io::Error) -> RepositoryError {
        RepositoryError::Local { key: self.temporary.display().to_string(), source }
    }

    /// Cuts or pads with zeros to `size`, then gives the file its name. PostgreSQL flushes what it keeps.
    fn finish(mut self, size: u64) -> Result<(), RestoreError> {
        self.file.set_len(size).map_err(RestoreError::io("written", &self.temporary))?;
        std::fs::rename(&self.temporary, &self.path).map_err(RestoreError::io("renamed", &self.temporary))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.done {
            // What stays is only a leftover under a name of ours.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

fn deliver_bytes(bytes: &[u8], path: &Path) -> Result<(), RestoreError> {
    let mut delivery = Delivery::begin(path)?;
    delivery.write(bytes)?;
    delivery.finish(bytes.len() as u64) // usize fits
}

fn whole(segment: SegmentName, compression: Compression) -> WalObject {
    WalObject { segment, kind: WalObjectKind::Segment, compression, valid_until: segment.end() }
}

fn piece_object(segment: SegmentName, start: u32, end: u32, compression: Compression) -> WalObject {
    let valid_until = Lsn::new(segment.start().get() + u64::from(end));
    WalObject { segment, kind: WalObjectKind::Piece { start, end }, compression, valid_until }
}

async fn deliver_whole(
    archive: &Archive,
    segment: SegmentName,
    compression: Compression,
    path: &Path,
) -> Result<(), RestoreError> {
    let mut delivery = Delivery::begin(path)?;
    // Size, checksums and identity are proved before the file gets its name.
    archive.read_wal(&whole(segment, compression), |raw| delivery.write(raw)).await?;
    delivery.finish(segment.size().get())
}

/// The planned bytes of an open segment, padded with zeros. If the whole segment has replaced the pieces, the same bytes are taken from it.
async fn deliver_tail(
    archive: &Archive,
    segment: SegmentName,
    tail: &PlannedTail,
    path: &Path,
) -> Result<(), RestoreError> {
    let delivery = Delivery::begin(path)?;
    for piece in &tail.pieces {
        let mut offset = u64::from(piece.start);
        let object = piece_object(segment, piece.start, piece.end, piece.compression);
        let read = archive
            .read_wal(&object, |raw| {
                delivery.write_at(offset, raw)?;
                offset += raw.len() as u64; // usize fits
                Ok(())
            })
            .await;
        match read {
            Ok(header) if header.raw_crc32 == piece.raw_crc32 => {}
            Ok(_) => {
                let why = format!("{} is not what it was when the restore was planned", object.key(archive.keys()));
                return Err(RestoreError::DamagedWal { why });
            }
            Err(error) if error.is_not_found() => {
                drop(delivery);
                return deliver_from_whole(archive, segment, tail, path).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    delivery.finish_padded(tail.end, segment.size().get())
}

impl Delivery {
    /// Cuts at `end`, then pads with zeros to `size`.
    fn finish_padded(self, end: u64, size: u64) -> Result<(), RestoreError> {
        self.file.set_len(end).map_err(RestoreError::io("written", &self.temporary))?;
        self.finish(size)
    }
}

async fn deliver_from_whole(
    archive: &Archive,
    segment: SegmentName,
    tail: &PlannedTail,
    path: &Path,
) -> Result<(), RestoreError> {
    let mut failed = None;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut delivery = Delivery::begin(path)?;
        let (mut left, mut crc32) = (tail.end, crc32fast::Hasher::new());
        let read = archive
            .read_wal(&whole(segment, compression), |raw| {
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(raw.len());
                crc32.update(&raw[..take]);
                left -= take as u64; // usize fits
                delivery.write(&raw[..take])
            })
            .await;
        match read {
            Ok(_) if crc32.finalize() == tail.raw_crc32 => {
                return delivery.finish_padded(tail.end, segment.size().get());
            }
            Ok(_) => {
                let why =
                    format!("{segment} does not begin with the bytes that were held when the restore was planned");
                return Err(RestoreError::DamagedWal { why });
            }
            Err(error) if error.is_not_found() => failed = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(failed.expect("both were not found").into())
}

/// Without a plan: the first repository that has the file delivers it; absent is only what every one of them proves absent.
async fn by_listing(repositories: &[Repository], request: &FetchRequest) -> Result<FetchOutcome, RestoreError> {
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
    let segments = archive.list(&archive.keys().timeline_prefix(timeline), None).await?;
    let pieces = archive.list(&archive.keys().tail_timeline_prefix(timeline), None).await?;
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
struct Held {
    last_segment: Option<SegmentName>,
    last_byte: Lsn,
    /// Of the wanted segment.
    pieces: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    /// It is the open one: its bytes from the beginning on.
    Open(PieceChain),
    Absent(&'static str),
    Missing(&'static str),
}

impl Held {
    fn note(&mut self, segment: SegmentName, end: Lsn) {
        self.last_segment = self.last_segment.max(Some(segment));
        self.last_byte = self.last_byte.max(end);
    }

    /// Judges a segment that is not held whole. `begin` is where the timeline begins.
    fn judge(&self, segment: SegmentName, begin: Lsn) -> Judgement {
        let later = self.last_segment.is_some_and(|last| last > segment);
        if segment.start() < segment.size().start_of(begin) {
            return Judgement::Absent("it lies before the timeline's beginning");
        }
        let chain = PieceChain::of(&self.pieces);
        if chain.end > 0 && chain.unreachable.is_empty() && !later {
            return Judgement::Open(chain);
        }
        if segment.start() >= self.last_byte {
            return Judgement::Absent("it lies behind the last byte that is stored of its timeline");
        }
        Judgement::Missing("is not there, although later WAL is")
    }
}

async fn deliver_chain(
    archive: &Archive,
    segment: SegmentName,
    chain: &PieceChain,
    path: &Path,
) -> Result<(), RestoreError> {
    let delivery = Delivery::begin(path)?;
    for piece in &chain.pieces {
        let mut offset = u64::from(piece.start);
        let object = piece_object(segment, piece.start, piece.end, piece.compression);
        archive
            .read_wal(&object, |raw| {
                delivery.write_at(offset, raw)?;
                offset += raw.len() as u64; // usize fits
                Ok(())
            })
            .await?;
    }
    delivery.finish_padded(u64::from(chain.end), segment.size().get())
}

#[cfg(test)]
#[path = "wal_fetch_tests.rs"]
mod tests;
