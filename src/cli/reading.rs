//! What the commands that read a repository share: opening it, their errors, and the JSON of what they find.

use serde_json::{Value, json};

use super::args::{Action, Point, TargetArgs};
use super::error::{CliError, chain};
use super::exit;
use super::output::{clean, count, size};
use crate::config::Settings;
use crate::daemon;
use crate::repository::{BackupId, Repository, RepositoryError, Window};
use crate::restore::{Plan, Request, RestoreError, Target, TargetAction, parse_target_time, repository_exit_code};
use crate::wal::{CommitMark, Lsn};

/// Windows named in a refusal; the rest is counted.
const WINDOWS_TOLD: usize = 3;

/// A runtime for one command.
pub fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| CliError::from_error(exit::FAILED, &error, "check the limits of this user (ulimit -a)"))
}

/// The configured repositories, in file order. No store is asked anything yet.
pub async fn open(settings: &Settings) -> Result<Vec<Repository>, CliError> {
    let opened = daemon::open_to_read(settings).await;
    opened.map_err(|error| CliError::from_error(error.exit_code(), &error, error.hint()))
}

impl From<RestoreError> for CliError {
    fn from(error: RestoreError) -> Self {
        let code = error.exit_code();
        match &error {
            RestoreError::Unreachable { windows, .. } => {
                let message = format!("{}; {}", chain(&error), told(windows));
                let json: Vec<Value> = windows.iter().map(window_json).collect();
                Self::new(code, message, error.hint()).with_windows(json.into())
            }
            _ => Self::from_error(code, &error, error.hint()),
        }
    }
}

impl From<RepositoryError> for CliError {
    fn from(error: RepositoryError) -> Self {
        Self::from_error(repository_exit_code(&error), &error, error.hint())
    }
}

/// The windows in words, the newest first.
fn told(windows: &[Window]) -> String {
    if windows.is_empty() {
        return "nothing can be restored yet".into();
    }
    let one = |window: &Window| {
        let time = |time: Option<crate::wal::PgTime>| time.map_or("?".into(), |time| time.to_string());
        format!(
            "timeline {} from {} to {} (LSN {} to {})",
            window.timeline,
            time(window.from_time),
            time(window.to_time),
            window.from_lsn,
            window.to_lsn
        )
    };
    let mut text: Vec<String> = windows.iter().rev().take(WINDOWS_TOLD).map(one).collect();
    if windows.len() > WINDOWS_TOLD {
        text.push(format!("and {} more", windows.len() - WINDOWS_TOLD));
    }
    format!("what can be reached: {}", text.join(", "))
}

pub fn window_json(window: &Window) -> Value {
    json!({
        "timeline": window.timeline,
        "from_lsn": window.from_lsn,
        "to_lsn": window.to_lsn,
        "from_time": window.from_time,
        "to_time": window.to_time,
    })
}

/// The target as the restore room takes it.
pub fn request(args: &TargetArgs) -> Result<Request, CliError> {
    let (target, exclusive) = match args.point()? {
        Point::Time { text, exclusive } => {
            (Target::Time(parse_target_time(&text, args.time_zone.as_deref())?), exclusive)
        }
        Point::Lsn { lsn, exclusive } => (Target::Lsn(lsn), exclusive),
        Point::Xid { xid, exclusive } => (Target::Xid(xid), exclusive),
        Point::Name(name) => (Target::Name(name), false),
        Point::Latest => (Target::Latest, false),
        Point::Immediate => (Target::Immediate, false),
    };
    if target == Target::Lsn(Lsn::ZERO) {
        return Err(CliError::new(
            exit::USAGE,
            "LSN 0/0 is no position",
            "take an LSN from `walden list` or PostgreSQL",
        ));
    }
    let backup = args.backup.as_deref().map(BackupId::parse).transpose()?;
    let action = match args.action {
        Action::Promote => TargetAction::Promote,
        Action::Pause => TargetAction::Pause,
        Action::Shutdown => TargetAction::Shutdown,
    };
    Ok(Request { target, exclusive, timeline: args.timeline, backup, action })
}

/// A plan as `restore --dry-run` and `recovery-conf` show it.
pub fn plan_json(plan: &Plan, settings: &[(&'static str, Vec<u8>)], files: &[String]) -> Value {
    let settings: serde_json::Map<String, Value> = settings
        .iter()
        .map(|(name, value)| ((*name).to_string(), String::from_utf8_lossy(value).into_owned().into()))
        .collect();
    let required: serde_json::Map<String, Value> =
        plan.required_settings.iter().map(|(name, value)| ((*name).to_string(), (*value).into())).collect();
    json!({
        "schema": 1,
        "system_identifier": plan.archive.system(),
        "repository": plan.archive.repository().name(),
        "backup": plan.backup.id,
        "timeline": plan.timeline,
        "last_kept": plan.last_kept,
        "first_left_out": plan.first_left_out,
        "wal": { "segments": plan.wal.segment_count(plan.segment_size), "bytes": plan.wal.bytes() },
        "settings": settings,
        "required_settings": required,
        "files": files,
    })
}

/// WAL that the archive tells of and does not have.
pub fn missing_wal(told: Lsn) -> String {
    format!("coverage.json tells of WAL through {told}, and not all of it is here: it was lost, or never came")
}

/// A plan in words, line by line.
pub fn plan_lines(plan: &Plan) -> Vec<String> {
    let mark = |mark: Option<CommitMark>| match mark {
        Some(mark) => format!("{} (transaction {}, LSN {})", mark.time, mark.xid, mark.lsn),
        None => "none held".into(),
    };
    let mut lines = vec![
        format!("target: {} on timeline {}", plan.request.target, plan.timeline),
        format!("from: repository {} ({})", plan.archive.repository().name(), plan.archive.url()),
        format!(
            "backup: {} ({} to {}, {} in {})",
            plan.backup.id,
            plan.backup.start_lsn,
            plan.backup.stop_lsn,
            size(plan.backup.size_bytes),
            count(plan.backup.volumes.len(), "volume")
        ),
        format!("WAL: {}, {}", count(plan.wal.segment_count(plan.segment_size), "segment"), size(plan.wal.bytes())),
    ];
    if !plan.beside.is_empty() {
        let others: Vec<String> = plan.beside.iter().map(ToString::to_string).collect();
        lines.push(format!("another branch is archived as well: --timeline {} restores along it", others.join(" or ")));
    }
    if plan.last_kept.is_some() || plan.first_left_out.is_some() {
        lines.push(format!("last commit or abort kept: {}", mark(plan.last_kept)));
        lines.push(format!("first left out: {}", mark(plan.first_left_out)));
    }
    if let Some(told) = plan.told_beyond {
        lines.push(format!("MISSING WAL: {}; another repository may have it (--repository)", missing_wal(told)));
    }
    if let Some(damaged) = plan.backup.pages_damaged() {
        lines.push(format!("DAMAGED PAGES: {}; --backup ID takes another backup", clean(&damaged)));
    }
    lines
}
