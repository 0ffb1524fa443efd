//! Where a session begins: behind what is held, with an overlap to compare (I7), on the timeline that the server names (I10).

use super::ArchiveError;
use super::assembler::AssemblerSettings;
use super::held::{Held, HeldPart, Reach, find_in_spool_on};
use super::live::{Live, Way};
use crate::postgres::{ReplicationConnection, SystemInfo};
use crate::spool::Spool;
use crate::telemetry::CauseCode;
use crate::wal::{Lsn, PgTime, SegmentName, TimelineId};

/// Why there is a gap, where the server did not say it in its own words.
const WAL_REMOVED: &str = "the server has already removed the WAL that was asked for";

/// Where to begin, and with what.
pub(super) struct Start {
    pub timeline: TimelineId,
    pub position: Lsn,
    /// The position behind what is held, should the overlap not be there any more.
    pub without_overlap: Lsn,
    pub sealed_until: Lsn,
    pub held_end: Lsn,
    pub parts: Vec<HeldPart>,
    pub max_time: Option<PgTime>,
    /// Where the record starts that reaches over `position`: it must be seen from there, or it is in no summary.
    pub open_record: Option<Lsn>,
}

impl Live {
    /// Nothing is held: the first segment of which all is there.
    pub(super) async fn first_start(
        &self,
        connection: &mut ReplicationConnection,
        info: &SystemInfo,
        slot: Option<Lsn>,
    ) -> Result<Start, ArchiveError> {
        let from = self.segment_size.start_of(slot.unwrap_or(info.flush_lsn));
        let timeline = match self.history(connection, info.timeline).await? {
            Some(history) => history.timeline_at(from),
            None => info.timeline,
        };
        tracing::info!(event = "archiving_begins", %from, timeline = timeline.get(), "archiving begins here");
        Ok(Start {
            timeline,
            position: from,
            without_overlap: from,
            sealed_until: from,
            held_end: from,
            parts: Vec::new(),
            max_time: None,
            open_record: None,
        })
    }

    /// Goes on behind what is held, on the same timeline or on the one that follows it by the server's own account.
    pub(super) async fn next_start(
        &mut self,
        connection: &mut ReplicationConnection,
        info: &SystemInfo,
        mut held: Held,
        settings: &AssemblerSettings,
    ) -> Result<Start, ArchiveError> {
        let (server, newest) = (info.timeline.get(), held.timeline.get());
        let other_branch = || ArchiveError::OtherBranch { server, held: newest };
        if let Some(own) = self.held_beside(connection, info.timeline, &held).await? {
            tracing::warn!(newest = %held.timeline, server = %info.timeline, "the newest timeline that is held is of another branch: going on with the server's own");
            // What is held of the other branch stays, and is shipped.
            self.seal_partial(settings, &held, held.end).await?;
            // So that the next session need not ask the repositories whose branch that is.
            let is_stored = own.parts.iter().all(|part| matches!(part, HeldPart::Stored { .. }));
            self.held_remotely = is_stored.then(|| own.clone());
            held = own;
        }
        if info.timeline == held.timeline {
            // A part that was closed by a switch is not gone on with by the server that was left behind; one that was closed because
            // WAL behind it was lost is built again, if the server has it after all.
            let left_behind = held.closed && self.histories_spooled.iter().any(|newer| *newer > held.timeline);
            if left_behind {
                return Err(ArchiveError::Behind { server: info.flush_lsn, held: held.end });
            }
            if info.flush_lsn < held.end {
                return Err(self.judge_behind(&held, info.flush_lsn).await);
            }
            self.forget_archived(held.timeline).await;
            if let Some(segment) = self.missing.first(held.timeline).filter(|segment| segment.end() <= held.sealed_end)
            {
                tracing::warn!(%segment, "fetching a lost segment again");
                return Ok(self.start_at_missing(segment, held).await);
            }
            return Ok(self.start_after(held));
        }
        let history = self.history(connection, info.timeline).await?.ok_or_else(other_branch)?;
        let Some((_, Some(switch))) = history.range_of(held.timeline) else {
            // A copy that was restored and promoted elsewhere: what is held of the branch that it left is gone on with.
            let common = self.newest_common(&history).await?;
            let (ancestor, switch) = common.ok_or_else(other_branch)?;
            let next = history.timeline_at(switch);
            tracing::warn!(held = %held.timeline, from = %ancestor, to = %next, at = %switch, "the server is on another branch");
            self.seal_partial(settings, &held, held.end).await?;
            return Ok(self.start_on_branch(ancestor, switch, next).await);
        };
        if held.end < switch {
            return Ok(self.start_after(held));
        }
        let next = history.timeline_at(switch);
        tracing::info!(event = "timeline_changed", from = held.timeline.get(), to = next.get(), at = %switch, "the timeline changes");
        if !held.closed {
            // Behind the switch it is no history of the server's, but what is held stays, and readers cut it off.
            self.seal_partial(settings, &held, held.end).await?;
            if let Some(part) = held.parts.last_mut()
                && let HeldPart::Open { start, end, .. } = *part
            {
                let segment = SegmentName::holding(held.timeline, start, self.segment_size);
                let name = Spool::timeline_end(segment, end.bytes_since(start), settings.compression);
                *part = HeldPart::Spooled { start, end, name };
            }
        }
        let position = self.segment_size.start_of(switch);
        if position < held.sealed_end {
            return Ok(self.start_on_branch(held.timeline, switch, next).await);
        }
        Ok(Start {
            timeline: next,
            position,
            without_overlap: position,
            sealed_until: position,
            held_end: switch,
            parts: held.parts,
            max_time: held.max_time,
            open_record: held.open_record.filter(|record| *record < position),
        })
    }

    /// What is held of the server's own timeline, where the newest timeline that is held is none of its ancestors: a copy that was
    /// restored and promoted elsewhere may have archived under another number. `None`: what is held newest is on the server's branch,
    /// or nothing is held of its own timeline yet.
    async fn held_beside(
        &self,
        connection: &mut ReplicationConnection,
        server: TimelineId,
        newest: &Held,
    ) -> Result<Option<Held>, ArchiveError> {
        if server == newest.timeline {
            return Ok(None);
        }
        if server < newest.timeline {
            let older =
                |switch| ArchiveError::OlderTimeline { server: server.get(), held: newest.timeline.get(), switch };
            // A number that was given twice is no older timeline, but another one.
            self.refuse_other_chain(connection, server).await?;
            // As long as nobody can tell how the newest came to be, the server may be the one that was left behind.
            let theirs = self.stored_history(newest.timeline).await.ok_or_else(|| older(None))?;
            if let Some((_, switch)) = theirs.range_of(server) {
                return Err(older(switch));
            }
        }
        let Some(history) = self.history(connection, server).await? else { return Ok(None) };
        if history.range_of(newest.timeline).is_some() {
            return Ok(None);
        }
        let spooled = find_in_spool_on(&self.spool, self.system, self.segment_size, Some(server))?.held;
        let asked = self.ask_repositories(Reach::Least, Some(vec![server])).await?.map(|remote| remote.held);
        let known = self.held_remotely.clone().filter(|held| held.timeline == server);
        Ok([spooled, asked, known].into_iter().flatten().max_by_key(|held| held.end))
    }

    /// At the segment with the switch, on the timeline that begins there. The bytes before the switch are compared where they are
    /// held, which may be a repository.
    async fn start_on_branch(&self, ancestor: TimelineId, switch: Lsn, next: TimelineId) -> Start {
        let position = self.segment_size.start_of(switch);
        let segment = SegmentName::holding(ancestor, position, self.segment_size);
        let parts = self.held_segment(segment, &[]).await.map(|held| held.parts).unwrap_or_default();
        let is_whole = parts.last().is_some_and(|part| part.end() >= switch);
        let (max_time, open_record) = self.before(ancestor, position).await;
        Start {
            timeline: next,
            position,
            without_overlap: position,
            sealed_until: position,
            held_end: switch,
            parts: if is_whole { parts } else { Vec::new() },
            max_time,
            open_record: open_record.filter(|record| *record < position),
        }
    }

    fn start_after(&self, held: Held) -> Start {
        let size = self.segment_size.get();
        // At a boundary the last whole segment is asked for again, so that there is something to compare (I7).
        let overlap = if held.end > held.sealed_end {
            held.sealed_end
        } else {
            Lsn::new(held.sealed_end.get().saturating_sub(size))
        };
        let mut position = overlap;
        let open_record = held.open_record.filter(|record| *record < overlap);
        if let Some(record) = open_record
            && !held.parts.iter().any(|part| part.start() <= record && record < part.end())
        {
            // Not at hand: the server has it, most likely.
            position = self.segment_size.start_of(record);
        }
        Start {
            timeline: held.timeline,
            position,
            without_overlap: held.sealed_end,
            sealed_until: held.sealed_end,
            held_end: held.end,
            parts: held.parts,
            max_time: held.max_time,
            open_record: open_record.filter(|record| *record < position),
        }
    }

    /// A held segment was lost from the spool. It is built again; what follows it is compared, and is there already.
    async fn start_at_missing(&self, segment: SegmentName, held: Held) -> Start {
        // Readers search by the highest commit time so far, which must not fall along a branch.
        let (max_time, _) = self.before(held.timeline, segment.start()).await;
        Start {
            timeline: held.timeline,
            position: segment.start(),
            without_overlap: segment.start(),
            sealed_until: segment.start(),
            held_end: held.end,
            parts: held.parts.into_iter().filter(|part| part.start() >= segment.end()).collect(),
            max_time,
            open_record: None,
        }
    }

    /// Changes the start by what the session before met.
    pub(super) async fn by_way(
        &mut self,
        connection: &mut ReplicationConnection,
        mut start: Start,
        settings: &AssemblerSettings,
    ) -> Result<Start, ArchiveError> {
        match self.way.clone() {
            Way::Overlapping => Ok(start),
            // Going on directly behind what is held is possible, but nothing proves that it is the same history.
            Way::WithoutOverlap => {
                let at = match self.comes_after_all(&start).await? {
                    // What was said to be gone is there: see `comes_after_all`.
                    Some(position) if position == start.position => return Ok(start),
                    Some(position) => position,
                    None => return self.start_behind_gap(connection, start, settings, WAL_REMOVED, false).await,
                };
                if start.held_end == at {
                    let message = format!(
                        "the server no longer has the WAL before {at}, so what is held could not be compared with it"
                    );
                    self.board.raise(CauseCode::ContinuityUnproven, message);
                }
                start.position = at;
                Ok(start)
            }
            Way::BehindGap { why, slot_lost } => {
                self.start_behind_gap(connection, start, settings, &why, slot_lost).await
            }
        }
    }
}
