//! Reading objects: whole, in part, as a stream, or only what the store says about them. An answer that ends early or does not have the
//! checksum that the store keeps is an error, never content (I13).

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumMode, ChecksumType};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt};

use super::errors::{Cause, Refusal, is_web_type};
use super::{Bucket, decode_crc32};
use crate::storage::{ObjectInfo, StorageError};

/// Memory taken before bytes arrive, whatever the store claims that will come.
const RESERVE_MAX: u64 = 1024 * 1024;

/// An answer whose body is still to be read.
struct Answer {
    body: ByteStream,
    /// Bytes that the body has.
    length: u64,
    /// Of the whole object, where the store keeps one that covers all of it.
    crc32: Option<u32>,
    version: Option<String>,
    /// Where in the object the body begins.
    start: u64,
}

impl Bucket {
    pub(super) async fn get(&self, key: &str, size_max: u64) -> Result<(Bytes, Option<String>), StorageError> {
        let answer = self.ask(key, None).await?;
        if answer.length > size_max {
            return Err(StorageError::TooLarge { url: self.url.clone(), key: key.to_owned(), size_max });
        }
        let version = answer.version.clone();
        // At most 1 MiB, so the cast is exact.
        let mut bytes = BytesMut::with_capacity(answer.length.min(RESERVE_MAX) as usize);
        let mut chunks = std::pin::pin!(self.chunks(key, answer));
        while let Some(chunk) = chunks.try_next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok((bytes.freeze(), version))
    }

    pub(super) async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, StorageError> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        let last = offset.saturating_add(length - 1);
        let answer = match self.ask(key, Some(format!("bytes={offset}-{last}"))).await {
            Ok(answer) => answer,
            Err(RangeError::BeyondEnd) => return Ok(Bytes::new()),
            Err(RangeError::Other(error)) => return Err(error),
        };
        // A store that does not know ranges answers with the whole object; then the wanted part is cut out of it.
        let skip = match offset.checked_sub(answer.start) {
            Some(skip) if skip <= answer.length => skip,
            Some(_) if answer.start == 0 => return Ok(Bytes::new()),
            _ => {
                return Err(self.unavailable(
                    "reading",
                    key,
                    "the store answered with another range than the one asked for",
                ));
            }
        };
        let (mut skip, mut wanted) = (skip, length.min(answer.length - skip));
        let mut bytes = BytesMut::with_capacity(wanted.min(RESERVE_MAX) as usize);
        let mut chunks = std::pin::pin!(self.chunks(key, answer));
        while wanted > 0 {
            let Some(mut chunk) = chunks.try_next().await? else { break };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            // Both casts are exact: they are bounded by the chunk's length.
            chunk = chunk.slice(skipped as usize..);
            chunk.truncate(wanted.min(chunk.len() as u64) as usize);
            wanted -= chunk.len() as u64;
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.freeze())
    }

    pub(super) async fn get_stream(
        self: Arc<Self>,
        key: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, StorageError>> + Send + 'static, StorageError> {
        let answer = self.ask(key, None).await?;
        let key = key.to_owned();
        let state = Chunks::new(&self, answer);
        Ok(futures_util::stream::try_unfold(state, move |mut chunks| {
            let (bucket, key) = (self.clone(), key.clone());
            async move { Ok(chunks.next(&bucket, &key).await?.map(|chunk| (chunk, chunks))) }
        }))
    }

    /// The CRC-32 of an object by reading all of it.
    pub(super) async fn read_crc32(&self, key: &str) -> Result<u32, StorageError> {
        let answer = self.ask(key, None).await?;
        let mut sum = crc32fast::Hasher::new();
        let mut chunks = std::pin::pin!(self.chunks(key, answer));
        while let Some(chunk) = chunks.try_next().await? {
            sum.update(&chunk);
        }
        Ok(sum.finalize())
    }

    /// What the store says about an object. `None` only if it says by code that there is none: HEAD answers 404 for a missing bucket too,
    /// and anything between might, so the reason is asked for.
    pub(super) async fn head_object(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        let sent = self
            .client()
            .head_object()
            .bucket(&self.settings.bucket)
            .key(self.full_key(key))
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await;
        let output = match sent.map_err(Refusal::from) {
            Ok(output) => output,
            Err(refusal) if refusal.is_not_found() => return self.confirm_absent(key).await,
            Err(refusal) => return Err(self.error(refusal, "looking at", key).await),
        };
        let size = output.content_length().and_then(|size| u64::try_from(size).ok());
        Ok(Some(ObjectInfo {
            key: key.to_owned(),
            size: size.ok_or_else(|| self.unavailable("looking at", key, "the answer has no length"))?,
            crc32: whole_crc32(output.checksum_crc32(), output.checksum_type()),
            version: output.e_tag().map(str::to_owned),
        }))
    }

    /// Whether there is such an object, in one request.
    pub(super) async fn exists(&self, key: &str) -> Result<bool, StorageError> {
        match self.ask(key, Some("bytes=0-0".to_owned())).await {
            // Even the first byte lies beyond the end of an empty object.
            Ok(_) | Err(RangeError::BeyondEnd) => Ok(true),
            Err(RangeError::Other(StorageError::NotFound { .. })) => Ok(false),
            Err(RangeError::Other(error)) => Err(error),
        }
    }

    async fn confirm_absent(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        if self.exists(key).await? {
            return Err(self.unavailable("looking at", key, "the store says both that it is there and that it is not"));
        }
        Ok(None)
    }

    async fn ask(&self, key: &str, range: Option<String>) -> Result<Answer, RangeError> {
        let whole = range.is_none();
        let sent = self
            .client()
            .get_object()
            .bucket(&self.settings.bucket)
            .key(self.full_key(key))
            .set_range(range)
            .customize()
            // By hand, so that the check is ours: it then tells damage from an interruption.
            .mutate_request(move |request| {
                if whole {
                    request.headers_mut().insert("x-amz-checksum-mode", "ENABLED");
                }
            })
            .send()
            .await;
        let output = match sent.map_err(Refusal::from) {
            Ok(output) => output,
            Err(refusal) if refusal.is_range_beyond_end() => return Err(RangeError::BeyondEnd),
            Err(refusal) => return Err(RangeError::Other(self.error(refusal, "reading", key).await)),
        };
        if is_web_type(output.content_type()) {
            return Err(RangeError::Other(self.not_a_store("reading", key, "a web page instead of an object")));
        }
        self.answer(key, output, whole).map_err(RangeError::Other)
    }

    fn answer(&self, key: &str, output: GetObjectOutput, whole: bool) -> Result<Answer, StorageError> {
        let length = output.content_length().and_then(|length| u64::try_from(length).ok());
        let start = match output.content_range() {
            None => Some(0),
            Some(_) if whole => None,
            Some(range) => range
                .strip_prefix("bytes ")
                .and_then(|range| range.split_once('-'))
                .and_then(|(from, _)| from.parse().ok()),
        };
        let crc32 = if whole { whole_crc32(output.checksum_crc32(), output.checksum_type()) } else { None };
        Ok(Answer {
            length: length.ok_or_else(|| self.unavailable("reading", key, "the answer has no length"))?,
            start: start
                .ok_or_else(|| self.unavailable("reading", key, "the answer has a range that was not asked for"))?,
            crc32,
            version: output.e_tag().map(str::to_owned),
            body: output.body,
        })
    }

    fn chunks<'a>(
        &'a self,
        key: &'a str,
        answer: Answer,
    ) -> impl Stream<Item = Result<Bytes, StorageError>> + Send + 'a {
        futures_util::stream::try_unfold(Chunks::new(self, answer), move |mut chunks| async move {
            Ok(chunks.next(self, key).await?.map(|chunk| (chunk, chunks)))
        })
        .boxed()
    }
}

/// Only a request with a range can end beyond the object.
enum RangeError {
    BeyondEnd,
    Other(StorageError),
}

impl From<RangeError> for StorageError {
    fn from(error: RangeError) -> Self {
        match error {
            RangeError::Other(error) => error,
            RangeError::BeyondEnd => StorageError::Unavailable {
                url: String::new(),
                what: "reading without a range".to_owned(),
                source: None,
            },
        }
    }
}

/// A body as it comes in, counted and summed up.
struct Chunks {
    body: ByteStream,
    left: u64,
    sum: crc32fast::Hasher,
    expected: Option<u32>,
    /// How long it may still be waited for; the time that the reader takes for itself does not count.
    patience: Duration,
}

impl Chunks {
    fn new(bucket: &Bucket, answer: Answer) -> Self {
        let Answer { body, length, crc32, .. } = answer;
        let patience = bucket.clients.body_timeout(length);
        Self { body, left: length, sum: crc32fast::Hasher::new(), expected: crc32, patience }
    }

    async fn next(&mut self, bucket: &Bucket, key: &str) -> Result<Option<Bytes>, StorageError> {
        let (asked, limit) = (Instant::now(), bucket.clients.chunk_timeout().min(self.patience));
        let next = tokio::time::timeout(limit, self.body.next()).await;
        self.patience = self.patience.saturating_sub(asked.elapsed());
        let why = if self.patience.is_zero() { "it came too slowly" } else { "nothing came for too long" };
        match next.map_err(|_| bucket.unavailable("reading", key, why))? {
            Some(Ok(chunk)) => {
                self.left = match self.left.checked_sub(chunk.len() as u64) {
                    Some(left) => left,
                    None => return Err(bucket.unavailable("reading", key, "more bytes came than were announced")),
                };
                if self.expected.is_some() {
                    self.sum.update(&chunk);
                }
                Ok(Some(chunk))
            }
            Some(Err(error)) => Err(StorageError::Unavailable {
                url: bucket.url.clone(),
                what: format!("reading {key}"),
                source: Some(Box::new(Cause::of(&error))),
            }),
            None if self.left > 0 => {
                Err(bucket.unavailable("reading", key, &format!("the answer ended {} bytes early", self.left)))
            }
            None => match self.expected {
                Some(expected) if expected != self.sum.clone().finalize() => {
                    let found = self.sum.clone().finalize();
                    Err(bucket.damaged(key, format!("its CRC-32 is {found:08x} instead of {expected:08x}")))
                }
                _ => Ok(None),
            },
        }
    }
}

/// A checksum that covers all the bytes; one of an object in parts may only cover the parts' checksums.
pub(super) fn whole_crc32(text: Option<&str>, kind: Option<&ChecksumType>) -> Option<u32> {
    match kind {
        None | Some(ChecksumType::FullObject) => text.and_then(decode_crc32),
        Some(_) => None,
    }
}
