//! The WAL of one branch as it is stored, and reading its records from any object on.

use std::future::Future;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::SearchError;
use crate::seal::ObjectHeader;
use crate::wal::{Lsn, PAGE_SIZE, RecordInfo, RecordScanner, ScanStart, SegmentSize, SystemIdentifier, TimelineId};

/// Headers that are asked for at once where all are needed.
pub(super) const HEADERS_AT_ONCE: usize = 16;

/// A stored WAL object, and the part of it that counts on the branch.
#[derive(Clone, Debug)]
pub struct HeldWal<K> {
    /// What the source finds it by.
    pub key: K,
    pub timeline: TimelineId,
    /// What it holds.
    pub object: Range<Lsn>,
    /// What of it is this branch's: it may end at the timeline's switch, or begin there.
    pub counts: Range<Lsn>,
}

/// Where the headers and the raw bytes of stored WAL come from.
pub trait WalSource<K>: Sync {
    type Error: std::error::Error + Send + Sync + 'static;
    type Raw: RawWal<Error = Self::Error> + Send;

    /// The object's header, with the lists of its overflow frame.
    fn header(&self, item: &HeldWal<K>) -> impl Future<Output = Result<ObjectHeader, Self::Error>> + Send;

    /// The raw bytes from `from`, which lies in `item.object`, to the object's end.
    fn raw(&self, item: &HeldWal<K>, from: Lsn) -> impl Future<Output = Result<Self::Raw, Self::Error>> + Send;
}

pub trait RawWal {
    type Error;

    /// The next bytes, of any number; `None` at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, Self::Error>> + Send;
}

/// The objects of a branch in WAL order without a hole, and what is known of them so far.
pub(super) struct Held<'a, S, K> {
    source: &'a S,
    segment_size: SegmentSize,
    system_identifier: SystemIdentifier,
    items: Vec<HeldWal<K>>,
    headers: Vec<Option<Arc<ObjectHeader>>>,
}

impl<'a, S: WalSource<K>, K: Send + Sync> Held<'a, S, K> {
    pub fn new(
        source: &'a S,
        segment_size: SegmentSize,
        system_identifier: SystemIdentifier,
        items: Vec<HeldWal<K>>,
    ) -> Result<Self, SearchError<S::Error>> {
        let Some(first) = items.first() else { return Err(SearchError::NothingHeld) };
        // What begins in the middle of a page could be read from the next one on only, and a record before that would not be seen.
        if !first.object.start.get().is_multiple_of(PAGE_SIZE as u64) {
            return Err(SearchError::NotContiguous { at: first.object.start });
        }
        for item in &items {
            let (object, counts) = (&item.object, &item.counts);
            if object.start > counts.start || counts.start >= counts.end || counts.end > object.end {
                return Err(SearchError::NotContiguous { at: counts.start });
            }
        }
        for pair in items.windows(2) {
            if pair[0].counts.end != pair[1].counts.start || pair[0].timeline > pair[1].timeline {
                return Err(SearchError::NotContiguous { at: pair[0].counts.end });
            }
        }
        let headers = items.iter().map(|_| None).collect();
        Ok(Self { source, segment_size, system_identifier, items, headers })
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    pub fn key(&self, index: usize) -> &K {
        &self.items[index].key
    }

    pub fn counts(&self, index: usize) -> &Range<Lsn> {
        &self.items[index].counts
    }

    /// From the first byte held to behind the last one.
    pub fn range(&self) -> Range<Lsn> {
        self.items[0].counts.start..self.items[self.items.len() - 1].counts.end
    }

    /// The object whose part of the branch holds the byte at `position`.
    pub fn holding(&self, position: Lsn) -> Option<usize> {
        let index = self.items.partition_point(|item| item.counts.end <= position);
        (index < self.items.len() && self.items[index].counts.start <= position).then_some(index)
    }

    /// The object counts up to its end, so what its header says of its end and of its highest time is the branch's.
    pub fn counts_to_its_end(&self, index: usize) -> bool {
        self.items[index].counts.end == self.items[index].object.end
    }

    /// The object counts from its beginning.
    pub fn counts_from_its_start(&self, index: usize) -> bool {
        self.items[index].counts.start == self.items[index].object.start
    }

    pub async fn header(&mut self, index: usize) -> Result<Arc<ObjectHeader>, SearchError<S::Error>> {
        if let Some(header) = &self.headers[index] {
            return Ok(header.clone());
        }
        let header = self.source.header(&self.items[index]).await.map_err(SearchError::Source)?;
        self.keep(index, header)
    }

    /// Reads the headers of `range` several at a time.
    pub async fn load_headers(&mut self, range: Range<usize>) -> Result<(), SearchError<S::Error>> {
        let missing: Vec<usize> = range.filter(|&index| self.headers[index].is_none()).collect();
        let (source, items) = (self.source, &self.items);
        let found: Vec<(usize, ObjectHeader)> = stream::iter(missing)
            .map(|index| async move { source.header(&items[index]).await.map(|header| (index, header)) })
            .buffered(HEADERS_AT_ONCE)
            .try_collect()
            .await
            .map_err(SearchError::Source)?;
        for (index, header) in found {
            self.keep(index, header)?;
        }
        Ok(())
    }

    fn keep(&mut self, index: usize, header: ObjectHeader) -> Result<Arc<ObjectHeader>, SearchError<S::Error>> {
        let item = &self.items[index];
        let start = header.segment_name().start();
        let range = start.checked_add(header.start_offset)..start.checked_add(header.end_offset);
        let same = range == (Some(item.object.start)..Some(item.object.end))
            && header.system_identifier == self.system_identifier
            && header.segment_size == self.segment_size
            && header.timeline == item.timeline;
        if !same {
            return Err(SearchError::WrongObject { at: item.object.start });
        }
        let header = Arc::new(header);
        self.headers[index] = Some(header.clone());
        Ok(header)
    }

    /// The record that reaches into the object's part of the branch from before it.
    pub async fn open_before(&mut self, index: usize) -> Result<Option<Lsn>, SearchError<S::Error>> {
        // A timeline begins where a record does, so nothing reaches over a switch.
        if !self.counts_from_its_start(index) {
            return Ok(None);
        }
        if let Some(open) = self.header(index).await?.summary.continues_from {
            return Ok(Some(open));
        }
        // An agent that started anew at this object may not have known of it; the object before does.
        match index.checked_sub(1) {
            Some(before) if self.counts_to_its_end(before) => Ok(self.header(before).await?.summary.open_record),
            _ => Ok(None),
        }
    }

    /// Visits the records that end in the objects `range`, in WAL order, until told to stop.
    pub async fn scan(
        &mut self,
        range: Range<usize>,
        mut visit: impl FnMut(RecordInfo) -> ControlFlow<()> + Send,
    ) -> Result<(), SearchError<S::Error>> {
        let counted_from = self.items[range.start].counts.start;
        let begin = match self.open_before(range.start).await? {
            Some(open) => open.min(counted_from),
            None => counted_from,
        };
        let page = PAGE_SIZE as u64;
        let mut position = Lsn::new(begin.get() - begin.get() % page);
        let mut index = range.start;
        while index > 0 && self.items[index].object.start > position {
            index -= 1;
        }
        if self.items[index].object.start > position {
            // What lies before is not held. The first object begins with a page.
            position = self.items[index].object.start;
        }
        let mut scanner = RecordScanner::new(ScanStart {
            timeline: self.items[index].timeline,
            position,
            segment_size: self.segment_size,
            system_identifier: Some(self.system_identifier),
        });
        let mut stopped = false;
        while index < range.end && !stopped {
            let item = &self.items[index];
            scanner.continue_on(item.timeline);
            let end = item.counts.end;
            index += 1;
            if end <= position {
                continue;
            }
            let mut raw = self.source.raw(item, position).await.map_err(SearchError::Source)?;
            while position < end && !stopped {
                let Some(bytes) = raw.next().await.map_err(SearchError::Source)? else {
                    return Err(SearchError::Short { at: position, expected: end });
                };
                let wanted = usize::try_from(end.bytes_since(position)).unwrap_or(usize::MAX).min(bytes.len());
                scanner.feed(&bytes[..wanted], |record| {
                    if !stopped && record.end > counted_from {
                        stopped = visit(record).is_break();
                    }
                })?;
                position = scanner.position();
            }
        }
        Ok(())
    }
}
