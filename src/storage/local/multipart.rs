//! An object in parts: one file under a temporary name, each part written at its place.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::publish::{Publish, Unpublished};
use super::tree::Tree;
use super::{blocking, io_error};
use crate::storage::source::check_crc32;
use crate::storage::{MultipartUpload, PutOutcome, StorageError};

/// How long a part waits for the first one, whose size gives it its place.
const FIRST_PART_PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct LocalUpload {
    tree: Arc<Tree>,
    key: String,
    /// The size of every part but the last, known since the first part came.
    part_size: watch::Sender<Option<u64>>,
    state: Arc<Mutex<State>>,
}

struct State {
    /// `None`: the object existed at the beginning, or the upload is over.
    unpublished: Option<Arc<Unpublished>>,
    existed: bool,
    parts: BTreeMap<u32, Part>,
}

struct Part {
    length: u64,
    crc32: u32,
}

impl LocalUpload {
    pub(super) fn begin(tree: &Arc<Tree>, key: &str) -> Result<Self, StorageError> {
        let unpublished = Unpublished::begin(tree, key, Publish::IfAbsent)?.map(Arc::new);
        let state = State { existed: unpublished.is_none(), unpublished, parts: BTreeMap::new() };
        Ok(Self {
            tree: tree.clone(),
            key: key.to_owned(),
            part_size: watch::Sender::new(None),
            state: Arc::new(Mutex::new(state)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, why: &'static str) -> StorageError {
        StorageError::Unavailable {
            url: self.tree.url.clone(),
            what: format!("writing {} in parts", self.key),
            source: Some(why.into()),
        }
    }

    async fn place(&self, number: u32, length: u64) -> Result<u64, StorageError> {
        if number == 0 {
            return Err(self.failed("parts are numbered from 1"));
        }
        if number == 1 {
            self.part_size.send_replace(Some(length));
            return Ok(0);
        }
        let mut known = self.part_size.subscribe();
        let size = match tokio::time::timeout(FIRST_PART_PATIENCE, known.wait_for(Option::is_some)).await {
            Ok(Ok(size)) => size.unwrap_or(0),
            Ok(Err(_)) | Err(_) => return Err(self.failed("the first part did not come")),
        };
        if length > size {
            return Err(self.failed("a part is larger than the first one"));
        }
        u64::from(number - 1).checked_mul(size).ok_or_else(|| self.failed("the parts are too many"))
    }
}

#[async_trait]
impl MultipartUpload for LocalUpload {
    async fn put_part(&self, number: u32, bytes: Bytes, crc32: u32) -> Result<(), StorageError> {
        let length = bytes.len() as u64;
        let offset = self.place(number, length).await?;
        let unpublished = {
            let state = self.lock();
            if state.existed {
                return Ok(());
            }
            state.unpublished.clone().ok_or_else(|| self.failed("the upload is over"))?
        };
        let (tree, key) = (self.tree.clone(), self.key.clone());
        blocking(move || {
            check_crc32(crc32fast::hash(&bytes), crc32).map_err(|why| StorageError::SourceDamaged {
                url: tree.url.clone(),
                key: key.clone(),
                why,
            })?;
            unpublished.file.write_all_at(&bytes, offset).map_err(|error| io_error(&tree, error, "writing", &key))
        })
        .await?;
        self.lock().parts.insert(number, Part { length, crc32 });
        Ok(())
    }

    async fn complete(&self, size: u64, crc32: u32) -> Result<PutOutcome, StorageError> {
        let unpublished = {
            let mut state = self.lock();
            if state.existed {
                return Ok(PutOutcome::Exists);
            }
            check_parts(&state.parts, size, crc32).map_err(|why| StorageError::SourceDamaged {
                url: self.tree.url.clone(),
                key: self.key.clone(),
                why,
            })?;
            state.unpublished.take().ok_or_else(|| self.failed("the upload is over"))?
        };
        // A part still being written holds a second handle; it would not be in the sum that was just checked.
        let unpublished = Arc::try_unwrap(unpublished).map_err(|_| self.failed("a part is still being written"))?;
        blocking(move || unpublished.finish(Publish::IfAbsent)).await
    }

    async fn abort(&self) -> Result<(), StorageError> {
        let unpublished = self.lock().unpublished.take();
        blocking(move || {
            drop(unpublished);
            Ok(())
        })
        .await
    }
}

/// Whether the parts are those of the whole: none missing, equal in size but for the last, and together of this size and checksum.
fn check_parts(parts: &BTreeMap<u32, Part>, size: u64, crc32: u32) -> Result<(), String> {
    let mut sum = crc32fast::Hasher::new();
    let mut total = 0_u64;
    let part_size = parts.get(&1).map_or(0, |part| part.length);
    for (position, (number, part)) in (1_u32..).zip(parts) {
        if *number != position {
            return Err(format!("part {position} is missing"));
        }
        if part.length != part_size && (*number as usize) != parts.len() {
            return Err(format!("part {number} has another size than the first"));
        }
        sum.combine(&crc32fast::Hasher::new_with_initial_len(part.crc32, part.length));
        total += part.length;
    }
    if total != size {
        return Err(format!("the parts have {total} bytes together instead of {size}"));
    }
    check_crc32(sum.finalize(), crc32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(of: &[(u32, &[u8])]) -> BTreeMap<u32, Part> {
        of.iter()
            .map(|(number, bytes)| (*number, Part { length: bytes.len() as u64, crc32: crc32fast::hash(bytes) }))
            .collect()
    }

    #[test]
    fn parts_must_make_up_the_whole() {
        let whole = crc32fast::hash(b"aabbc");
        check_parts(&parts(&[(1, b"aa"), (2, b"bb"), (3, b"c")]), 5, whole).unwrap();
        assert!(check_parts(&parts(&[(1, b"aa"), (3, b"c")]), 3, whole).is_err());
        assert!(check_parts(&parts(&[(1, b"aa"), (2, b"bb"), (3, b"d")]), 5, whole).is_err());
        assert!(check_parts(&parts(&[(1, b"aa"), (2, b"b"), (3, b"bc")]), 5, whole).is_err());
        assert!(check_parts(&parts(&[(1, b"aa"), (2, b"bb"), (3, b"c")]), 6, whole).is_err());
        check_parts(&parts(&[]), 0, 0).unwrap();
    }
}
