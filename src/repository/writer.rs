use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::objects::SMALL_OBJECT_BYTES_MAX;
use super::{
    Archive, ArchivedWal, Coverage, Gap, Lease, Piece, RepositoryError, SegmentRun, WalObject, WalObjectKind, compare,
};
use crate::seal::{Compression, HEADER_LEN, ObjectHeader};
use crate::storage::{Body, PutOutcome, StorageError};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Bytes that a history file may have.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

/// Pieces removed before the lease is looked at again: a busy server's segment may have come in thousands.
const DELETIONS: usize = 64;

/// A sealed WAL object as it lies on local disk, or in memory.
#[derive(Clone, Debug)]
pub struct SealedObject {
    /// The whole object: header frame, body, overflow frame.
    pub body: Body,
    /// Bytes in `body`.
    pub size: u64,
    /// CRC-32 of `body`.
    pub crc32: u32,
    pub compression: Compression,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    Created,
    /// The same content was there already. For WAL that means: its raw bytes were read and compared.
    AlreadyThere,
}

/// What is in the store now; possibly compressed otherwise than what was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub key: String,
    pub size: u64,
    pub crc32: u32,
    pub written: Written,
}

/// Writes WAL, histories, gaps and coverage, as long as the lease is held: each write asks it first. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RepositoryWriter {
    archive: Archive,
    lease: Lease,
    /// Per timeline, how far segments were stored before this writer began. Only up to there a segment can exist under the
    /// other suffix without our knowing.
    listed_until: Arc<Mutex<HashMap<TimelineId, Lsn>>>,
}

impl RepositoryWriter {
    pub fn new(archive: Archive, lease: Lease) -> Self {
        Self { archive, lease, listed_until: Arc::default() }
    }

    /// For reading.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// As `Archive::archived_from`; and the writer then knows which segments it need not look for under another suffix.
    pub async fn archived_from(
        &self,
        timeline: TimelineId,
        from: Lsn,
        size: SegmentSize,
    ) -> Result<ArchivedWal, RepositoryError> {
        let archived = self.archive.archived_from(timeline, from, size).await?;
        let last = archived.beyond.last().map_or(archived.end, |run: &SegmentRun| run.end);
        let mut known = self.listed_until.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(timeline).or_insert(last);
        Ok(archived)
    }

    /// Stores a complete segment. `Conflict`: the segment is there with other WAL, and stays as it is (I2).
    pub async fn put_segment(&self, segment: SegmentName, sealed: &SealedObject) -> Result<Stored, RepositoryError> {
        let object = WalObject {
            segment,
            kind: WalObjectKind::Segment,
            compression: sealed.compression,
            valid_until: segment.end(),
        };
        self.put_wal(object, sealed).await
    }

    /// Stores the bytes `[start, end)` of a segment that is not complete.
    pub async fn put_piece(
        &self,
        segment: SegmentName,
        start: u32,
        end: u32,
        sealed: &SealedObject,
    ) -> Result<Stored, RepositoryError> {
        let kind = WalObjectKind::Piece { start, end };
        let valid_until = Lsn::new(segment.start().get() + u64::from(end));
        self.put_wal(WalObject { segment, kind, compression: sealed.compression, valid_until }, sealed).await
    }

    /// Compares what is stored of a segment in pieces with an object that is to take their place: the whole segment, or its beginning.
    /// `Conflict`: the pieces are of another history, and stay.
    pub async fn check_pieces(&self, segment: SegmentName, sealed: &SealedObject) -> Result<(), RepositoryError> {
        self.archive.check_replaced(segment, &sealed.body).await
    }

    async fn put_wal(&self, object: WalObject, sealed: &SealedObject) -> Result<Stored, RepositoryError> {
        self.lease.require()?;
        let key = object.key(self.archive.keys());
        self.check_local(&key, &object, sealed).await?;
        if object.kind == WalObjectKind::Segment && self.may_be_there_otherwise(&object.segment) {
            let other = match object.compression {
                Compression::Lz4 => Compression::Zstd,
                Compression::Zstd => Compression::Lz4,
            };
            let other = WalObject { compression: other, ..object };
            if self.archive.head(&other.key(self.archive.keys())).await?.is_some() {
                return self.compare(&other, sealed).await;
            }
            self.lease.require()?;
        }
        match self.archive.store().put_new(&key, &sealed.body, sealed.crc32).await? {
            PutOutcome::Created => {
                Ok(Stored { key, size: sealed.size, crc32: sealed.crc32, written: Written::Created })
            }
            PutOutcome::Exists => self.compare(&object, sealed).await,
        }
    }

    fn may_be_there_otherwise(&self, segment: &SegmentName) -> bool {
        let known = self.listed_until.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&segment.timeline()).is_none_or(|until| segment.start() < *until)
    }

    /// The local object must be what its name says before it is sent (I6).
    async fn check_local(&self, key: &str, object: &WalObject, sealed: &SealedObject) -> Result<(), RepositoryError> {
        let local = |source| RepositoryError::Local { key: key.into(), source };
        let head = compare::read_local(&sealed.body, 0, HEADER_LEN).await.map_err(local)?;
        let header =
            ObjectHeader::parse(&head).map_err(|source| RepositoryError::LocalDamaged { key: key.into(), source })?;
        self.archive.check_identity(key, object, &header).map_err(|error| match error {
            RepositoryError::Identity { key, found, expected, .. } => {
                RepositoryError::LocalIdentity { key, found, expected }
            }
            error => error,
        })
    }

    /// `stored` exists: proves that it is the same WAL, byte by byte.
    async fn compare(&self, stored: &WalObject, sealed: &SealedObject) -> Result<Stored, RepositoryError> {
        let (size, crc32) = compare::same_wal(&self.archive, stored, &sealed.body).await?;
        let key = stored.key(self.archive.keys());
        Ok(Stored { key, size, crc32, written: Written::AlreadyThere })
    }

    /// Stores a history file as the server sends it. `OtherContent`: another timeline of the same number was there first.
    pub async fn put_history(&self, timeline: TimelineId, content: &[u8]) -> Result<Stored, RepositoryError> {
        self.lease.require()?;
        let key = self.archive.keys().history(timeline);
        let written = self.put_small(&key, content, HISTORY_BYTES_MAX).await?;
        Ok(Stored { key, size: content.len() as u64, crc32: crc32fast::hash(content), written }) // usize fits
    }

    async fn put_small(&self, key: &str, content: &[u8], size_max: u64) -> Result<Written, RepositoryError> {
        let body = Body::Bytes(Bytes::copy_from_slice(content));
        match self.archive.store().put_new(key, &body, crc32fast::hash(content)).await? {
            PutOutcome::Created => Ok(Written::Created),
            PutOutcome::Exists => self.compare_small(key, content, size_max).await,
        }
    }

    /// Other content counts only if it is read twice: one answer may have been changed on its way.
    async fn compare_small(&self, key: &str, content: &[u8], size_max: u64) -> Result<Written, RepositoryError> {
        let other = || RepositoryError::OtherContent { url: self.archive.url(), key: key.into() };
        let mut first = None;
        loop {
            match self.archive.get(key, size_max).await {
                Ok(found) if found == content => return Ok(Written::AlreadyThere),
                Ok(found) if first.as_ref() == Some(&found) => return Err(other()),
                Ok(_) if first.is_some() => return Err(compare::disturbed(&self.archive, key)),
                Ok(found) => first = Some(found),
                Err(RepositoryError::Storage(StorageError::TooLarge { .. })) => return Err(other()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads back what was stored (I8): length and checksum, by a question of its own. Where the store tells no checksum the
    /// object itself is read. `false`: it is not there, or is something else.
    pub async fn read_back(&self, stored: &Stored) -> Result<bool, RepositoryError> {
        self.archive.holds(&stored.key, stored.size, stored.crc32).await
    }

    /// Deletes the pieces of a segment, once the complete segment is there. Gives how many were deleted.
    pub async fn delete_pieces(&self, segment: SegmentName) -> Result<usize, RepositoryError> {
        self.lease.require()?;
        let mut whole = false;
        for compression in [Compression::Lz4, Compression::Zstd] {
            whole = whole || self.archive.head(&self.archive.keys().segment(segment, compression)).await?.is_some();
        }
        if !whole {
            return Err(RepositoryError::SegmentMissing { url: self.archive.url(), segment: segment.to_string() });
        }
        let pieces = self.archive.pieces(segment).await?;
        let deleted = pieces.len();
        let key = |piece: &Piece| self.archive.keys().piece(segment, piece.start, piece.end, piece.compression);
        for pieces in pieces.chunks(DELETIONS) {
            self.lease.require()?;
            self.archive.store().delete_all(&pieces.iter().map(key).collect::<Vec<_>>()).await?;
        }
        self.archive.store().tidy(&self.archive.keys().pieces_prefix(segment)).await?;
        Ok(deleted)
    }

    /// Records WAL that is lost. The same gap recorded before is fine, whatever it gave as the reason.
    pub async fn put_gap(&self, gap: &Gap) -> Result<Written, RepositoryError> {
        self.lease.require()?;
        let key = self.archive.keys().gap(gap.timeline, gap.from_lsn, gap.to_lsn);
        let json = gap.to_json();
        let crc32 = crc32fast::hash(&json);
        match self.archive.store().put_new(&key, &Body::Bytes(json.into()), crc32).await? {
            PutOutcome::Created => Ok(Written::Created),
            PutOutcome::Exists => Ok(Written::AlreadyThere),
        }
    }

    /// Replaces the coverage.
    pub async fn put_coverage(&self, coverage: &Coverage) -> Result<(), RepositoryError> {
        let key = self.archive.keys().coverage();
        let json = Bytes::from(coverage.to_json());
        // A second try for an answer that was lost; more would mean that another agent writes too.
        for _ in 0..2 {
            self.lease.require()?;
            let version = match self.archive.store().get(&key, SMALL_OBJECT_BYTES_MAX).await {
                Ok((found, _)) if found == json => return Ok(()),
                Ok((_, version)) => version,
                Err(StorageError::NotFound { .. }) => None,
                Err(error) => return Err(error.into()),
            };
            let swapped = self.archive.store().compare_and_swap(&key, json.clone(), version.as_deref()).await?;
            if swapped == PutOutcome::Created {
                return Ok(());
            }
        }
        Err(RepositoryError::Contended { url: self.archive.url(), what: "coverage.json".into() })
    }
}

impl Archive {
    /// Whether the object is there with this length and CRC-32. Where the store tells no checksum the object is read.
    pub async fn holds(&self, key: &str, size: u64, crc32: u32) -> Result<bool, RepositoryError> {
        let Some(info) = self.head(key).await? else { return Ok(false) };
        if info.size != size {
            return Ok(false);
        }
        if let Some(found) = info.crc32 {
            return Ok(found == crc32);
        }
        Ok(self.store().sum(key).await? == (size, crc32))
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
pub(crate) mod tests;
