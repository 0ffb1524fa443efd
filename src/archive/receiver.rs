//! The live loop: bytes from the server to the assembler, positions back to the server. It waits for nothing but the socket: disk and
//! store have threads and tasks of their own, and their pressure arrives here as a durable position that stands still (I11).

use std::collections::BTreeSet;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::assembler::Assembler;
use super::confirmed::ConfirmedWatch;
use super::guard::SyncGuard;
use super::held::HeldBytes;
use super::sealer::{DiskSide, DiskState};
use super::turn::Turn;
use super::{ArchiveError, Halt, LiveSettings};
use crate::postgres::{ConnectSettings, ReplicationConnection, WalMessage, WalStream};
use crate::telemetry::Board;
use crate::wal::{Lsn, PAGE_SIZE, SegmentName, SegmentSize, TimelineId};

/// Requests for an answer in a row, with nothing more to send, that tell a server which shuts down. One that runs does not ask, since
/// it is told its status more often than it would.
const SHUTS_DOWN: u32 = 3;
const GOODBYE: Duration = Duration::from_millis(500);
/// A server that answers no request for a reply in this many status intervals is gone.
const SILENT_INTERVALS: u32 = 4;

/// How long a stopping agent still takes what the server had when it was told to stop.
const LAST_BYTES: Duration = Duration::from_secs(2);

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
    /// Where the last cut was made.
    pub cut_at: Lsn,
    /// How often in a row the server asked for an answer although it has sent everything.
    pub asked_at_end: u32,
    /// Where the stream began.
    pub begun_at: Lsn,
}

impl Receiver<'_> {
    /// Streams until the shutdown, the end of the timeline or a failure. The disk side has finished on return.
    pub async fn run(mut self) -> Result<SessionEnd, ArchiveError> {
        let mut result = self.receive().await;
        if matches!(result, Ok(SessionEnd::Shutdown)) {
            // What is there becomes durable and shippable before the end; the last status tells the server.
            result = self.flush_all().await.map(|()| SessionEnd::Shutdown);
        }
        let Self { stream, mut assembler, disk, .. } = self;
        if matches!(result, Ok(SessionEnd::Shutdown)) {
            // A clean goodbye; the server would log a broken connection otherwise.
            let _ = tokio::time::timeout(GOODBYE, stream.finish()).await;
        } else if matches!(result, Ok(SessionEnd::EndOfTimeline)) {
            result = end_stream(stream, &mut assembler, &disk).await;
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
                self.cut_if_caught_up().await?;
                if now.elapsed() > self.status_interval {
                    // The disk held this loop, and the server was not listened to meanwhile.
                    heard = Instant::now();
                }
            }
            if now.duration_since(heard) > self.status_interval * SILENT_INTERVALS {
                return Err(ArchiveError::Silent { seconds: now.duration_since(heard).as_secs() });
            }
            // Behind it the delay is told, or nobody waits; then the next cut is soon enough to look again.
            let deadline = self.guard.deadline().filter(|deadline| *deadline > now).unwrap_or(next_cut);
            let end = last.as_ref().map_or(next_cut, |last| last.deadline);
            let wake = tokio::time::Instant::from_std(next_status.min(next_cut).min(deadline).min(end));
            tokio::select! {
                biased;
                () = self.shutdown.cancelled(), if last.is_none() => last = Some(LastBytes::ask(self.connect.clone())),
                () = self.halt.halted() => return Ok(SessionEnd::Shutdown),
                () = LastBytes::found(&mut last) => {}
                changed = state.changed() => {
                    changed.map_err(|_| ArchiveError::Internal { why: "the disk threads ended".into() })?;
                    self.check_disk(&state.borrow_and_update().clone())?;
                    self.send_status(false).await?;
                    self.cut_for_commits().await?;
                }
                changed = recut.changed() => if changed.is_ok() { return Err(ArchiveError::CutAgain) },
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
            match self.stream.next_message()? {
                None => return Ok(false),
                Some(WalMessage::EndOfTimeline) => return Ok(true),
                Some(WalMessage::Keepalive { server_end, server_time, reply_requested }) => {
                    self.board.note_server_clock(server_time);
                    self.server_end = self.server_end.max(server_end);
                    reply = reply_requested;
                    let at_end = reply_requested && server_end == self.assembler.position();
                    self.asked_at_end = if at_end { self.asked_at_end.saturating_add(1) } else { 0 };
                }
                Some(WalMessage::Data { start, server_end, bytes }) => {
                    if start != self.assembler.position() {
                        return Err(ArchiveError::Jump { expected: self.assembler.position(), found: start });
                    }
                    self.server_end = self.server_end.max(server_end);
                    self.asked_at_end = 0;
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
            if reply {
                self.send_status(false).await?;
            }
            if self.assembler.has_commands() {
                self.hand_over().await?;
            }
            // One flush at a time: under load the bytes between two of them are as many as come in meanwhile.
            if let Some(bytes) = self.settings.cut_bytes
                && self.assembler.uncut_bytes() >= bytes
                && self.server_end.bytes_since(self.assembler.position()) < bytes
                && self.disk.state.borrow().durable >= self.cut_at
            {
                self.cut_if_caught_up().await?;
            }
        }
    }

    /// Compares with what is held. Different bytes are another history: nothing of it is archived.
    async fn compare(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        let start = self.assembler.position();
        let mut next_status = Instant::now() + self.status_interval / 2;
        let mut done = 0;
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
            }
        }
        Ok(())
    }

    /// Hands the assembler's commands to the disk. While the disk is behind, the server is answered all the same.
    async fn hand_over(&mut self) -> Result<(), ArchiveError> {
        let commands: Vec<_> = self.assembler.take_commands().collect();
        for command in commands {
            // Only this loop sends, so room that was seen stays.
            if self.disk.commands.capacity() == 0 {
                self.wait_for_disk().await?;
            }
            self.disk.commands.try_send(command).map_err(|_| self.disk_gone())?;
        }
        Ok(())
    }

    /// Waits until the disk side takes a command. Status updates go on.
    async fn wait_for_disk(&mut self) -> Result<(), ArchiveError> {
        let mut state = self.disk.state.clone();
        let commands = self.disk.commands.clone();
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
                () = self.shutdown.cancelled() => return Err(ArchiveError::Stopping),
                () = self.halt.halted() => return Err(ArchiveError::Stopping),
                () = self.turn.is_lost() => return Err(ArchiveError::NotOurTurn),
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

    /// Makes the open segment's new bytes durable and shippable, unless there is a backlog: then only whole segments are worth it.
    async fn cut_if_caught_up(&mut self) -> Result<(), ArchiveError> {
        let behind = self.server_end.bytes_since(self.assembler.position());
        if self.held.is_some() || behind > self.settings.catching_up_bytes(self.segment_size) {
            return Ok(());
        }
        self.assembler.cut()?;
        self.cut_at = self.assembler.position();
        self.hand_over().await
    }

    /// Commits wait for what came: it is sent on its way at once. One flush at a time, so that those that come meanwhile go together.
    async fn cut_for_commits(&mut self) -> Result<(), ArchiveError> {
        let is_waited_for = self.settings.durable_in_repository && self.board.is_waited_for();
        if is_waited_for && self.assembler.uncut_bytes() > 0 && self.disk.state.borrow().durable >= self.cut_at {
            self.cut_if_caught_up().await?;
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

    async fn flush_all(&mut self) -> Result<(), ArchiveError> {
        if self.held.is_none() {
            self.assembler.cut()?;
            let commands: Vec<_> = self.assembler.take_commands().collect();
            let deadline = Duration::from_secs(5);
            for command in commands {
                let sent = tokio::time::timeout(deadline, self.disk.commands.send(command)).await;
                sent.map_err(|_| ArchiveError::Stopping)?.map_err(|_| self.disk_gone())?;
            }
            let end = self.assembler.position();
            let mut state = self.disk.state.clone();
            // Bounded: with a full or stuck disk the agent stops all the same, and tells the server no more than is true.
            let _ = tokio::time::timeout(deadline, state.wait_for(|s| s.durable >= end || s.failed.is_some())).await;
            if self.settings.durable_in_repository && self.board.is_waited_for() {
                // Commits that are on their way may still return.
                let mut confirmed = self.confirmed.clone();
                let there = confirmed.reaches(self.timeline, end);
                let _ = tokio::time::timeout(self.settings.stop_timeout, there).await;
            }
        }
        self.send_status(false).await
    }
}

/// What a stopping agent still waits for: the commits that the server had acknowledged when the agent was told to stop may be on
/// their way to it.
struct LastBytes {
    deadline: Instant,
    asked: Pin<Box<dyn Future<Output = Option<Lsn>> + Send>>,
    /// The server's flush position after the signal; `None` inside if the server did not tell.
    end: Option<Option<Lsn>>,
}

impl LastBytes {
    fn ask(connect: ConnectSettings) -> Self {
        let asked = Box::pin(async move {
            let mut connection = ReplicationConnection::connect(&connect).await.ok()?;
            Some(connection.identify_system().await.ok()?.flush_lsn)
        });
        Self { deadline: Instant::now() + LAST_BYTES, asked, end: None }
    }

    /// Returns once the answer is there; never if nothing was asked or it was heard already.
    async fn found(last: &mut Option<Self>) {
        match last {
            Some(last) if last.end.is_none() => last.end = Some(last.asked.as_mut().await),
            _ => std::future::pending().await,
        }
    }

    fn are_there(&self, now: Instant, position: Lsn) -> bool {
        now >= self.deadline || self.end.is_some_and(|end| end.is_none_or(|end| position >= end))
    }
}

/// The server has ended the stream: at a timeline's end it names the next one; at its own shutdown it does not.
async fn end_stream(stream: WalStream, assembler: &mut Assembler, disk: &DiskSide) -> Result<SessionEnd, ArchiveError> {
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
        disk.commands.send(command).await.map_err(|_| gone())?;
    }
    match ended {
        _ if switched => Ok(SessionEnd::EndOfTimeline),
        Ok(_) => Err(ArchiveError::StreamEnded),
        Err(error) => Err(error.into()),
    }
}
