//! What a store honours, found by trying: conditions and checksums are promised by many and kept by fewer.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;

use super::body::Source;
use super::errors::Refusal;
use super::write::{Condition, Written};
use super::{Bucket, decode_crc32, encode_crc32};
use crate::storage::{Abilities, Body, StorageError};

impl Bucket {
    /// Writes two objects below `prefix`, tries to break them, removes them, and remembers what was found.
    pub(super) async fn probe(&self, prefix: &str) -> Result<Abilities, StorageError> {
        let id = uuid::Uuid::new_v4();
        let (conditions, checksum) = (format!("{prefix}probe-{id}-conditions"), format!("{prefix}probe-{id}-checksum"));
        let found = self.try_abilities(&conditions, &checksum).await;
        let removed = (self.delete(&conditions).await, self.delete(&checksum).await);
        // What was found counts more than a failed cleaning up: without the right to delete, archiving still works.
        let abilities = found.map_err(|error| match error {
            // It confirms what it does not keep, or shows something else under a name that nobody has used.
            StorageError::Damaged { why, .. } => self.not_a_store("probing", conditions.as_str(), &why),
            error => error,
        })?;
        *self.abilities.write().unwrap_or_else(PoisonError::into_inner) = Some(abilities);
        if let Err(error) = removed.0.and(removed.1) {
            tracing::warn!(url = %self.url, error = %error, "objects of the probe could not be removed");
        }
        Ok(abilities)
    }

    async fn try_abilities(&self, conditions: &str, checksum: &str) -> Result<Abilities, StorageError> {
        self.try_write(conditions, b"1", Condition::Absent).await?;
        let second = self.try_write(conditions, b"2", Condition::Absent).await?;
        let stale =
            self.try_write(conditions, b"3", Condition::Version("\"00000000000000000000000000000000\"")).await?;
        let version = self.head_object(conditions).await?.and_then(|info| info.version);
        let fresh = match version {
            Some(version) => self.try_write(conditions, b"4", Condition::Version(&version)).await?,
            None => false,
        };
        // A refused condition header was left out of the second and later writes, which then passed.
        let honoured = !self.conditions_refused.load(Ordering::Relaxed);
        Ok(Abilities {
            conditional_create: honoured && !second,
            conditional_update: honoured && !stale && fresh,
            checksums: self.try_wrong_checksum(checksum).await?,
        })
    }

    /// Whether the write passed.
    async fn try_write(&self, key: &str, bytes: &'static [u8], condition: Condition<'_>) -> Result<bool, StorageError> {
        let body = Body::Bytes(Bytes::from_static(bytes));
        let source = Source::new(&body, crc32fast::hash(bytes)).map_err(|why| self.source_damaged(key, why))?;
        let signature = source.prepare(self.clients.is_exposed).await.map_err(|why| self.source_damaged(key, why))?;
        let mut written = self.write_once(key, &source, signature.clone(), condition).await?;
        if matches!(written, Written::Conflict) {
            written = self.write_once(key, &source, signature, condition).await?;
        }
        match written {
            Written::Created => Ok(true),
            Written::Refused => Ok(false),
            Written::Conflict => {
                Err(self.unavailable("probing", key, "the store answers every condition with a conflict"))
            }
        }
    }

    /// Whether the store refuses an object with a wrong checksum, or at least tells the right one.
    async fn try_wrong_checksum(&self, key: &str) -> Result<bool, StorageError> {
        let (bytes, wrong) = (b"walden probe\n", 0xDEAD_BEEF);
        let sent = self
            .client()
            .put_object()
            .bucket(&self.settings.bucket)
            .key(self.full_key(key))
            .checksum_crc32(encode_crc32(wrong))
            .set_server_side_encryption(self.encryption())
            .set_ssekms_key_id(self.settings.sse_kms_key_id.clone())
            .body(ByteStream::from_static(bytes))
            .send()
            .await;
        match sent.map_err(Refusal::from) {
            Ok(output) => Ok(output.checksum_crc32().and_then(decode_crc32) == Some(crc32fast::hash(bytes))),
            Err(refusal) if refusal.status == Some(400) => Ok(true),
            Err(refusal) => Err(self.upload_error(refusal, key).await),
        }
    }
}
