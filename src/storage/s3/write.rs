//! Writing objects under a condition, and making sure of what was stored.

use std::sync::atomic::Ordering;
use std::time::Duration;

use aws_sdk_s3::config::Builder as ConfigBuilder;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;

use super::body::Source;
use super::client::PayloadSignature;
use super::errors::Refusal;
use super::{Bucket, decode_crc32, encode_crc32};
use crate::storage::{Body, ObjectInfo, PutOutcome, StorageError};

/// How often a request is sent again that met another one for the same key.
pub(super) const CONFLICT_TRIES: u32 = 4;
pub(super) const CONFLICT_PAUSE: Duration = Duration::from_millis(200);

/// What must hold for a write.
#[derive(Clone, Copy)]
pub(super) enum Condition<'a> {
    Absent,
    Version(&'a str),
}

/// What came of one write.
pub(super) enum Written {
    Created,
    /// The condition did not hold.
    Refused,
    /// Another conditional write for the key was under way.
    Conflict,
}

impl Bucket {
    /// Writes under the condition, again while another write for the key is under way. `false`: the condition did not hold.
    async fn write(&self, key: &str, source: &Source, condition: Condition<'_>) -> Result<bool, StorageError> {
        let signature = source.prepare(self.clients.is_exposed).await.map_err(|why| self.source_damaged(key, why))?;
        for attempt in 1..=CONFLICT_TRIES {
            match self.write_once(key, source, signature.clone(), condition).await? {
                Written::Created => return Ok(true),
                Written::Refused => return Ok(false),
                Written::Conflict => tokio::time::sleep(CONFLICT_PAUSE * attempt).await,
            }
        }
        Err(self.unavailable("storing", key, "other requests for the same key went on"))
    }

    pub(super) async fn write_once(
        &self,
        key: &str,
        source: &Source,
        signature: Option<String>,
        condition: Condition<'_>,
    ) -> Result<Written, StorageError> {
        let conditional = !self.conditions_refused.load(Ordering::Relaxed);
        let (none_match, matching) = match condition {
            _ if !conditional => (None, None),
            Condition::Absent => (Some("*".to_owned()), None),
            Condition::Version(version) => (None, Some(version.to_owned())),
        };
        let sent = self
            .client()
            .put_object()
            .bucket(&self.settings.bucket)
            .key(self.full_key(key))
            .set_if_none_match(none_match)
            .set_if_match(matching)
            .checksum_crc32(encode_crc32(source.crc32))
            .content_length(i64::try_from(source.length).map_err(|_| self.source_damaged(key, "they are too many"))?)
            .set_storage_class(self.settings.storage_class.as_deref().map(Into::into))
            .set_server_side_encryption(self.encryption())
            .set_ssekms_key_id(self.settings.sse_kms_key_id.clone())
            .body(ByteStream::new(source.sdk_body()))
            .customize()
            .config_override(ConfigBuilder::new().timeout_config(self.clients.time_limits(source.length)))
            .interceptor(PayloadSignature(signature))
            .send()
            .await;
        let refusal = match sent {
            Ok(output) => {
                self.confirm(key, source, output.checksum_crc32()).await?;
                return Ok(Written::Created);
            }
            Err(error) => Refusal::from(error),
        };
        if let Some(why) = source.damage() {
            return Err(self.source_damaged(key, why));
        }
        if refusal.is_precondition_failed() {
            return Ok(Written::Refused);
        }
        if refusal.is_conflict() {
            return Ok(Written::Conflict);
        }
        // An update of an object that was deleted meanwhile.
        if matches!(condition, Condition::Version(_)) && refusal.is_no_such_key() {
            return Ok(Written::Refused);
        }
        if conditional && refusal.is_not_implemented() {
            self.conditions_refused.store(true, Ordering::Relaxed);
            return Ok(Written::Conflict);
        }
        if refusal.is_bad_digest() {
            // Our own bytes were checked, so they changed on the way.
            return Err(self.unavailable(
                "storing",
                key,
                "the bytes were damaged on the way to the store, which refused them",
            ));
        }
        Err(self.upload_error(refusal, key).await)
    }

    /// After a 2xx: whether what is stored is what was sent.
    async fn confirm(&self, key: &str, source: &Source, echoed: Option<&str>) -> Result<(), StorageError> {
        let held = match echoed.and_then(decode_crc32) {
            Some(echoed) if echoed != source.crc32 || !self.checksums_are_empty_words() => echoed,
            _ => match self.head_object(key).await? {
                None => {
                    return Err(self.unavailable(
                        "storing",
                        key,
                        "the store confirmed the object and does not have it",
                    ));
                }
                Some(info) if info.size != source.length => {
                    return Err(
                        self.damaged(key, format!("{} bytes were stored instead of {}", info.size, source.length))
                    );
                }
                Some(ObjectInfo { crc32: Some(crc32), .. }) if !self.checksums_are_empty_words() => crc32,
                Some(_) => self.read_crc32(key).await?,
            },
        };
        if held == source.crc32 {
            return Ok(());
        }
        Err(self.damaged(key, format!("the store holds CRC-32 {held:08x} instead of {:08x}", source.crc32)))
    }

    pub(super) async fn put_new(&self, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError> {
        let source = Source::new(body, crc32).map_err(|why| self.source_damaged(key, why))?;
        if !self.creates_atomically() && self.exists(key).await? {
            return Ok(PutOutcome::Exists);
        }
        let created = self.write(key, &source, Condition::Absent).await?;
        Ok(if created { PutOutcome::Created } else { PutOutcome::Exists })
    }

    pub(super) async fn compare_and_swap(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError> {
        let crc32 = crc32fast::hash(&body);
        let source = Source::new(&Body::Bytes(body), crc32).map_err(|why| self.source_damaged(key, why))?;
        if !self.updates_atomically() {
            let found = self.head_object(key).await?.map(|info| info.version);
            if found.as_ref().map(Option::as_deref) != expected.map(Some) {
                return Ok(PutOutcome::Exists);
            }
        }
        let condition = expected.map_or(Condition::Absent, Condition::Version);
        let written = self.write(key, &source, condition).await?;
        Ok(if written { PutOutcome::Created } else { PutOutcome::Exists })
    }
}
