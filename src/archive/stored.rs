//! Does a repository hold WAL that the server does not have? Only another agent, or a host that was put back as it was together with its
//! spool, can have left it there. The stream compares what the spool holds (I7); of this the spool knows nothing.
//!
//! Asked once for each repository and timeline as long as its lease is held: what comes later comes from here.

use std::time::Duration;

use super::ArchiveError;
use super::divergence::{Compared, stored_parts};
use super::held::HeldPart;
use super::live::Live;
use super::start::Start;
use crate::failure::NextStep;
use crate::postgres::SystemInfo;
use crate::repository::{Archive, PieceChain, RepositoryError};
use crate::telemetry::CauseCode;
use crate::wal::{Lsn, PAGE_SIZE, SegmentName, TimelineId};

/// How long a store may take to say what it holds. One that does not answer holds nothing up: it is asked again when it does.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// The same for one that was just seen to answer.
const PATIENT_LIMIT: Duration = Duration::from_secs(30);

enum Proof {
    /// The server has all that is stored, or nobody can tell, which was told.
    Given,
    /// Other bytes from here on.
    Differs(Lsn),
    /// Equal as far as the server is; more is stored.
    Ahead(Lsn),
    Unanswered,
}

impl Live {
    /// Compares the last bytes that each repository holds of the timeline, and all that the spool does not, with the server's. `switch`:
    /// where the server left that timeline.
    pub(super) async fn prove_stored(
        &self,
        info: &SystemInfo,
        start: &Start,
        switch: Option<Lsn>,
    ) -> Result<(), ArchiveError> {
        let timeline = start.timeline;
        let is_current = timeline == info.timeline;
        // What was archived behind the switch is no part of the server's history, which readers know.
        let limit = if is_current { info.flush_lsn } else { switch.unwrap_or(start.held_end) };
        for (archive, required) in &self.archives {
            let name = archive.repository().name();
            if self.tail.judged(name, timeline) == Some(true) || self.tail.is_silent(name) {
                continue;
            }
            match self.prove_in(archive, start, limit).await? {
                Proof::Given => {
                    if self.tail.judged(name, timeline) == Some(false) {
                        self.board.clear(CauseCode::Diverged);
                    }
                    self.tail.set_judged(name, timeline, true);
                }
                Proof::Ahead(_) if !is_current => self.tail.set_judged(name, timeline, true),
                Proof::Unanswered => self.tail.set_silent(name),
                Proof::Differs(at) if *required => return Err(ArchiveError::Diverged { at }),
                Proof::Ahead(held) if *required => return Err(ArchiveError::Behind { server: limit, held }),
                Proof::Differs(at) => {
                    self.tail.set_judged(name, timeline, false);
                    let why = format!(
                        "repository {name} holds other WAL from {at} on than the server; nothing of the open segment is sent there: set that repository's folder aside, or give this server a cluster name of its own"
                    );
                    self.board.raise(CauseCode::Diverged, why);
                }
                Proof::Ahead(held) => {
                    // A standby may catch up: it is asked again.
                    tracing::warn!(repository = name, %held, server = %limit, "the repository holds more than the server has");
                }
            }
        }
        Ok(())
    }

    async fn prove_in(&self, archive: &Archive, start: &Start, limit: Lsn) -> Result<Proof, ArchiveError> {
        let (timeline, known, size) = (start.timeline, start.held_end, self.segment_size);
        let is_answering = self.tail.is_answering(archive.repository().name());
        let patience = if is_answering { PATIENT_LIMIT } else { ASK_LIMIT };
        let asked = archive.clone();
        let end = async move {
            let archived = asked.archived_from(timeline, known, size).await?;
            let mut end = archived.beyond.last().map_or(archived.end, |run| run.end.max(archived.end));
            // Segments that were whole may be there in pieces only.
            while size.is_boundary(end) {
                let pieces = asked.pieces(SegmentName::holding(timeline, end, size)).await?;
                match PieceChain::of(&pieces).end {
                    0 => break,
                    offset => end = Lsn::new(end.get() + u64::from(offset)),
                }
            }
            Ok(end)
        };
        let Some(stored) = self.ask(patience, end).await? else { return Ok(Proof::Unanswered) };
        if stored <= size.start_of(known) {
            return Ok(Proof::Given);
        }
        let until = stored.min(limit);
        let Some(last) = until.get().checked_sub(1).map(Lsn::new) else { return Ok(Proof::Ahead(stored)) };
        let segment = SegmentName::holding(timeline, last, size);
        let mut segments = vec![segment];
        // A page header and a record without a time may be the same in two histories.
        if until.bytes_since(segment.start()) < PAGE_SIZE as u64 && known < segment.start() {
            segments.extend(segment.previous());
        }
        for segment in segments {
            let asked = archive.clone();
            let Some(parts) = self.ask(patience, async move { stored_parts(&asked, segment).await }).await? else {
                return Ok(Proof::Unanswered);
            };
            let until = until.min(segment.end());
            let wanted = known.min(Lsn::new(until.get().saturating_sub(PAGE_SIZE as u64)));
            let first = parts.iter().rposition(|part| part.start() <= wanted).unwrap_or(0);
            let compared = match self.compare_stored(timeline, &parts[first..], until).await? {
                // The little that was compared need not be where it begins.
                Compared::Differs(at) => match self.compare_stored(timeline, &parts, until).await? {
                    Compared::Differs(first) => Compared::Differs(first.min(at)),
                    _ => Compared::Differs(at),
                },
                other => other,
            };
            match compared {
                Compared::Differs(at) => return Ok(Proof::Differs(at)),
                Compared::Unknown => return Ok(Proof::Unanswered),
                Compared::Gone if stored > known => self.tell_unproven(until),
                Compared::Equal | Compared::NotHeld | Compared::Gone => {}
            }
        }
        Ok(if stored > limit { Proof::Ahead(stored) } else { Proof::Given })
    }

    async fn compare_stored(
        &self,
        timeline: TimelineId,
        parts: &[HeldPart],
        until: Lsn,
    ) -> Result<Compared, ArchiveError> {
        let Some(from) = parts.first().map(HeldPart::start).filter(|from| *from < until) else {
            return Ok(Compared::NotHeld);
        };
        let until = until.min(parts.last().map_or(until, HeldPart::end));
        match self.compare_parts(timeline, from, until, parts.to_vec()).await {
            Err(ArchiveError::Stopping) => Err(ArchiveError::Stopping),
            // A damaged object is no other history, and holds nothing up; a store that fails now may answer later.
            Err(error) => {
                tracing::warn!(%from, error = error.describe(), "what is stored could not be compared with the server's WAL");
                Ok(if error.next_step() == NextStep::Retry { Compared::Unknown } else { Compared::Gone })
            }
            compared => compared,
        }
    }

    /// `None`: no answer in time, or an error.
    async fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl Future<Output = Result<T, RepositoryError>> + Send + 'static,
    ) -> Result<Option<T>, ArchiveError> {
        let asked = self.stores.spawn(async move { tokio::time::timeout(patience, question).await });
        tokio::select! {
            asked = asked => Ok(match asked {
                Ok(Ok(Ok(answer))) => Some(answer),
                Ok(Ok(Err(error))) => {
                    tracing::debug!(%error, "what a repository holds is not known");
                    None
                }
                Ok(Err(_)) => None,
                Err(panic) => return Err(ArchiveError::Internal { why: panic.to_string() }),
            }),
            () = self.shutdown.cancelled() => Err(ArchiveError::Stopping),
        }
    }
}
