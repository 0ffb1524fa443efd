//! The queue as the running agent sees it: an in-memory mirror of the durable index, shared by the disk side and the uploaders.
//!
//! The mirror decides. The index saves the next start from reading the spool's contents, so an index that cannot be written stops
//! nothing: it is set aside and made again, at the latest by the next start (I4).

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::disk::Disk;
use crate::queue::{Queue, QueueEntry, QueueError};
use crate::spool::SpooledName;
use crate::wal::{Lsn, TimelineId};

/// How often an index that cannot be opened is tried again.
const INDEX_RETRY: Duration = Duration::from_secs(10);

type Key = (u32, u64, String);

/// Spooled objects that some repository lacks, and the newest segments, which stay for the overlap at a reconnect.
#[derive(Debug)]
pub struct Backlog {
    index: Mutex<Index>,
    /// Names of all repositories.
    repositories: Vec<String>,
    /// Those that WAL must be in.
    required: Vec<String>,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Key, QueueEntry>,
    /// End of the newest sealed segment: what is archived once nothing is pending.
    sealed_end: Option<(u32, Lsn)>,
}

impl State {
    fn first_lacking(&self, repository: &str) -> Option<(u32, Lsn)> {
        // What waits of a timeline beyond the one that is archived now is of another branch.
        let newest = self.sealed_end.map_or(u32::MAX, |(timeline, _)| timeline);
        let mut branch = self.entries.values().take_while(|e| e.timeline <= newest);
        let lacking = branch.find(|e| !holds(e, repository) && !is_history(e));
        lacking.map(|e| (e.timeline, Lsn::new(e.order)))
    }

    /// The newest WAL up to the timeline that is archived now.
    fn newest(&self) -> Option<&QueueEntry> {
        let until = self.sealed_end.map_or(u32::MAX, |(timeline, _)| timeline);
        self.entries.values().filter(|e| e.timeline <= until).rfind(|e| is_wal(e))
    }
}

/// The durable side.
#[derive(Debug)]
pub struct Index {
    pub disk: Disk,
    pub folder: PathBuf,
    /// `None` after it could not be written.
    pub queue: Option<Queue>,
    pub retry_at: Option<Instant>,
}

fn key(entry: &QueueEntry) -> Key {
    (entry.timeline, entry.order, entry.relative.clone())
}

fn gap_end(entry: &QueueEntry) -> Option<Lsn> {
    let timeline = TimelineId::new(entry.timeline).ok()?;
    SpooledName { timeline, order: entry.order, relative: entry.relative.clone() }.gap_end()
}

fn is_history(entry: &QueueEntry) -> bool {
    entry.relative.ends_with(".history")
}

/// A segment, or a timeline's last part.
fn is_wal(entry: &QueueEntry) -> bool {
    !is_history(entry) && !entry.relative.starts_with("gaps/")
}

impl Backlog {
    pub fn new(index: Index, repositories: Vec<String>, required: Vec<String>, entries: Vec<QueueEntry>) -> Self {
        let entries = entries.into_iter().map(|e| (key(&e), e)).collect();
        let state = Mutex::new(State { entries, sealed_end: None });
        Self { index: Mutex::new(index), repositories, required, state, changed: watch::Sender::new(0) }
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn with<T>(&self, job: impl FnOnce(&mut State) -> T) -> T {
        job(&mut self.state.lock().expect("no one panics while holding it"))
    }

    fn tell(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    /// Writes to the index what the mirror has already. Blocking.
    fn record(&self, job: impl FnOnce(&Queue) -> Result<(), QueueError>) {
        let mut index = self.index.lock().expect("no one panics while holding it");
        let error = match &index.queue {
            Some(queue) => match job(queue) {
                Ok(()) => return,
                Err(error) => error,
            },
            None if index.retry_at.is_some_and(|at| Instant::now() < at) => return,
            None => return self.reopen(&mut index),
        };
        tracing::warn!(%error, "the queue's records are not kept; it is made again, and meanwhile the spool's files tell");
        let broken = index.queue.take();
        // It flushes when it is dropped, and panics on some damage.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(broken)));
        self.reopen(&mut index);
    }

    fn reopen(&self, index: &mut Index) {
        let entries: Vec<QueueEntry> = self.with(|state| state.entries.values().cloned().collect());
        let opened = Queue::open(&index.disk, &index.folder).and_then(|(queue, _)| {
            for stale in queue.entries_all()? {
                queue.remove(&stale)?;
            }
            queue.insert(&entries)?;
            Ok(queue)
        });
        match opened {
            Ok(queue) => (index.queue, index.retry_at) = (Some(queue), None),
            Err(error) => {
                tracing::warn!(%error, hint = error.hint(), "the queue cannot be opened: going on without its records");
                index.retry_at = Some(Instant::now() + INDEX_RETRY);
            }
        }
    }

    /// Adds spooled objects. Blocking.
    pub fn insert(&self, entries: &[QueueEntry]) {
        self.with(|state| {
            state.entries.extend(entries.iter().map(|e| (key(e), e.clone())));
        });
        self.record(|queue| queue.insert(entries));
        self.tell();
    }

    /// Objects that `repository` lacks, in order, at most `count` beyond those in `skip`. While it lacks a timeline's history, nothing
    /// of that timeline and those after it is among them (I10).
    pub fn pending(&self, repository: &str, skip: &[String], count: usize) -> Vec<QueueEntry> {
        self.with(|state| {
            let mut history_lacks = false;
            let lacking = state.entries.values().filter(|e| !holds(e, repository)).filter(|entry| {
                history_lacks |= is_history(entry);
                is_history(entry) || !history_lacks
            });
            lacking.filter(|e| !skip.contains(&e.relative)).take(count).cloned().collect()
        })
    }

    /// Whether `repository` lacks a history file of this timeline or one before it.
    pub fn lacks_history(&self, repository: &str, timeline: TimelineId) -> bool {
        self.with(|state| {
            let mut until = state.entries.values().take_while(|e| e.timeline <= timeline.get());
            until.any(|e| is_history(e) && !holds(e, repository))
        })
    }

    /// Where the first segment or gap starts that `repository` lacks, with its timeline. `None`: it has all.
    pub fn first_lacking(&self, repository: &str) -> Option<(u32, Lsn)> {
        self.with(|state| state.first_lacking(repository))
    }

    /// The same, or where the sealed WAL ends if it has all. One look at both: a segment that is sealed in this moment is either lacking
    /// or not yet before the end.
    pub fn whole_until(&self, repository: &str) -> Option<(u32, Lsn)> {
        self.with(|state| state.first_lacking(repository).or(state.sealed_end))
    }

    pub fn set_sealed_end(&self, timeline: u32, end: Lsn) {
        self.with(|state| state.sealed_end = Some((timeline, end)));
        self.tell();
    }

    pub fn sealed_end(&self) -> Option<(u32, Lsn)> {
        self.with(|state| state.sealed_end)
    }

    pub fn entry(&self, relative: &str) -> Option<QueueEntry> {
        self.with(|state| state.entries.values().find(|e| e.relative == relative).cloned())
    }

    /// Notes that a repository holds an object, proven by a read-back. Blocking.
    pub fn confirm(&self, relative: &QueueEntry, repository: &str) {
        let entry = self.with(|state| {
            let entry = state.entries.get_mut(&key(relative))?;
            if !holds(entry, repository) {
                entry.stored_in.push(repository.into());
            }
            Some(entry.clone())
        });
        if let Some(entry) = &entry {
            self.record(|queue| queue.update(entry));
        }
        self.tell();
    }

    /// The repository was seen not to hold WAL in `[from, to)` that it is recorded to hold: what the spool still has of it is shipped again.
    /// True if there is some. Blocking.
    pub fn doubt(&self, repository: &str, timeline: TimelineId, from: Lsn, to: Lsn) -> bool {
        let doubted: Vec<QueueEntry> = self.with(|state| {
            let inside = |e: &&mut QueueEntry| {
                e.timeline == timeline.get() && is_wal(e) && (from.get()..to.get()).contains(&e.order)
            };
            let held = state.entries.values_mut().filter(inside).filter(|e| holds(e, repository));
            held.map(|entry| {
                entry.stored_in.retain(|name| name != repository);
                entry.clone()
            })
            .collect()
        });
        for entry in &doubted {
            self.record(|queue| queue.update(entry));
        }
        if !doubted.is_empty() {
            self.tell();
        }
        !doubted.is_empty()
    }

    fn is_done(&self, entry: &QueueEntry) -> bool {
        self.repositories.iter().all(|r| holds(entry, r))
    }

    /// Whether it waits for its upload still.
    pub fn contains(&self, entry: &QueueEntry) -> bool {
        self.with(|state| state.entries.contains_key(&key(entry)))
    }

    /// The repositories beside those in `held_in`.
    pub fn lacking(&self, held_in: &[String]) -> Vec<&str> {
        self.repositories.iter().filter(|name| !held_in.contains(name)).map(String::as_str).collect()
    }

    /// WAL that every required repository holds and another one does not, oldest first, until it is `bytes`; but the newest.
    pub fn releasable(&self, bytes: u64) -> Vec<QueueEntry> {
        self.with(|state| {
            let newest = state.newest().map(key);
            let is_held = |e: &&QueueEntry| !self.is_done(e) && self.required.iter().all(|r| holds(e, r));
            let may_go = state.entries.values().filter(|e| is_wal(e) && newest.as_ref() != Some(&key(e)));
            let mut sum = 0_u64;
            let enough = |entry: &&QueueEntry| {
                let is_wanted = sum < bytes;
                sum = sum.saturating_add(entry.stored_size);
                is_wanted
            };
            may_go.filter(is_held).take_while(enough).cloned().collect()
        })
    }

    /// Objects that every repository holds and that need not stay: all but the newest WAL up to the timeline that is archived now, be
    /// it a segment or a timeline's last part, and a gap right before it.
    pub fn removable(&self) -> Vec<QueueEntry> {
        self.with(|state| {
            let newest = state.newest();
            let position = newest.map(|e| (e.timeline, e.order));
            let done = state.entries.values().filter(|e| self.is_done(e));
            let stays = |e: &&QueueEntry| match gap_end(e) {
                // It explains the hole before an open segment, until a sealed one stands behind it.
                Some(end) => position.is_none_or(|newest| newest < (e.timeline, end.get())),
                None => newest.map(key) == Some(key(e)),
            };
            done.filter(|e| !stays(e)).cloned().collect()
        })
    }

    /// Whether an object's spool file goes as soon as it is stored: no other repository waits for it, and it is not the newest WAL, which
    /// stays.
    pub fn goes_once_stored(&self, entry: &QueueEntry) -> bool {
        let newest = self.with(|state| state.newest().map(key));
        self.repositories.len() == 1 && newest != Some(key(entry))
    }

    /// Forgets an entry whose spool file is gone. Blocking.
    pub fn forget(&self, entry: &QueueEntry) {
        self.with(|state| state.entries.remove(&key(entry)));
        self.record(|queue| queue.remove(entry));
        self.tell();
    }

    /// Objects that wait for a repository, those aside that are not required and in `passed_over`.
    pub fn waiting(&self, passed_over: &BTreeSet<String>) -> usize {
        let counts = |name: &&String| self.required.contains(name) || !passed_over.contains(*name);
        let awaited: Vec<&String> = self.repositories.iter().filter(counts).collect();
        self.with(|state| state.entries.values().filter(|e| awaited.iter().any(|r| !holds(e, r))).count())
    }

    /// Forgets an entry whose spool file was lost. Its record stays, so that a start before the bytes have come again knows of it.
    pub fn lose(&self, entry: &QueueEntry) {
        self.with(|state| state.entries.remove(&key(entry)));
        self.tell();
    }

    /// Whether a spool file has its entry.
    pub fn knows(&self, name: &SpooledName) -> bool {
        let key = (name.timeline.get(), name.order, name.relative.clone());
        self.with(|state| state.entries.contains_key(&key))
    }

    /// Objects and bytes that some repository lacks.
    pub fn depth(&self) -> (u64, u64) {
        self.with(|state| {
            let lacking = state.entries.values().filter(|e| !self.is_done(e));
            lacking.fold((0, 0), |(count, bytes), e| (count + 1, bytes + e.stored_size))
        })
    }
}

fn holds(entry: &QueueEntry, repository: &str) -> bool {
    entry.stored_in.iter().any(|name| name == repository)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn entry(number: u64, stored_in: &[&str]) -> QueueEntry {
        QueueEntry {
            timeline: 1,
            order: number * MIB,
            relative: format!("wal/00000001/{number:024X}.lz4"),
            stored_size: 1,
            crc32: 0,
            stored_in: stored_in.iter().map(|name| (*name).into()).collect(),
        }
    }

    fn backlog(entries: Vec<QueueEntry>) -> Backlog {
        let retry_at = Some(Instant::now() + Duration::from_secs(3600));
        let index = Index { disk: Disk::default(), folder: PathBuf::new(), queue: None, retry_at };
        Backlog::new(index, vec!["a".into(), "b".into()], vec!["a".into(), "b".into()], entries)
    }

    /// A repository was put back as it was while the agent was stopped: a gap was recorded for WAL that the spool had (I4).
    #[test]
    fn what_a_repository_is_seen_to_lack_is_shipped_again() {
        let all = || vec![entry(3, &["a"]), entry(4, &["a"]), entry(5, &["a"]), entry(6, &[])];
        let backlog = backlog(all());
        backlog.set_sealed_end(1, Lsn::new(7 * MIB));
        assert_eq!(backlog.whole_until("a"), Some((1, Lsn::new(6 * MIB))));
        assert!(
            !backlog.doubt("a", TimelineId::FIRST, Lsn::new(MIB), Lsn::new(3 * MIB)),
            "the spool has nothing of it"
        );
        assert!(!backlog.doubt("b", TimelineId::FIRST, Lsn::new(MIB), Lsn::new(6 * MIB)), "it lacks them all");
        assert!(backlog.doubt("a", TimelineId::FIRST, Lsn::new(4 * MIB), Lsn::new(6 * MIB)));
        assert_eq!(backlog.whole_until("a"), Some((1, Lsn::new(4 * MIB))));
        assert_eq!(backlog.pending("a", &[], 9).len(), 3);
        for entry in &all()[1..] {
            backlog.confirm(entry, "a");
        }
        assert_eq!(backlog.whole_until("a"), Some((1, Lsn::new(7 * MIB))), "all is there, up to where it is sealed");
    }
}
