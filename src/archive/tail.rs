//! The open segment's durable stretches, shared between the live path and the tasks that ship them as tail pieces.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::watch;

use super::assembler::{AssemblerSettings, Stretch, header_of};
use crate::seal::{Encoder, ObjectKind, combine_crc32};
use crate::storage::Body;
use crate::wal::SegmentName;

/// Stretches kept apart at most; beyond that, neighbours are joined, so that memory stays bounded however long a store is away.
const STRETCHES_MAX: usize = 512;

/// What there is to ship of the open segment.
#[derive(Debug)]
struct OpenTail {
    segment: SegmentName,
    path: PathBuf,
    stretches: Vec<Stretch>,
}

/// A piece ready to be put: the bytes lie in the spool's open file, between a header and an end mark.
#[derive(Debug)]
pub struct Piece {
    pub segment: SegmentName,
    pub start: u64,
    pub end: u64,
    pub body: Body,
    pub size: u64,
    pub crc32: u32,
}

#[derive(Debug)]
pub struct Tail {
    open: Mutex<Option<OpenTail>>,
    changed: watch::Sender<u64>,
}

impl Tail {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { open: Mutex::new(None), changed: watch::Sender::new(0) })
    }

    /// Wakes when there is something new.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn with<T>(&self, job: impl FnOnce(&mut Option<OpenTail>) -> T) -> T {
        job(&mut self.open.lock().expect("no one panics while holding it"))
    }

    pub fn begin(&self, segment: SegmentName, path: PathBuf) {
        self.with(|open| *open = Some(OpenTail { segment, path, stretches: Vec::new() }));
    }

    /// The file is gone or has its final name: nothing of it is to ship any more.
    pub fn end(&self, segment: SegmentName) {
        self.with(|open| {
            if open.as_ref().is_some_and(|open| open.segment == segment) {
                *open = None;
            }
        });
        self.changed.send_modify(|n| *n += 1);
    }

    /// Offsets in the segment at which stretches end, as far as it is the open one.
    pub fn cuts(&self, segment: SegmentName) -> BTreeSet<u64> {
        self.with(|open| {
            let open = open.as_ref().filter(|open| open.segment == segment);
            open.map(|open| open.stretches.iter().map(|stretch| stretch.end).collect()).unwrap_or_default()
        })
    }

    pub fn clear(&self) {
        self.with(|open| *open = None);
    }

    /// Adds a durable stretch.
    pub fn push(&self, segment: SegmentName, stretch: Stretch) {
        self.with(|open| {
            if let Some(open) = open.as_mut().filter(|open| open.segment == segment) {
                open.stretches.push(stretch);
                if open.stretches.len() > STRETCHES_MAX {
                    join_oldest_half(&mut open.stretches);
                }
            }
        });
        self.changed.send_modify(|n| *n += 1);
    }

    pub fn segment(&self) -> Option<SegmentName> {
        self.with(|open| open.as_ref().map(|open| open.segment))
    }

    /// Everything durable of the open segment from offset `from` on, as one piece. `None`: nothing new, or `from` is not where a
    /// stretch begins (then the pieces stored before cannot be continued, and the whole segment is waited for).
    pub fn piece(&self, settings: &AssemblerSettings, segment: SegmentName, from: u64) -> Option<Piece> {
        let (path, prefix_crc32, whole) = self.with(|open| {
            let open = open.as_ref().filter(|open| open.segment == segment)?;
            let first = open.stretches.iter().position(|s| s.start == from)?;
            let mut prefix_crc32 = 0;
            for before in &open.stretches[..first] {
                prefix_crc32 = combine_crc32(prefix_crc32, before.raw.crc32, before.raw.length);
            }
            let mut whole = open.stretches[first].clone();
            open.stretches[first + 1..].iter().for_each(|next| whole.append(next));
            Some((open.path.clone(), prefix_crc32, whole))
        })?;
        let (head, foot) = (Encoder::prefix(settings.compression), Encoder::suffix(settings.compression));
        let body_len = head.len() as u64 + whole.body_len + foot.len() as u64; // a few bytes more
        let with_head = combine_crc32(crc32fast::hash(head), whole.body_crc32, whole.body_len);
        let body_crc32 = combine_crc32(with_head, crc32fast::hash(foot), foot.len() as u64);
        let header =
            header_of(settings, segment, ObjectKind::Piece, from, whole.raw, whole.summary, body_crc32, prefix_crc32);
        let frames = header.frame(body_len);
        let prefix: Bytes = [&frames.head[..], head].concat().into();
        let suffix: Bytes = [foot, &frames.tail[..]].concat().into();
        let body = Body::FileRange { path, offset: whole.file_offset, length: whole.body_len, prefix, suffix };
        let (size, crc32) = (frames.stored_size, frames.object_crc32);
        Some(Piece { segment, start: from, end: whole.end, body, size, crc32 })
    }
}

/// Joins the older half in pairs. A repository whose pieces end inside a joined pair waits for the whole segment.
fn join_oldest_half(stretches: &mut Vec<Stretch>) {
    let newer = stretches.split_off(STRETCHES_MAX / 2);
    let older = std::mem::take(stretches);
    let mut older = older.into_iter();
    while let Some(mut first) = older.next() {
        if let Some(second) = older.next() {
            first.append(&second);
        }
        stretches.push(first);
    }
    stretches.extend(newer);
}
