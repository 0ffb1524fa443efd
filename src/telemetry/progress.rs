//! Dates positions in the WAL by the server's clock.

use std::collections::VecDeque;
use std::time::Duration;

use crate::wal::{Lsn, PgTime, SegmentSize};

/// Samples kept at most. Asked every two seconds this is more than two hours of a busy server; beyond that the older half
/// is thinned, so that the oldest sample stays and an outage of days is still dated, more and more coarsely.
const SAMPLES_MAX: usize = 4096;

/// The server's flush position stood at `flush` from `first` to `last` at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    first: PgTime,
    last: PgTime,
    flush: Lsn,
}

/// The server's flush position over time: pairs of a server time t and a flush position F that was asked for *after* t was
/// noted. So every commit acknowledged before t lies before F.
///
/// Keepalives and streamed messages must not be fed: they carry the position that was sent, which may be behind.
#[derive(Clone, Debug, Default)]
pub struct FlushSamples {
    samples: VecDeque<Sample>,
    /// The agent's monotonic time when the last sample was noted.
    noted: Option<Duration>,
}

impl FlushSamples {
    /// A position below the last one belongs to another history of the server (a rewind, another timeline): what was noted
    /// before says nothing about it and is forgotten. When the server's clock was set back, the times after `server_time` come
    /// a second time, with later positions: they date nothing any more and are cut off.
    pub fn note(&mut self, server_time: PgTime, flush: Lsn, monotonic: Duration) {
        self.noted = Some(monotonic);
        if self.samples.back().is_some_and(|last| flush < last.flush) {
            self.samples.clear();
        }
        while let Some(last) = self.samples.back_mut()
            && server_time < last.last
        {
            if last.first <= server_time {
                last.last = server_time;
            } else {
                self.samples.pop_back();
            }
        }
        match self.samples.back_mut() {
            // An idle server costs one sample, not one every few seconds.
            Some(last) if last.flush == flush => last.last = server_time,
            _ => self.samples.push_back(Sample { first: server_time, last: server_time, flush }),
        }
        if self.samples.len() > SAMPLES_MAX {
            self.thin();
        }
    }

    /// Drops every second sample of the older half, never the oldest.
    fn thin(&mut self) {
        let half = self.samples.len() / 2;
        let mut at = 0;
        self.samples.retain(|_| {
            at += 1;
            at > half || at % 2 == 1
        });
    }

    /// The last position seen.
    pub fn flush(&self) -> Option<Lsn> {
        self.samples.back().map(|sample| sample.flush)
    }

    /// Time since the last sample was noted.
    pub fn age(&self, monotonic: Duration) -> Option<Duration> {
        self.noted.map(|noted| monotonic.saturating_sub(noted))
    }

    /// The server's time now: its last known time carried on by the agent's monotonic clock. The round trip of the question
    /// is not known and not corrected, so it is late by that much at most.
    pub fn server_time(&self, monotonic: Duration) -> Option<PgTime> {
        let elapsed = self.age(monotonic)?;
        let micros = i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX);
        self.samples.back().map(|last| PgTime::from_pg_micros(last.last.pg_micros().saturating_add(micros)))
    }

    /// The largest sampled time whose flush position is at or before `held`: every commit acknowledged before it is held.
    pub fn complete_until(&self, held: Lsn) -> Option<PgTime> {
        let after = self.samples.partition_point(|sample| sample.flush <= held);
        after.checked_sub(1).map(|at| self.samples[at].last)
    }

    /// A time after which the byte at `position` was written, so that an age counted from it is never too low, and too high by
    /// the time between two samples at most. A byte older than the oldest sample (a backlog found at start) cannot be dated:
    /// then it is that sample's time, and the age is a lower bound that grows.
    pub fn written_after(&self, position: Lsn) -> Option<PgTime> {
        self.complete_until(position).or_else(|| self.samples.front().map(|oldest| oldest.first))
    }

    /// When the server was first seen at or past `position`. `None` if it was not seen there yet.
    pub fn reached(&self, position: Lsn) -> Option<PgTime> {
        let at = self.samples.partition_point(|sample| sample.flush < position);
        self.samples.get(at).map(|sample| sample.first)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.samples.len()
    }
}

/// A sample older than this proves nothing any more.
pub const FRESH: Duration = Duration::from_secs(30);

/// What the agent holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    pub received: Option<Lsn>,
    pub archived: Option<Lsn>,
    pub segment_size: Option<SegmentSize>,
}

/// How far the repositories are behind the server. `None` is unknown.
///
/// Without a fresh sample the server may have gone on unseen: 0 cannot be claimed then, but bytes that are known to wait are
/// still told, as a lower bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// The server's last known position, while it is fresh.
    pub server: Option<Lsn>,
    /// Time since the server's position was last learned; `None` if it never was.
    pub sample_age: Option<Duration>,
    pub complete_until: Option<PgTime>,
    /// WAL not archived in segments that the server has completed.
    pub lag_bytes: Option<u64>,
    /// Age of the oldest such byte by the server's clock.
    pub lag_seconds: Option<f64>,
    /// Time since the server completed the oldest segment that is not archived. Unlike `lag_seconds` it does not count the
    /// time that a quiet server needed to fill the segment, during which nothing could be shipped.
    pub lag_waiting_seconds: Option<f64>,
    /// All WAL not archived, the open segment included.
    pub rpo_bytes: Option<u64>,
    pub rpo_seconds: Option<f64>,
    /// How long ago the server was first seen past `received`, 0 if it was not.
    pub unreceived_seconds: Option<f64>,
}

pub fn measure(samples: &FlushSamples, held: &Held, monotonic: Duration) -> Distance {
    let sample_age = samples.age(monotonic);
    let fresh = sample_age.is_some_and(|age| age <= FRESH);
    // What was received was flushed by the server before, so it is known to be there even if no sample says so yet.
    let known_end = samples.flush().max(held.received);
    let server_time = samples.server_time(monotonic);
    let seconds_since = |time: Option<PgTime>| Some(server_time?.seconds_since(time?));
    let missing = |end: Option<Lsn>| {
        let bytes = end?.bytes_since(held.archived?);
        (fresh || bytes > 0).then_some(bytes)
    };
    let age = |bytes: Option<u64>| match (bytes?, held.archived?) {
        (0, _) => Some(0.0),
        (_, archived) => seconds_since(samples.written_after(archived)),
    };

    let rpo_bytes = missing(known_end);
    let lag_bytes = held.segment_size.and_then(|size| missing(known_end.map(|end| size.start_of(end))));
    let lag_waiting_seconds = match (lag_bytes, held.archived, held.segment_size) {
        (Some(0), ..) => Some(0.0),
        (Some(_), Some(archived), Some(size)) => {
            let segment_end = size.start_of(archived).checked_add(size.get());
            // Not seen past it by a sample yet: the stream was quicker, so it has only just been completed.
            seconds_since(segment_end.and_then(|end| samples.reached(end))).or(Some(0.0))
        }
        _ => None,
    };
    let unreceived = held.received.and_then(|received| samples.reached(received.checked_add(1)?));
    Distance {
        server: known_end.filter(|_| fresh),
        sample_age,
        complete_until: held.archived.and_then(|archived| samples.complete_until(archived)),
        lag_bytes,
        lag_seconds: age(lag_bytes),
        lag_waiting_seconds,
        rpo_bytes,
        rpo_seconds: age(rpo_bytes),
        unreceived_seconds: held.received.map(|_| seconds_since(unreceived).unwrap_or(0.0)),
    }
}
