//! The live loop: bytes from the server to the assembler, positions back to the server. It waits for nothing but the socket: disk and
//! store have threads and tasks of their own, and their pressure arrives here as a durable position that stands still (I11).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::assembler::Assembler;
use super::confirmed::ConfirmedWatch;
use super::guard::SyncGuard;
use super::held::HeldBytes;
use super::sealer::{DiskSide, DiskState};
use super::stopping::{LastBytes, server_stops, until};
use super::turn::Turn;
use super::{ArchiveError, Halt, LiveSettings};
use crate::postgres::{ConnectSettings, WalMessage, WalStream};
use crate::telemetry::{Board, CauseCode};
use crate::wal::{Lsn, PAGE_SIZE, SegmentName, SegmentSize, TimelineId};

/// Requests for an answer in a row, with nothing more to send, that tell a server which shuts down. One that runs does not ask, since
/// it is told its status more often than it would.
const SHUTS_DOWN: u32 = 3;
/// A flush that takes longer is told.
const FLUSH_PATIENCE: Duration = Duration::from_secs(10);
const GOODBYE: Duration = Duration::from_millis(500);
/// How long a server that shuts down may wait for what cannot be confirmed.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);
/// One that shuts down asks again as soon as it is answered.
const ASKS_ON: Duration = Duration::from_secs(1);
/// How often the open segment's new bytes become durable at most while no commit waits for them. Pieces of it are shipped more often,
/// and need no flush of their own: the server keeps its WAL until it is told of one.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// A server that answers no request for a reply in this many status intervals is gone; and sooner, so that it is told in time (I19).
const SILENT_INTERVALS: u32 = 4;
const SILENT_MAX: Duration = Duration::from_secs(25);

/// How a session ended without an error.
pub enum SessionEnd {
    Shutdown,
    /// The server has no more WAL on this timeline.
    EndOfTimeline,
}

/// One stream on one timeline.
pub struct Receiver<'a> {
    pub stream: WalStream,
    pub assembler: Assembler,
    pub disk: DiskSide,
    /// What is held from the stream's start on; compared byte for byte with what the server sends (I7).
    pub held: Option<HeldBytes>,
    pub settings: &'a LiveSettings,
    /// For another connection to the same host.
    pub connect: ConnectSettings,
    pub segment_size: SegmentSize,
    pub status_interval: Duration,
    pub board: &'a Board,
    pub confirmed: ConfirmedWatch,
    pub timeline: TimelineId,
    /// Changes when a held segment was lost: the stream begins again there.
    pub missing: watch::Receiver<BTreeSet<SegmentName>>,
    /// Changes when a repository can go on only if the open segment is cut elsewhere: the stream begins again.
    pub recut: watch::Receiver<u64>,
    /// Where the slot stood at the connection. It is not moved back into another segment: that may be gone, and the slot with it.
    pub slot_at: Lsn,
    pub guard: &'a mut SyncGuard,
    pub turn: Turn,
    pub halt: &'a Halt,
    pub shutdown: &'a CancellationToken,
    pub server_end: Lsn,
    /// Up to where the last flush goes that was ordered.
    pub flushing_to: Lsn,
    /// Orders to the disk may be lost if this is the end: none may follow.
    pub is_handing_over: bool,
    /// How far it was when it was last looked at, since when it stands there, and whether that was told.
    pub flushing_since: Option<(Lsn, Instant, bool)>,
    /// How often in a row the server asked for an answer although it has sent everything.
    pub asked_at_end: u32,
    /// Since when it shuts down and does so in vain, and when it did last.
    pub asks: Option<(Instant, Instant)>,
    /// Where the stream began.
    pub begun_at: Lsn,
    /// Once the agent stops: until when anything is still waited for.
    pub stop_by: Option<Instant>,
}

impl Receiver<'_> {
    /// Streams until the shutdown, the end of the timeline or a failure. The disk side has finished on return.
    pub async fn run(mut self) -> Result<SessionEnd, ArchiveError> {
        let mut result = self.receive().await;
        if let Err(error) = &result
            && self.held.is_none()
            && !self.is_handing_over
            && matches!(
                error,
                ArchiveError::Postgres(_)
                    | ArchiveError::Silent { .. }
                    | ArchiveError::StreamEnded
                    | ArchiveError::ServerStops
            )
        {
            // What came is worth as much as before: the server may not come back.
            self.cut_and_leave()?;
        }
        if matches!(result, Ok(SessionEnd::Shutdown)) {
            // What is there becomes durable and shippable before the end; the last status tells the server.
            result = self.flush_all().await.map(|()| SessionEnd::Shutdown);
        }
        let Self { stream, mut assembler, disk, shutdown, .. } = self;
        if matches!(result, Ok(SessionEnd::Shutdown)) {
            // A clean goodbye; the server would log a broken connection otherwise.
            let _ = tokio::time::timeout(GOODBYE, stream.finish()).await;
        } else if matches!(result, Ok(SessionEnd::EndOfTimeline)) {
            result = end_stream(stream, &mut assembler, &disk, shutdown).await;
        } else {
            // At once: the disk may take its time to end, and a server that shuts down waits for this.
            drop(stream);
        }
        let state = disk.state.clone();
        // Joining waits for the disk, so it happens on a thread that may wait.
        let joined = tokio::task::spawn_blocking(move || disk.join()).await;
        if let Some(failure) = &state.borrow().failed {
            return Err(ArchiveError::Disk(failure.clone()));
        }
        joined.map_err(|panic| ArchiveError::Internal { why: panic.to_string() })?;
        result
    }

    async fn receive(&mut self) -> Result<SessionEnd, ArchiveError> {
        let mut state = self.disk.state.clone();
        let mut confirmed = self.confirmed.clone();
        let mut missing = self.missing.clone();
        let mut recut = self.recut.clone();
        let turn = self.turn.clone();
        let mut heard = Instant::now();
        let mut next_status = Instant::now();
        let mut next_cut = Instant::now() + self.settings.cut_interval;
        // A little early, or the cut just before it would put it off by a whole interval.
        let mut next_flush = Instant::now();
        let mut last = None;
        // The first messages may have come with the answer to the command.
        if self.take_messages().await? {
            return Ok(SessionEnd::EndOfTimeline);
        }
        loop {
            let now = Instant::now();
            if last.as_ref().is_some_and(|last: &LastBytes| last.are_there(now, self.assembler.position())) {
                return Ok(SessionEnd::Shutdown);
            }
            if self.guard.deadline().is_some_and(|deadline| now >= deadline) && self.board.is_waited_for() {
                self.send_status(false).await?;
            }
            if now >= next_status {
                self.send_status(true).await?;
                next_status = now + self.status_interval;
            }
            if now >= next_cut {
                next_cut = now + self.settings.cut_interval;
                let is_due = now >= next_flush;
                if is_due {
                    next_flush = now + self.settings.cut_interval.max(FLUSH_INTERVAL);
                }
                self.cut_if_caught_up(is_due).await?;
                if now.elapsed() > self.status_interval {
                    // The disk held this loop, and the server was not listened to meanwhile.
                    heard = Instant::now();
                }
            }
            self.tell_slow_flush();
            if now.duration_since(heard) > self.silence_limit() {
                return Err(ArchiveError::Silent { seconds: now.duration_since(heard).as_secs() });
            }
            if self.asks.is_some_and(|(since, last)| last.duration_since(since) > SHUTDOWN_PATIENCE) {
                return Err(ArchiveError::ServerStops);
            }
            // Behind it the delay is told, or nobody waits; then the next cut is soon enough to look again.
            let deadline = self.guard.deadline().filter(|deadline| *deadline > now).unwrap_or(next_cut);
            let end = last.as_ref().map_or(next_cut, |last| last.deadline);
            let wake = tokio::time::Instant::from_std(next_status.min(next_cut).min(deadline).min(end));
            tokio::select! {
                biased;
                () = self.shutdown.cancelled(), if last.is_none() => {
                    self.stop_deadline();
                    let stop_timeout = self.settings.stop_timeout;
                    last = Some(LastBytes::ask(self.connect.clone(), self.board.clone(), stop_timeout));
                }
                () = self.halt.halted() => return Ok(SessionEnd::Shutdown),
                () = LastBytes::found(&mut last) => {}
                changed = state.changed() => {
                    changed.map_err(|_| ArchiveError::Internal { why: "the disk threads ended".into() })?;
                    self.check_disk(&state.borrow_and_update().clone())?;
                    self.send_status(false).await?;
                    self.cut_for_commits().await?;
                }
                // A stream that began anew each time would never get past a long overlap.
                changed = recut.changed(), if self.held.is_none() => if changed.is_ok() { return Err(ArchiveError::CutAgain) },
                () = turn.is_lost() => return Err(ArchiveError::NotOurTurn),
                changed = missing.changed() => if changed.is_ok() { return Err(ArchiveError::FetchAgain) },
                () = confirmed.changed(), if self.settings.durable_in_repository => self.send_status(false).await?,
                filled = self.stream.fill() => {
                    filled?;
                    let ended = self.take_messages().await?;
                    // After it: a full spool may have held this loop, and the server was not listened to meanwhile.
                    heard = Instant::now();
                    if ended {
                        return Ok(SessionEnd::EndOfTimeline);
                    }
                    self.cut_for_commits().await?;
                    self.board.set_received(self.assembler.position());
                }
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Takes all messages that have arrived. True at the end of the timeline.
    async fn take_messages(&mut self) -> Result<bool, ArchiveError> {
        loop {
            // Compared bytes are copied out, since the comparison may wait for the disk; only the overlap pays for it.
            let mut compare: Option<Vec<u8>> = None;
            let mut reply = false;
            let mut is_stopping = false;
            match self.stream.next_message()? {
                None => return Ok(false),
                Some(WalMessage::EndOfTimeline) => return Ok(true),
                Some(WalMessage::Keepalive { server_end, server_time, reply_requested }) => {
                    self.board.note_server_clock(server_time);
                    self.server_end = self.server_end.max(server_end);
                    reply = reply_requested;
                    let at_end = reply_requested && server_end == self.assembler.position();
                    self.asked_at_end = if at_end { self.asked_at_end.saturating_add(1) } else { 0 };
                    is_stopping = self.asked_at_end == SHUTS_DOWN;
                    let now = Instant::now();
                    self.asks = match self.asks {
                        None if self.asked_at_end >= SHUTS_DOWN => Some((now, now)),
                        Some((since, _)) if at_end => Some((since, now)),
                        // Between its requests it answers ours.
                        asks => asks.filter(|(_, last)| now.duration_since(*last) < ASKS_ON),
                    };
                }
                Some(WalMessage::Data { start, server_end, bytes }) => {
                    if start != self.assembler.position() {
                        return Err(ArchiveError::Jump { expected: self.assembler.position(), found: start });
                    }
                    self.server_end = self.server_end.max(server_end);
                    self.asked_at_end = 0;
                    self.asks = None;
                    self.board.count_received(bytes.len() as u64); // usize fits
                    if self.held.is_some() {
                        compare = Some(bytes.to_vec());
                    } else {
                        self.assembler.feed(bytes)?;
                    }
                }
            }
            if let Some(bytes) = compare {
                self.compare(&bytes).await?;
                self.assembler.feed(&bytes)?;
                if self.held.as_ref().is_some_and(HeldBytes::is_done) {
                    self.held = None;
                }
            }
            if is_stopping {
                // It waits until all is confirmed.
                self.cut_if_caught_up(true).await?;
            }
            if reply {
                self.send_status(false).await?;
            }
            if self.assembler.has_commands() {
                self.hand_over().await?;
            }
            if let Some(bytes) = self.settings.cut_bytes
                && self.assembler.uncut_bytes() >= bytes
                && self.server_end.bytes_since(self.assembler.position()) < bytes
            {
                self.cut_if_caught_up(false).await?;
            }
        }
    }

    /// Compares with what is held. Different bytes are another history: nothing of it is archived.
    async fn compare(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        let start = self.assembler.position();
        let mut next_status = Instant::now() + self.status_interval / 2;
        let mut done = 0;
        let server_stops = server_stops(self.connect.clone());
        tokio::pin!(server_stops);
        while done < bytes.len() {
            let wake = tokio::time::Instant::from_std(next_status);
            let reported = Lsn::ZERO; // nothing is told before the overlap is proven
            let Some(held) = self.held.as_mut() else { return Ok(()) };
            tokio::select! {
                more = held.compare(Lsn::new(start.get() + done as u64), &bytes[done..]) => match more? {
                    Some(equal) => done += equal,
                    None => {
                        self.held = None;
                        return Ok(());
                    }
                },
                () = tokio::time::sleep_until(wake) => {
                    next_status = Instant::now() + self.status_interval / 2;
                    self.stream.send_status(reported, reported, false).await?;
                }
                // A store that hangs does not give the overlap.
                () = self.shutdown.cancelled(), if self.stop_by.is_none() => {
                    self.stop_deadline();
                }
                () = until(self.stop_by) => return Err(ArchiveError::Stopping),
                () = self.halt.halted() => return Err(ArchiveError::Stopping),
                () = self.turn.is_lost() => return Err(ArchiveError::NotOurTurn),
                () = &mut server_stops => return Err(ArchiveError::ServerStops),
            }
        }
        Ok(())
    }

    /// Hands the assembler's commands to the disk. While the disk is behind, the server is answered all the same.
    async fn hand_over(&mut self) -> Result<(), ArchiveError> {
        let commands: Vec<_> = self.assembler.take_commands().collect();
        self.is_handing_over = true;
        for command in commands {
            // Only this loop sends, so room that was seen stays.
            if self.disk.commands.capacity() == 0 {
                self.wait_for_disk().await?;
            }
            self.disk.commands.try_send(command).map_err(|_| self.disk_gone())?;
        }
        self.is_handing_over = false;
        Ok(())
    }

    /// Waits until the disk side takes a command. Status updates go on. An agent that stops waits as long as it may, since what is
    /// received already may still become durable.
    async fn wait_for_disk(&mut self) -> Result<(), ArchiveError> {
        let mut state = self.disk.state.clone();
        let commands = self.disk.commands.clone();
        let server_stops = server_stops(self.connect.clone());
        tokio::pin!(server_stops);
        loop {
            tokio::select! {
                permit = commands.reserve() => {
                    drop(permit.map_err(|_| self.disk_gone())?);
                    return Ok(());
                }
                changed = state.changed() => {
                    changed.map_err(|_| self.disk_gone())?;
                    self.check_disk(&state.borrow_and_update().clone())?;
                }
                () = self.shutdown.cancelled(), if self.stop_by.is_none() => {
                    self.stop_deadline();
                }
                () = until(self.stop_by) => return Err(ArchiveError::Stopping),
                () = self.halt.halted() => return Err(ArchiveError::Stopping),
                () = self.turn.is_lost() => return Err(ArchiveError::NotOurTurn),
                () = &mut server_stops => return Err(ArchiveError::ServerStops),
                () = tokio::time::sleep(self.status_interval / 2) => {}
            }
            self.send_status(false).await?;
        }
    }

    fn disk_gone(&self) -> ArchiveError {
        match &self.disk.state.borrow().failed {
            Some(failure) => ArchiveError::Disk(failure.clone()),
            None => ArchiveError::Internal { why: "the disk threads ended".into() },
        }
    }

    fn check_disk(&self, state: &DiskState) -> Result<(), ArchiveError> {
        match &state.failed {
            Some(failure) => Err(ArchiveError::Disk(failure.clone())),
            None => {
                self.board.set_durable(state.durable);
                Ok(())
            }
        }
    }

    /// Orders a last flush, and waits for nothing.
    fn cut_and_leave(&mut self) -> Result<(), ArchiveError> {
        self.assembler.cut()?;
        for command in self.assembler.take_commands() {
            // Orders are carried out in turn: without one the next would not fit.
            if self.disk.commands.try_send(command).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// A disk that hangs fails nothing for a long time, and commits may wait for it (I19).
    fn tell_slow_flush(&mut self) {
        let durable = self.disk.state.borrow().durable;
        if durable >= self.flushing_to || self.flushing_since.is_some_and(|(seen, ..)| durable > seen) {
            if self.flushing_since.take().is_some_and(|(.., is_told)| is_told) {
                self.board.clear(CauseCode::SpoolFailing);
            }
            return;
        }
        match &mut self.flushing_since {
            None => self.flushing_since = Some((durable, Instant::now(), false)),
            // A full spool says so itself.
            Some((_, since, is_told))
                if !*is_told && since.elapsed() > FLUSH_PATIENCE && !self.board.is_raised(CauseCode::SpoolFull) =>
            {
                *is_told = true;
                let message = format!(
                    "the spool's disk has not flushed anything for {} s; check it, since PostgreSQL's commits may wait for it",
                    FLUSH_PATIENCE.as_secs()
                );
                self.board.raise(CauseCode::SpoolFailing, message);
            }
            Some(_) => {}
        }
    }

    /// Makes the open segment's new bytes shippable, and all of them durable with `flush`, unless there is a backlog: then only whole
    /// segments are worth it.
    async fn cut_if_caught_up(&mut self, flush: bool) -> Result<(), ArchiveError> {
        let behind = self.server_end.bytes_since(self.assembler.position());
        if self.held.is_some() || behind > self.settings.catching_up_bytes(self.segment_size) {
            return Ok(());
        }
        if flush {
            self.assembler.cut()?;
            self.flushing_to = self.assembler.position();
        } else {
            self.assembler.offer()?;
        }
        self.hand_over().await
    }

    /// Commits wait for what came, be it for the spool or for the repositories: it is sent on its way at once. One flush at a time, so
    /// that those that come meanwhile go together.
    async fn cut_for_commits(&mut self) -> Result<(), ArchiveError> {
        if self.board.is_waited_for()
            && self.assembler.has_unmarked()
            && self.disk.state.borrow().durable >= self.flushing_to
        {
            self.cut_if_caught_up(true).await?;
        }
        Ok(())
    }

    async fn send_status(&mut self, reply: bool) -> Result<(), ArchiveError> {
        // What the server is told is shown as well, and not later.
        self.board.set_durable(self.disk.state.borrow().durable);
        let reported = self.reported();
        if !reported.is_zero() {
            self.board.settle_slot();
        }
        // A server that does not read must not hold this loop for ever.
        let sent =
            tokio::time::timeout(self.status_interval * 2, self.stream.send_status(reported, reported, reply)).await;
        Ok(sent.map_err(|_| ArchiveError::Silent { seconds: (self.status_interval * 2).as_secs() })??)
    }

    /// The position that the server is told; zero, which leaves the slot as it is, until WAL has come and what is held was found
    /// equal: before that it may be another server, or one that no longer has the WAL, whose slot must not be moved back.
    ///
    /// In the first page of a segment it is held back by a page, so that the server keeps the sealed segment for the overlap at the
    /// next connection (I7). So little of a segment may be the same in two histories. A server that asks again and again at its end
    /// releases it: it shuts down, and waits until everything is confirmed (`WalSndDone` in `walsender.c`). And so does one whose
    /// commits wait for us.
    fn reported(&mut self) -> Lsn {
        if self.held.is_some() || self.assembler.position() == self.begun_at {
            return Lsn::ZERO;
        }
        let is_waited_for = self.board.is_waited_for();
        let durable = self.disk.state.borrow().durable;
        let durable = if self.settings.durable_in_repository {
            let archived = self.confirmed.on(self.timeline);
            self.guard.position(Instant::now(), durable, archived, is_waited_for, self.board)
        } else {
            durable
        };
        // Within the segment nothing is lost by going back, and a slot that was just made stands ahead of what is held.
        let slot_segment = self.segment_size.start_of(self.slot_at);
        if durable < slot_segment {
            return Lsn::ZERO;
        }
        let held_back = Lsn::new(durable.get().saturating_sub(PAGE_SIZE as u64));
        let is_first_page = self.segment_size.offset_of(durable) < PAGE_SIZE as u64;
        let hold_back = is_first_page && held_back >= self.begun_at && self.asked_at_end < SHUTS_DOWN;
        if hold_back && !is_waited_for { held_back.max(slot_segment) } else { durable }
    }

    /// When a stop waits no longer; it begins with the first call.
    fn stop_deadline(&mut self) -> Instant {
        *self.stop_by.get_or_insert_with(|| Instant::now() + self.settings.stop_timeout)
    }

    /// Requests for an answer go out once each interval: at least two must be in vain.
    fn silence_limit(&self) -> Duration {
        (self.status_interval * SILENT_INTERVALS).min(SILENT_MAX.max(self.status_interval * 2))
    }

    async fn flush_all(&mut self) -> Result<(), ArchiveError> {
        if self.held.is_none() {
            self.assembler.cut()?;
            self.hand_over().await?;
            let end = self.assembler.position();
            // Bounded: with a full or stuck disk the agent stops all the same, and tells the server no more than is true.
            self.wait_at_the_end(|this| this.disk.state.borrow().durable >= end).await?;
            if self.settings.durable_in_repository && self.board.is_waited_for() {
                // Commits that are on their way may still return.
                self.wait_at_the_end(|this| this.confirmed.on(this.timeline).is_some_and(|there| there >= end)).await?;
            }
        }
        self.send_status(false).await
    }

    /// Waits until it is done, for as long as a stop may take. The server is answered meanwhile, and told what is confirmed.
    async fn wait_at_the_end(&mut self, is_done: impl Fn(&Self) -> bool) -> Result<(), ArchiveError> {
        let deadline = self.stop_deadline();
        let mut state = self.disk.state.clone();
        let mut confirmed = self.confirmed.clone();
        while !is_done(self) && self.disk.state.borrow().failed.is_none() && Instant::now() < deadline {
            let wake = deadline.min(Instant::now() + self.status_interval / 2);
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return Ok(()) },
                () = confirmed.changed() => {}
                () = until(Some(wake)) => {}
            }
            self.send_status(false).await?;
        }
        Ok(())
    }
}

/// The server has ended the stream: at a timeline's end it names the next one; at its own shutdown it does not.
async fn end_stream(
    stream: WalStream,
    assembler: &mut Assembler,
    disk: &DiskSide,
    shutdown: &CancellationToken,
) -> Result<SessionEnd, ArchiveError> {
    let ended = stream.finish().await;
    let switched = match &ended {
        Ok(end) => end.next_timeline.is_some_and(|(_, switch)| switch == assembler.position()),
        Err(_) => false,
    };
    if switched {
        // The timeline's last part becomes a piece of its own, durable before anything of the next timeline is.
        assembler.end_timeline()?;
    } else {
        assembler.cut()?;
    }
    for command in assembler.take_commands() {
        let gone = || ArchiveError::Internal { why: "the disk threads ended".into() };
        tokio::select! {
            biased;
            sent = disk.commands.send(command) => sent.map_err(|_| gone())?,
            // The disk is full, and the server still has it.
            () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
        }
    }
    match ended {
        _ if switched => Ok(SessionEnd::EndOfTimeline),
        Ok(_) => Err(ArchiveError::StreamEnded),
        Err(error) => Err(error.into()),
    }
}
