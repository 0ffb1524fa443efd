//! A test seam: a store that fails as planned. It wraps any other store; without a rule it changes nothing.
//!
//! A plan is a list of rules, each for an operation, keys and a range of calls; the first one that matches a call acts. Rules may be added
//! and removed while the store is in use, so a test can let a fault come and heal.

mod plan;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;

pub use self::plan::{Effect, Failure, FaultPlan, Operation, Rule};
use super::{Abilities, Body, MultipartUpload, ObjectInfo, ObjectStore, ObjectStream, PutOutcome, StorageError};

/// A store with faults.
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    plan: FaultPlan,
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn ObjectStore>, plan: FaultPlan) -> Arc<Self> {
        Arc::new(Self { inner, plan })
    }

    /// What may happen before the call is made: an error, a pause. The effect is returned for what happens after it.
    async fn before(&self, operation: Operation, key: &str) -> Result<Option<Effect>, StorageError> {
        before(&self.plan, &self.inner.url(), operation, key).await
    }

    fn after<T>(&self, effect: Option<Effect>, key: &str, result: Result<T, StorageError>) -> Result<T, StorageError> {
        after(&self.inner.url(), effect, key, result)
    }
}

async fn before(plan: &FaultPlan, url: &str, operation: Operation, key: &str) -> Result<Option<Effect>, StorageError> {
    let effect = plan.effect(operation, key);
    match effect {
        Some(Effect::Fail(failure)) => return Err(failure.error(url, key)),
        Some(Effect::Delay(pause)) => tokio::time::sleep(pause).await,
        Some(Effect::Hang) => std::future::pending().await,
        _ => {}
    }
    Ok(effect)
}

fn after<T>(url: &str, effect: Option<Effect>, key: &str, result: Result<T, StorageError>) -> Result<T, StorageError> {
    match effect {
        Some(Effect::AnswerLost) => result.and_then(|_| Err(Failure::Unavailable.error(url, key))),
        _ => result,
    }
}

/// Changes content as the effect wants.
fn spoil(effect: Option<Effect>, bytes: Bytes) -> Bytes {
    match effect {
        Some(Effect::FlipByte) if !bytes.is_empty() => {
            let mut changed = bytes.to_vec();
            let middle = changed.len() / 2;
            changed[middle] ^= 1;
            changed.into()
        }
        Some(Effect::Short) => bytes.slice(..bytes.len() / 2),
        _ => bytes,
    }
}

fn cut<T>(effect: Option<Effect>, mut list: Vec<T>) -> Vec<T> {
    if effect == Some(Effect::TruncatedList) {
        list.truncate(list.len() / 2);
    }
    list
}

/// All the bytes of a body, for tests only: nothing bounds them.
async fn read_body(body: &Body) -> std::io::Result<Bytes> {
    let body = body.clone();
    tokio::task::spawn_blocking(move || match body {
        Body::Bytes(bytes) => Ok(bytes),
        Body::SealedFile { path, .. } => Ok(std::fs::read(path)?.into()),
        Body::FileRange { path, offset, length, prefix, suffix } => {
            use std::os::unix::fs::FileExt as _;
            let mut middle = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
            std::fs::File::open(path)?.read_exact_at(&mut middle, offset)?;
            Ok([&prefix[..], &middle, &suffix].concat().into())
        }
    })
    .await
    .map_err(std::io::Error::other)?
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("inner", &self.inner).field("plan", &self.plan).finish()
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    fn url(&self) -> String {
        self.inner.url()
    }

    async fn probe(&self, prefix: &str) -> Result<Abilities, StorageError> {
        let effect = self.before(Operation::Probe, prefix).await?;
        let mut found = self.inner.probe(prefix).await;
        if let (Some(Effect::IgnorePrecondition), Ok(abilities)) = (effect, &mut found) {
            (abilities.conditional_create, abilities.conditional_update) = (false, false);
        }
        self.after(effect, prefix, found)
    }

    async fn put_new(&self, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError> {
        let effect = self.before(Operation::PutNew, key).await?;
        let result = match effect {
            Some(Effect::FlipByte | Effect::Short) => {
                let bytes = read_body(body).await.map_err(|source| StorageError::Unavailable {
                    url: self.url(),
                    what: format!("reading what to store as {key}"),
                    source: Some(Box::new(source)),
                })?;
                let spoiled = spoil(effect, bytes);
                let crc32 = crc32fast::hash(&spoiled);
                self.inner.put_new(key, &Body::Bytes(spoiled), crc32).await
            }
            Some(Effect::IgnorePrecondition) => {
                self.inner.delete(key).await?;
                self.inner.put_new(key, body, crc32).await
            }
            _ => self.inner.put_new(key, body, crc32).await,
        };
        self.after(effect, key, result)
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError> {
        let effect = self.before(Operation::CompareAndSwap, key).await?;
        let body = spoil(effect, body);
        if effect == Some(Effect::IgnorePrecondition) {
            self.inner.delete(key).await?;
        }
        let expected = if effect == Some(Effect::IgnorePrecondition) { None } else { expected };
        let result = self.inner.compare_and_swap(key, body, expected).await;
        self.after(effect, key, result)
    }

    async fn get(&self, key: &str, size_max: u64) -> Result<(Bytes, Option<String>), StorageError> {
        let effect = self.before(Operation::Get, key).await?;
        let result = self.inner.get(key, size_max).await;
        self.after(effect, key, result.map(|(bytes, version)| (spoil(effect, bytes), version)))
    }

    async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, StorageError> {
        let effect = self.before(Operation::GetRange, key).await?;
        let result = self.inner.get_range(key, offset, length).await;
        self.after(effect, key, result.map(|bytes| spoil(effect, bytes)))
    }

    async fn get_stream(&self, key: &str) -> Result<ObjectStream, StorageError> {
        let effect = self.before(Operation::GetStream, key).await?;
        let stream = self.after(effect, key, self.inner.get_stream(key).await)?;
        Ok(match effect {
            Some(Effect::FlipByte | Effect::Short) => {
                let mut first = true;
                Box::pin(stream.map(move |chunk| {
                    let effect = if std::mem::take(&mut first) { effect } else { None };
                    chunk.map(|chunk| spoil(effect, chunk))
                }))
            }
            _ => stream,
        })
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        let effect = self.before(Operation::Head, key).await?;
        let mut result = self.inner.head(key).await;
        if let (Some(Effect::Short), Ok(Some(info))) = (effect, &mut result) {
            info.size /= 2;
        }
        self.after(effect, key, result)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
        let effect = self.before(Operation::List, prefix).await?;
        let result = self.inner.list(prefix, start_after).await;
        self.after(effect, prefix, result.map(|list| cut(effect, list)))
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        let effect = self.before(Operation::ListFolders, prefix).await?;
        let result = self.inner.list_folders(prefix).await;
        self.after(effect, prefix, result.map(|list| cut(effect, list)))
    }

    async fn tidy(&self, prefix: &str) -> Result<(), StorageError> {
        self.inner.tidy(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StorageError> {
        let effect = self.before(Operation::Delete, key).await?;
        self.after(effect, key, self.inner.delete(key).await)
    }

    async fn begin_multipart(&self, key: &str) -> Result<Box<dyn MultipartUpload>, StorageError> {
        let effect = self.before(Operation::BeginMultipart, key).await?;
        let inner = self.after(effect, key, self.inner.begin_multipart(key).await)?;
        let (url, key, plan) = (self.url(), key.to_owned(), self.plan.clone());
        Ok(Box::new(FaultyUpload { inner, url, key, plan }))
    }

    fn clock_skew_seconds(&self) -> Option<f64> {
        self.inner.clock_skew_seconds()
    }
}

struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    url: String,
    key: String,
    plan: FaultPlan,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    async fn put_part(&self, number: u32, bytes: Bytes, crc32: u32) -> Result<(), StorageError> {
        let effect = before(&self.plan, &self.url, Operation::PutPart, &self.key).await?;
        after(&self.url, effect, &self.key, self.inner.put_part(number, spoil(effect, bytes), crc32).await)
    }

    async fn complete(&self, size: u64, crc32: u32) -> Result<PutOutcome, StorageError> {
        let effect = before(&self.plan, &self.url, Operation::Complete, &self.key).await?;
        after(&self.url, effect, &self.key, self.inner.complete(size, crc32).await)
    }

    async fn abort(&self) -> Result<(), StorageError> {
        let effect = before(&self.plan, &self.url, Operation::Abort, &self.key).await?;
        after(&self.url, effect, &self.key, self.inner.abort().await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::open_local;

    async fn put(store: &dyn ObjectStore, key: &str) -> Result<PutOutcome, StorageError> {
        store.put_new(key, &Body::Bytes(Bytes::from_static(b"content")), crc32fast::hash(b"content")).await
    }

    #[tokio::test]
    async fn rules_act_on_their_calls_and_heal() {
        let folder = tempfile::tempdir().unwrap();
        let plan = FaultPlan::new();
        let store = FaultyStore::new(open_local(folder.path()), plan.clone());
        plan.add(Rule::new(Operation::PutNew, Effect::Fail(Failure::Throttled)).keys("wal/").from_call(2).times(1));
        assert_eq!(put(&*store, "wal/1").await.unwrap(), PutOutcome::Created);
        assert_eq!(put(&*store, "other").await.unwrap(), PutOutcome::Created);
        assert!(matches!(put(&*store, "wal/2").await, Err(StorageError::Throttled { .. })));
        assert_eq!(put(&*store, "wal/2").await.unwrap(), PutOutcome::Created);
        assert_eq!(plan.hits(), 1);

        plan.add(Rule::new(Operation::PutNew, Effect::AnswerLost));
        assert!(matches!(put(&*store, "wal/3").await, Err(StorageError::Unavailable { .. })));
        plan.clear();
        assert_eq!(put(&*store, "wal/3").await.unwrap(), PutOutcome::Exists);

        plan.add(Rule::new(Operation::Get, Effect::FlipByte));
        assert_eq!(store.get("wal/3", 100).await.unwrap().0, "conuent");
        plan.add(Rule::new(Operation::List, Effect::TruncatedList));
        assert_eq!(store.list("", None).await.unwrap().len(), 2);
        plan.add(Rule::new(Operation::PutNew, Effect::IgnorePrecondition));
        assert_eq!(put(&*store, "wal/3").await.unwrap(), PutOutcome::Created);
    }
}
