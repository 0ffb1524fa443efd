//! Request bodies of known length: bytes at hand, or pieces of a file. The checksum is computed on what is really sent, and the last piece
//! is held back when it is wrong: the request then stays incomplete and the store keeps nothing, whether it checks or not.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use aws_lc_rs::digest::{Context as Digest, SHA256};
use aws_smithy_types::body::SdkBody;
use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http_body::{Frame, SizeHint};

use crate::storage::source::{self, check_crc32};
use crate::storage::{Body, BoxError, PIECE};

/// What to send, as often as it takes.
#[derive(Clone)]
pub(super) struct Source {
    content: Content,
    /// Bytes in all.
    pub(super) length: u64,
    pub(super) crc32: u32,
    /// Why the file is not what it should be, once that was seen.
    damage: Arc<OnceLock<String>>,
}

#[derive(Clone)]
enum Content {
    Bytes(Bytes),
    /// `whole`: nothing may lie behind the range.
    File {
        path: Arc<Path>,
        whole: bool,
        offset: u64,
        length: u64,
        prefix: Bytes,
        suffix: Bytes,
    },
}

impl Source {
    pub(super) fn new(body: &Body, crc32: u32) -> Result<Self, String> {
        let (content, length) = match body {
            Body::Bytes(bytes) => (Content::Bytes(bytes.clone()), bytes.len() as u64),
            Body::SealedFile { path, length, .. } => {
                (Content::file(path, true, 0, *length, &Bytes::new(), &Bytes::new()), *length)
            }
            Body::FileRange { path, offset, length, prefix, suffix } => {
                let around = prefix.len() as u64 + suffix.len() as u64;
                let total = offset.checked_add(*length).and_then(|_| length.checked_add(around));
                (Content::file(path, false, *offset, *length, prefix, suffix), total.ok_or("the range is too large")?)
            }
        };
        Ok(Self { content, length, crc32, damage: Arc::default() })
    }

    /// Why the bytes are not those that were promised, if that was found.
    pub(super) fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Looks at the bytes before they are sent: those in memory are checked, and where `signed` (the connection does not protect them)
    /// they are hashed for the signature. Returns the SHA-256 in hexadecimal.
    pub(super) async fn prepare(&self, signed: bool) -> Result<Option<String>, String> {
        if !signed && self.length > 0 && matches!(self.content, Content::File { .. }) {
            return Ok(None);
        }
        let source = self.clone();
        if self.length <= PIECE as u64 {
            return source.digest(signed);
        }
        tokio::task::spawn_blocking(move || source.digest(signed))
            .await
            .map_err(|error| format!("reading it was given up: {error}"))?
    }

    fn digest(&self, signed: bool) -> Result<Option<String>, String> {
        let mut sum = crc32fast::Hasher::new();
        let mut sha = signed.then(|| Digest::new(&SHA256));
        let mut reader = Reader::new(self);
        while let Some(piece) = reader.next()? {
            sum.update(&piece);
            if let Some(sha) = &mut sha {
                sha.update(&piece);
            }
        }
        check_crc32(sum.finalize(), self.crc32)?;
        Ok(sha.map(|sha| sha.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// A body that the SDK can make anew for another try.
    pub(super) fn sdk_body(&self) -> SdkBody {
        match &self.content {
            Content::Bytes(bytes) => SdkBody::from(bytes.clone()),
            Content::File { .. } if self.length == 0 => SdkBody::from(Bytes::new()),
            Content::File { .. } => {
                let source = self.clone();
                SdkBody::retryable(move || SdkBody::from_body_1_x(PieceBody::new(source.clone())))
            }
        }
    }
}

impl Content {
    fn file(path: &Path, whole: bool, offset: u64, length: u64, prefix: &Bytes, suffix: &Bytes) -> Self {
        Self::File { path: path.into(), whole, offset, length, prefix: prefix.clone(), suffix: suffix.clone() }
    }
}

/// Reads a source in pieces, blocking.
struct Reader {
    content: Content,
    length: u64,
    position: u64,
    file: Option<File>,
    /// Its memory is used again when the network is done with the piece before.
    buffer: BytesMut,
}

impl Reader {
    fn new(source: &Source) -> Self {
        Self {
            content: source.content.clone(),
            length: source.length,
            position: 0,
            file: None,
            buffer: BytesMut::new(),
        }
    }

    fn next(&mut self) -> Result<Option<Bytes>, String> {
        if self.position >= self.length {
            return Ok(None);
        }
        let piece = match &self.content {
            Content::Bytes(bytes) => {
                // The cast is exact: the position lies in a slice.
                let start = self.position as usize;
                bytes.slice(start..bytes.len().min(start + PIECE))
            }
            Content::File { path, whole, offset, length, prefix, suffix } => {
                let (before, position) = (prefix.len() as u64, self.position);
                if position < before {
                    prefix.clone()
                } else if position < before + length {
                    let file = match &mut self.file {
                        Some(file) => file,
                        empty => empty.insert(source::open(path, offset + length, *whole)?),
                    };
                    // At most 256 KiB, so the cast is exact.
                    let wanted = (PIECE as u64).min(before + length - position) as usize;
                    self.buffer.clear();
                    self.buffer.resize(wanted, 0);
                    let read = file.read_exact_at(&mut self.buffer, offset + position - before);
                    read.map_err(|error| format!("reading it failed: {error}"))?;
                    self.buffer.split_to(wanted).freeze()
                } else {
                    suffix.clone()
                }
            }
        };
        self.position += piece.len() as u64;
        Ok(Some(piece))
    }
}

/// A file as an HTTP body; each piece is read on a blocking thread when the connection has taken the one before.
struct PieceBody {
    pieces: Pin<Box<dyn Stream<Item = Result<Bytes, BoxError>> + Send + Sync>>,
    left: u64,
}

impl PieceBody {
    fn new(source: Source) -> Self {
        let left = source.length;
        let start = (Reader::new(&source), crc32fast::Hasher::new());
        let pieces = futures_util::stream::try_unfold(start, move |(mut reader, mut sum)| {
            let (crc32, damage) = (source.crc32, source.damage.clone());
            async move {
                let read = tokio::task::spawn_blocking(move || {
                    let Some(piece) = reader.next()? else { return Ok(None) };
                    sum.update(&piece);
                    if reader.position == reader.length {
                        check_crc32(sum.clone().finalize(), crc32)?;
                    }
                    Ok::<_, String>(Some((piece, (reader, sum))))
                })
                .await?;
                read.map_err(|why| {
                    let error = BoxError::from(why.as_str());
                    // The first damage seen stays.
                    let _ = damage.set(why);
                    error
                })
            }
        });
        Self { pieces: Box::pin(pieces), left }
    }
}

impl http_body::Body for PieceBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let piece = ready!(self.pieces.as_mut().poll_next(cx));
        Poll::Ready(piece.map(|piece| {
            let piece = piece?;
            self.left = self.left.saturating_sub(piece.len() as u64);
            Ok(Frame::data(piece))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn range(file: &tempfile::NamedTempFile, offset: u64, length: u64) -> Body {
        let (prefix, suffix) = (Bytes::from_static(b"<"), Bytes::from_static(b">"));
        Body::FileRange { path: file.path().to_owned(), offset, length, prefix, suffix }
    }

    #[tokio::test]
    async fn a_file_body_is_prefix_range_and_suffix_with_a_known_length() {
        let content: Vec<u8> = (0..700_000_u32).map(|i| (i % 251) as u8).collect();
        let file = file_of(&content);
        let expected = [b"<", &content[5..600_005], b">"].concat();
        let source = Source::new(&range(&file, 5, 600_000), crc32fast::hash(&expected)).unwrap();
        for _ in 0..2 {
            let body = source.sdk_body();
            assert_eq!(body.content_length(), Some(600_002));
            assert_eq!(body.collect().await.unwrap().to_bytes(), expected);
        }
        assert_eq!(source.damage(), None);
        let sha: String =
            <sha2::Sha256 as sha2::Digest>::digest(&expected).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(source.prepare(true).await.unwrap(), Some(sha));
        assert_eq!(source.prepare(false).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_changed_or_short_file_never_becomes_a_whole_body() {
        let file = file_of(b"other bytes");
        let source = Source::new(&range(&file, 0, 11), crc32fast::hash(b"<right bytes>")).unwrap();
        assert!(source.sdk_body().collect().await.is_err());
        assert!(source.damage().unwrap().contains("CRC-32"));
        assert!(source.prepare(true).await.is_err());

        let source = Source::new(&range(&file, 0, 12), 0).unwrap();
        assert!(source.sdk_body().collect().await.is_err());
        assert!(source.damage().unwrap().contains("11 bytes, 12 are to be stored"));
    }

    #[tokio::test]
    async fn bytes_are_checked_before_they_are_sent() {
        let source = Source::new(&Body::Bytes(Bytes::from_static(b"x")), 1).unwrap();
        assert!(source.prepare(false).await.is_err());
    }
}
