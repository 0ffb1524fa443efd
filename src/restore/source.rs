//! The archive as the search sees it.

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::search::{HeldWal, RawWal, WalSource};
use crate::repository::{Archive, RepositoryError, Stretch, WalObject};
use crate::seal::{ObjectDecoder, ObjectHeader};
use crate::storage::ObjectStream;
use crate::wal::Lsn;

/// Stored bytes decoded at a time, which bounds the raw bytes handed out at once.
const DECODE_BYTES: usize = 16 << 10;

/// Reads the headers and the WAL of stored objects.
#[derive(Debug)]
pub struct ArchiveSource<'a> {
    archive: &'a Archive,
}

impl<'a> ArchiveSource<'a> {
    pub fn new(archive: &'a Archive) -> Self {
        Self { archive }
    }
}

/// The objects of a stretch from the one that holds `from` on, as the search takes them.
pub fn held_wal(stretch: &Stretch, from: Lsn) -> Vec<HeldWal<WalObject>> {
    let mut before = Lsn::ZERO;
    let objects = stretch.objects(from, stretch.end());
    let items = objects.map(|object| {
        // Pieces may overlap (equal bytes): what was counted once is not counted again.
        let counts = object.start().max(before)..object.valid_until;
        before = object.valid_until;
        HeldWal { key: object, timeline: object.segment.timeline(), object: object.start()..object.end(), counts }
    });
    items.filter(|item| item.counts.start < item.counts.end).collect()
}

impl WalSource<WalObject> for ArchiveSource<'_> {
    type Error = RepositoryError;
    type Raw = RawObject;

    async fn header(&self, item: &HeldWal<WalObject>) -> Result<ObjectHeader, RepositoryError> {
        self.archive.header(&item.key).await
    }

    async fn raw(&self, item: &HeldWal<WalObject>, from: Lsn) -> Result<RawObject, RepositoryError> {
        let key = item.key.key(self.archive.keys());
        let stream = self.archive.get_stream(&key).await?;
        Ok(RawObject {
            url: self.archive.url(),
            key,
            stream,
            waiting: Bytes::new(),
            decoder: Some(ObjectDecoder::new()),
            skip: from.bytes_since(item.object.start),
        })
    }
}

/// The raw WAL of one object, from some byte on. Its end proves all of it.
pub struct RawObject {
    url: String,
    key: String,
    stream: ObjectStream,
    waiting: Bytes,
    /// `None` once the end was proved.
    decoder: Option<ObjectDecoder>,
    /// Raw bytes not to be handed out.
    skip: u64,
}

impl RawWal for RawObject {
    type Error = RepositoryError;

    async fn next(&mut self) -> Result<Option<Bytes>, RepositoryError> {
        let damaged = |source| RepositoryError::Damaged { url: self.url.clone(), key: self.key.clone(), source };
        loop {
            let Some(decoder) = &mut self.decoder else { return Ok(None) };
            if self.waiting.is_empty() {
                match self.stream.try_next().await? {
                    Some(chunk) => self.waiting = chunk,
                    None => {
                        let decoder = self.decoder.take().expect("looked at above");
                        decoder.finish().map_err(damaged)?;
                        return Ok(None);
                    }
                }
            }
            let piece = self.waiting.split_to(self.waiting.len().min(DECODE_BYTES));
            let (mut raw, skip) = (Vec::new(), &mut self.skip);
            let pushed = decoder.push(&piece, |bytes| {
                let drop = usize::try_from(*skip).unwrap_or(usize::MAX).min(bytes.len());
                *skip -= drop as u64; // usize fits
                raw.extend_from_slice(&bytes[drop..]);
                Ok(())
            });
            pushed.map_err(damaged)?;
            if !raw.is_empty() {
                return Ok(Some(raw.into()));
            }
        }
    }
}
