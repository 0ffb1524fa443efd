use std::time::Duration;

use super::cause::CauseCode;
use super::progress::FRESH;
use super::snapshot::Snapshot;

/// When to call something an alarm. `None` = never.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AlertSettings {
    /// How long a completed segment may wait for the repositories.
    pub lag: Option<Duration>,
    /// WAL in completed segments that is not archived.
    pub lag_bytes: Option<u64>,
    /// Age of the oldest byte that is not archived.
    pub rpo: Option<Duration>,
    /// WAL that the server keeps for the slot.
    pub slot_retained_bytes: Option<u64>,
}

/// What follows for a cause. A cause without a verdict stays as it is: what is unknown neither raises nor clears an alarm.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Raise {
        code: CauseCode,
        message: String,
        /// False in the first seconds after connecting, when it is too early to call an unknown position an error.
        settled: bool,
    },
    Clear(CauseCode),
}

/// Compares what is known with the thresholds, and demands proof of progress (I19): `lag` is raised as well while a
/// position is unknown although the agent is connected, and while receiving stands still behind the server.
pub fn evaluate(snapshot: &Snapshot, settings: &AlertSettings) -> Vec<Verdict> {
    [lag(snapshot, settings), rpo(snapshot, settings), slot_retention(snapshot, settings)]
        .into_iter()
        .flatten()
        .collect()
}

fn lag(snapshot: &Snapshot, settings: &AlertSettings) -> Option<Verdict> {
    let raise = |message, settled| Some(Verdict::Raise { code: CauseCode::Lag, message, settled });
    let distance = &snapshot.distance;
    let too_long = over_time(distance.lag_waiting_seconds, settings.lag);
    let too_much = over_bytes(distance.lag_bytes, settings.lag_bytes);
    if too_long.is_some() || too_much.is_some() {
        let which = too_long.into_iter().chain(too_much).collect::<Vec<_>>().join(" and ");
        return raise(
            format!(
                "completed WAL waits for the repositories: {which}; see the repositories' last errors, or raise the limit"
            ),
            true,
        );
    }
    if let Some(connected_for) = snapshot.connected_for {
        let settled = connected_for > FRESH;
        if distance.server.is_none() {
            let why = match distance.sample_age {
                Some(age) => format!("the server's flush position was last seen {} s ago", age.as_secs()),
                None => "the server's flush position is not known yet".into(),
            };
            return raise(format!("progress is not proven: {why}; see the log for why it cannot be asked"), settled);
        }
        if let Some(unknown) = unknown_position(snapshot) {
            return raise(format!("progress is not proven: the {unknown} position is not known yet"), settled);
        }
        let behind = distance.unreceived_seconds.is_some_and(|seconds| seconds > FRESH.as_secs_f64());
        if behind && snapshot.received_still_for > FRESH {
            let still = snapshot.received_still_for.as_secs();
            return raise(
                format!(
                    "nothing has been received for {still} s although the server has more; see the other causes and the log"
                ),
                true,
            );
        }
    }
    let known = distance.server.is_some() && unknown_position(snapshot).is_none();
    known.then_some(Verdict::Clear(CauseCode::Lag))
}

fn unknown_position(snapshot: &Snapshot) -> Option<&'static str> {
    [("received", snapshot.received), ("durable", snapshot.durable), ("archived", snapshot.archived)]
        .into_iter()
        .find_map(|(name, position)| position.is_none().then_some(name))
}

fn rpo(snapshot: &Snapshot, settings: &AlertSettings) -> Option<Verdict> {
    let Some(limit) = settings.rpo else { return Some(Verdict::Clear(CauseCode::Rpo)) };
    let age = snapshot.distance.rpo_seconds;
    match over_time(age, Some(limit)) {
        Some(which) => Some(Verdict::Raise {
            code: CauseCode::Rpo,
            message: format!(
                "the oldest WAL that only this host has is too old: {which}; see the repositories' last errors, or set archive.tail_interval lower"
            ),
            settled: true,
        }),
        None => age.map(|_| Verdict::Clear(CauseCode::Rpo)),
    }
}

fn slot_retention(snapshot: &Snapshot, settings: &AlertSettings) -> Option<Verdict> {
    let Some(limit) = settings.slot_retained_bytes else { return Some(Verdict::Clear(CauseCode::SlotRetention)) };
    let retained = snapshot.slot.retained_bytes;
    match over_bytes(retained, Some(limit)) {
        Some(which) => Some(Verdict::Raise {
            code: CauseCode::SlotRetention,
            message: format!(
                "the server keeps WAL for slot \"{}\": {which}; watch the free space of its WAL directory and find out what stops the archiving",
                snapshot.slot_name
            ),
            settled: true,
        }),
        None => retained.map(|_| Verdict::Clear(CauseCode::SlotRetention)),
    }
}

fn over_time(seconds: Option<f64>, limit: Option<Duration>) -> Option<String> {
    let (seconds, limit) = (seconds?, limit?);
    (seconds >= limit.as_secs_f64()).then(|| format!("{seconds:.0} s (limit {} s)", limit.as_secs_f64()))
}

fn over_bytes(bytes: Option<u64>, limit: Option<u64>) -> Option<String> {
    let (bytes, limit) = (bytes?, limit?);
    let readable = |bytes| bytesize::ByteSize::b(bytes).display().iec().to_string();
    (bytes >= limit).then(|| format!("{} (limit {})", readable(bytes), readable(limit)))
}
