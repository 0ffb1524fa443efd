//! Finds where a recovery must stop: for each kind of target the exact record, from stored WAL alone.
//!
//! Reads the objects' headers, and the bytes of the one or two objects in which the answer lies. Changes nothing.
//!
//! A time target follows PostgreSQL's rule (`recoveryStopsBefore` in `src/backend/access/transam/xlogrecovery.c`): the first
//! commit or abort record in WAL order whose time is later is the first that is left out. Commit times are stamped before
//! the record is inserted and are not ascending, so only `max_time`, the highest so far on the branch, can be searched by halves.

mod error;
mod held;
mod target;
#[cfg(test)]
mod tests;

use std::ops::{ControlFlow, Range};

pub use error::SearchError;
pub use held::{HeldWal, RawWal, WalSource};
pub use target::{Cut, LastRecord, SearchTarget, Stop};

use crate::wal::{
    CommitMark, LONG_HEADER_LEN, Lsn, PAGE_SIZE, ParameterChange, PgTime, RecordInfo, RecordKind, SHORT_HEADER_LEN,
    SegmentSize, SystemIdentifier,
};
use held::{HEADERS_AT_ONCE, Held};

/// A search on one branch over WAL held without a gap.
pub struct Search<'a, S, K> {
    held: Held<'a, S, K>,
    max_time_before: Option<PgTime>,
}

impl<'a, S: WalSource<K>, K: Send + Sync> Search<'a, S, K> {
    /// `items` are the branch's stored objects in WAL order; the parts that count follow each other without a hole.
    /// `max_time_before` is the `max_time` of the object directly before them on the branch, `None` if there is none.
    pub fn new(
        source: &'a S,
        segment_size: SegmentSize,
        system_identifier: SystemIdentifier,
        items: Vec<HeldWal<K>>,
        max_time_before: Option<PgTime>,
    ) -> Result<Self, SearchError<S::Error>> {
        Ok(Self { held: Held::new(source, segment_size, system_identifier, items)?, max_time_before })
    }

    pub async fn find(&mut self, target: &SearchTarget) -> Result<Cut, SearchError<S::Error>> {
        match target {
            SearchTarget::Time { time, exclusive } => self.find_time(*time, *exclusive).await,
            SearchTarget::Lsn { lsn, exclusive } => self.find_lsn(*lsn, *exclusive).await,
            SearchTarget::Xid { xid, exclusive } => self.find_xid(*xid, *exclusive).await,
            SearchTarget::Name(name) => self.find_name(name).await,
            SearchTarget::Latest => self.at_end().await,
        }
    }

    async fn find_time(&mut self, time: PgTime, exclusive: bool) -> Result<Cut, SearchError<S::Error>> {
        let is_left_out = left_out(time, exclusive);
        if let Some(time) = self.max_time_before.filter(|time| is_left_out(*time)) {
            return Err(SearchError::BeforeTime { time, from: self.held.range().start });
        }
        let count = self.held.len();
        let first = self.first_seen(is_left_out).await?;
        let cut = match self.first_left_out(first..count, is_left_out).await? {
            Some((index, lsn)) => self.cut_at(index, lsn, false).await?,
            None => self.at_end().await?,
        };
        if !cut.last_kept.is_some_and(|kept| is_left_out(kept.time)) {
            return Ok(cut);
        }
        // The highest time falls somewhere, which led past the first one. Then all are looked at.
        self.held.load_headers(0..count).await?;
        match self.first_left_out(0..count, is_left_out).await? {
            Some((index, lsn)) => self.cut_at(index, lsn, false).await,
            None => Ok(cut),
        }
    }

    /// The first object up to whose end a commit to leave out was seen, as the headers tell it.
    async fn first_seen(&mut self, is_left_out: impl Fn(PgTime) -> bool) -> Result<usize, SearchError<S::Error>> {
        let (mut low, mut high) = (0, self.held.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.max_time_known(low, middle).await? {
                Some((index, time)) if is_left_out(time) => high = index,
                _ => low = middle + 1,
            }
        }
        Ok(low)
    }

    /// The highest time up to the object `middle`, and the object whose header tells it, down to `low`. One that knows of no time says
    /// nothing: its writer may have begun anew there.
    async fn max_time_known(
        &mut self,
        low: usize,
        middle: usize,
    ) -> Result<Option<(usize, PgTime)>, SearchError<S::Error>> {
        let (mut end, mut count) = (middle + 1, 1);
        while end > low {
            let begin = end.saturating_sub(count).max(low);
            self.held.load_headers(begin..end).await?;
            for index in (begin..end).rev() {
                if let Some(time) = self.held.header(index).await?.summary.max_time {
                    return Ok(Some((index, time)));
                }
            }
            (end, count) = (begin, (count * 2).min(HEADERS_AT_ONCE));
        }
        Ok(None)
    }

    /// The first commit to leave out in the objects of `range`. A header may say "seen" too early (of WAL that was stored beyond a
    /// switch), so what follows it is looked through until a record is found.
    async fn first_left_out(
        &mut self,
        range: Range<usize>,
        is_left_out: impl Fn(PgTime) -> bool + Send + Sync,
    ) -> Result<Option<(usize, Lsn)>, SearchError<S::Error>> {
        for index in range {
            let here = self.held.header(index).await?.summary.max_time_here;
            if !here.is_some_and(&is_left_out) && !self.has_unknown_record(index).await? {
                continue;
            }
            let mut found = None;
            self.held
                .scan(index..index + 1, |record| match commit_of(&record) {
                    Some(mark) if is_left_out(mark.time) => {
                        found = Some(mark.lsn);
                        ControlFlow::Break(())
                    }
                    _ => ControlFlow::Continue(()),
                })
                .await?;
            if let Some(lsn) = found {
                return Ok(Some((index, lsn)));
            }
        }
        Ok(None)
    }

    /// For a time: the right cut, if what lies between `from` and `cut` has a commit to leave out after all. Looks at every header there,
    /// whose own highest times are true also where the highest time so far falls.
    pub async fn earlier_cut(
        &mut self,
        target: &SearchTarget,
        from: Lsn,
        cut: &Cut,
    ) -> Result<Option<Cut>, SearchError<S::Error>> {
        let SearchTarget::Time { time, exclusive } = *target else { return Ok(None) };
        let first = self.held.holding(from).unwrap_or(0);
        let reached = cut.stop.reached_at();
        let end = self.held.holding(Lsn::new(reached.get() - 1)).map_or(self.held.len(), |last| last + 1);
        if first >= end {
            return Ok(None);
        }
        self.held.load_headers(first..end).await?;
        match self.first_left_out(first..end, left_out(time, exclusive)).await? {
            Some((index, lsn)) if lsn < reached => self.cut_at(index, lsn, false).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn find_lsn(&mut self, lsn: Lsn, exclusive: bool) -> Result<Cut, SearchError<S::Error>> {
        let range = self.held.range();
        if lsn < range.start {
            return Err(SearchError::BeforeRange { from: range.start });
        }
        if let Some(first) = self.held.holding(lsn) {
            let mut found = None;
            self.held
                .scan(first..self.held.len(), |record| {
                    if record.lsn < lsn {
                        return ControlFlow::Continue(());
                    }
                    found = Some((record.lsn, record.end));
                    ControlFlow::Break(())
                })
                .await?;
            if let Some((record, end)) = found {
                let index = self.held.holding(Lsn::new(end.get() - 1)).ok_or(SearchError::NothingHeld)?;
                return self.cut_at(index, record, !exclusive).await;
            }
        }
        let end = self.end_of_wal().await?;
        if lsn <= end { self.at_end().await } else { Err(SearchError::BeyondEnd { lsn, end }) }
    }

    async fn find_xid(&mut self, xid: u32, exclusive: bool) -> Result<Cut, SearchError<S::Error>> {
        let count = self.held.len();
        self.held.load_headers(0..count).await?;
        let mut found: Vec<(usize, Lsn)> = Vec::new();
        for index in 0..count {
            let header = self.held.header(index).await?;
            let (low, high) = (header.summary.min_xid.unwrap_or(u32::MAX), header.summary.max_xid.unwrap_or(0));
            if !(low..=high).contains(&xid) && !self.has_unknown_record(index).await? {
                continue;
            }
            self.held
                .scan(index..index + 1, |record| {
                    if commit_of(&record).is_some_and(|mark| mark.xid == xid) {
                        found.push((index, record.lsn));
                    }
                    ControlFlow::Continue(())
                })
                .await?;
        }
        match found[..] {
            [] => Err(SearchError::XidNotFound { xid }),
            [(index, lsn)] => self.cut_at(index, lsn, !exclusive).await,
            _ => Err(SearchError::repeated(format!("transaction {xid}"), &found)),
        }
    }

    async fn find_name(&mut self, name: &str) -> Result<Cut, SearchError<S::Error>> {
        let count = self.held.len();
        self.held.load_headers(0..count).await?;
        let mut found: Vec<(usize, Lsn)> = Vec::new();
        for index in 0..count {
            let summary = &self.held.header(index).await?.summary;
            if summary.truncated {
                self.held
                    .scan(index..index + 1, |record| {
                        if matches!(&record.kind, RecordKind::RestorePoint { name: found, .. } if found == name) {
                            found.push((index, record.lsn));
                        }
                        ControlFlow::Continue(())
                    })
                    .await?;
            } else {
                let points = summary.restore_points.iter().filter(|point| point.name == name).map(|point| point.lsn);
                found.extend(points.filter(|&lsn| self.counts_record(index, lsn)).map(|lsn| (index, lsn)));
            }
        }
        match found[..] {
            [] => Err(SearchError::NameNotFound { name: name.into() }),
            [(index, lsn)] => self.cut_at(index, lsn, true).await,
            _ => Err(SearchError::repeated(format!("restore point \"{name}\""), &found)),
        }
    }

    /// Whether a record ends in the object of which its header does not know: its writer began anew there.
    async fn has_unknown_record(&mut self, index: usize) -> Result<bool, SearchError<S::Error>> {
        let known = self.held.header(index).await?.summary.continues_from.is_some();
        Ok(!known && self.held.open_before(index).await?.is_some())
    }

    /// Whether a record that the object's header lists is in its part of the branch.
    fn counts_record(&self, index: usize, lsn: Lsn) -> bool {
        let counts = self.held.counts(index);
        // No record reaches over a switch. Into an object that counts from its start one may reach from before.
        lsn < counts.end && (self.held.counts_from_its_start(index) || lsn >= counts.start)
    }

    /// The last complete record held.
    pub async fn last_record(&mut self) -> Result<LastRecord, SearchError<S::Error>> {
        for index in (0..self.held.len()).rev() {
            if self.held.counts_to_its_end(index) {
                let summary = &self.held.header(index).await?.summary;
                if let (Some(record), Some(end)) = (summary.last_record, summary.valid_end) {
                    return Ok(LastRecord { record, end });
                }
            } else {
                let mut last = None;
                self.held
                    .scan(index..index + 1, |record| {
                        last = Some(LastRecord { record: record.lsn, end: record.end });
                        ControlFlow::Continue(())
                    })
                    .await?;
                if let Some(last) = last {
                    return Ok(last);
                }
            }
        }
        Err(SearchError::NothingHeld)
    }

    /// The parameter changes whose records start in `[from, until)`, in WAL order.
    pub async fn parameter_changes(
        &mut self,
        from: Lsn,
        until: Lsn,
    ) -> Result<Vec<ParameterChange>, SearchError<S::Error>> {
        let indices: Vec<usize> = (0..self.held.len())
            .filter(|&index| self.held.counts(index).start < until && self.held.counts(index).end > from)
            .collect();
        if let (Some(&first), Some(&last)) = (indices.first(), indices.last()) {
            self.held.load_headers(first..last + 1).await?;
        }
        let mut changes = Vec::new();
        for index in indices {
            let summary = &self.held.header(index).await?.summary;
            if summary.truncated {
                self.held
                    .scan(index..index + 1, |record| {
                        if let RecordKind::ParameterChange(change) = record.kind {
                            changes.push(change);
                        }
                        ControlFlow::Continue(())
                    })
                    .await?;
            } else {
                let listed = summary.parameter_changes.iter().filter(|change| self.counts_record(index, change.lsn));
                changes.extend(listed.copied());
            }
        }
        changes.retain(|change| change.lsn >= from && change.lsn < until);
        Ok(changes)
    }

    /// The objects that hold `[from, to)`, and their stored sizes as their headers tell them.
    pub async fn stored_sizes(&mut self, from: Lsn, to: Lsn) -> Result<Vec<(K, u64)>, SearchError<S::Error>>
    where
        K: Clone,
    {
        let first = self.held.holding(from).unwrap_or(0);
        let end = self.held.holding(to).map_or(self.held.len(), |last| last + 1);
        self.held.load_headers(first..end).await?;
        let mut sizes = Vec::new();
        for index in first..end {
            sizes.push((self.held.key(index).clone(), self.held.header(index).await?.stored_size));
        }
        Ok(sizes)
    }

    /// The cut at the record at `lsn`, which ends in the object `index`: through it if `keep`, else before it.
    async fn cut_at(&mut self, index: usize, lsn: Lsn, keep: bool) -> Result<Cut, SearchError<S::Error>> {
        let (mut end, mut last_kept, mut first_left_out) = (None, None, None);
        self.held
            .scan(index..index + 1, |record| {
                if record.lsn == lsn {
                    end = Some(record.end);
                }
                let Some(mark) = commit_of(&record) else { return ControlFlow::Continue(()) };
                if mark.lsn < lsn || (mark.lsn == lsn && keep) {
                    last_kept = Some(mark);
                    return ControlFlow::Continue(());
                }
                first_left_out = Some(mark);
                ControlFlow::Break(())
            })
            .await?;
        let end = end.ok_or(SearchError::MissingRecord { at: lsn })?;
        if last_kept.is_none() {
            last_kept = self.last_commit_before(index).await?;
        }
        if first_left_out.is_none() {
            first_left_out = self.first_commit_from(index + 1).await?;
        }
        let stop = if keep { Stop::Through { record: lsn, end } } else { Stop::Before(lsn) };
        Ok(Cut { stop, last_kept, first_left_out })
    }

    async fn at_end(&mut self) -> Result<Cut, SearchError<S::Error>> {
        let LastRecord { record, end } = self.last_record().await?;
        let last_kept = self.last_commit_before(self.held.len()).await?;
        Ok(Cut { stop: Stop::Through { record, end }, last_kept, first_left_out: None })
    }

    /// The last commit or abort whose record ends before the object `index`.
    async fn last_commit_before(&mut self, index: usize) -> Result<Option<CommitMark>, SearchError<S::Error>> {
        for index in (0..index).rev() {
            let mut last = None;
            if self.held.counts_to_its_end(index) {
                last = self.held.header(index).await?.summary.last_commit;
            } else {
                self.held
                    .scan(index..index + 1, |record| {
                        last = commit_of(&record).or(last);
                        ControlFlow::Continue(())
                    })
                    .await?;
            }
            if last.is_some() {
                return Ok(last);
            }
        }
        Ok(None)
    }

    /// The first commit or abort whose record ends in the object `index` or behind it.
    async fn first_commit_from(&mut self, index: usize) -> Result<Option<CommitMark>, SearchError<S::Error>> {
        for index in index..self.held.len() {
            let listed = self.held.header(index).await?.summary.first_commit;
            match listed {
                None => continue,
                Some(mark) if self.counts_record(index, mark.lsn) => return Ok(Some(mark)),
                Some(_) => {}
            }
            // The first of the object is not of the branch's part; another one may be.
            let mut first = None;
            self.held
                .scan(index..index + 1, |record| {
                    first = commit_of(&record);
                    if first.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
                .await?;
            if first.is_some() {
                return Ok(first);
            }
        }
        Ok(None)
    }

    /// The highest position of which it can be said that all before it is held: where the next record would start.
    /// These are the positions that a server names as its own (`pg_current_wal_lsn` and its kin) when all is held.
    async fn end_of_wal(&mut self) -> Result<Lsn, SearchError<S::Error>> {
        let last = self.last_record().await?;
        let mut end = Lsn::new(last.end.get().next_multiple_of(8));
        let last_index = self.held.len() - 1;
        let open = match self.held.counts_to_its_end(last_index) {
            true => self.held.header(last_index).await?.summary.open_record,
            false => None,
        };
        if open.is_none() {
            // What is held behind the last record is padding, or the rest of a switched segment.
            end = end.max(self.held.range().end);
        }
        if !end.get().is_multiple_of(PAGE_SIZE as u64) {
            return Ok(end);
        }
        let first_of_segment = self.held.segment_size().is_boundary(end);
        let header_len = if first_of_segment { LONG_HEADER_LEN } else { SHORT_HEADER_LEN };
        Ok(end.checked_add(header_len as u64).unwrap_or(end))
    }
}

fn left_out(time: PgTime, exclusive: bool) -> impl Fn(PgTime) -> bool + Copy + Send + Sync {
    move |commit| if exclusive { commit >= time } else { commit > time }
}

fn commit_of(record: &RecordInfo) -> Option<CommitMark> {
    match &record.kind {
        RecordKind::Commit(end) | RecordKind::Abort(end) => {
            Some(CommitMark { time: end.time, xid: end.xid, lsn: record.lsn })
        }
        _ => None,
    }
}
