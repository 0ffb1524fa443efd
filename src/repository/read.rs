use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::objects::{BACKUP_JSON_BYTES_MAX, SMALL_OBJECT_BYTES_MAX};
use super::{
    Archive, BackupId, BackupJson, Catalog, CatalogBuilder, Coverage, LeaseJson, ParsedKey, Piece, PieceChain,
    RepositoryError, SegmentRun, WalObject, WalObjectKind,
};
use crate::seal::{HEADER_LEN, ObjectDecoder, ObjectHeader, ObjectKind, SealError};
use crate::storage::{ObjectInfo, ObjectStream, StorageError};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// Bytes that a history file may have.
const HISTORY_BYTES_MAX: u64 = 1 << 20;
/// Small objects asked for at the same time.
pub(super) const REQUESTS: usize = 8;

/// What is archived of one timeline from some segment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchivedWal {
    /// Everything from the start of the first segment to here is archived, pieces included; that start itself if nothing is.
    pub end: Lsn,
    /// Complete segments behind a hole.
    pub beyond: Vec<SegmentRun>,
}

impl Archive {
    /// The whole object, at most `size_max` bytes.
    pub async fn get(&self, key: &str, size_max: u64) -> Result<Bytes, RepositoryError> {
        Ok(self.store().get(key, size_max).await?.0)
    }

    pub async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, RepositoryError> {
        Ok(self.store().get_range(key, offset, length).await?)
    }

    pub async fn get_stream(&self, key: &str) -> Result<ObjectStream, RepositoryError> {
        Ok(self.store().get_stream(key).await?)
    }

    /// `None` is a definite absence.
    pub async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, RepositoryError> {
        Ok(self.store().head(key).await?)
    }

    /// Complete, in byte order, or an error.
    pub async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, RepositoryError> {
        Ok(self.store().list(prefix, start_after).await?)
    }

    /// The names directly below `prefix`, complete or an error.
    pub async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        Ok(self.store().list_folders(prefix).await?)
    }

    /// `None` for a definite absence, in place of `NotFound`.
    pub(super) async fn get_if_there(&self, key: &str, size_max: u64) -> Result<Option<Bytes>, RepositoryError> {
        match self.store().get(key, size_max).await {
            Ok((bytes, _)) => Ok(Some(bytes)),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The header of a WAL object, lists included, compared with the object's key. One range read, or two where the lists did
    /// not fit into the header.
    pub async fn header(&self, object: &WalObject) -> Result<ObjectHeader, RepositoryError> {
        let key = object.key(self.keys());
        let head = self.get_range(&key, 0, HEADER_LEN as u64).await?;
        let damaged = |source| self.damaged(&key, source);
        let mut header = ObjectHeader::parse(&head).map_err(damaged)?;
        self.check_identity(&key, object, &header)?;
        if let Some(length) = header.overflow {
            // `parse` has bounded the length.
            let frame = self.get_range(&key, header.stored_size - length - 8, length + 8).await?;
            header.read_overflow(&frame).map_err(damaged)?;
        }
        Ok(header)
    }

    pub(super) fn damaged(&self, key: &str, source: SealError) -> RepositoryError {
        RepositoryError::Damaged { url: self.url(), key: key.into(), source }
    }

    /// Identity is bound to every object (I6): what the header says must be what the key says.
    pub(super) fn check_identity(
        &self,
        key: &str,
        object: &WalObject,
        header: &ObjectHeader,
    ) -> Result<(), RepositoryError> {
        let wrong = |found: String, expected: String| RepositoryError::Identity {
            url: self.url(),
            key: key.into(),
            found,
            expected,
        };
        if header.system_identifier != self.system() {
            return Err(wrong(
                format!("WAL of system {}", header.system_identifier),
                format!("WAL of system {}", self.system()),
            ));
        }
        if header.segment_size != object.segment.size() || header.segment != object.segment.to_string() {
            return Err(wrong(
                format!("{} of {} bytes", header.segment, header.segment_size.get()),
                format!("{} of {} bytes", object.segment, object.segment.size().get()),
            ));
        }
        let (kind, start, end) = match object.kind {
            WalObjectKind::Segment => (ObjectKind::Segment, 0, object.segment.size().get()),
            WalObjectKind::Piece { start, end } => (ObjectKind::Piece, u64::from(start), u64::from(end)),
        };
        if (header.kind, header.start_offset, header.end_offset) != (kind, start, end) {
            return Err(wrong(
                format!("bytes {:X} to {:X}", header.start_offset, header.end_offset),
                format!("bytes {start:X} to {end:X}"),
            ));
        }
        if header.compression != object.compression {
            return Err(wrong(header.compression.suffix().into(), object.compression.suffix().into()));
        }
        Ok(())
    }

    /// Hands the raw WAL of an object to `sink` in pieces, in order. Only `Ok` proves them: sizes, checksums and identity are
    /// checked at the end, so `sink` must be able to forget what it was given.
    pub async fn read_wal(
        &self,
        object: &WalObject,
        mut sink: impl FnMut(&[u8]) -> Result<(), RepositoryError>,
    ) -> Result<ObjectHeader, RepositoryError> {
        let key = object.key(self.keys());
        let mut decoder = ObjectDecoder::new();
        let mut stream = self.store().get_stream(&key).await?;
        let mut identified = false;
        // An error of the data and one of the sink are told apart.
        enum Stop {
            Data(SealError),
            Sink(RepositoryError),
        }
        impl From<SealError> for Stop {
            fn from(error: SealError) -> Self {
                Self::Data(error)
            }
        }
        let damaged = |source| self.damaged(&key, source);
        while let Some(chunk) = stream.try_next().await? {
            let pushed = decoder.push(&chunk, |raw| sink(raw).map_err(Stop::Sink));
            pushed.map_err(|stop| match stop {
                Stop::Data(source) => damaged(source),
                Stop::Sink(error) => error,
            })?;
            if !identified && let Some(header) = decoder.header() {
                self.check_identity(&key, object, header)?;
                identified = true;
            }
        }
        let header = decoder.finish().map_err(damaged)?;
        self.check_identity(&key, object, &header)?;
        Ok(header)
    }

    /// As `read_wal`, into a channel: waits while it is full, ends when nobody reads on.
    pub async fn read_wal_to(
        &self,
        object: &WalObject,
        sink: tokio::sync::mpsc::Sender<Bytes>,
    ) -> Result<ObjectHeader, RepositoryError> {
        let key = object.key(self.keys());
        let damaged = |source| self.damaged(&key, source);
        let mut decoder = ObjectDecoder::new();
        let mut stream = self.store().get_stream(&key).await?;
        let mut raw = Vec::new();
        while let Some(chunk) = stream.try_next().await? {
            for part in chunk.chunks(64 << 10) {
                let pushed = decoder.push(part, |bytes| {
                    raw.extend_from_slice(bytes);
                    Ok::<(), SealError>(())
                });
                pushed.map_err(damaged)?;
                if !raw.is_empty() && sink.send(Bytes::from(std::mem::take(&mut raw))).await.is_err() {
                    break;
                }
            }
        }
        let header = decoder.finish().map_err(damaged)?;
        self.check_identity(&key, object, &header)?;
        Ok(header)
    }

    /// A history file as it was stored; `None` is a definite absence.
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<Bytes>, RepositoryError> {
        self.get_if_there(&self.keys().history(timeline), HISTORY_BYTES_MAX).await
    }

    async fn parsed_history(&self, timeline: TimelineId) -> Result<TimelineHistory, RepositoryError> {
        let bytes = self.get(&self.keys().history(timeline), HISTORY_BYTES_MAX).await?;
        let read = TimelineHistory::parse(timeline, &bytes);
        read.map_err(|source| RepositoryError::History { url: self.url(), timeline, source })
    }

    /// The pieces stored of one segment, by start; contiguous or not (see `PieceChain`).
    pub async fn pieces(&self, segment: SegmentName) -> Result<Vec<Piece>, RepositoryError> {
        let listed = self.list(&self.keys().pieces_prefix(segment), None).await?;
        let mut pieces = Vec::new();
        for object in &listed {
            if let ParsedKey::Piece { segment, start, end, compression } =
                ParsedKey::parse(self.keys(), &object.key, segment.size())
            {
                pieces.push(Piece { segment, start, end, compression, stored_bytes: object.size });
            }
        }
        pieces.sort_by_key(|piece| (piece.start, piece.end));
        Ok(pieces)
    }

    /// What is archived of `timeline` from the segment that holds `from` on.
    pub async fn archived_from(
        &self,
        timeline: TimelineId,
        from: Lsn,
        size: SegmentSize,
    ) -> Result<ArchivedWal, RepositoryError> {
        let first = SegmentName::holding(timeline, from, size);
        let prefix = self.keys().timeline_prefix(timeline);
        // "<segment>" sorts before "<segment>.lz4" and after every key of the segment before it.
        let listed = self.list(&prefix, Some(&format!("{prefix}{first}"))).await?;
        let mut builder = CatalogBuilder::new(self.keys().clone(), Some(size));
        listed.iter().for_each(|object| builder.listed(object));
        drop(listed);
        let catalog = builder.finish();
        let mut archived = ArchivedWal { end: first.start(), beyond: Vec::new() };
        for run in catalog.timelines.get(&timeline).map(|wal| wal.runs.as_slice()).unwrap_or_default() {
            if archived.beyond.is_empty() && run.start == archived.end {
                archived.end = run.end;
            } else {
                archived.beyond.push(*run);
            }
        }
        let open = SegmentName::holding(timeline, archived.end, size);
        let chain = PieceChain::of(&self.pieces(open).await?);
        archived.end = Lsn::new(archived.end.get() + u64::from(chain.end));
        Ok(archived)
    }

    pub async fn coverage(&self) -> Result<Option<Coverage>, RepositoryError> {
        let key = self.keys().coverage();
        let Some(bytes) = self.get_if_there(&key, SMALL_OBJECT_BYTES_MAX).await? else { return Ok(None) };
        let coverage = Coverage::parse(&bytes).map_err(|problem| problem.at(&self.url(), &key))?;
        self.check_system(&key, coverage.system_identifier)?;
        Ok(Some(coverage))
    }

    pub async fn lease(&self) -> Result<Option<LeaseJson>, RepositoryError> {
        let key = self.keys().lease();
        let Some(bytes) = self.get_if_there(&key, SMALL_OBJECT_BYTES_MAX).await? else { return Ok(None) };
        LeaseJson::parse(&bytes).map(Some).map_err(|problem| problem.at(&self.url(), &key))
    }

    pub(super) fn check_system(&self, key: &str, found: crate::wal::SystemIdentifier) -> Result<(), RepositoryError> {
        if found == self.system() {
            return Ok(());
        }
        Err(RepositoryError::Identity {
            url: self.url(),
            key: key.into(),
            found: format!("of system {found}"),
            expected: format!("of system {}", self.system()),
        })
    }

    /// The ids of the backups that exist, that is, have a `backup.json`; by time.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>, RepositoryError> {
        let prefix = self.keys().backups_prefix();
        let folders = self.store().list_folders(&prefix).await?;
        let ids = folders.iter().filter_map(|folder| BackupId::parse(folder.trim_end_matches('/')).ok());
        let mut ids: Vec<BackupId> = ids.collect();
        ids.sort();
        Ok(ids)
    }

    /// `None`: that backup does not exist (or was never finished).
    pub async fn backup(&self, id: &BackupId) -> Result<Option<BackupJson>, RepositoryError> {
        let key = self.keys().backup_object(id, "backup.json");
        let Some(bytes) = self.get_if_there(&key, BACKUP_JSON_BYTES_MAX).await? else { return Ok(None) };
        let backup = BackupJson::parse(&bytes).map_err(|problem| problem.at(&self.url(), &key))?;
        self.check_system(&key, backup.system_identifier)?;
        if backup.id != *id {
            let (found, expected) = (backup.id.to_string(), id.to_string());
            return Err(RepositoryError::Identity { url: self.url(), key, found, expected });
        }
        Ok(Some(backup))
    }

    /// Every backup that exists, by time. One that cannot be read is an error of its own, so that it cannot hide the others.
    pub async fn backups(&self) -> Result<Vec<Result<BackupJson, RepositoryError>>, RepositoryError> {
        let ids = self.backup_ids().await?;
        let read = stream::iter(ids).map(|id| async move { self.backup(&id).await }).buffered(REQUESTS);
        let mut backups = Vec::new();
        for result in read.collect::<Vec<_>>().await {
            match result {
                Ok(Some(backup)) => backups.push(Ok(backup)),
                Ok(None) => {}
                // A store that cannot be reached says nothing about the backup.
                Err(error) if !error.is_damaged() && !matches!(error, RepositoryError::NewerFormat { .. }) => {
                    return Err(error);
                }
                Err(error) => backups.push(Err(error)),
            }
        }
        Ok(backups)
    }

    /// Everything that the archive holds, from listings and small objects.
    pub async fn catalog(&self) -> Result<Catalog, RepositoryError> {
        // First, so that what it tells of was there when the WAL is listed.
        let coverage = self.coverage().await;
        let backups = self.backups().await?;
        // Pieces go once their segment is stored whole: in this order one of the two is seen.
        let tail = self.list(&self.keys().tail_prefix(), None).await?;
        let wal = self.list(&self.keys().wal_prefix(), None).await?;
        let size = self.segment_size(&backups, wal.iter().chain(&tail)).await?;
        let mut builder = CatalogBuilder::new(self.keys().clone(), size);
        for object in wal.iter().chain(&tail) {
            builder.listed(object);
        }
        let any_size = size.unwrap_or(SegmentSize::DEFAULT); // histories do not depend on it
        let histories = wal.iter().filter_map(|object| match ParsedKey::parse(self.keys(), &object.key, any_size) {
            ParsedKey::History { timeline } => Some(timeline),
            _ => None,
        });
        let histories: Vec<TimelineId> = histories.collect();
        drop((wal, tail));
        for history in
            stream::iter(histories).map(|t| self.parsed_history(t)).buffered(REQUESTS).collect::<Vec<_>>().await
        {
            match history {
                Ok(history) => builder.history(history),
                Err(error @ RepositoryError::History { .. }) => builder.complain("", &with_sources(&error)),
                Err(error) => return Err(error),
            }
        }
        for backup in backups {
            match backup {
                Ok(backup) => builder.backup(backup),
                Err(error) => builder.damaged_backup(with_sources(&error)),
            }
        }
        if let Some(size) = size {
            for (gap, problem) in self.read_gaps(size).await? {
                if let Some(error) = problem {
                    let key = self.keys().gap(gap.timeline, gap.from_lsn, gap.to_lsn);
                    builder.complain(&key, &with_sources(&error));
                }
                builder.gap(gap);
            }
        }
        match coverage {
            Ok(coverage) => builder.coverage(coverage),
            // Only a hint: without it the WAL's own times count.
            Err(error) if error.is_damaged() || matches!(error, RepositoryError::NewerFormat { .. }) => {
                builder.complain(&self.keys().coverage(), &with_sources(&error));
            }
            Err(error) => return Err(error),
        }
        Ok(builder.finish())
    }

    /// The size of WAL segments, from a backup or else from the first WAL object's header. Two sizes are two clusters.
    async fn segment_size(
        &self,
        backups: &[Result<BackupJson, RepositoryError>],
        wal: impl Iterator<Item = &ObjectInfo>,
    ) -> Result<Option<SegmentSize>, RepositoryError> {
        let mut sizes = backups.iter().flatten().map(|backup| backup.wal_segment_size);
        if let Some(first) = sizes.next() {
            return match sizes.find(|size| *size != first) {
                Some(second) => Err(RepositoryError::SegmentSizes { url: self.url(), first, second }),
                None => Ok(Some(first)),
            };
        }
        // With the smallest size every segment's name parses.
        let smallest = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
        let largest = SegmentSize::new(1 << 30).expect("1 GiB is a segment size");
        for object in wal {
            let is_wal = |size| {
                let parsed = ParsedKey::parse(self.keys(), &object.key, size);
                matches!(parsed, ParsedKey::Segment { .. } | ParsedKey::Piece { .. })
            };
            if (is_wal(smallest) || is_wal(largest)) && object.size >= HEADER_LEN as u64 {
                let head = self.get_range(&object.key, 0, HEADER_LEN as u64).await?;
                let header = ObjectHeader::parse(&head).map_err(|source| self.damaged(&object.key, source))?;
                return Ok(Some(header.segment_size));
            }
        }
        Ok(None)
    }
}

/// An error and its causes in one line, for a listing.
fn with_sources(error: &RepositoryError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
