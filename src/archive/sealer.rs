//! The live path's disk side: two threads of their own, so that no write and no fsync ever stands between a keepalive and its answer.
//!
//! `writer` appends and marks; `sealer` flushes whole segments, names them, records them in the queue, several in one go when
//! they come fast. Only then does the durable position move (I1, I9).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::Missing;
use super::assembler::Command;
use super::backlog::Backlog;
use super::room::make_room;
use super::tail::Tail;
use crate::disk::is_full;
use crate::failure::NextStep;
use crate::queue::QueueEntry;
use crate::seal::SealedFrames;
use crate::spool::{OpenSegment, Spool, SpoolError, SpooledName};
use crate::telemetry::{Board, CauseCode};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier};

/// Commands that may wait for the disk; with buffers of about 256 KiB this bounds memory.
pub const COMMANDS_MAX: usize = 8;
/// Whole segments that may wait to be flushed.
const SEALS_MAX: usize = 4;
/// How often a full spool is looked at again.
const ROOM_POLL: Duration = Duration::from_millis(250);

/// What the disk side has made durable, or why it cannot go on.
#[derive(Clone, Debug, Default)]
pub struct DiskState {
    /// End of the contiguous durable WAL.
    pub durable: Lsn,
    /// The session must end; its open file is void.
    pub failed: Option<Arc<DiskFailure>>,
    /// Everything that was ordered before the channel closed is done.
    pub finished: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum DiskFailure {
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

impl DiskFailure {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Spool(e) => e.next_step(),
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            Self::Spool(e) => e.hint(),
        }
    }
}

/// Bounds of the spool.
#[derive(Clone, Debug)]
pub struct SpoolBounds {
    pub bytes_max: u64,
    pub free_bytes_min: u64,
}

/// What both threads share.
struct Shared {
    spool: Spool,
    backlog: Arc<Backlog>,
    tail: Arc<Tail>,
    /// A segment that was lost is found again once it is sealed anew.
    missing: Missing,
    board: Board,
    bounds: SpoolBounds,
    /// Whose WAL it is.
    of: (SystemIdentifier, SegmentSize),
    positions: Mutex<Positions>,
    state: watch::Sender<DiskState>,
    /// The open file of the session before and how far it reaches: removed once as much is durable again.
    old_open: Mutex<Option<(PathBuf, Lsn)>>,
    /// The session ends: nothing waits for room any more.
    ending: Arc<AtomicBool>,
    /// Bytes of finished segments that the backlog does not count yet.
    sealing_bytes: AtomicU64,
}

/// Sealed and marked ends; the durable position joins them.
#[derive(Default)]
struct Positions {
    sealed: Lsn,
    marked: Option<(Lsn, Lsn)>,
}

/// The disk side of one session. Dropping the command channel ends it.
pub struct DiskSide {
    pub commands: mpsc::Sender<Command>,
    pub state: watch::Receiver<DiskState>,
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl DiskSide {
    /// `durable` is what is held already.
    #[expect(clippy::too_many_arguments, reason = "each is one part that the threads share")]
    pub fn start(
        spool: Spool,
        backlog: Arc<Backlog>,
        tail: Arc<Tail>,
        missing: Missing,
        board: Board,
        bounds: SpoolBounds,
        of: (SystemIdentifier, SegmentSize),
        durable: Lsn,
        sealed_until: Lsn,
        old_open: Option<(PathBuf, Lsn)>,
    ) -> Self {
        let (commands, from_live) = mpsc::channel(COMMANDS_MAX);
        let (to_sealer, from_writer) = sync_channel(SEALS_MAX);
        let (state, watch) = watch::channel(DiskState { durable, failed: None, finished: false });
        let positions = Mutex::new(Positions { sealed: sealed_until, marked: None });
        let old_open = Mutex::new(old_open);
        let ending = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared {
            spool,
            backlog,
            tail,
            missing,
            board,
            bounds,
            of,
            positions,
            state,
            old_open,
            ending: ending.clone(),
            sealing_bytes: AtomicU64::new(0),
        });
        let writer = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("walden-write".into())
                .spawn(move || shared.write_all(from_live, to_sealer))
        };
        let sealer =
            std::thread::Builder::new().name("walden-seal".into()).spawn(move || shared.seal_all(&from_writer));
        let threads = [writer, sealer].into_iter().map(|t| t.expect("a thread can be started")).collect();
        Self { commands, state: watch, ending, threads }
    }

    /// Ends the threads after all that was ordered and can be done now. Waits for the disk: not for the live path, and what does
    /// not find room any more is not waited for.
    pub fn join(self) {
        self.ending.store(true, Ordering::Relaxed);
        drop(self.commands);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a disk thread panicked");
            }
        }
    }
}

/// A whole segment on its way to its name.
struct Sealing {
    file: OpenSegment,
    name: SpooledName,
    frames: SealedFrames,
    segment: SegmentName,
    end: Lsn,
}

impl Shared {
    fn write_all(&self, mut commands: mpsc::Receiver<Command>, to_sealer: SyncSender<Sealing>) {
        let mut open: Option<(OpenSegment, SegmentName)> = None;
        while let Some(command) = commands.blocking_recv() {
            match self.obey(command, &mut open, &to_sealer) {
                Ok(true) => {}
                Ok(false) => break,
                Err(failure) => {
                    self.fail(failure);
                    break;
                }
            }
        }
        // What is open stays on disk: its last mark says how much of it is durable.
        drop(to_sealer);
    }

    /// False if the session is over.
    fn obey(
        &self,
        command: Command,
        open: &mut Option<(OpenSegment, SegmentName)>,
        to_sealer: &SyncSender<Sealing>,
    ) -> Result<bool, DiskFailure> {
        match command {
            Command::Begin { segment, path } => {
                if !self.wait_for_room() {
                    return Ok(false);
                }
                let disk = self.spool.disk();
                let file = self.when_not_full(|| OpenSegment::create(disk, &path))?;
                self.tail.begin(segment, path);
                *open = Some((file, segment));
            }
            Command::Append(bytes) => {
                let (file, _) = open.as_mut().expect("a segment is begun before it is written");
                self.when_not_full(|| file.append(&bytes))?;
            }
            Command::Offer { stretch } => {
                let (_, segment) = open.as_ref().expect("a segment is begun before it is cut");
                self.tail.push(*segment, *stretch);
            }
            Command::Mark { mark, stretch } => {
                let (file, segment) = open.as_mut().expect("a segment is begun before it is marked");
                // On its way to the repositories while the disk flushes: what they confirm is told only with what is durable here.
                if let Some(stretch) = stretch {
                    self.tail.push(*segment, *stretch);
                }
                if let Err(error) = self.when_not_full(|| file.mark((*mark).clone())) {
                    self.void(&error, [(&*file, *segment)]);
                    return Err(error.into());
                }
                let start = segment.start();
                let end = Lsn::new(start.get() + mark.raw_len);
                self.publish(|positions| positions.marked = Some((start, end)));
            }
            Command::Seal { name, frames, end, last } => {
                let (file, segment) = open.take().expect("a segment is begun before it is sealed");
                if name.relative.starts_with("wal/") {
                    self.tail.close(segment, last.map(|last| *last));
                } else {
                    self.tail.end(segment);
                }
                self.sealing_bytes.fetch_add(frames.stored_size, Ordering::Relaxed);
                return Ok(to_sealer.send(Sealing { file, name, frames, segment, end }).is_ok());
            }
        }
        Ok(true)
    }

    /// Waits while the spool is at its bound; PostgreSQL keeps the WAL. False if the session is over.
    fn wait_for_room(&self) -> bool {
        let mut told = false;
        loop {
            let used = self.backlog.depth().1 + self.sealing_bytes.load(Ordering::Relaxed);
            let free = self.spool.disk().free_bytes(self.spool.folder());
            let (why, wanted) = match free {
                // A quarter at once, so that a gap elsewhere is one and not one for each segment.
                _ if used >= self.bounds.bytes_max => (
                    format!("the spool holds {used} bytes, its bound (spool.bytes_max)"),
                    used - self.bounds.bytes_max + self.bounds.bytes_max / 4,
                ),
                Ok(free) if free < self.bounds.free_bytes_min => (
                    format!("{free} bytes are free on the spool's disk, fewer than spool.free_bytes_min"),
                    self.bounds.free_bytes_min - free,
                ),
                Ok(_) | Err(_) => break,
            };
            match make_room(&self.spool, &self.backlog, self.of.0, self.of.1, wanted.max(1)) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) if !told => {
                    tracing::warn!(error = error.describe(), "the spool is full, and nothing in it could be removed");
                }
                Err(_) => {}
            }
            told = true;
            self.board.raise(CauseCode::SpoolFull, format!("{why}; PostgreSQL keeps the WAL until there is room"));
            if self.ending.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::sleep(ROOM_POLL);
        }
        // Also what a session told that ended while it waited.
        self.board.clear(CauseCode::SpoolFull);
        true
    }

    /// Tries again while the disk is full: what was not written can be written later, nothing is lost.
    fn when_not_full<T>(&self, mut job: impl FnMut() -> Result<T, SpoolError>) -> Result<T, SpoolError> {
        let mut told = false;
        loop {
            let result = job();
            match &result {
                Err(e @ SpoolError::Full { .. }) if !self.ending.load(Ordering::Relaxed) => {
                    told = true;
                    self.board
                        .raise(CauseCode::SpoolFull, format!("{e}; PostgreSQL keeps the WAL until there is room"));
                    std::thread::sleep(ROOM_POLL);
                }
                Err(SpoolError::Sync { source, .. }) if is_full(source) => return result,
                _ => {
                    if told && result.is_ok() {
                        self.board.clear(CauseCode::SpoolFull);
                    }
                    return result;
                }
            }
        }
    }

    /// After a failed flush the kernel may drop the dirty pages and report success next time: what such a file claims beyond its last
    /// durable mark proves nothing, also not to a later start. What the mark proves is written into another file, or stays where it is
    /// with that mark only; the rest is taken again from the server, which keeps the whole segment in which the confirmed position
    /// lies (I1, I9).
    fn void<'a>(&self, error: &SpoolError, files: impl IntoIterator<Item = (&'a OpenSegment, SegmentName)>) {
        if !matches!(error, SpoolError::Sync { .. }) {
            return;
        }
        for (file, segment) in files {
            let salvaged = match file.compression() {
                Some(compression) => file.salvage(&self.spool.open_path(segment, compression)),
                None => Ok(false),
            };
            if let Err(error) = salvaged.and_then(|_| self.spool.remove_open(file.path())) {
                tracing::error!(%segment, "what was durable of it could not be written anew: {error}");
            }
        }
    }

    fn seal_all(&self, sealings: &Receiver<Sealing>) {
        while let Ok(first) = sealings.recv() {
            let mut group = vec![first];
            while group.len() < SEALS_MAX {
                match sealings.recv_timeout(Duration::ZERO) {
                    Ok(next) => group.push(next),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
                }
            }
            if let Err(failure) = self.seal_group(group) {
                self.fail(failure);
                break;
            }
        }
        self.state.send_modify(|state| state.finished = true);
    }

    fn seal_group(&self, mut group: Vec<Sealing>) -> Result<(), DiskFailure> {
        if let Err(error) =
            group.iter_mut().try_for_each(|sealing| self.when_not_full(|| sealing.file.finish(&sealing.frames)))
        {
            self.void(&error, group.iter().map(|sealing| (&sealing.file, sealing.segment)));
            return Err(error.into());
        }
        let mut named: Vec<&Sealing> = Vec::new();
        if let Err(error) = self.name_all(&group, &mut named) {
            // The contents are durable, the names are not: they go back to where the next session finds them.
            for sealing in named {
                self.spool.take_back(&sealing.name, sealing.file.path());
            }
            return Err(error.into());
        }
        let entries: Vec<QueueEntry> = named.into_iter().map(entry_of).collect();
        self.backlog.insert(&entries);
        let sealed_bytes = group.iter().map(|sealing| sealing.frames.stored_size).sum();
        self.sealing_bytes.fetch_sub(sealed_bytes, Ordering::Relaxed);
        for sealing in &group {
            self.missing.remove(sealing.segment);
        }
        let end = group.last().map_or(Lsn::ZERO, |sealing| sealing.end);
        if let Some(last) = group.last() {
            self.backlog.set_sealed_end(last.name.timeline.get(), last.end);
        }
        self.publish(|positions| positions.sealed = positions.sealed.max(end));
        Ok(())
    }

    /// Gives each its name, durably. `named`: those that have one now, also after an error.
    fn name_all<'a>(&self, group: &'a [Sealing], named: &mut Vec<&'a Sealing>) -> Result<(), SpoolError> {
        for sealing in group {
            if self.spool.name_sealed(sealing.file.path(), &sealing.name)? {
                self.tail.renamed(sealing.segment, self.spool.path_of(&sealing.name));
                named.push(sealing);
            } else {
                // An older file of the same WAL stays, and so does its record: it may be compressed otherwise.
                self.tail.end(sealing.segment);
            }
        }
        let mut last: Option<&SpooledName> = None;
        for sealing in group {
            if last.is_none_or(|last| parent(last) != parent(&sealing.name)) {
                self.spool.sync_names(&sealing.name)?;
            }
            last = Some(&sealing.name);
        }
        Ok(())
    }

    /// Moves the durable position: the sealed segments, and the marked part of the one that follows them directly.
    fn publish(&self, change: impl FnOnce(&mut Positions)) {
        let mut positions = self.positions.lock().expect("no one panics while holding it");
        change(&mut positions);
        let durable = match positions.marked {
            Some((start, end)) if start <= positions.sealed => positions.sealed.max(end),
            _ => positions.sealed,
        };
        self.drop_old_open(durable);
        self.state.send_if_modified(|state| {
            // What was held before a reconnect stays held while its segment is built again.
            let moved = durable > state.durable;
            state.durable = state.durable.max(durable);
            moved
        });
    }

    fn drop_old_open(&self, durable: Lsn) {
        let mut old = self.old_open.lock().expect("no one panics while holding it");
        if let Some((path, end)) = &*old
            && durable >= *end
        {
            if let Err(error) = self.spool.remove_open(path) {
                tracing::warn!(%error, "an old open segment stays in the spool");
            }
            *old = None;
        }
    }

    fn fail(&self, failure: DiskFailure) {
        self.state.send_modify(|state| {
            if state.failed.is_none() {
                state.failed = Some(Arc::new(failure));
            }
        });
    }
}

fn parent(name: &SpooledName) -> &str {
    name.relative.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn entry_of(sealing: &Sealing) -> QueueEntry {
    QueueEntry {
        timeline: sealing.name.timeline.get(),
        order: sealing.name.order,
        relative: sealing.name.relative.clone(),
        stored_size: sealing.frames.stored_size,
        crc32: sealing.frames.object_crc32,
        stored_in: Vec::new(),
    }
}

#[cfg(test)]
#[path = "sealer_tests.rs"]
mod tests;
