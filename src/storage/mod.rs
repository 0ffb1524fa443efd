//! Objects by key: a local directory, S3 and compatible stores, and wrappers that inject faults.
//!
//! A store keeps bytes; it does not know what they mean (that is `repository`). Every object is written once and created only if
//! absent; only `compare_and_swap` changes one. Keys are relative, `/`-separated, made by `repository` alone.

pub mod faulty;
mod keys;
mod local;
mod retry;
mod s3;
mod source;
mod unopened;

use std::fmt;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::failure::NextStep;

pub use local::open_local;
pub use retry::Backoff;
pub use s3::{S3Settings, ServerSideEncryption, open_s3};

/// The largest piece in which bytes of files are read, sent and handed out: bounded memory, and small enough to stay in a processor's cache.
const PIECE: usize = 256 * 1024;

/// Requests to delete on their way at the same time.
const DELETIONS: usize = 8;

/// What to store. `crc32` is of all of the bytes (IEEE, as S3's CRC32), known beforehand; the store proves it.
#[derive(Clone, Debug)]
pub enum Body {
    Bytes(Bytes),
    /// A whole file of `length` bytes that nobody writes to any more, such as a sealed spool file.
    SealedFile {
        path: PathBuf,
        length: u64,
        /// The file goes right after. Then a store in a directory of the same file system may share it by a hard link instead of copying:
        /// under two names for longer, damage to the one would be damage to the other.
        goes: bool,
    },
    /// `length` bytes of a file from `offset`, between `prefix` and `suffix` (small). Streamed with a buffer of at most 256 KiB.
    FileRange {
        path: PathBuf,
        offset: u64,
        length: u64,
        prefix: Bytes,
        suffix: Bytes,
    },
}

/// In place of a store that cannot be opened: every call fails with `Settings` and says `why`.
pub fn unopened(url: String, why: String) -> std::sync::Arc<dyn ObjectStore> {
    std::sync::Arc::new(unopened::Unopened { url, why })
}

/// What a store says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    pub key: String,
    pub size: u64,
    /// Of all the bytes, where the store keeps one that covers them.
    pub crc32: Option<u32>,
    /// An opaque version for `compare_and_swap`, where the store has one.
    pub version: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    Created,
    /// The key exists already; nothing was written. The caller compares the content.
    Exists,
}

/// What a store proved to honour when it was probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// `put_new` refuses an existing key atomically.
    pub conditional_create: bool,
    /// `compare_and_swap` refuses a changed object atomically.
    pub conditional_update: bool,
    /// Wrong checksums are refused or the stored one is echoed.
    pub checksums: bool,
}

impl Abilities {
    /// Whether a second writer would be noticed.
    pub fn prove_one_writer(self) -> bool {
        self.conditional_create && self.conditional_update
    }
}

/// One store. All calls are safe to repeat. Cancel-safe: a dropped call leaves either nothing or the whole object.
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// For people: `s3://bucket/prefix` or the path; never a secret.
    fn url(&self) -> String;

    /// Writes and deletes small objects below `prefix` (ends with `/`) to learn what the store honours. It leaves nothing behind.
    async fn probe(&self, prefix: &str) -> Result<Abilities, StorageError>;

    /// Creates the object unless the key exists. On `Created` it is durable and the store's checksum (or a read-back) equals `crc32`.
    async fn put_new(&self, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError>;

    /// Replaces the object if its version is still `expected` (`None`: only if absent). `Exists` = somebody else was first.
    /// For the small mutable objects only.
    async fn compare_and_swap(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError>;

    /// The whole object and its version, at most `size_max` bytes (larger: `TooLarge`). Checked against the store's checksum where it has one.
    async fn get(&self, key: &str, size_max: u64) -> Result<(Bytes, Option<String>), StorageError>;

    /// `length` bytes from `offset`; fewer at the object's end.
    async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, StorageError>;

    /// The object as a stream of chunks (bounded memory), from its beginning. A connection that ends early is an error in the stream.
    async fn get_stream(&self, key: &str) -> Result<ObjectStream, StorageError>;

    /// The length and the CRC-32 of the object's bytes as they are now, by reading it whole.
    async fn sum(&self, key: &str) -> Result<(u64, u32), StorageError> {
        let mut stream = self.get_stream(key).await?;
        let (mut hasher, mut length) = (crc32fast::Hasher::new(), 0);
        while let Some(chunk) = stream.try_next().await? {
            hasher.update(&chunk);
            length += chunk.len() as u64; // usize fits
        }
        Ok((length, hasher.finalize()))
    }

    /// `None` is a definite "no such object"; anything unclear is an error.
    async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError>;

    /// Every key below `prefix`, in byte order, complete or an error; those after `start_after` if given.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError>;

    /// The names directly below `prefix` (which ends with `/`), "folders" only, complete or an error.
    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError>;

    /// Deletes; an absent key is fine.
    async fn delete(&self, key: &str) -> Result<(), StorageError>;

    /// Deletes several, in no order; absent keys are fine. After an error some of them may be gone.
    async fn delete_all(&self, keys: &[String]) -> Result<(), StorageError> {
        let deletions: Vec<_> = keys.iter().map(|key| self.delete(key)).collect();
        stream::iter(deletions).buffer_unordered(DELETIONS).try_collect().await
    }

    /// Removes what writers that died have left directly below `prefix` (which ends with `/`). Never an object.
    async fn tidy(&self, _prefix: &str) -> Result<(), StorageError> {
        Ok(())
    }

    /// Starts an object that is written in parts, because its size is not known beforehand or passes the bound.
    async fn begin_multipart(&self, key: &str) -> Result<Box<dyn MultipartUpload>, StorageError>;

    /// The store's clock minus this machine's, from its last answer, where it tells it.
    fn clock_skew_seconds(&self) -> Option<f64> {
        None
    }
}

/// A large object in parts. Dropped without `complete` or `abort`, it leaves no object.
#[async_trait]
pub trait MultipartUpload: Send + Sync {
    /// Parts are numbered from 1; all but the last have the same size. A failed part may be sent again. May be called concurrently.
    async fn put_part(&self, number: u32, bytes: Bytes, crc32: u32) -> Result<(), StorageError>;

    /// Makes the object appear, only if the key is absent. `crc32` and `size` are those of the whole; checked before success is told.
    async fn complete(&self, size: u64, crc32: u32) -> Result<PutOutcome, StorageError>;

    async fn abort(&self) -> Result<(), StorageError>;
}

/// Chunks of an object; ends after the last byte.
pub type ObjectStream = std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<Bytes, StorageError>> + Send>>;

#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{url} has no object {key}")]
    NotFound { url: String, key: String },
    #[error("{url}: {what} was refused ({code})")]
    Denied {
        url: String,
        what: String,
        code: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: the {} does not exist", if is_bucket(url) { "bucket" } else { "directory" })]
    NoBucket {
        url: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: {what} failed")]
    Unavailable {
        url: String,
        what: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: {what} failed: what answers there is not an S3 store")]
    NotAStore {
        url: String,
        what: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: {what} was throttled")]
    Throttled {
        url: String,
        what: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: no space is left for {key}")]
    Full {
        url: String,
        key: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url}: {key} is damaged: {why}")]
    Damaged { url: String, key: String, why: String },
    #[error("{url}: {key} is larger than the {size_max} bytes that it may have")]
    TooLarge { url: String, key: String, size_max: u64 },
    #[error("{url}: the bytes to store as {key} changed while they were sent: {why}")]
    SourceDamaged { url: String, key: String, why: String },
    #[error("{url}: {why}")]
    Refused {
        url: String,
        why: String,
        #[source]
        source: Option<BoxError>,
    },
    #[error("{url} has forgotten the upload of {key}")]
    UploadGone { url: String, key: String },
    #[error("{url}: {why}")]
    Settings { url: String, why: String },
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn is_bucket(url: &str) -> bool {
    url.starts_with("s3://")
}

impl StorageError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Denied { .. } | Self::NoBucket { .. } | Self::Unavailable { .. } | Self::Throttled { .. } => {
                NextStep::Retry
            }
            // The login page of a network, say, which goes away with the login.
            Self::NotAStore { .. } => NextStep::Retry,
            // A redirect while a bucket moves, a key that is disabled for an hour: wrong settings show in the same way.
            Self::Refused { .. } => NextStep::Retry,
            Self::NotFound { .. } | Self::Damaged { .. } => NextStep::Retry,
            Self::Full { .. } => NextStep::Wait,
            // The parts are gone with it, and nobody else has them.
            Self::SourceDamaged { .. } | Self::UploadGone { .. } => NextStep::FetchAgain,
            Self::TooLarge { .. } | Self::Settings { .. } => NextStep::Stop,
        }
    }

    /// Whether it may be over in a moment by itself. Everything else waits for somebody who acts, and a person who waits for a command
    /// is told at once.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Throttled { .. } => true,
            Self::Denied { .. }
            | Self::NoBucket { .. }
            | Self::NotAStore { .. }
            | Self::Refused { .. }
            | Self::UploadGone { .. }
            | Self::NotFound { .. }
            | Self::Full { .. }
            | Self::Damaged { .. }
            | Self::TooLarge { .. }
            | Self::SourceDamaged { .. }
            | Self::Settings { .. } => false,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "check the cluster's name and the prefix",
            Self::Denied { url, .. } if !is_bucket(url) => {
                "let the user that runs Walden own the directory, or correct `path`"
            }
            Self::Denied { code, .. } if code.starts_with("RequestTimeTooSkewed") => {
                "set this machine's clock by NTP; stores refuse requests from 15 minutes on"
            }
            Self::Denied { code, .. } if code == "no credentials" => {
                "give access_key_id_file and secret_access_key_file, the AWS_* variables, or a profile"
            }
            Self::Denied { code, .. } if matches!(code.as_str(), "SignatureDoesNotMatch" | "InvalidAccessKeyId") => {
                "correct the access key and its secret"
            }
            Self::Denied { .. } => {
                "check the credentials and the policy of the bucket (s3:GetObject, PutObject, ListBucket)"
            }
            Self::NoBucket { url, .. } if !is_bucket(url) => {
                "create it (`walden run` makes a directory whose parent is there), or correct `path`"
            }
            Self::NoBucket { .. } => "create it, or correct `bucket`, `endpoint` and `region`",
            Self::Unavailable { .. } => "check that the store is up and can be reached from here",
            Self::NotAStore { .. } => {
                "correct `endpoint` (scheme, host and port of the S3 interface, not of a web console), or look at the proxy between"
            }
            Self::Throttled { .. } => "Walden slows down by itself; ask for a higher request rate if it stays",
            Self::Full { .. } => "make room in the store",
            Self::Damaged { .. } => "restore the object from another repository or a version of the bucket",
            Self::TooLarge { .. } => "it is not an object that Walden wrote; look at what else writes there",
            Self::SourceDamaged { .. } => "check the spool's disk; the bytes are taken again from the server",
            Self::UploadGone { .. } => {
                "take it again; if it stays, look whether the store removes unfinished uploads too soon"
            }
            Self::Refused { .. } | Self::Settings { .. } => "correct the settings of the repository",
        }
    }
}
