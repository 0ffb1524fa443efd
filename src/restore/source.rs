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

    pub fn archive(&self) -> &'a Archive {
        self.archive
    }
}

/// Where a search from `from` on begins: at the segment that holds it. A tail piece may begin in the middle of a page, and records can be
/// read from a page's beginning only.
pub fn searched_from(stretch: &Stretch, from: Lsn) -> Lsn {
    stretch.segment_size().start_of(from).max(stretch.start())
}

/// The objects of a stretch from `searched_from` on, as the search takes them.
pub fn held_wal(stretch: &Stretch, from: Lsn) -> Vec<HeldWal<WalObject>> {
    let mut before = Lsn::ZERO;
    let objects = stretch.objects(searched_from(stretch, from), stretch.end());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::test_support::{MIB, Sketch, timeline};

    /// A backup from a standby begins in a segment that is still held in pieces. The search began with the piece that holds its start, at
    /// the next page: it did not see what was committed before, and a time before that was restored with it (E6, I5).
    #[test]
    fn a_search_begins_with_the_segment_whatever_its_pieces_are() {
        let catalog = Sketch::new()
            .segments(1, 1..3)
            .piece(1, 3, 0, 0x2100)
            .piece(1, 3, 0x2100, 0x2900)
            .piece(1, 3, 0x2900, 0x5000);
        let catalog = catalog.done();
        let stretches = catalog.stretches(&catalog.history(timeline(1)).unwrap());
        let starts = |from: u64| {
            let held = held_wal(&stretches[0], Lsn::new(from));
            held.iter().map(|item| item.object.start.get()).collect::<Vec<_>>()
        };
        let pieces = [3 * MIB, 3 * MIB + 0x2100, 3 * MIB + 0x2900];
        assert_eq!(starts(3 * MIB + 0x2A00), pieces);
        assert_eq!(starts(3 * MIB), pieces);
        assert_eq!(starts(2 * MIB + 40), [&[2 * MIB][..], &pieces].concat());
        assert_eq!(starts(MIB), [&[MIB, 2 * MIB][..], &pieces].concat());
    }
}
