//! What the spool holds of systems that another one has succeeded (`adopt`): the server was replaced while the agent was away, or while
//! the store was. It was confirmed to the old server, and is nowhere else. It goes to the old system's own folder, is told until it is
//! there, and is removed only once every repository was seen to hold it (I1, I8).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::assembler::AssemblerSettings;
use super::closing::HeldWal;
use super::divergence::stored_parts;
use super::held::{HeldBytes, HeldPart, find_in_spool_on, name_finished};
use super::records::examine;
use super::ship::put_spooled;
use super::{ArchiveError, ArchiverSettings, Target};
use crate::disk::Disk;
use crate::queue::QueueEntry;
use crate::repository::{
    Archive, LEASE_RENEW, LEASE_TTL, Lease, LeaseAttempt, LeaseHolder, LeaseSeeker, RepositoryWriter,
};
use crate::spool::{Spool, parse_relative, read_open};
use crate::storage::Backoff;
use crate::telemetry::{Board, CauseCode};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier};

pub struct Predecessors {
    pub settings: ArchiverSettings,
    /// The one that archives now.
    pub system: SystemIdentifier,
    pub targets: Vec<Target>,
    pub holder: LeaseHolder,
    pub board: Board,
    pub shutdown: CancellationToken,
    /// They must be asked again and again to see that a lease is not renewed any more.
    pub seekers: BTreeMap<(String, SystemIdentifier), LeaseSeeker>,
}

impl Predecessors {
    pub async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        let mut backoff = Backoff::new(self.settings.live.retry_delay_max);
        loop {
            let failed = tokio::select! {
                failed = self.ship_all() => failed,
                () = shutdown.cancelled() => return,
            };
            let Some(message) = failed else { return self.board.clear(CauseCode::Unshipped) };
            self.board.raise(CauseCode::Unshipped, message);
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// What keeps the first of them that could not be shipped.
    async fn ship_all(&mut self) -> Option<String> {
        let known = Spool::known_systems(&self.settings.spool_path, &self.settings.cluster).unwrap_or_default();
        let mut failed = None;
        let successor = self.system;
        for other in known.into_iter().filter(|other| *other != successor) {
            if let Err(error) = self.ship(other).await {
                failed.get_or_insert(format!(
                    "the spool holds WAL of system {other}, which {} has succeeded, and it is not in every repository yet: {}; {}",
                    successor,
                    error.describe(),
                    error.hint()
                ));
            }
        }
        failed
    }

    async fn ship(&mut self, other: SystemIdentifier) -> Result<(), ArchiveError> {
        let spool = Spool::open(Disk::default(), &self.settings.spool_path, &self.settings.cluster, other)?;
        let Some(size) = spool.segment_size()? else {
            spool.remove_empty();
            return Ok(());
        };
        self.close_open_parts(&spool, other, size).await?;
        let entries = entries(&spool, other, size)?;
        if entries.is_empty() {
            return Ok(());
        }
        tracing::info!(system = %other, objects = entries.len(), "shipping what the spool holds of a cluster that was succeeded");
        let mut kept_by = 0;
        for target in self.targets.clone() {
            // One that was never told of the succession would refuse both from then on.
            let succession = target.repository.succession().await?;
            if succession.generation_of(self.system) <= succession.generation_of(other) {
                continue;
            }
            let lease = self.take_lease(&target, other).await?;
            let shipped = self.ship_to(&target, other, &lease, &spool, size, &entries).await;
            // One that is not given back runs out.
            let _ = lease.release().await;
            shipped?;
            kept_by += 1;
        }
        if kept_by == 0 {
            let why = format!("no repository knows that {} has succeeded it", self.system);
            return Err(ArchiveError::Unadopted { why });
        }
        for entry in &entries {
            let path = spool.folder().join(&entry.relative);
            spool.disk().remove(&path).map_err(|source| ArchiveError::Remove { path, source })?;
        }
        tracing::info!(system = %other, objects = entries.len(), "all of it is stored");
        spool.remove_empty();
        Ok(())
    }

    async fn take_lease(&mut self, target: &Target, other: SystemIdentifier) -> Result<Lease, ArchiveError> {
        let seek = || LeaseSeeker::new(target.repository.bind(other), self.holder.clone(), LEASE_TTL);
        let seeker = self.seekers.entry((target.repository.name().into(), other)).or_insert_with(seek);
        match seeker.try_take().await? {
            LeaseAttempt::Taken(lease) => Ok(lease),
            LeaseAttempt::HeldByOther { agent, host, .. } => {
                let why = format!("agent {agent} on {host} holds its lease in repository {}", target.repository.name());
                Err(ArchiveError::Unadopted { why })
            }
        }
    }

    async fn ship_to(
        &self,
        target: &Target,
        other: SystemIdentifier,
        lease: &Lease,
        spool: &Spool,
        size: SegmentSize,
        entries: &[QueueEntry],
    ) -> Result<(), ArchiveError> {
        let writer = RepositoryWriter::new(target.repository.bind(other), lease.clone());
        let mut renewed = Instant::now();
        for entry in entries {
            if renewed.elapsed() > LEASE_RENEW {
                lease.renew().await?;
                renewed = Instant::now();
            }
            if !is_held(writer.archive(), spool, size, entry).await? {
                // The files go only when all of them are stored.
                put_spooled(spool, size, &writer, entry, false, true).await?;
            }
        }
        Ok(())
    }

    /// Nobody goes on with the segments that are open: what is held of them becomes pieces.
    async fn close_open_parts(
        &self,
        spool: &Spool,
        other: SystemIdentifier,
        size: SegmentSize,
    ) -> Result<(), ArchiveError> {
        name_finished(spool, other, size)?;
        let mut timelines = BTreeSet::new();
        for path in spool.contents(size)?.open {
            let found = read_open(spool.disk(), &path)?;
            timelines.extend(
                found.and_then(|found| SegmentName::parse(&found.mark.segment, size).ok()).map(|s| s.timeline()),
            );
        }
        let live = &self.settings.live;
        let settings = AssemblerSettings {
            system: other,
            segment_size: size,
            server_version: None,
            compression: live.compression,
            compression_level: live.compression_level,
        };
        let stores = tokio::runtime::Handle::current();
        for timeline in timelines {
            let Some(held) = find_in_spool_on(spool, other, size, Some(timeline))?.held else { continue };
            let wal = HeldWal { spool, system: other, segment_size: size, stores: &stores };
            if let Some(closed) = wal.close(&settings, &held, held.end).await? {
                spool.remove_open(&closed.open)?;
            }
        }
        Ok(())
    }
}

/// Whether the tail pieces that were shipped before hold a segment's last part already, byte for byte: then it need not be there twice.
async fn is_held(
    archive: &Archive,
    spool: &Spool,
    size: SegmentSize,
    entry: &QueueEntry,
) -> Result<bool, ArchiveError> {
    let Some(name) = parse_relative(&entry.relative, size).filter(|name| name.relative.starts_with("tail/")) else {
        return Ok(false);
    };
    let system = archive.system();
    let start = Lsn::new(name.order);
    let end = Lsn::new(start.get() + spool.read_header(&name, system)?.end_offset);
    let parts = stored_parts(archive, SegmentName::holding(name.timeline, start, size)).await?;
    if parts.last().is_none_or(|part| part.end() < end) {
        return Ok(false);
    }
    let stores = tokio::runtime::Handle::current();
    let mut stored = HeldBytes::read(spool.clone(), system, parts, start, end, &stores);
    let ours = vec![HeldPart::Spooled { start, end, name }];
    let mut ours = HeldBytes::read(spool.clone(), system, ours, start, end, &stores);
    let mut at = start;
    while let Some(chunk) = ours.next().await? {
        let mut done = 0;
        while done < chunk.len() {
            match stored.compare(Lsn::new(at.get() + done as u64), &chunk[done..]).await? {
                Some(equal) => done += equal,
                None => break,
            }
        }
        at = Lsn::new(at.get() + chunk.len() as u64); // usize fits
    }
    Ok(at == end)
}

/// Everything with a final name, histories first within each timeline.
fn entries(spool: &Spool, system: SystemIdentifier, size: SegmentSize) -> Result<Vec<QueueEntry>, ArchiveError> {
    let sealed = spool.contents(size)?.sealed;
    let mut entries: Vec<QueueEntry> =
        sealed.iter().map(|(name, _)| examine(spool, name, system)).collect::<Result<_, _>>()?;
    entries.sort_by(|a, b| (a.timeline, a.order, &a.relative).cmp(&(b.timeline, b.order, &b.relative)));
    Ok(entries)
}
