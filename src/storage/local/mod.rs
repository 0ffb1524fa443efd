//! A store in a directory: keys are paths, objects are files.
//!
//! Every object is created under its final name only when complete and flushed, never replaced (I2, I9); directories are 0700 and files 0600
//! whatever the umask (I18); no symbolic link below the root is followed (I17). System calls run on tokio's blocking threads.
//! The store keeps no checksum of its own: what it holds is checked by what the objects say about themselves.

mod list;
mod lock;
mod multipart;
mod publish;
mod tree;
mod write;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use self::multipart::LocalUpload;
use self::tree::{Tree, flush_directory, split};
use super::keys::{check_key, check_prefix};
use super::source::sum_of;
use super::{
    Abilities, Body, BoxError, MultipartUpload, ObjectInfo, ObjectStore, ObjectStream, PIECE, PutOutcome, StorageError,
};

/// Opens the store in the directory `root`. Nothing is touched: the directory is made by the first write (its parent must be there), and
/// a read from a missing one is `NoBucket`, since an unmounted repository must not look like an empty one.
pub fn open_local(root: impl Into<PathBuf>) -> Arc<dyn ObjectStore> {
    let root = root.into();
    // Fails only for an empty path or a vanished working directory; the path as given then says so at its first use.
    let root = std::path::absolute(&root).unwrap_or(root);
    Arc::new(LocalStore { tree: Arc::new(Tree::new(root)) })
}

#[derive(Debug)]
struct LocalStore {
    tree: Arc<Tree>,
}

#[async_trait]
impl ObjectStore for LocalStore {
    fn url(&self) -> String {
        self.tree.url.clone()
    }

    async fn probe(&self, prefix: &str) -> Result<Abilities, StorageError> {
        check_prefix(&self.tree.url, prefix)?;
        let key = format!("{prefix}probe-{}", uuid::Uuid::new_v4());
        let body = Body::Bytes(Bytes::from_static(b"walden probe\n"));
        let crc32 = crc32fast::hash(b"walden probe\n");
        let first = self.put_new(&key, &body, crc32).await;
        let second = if first.is_ok() { self.put_new(&key, &body, crc32).await } else { Ok(PutOutcome::Exists) };
        let changed = match self.get(&key, PIECE as u64).await {
            Ok((_, version)) => self.compare_and_swap(&key, Bytes::from_static(b"2"), version.as_deref()).await,
            Err(error) => Err(error),
        };
        let stale = self.compare_and_swap(&key, Bytes::from_static(b"3"), Some("stale")).await;
        self.delete(&key).await?;
        Ok(Abilities {
            conditional_create: (first?, second?) == (PutOutcome::Created, PutOutcome::Exists),
            conditional_update: (changed?, stale?) == (PutOutcome::Created, PutOutcome::Exists),
            checksums: true,
        })
    }

    async fn put_new(&self, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key, body) = (self.tree.clone(), key.to_owned(), body.clone());
        blocking(move || write::put_new(&tree, &key, &body, crc32)).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        body: Bytes,
        expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key, expected) = (self.tree.clone(), key.to_owned(), expected.map(str::to_owned));
        blocking(move || write::compare_and_swap(&tree, &key, &body, expected.as_deref())).await
    }

    async fn get(&self, key: &str, size_max: u64) -> Result<(Bytes, Option<String>), StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || {
            let (bytes, version) = read_whole(&tree, &key, size_max)?;
            Ok((bytes, Some(version)))
        })
        .await
    }

    async fn get_range(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || {
            let (file, size) = open_object(&tree, &key)?;
            let length = length.min(size.saturating_sub(offset));
            read_piece(&tree, &key, &file, offset, length)
        })
        .await
    }

    async fn get_stream(&self, key: &str) -> Result<ObjectStream, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        let (tree, key, file, size) = blocking(move || {
            let (file, size) = open_object(&tree, &key)?;
            Ok((tree, Arc::new(key), Arc::new(file), size))
        })
        .await?;
        let stream = futures_util::stream::try_unfold(0, move |offset: u64| {
            let (tree, key, file) = (tree.clone(), key.clone(), file.clone());
            async move {
                if offset == size {
                    return Ok(None);
                }
                let length = (PIECE as u64).min(size - offset);
                let piece = blocking(move || read_piece(&tree, &key, &file, offset, length)).await?;
                Ok(Some((piece, offset + length)))
            }
        });
        Ok(Box::pin(stream))
    }

    /// In one go on one thread, since the read-back of every segment comes through here.
    async fn sum(&self, key: &str) -> Result<(u64, u32), StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || {
            let (file, size) = open_object(&tree, &key)?;
            let sum = sum_of(&file, size).map_err(|why| StorageError::Unavailable {
                url: tree.url.clone(),
                what: format!("reading {key}: {why}"),
                source: None,
            })?;
            Ok((size, sum))
        })
        .await
    }

    async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || match open_object(&tree, &key) {
            Ok((_, size)) => Ok(Some(ObjectInfo { key, size, crc32: None, version: None })),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
        check_prefix(&self.tree.url, prefix)?;
        let (tree, prefix, start_after) = (self.tree.clone(), prefix.to_owned(), start_after.map(str::to_owned));
        blocking(move || list::list(&tree, &prefix, start_after.as_deref())).await
    }

    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StorageError> {
        check_prefix(&self.tree.url, prefix)?;
        let (tree, prefix) = (self.tree.clone(), prefix.to_owned());
        blocking(move || list::list_folders(&tree, &prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || delete_in(&tree, split(&key).0, std::slice::from_ref(&key))).await
    }

    async fn delete_all(&self, keys: &[String]) -> Result<(), StorageError> {
        keys.iter().try_for_each(|key| check_key(&self.tree.url, key))?;
        let (tree, keys) = (self.tree.clone(), keys.to_vec());
        blocking(move || {
            keys.chunk_by(|a, b| split(a).0 == split(b).0)
                .try_for_each(|keys| delete_in(&tree, split(&keys[0]).0, keys))
        })
        .await
    }

    async fn tidy(&self, prefix: &str) -> Result<(), StorageError> {
        check_prefix(&self.tree.url, prefix)?;
        let (tree, folder) = (self.tree.clone(), prefix.trim_end_matches('/').to_owned());
        blocking(move || tree.tidy(&folder)).await
    }

    async fn begin_multipart(&self, key: &str) -> Result<Box<dyn MultipartUpload>, StorageError> {
        check_key(&self.tree.url, key)?;
        let (tree, key) = (self.tree.clone(), key.to_owned());
        blocking(move || Ok(Box::new(LocalUpload::begin(&tree, &key)?) as Box<dyn MultipartUpload>)).await
    }
}

/// Runs blocking work on tokio's threads for that. A dropped caller does not stop it: it ends by itself, whole or with nothing left.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down and did not start the work.
            Err(error) => Err(StorageError::Unavailable {
                url: String::new(),
                what: "the work during shutdown".to_owned(),
                source: Some(Box::new(error)),
            }),
        },
    }
}

/// Deletes objects of one directory, with one flush for all of them.
fn delete_in(tree: &Tree, folder: &str, keys: &[String]) -> Result<(), StorageError> {
    let Some(directory) = tree.open(folder)? else { return Ok(()) };
    let mut is_changed = false;
    let mut result = Ok(());
    for key in keys {
        match rustix::fs::unlinkat(&directory, split(key).1, AtFlags::empty()) {
            Ok(()) => is_changed = true,
            Err(Errno::NOENT) => {}
            Err(errno) => {
                result = Err(tree.error(errno, "deleting", key));
                break;
            }
        }
    }
    if is_changed {
        flush_directory(&directory).map_err(|errno| tree.error(errno, "flushing the directory", folder))?;
    }
    result?;
    tree.remove_empty(folder);
    Ok(())
}

/// Opens an object for reading, with its size. What is not a regular file is no object.
fn open_object(tree: &Tree, key: &str) -> Result<(File, u64), StorageError> {
    let not_found = || StorageError::NotFound { url: tree.url.clone(), key: key.to_owned() };
    let (folder, name) = split(key);
    let directory = tree.open(folder)?.ok_or_else(not_found)?;
    // Without NONBLOCK a FIFO would hold the thread for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(&directory, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Err(not_found()),
        Err(errno) => return Err(tree.error(errno, "opening", key)),
    };
    let metadata = file.metadata().map_err(|error| io_error(tree, error, "reading", key))?;
    if metadata.is_dir() {
        return Err(not_found());
    }
    if !metadata.is_file() {
        return Err(StorageError::Damaged {
            url: tree.url.clone(),
            key: key.to_owned(),
            why: "it is not a regular file".to_owned(),
        });
    }
    Ok((file, metadata.len()))
}

fn read_whole(tree: &Tree, key: &str, size_max: u64) -> Result<(Bytes, String), StorageError> {
    let (file, size) = open_object(tree, key)?;
    if size > size_max {
        return Err(StorageError::TooLarge { url: tree.url.clone(), key: key.to_owned(), size_max });
    }
    let bytes = read_piece(tree, key, &file, 0, size)?;
    let metadata = file.metadata().map_err(|error| io_error(tree, error, "reading", key))?;
    // An inode number may come back within one tick of the clock; the content's checksum tells the two apart.
    let version = format!(
        "{:x}-{:x}.{:09}-{:x}-{:08x}",
        metadata.ino(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        size,
        crc32c::crc32c(&bytes)
    );
    Ok((bytes, version))
}

/// Exactly `length` bytes; a file that is shorter than it was is an error.
fn read_piece(tree: &Tree, key: &str, file: &File, offset: u64, length: u64) -> Result<Bytes, StorageError> {
    let too_large =
        || StorageError::TooLarge { url: tree.url.clone(), key: key.to_owned(), size_max: usize::MAX as u64 };
    let mut bytes = BytesMut::zeroed(usize::try_from(length).map_err(|_| too_large())?);
    file.read_exact_at(&mut bytes, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => StorageError::Damaged {
            url: tree.url.clone(),
            key: key.to_owned(),
            why: "it became shorter while it was read".to_owned(),
        },
        _ => io_error(tree, error, "reading", key),
    })?;
    Ok(bytes.freeze())
}

fn io_error(tree: &Tree, error: std::io::Error, doing: &str, key: &str) -> StorageError {
    match Errno::from_io_error(&error) {
        Some(errno) => tree.error(errno, doing, key),
        None => StorageError::Unavailable {
            url: tree.url.clone(),
            what: format!("{doing} {key}"),
            source: Some(Box::new(error) as BoxError),
        },
    }
}
