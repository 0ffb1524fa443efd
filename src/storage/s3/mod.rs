//! A store in a bucket of S3 or a compatible service.
//!
//! Stored means: the store answered 2xx and the checksum that it echoes is ours; where it echoes none, or one that it never checked, what it
//! holds is looked at (I8). Objects are created with `If-None-Match: *` always; a store that has not proved in a probe that it honours this is
//! asked before each write whether the key exists, which is **not** atomic: two writers at the same moment can both believe that they created.
//! File bodies go out with their length and our CRC-32 in the header, never aws-chunked, in pieces of 256 KiB.

mod body;
mod client;
mod credentials;
mod errors;
mod list;
mod multipart;
mod probe;
mod read;
mod settings;
mod tls;
mod write;

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::types::ServerSideEncryption as SdkEncryption;
use bytes::Bytes;

use self::client::Clients;
use self::errors::{Cause, Refusal};
pub use self::settings::{S3Settings, ServerSideEncryption};
use super::keys::{check_key, check_prefix};
use super::{Abilities, Body, MultipartUpload, ObjectInfo, ObjectStore, ObjectStream, PutOutcome, StorageError};

/// Opens the store. No store is asked: wrong keys or a missing bucket show in the first call. Fails only by `Settings`.
pub async fn open_s3(settings: S3Settings) -> Result<Arc<dyn ObjectStore>, StorageError> {
    settings.check()?;
    let url = settings.url();
    let prefix = match settings.prefix.trim_matches('/') {
        "" => String::new(),
        prefix => format!("{prefix}/"),
    };
    check_prefix(&url, &prefix)?;
    let clients = Clients::open(settings.clone()).await?;
    if clients.is_exposed {
        tracing::warn!(repository = %settings.name, %url, "the store is reached over plain http: what is stored can be read on the way");
    }
    let bucket = Bucket {
        settings,
        url,
        prefix,
        clients,
        abilities: RwLock::new(None),
        conditions_refused: AtomicBool::new(false),
    };
    Ok(Arc::new(S3Store { bucket: Arc::new(bucket) }))
}

struct S3Store {
    bucket: Arc<Bucket>,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("url", &self.bucket.url).finish_non_exhaustive()
    }
}

/// The bucket and what is known of its store; shared with the uploads in parts.
struct Bucket {
    settings: S3Settings,
    url: String,
    /// "" or ends with a slash.
    prefix: String,
    clients: Clients,
    /// What the probe found; `None` before it.
    abilities: RwLock<Option<Abilities>>,
    /// The store answered 501 to a condition: it is left out from then on.
    conditions_refused: AtomicBool,
}

impl Bucket {
    fn client(&self) -> Client {
        self.clients.get()
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The error for callers. After a refusal of the credentials these are looked up anew for the next call, after a
    /// connection that failed the authorities.
    async fn error(&self, refusal: Refusal, doing: &str, key: &str) -> StorageError {
        if refusal.is_denied() {
            self.clients.reload().await;
        }
        if refusal.is_broken_connection() {
            self.clients.reload_authorities().await;
        }
        let what = if key.is_empty() { doing.to_owned() } else { format!("{doing} {key}") };
        let refusal = match &self.settings.endpoint {
            Some(endpoint) if refusal.is_about_the_endpoint() => refusal.asked(endpoint),
            _ => refusal,
        };
        refusal.into_error(&self.url, &what, key, self.clients.skew_seconds())
    }

    /// The same for a request with a body: a store that refuses it early closes the connection, and its reason is lost. A request without
    /// a body learns it.
    async fn upload_error(&self, refusal: Refusal, key: &str) -> StorageError {
        if refusal.is_broken_connection()
            && let Err(reason) = self.client().head_bucket().bucket(&self.settings.bucket).send().await
        {
            let reason = Refusal::from(reason);
            if reason.is_not_found() {
                return StorageError::NoBucket { url: self.url.clone(), source: None };
            }
            if !reason.is_broken_connection() {
                return self.error(reason, "storing", key).await;
            }
        }
        self.error(refusal, "storing", key).await
    }

    fn unavailable(&self, doing: &str, key: &str, why: &str) -> StorageError {
        let source = Some(Box::new(Cause::new(why)) as _);
        StorageError::Unavailable { url: self.url.clone(), what: format!("{doing} {key}"), source }
    }

    fn not_a_store(&self, doing: &str, key: &str, why: &str) -> StorageError {
        let why = match &self.settings.endpoint {
            Some(endpoint) => format!("{endpoint}: {why}"),
            None => why.to_owned(),
        };
        let source = Some(Box::new(Cause::new(&why)) as _);
        StorageError::NotAStore { url: self.url.clone(), what: format!("{doing} {key}"), source }
    }

    fn damaged(&self, key: &str, why: impl Into<String>) -> StorageError {
        StorageError::Damaged { url: self.url.clone(), key: key.to_owned(), why: why.into() }
    }

    fn source_damaged(&self, key: &str, why: impl Into<String>) -> StorageError {
        StorageError::SourceDamaged { url: self.url.clone(), key: key.to_owned(), why: why.into() }
    }

    fn abilities(&self) -> Option<Abilities> {
        *self.abilities.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn creates_atomically(&self) -> bool {
        self.abilities().is_some_and(|abilities| abilities.conditional_create)
    }

    fn updates_atomically(&self) -> bool {
        self.abilities().is_some_and(|abilities| abilities.conditional_update)
    }

    /// A probe found that the store echoes checksums without checking them.
    fn checksums_are_empty_words(&self) -> bool {
        self.abilities().is_some_and(|abilities| !abilities.checksums)
    }

    fn encryption(&self) -> Option<SdkEncryption> {
        self.settings.sse.map(|sse| match sse {
            ServerSideEncryption::Aes256 => SdkEncryption::Aes256,
            ServerSideEncryption::AwsKms => SdkEncryption::AwsKms,
        })
    }

    async fn delete(&self, key: &str) -> Result<(), StorageError> {
        let sent = self.client().delete_object().bucket(&self.settings.bucket).key(self.full_key(key)).send().await;
        match sent.map_err(Refusal::from) {
            Ok(_) => Ok(()),
            Err(refusal) if refusal.is_no_such_key() => Ok(()),
            Err(refusal) => Err(self.error(refusal, "deleting", key).await),
        }
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    fn url(&self) -> String {
        self.bucket.url.clone()
    }

    async fn probe(&self, prefix: &str) -> Result<Abilities, StorageError> {
        check_prefix(&self.bucket.url, prefix)?;
        self.bucket.probe(prefix).await
    }

    async fn put_new(&self, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.put_new(key, body, crc32).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.compare_and_swap(key, body, expected).await
    }

    async fn get(&self, key: &str, size_max: u64) -> Result<(Bytes, Option<String>), StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.get(key, size_max).await
    }

    async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.get_range(key, offset, length).await
    }

    async fn get_stream(&self, key: &str) -> Result<ObjectStream, StorageError> {
        check_key(&self.bucket.url, key)?;
        Ok(Box::pin(self.bucket.clone().get_stream(key).await?))
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.head_object(key).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
        check_prefix(&self.bucket.url, prefix)?;
        self.bucket.list(prefix, start_after).await
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        check_prefix(&self.bucket.url, prefix)?;
        self.bucket.list_folders(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StorageError> {
        check_key(&self.bucket.url, key)?;
        self.bucket.delete(key).await
    }

    async fn begin_multipart(&self, key: &str) -> Result<Box<dyn MultipartUpload>, StorageError> {
        check_key(&self.bucket.url, key)?;
        Ok(Box::new(multipart::S3Upload::begin(self.bucket.clone(), key).await?))
    }

    fn clock_skew_seconds(&self) -> Option<f64> {
        self.bucket.clients.skew_seconds()
    }
}

/// As `x-amz-checksum-crc32` wants it: base64 of the four bytes, the highest first.
fn encode_crc32(crc32: u32) -> String {
    aws_smithy_types::base64::encode(crc32.to_be_bytes())
}

/// `None` for what is not the checksum of the whole bytes, such as a checksum of the parts' checksums (`…-3`).
fn decode_crc32(text: &str) -> Option<u32> {
    let bytes = aws_smithy_types::base64::decode(text).ok()?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_written_as_s3_does() {
        // The CRC-32 of "123456789" is the published check value CBF43926.
        assert_eq!(encode_crc32(crc32fast::hash(b"123456789")), "y/Q5Jg==");
        assert_eq!(decode_crc32("y/Q5Jg=="), Some(0xCBF4_3926));
        for not_one in ["", "y/Q5Jg==-3", "AAAA", "y/Q5", "\u{e9}"] {
            assert_eq!(decode_crc32(not_one), None, "{not_one:?}");
        }
    }
}
