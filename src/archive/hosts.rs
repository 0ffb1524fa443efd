//! Slots on the other hosts of the list, so that a failover leaves no gap: each is made, and advanced behind what is held.
//!
//! Only the replication protocol is used: a slot's position moves with the status of a short stream. A slot is never moved past what
//! is durable by the policy (I1), nor past what that host itself has, and it stays a segment behind, for the overlap (I7).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::live::LiveSettings;
use crate::postgres::{CreateOutcome, PostgresError, ReplicationConnection, SlotState, Sql, StartOutcome};
use crate::telemetry::{Board, CauseCode};
use crate::wal::{Lsn, PAGE_SIZE, SegmentSize, SystemIdentifier, TimelineId};

/// How often the other hosts are looked at.
const INTERVAL: Duration = Duration::from_secs(10);
/// For one host; one that hangs must not keep the others from being looked at.
const HOST_LIMIT: Duration = Duration::from_secs(30);

/// What the live path streams just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// Which of the settings' hosts.
    pub host: usize,
    pub timeline: TimelineId,
}

/// Keeps the slots of the other hosts. A task of its own: nothing waits for it.
pub struct OtherHosts {
    pub settings: LiveSettings,
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    pub board: Board,
    pub streaming: watch::Receiver<Option<Streaming>>,
    pub shutdown: CancellationToken,
}

/// What was last seen of a host; told when it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    Kept,
    /// The slot holds WAL from here on only, which is behind the end of what is durable.
    From {
        slot: Lsn,
        needed: Lsn,
    },
    /// On another timeline than the stream's: left behind by a promotion, or not there yet.
    Elsewhere(TimelineId),
    Not(String),
}

impl OtherHosts {
    pub async fn run(mut self) {
        let hosts = self.settings.connect.targets();
        if hosts.len() < 2 {
            return;
        }
        let mut standings: BTreeMap<usize, Standing> = BTreeMap::new();
        // Where each slot was put; before 15 only SQL could tell.
        let mut positions: BTreeMap<usize, Lsn> = BTreeMap::new();
        loop {
            let streaming = *self.streaming.borrow_and_update();
            let others = (0..hosts.len()).filter(|host| streaming.is_some_and(|streaming| streaming.host != *host));
            for host in others.collect::<Vec<_>>() {
                let Some(streaming) = streaming else { break };
                let kept = tokio::select! {
                    kept = tokio::time::timeout(HOST_LIMIT, self.keep(host, streaming, &mut positions)) => kept,
                    () = self.shutdown.cancelled() => return,
                };
                let standing = match kept {
                    Ok(Ok(standing)) => standing,
                    Ok(Err(error)) => Standing::Not(format!("{}; {}", error.describe(), error.hint())),
                    Err(_) => Standing::Not(format!("no answer within {} s", HOST_LIMIT.as_secs())),
                };
                tell(&hosts[host], &self.settings.slot, standings.get(&host), &standing);
                standings.insert(host, standing);
            }
            if let Some(streaming) = streaming {
                standings.remove(&streaming.host);
                self.tell_gaps(&hosts, &standings);
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                changed = self.streaming.changed() => if changed.is_err() { return },
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    async fn keep(
        &self,
        host: usize,
        streaming: Streaming,
        positions: &mut BTreeMap<usize, Lsn>,
    ) -> Result<Standing, ArchiveError> {
        let slot = self.settings.slot.as_str();
        let mut connection = ReplicationConnection::connect_to_any(&self.settings.connect, host).await?;
        let info = connection.identify_system().await?;
        if info.system_identifier != self.system {
            return Err(ArchiveError::OtherCluster { found: info.system_identifier, expected: self.system });
        }
        let mut known = positions.get(&host).copied();
        let state = match connection.read_slot(slot).await? {
            SlotState::Unknown => Sql::slot_state(&self.settings.connect.this_host(host), slot).await,
            state => state,
        };
        match state {
            SlotState::Exists { restart_lsn, .. } => known = restart_lsn.or(known),
            SlotState::NotPhysical => return Err(ArchiveError::LogicalSlot { name: slot.into() }),
            SlotState::Missing | SlotState::Unknown if self.settings.create_slot => {
                if connection.create_physical_slot(slot).await? == CreateOutcome::Created {
                    tracing::info!(host = connection.target(), slot, "created the replication slot on another host");
                }
            }
            SlotState::Missing => return Err(ArchiveError::NoSlot { name: slot.into() }),
            SlotState::Unknown => {}
        }
        if info.timeline != streaming.timeline {
            return Ok(Standing::Elsewhere(info.timeline));
        }
        let Some(position) = self.position(info.flush_lsn) else { return Ok(Standing::Kept) };
        if let Some(slot) = known.filter(|known| self.segment_size.start_of(*known) > position) {
            return Ok(Standing::From { slot, needed: position });
        }
        if known.is_none_or(|known| known < position) {
            match advance(connection, slot, position, streaming.timeline).await {
                Ok(()) => positions.insert(host, position),
                // It was invalidated, and keeps nothing any more: a new one keeps what there is.
                Err(error) if error.is_slot_lost() && self.settings.create_slot => {
                    let mut connection = ReplicationConnection::connect_to_any(&self.settings.connect, host).await?;
                    connection.drop_slot(slot).await?;
                    connection.create_physical_slot(slot).await?;
                    tracing::warn!(host = connection.target(), slot, %error, "the slot on another host is made anew");
                    positions.remove(&host)
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(Standing::Kept)
    }

    /// The cause stands while a failover to one of the hosts would leave a gap.
    fn tell_gaps(&self, hosts: &[String], standings: &BTreeMap<usize, Standing>) {
        let why =
            standings.iter().filter_map(|(host, standing)| Some(format!("{}: {}", hosts[*host], standing.gap()?)));
        let why: Vec<String> = why.collect();
        if why.is_empty() {
            return self.board.clear(CauseCode::FailoverGap);
        }
        let message = format!("a failover to another host of postgres.url may leave a gap; {}", why.join("; "));
        self.board.raise(CauseCode::FailoverGap, message);
    }

    /// The start of the segment that must stay: of the one that would be compared at the next connection. In a segment's first page
    /// that is the one before.
    fn position(&self, flush: Lsn) -> Option<Lsn> {
        let durable = if self.settings.durable_in_repository { self.board.archived() } else { self.board.durable() };
        let last = durable?.min(flush).get().checked_sub(PAGE_SIZE as u64)?;
        Some(self.segment_size.start_of(Lsn::new(last))).filter(|position| !position.is_zero())
    }
}

impl Standing {
    fn gap(&self) -> Option<String> {
        match self {
            Self::Kept | Self::Elsewhere(_) => None,
            Self::From { slot, needed } => {
                Some(format!("its slot holds WAL from {slot} on, and {needed} is where the agent would go on"))
            }
            Self::Not(why) => Some(format!("no slot can be kept there: {why}")),
        }
    }
}

/// A short stream whose status moves the slot.
async fn advance(
    connection: ReplicationConnection,
    slot: &str,
    position: Lsn,
    timeline: TimelineId,
) -> Result<(), PostgresError> {
    match connection.start_replication(Some(slot), position, timeline).await? {
        StartOutcome::Streaming(mut stream) => {
            stream.send_status(position, position, false).await?;
            // The server handles messages in their order, so the end of the stream proves that the status was seen. What WAL comes
            // before it is dropped.
            stream.finish().await.map(|_| ())
        }
        StartOutcome::AtEnd { .. } => Ok(()),
    }
}

/// Says a change once. A host without a slot is no fault of today's: the gap is told if there is one.
fn tell(host: &str, slot: &str, before: Option<&Standing>, now: &Standing) {
    if before == Some(now) {
        return;
    }
    match now {
        Standing::Kept => tracing::info!(host, slot, "a slot is kept on this host as well"),
        Standing::Elsewhere(timeline) => {
            tracing::warn!(host, slot, %timeline, "this host is on another timeline: its slot is left where it is");
        }
        // The cause tells it, at warning level.
        Standing::From { .. } | Standing::Not(_) => {}
    }
}
