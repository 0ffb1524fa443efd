//! A large object in parts. Each part carries its own CRC-32; the whole one's is given to stores that know checksums of whole objects.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use aws_sdk_s3::config::Builder as ConfigBuilder;
use aws_sdk_s3::operation::create_multipart_upload::CreateMultipartUploadOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode, ChecksumType, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

use super::body::Source;
use super::client::PayloadSignature;
use super::errors::Refusal;
use super::read::whole_crc32;
use super::write::{CONFLICT_PAUSE, CONFLICT_TRIES};
use super::{Bucket, encode_crc32};
use crate::storage::{Body, MultipartUpload, PutOutcome, StorageError};

pub(super) struct S3Upload {
    bucket: Arc<Bucket>,
    key: String,
    upload_id: String,
    /// The store said that it will keep a checksum of the whole object.
    whole_checksum: bool,
    parts: Mutex<BTreeMap<u32, Part>>,
    /// Completed or aborted: nothing is left to clean up.
    over: AtomicBool,
}

#[derive(Clone)]
struct Part {
    length: u64,
    crc32: u32,
    version: Option<String>,
}

impl S3Upload {
    pub(super) async fn begin(bucket: Arc<Bucket>, key: &str) -> Result<Self, StorageError> {
        let output = match create(&bucket, key, Some(ChecksumType::FullObject)).await {
            Ok(output) => output,
            // Older stores do not know the kind of checksum.
            Err(refusal) if refusal.status == Some(400) || refusal.is_not_implemented() => {
                match create(&bucket, key, None).await {
                    Ok(output) => output,
                    Err(refusal) => return Err(bucket.error(refusal, "storing", key).await),
                }
            }
            Err(refusal) => return Err(bucket.error(refusal, "storing", key).await),
        };
        let upload_id = output.upload_id().map(str::to_owned);
        Ok(Self {
            upload_id: upload_id.ok_or_else(|| bucket.unavailable("storing", key, "the answer names no upload"))?,
            whole_checksum: output.checksum_type() == Some(&ChecksumType::FullObject),
            key: key.to_owned(),
            parts: Mutex::default(),
            over: AtomicBool::new(false),
            bucket,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts, if together they are the whole.
    fn whole(&self, size: u64, crc32: u32) -> Result<BTreeMap<u32, Part>, String> {
        let parts = self.lock().clone();
        let mut sum = crc32fast::Hasher::new();
        let mut total = 0_u64;
        for (position, (number, part)) in (1_u32..).zip(&parts) {
            if *number != position {
                return Err(format!("part {position} is missing"));
            }
            sum.combine(&crc32fast::Hasher::new_with_initial_len(part.crc32, part.length));
            total = total.saturating_add(part.length);
        }
        let found = sum.finalize();
        if total != size {
            Err(format!("the parts have {total} bytes together instead of {size}"))
        } else if found != crc32 {
            Err(format!("their CRC-32 is {found:08x} instead of {crc32:08x}"))
        } else {
            Ok(parts)
        }
    }

    async fn finish(&self, parts: &BTreeMap<u32, Part>, size: u64, crc32: u32) -> Result<(), Refusal> {
        let completed = parts.iter().map(|(number, part)| {
            CompletedPart::builder()
                // Exact: `put_part` refuses numbers that do not fit.
                .part_number(*number as i32)
                .set_e_tag(part.version.clone())
                .checksum_crc32(encode_crc32(part.crc32))
                .build()
        });
        let conditional = !self.bucket.conditions_refused.load(Ordering::Relaxed);
        let sent = self
            .bucket
            .client()
            .complete_multipart_upload()
            .bucket(&self.bucket.settings.bucket)
            .key(self.bucket.full_key(&self.key))
            .upload_id(&self.upload_id)
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(completed.collect())).build())
            .set_if_none_match(conditional.then(|| "*".to_owned()))
            .set_checksum_crc32(self.whole_checksum.then(|| encode_crc32(crc32)))
            .set_checksum_type(self.whole_checksum.then_some(ChecksumType::FullObject))
            .set_mpu_object_size(if self.whole_checksum { i64::try_from(size).ok() } else { None })
            .customize()
            // The store puts the parts together meanwhile; that takes as long as it takes to read them.
            .config_override(ConfigBuilder::new().timeout_config(self.bucket.clients.time_limits(size / 8)))
            .send()
            .await;
        sent.map(|_| ()).map_err(Refusal::from)
    }

    /// Whether the store has the object as it should be; `None` if it has none.
    async fn is_stored(
        &self,
        parts: &BTreeMap<u32, Part>,
        size: u64,
        crc32: u32,
    ) -> Result<Option<bool>, StorageError> {
        let bucket = &self.bucket;
        let sent = bucket
            .client()
            .head_object()
            .bucket(&bucket.settings.bucket)
            .key(bucket.full_key(&self.key))
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await;
        let output = match sent.map_err(Refusal::from) {
            Ok(output) => output,
            Err(refusal) if refusal.is_not_found() => return Ok(None),
            Err(refusal) => return Err(bucket.error(refusal, "looking at", &self.key).await),
        };
        let same_size = output.content_length().and_then(|length| u64::try_from(length).ok()) == Some(size);
        let same_sum = match (output.checksum_crc32(), whole_crc32(output.checksum_crc32(), output.checksum_type())) {
            (_, Some(whole)) if self.whole_checksum => whole == crc32,
            (Some(text), _) => text == composite(parts) || text == encode_crc32(crc32),
            (None, _) => true,
        };
        Ok(Some(same_size && same_sum))
    }

    async fn abort_upload(&self) -> Result<(), Refusal> {
        self.over.store(true, Ordering::Relaxed);
        abort(&self.bucket, &self.key, &self.upload_id).await
    }
}

#[async_trait]
impl MultipartUpload for S3Upload {
    async fn put_part(&self, number: u32, bytes: Bytes, crc32: u32) -> Result<(), StorageError> {
        let (bucket, key) = (&self.bucket, self.key.as_str());
        let part_number = i32::try_from(number).ok().filter(|number| (1..=10_000).contains(number));
        let part_number =
            part_number.ok_or_else(|| bucket.unavailable("storing", key, "parts are numbered from 1 to 10000"))?;
        let damaged = |why: String| bucket.source_damaged(key, why);
        let source = Source::new(&Body::Bytes(bytes), crc32).map_err(damaged)?;
        let signature = source.prepare(bucket.clients.is_exposed).await.map_err(damaged)?;
        let sent = bucket
            .client()
            .upload_part()
            .bucket(&bucket.settings.bucket)
            .key(bucket.full_key(key))
            .upload_id(&self.upload_id)
            .part_number(part_number)
            .checksum_crc32(encode_crc32(crc32))
            .body(ByteStream::new(source.sdk_body()))
            .customize()
            .config_override(ConfigBuilder::new().timeout_config(bucket.clients.time_limits(source.length)))
            .interceptor(PayloadSignature(signature))
            .send()
            .await;
        let output = match sent.map_err(Refusal::from) {
            Ok(output) => output,
            Err(refusal) if refusal.is_bad_digest() => {
                return Err(bucket.unavailable(
                    "storing",
                    key,
                    "a part was damaged on the way to the store, which refused it",
                ));
            }
            Err(refusal) if refusal.is_no_such_upload() => return Err(self.gone()),
            Err(refusal) => return Err(bucket.upload_error(refusal, key).await),
        };
        if output.checksum_crc32().is_some_and(|echoed| echoed != encode_crc32(crc32)) {
            return Err(bucket.unavailable("storing", key, "the store holds another checksum of a part than ours"));
        }
        let version = output.e_tag().map(str::to_owned);
        self.lock().insert(number, Part { length: source.length, crc32, version });
        Ok(())
    }

    async fn complete(&self, size: u64, crc32: u32) -> Result<PutOutcome, StorageError> {
        let (bucket, key) = (&self.bucket, self.key.as_str());
        let parts = self.whole(size, crc32).map_err(|why| bucket.source_damaged(key, why))?;
        if !bucket.creates_atomically() && bucket.exists(key).await? {
            return self.give_way().await;
        }
        let mut outcome = self.finish(&parts, size, crc32).await;
        for attempt in 1..CONFLICT_TRIES {
            match &outcome {
                Err(refusal) if refusal.is_conflict() => tokio::time::sleep(CONFLICT_PAUSE * attempt).await,
                Err(refusal) if refusal.is_not_implemented() => {
                    bucket.conditions_refused.store(true, Ordering::Relaxed)
                }
                _ => break,
            }
            outcome = self.finish(&parts, size, crc32).await;
        }
        match outcome {
            Err(refusal) if refusal.is_precondition_failed() => self.give_way().await,
            // An answer that was lost, and the second try finds the upload gone.
            Err(refusal) if refusal.is_no_such_upload() => match self.is_stored(&parts, size, crc32).await? {
                Some(true) => Ok(self.done()),
                Some(false) => Ok(PutOutcome::Exists),
                None => Err(self.gone()),
            },
            Err(refusal) => Err(bucket.error(refusal, "storing", key).await),
            Ok(()) => match self.is_stored(&parts, size, crc32).await? {
                Some(true) => Ok(self.done()),
                Some(false) => Err(bucket.damaged(key, "the store put the parts together to something else")),
                None => Err(bucket.unavailable("storing", key, "the store confirmed the object and does not have it")),
            },
        }
    }

    async fn abort(&self) -> Result<(), StorageError> {
        match self.abort_upload().await {
            Ok(()) => Ok(()),
            Err(refusal) if refusal.is_no_such_upload() || refusal.is_no_such_key() => Ok(()),
            Err(refusal) => Err(self.bucket.error(refusal, "giving up", &self.key).await),
        }
    }
}

impl S3Upload {
    /// Stores forget uploads that are not finished: by a life-cycle rule, or in a restart.
    fn gone(&self) -> StorageError {
        StorageError::UploadGone { url: self.bucket.url.clone(), key: self.key.clone() }
    }

    fn done(&self) -> PutOutcome {
        self.over.store(true, Ordering::Relaxed);
        PutOutcome::Created
    }

    /// Somebody else has created the object. Parts that cannot be removed cost room, and the bucket's life-cycle rules remove them.
    async fn give_way(&self) -> Result<PutOutcome, StorageError> {
        if let Err(refusal) = self.abort_upload().await {
            tracing::debug!(url = %self.bucket.url, key = %self.key, code = %refusal.code, "parts could not be removed");
        }
        Ok(PutOutcome::Exists)
    }
}

impl Drop for S3Upload {
    fn drop(&mut self) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        // Without a runtime, the bucket's life-cycle rules have to remove the parts.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (bucket, key, upload_id) = (self.bucket.clone(), self.key.clone(), self.upload_id.clone());
            runtime.spawn(async move {
                if let Err(refusal) = abort(&bucket, &key, &upload_id).await {
                    tracing::debug!(url = %bucket.url, %key, code = %refusal.code, "parts could not be removed");
                }
            });
        }
    }
}

async fn create(
    bucket: &Bucket,
    key: &str,
    kind: Option<ChecksumType>,
) -> Result<CreateMultipartUploadOutput, Refusal> {
    let sent = bucket
        .client()
        .create_multipart_upload()
        .bucket(&bucket.settings.bucket)
        .key(bucket.full_key(key))
        .checksum_algorithm(ChecksumAlgorithm::Crc32)
        .set_checksum_type(kind)
        .set_storage_class(bucket.settings.storage_class.as_deref().map(Into::into))
        .set_server_side_encryption(bucket.encryption())
        .set_ssekms_key_id(bucket.settings.sse_kms_key_id.clone())
        .send()
        .await;
    sent.map_err(Refusal::from)
}

async fn abort(bucket: &Bucket, key: &str, upload_id: &str) -> Result<(), Refusal> {
    let request = bucket.client().abort_multipart_upload().bucket(&bucket.settings.bucket);
    request.key(bucket.full_key(key)).upload_id(upload_id).send().await.map(|_| ()).map_err(Refusal::from)
}

/// S3's checksum of an object in parts: that of the parts' checksums one behind the other, and their number.
fn composite(parts: &BTreeMap<u32, Part>) -> String {
    let mut sum = crc32fast::Hasher::new();
    for part in parts.values() {
        sum.update(&part.crc32.to_be_bytes());
    }
    format!("{}-{}", encode_crc32(sum.finalize()), parts.len())
}
