//! Pieces that give the same bytes twice must give the same bytes, else two histories were mixed: a conflict, never a choice.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::compare::read_local;
use super::{Archive, Piece, PieceChain, RepositoryError, WalObject, WalObjectKind};
use crate::seal::{ObjectDecoder, SealError};
use crate::storage::{Body, ObjectStream};
use crate::wal::{Lsn, SegmentName};

/// Short pieces read ahead at the same time.
const AHEAD: usize = 8;
/// Raw bytes of a piece up to which it is read whole.
const SHORT_BYTES: u32 = 1 << 20;
/// Stored bytes read from local disk at a time.
const LOCAL_BYTES: usize = 256 << 10;
/// Stored bytes decoded at a time: of zeros, Zstandard makes some 32,000 times as much of them.
const DECODE_BYTES: usize = 1 << 10;

impl Archive {
    /// Compares all that is stored twice of a segment's tail, byte by byte. Does nothing but list where nothing overlaps.
    ///
    /// The pieces that count are read once, as a stream, and the others against it; again only where others overlap each other too.
    pub async fn check_overlaps(&self, segment: SegmentName) -> Result<(), RepositoryError> {
        let chain = PieceChain::of(&self.pieces(segment).await?);
        let mut others = chain.overlapping.clone();
        others.sort_by_key(|piece| (piece.start, piece.end));
        while !others.is_empty() {
            let (layer, rest) = split_layer(others);
            self.check_layer(&chain.pieces, layer).await?;
            others = rest;
        }
        Ok(())
    }

    /// Compares pieces that follow each other with the chain.
    async fn check_layer(&self, chain: &[Piece], layer: Vec<Piece>) -> Result<(), RepositoryError> {
        let mut chain = ChainBytes { archive: self, pieces: chain, reader: None, raw: Vec::new(), position: 0 };
        let mut opened = std::pin::pin!(stream::iter(layer).map(|piece| self.open_piece(piece)).buffered(AHEAD));
        while let Some((piece, mut bytes)) = opened.try_next().await? {
            let mut at = piece.start;
            while let Some(raw) = bytes.next(self).await? {
                if let Some((differs, other)) = chain.compare(at, &raw).await? {
                    // Only bytes that are proven differ: both are read to their ends.
                    while bytes.next(self).await?.is_some() {}
                    chain.prove().await?;
                    return Err(RepositoryError::PiecesDiffer {
                        url: self.url(),
                        first: object(&other).key(self.keys()),
                        second: object(&piece).key(self.keys()),
                        at: Lsn::new(piece.segment.start().get() + u64::from(differs)),
                    });
                }
                at += raw.len() as u32; // a piece has at most 1 GiB
            }
        }
        Ok(())
    }

    /// Compares the pieces that are stored of a segment with a local object that holds it from its beginning on, byte by byte, as far as
    /// that reaches. Does nothing but list where there are none. Only two that are proven can be a conflict.
    pub(super) async fn check_replaced(&self, segment: SegmentName, local: &Body) -> Result<(), RepositoryError> {
        let PieceChain { pieces, overlapping, unreachable, .. } = PieceChain::of(&self.pieces(segment).await?);
        if !overlapping.is_empty() {
            self.check_overlaps(segment).await?;
        }
        let pieces: Vec<Piece> = pieces.into_iter().chain(unreachable).collect();
        if pieces.is_empty() {
            return Ok(());
        }
        let key = || WalObject { kind: WalObjectKind::Segment, ..object(&pieces[0]) }.key(self.keys());
        let damaged = |source| RepositoryError::LocalDamaged { key: key(), source };
        let mut chain = ChainBytes { archive: self, pieces: &pieces, reader: None, raw: Vec::new(), position: 0 };
        let (mut decoder, mut raw) = (ObjectDecoder::new(), Vec::new());
        let (mut offset, mut at, mut differs) = (0, 0, None);
        loop {
            let stored = read_local(local, offset, LOCAL_BYTES).await;
            let stored = stored.map_err(|source| RepositoryError::Local { key: key(), source })?;
            if stored.is_empty() {
                break;
            }
            offset += stored.len() as u64; // usize fits
            for part in stored.chunks(DECODE_BYTES) {
                raw.clear();
                let push = |bytes: &[u8]| {
                    raw.extend_from_slice(bytes);
                    Ok::<(), SealError>(())
                };
                decoder.push(part, push).map_err(damaged)?;
                if differs.is_none() {
                    differs = chain.compare_over_holes(at, &raw).await?;
                }
                at += raw.len() as u32; // a segment has at most 1 GiB
            }
        }
        decoder.finish().map_err(damaged)?;
        let Some((offset, piece)) = differs else { return Ok(()) };
        chain.prove().await?;
        let at = Lsn::new(segment.start().get() + u64::from(offset));
        Err(RepositoryError::Conflict { url: self.url(), key: object(&piece).key(self.keys()), at })
    }

    /// CRC-32 of the segment's raw bytes `[0, end)`, read from a chain of pieces that may overlap.
    pub async fn prefix_crc32(&self, chain: &[Piece], end: u32) -> Result<u32, RepositoryError> {
        let mut hasher = crc32fast::Hasher::new();
        let mut done = 0u32;
        for piece in chain {
            if piece.start > done || done >= end {
                break;
            }
            let (from, to) = (done, piece.end.min(end));
            let mut at = piece.start;
            self.read_wal(&object(piece), |raw| {
                let next = at + raw.len() as u32; // a piece has at most 1 GiB
                let (first, last) = (from.clamp(at, next), to.clamp(at, next));
                if first < last {
                    hasher.update(&raw[(first - at) as usize..(last - at) as usize]); // u32 fits
                }
                at = next;
                Ok(())
            })
            .await?;
            done = done.max(to);
        }
        Ok(hasher.finalize())
    }

    async fn open_piece(&self, piece: Piece) -> Result<(Piece, PieceBytes), RepositoryError> {
        let mut reader = PieceReader::open(self, &piece).await?;
        if piece.end - piece.start > SHORT_BYTES {
            return Ok((piece, PieceBytes::Streamed(Box::new(reader))));
        }
        let mut raw = Vec::new();
        while let Some(more) = reader.next(self).await? {
            raw.extend_from_slice(&more);
        }
        Ok((piece, PieceBytes::Whole(Some(raw))))
    }
}

/// Those that follow each other, by start, and what is left.
fn split_layer(sorted: Vec<Piece>) -> (Vec<Piece>, Vec<Piece>) {
    let mut end = 0;
    sorted.into_iter().partition(|piece| {
        let follows = piece.start >= end;
        if follows {
            end = piece.end;
        }
        follows
    })
}

/// The raw bytes of a piece: read and proven beforehand, or as they come.
enum PieceBytes {
    Whole(Option<Vec<u8>>),
    Streamed(Box<PieceReader>),
}

impl PieceBytes {
    /// `None` at the end, where all of them are proven.
    async fn next(&mut self, archive: &Archive) -> Result<Option<Vec<u8>>, RepositoryError> {
        match self {
            Self::Whole(raw) => Ok(raw.take()),
            Self::Streamed(reader) => reader.next(archive).await,
        }
    }
}

/// Reads one piece in bounded memory.
struct PieceReader {
    piece: Piece,
    stream: ObjectStream,
    /// `None` once all of it was read and proven.
    decoder: Option<ObjectDecoder>,
    /// Stored bytes not yet decoded.
    stored: Bytes,
}

impl PieceReader {
    async fn open(archive: &Archive, piece: &Piece) -> Result<Self, RepositoryError> {
        let stream = archive.get_stream(&object(piece).key(archive.keys())).await?;
        Ok(Self { piece: *piece, stream, decoder: Some(ObjectDecoder::new()), stored: Bytes::new() })
    }

    /// More raw bytes, never none of them; `None` at the end, where all are proven to be what the piece's name says.
    async fn next(&mut self, archive: &Archive) -> Result<Option<Vec<u8>>, RepositoryError> {
        let key = || object(&self.piece).key(archive.keys());
        let mut raw = Vec::new();
        while let Some(decoder) = &mut self.decoder {
            if self.stored.is_empty() {
                match self.stream.try_next().await? {
                    Some(chunk) => self.stored = chunk,
                    None => {
                        let proven = self.decoder.take().map(ObjectDecoder::finish).transpose();
                        let header = proven.map_err(|source| archive.damaged(&key(), source))?;
                        if let Some(header) = header {
                            archive.check_identity(&key(), &object(&self.piece), &header)?;
                        }
                        break;
                    }
                }
                continue;
            }
            let part = self.stored.split_to(self.stored.len().min(DECODE_BYTES));
            let pushed = decoder.push(&part, |bytes| {
                raw.extend_from_slice(bytes);
                Ok::<(), SealError>(())
            });
            pushed.map_err(|source| archive.damaged(&key(), source))?;
            if !raw.is_empty() {
                return Ok(Some(raw));
            }
        }
        Ok(None)
    }
}

/// The bytes of a chain from its beginning on, each from the first piece that has it.
struct ChainBytes<'a> {
    archive: &'a Archive,
    pieces: &'a [Piece],
    reader: Option<PieceReader>,
    /// What was read and not passed yet; it begins at `position`.
    raw: Vec<u8>,
    position: u32,
}

impl ChainBytes<'_> {
    /// Compares `bytes`, which another piece has at `at`; calls come with rising positions. Gives where they differ and which piece of the
    /// chain has the other byte.
    async fn compare(&mut self, mut at: u32, mut bytes: &[u8]) -> Result<Option<(u32, Piece)>, RepositoryError> {
        while !bytes.is_empty() && self.go_to(at).await? {
            let length = self.raw.len().min(bytes.len());
            if let Some(equal) = self.raw.iter().zip(bytes).position(|(one, other)| one != other) {
                let piece = self.reader.as_ref().map(|reader| reader.piece);
                return Ok(piece.map(|piece| (at + equal as u32, piece))); // a piece has at most 1 GiB
            }
            at += length as u32; // as above
            bytes = &bytes[length..];
        }
        Ok(None)
    }

    /// The same where the pieces may leave holes: only what they have is compared.
    async fn compare_over_holes(
        &mut self,
        mut at: u32,
        mut bytes: &[u8],
    ) -> Result<Option<(u32, Piece)>, RepositoryError> {
        while !bytes.is_empty() {
            let next = self.pieces.partition_point(|piece| piece.end <= at);
            let Some(piece) = self.pieces.get(next) else { break };
            let until = if piece.start > at { piece.start } else { piece.end };
            let take = bytes.len().min((until - at) as usize); // u32 fits
            if piece.start <= at
                && let Some(differs) = self.compare(at, &bytes[..take]).await?
            {
                return Ok(Some(differs));
            }
            at += take as u32; // as above
            bytes = &bytes[take..];
        }
        Ok(None)
    }

    /// Makes `raw` begin at `at`, with at least one byte; false behind the chain's end.
    async fn go_to(&mut self, at: u32) -> Result<bool, RepositoryError> {
        loop {
            let passed = self.raw.len().min((at - self.position) as usize); // u32 fits
            self.raw.drain(..passed);
            self.position += passed as u32; // bounded by what `at` is
            if !self.raw.is_empty() {
                return Ok(true);
            }
            let more = match &mut self.reader {
                Some(reader) if reader.piece.end > at => reader.next(self.archive).await?,
                _ => None,
            };
            match more {
                Some(more) => self.raw = more,
                None => {
                    let next = self.pieces.partition_point(|piece| piece.end <= at);
                    let Some(piece) = self.pieces.get(next).filter(|piece| piece.start <= at) else { return Ok(false) };
                    self.reader = Some(PieceReader::open(self.archive, piece).await?);
                    self.position = piece.start;
                }
            }
        }
    }

    /// Reads the piece that was compared last to its end, which proves it.
    async fn prove(&mut self) -> Result<(), RepositoryError> {
        if let Some(reader) = &mut self.reader {
            while reader.next(self.archive).await?.is_some() {}
        }
        Ok(())
    }
}

fn object(piece: &Piece) -> WalObject {
    WalObject {
        segment: piece.segment,
        kind: WalObjectKind::Piece { start: piece.start, end: piece.end },
        compression: piece.compression,
        valid_until: piece.end_lsn(),
    }
}

#[cfg(test)]
#[path = "overlap_tests.rs"]
mod tests;
