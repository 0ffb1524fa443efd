//! `walden status`: asks the running agent and shows what it knows.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::error::CliError;
use super::output::{Output, clean, count, size};
use super::{exit, http};
use crate::config::Settings;
use crate::telemetry::{CauseCode, Clock, LastBackupJson, StatusJson, SystemClock};
use crate::wal::PgTime;

/// A healthy agent answers at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// 0 healthy, 1 not. No agent is an answer too, with the cause `agent_unreachable` and everything else unknown.
pub fn run(settings: &Settings, output: &Output) -> Result<u8, CliError> {
    let now = SystemClock::new().wall();
    let document = ask(settings).unwrap_or_else(|why| {
        serde_json::to_value(StatusJson::unreachable(why, now)).expect("plain data becomes JSON")
    });
    let healthy = document.get("healthy").and_then(Value::as_bool) == Some(true);
    if output.is_json() {
        // As the agent sent it: a newer agent may say more than this release knows.
        output.document(&document)?;
    } else {
        let status = StatusJson::deserialize(&document).map_err(|error| {
            CliError::from_error(
                exit::FAILED,
                &error,
                "the agent has another version; use --json, or the agent's own `walden`",
            )
        })?;
        output.line(render(&status, &settings.archive.cluster, now).trim_end())?;
    }
    Ok(if healthy { exit::DONE } else { exit::FAILED })
}

/// `Err` is the message of the cause.
fn ask(settings: &Settings) -> Result<Value, String> {
    let Some(listen) = &settings.metrics.listen else {
        return Err(
            "the settings have metrics.listen = \"\", so the agent cannot be asked; set it to an address".into()
        );
    };
    let hint = "start `walden run`, or give the agent's address with --listen";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let body = runtime
        .block_on(http::get(listen, "/status", PATIENCE))
        .map_err(|error| format!("no agent answers at {listen}: {error}; {hint}"))?;
    let document: Value = serde_json::from_str(&body).unwrap_or_default();
    if document.get("healthy").is_some_and(Value::is_boolean) {
        Ok(document)
    } else {
        Err(format!("what answers at {listen} is no Walden agent; {hint}"))
    }
}

/// What a tired person needs first stands first: whether it is well, and if not, why.
fn render(status: &StatusJson, cluster: &str, now: PgTime) -> String {
    let mut page = Page::default();
    page.headline(status, now);
    if status.causes.iter().any(|cause| cause.code == CauseCode::AgentUnreachable.as_str()) {
        return page.text; // all else is unknown
    }
    let system = status.system_identifier.map_or("unknown".into(), |id| id.to_string());
    page.row("cluster", format!("{cluster}, system {system}, timeline {}", or_unknown(status.timeline)));
    page.row("server at", or_unknown(status.server_lsn));
    page.row("received", or_unknown(status.received_lsn));
    page.row("on disk", or_unknown(status.durable_lsn));
    page.row("archived", or_unknown(status.archived_lsn));
    page.row("not archived", behind(status.rpo_bytes, status.rpo_seconds));
    page.row("  in complete segments", behind(status.lag_bytes, status.lag_seconds));
    page.row("complete until", moment(status.complete_until, now));
    if let Some(lsn) = status.diverged {
        page.row("diverged", format!("from {lsn} on the server has another history"));
    }
    for gap in &status.gaps {
        let range = format!("{} to {} on timeline {}", gap.from_lsn, gap.to_lsn, gap.timeline);
        page.row("gap", format!("{range}, since {}: {}", moment(Some(gap.since), now), gap.reason));
    }
    let slot = &status.slot;
    let retained = slot.retained_bytes.map_or("unknown".into(), size);
    let wal_status = or_unknown(slot.wal_status.as_ref());
    let restart = or_unknown(slot.restart_lsn);
    page.row("slot", format!("{}, from {restart}, {wal_status}, keeps {retained}", or_unknown(slot.name.as_ref())));
    let queued = match (status.queue.segments, status.queue.bytes) {
        (Some(0), _) => "empty".into(),
        (Some(segments), Some(bytes)) => format!("{}, {}", count(segments, "segment"), size(bytes)),
        _ => "unknown".into(),
    };
    page.row("queue", queued);
    for repository in &status.repositories {
        let archived = or_unknown(repository.archived_lsn);
        page.row("repository", format!("{} ({}), archived {archived}", repository.name, repository.url));
        if let Some(error) = &repository.last_error {
            page.row("  last error", error.clone());
        }
    }
    page.row("last backup", backup(status.last_backup.as_ref(), now));
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn headline(&mut self, status: &StatusJson, now: PgTime) {
        self.text.push_str(if status.healthy { "healthy\n" } else { "NOT HEALTHY\n" });
        for cause in &status.causes {
            let since = moment(Some(cause.since), now);
            self.text.push_str(&format!("  {} since {since}\n    {}\n", clean(&cause.code), clean(&cause.message)));
        }
        self.text.push('\n');
    }

    fn row(&mut self, name: &str, value: String) {
        self.text.push_str(&format!("{name:<22} {}\n", clean(&value)));
    }
}

fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or("unknown".into(), |value| value.to_string())
}

fn behind(bytes: Option<u64>, seconds: Option<f64>) -> String {
    match (bytes, seconds) {
        (Some(0), _) => "nothing".into(),
        (Some(bytes), Some(seconds)) => format!("{}, the oldest is {} old", size(bytes), span(seconds)),
        (Some(bytes), None) => size(bytes),
        (None, _) => "unknown".into(),
    }
}

fn moment(time: Option<PgTime>, now: PgTime) -> String {
    match time {
        Some(time) => format!("{:.0} ({} ago)", time.to_timestamp(), span(now.seconds_since(time))),
        None => "unknown".into(),
    }
}

/// The two largest units at most.
fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64; // saturates, and a fraction of a second does not matter here
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

fn backup(backup: Option<&LastBackupJson>, now: PgTime) -> String {
    let Some(backup) = backup else { return "none known".into() };
    let sizes = format!("{} ({} stored)", size(backup.size_bytes), size(backup.stored_bytes));
    format!("{}, ended {}, {sizes}", backup.id, moment(Some(backup.stop_time), now))
}

#[cfg(test)]
mod tests;
