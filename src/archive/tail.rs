//! The stretches of the open segment, shared between the live path and the tasks that ship them as tail pieces.
//!
//! The segment before stays for a while after it is whole: a repository that has its beginning in pieces gets the rest as a piece too,
//! so that nothing waits for the upload of a whole segment.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use super::assembler::{AssemblerSettings, Stretch, header_of};
use crate::seal::{Encoder, ObjectKind, combine_crc32};
use crate::storage::Body;
use crate::wal::{Lsn, SegmentName, TimelineId};

/// Stretches kept apart at most; beyond that, neighbours are joined, so that memory stays bounded however long a store is away.
const STRETCHES_MAX: usize = 256;
/// Stored bytes of a piece at most, unless a single stretch has more.
const PIECE_BYTES_MAX: u64 = 16 << 20;
/// Tries to read a piece's bytes before its file is taken for damaged.
const UNREADABLE_MAX: u32 = 10;
/// The open segment and those before: a large transaction may fill more than one before the rest of the first is sent.
const SEGMENTS_MAX: usize = 4;

/// A segment that is shipped in pieces.
#[derive(Debug)]
struct Tailed {
    segment: SegmentName,
    path: PathBuf,
    /// From 0 on, each begins where the one before ends.
    stretches: Vec<Stretch>,
    /// It is whole: no stretch follows. Since when.
    closed: Option<Instant>,
}

impl Tailed {
    fn end(&self) -> u64 {
        self.stretches.last().map_or(0, |stretch| stretch.end)
    }
}

#[derive(Debug, Default)]
struct State {
    segments: VecDeque<Tailed>,
    /// Where each repository goes on. A stretch must begin there as long as it can be.
    stands: HashMap<String, (SegmentName, u64)>,
    /// Where the next session must cut, beyond what the repositories tell it.
    wanted: Option<(SegmentName, BTreeSet<u64>)>,
    session: u64,
    /// How often the bytes of a piece could not be read back as they were written, in this session.
    unreadable: HashMap<(SegmentName, u64), u32>,
    /// The agent stops: what there is goes out, whatever the interval says.
    ending: bool,
    /// A base backup waits for the WAL up to here.
    demanded: Option<Lsn>,
    /// Repositories that were asked whether the server has what they hold of the timeline, and whether it does.
    judged: BTreeMap<(String, TimelineId), bool>,
    /// Of those that did not answer, whether they did since. Asking the others again would hold up the next session as well.
    answered_since: BTreeMap<String, bool>,
}

/// For whoever waits for WAL of the open segment to be in the repositories. Clones share it.
#[derive(Clone, Debug)]
pub struct TailDemand(Arc<Tail>);

impl TailDemand {
    pub(super) fn new(tail: Arc<Tail>) -> Self {
        Self(tail)
    }

    /// What comes before `end` is sent as soon as it is here, also where the tail is off.
    pub fn ship_through(&self, end: Lsn) {
        self.0.with(|state| state.demanded = state.demanded.max(Some(end)));
        self.0.tell();
    }
}

/// What a repository can be sent.
#[derive(Debug)]
pub enum Offer {
    /// Nothing new.
    Nothing,
    /// No stretch begins there (or ends where the piece must): the segment has to be cut anew.
    NotACut {
        at: u64,
    },
    Piece(Box<Piece>),
}

/// A piece ready to be put: the bytes lie in the spool's file, between a header and an end mark.
#[derive(Debug)]
pub struct Piece {
    pub segment: SegmentName,
    pub start: u64,
    pub end: u64,
    pub path: PathBuf,
    /// In the file.
    pub file_offset: u64,
    pub body_len: u64,
    /// What comes before and after the file's bytes.
    pub head: Bytes,
    pub foot: Bytes,
    pub size: u64,
    pub crc32: u32,
    /// The session that its stretches are of.
    pub session: u64,
}

impl Piece {
    /// For a piece that is too large to be read into memory.
    pub fn body(&self) -> Body {
        Body::FileRange {
            path: self.path.clone(),
            offset: self.file_offset,
            length: self.body_len,
            prefix: self.head.clone(),
            suffix: self.foot.clone(),
        }
    }
}

/// A segment that is being shipped in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailedSegment {
    pub segment: SegmentName,
    /// Since when it is whole. `None`: it is open.
    pub closed_for: Option<Duration>,
}

#[derive(Debug)]
pub struct Tail {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    /// Changes when a repository cannot go on at any cut that there is, or when what it holds is still to be proven.
    recut: watch::Sender<u64>,
}

impl Tail {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: watch::Sender::new(0), recut: watch::Sender::new(0) })
    }

    /// Wakes when there is something new.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Wakes when the open segment must be cut anew.
    pub fn subscribe_recut(&self) -> watch::Receiver<u64> {
        self.recut.subscribe()
    }

    fn with<T>(&self, job: impl FnOnce(&mut State) -> T) -> T {
        job(&mut self.state.lock().expect("no one panics while holding it"))
    }

    fn tell(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    pub fn begin(&self, segment: SegmentName, path: PathBuf) {
        self.with(|state| {
            state.segments.push_back(Tailed { segment, path, stretches: Vec::new(), closed: None });
            while state.segments.len() > SEGMENTS_MAX {
                state.segments.pop_front();
            }
            if state.wanted.as_ref().is_some_and(|(wanted, _)| *wanted != segment) {
                state.wanted = None;
            }
        });
    }

    /// Adds a stretch of the open segment, whose bytes are in the file.
    pub fn push(&self, segment: SegmentName, stretch: Stretch) {
        self.with(|state| {
            let State { segments, stands, .. } = state;
            if let Some(open) = segments.back_mut().filter(|open| open.segment == segment && open.closed.is_none()) {
                open.stretches.push(stretch);
                if open.stretches.len() > STRETCHES_MAX {
                    let stands = stands.values().filter(|(at, _)| *at == segment).map(|(_, offset)| *offset);
                    join(&mut open.stretches, &stands.collect());
                }
            }
        });
        self.tell();
    }

    /// The segment is whole; `last` is what was not cut before.
    pub fn close(&self, segment: SegmentName, last: Option<Stretch>) {
        self.with(|state| {
            if let Some(open) = state.segments.iter_mut().find(|open| open.segment == segment) {
                open.stretches.extend(last);
                open.closed = Some(Instant::now());
            }
        });
        self.tell();
    }

    /// The whole segment has its name now.
    pub fn renamed(&self, segment: SegmentName, path: PathBuf) {
        self.with(|state| {
            if let Some(open) = state.segments.iter_mut().find(|open| open.segment == segment) {
                open.path = path;
            }
        });
    }

    /// Nothing of it is to ship any more.
    pub fn end(&self, segment: SegmentName) {
        self.with(|state| state.segments.retain(|open| open.segment != segment));
        self.tell();
    }

    /// Another session begins: what it receives is cut anew.
    pub fn clear(&self) {
        self.with(|state| {
            state.segments.clear();
            state.unreadable.clear();
            state.session += 1;
        });
    }

    /// Offsets in the segment at which it is cut, and where a repository asked for it.
    pub fn cuts(&self, segment: SegmentName) -> BTreeSet<u64> {
        self.with(|state| {
            let of = state.segments.iter().find(|open| open.segment == segment);
            let mut cuts: BTreeSet<u64> =
                of.map(|open| open.stretches.iter().map(|stretch| stretch.end).collect()).unwrap_or_default();
            if let Some((_, wanted)) = state.wanted.as_ref().filter(|(wanted, _)| *wanted == segment) {
                cuts.extend(wanted);
            }
            cuts
        })
    }

    /// A repository must go on at `at`, where no stretch begins: the next session cuts there.
    pub fn want_cut(&self, segment: SegmentName, at: u64) {
        let is_new = self.with(|state| {
            if state.wanted.as_ref().is_none_or(|(wanted, _)| *wanted != segment) {
                state.wanted = Some((segment, BTreeSet::new()));
            }
            state.wanted.as_mut().is_some_and(|(_, wanted)| wanted.insert(at))
        });
        if is_new {
            self.recut.send_modify(|n| *n += 1);
        }
    }

    /// Whether what the repository holds of the timeline is the server's own WAL, which may be gone on with, and replaced. `None`: it
    /// was not asked yet, or did not answer.
    pub fn judged(&self, repository: &str, timeline: TimelineId) -> Option<bool> {
        self.with(|state| {
            state
                .judged
                .iter()
                .find(|((name, of), _)| name == repository && *of == timeline)
                .map(|(_, is_ours)| *is_ours)
        })
    }

    pub fn set_judged(&self, repository: &str, timeline: TimelineId, is_ours: bool) {
        self.with(|state| state.judged.insert((repository.into(), timeline), is_ours));
    }

    pub fn is_silent(&self, repository: &str) -> bool {
        self.with(|state| state.answered_since.get(repository) == Some(&false))
    }

    pub fn set_silent(&self, repository: &str) {
        self.with(|state| state.answered_since.insert(repository.into(), false));
    }

    pub fn is_answering(&self, repository: &str) -> bool {
        self.with(|state| state.answered_since.get(repository) == Some(&true))
    }

    /// Another agent may write to it from now on.
    pub fn forget_judged(&self, repository: &str) {
        self.with(|state| state.judged.retain(|(name, _), _| name != repository));
    }

    /// The repository answers, but did not when the session began: the next one begins with the proof.
    pub fn prove_again(&self, repository: &str) {
        self.with(|state| state.answered_since.insert(repository.into(), true));
        self.recut.send_modify(|n| *n += 1);
    }

    /// A repository goes on there: no join may swallow it.
    pub fn stand(&self, repository: &str, segment: SegmentName, at: u64) {
        self.with(|state| state.stands.insert(repository.into(), (segment, at)));
    }

    /// The open segment.
    pub fn segment(&self) -> Option<SegmentName> {
        self.with(|state| state.segments.back().filter(|open| open.closed.is_none()).map(|open| open.segment))
    }

    /// Oldest first.
    pub fn segments(&self) -> Vec<TailedSegment> {
        self.with(|state| {
            let shown = |open: &Tailed| TailedSegment {
                segment: open.segment,
                closed_for: open.closed.map(|since| since.elapsed()),
            };
            state.segments.iter().map(shown).collect()
        })
    }

    /// Bytes of the segment that wait from offset `from` on.
    pub fn bytes_from(&self, segment: SegmentName, from: u64) -> u64 {
        let end = self.with(|state| state.segments.iter().find(|open| open.segment == segment).map_or(0, Tailed::end));
        end.saturating_sub(from)
    }

    /// The agent stops.
    pub fn send_the_rest(&self) {
        self.with(|state| state.ending = true);
        self.tell();
    }

    pub fn is_ending(&self) -> bool {
        self.with(|state| state.ending)
    }

    /// Up to where somebody waits for it.
    pub fn demanded(&self) -> Option<Lsn> {
        self.with(|state| state.demanded)
    }

    /// Whether a piece made of that session's stretches can still be shipped.
    pub fn holds(&self, piece: &Piece) -> bool {
        self.with(|state| {
            state.session == piece.session && state.segments.iter().any(|open| open.segment == piece.segment)
        })
    }

    /// The piece's bytes are not those that were written. Once or twice that is a file that just got its name; true when it is more, and
    /// then the open segment is received again.
    pub fn is_unreadable(&self, piece: &Piece) -> bool {
        let too_often = self.with(|state| {
            let is_open = |open: &Tailed| open.segment == piece.segment && open.closed.is_none();
            if state.session != piece.session || !state.segments.iter().any(is_open) {
                return false;
            }
            let tries = state.unreadable.entry((piece.segment, piece.start)).or_default();
            *tries += 1;
            *tries == UNREADABLE_MAX
        });
        if too_often {
            self.recut.send_modify(|n| *n += 1);
        }
        too_often
    }

    /// What there is of the segment from offset `from` on, up to `until` at most, as one piece.
    pub fn piece(&self, settings: &AssemblerSettings, segment: SegmentName, from: u64, until: Option<u64>) -> Offer {
        let found = self.with(|state| {
            let open = state.segments.iter().find(|open| open.segment == segment)?;
            if open.end() <= from {
                return None;
            }
            let Some(first) = open.stretches.iter().position(|stretch| stretch.start == from) else {
                return Some(Err(from));
            };
            let mut prefix_crc32 = 0;
            for before in &open.stretches[..first] {
                prefix_crc32 = combine_crc32(prefix_crc32, before.raw.crc32, before.raw.length);
            }
            let mut whole = open.stretches[first].clone();
            let fits = |end: u64| until.is_none_or(|until| end <= until);
            if !fits(whole.end) {
                return Some(Err(until.unwrap_or(from)));
            }
            for next in &open.stretches[first + 1..] {
                if !fits(next.end) || whole.body_len + next.body_len > PIECE_BYTES_MAX {
                    break;
                }
                whole.append(next);
            }
            // Up to another piece there must be no hole; if no stretch ends there, one is in the way.
            if let Some(until) = until.filter(|until| open.end() >= *until && whole.end < *until)
                && !open.stretches.iter().any(|stretch| stretch.end == until)
            {
                return Some(Err(until));
            }
            Some(Ok((open.path.clone(), prefix_crc32, whole, state.session)))
        });
        match found {
            None => Offer::Nothing,
            Some(Err(at)) => Offer::NotACut { at },
            Some(Ok((path, prefix_crc32, whole, session))) => {
                Offer::Piece(Box::new(piece_of(settings, segment, path, prefix_crc32, whole, session)))
            }
        }
    }
}

fn piece_of(
    settings: &AssemblerSettings,
    segment: SegmentName,
    path: PathBuf,
    prefix_crc32: u32,
    whole: Stretch,
    session: u64,
) -> Piece {
    let (head, foot) = (Encoder::prefix(settings.compression), Encoder::suffix(settings.compression));
    let body_len = head.len() as u64 + whole.body_len + foot.len() as u64; // a few bytes more
    let with_head = combine_crc32(crc32fast::hash(head), whole.body_crc32, whole.body_len);
    let body_crc32 = combine_crc32(with_head, crc32fast::hash(foot), foot.len() as u64);
    let (file_offset, stored, start, end) = (whole.file_offset, whole.body_len, whole.start, whole.end);
    let header =
        header_of(settings, segment, ObjectKind::Piece, start, whole.raw, whole.summary, body_crc32, prefix_crc32);
    let frames = header.frame(body_len);
    Piece {
        segment,
        start,
        end,
        path,
        file_offset,
        body_len: stored,
        head: [&frames.head[..], head].concat().into(),
        foot: [foot, &frames.tail[..]].concat().into(),
        size: frames.stored_size,
        crc32: frames.object_crc32,
        session,
    }
}

/// Joins neighbours in the older half, but for those between which a repository goes on.
fn join(stretches: &mut Vec<Stretch>, stands: &BTreeSet<u64>) {
    // What every repository has is only needed as a whole.
    let lowest = stands.first().copied().unwrap_or(0);
    let newer = stretches.split_off(STRETCHES_MAX / 2);
    let mut joined: Vec<Stretch> = Vec::with_capacity(STRETCHES_MAX / 2);
    let mut pair_is_full = false;
    for stretch in std::mem::take(stretches) {
        match joined.last_mut() {
            Some(last) if !stands.contains(&last.end) && (stretch.end <= lowest || !pair_is_full) => {
                last.append(&stretch);
                pair_is_full = true;
            }
            _ => {
                joined.push(stretch);
                pair_is_full = false;
            }
        }
    }
    *stretches = joined;
    stretches.extend(newer);
}

#[cfg(test)]
#[path = "tail_tests.rs"]
mod tests;
