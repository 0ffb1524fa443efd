//! Where a session begins: behind what is held, with an overlap to compare (I7), on the timeline that the server names (I10).

use super::ArchiveError;
use super::assembler::AssemblerSettings;
use super::held::{Held, HeldPart, Reach, find_in_spool_on};
use super::live::{Live, Way};
use crate::postgres::{ReplicationConnection, SystemInfo};
use crate::spool::Spool;
use crate::wal::{Lsn, PAGE_SIZE, PgTime, SegmentName, TimelineHistory, TimelineId};

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
            if held.closed && self.is_left_behind(&held).await {
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
            let history = self.history(connection, info.timeline).await?;
            return self.start_after(held, history.as_ref()).await;
        }
        let history = self.history(connection, info.timeline).await?.ok_or_else(other_branch)?;
        let Some((_, Some(switch))) = history.range_of(held.timeline) else {
            // A copy that was restored and promoted elsewhere: what is held of the branch that it left is gone on with.
            let common = self.newest_common(&history).await?;
            let (ancestor, switch) = common.ok_or_else(other_branch)?;
            let next = history.timeline_at(switch);
            tracing::warn!(held = %held.timeline, from = %ancestor, to = %next, at = %switch, "the server is on another branch");
            self.seal_partial(settings, &held, held.end).await?;
            return self.start_on_branch(ancestor, switch, &history).await;
        };
        self.forget_archived(held.timeline).await;
        let lost = self.missing.first(held.timeline).filter(|segment| segment.end() <= held.sealed_end.min(switch));
        if let Some(segment) = lost {
            tracing::warn!(%segment, "fetching a lost segment of the timeline before again");
            return Ok(self.start_at_missing(segment, held).await);
        }
        if held.end < switch {
            return self.start_after(held, Some(&history)).await;
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
            return self.start_on_branch(held.timeline, switch, &history).await;
        }
        let start = Start {
            timeline: next,
            position,
            without_overlap: position,
            sealed_until: position,
            held_end: switch,
            parts: held.parts,
            max_time: held.max_time,
            open_record: held.open_record.filter(|record| *record < position),
        };
        self.prove_overlap(&start, &history).await?;
        Ok(start)
    }

    /// The stream of a new timeline compares from the start of the segment with the switch. Where that is nothing, or next to nothing,
    /// what lies before is compared beside it.
    async fn prove_overlap(&self, start: &Start, history: &TimelineHistory) -> Result<(), ArchiveError> {
        let switch = start.held_end;
        let first = start.parts.iter().map(HeldPart::start).find(|part| *part >= start.position);
        let overlap = first.map_or(0, |first| switch.bytes_since(first));
        if overlap >= PAGE_SIZE as u64 {
            return Ok(());
        }
        // What the stream does not compare of the switch's own segment comes first.
        let end = if overlap == 0 { switch } else { start.position };
        let before = history.timeline_at(Lsn::new(end.get().saturating_sub(1)));
        let is_proven = self.prove_before(before, end, &start.parts).await?;
        // A copy that was restored has no WAL from before the segment with the switch: then the little that is compared must do.
        if !is_proven && overlap == 0 {
            self.tell_unproven(switch);
        }
        Ok(())
    }

    /// Whether a timeline is known that left this one where it was closed: a server that is on it still was left behind.
    async fn is_left_behind(&self, held: &Held) -> bool {
        if self.histories_spooled.keys().any(|newer| *newer > held.timeline) {
            return true;
        }
        // A new process has spooled none yet.
        self.stored_histories().await.iter().any(|history| leaves_at(history, held))
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
    async fn start_on_branch(
        &self,
        ancestor: TimelineId,
        switch: Lsn,
        history: &TimelineHistory,
    ) -> Result<Start, ArchiveError> {
        let position = self.segment_size.start_of(switch);
        let segment = SegmentName::holding(ancestor, position, self.segment_size);
        let parts = self.held_segment(segment, &[]).await.map(|held| held.parts).unwrap_or_default();
        let is_whole = parts.last().is_some_and(|part| part.end() >= switch);
        let (max_time, open_record) = self.before(ancestor, position).await;
        let start = Start {
            timeline: history.timeline_at(switch),
            position,
            without_overlap: position,
            sealed_until: position,
            held_end: switch,
            parts: if is_whole { parts } else { Vec::new() },
            max_time,
            open_record: open_record.filter(|record| *record < position),
        };
        self.prove_overlap(&start, history).await?;
        Ok(start)
    }

    /// Behind what is held, with an overlap of a page at least (I7): less than that, a page header and a record without a time, may be
    /// the same in two histories. At the beginning of a segment the whole one before it is asked for again.
    async fn start_after(&self, held: Held, history: Option<&TimelineHistory>) -> Result<Start, ArchiveError> {
        let is_short = held.end.bytes_since(held.sealed_end) < PAGE_SIZE as u64;
        let last = Lsn::new(held.sealed_end.get().saturating_sub(1));
        let before = history.map_or(held.timeline, |history| history.timeline_at(last));
        let mut parts = held.parts;
        let mut overlap = held.sealed_end;
        if is_short && before == held.timeline {
            let segment = SegmentName::holding(before, last, self.segment_size);
            if self.put_before(&mut parts, segment).await? {
                overlap = segment.start();
            }
        } else if is_short {
            // The server has no segment of this timeline there. What can be proven was proven when the timeline began.
            self.prove_before(before, held.sealed_end, &parts).await?;
        }
        let mut position = overlap;
        let open_record = held.open_record.filter(|record| *record < overlap);
        if let Some(record) = open_record
            && !parts.iter().any(|part| part.start() <= record && record < part.end())
        {
            // Not at hand: the server has it, most likely.
            position = self.segment_size.start_of(record);
        }
        Ok(Start {
            timeline: held.timeline,
            position,
            without_overlap: held.sealed_end,
            sealed_until: held.sealed_end,
            held_end: held.end,
            parts,
            max_time: held.max_time,
            open_record: open_record.filter(|record| *record < position),
        })
    }

    /// Adds what is held of the segment before the parts, which the spool may have let go. False if there is nothing to compare.
    async fn put_before(&self, parts: &mut Vec<HeldPart>, segment: SegmentName) -> Result<bool, ArchiveError> {
        if parts.iter().any(|part| part.start() <= segment.start()) {
            return Ok(true);
        }
        let held = self.held_segment(segment, parts).await?;
        let is_held = held.end == segment.end();
        if is_held {
            parts.splice(0..0, held.parts);
        } else if !held.is_known {
            self.tell_unproven(segment.end());
        }
        Ok(is_held)
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

    /// Goes on where the WAL was seen to come from: with the overlap, or without.
    pub(super) fn start_at(&self, start: Start, position: Lsn) -> Start {
        if position != start.position && start.held_end.bytes_since(position) < PAGE_SIZE as u64 {
            self.tell_unproven(position);
        }
        Start { position, ..start }
    }

    /// Changes the start by what the session before met.
    pub(super) async fn by_way(
        &mut self,
        connection: &mut ReplicationConnection,
        start: Start,
        settings: &AssemblerSettings,
    ) -> Result<Start, ArchiveError> {
        match self.way.clone() {
            Way::Overlapping => Ok(start),
            // Going on directly behind what is held is possible, but nothing proves that it is the same history.
            Way::WithoutOverlap => match self.comes_after_all(&start).await? {
                Some(position) => Ok(self.start_at(start, position)),
                None => self.start_behind_gap(connection, start, settings, WAL_REMOVED, false).await,
            },
            Way::BehindGap { why, slot_lost } => {
                self.start_behind_gap(connection, start, settings, &why, slot_lost).await
            }
        }
    }
}

/// Whether a history leaves the timeline of what is held in its last part.
fn leaves_at(history: &TimelineHistory, held: &Held) -> bool {
    let left = history.range_of(held.timeline).and_then(|(_, switch)| switch);
    left.is_some_and(|switch| held.sealed_end <= switch && switch <= held.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_part_was_left_by_the_history_that_switches_in_it() {
        let held = |timeline| Held {
            timeline: TimelineId::new(timeline).unwrap(),
            sealed_end: Lsn::new(0x200_0000),
            end: Lsn::new(0x208_0000),
            parts: Vec::new(),
            closed: true,
            max_time: None,
            open_record: None,
        };
        let history = |content: &str| TimelineHistory::parse(TimelineId::new(4).unwrap(), content.as_bytes()).unwrap();
        assert!(leaves_at(&history("1\t0/2080000\tx\n"), &held(1)));
        assert!(leaves_at(&history("1\t0/2000000\tx\n2\t0/3000000\tx\n"), &held(1)), "more was held than is history");
        assert!(!leaves_at(&history("1\t0/1080000\tx\n"), &held(1)), "a copy that was restored to an earlier moment");
        assert!(
            !leaves_at(&history("1\t0/2080000\tx\n"), &held(2)) && !leaves_at(&history("1\t0/2080000\tx\n"), &held(4))
        );
    }
}
