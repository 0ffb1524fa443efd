//! WAL that is held, read again: for what comes before a stream, and for a segment's last part that will never be whole.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::ArchiveError;
use super::assembler::{Assembler, AssemblerSettings, Command};
use super::held::{Held, HeldBytes, HeldPart};
use super::live::Live;
use super::records::examine;
use crate::queue::QueueEntry;
use crate::spool::{OpenSegment, Spool};
use crate::wal::{
    Indexer, IndexerStart, Lsn, PAGE_SIZE, PgTime, SegmentName, SegmentSize, SystemIdentifier, TimelineId,
};

/// The WAL of one system that a spool holds.
pub(super) struct HeldWal<'a> {
    pub spool: &'a Spool,
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    /// The runtime of the repositories' clients.
    pub stores: &'a tokio::runtime::Handle,
}

/// The open part of a segment under its final name. The open file is still there: it goes once the entry is known.
pub(super) struct Closed {
    pub entry: QueueEntry,
    pub open: PathBuf,
}

impl Live {
    pub(super) fn held_wal(&self) -> HeldWal<'_> {
        let Self { spool, system, segment_size, stores, .. } = self;
        HeldWal { spool, system: *system, segment_size: *segment_size, stores }
    }
}

impl HeldWal<'_> {
    /// An indexer that stands at `position`, and has seen the record that reaches over it from its beginning, if that is at hand.
    pub async fn indexer_at(
        &self,
        timeline: TimelineId,
        position: Lsn,
        open_record: Option<Lsn>,
        parts: &[HeldPart],
        branch_max_time: Option<PgTime>,
    ) -> Result<Indexer, ArchiveError> {
        let begin = |position| {
            Indexer::new(IndexerStart {
                timeline,
                position,
                segment_size: self.segment_size,
                system_identifier: Some(self.system),
                branch_max_time,
            })
        };
        let first =
            open_record.and_then(|record| parts.iter().position(|part| part.start() <= record && record < part.end()));
        let (Some(record), Some(first)) = (open_record, first) else { return Ok(begin(position)) };
        let page = Lsn::new(record.get() & !(PAGE_SIZE as u64 - 1)).max(parts[first].start());
        let mut indexer = begin(page);
        let mut at = parts[first].start();
        let parts = parts[first..].to_vec();
        let mut bytes = HeldBytes::read(self.spool.clone(), self.system, parts, at, position, self.stores);
        while at < position
            && let Some(chunk) = bytes.next().await?
        {
            let skip = usize::try_from(page.bytes_since(at)).unwrap_or(usize::MAX).min(chunk.len());
            let end = usize::try_from(position.bytes_since(at)).unwrap_or(usize::MAX).min(chunk.len());
            if skip < end {
                indexer.feed(&chunk[skip..end])?;
            }
            at = Lsn::new(at.get() + chunk.len() as u64); // usize fits
        }
        if indexer.position() == position { Ok(indexer) } else { Ok(begin(position)) }
    }

    /// Keeps what is held of a segment that will never be whole, up to `end`, as one piece from the segment's start. `None`: nothing.
    /// Durable on return.
    pub async fn close(
        &self,
        settings: &AssemblerSettings,
        held: &Held,
        end: Lsn,
    ) -> Result<Option<Closed>, ArchiveError> {
        let Some(HeldPart::Open { start, found, .. }) = held.parts.last().filter(|part| part.end() > part.start())
        else {
            return Ok(None);
        };
        let (start, open) = (*start, found.path.clone());
        let end = end.min(held.end);
        if end <= start {
            return Ok(None);
        }
        let segment = SegmentName::holding(held.timeline, start, self.segment_size);
        let indexer = self.indexer_at(held.timeline, start, held.open_record, &held.parts, held.max_time).await?;
        let mut assembler =
            Assembler::new(settings.clone(), self.spool.clone(), indexer, segment, start, BTreeSet::new())?;
        let parts = vec![held.parts.last().expect("just seen").clone()];
        let mut bytes = HeldBytes::read(self.spool.clone(), self.system, parts, start, end, self.stores);
        while let Some(chunk) = bytes.next().await? {
            let left = usize::try_from(end.bytes_since(assembler.position())).unwrap_or(usize::MAX);
            assembler.feed(&chunk[..chunk.len().min(left)])?;
        }
        assembler.end_timeline()?;
        let mut file: Option<OpenSegment> = None;
        let mut closed = None;
        for command in assembler.take_commands() {
            match command {
                Command::Begin { path, .. } => file = Some(OpenSegment::create(self.spool.disk(), &path)?),
                Command::Append(bytes) => file.as_mut().expect("begun first").append(&bytes)?,
                Command::Offer { .. } | Command::Mark { .. } => {}
                Command::Seal { name, frames, .. } => {
                    let file = file.as_mut().expect("begun first");
                    file.finish(&frames)?;
                    let is_new = self.spool.name_sealed(file.path(), &name)?;
                    if let Err(error) = self.spool.sync_names(&name) {
                        if is_new {
                            self.spool.take_back(&name, file.path());
                        }
                        return Err(error.into());
                    }
                    // An older file of the same WAL that stays may be compressed otherwise.
                    let entry = examine(self.spool, &name, self.system)?;
                    closed = Some(Closed { entry, open: open.clone() });
                }
            }
        }
        Ok(closed)
    }
}
