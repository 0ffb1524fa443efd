use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{QueueEntry, QueueError};
use crate::disk::{Disk, is_full};

const META_ID: &[u8] = b"queue-id";
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// How the store was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenedAs {
    /// With the records of last time.
    Kept,
    /// Empty: the first time, or lost. The spool's files must be read again; `why` is for the log.
    Fresh { why: String },
}

/// The index. Blocking: call it from threads that may wait. Clones share the store.
#[derive(Clone, Debug)]
pub struct Queue {
    entries: sled::Tree,
    db: sled::Db,
    folder: PathBuf,
    db_file: std::sync::Arc<File>,
}

impl Queue {
    /// Opens the store, or sets a damaged one aside and makes a new one.
    pub fn open(disk: &Disk, folder: &Path) -> Result<(Self, OpenedAs), QueueError> {
        // sled panics on some errors of the disk.
        let opened = catch_unwind(AssertUnwindSafe(|| Self::open_or_replace(disk, folder)));
        opened.unwrap_or_else(|panic| Err(QueueError::Open { path: folder.into(), why: panic_text(&*panic) }))
    }

    fn open_or_replace(disk: &Disk, folder: &Path) -> Result<(Self, OpenedAs), QueueError> {
        match disk.check_private(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // What lies there could be anybody's (I18).
            checked => checked.map_err(|error| queue_open(folder, &error))?,
        }
        let marker = marker_path(folder);
        let expected = std::fs::read_to_string(&marker).ok();
        let first = !folder.exists();
        match Self::try_open(folder) {
            Ok(queue) => {
                let found = queue.meta_id();
                match (found, &expected) {
                    (Some(found), Some(expected)) if found == *expected => return Ok((queue, OpenedAs::Kept)),
                    (None, None) => return queue.begin(disk, "it is new").map_err(|e| queue_open(folder, &e)),
                    _ if first => return queue.begin(disk, "it was deleted").map_err(|e| queue_open(folder, &e)),
                    _ => {}
                }
                drop(queue);
                let aside = set_aside(folder)?;
                let why = format!("it had lost its records; set aside as {}", aside.display());
                Self::reopen(disk, folder, &why)
            }
            Err(QueueError::Damaged { why, .. }) => {
                let aside = set_aside(folder)?;
                Self::reopen(disk, folder, &format!("it was damaged ({why}); set aside as {}", aside.display()))
            }
            Err(e) => Err(e),
        }
    }

    fn reopen(disk: &Disk, folder: &Path, why: &str) -> Result<(Self, OpenedAs), QueueError> {
        Self::try_open(folder)?.begin(disk, why).map_err(|e| queue_open(folder, &e))
    }

    fn try_open(folder: &Path) -> Result<Self, QueueError> {
        let damaged = |why: String| QueueError::Damaged { path: folder.into(), why };
        // sled's recovery panics on some damage, and may open well and fail at the first read: read everything once.
        let opened = catch_unwind(AssertUnwindSafe(|| -> Result<Self, QueueError> {
            let config = sled::Config::new()
                .path(folder)
                .mode(sled::Mode::HighThroughput)
                .cache_capacity(4 << 20)
                .flush_every_ms(Some(500));
            let db = open_when_unlocked(&config).map_err(|e| match e {
                // Held by another process, or not ours to open: not damage.
                sled::Error::Io(io) => QueueError::Open { path: folder.into(), why: io.to_string() },
                other => damaged(other.to_string()),
            })?;
            let entries = db.open_tree("entries").map_err(|e| damaged(e.to_string()))?;
            let path = folder.join("db");
            let db_file = File::open(&path).map_err(|e| QueueError::Open { path, why: e.to_string() })?;
            let queue = Self { entries, db, folder: folder.into(), db_file: db_file.into() };
            queue.entries_all()?;
            Ok(queue)
        }));
        opened.unwrap_or_else(|panic| Err(damaged(panic_text(&*panic))))
    }

    /// Gives a new store its id, inside and beside, all durable.
    fn begin(self, disk: &Disk, why: &str) -> std::io::Result<(Self, OpenedAs)> {
        let id = uuid::Uuid::new_v4().to_string();
        self.db.insert(META_ID, id.as_bytes()).map_err(std::io::Error::other)?;
        self.db.flush().map_err(std::io::Error::other)?;
        // sled writes `conf` without a flush; an empty one makes it start empty without an error.
        for name in ["db", "conf"] {
            File::open(self.folder.join(name))?.sync_all()?;
        }
        disk.sync_folder(&self.folder)?;
        let parent = self.folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        disk.sync_folder(parent)?;
        disk.replace(&marker_path(&self.folder), id.as_bytes())?;
        Ok((self, OpenedAs::Fresh { why: why.into() }))
    }

    fn meta_id(&self) -> Option<String> {
        self.db.get(META_ID).ok().flatten().and_then(|id| String::from_utf8(id.to_vec()).ok())
    }

    /// All entries in upload order.
    pub fn entries_all(&self) -> Result<Vec<QueueEntry>, QueueError> {
        self.guarded(|| {
            let mut entries = Vec::new();
            for record in self.entries.iter() {
                let (_, value) = record.map_err(|e| self.damaged(&e.to_string()))?;
                entries.push(serde_json::from_slice(&value).map_err(|e| self.damaged(&e.to_string()))?);
            }
            Ok(entries)
        })
    }

    /// Adds or replaces entries; durable on return.
    pub fn insert(&self, entries: &[QueueEntry]) -> Result<(), QueueError> {
        self.guarded(|| {
            let mut batch = sled::Batch::default();
            for entry in entries {
                batch.insert(entry.key(), serde_json::to_vec(entry).expect("plain data serialises"));
            }
            self.entries.apply_batch(batch).map_err(|e| self.failed(e))?;
            self.commit()
        })
    }

    /// Notes what a repository now holds. Not flushed: if it is lost, the upload is tried again and finds the same bytes there.
    pub fn update(&self, entry: &QueueEntry) -> Result<(), QueueError> {
        self.guarded(|| {
            let value = serde_json::to_vec(entry).expect("plain data serialises");
            self.entries.insert(entry.key(), value).map(|_| ()).map_err(|e| self.failed(e))
        })
    }

    /// Forgets an entry. Not flushed, for the same reason.
    pub fn remove(&self, entry: &QueueEntry) -> Result<(), QueueError> {
        self.guarded(|| self.entries.remove(entry.key()).map(|_| ()).map_err(|e| self.failed(e)))
    }

    fn commit(&self) -> Result<(), QueueError> {
        self.db.flush().map_err(|e| self.failed(e))?;
        // sled's flush hands the pages to the kernel's write-back only; this makes them durable.
        self.db_file.sync_data().map_err(|e| self.failed(sled::Error::Io(e)))
    }

    fn guarded<T>(&self, job: impl FnOnce() -> Result<T, QueueError>) -> Result<T, QueueError> {
        catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|panic| Err(self.damaged(&panic_text(&*panic))))
    }

    fn damaged(&self, why: &str) -> QueueError {
        QueueError::Damaged { path: self.folder.clone(), why: why.into() }
    }

    fn failed(&self, error: sled::Error) -> QueueError {
        match error {
            sled::Error::Io(source) if is_full(&source) => QueueError::Full { path: self.folder.clone(), source },
            sled::Error::Corruption { .. } | sled::Error::CollectionNotFound(_) => self.damaged(&error.to_string()),
            other => QueueError::Write { path: self.folder.clone(), why: other.to_string() },
        }
    }
}

/// A store that was just dropped keeps its lock until sled's own threads let go of it.
fn open_when_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match config.open() {
            // The error's kind is lost on the way (`Config::try_lock` in sled).
            Err(sled::Error::Io(io))
                if io.to_string().contains("could not acquire lock") && Instant::now() < deadline =>
            {
                std::thread::sleep(LOCK_POLL);
            }
            other => return other,
        }
    }
}

fn queue_open(folder: &Path, error: &std::io::Error) -> QueueError {
    QueueError::Open { path: folder.into(), why: error.to_string() }
}

/// Stands beside the store, so that deleting or losing the store shows.
fn marker_path(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().map(|n| n.to_os_string()).unwrap_or_default();
    name.push(".id");
    folder.with_file_name(name)
}

fn set_aside(folder: &Path) -> Result<PathBuf, QueueError> {
    let mut name = folder.file_name().map(|n| n.to_os_string()).unwrap_or_default();
    name.push(format!(".lost-{}", jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.6fZ")));
    let aside = folder.with_file_name(name);
    std::fs::rename(folder, &aside).map_err(|e| queue_open(folder, &e))?;
    Ok(aside)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(order: u64) -> QueueEntry {
        let relative = format!("wal/00000001/{order:024X}.lz4");
        QueueEntry { timeline: 1, order, relative, stored_size: 10, crc32: 7, stored_in: Vec::new() }
    }

    fn open(folder: &Path) -> (Queue, OpenedAs) {
        Queue::open(&Disk::default(), folder).unwrap()
    }

    #[test]
    fn entries_come_back_in_the_order_of_the_wal() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let (queue, as_) = open(&folder);
        assert!(matches!(as_, OpenedAs::Fresh { .. }));
        queue.insert(&[entry(1 << 40), entry(256), entry(3)]).unwrap();
        queue.remove(&entry(256)).unwrap();
        drop(queue);
        let (queue, as_) = open(&folder);
        assert_eq!(as_, OpenedAs::Kept);
        assert_eq!(queue.entries_all().unwrap(), [entry(3), entry(1 << 40)]);
    }

    /// A deleted, a silently emptied and a damaged store are each noticed (I4).
    #[test]
    fn a_lost_store_is_noticed_and_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let lose: [&dyn Fn(); 4] = [
            &|| std::fs::remove_dir_all(&folder).unwrap(),
            &|| {
                std::fs::remove_dir_all(&folder).unwrap();
                drop(sled::open(&folder).unwrap()); // opened empty, without an error
            },
            &|| {
                let path = folder.join("db");
                let length = std::fs::metadata(&path).unwrap().len();
                std::fs::write(&path, vec![0xA5; usize::try_from(length).unwrap()]).unwrap();
            },
            &|| std::fs::write(folder.join("conf"), b"").unwrap(),
        ];
        for lose in lose {
            let (queue, _) = open(&folder);
            queue.insert(&[entry(1), entry(2)]).unwrap();
            drop(queue);
            lose();
            let (queue, as_) = open(&folder);
            let records = queue.entries_all().unwrap();
            let whole = records.contains(&entry(1)) && records.contains(&entry(2));
            assert!(if as_ == OpenedAs::Kept { whole } else { records.is_empty() }, "{as_:?} with {records:?}");
            queue.insert(&[entry(3)]).unwrap();
        }
    }
}
