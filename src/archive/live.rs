//! Connects, finds where to go on, streams, and begins again: the supervisor of the live loop, on the live path's own thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::assembler::{Assembler, AssemblerSettings};
use super::backlog::Backlog;
use super::confirmed::ConfirmedWatch;
use super::guard::{OnDelay, SyncGuard};
use super::held::{
    Held, HeldBytes, HeldPart, HeldRemotely, InSpool, Reach, find_in_spool, find_remotely, name_finished,
};
use super::hosts::Streaming;
use super::receiver::{Receiver, SessionEnd};
use super::records::unrecorded;
use super::sealer::{DiskSide, SpoolBounds};
use super::slot::KEPT_NOTHING;
use super::start::Start;
use super::tail::Tail;
use super::turn::Turn;
use super::{ArchiveError, Halt, Missing};
use crate::failure::NextStep;
use crate::postgres::{
    ConnectSettings, CreateOutcome, PostgresError, ReplicationConnection, SlotState, StartOutcome, WalStream,
    names_standby, shown_duration,
};
use crate::queue::QueueEntry;
use crate::repository::{Archive, PieceChain};
use crate::seal::Compression;
use crate::spool::{Spool, SpoolError};
use crate::storage::Backoff;
use crate::telemetry::{Board, CauseCode};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Bytes behind the server from which on only whole segments are made durable.
const CATCHING_UP_BYTES: u64 = 16 << 20;
/// A session that lasted this long was a working one: the next failure begins its waiting anew.
const WORKING_SESSION: Duration = Duration::from_secs(30);
const SHORTEST_STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// What the live path is told by the configuration.
#[derive(Clone)]
pub struct LiveSettings {
    pub connect: ConnectSettings,
    pub slot: String,
    pub create_slot: bool,
    pub status_interval: Duration,
    pub compression: Compression,
    pub compression_level: i32,
    /// Confirm to the server only what the required repositories hold.
    pub durable_in_repository: bool,
    /// What becomes of commits that wait for them too long.
    pub on_delay: OnDelay,
    pub max_delay: Duration,
    /// How long a stopping agent may still ship.
    pub stop_timeout: Duration,
    /// How often the open segment's new bytes are made shippable once the agent has caught up.
    pub cut_interval: Duration,
    /// Sooner, when so many bytes are new.
    pub cut_bytes: Option<u64>,
    pub bounds: SpoolBounds,
    pub retry_delay_max: Duration,
}

impl LiveSettings {
    pub fn catching_up_bytes(&self, size: SegmentSize) -> u64 {
        size.get().min(CATCHING_UP_BYTES)
    }
}

/// The live path of one cluster.
pub struct Live {
    pub settings: LiveSettings,
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    pub spool: Spool,
    /// Each with whether it is required.
    pub archives: Vec<(Archive, bool)>,
    /// The runtime of the stores' clients.
    pub stores: tokio::runtime::Handle,
    pub backlog: Arc<Backlog>,
    pub tail: Arc<Tail>,
    pub board: Board,
    pub wal: watch::Sender<Option<AssemblerSettings>>,
    pub confirmed: ConfirmedWatch,
    pub turn: Turn,
    pub halt: Halt,
    pub shutdown: CancellationToken,
    /// What a repository holds beyond the spool, when that was found out.
    pub held_remotely: Option<Held>,
    /// History files that this process has spooled, as the server sent them.
    pub histories_spooled: BTreeMap<TimelineId, Vec<u8>>,
    pub missing: Missing,
    pub way: Way,
    /// Which of the settings' hosts was reached last.
    pub host: usize,
    /// That host is behind what is held: another one is tried first.
    pub avoid: Option<usize>,
    pub streaming: watch::Sender<Option<Streaming>>,
    /// Where the timeline that is streamed begins; zero if that is not known.
    pub timeline_begin: Lsn,
    /// Where the slot stood at the last connection; zero if that is not known.
    pub slot_at: Lsn,
    pub guard: SyncGuard,
}

/// What ends a session so that the next one begins otherwise.
struct Signals {
    missing: watch::Receiver<BTreeSet<SegmentName>>,
    recut: watch::Receiver<u64>,
}

/// How the next session begins, by what the one before met.
#[derive(Clone, Debug)]
pub enum Way {
    /// With WAL that is held already, for the comparison (I7).
    Overlapping,
    /// The server no longer has the overlap.
    WithoutOverlap,
    /// The server no longer has what follows either.
    BehindGap { why: String, slot_lost: bool },
}

impl Live {
    /// Runs until the shutdown or until archiving is stopped. Owns its thread: `runtime` is a current-thread one.
    pub async fn run(self) {
        let (board, halt) = (self.board.clone(), self.halt.clone());
        self.stream_on().await;
        // Whoever found the reason, nothing streams any more; what it was is told under its own cause.
        if let Some(reason) = halt.reason()
            && !board.is_raised(CauseCode::NotConnected)
        {
            let is_told = matches!(*reason, ArchiveError::Refused { .. });
            let why = if is_told { reason.describe() } else { format!("archiving is stopped: {}", reason.describe()) };
            board.set_disconnected(format!("{why}; {}", reason.hint()));
        }
    }

    async fn stream_on(mut self) {
        let mut backoff = Backoff::new(self.settings.retry_delay_max);
        loop {
            if self.shutdown.is_cancelled() || self.halt.reason().is_some() {
                return;
            }
            tokio::select! {
                () = self.turn.comes() => {}
                () = self.shutdown.cancelled() => return,
                () = self.halt.halted() => return,
            }
            let began = std::time::Instant::now();
            let behind_gap = matches!(self.way, Way::BehindGap { .. });
            let ended = self.session().await;
            let error = match ended {
                Ok(SessionEnd::Shutdown) => return,
                Ok(SessionEnd::EndOfTimeline) => {
                    backoff.reset();
                    continue;
                }
                Err(ArchiveError::Stopping) => return,
                Err(error @ ArchiveError::NotOurTurn) => {
                    self.tell(&error);
                    continue;
                }
                // The next session begins further on at once; only WAL that goes as fast as it is looked for is waited out.
                Err(ArchiveError::WalGone { .. }) if !behind_gap => continue,
                Err(error @ ArchiveError::CutAgain) => {
                    tracing::debug!("{}", error.describe());
                    continue;
                }
                Err(ArchiveError::Diverged { at }) => ArchiveError::Diverged { at: self.first_difference(at).await },
                Err(error) => self.set_aside(error),
            };
            if matches!(error, ArchiveError::Behind { .. } | ArchiveError::OlderTimeline { .. }) {
                self.avoid = Some(self.host);
            }
            self.tell(&error);
            if error.next_step() == NextStep::Stop {
                self.halt.stop(error);
                return;
            }
            if began.elapsed() > WORKING_SESSION {
                backoff.reset();
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    /// Shows a failure under its cause.
    fn tell(&self, error: &ArchiveError) {
        let message = format!("{}; {}", error.describe(), error.hint());
        match error {
            ArchiveError::Diverged { at } | ArchiveError::OtherHistory { at, .. } => {
                self.board.set_diverged(Some(*at));
                self.board.raise(CauseCode::Diverged, message.clone());
            }
            ArchiveError::OtherBranch { .. } => self.board.raise(CauseCode::Diverged, message.clone()),
            ArchiveError::OtherCluster { .. } => self.board.raise(CauseCode::OtherCluster, message.clone()),
            // Before PostgreSQL 15 only the start of the stream tells it.
            ArchiveError::NoSlot { .. }
            | ArchiveError::LogicalSlot { .. }
            | ArchiveError::Postgres(PostgresError::SlotMissing { .. } | PostgresError::SlotNotPhysical { .. }) => {
                self.board.raise(CauseCode::SlotMissing, message.clone());
            }
            ArchiveError::SlotUseless { .. } => self.board.raise(CauseCode::SlotLost, message.clone()),
            ArchiveError::Disk(_) | ArchiveError::Spool(_) | ArchiveError::Queue(_) | ArchiveError::FetchAgain => {
                self.board.raise(CauseCode::SpoolFailing, message.clone());
            }
            _ => {}
        }
        self.board.set_disconnected(message);
    }

    /// The first host that is what is asked for, but one that was just found behind what is held only if there is no other.
    async fn connect(&mut self) -> Result<ReplicationConnection, ArchiveError> {
        let connect = self.settings.connect.clone();
        if let Some(avoid) = self.avoid.take() {
            for host in (0..connect.targets().len()).filter(|host| *host != avoid) {
                if let Ok(connection) = ReplicationConnection::connect(&connect.only_host(host)).await {
                    self.host = host;
                    return Ok(connection);
                }
            }
        }
        let connection = ReplicationConnection::connect(&connect).await?;
        self.host = connection.host_index();
        Ok(connection)
    }

    async fn session(&mut self) -> Result<SessionEnd, ArchiveError> {
        let shutdown = self.shutdown.clone();
        // What they tell of is read while the session is set up: what comes meanwhile ends it as well.
        let signals = Signals { missing: self.missing.subscribe(), recut: self.tail.subscribe_recut() };
        // A server that hangs must not hold up the end.
        let (connection, start, settings, status_interval) = tokio::select! {
            prepared = self.prepare() => prepared?,
            () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
        };
        self.stream(connection, start, settings, status_interval, signals).await
    }

    /// Everything that comes before the stream.
    async fn prepare(&mut self) -> Result<(ReplicationConnection, Start, AssemblerSettings, Duration), ArchiveError> {
        let mut connection = self.connect().await?;
        let info = connection.identify_system().await?;
        if info.system_identifier != self.system {
            return Err(ArchiveError::OtherCluster { found: info.system_identifier, expected: self.system });
        }
        let size = connection.segment_size().await?;
        if size != self.segment_size {
            let why = format!(
                "the server's WAL segments have {} bytes, what is held has {}",
                size.get(),
                self.segment_size.get()
            );
            return Err(ArchiveError::Refused { why });
        }
        let status_interval = self.status_interval(&connection.show("wal_sender_timeout").await?);
        let assembler_settings = AssemblerSettings {
            system: self.system,
            segment_size: size,
            server_version: Some(connection.server_version()),
            compression: self.settings.compression,
            compression_level: self.settings.compression_level,
        };
        let names = connection.show("synchronous_standby_names").await?;
        // Until SQL tells the standby's state: a commit may wait already.
        self.board.set_waited_for(names_standby(&names, self.settings.connect.application_name()));
        let (slot, is_anew) = self.reserve(&mut connection).await?;
        self.wal.send_replace(Some(assembler_settings.clone()));
        let held = self.held().await?;
        if let Some(held) = &held {
            self.settle_left(held.timeline).await?;
            if is_anew {
                self.board.raise(CauseCode::SlotLost, self.made_anew(KEPT_NOTHING));
            }
        }
        let start = match held {
            None => self.first_start(&mut connection, &info, slot).await?,
            Some(held) => self.next_start(&mut connection, &info, held, &assembler_settings).await?,
        };
        let start = self.by_way(&mut connection, start, &assembler_settings).await?;
        let history = self.history(&mut connection, info.timeline).await?;
        let range = history.and_then(|history| history.range_of(start.timeline));
        self.timeline_begin = range.map_or(Lsn::ZERO, |(begin, _)| begin);
        self.prove_stored(&info, &start, range.and_then(|(_, switch)| switch)).await?;
        self.store_histories(&mut connection, start.timeline, info.timeline).await?;
        Ok((connection, start, assembler_settings, status_interval))
    }

    /// The contiguous WAL that is held. A spool that is empty (a new host) or older than the repositories (another agent archived
    /// meanwhile) takes up where they end.
    async fn held(&mut self) -> Result<Option<Held>, ArchiveError> {
        let spooled = self.held_now_tidied()?;
        if spooled.is_none() {
            self.held_remotely = self.ask_repositories(Reach::Least, None).await?.map(|remote| remote.held);
        }
        let end = |held: &Held| (held.timeline, held.end);
        Ok(match (spooled, &self.held_remotely) {
            (Some(spooled), Some(remote)) if end(remote) > end(&spooled) => Some(remote.clone()),
            (Some(spooled), _) => Some(spooled),
            (None, remote) => remote.clone(),
        })
    }

    /// What the spool holds, after finished segments have their names and useless files are gone.
    fn held_now_tidied(&mut self) -> Result<Option<Held>, ArchiveError> {
        let finished = name_finished(&self.spool, self.system, self.segment_size)?;
        if !finished.is_empty() {
            self.backlog.insert(&finished);
        }
        let unrecorded = unrecorded(&self.spool, &self.backlog, self.system, self.segment_size)?;
        if !unrecorded.is_empty() {
            self.backlog.insert(&unrecorded);
        }
        let InSpool { held, useless } = find_in_spool(&self.spool, self.system, self.segment_size)?;
        useless.iter().try_for_each(|path| self.spool.remove_open(path))?;
        Ok(held)
    }

    /// What the spool holds, without a change to it.
    pub(super) fn held_now(&self) -> Result<Option<Held>, ArchiveError> {
        Ok(find_in_spool(&self.spool, self.system, self.segment_size)?.held)
    }

    /// The settings for another connection to the server that this one has reached.
    pub(super) fn connected_host(&self) -> ConnectSettings {
        self.settings.connect.only_host(self.host)
    }

    /// What the repositories hold, asked on the runtime of their clients.
    pub(super) async fn ask_repositories(
        &self,
        reach: Reach,
        only: Option<Vec<TimelineId>>,
    ) -> Result<Option<HeldRemotely>, ArchiveError> {
        let (archives, size) = (self.archives.clone(), self.segment_size);
        let asked = self.stores.spawn(async move { find_remotely(&archives, size, reach, only.as_deref()).await });
        let found = tokio::select! {
            asked = asked => asked.map_err(|panic| ArchiveError::Internal { why: panic.to_string() })?,
            () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
        };
        if let Err(error) = &found {
            self.board.raise(CauseCode::StoreFailing, format!("{}; {}", error.describe(), error.hint()));
        }
        found
    }

    /// A damaged spool file goes into quarantine, and its segment is asked for again.
    fn set_aside(&self, error: ArchiveError) -> ArchiveError {
        let ArchiveError::Spool(SpoolError::Damaged { path, .. }) = &error else { return error };
        let Ok(relative) = path.strip_prefix(self.spool.folder()) else { return error };
        let entry = self.backlog.entry(&relative.to_string_lossy());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let segment = name.get(..24).and_then(|name| SegmentName::parse(name, self.segment_size).ok());
        let aside = self.spool.quarantine(path).map_err(ArchiveError::from);
        match aside {
            Ok(_) => {
                entry.iter().for_each(|entry| self.backlog.forget(entry));
                self.missing.extend(segment);
                error
            }
            Err(other) => other,
        }
    }

    /// A third of `wal_sender_timeout` at most, so that the server never has to ask.
    fn status_interval(&self, wal_sender_timeout: &str) -> Duration {
        let configured = self.settings.status_interval;
        match shown_duration(wal_sender_timeout) {
            Some(timeout) if !timeout.is_zero() => configured.min(timeout / 3).max(SHORTEST_STATUS_INTERVAL),
            _ => configured,
        }
    }

    /// Made if it is not there. `None`: where it stands is not known, or it reserves nothing.
    pub(super) async fn ensure_slot(
        &self,
        connection: &mut ReplicationConnection,
    ) -> Result<Option<Lsn>, ArchiveError> {
        let name = &self.settings.slot;
        match connection.read_slot(name).await? {
            SlotState::Exists { restart_lsn, .. } => Ok(restart_lsn),
            SlotState::NotPhysical => Err(ArchiveError::LogicalSlot { name: name.clone() }),
            SlotState::Missing | SlotState::Unknown if self.settings.create_slot => {
                match connection.create_physical_slot(name).await? {
                    CreateOutcome::Created => {
                        tracing::info!(event = "slot_created", slot = name, "created the replication slot");
                        match connection.read_slot(name).await? {
                            SlotState::Exists { restart_lsn, .. } => Ok(restart_lsn),
                            _ => Ok(None),
                        }
                    }
                    CreateOutcome::Exists => Ok(None),
                }
            }
            SlotState::Missing => Err(ArchiveError::NoSlot { name: name.clone() }),
            SlotState::Unknown => Ok(None),
        }
    }

    async fn stream(
        &mut self,
        connection: ReplicationConnection,
        start: Start,
        settings: AssemblerSettings,
        status_interval: Duration,
        signals: Signals,
    ) -> Result<SessionEnd, ArchiveError> {
        let slot = self.settings.slot.clone();
        let direct = start.position == start.without_overlap;
        // Before the stream begins: from then on the server wants answers, and a store may take its time (I11).
        let assembler = self.assembler(&start, settings).await?;
        let started = tokio::select! {
            started = connection.start_replication(Some(&slot), start.position, start.timeline) => started,
            () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
        };
        let result = match started {
            Ok(StartOutcome::Streaming(stream)) => {
                self.receive(stream, start, assembler, status_interval, signals).await
            }
            // Nothing more on this timeline: the next connection asks for the one that follows.
            Ok(StartOutcome::AtEnd { .. }) => Ok(SessionEnd::EndOfTimeline),
            Err(error) => Err(error.into()),
        };
        // The server tells that WAL is gone at once, or only when it comes to read it.
        match result {
            Err(ArchiveError::Postgres(error)) if error.is_slot_lost() => {
                self.way = Way::BehindGap { why: error.to_string(), slot_lost: true };
                self.board
                    .raise(CauseCode::SlotLost, format!("slot \"{slot}\" was invalidated by the server: {error}"));
                Err(ArchiveError::WalGone { why: error.to_string() })
            }
            Err(ArchiveError::Postgres(error)) if error.is_wal_removed() => {
                let behind_gap = Way::BehindGap { why: error.to_string(), slot_lost: false };
                self.way = if direct { behind_gap } else { Way::WithoutOverlap };
                Err(ArchiveError::WalGone { why: error.to_string() })
            }
            other => {
                self.way = Way::Overlapping;
                other
            }
        }
    }

    async fn assembler(&self, start: &Start, settings: AssemblerSettings) -> Result<Assembler, ArchiveError> {
        let built = SegmentName::holding(start.timeline, start.sealed_until, self.segment_size);
        let wanted_cuts = self.wanted_cuts(built).await;
        let indexer = self
            .held_wal()
            .indexer_at(start.timeline, start.position, start.open_record, &start.parts, start.max_time)
            .await?;
        let first = SegmentName::holding(start.timeline, start.position, self.segment_size);
        let sealed_until = start.sealed_until.max(start.position);
        Ok(Assembler::new(settings, self.spool.clone(), indexer, first, sealed_until, wanted_cuts)?)
    }

    async fn receive(
        &mut self,
        stream: WalStream,
        start: Start,
        assembler: Assembler,
        status_interval: Duration,
        signals: Signals,
    ) -> Result<SessionEnd, ArchiveError> {
        let position = start.position;
        let sealed_until = start.sealed_until.max(position);
        let held_from = start.parts.iter().map(HeldPart::start).find(|part| *part >= position);
        let held = held_from.filter(|from| *from < start.held_end).map(|from| {
            let parts = start.parts.iter().filter(|part| part.start() >= from).cloned().collect();
            HeldBytes::read(self.spool.clone(), self.system, parts, from, start.held_end, &self.stores)
        });
        // The open file of last time stays until the new one has caught up with it.
        let old_open = start.parts.iter().find_map(|part| match part {
            HeldPart::Open { found, end, .. } => Some((found.path.clone(), *end)),
            _ => None,
        });
        self.tail.clear();
        self.board.set_timeline(start.timeline, self.timeline_begin);
        self.board.set_durable(start.held_end);
        self.guard.begin(start.held_end);
        self.backlog.set_sealed_end(start.timeline.get(), start.sealed_until);
        let disk = DiskSide::start(
            self.spool.clone(),
            self.backlog.clone(),
            self.tail.clone(),
            self.missing.clone(),
            self.board.clone(),
            self.settings.bounds.clone(),
            (self.system, self.segment_size),
            start.held_end,
            sealed_until,
            old_open,
        );
        self.board.set_connected();
        self.streaming.send_replace(Some(Streaming { host: self.host, timeline: start.timeline }));
        self.board.clear(CauseCode::SlotMissing);
        self.board.clear(CauseCode::SpoolFailing);
        tracing::info!(event = "connected", timeline = start.timeline.get(), %position, held_to = %start.held_end, "streaming");
        let receiver = Receiver {
            stream,
            assembler,
            disk,
            held,
            settings: &self.settings,
            connect: self.connected_host(),
            segment_size: self.segment_size,
            status_interval,
            board: &self.board,
            confirmed: self.confirmed.clone(),
            timeline: start.timeline,
            missing: signals.missing,
            recut: signals.recut,
            slot_at: self.slot_at,
            guard: &mut self.guard,
            turn: self.turn.clone(),
            halt: &self.halt,
            shutdown: &self.shutdown,
            server_end: start.held_end,
            flushing_to: Lsn::ZERO,
            flushing_since: None,
            is_handing_over: false,
            asked_at_end: 0,
            asks: None,
            begun_at: position,
            stop_by: None,
        };
        receiver.run().await
    }

    /// Where the repositories' pieces of the segment to build end: there a stretch must end as well, so that they can be continued.
    async fn wanted_cuts(&self, segment: SegmentName) -> BTreeSet<u64> {
        // Where pieces may end that are on their way just now: at any cut of the session before.
        let mut cuts = self.tail.cuts(segment);
        for (archive, _) in &self.archives {
            let (archive, stores) = (archive.clone(), &self.stores);
            let asked = stores
                .spawn(async move { tokio::time::timeout(Duration::from_secs(5), archive.pieces(segment)).await });
            match asked.await {
                Ok(Ok(Ok(pieces))) => {
                    let chain = PieceChain::of(&pieces);
                    let ends = chain.unreachable.iter().flat_map(|piece| [piece.start, piece.end]).chain([chain.end]);
                    cuts.extend(ends.filter(|end| *end > 0).map(u64::from));
                }
                // The uploader asks for another cut, should this one be wrong.
                Ok(Ok(Err(error))) => tracing::debug!(%error, "the stored tail pieces are not known"),
                Ok(Err(_)) | Err(_) => tracing::debug!("the stored tail pieces are not known: no answer in time"),
            }
        }
        cuts
    }
}

/// The queue's record of a small spooled object.
pub fn small_entry(name: &crate::spool::SpooledName, content: &[u8]) -> QueueEntry {
    QueueEntry {
        timeline: name.timeline.get(),
        order: name.order,
        relative: name.relative.clone(),
        stored_size: content.len() as u64, // usize fits
        crc32: crc32fast::hash(content),
        stored_in: Vec::new(),
    }
}
