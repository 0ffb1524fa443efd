//! `walden list`: backups, timelines and the windows, read from the repository alone.

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::args::ListArgs;
use super::error::{CliError, chain};
use super::output::{Output, clean};
use super::{exit, reading};
use crate::config::Settings;
use crate::repository::{Archive, BackupJson, Catalog, Repository, Window};
use crate::restore::{self, RestoreError};
use crate::wal::{Lsn, PgTime, SystemIdentifier};

pub fn run(settings: &Settings, output: &Output, args: &ListArgs) -> Result<u8, CliError> {
    reading::runtime()?.block_on(async {
        let repositories = reading::open(settings).await?;
        let found = look(&repositories, args.system.system_identifier).await?;
        if output.is_json() {
            output.document(&found.json())?;
        } else {
            output.line(found.text().trim_end())?;
        }
        for complaint in &found.catalog.complaints {
            let what = format!("{} {}", complaint.key, complaint.why);
            output.note(&format!("passed over: {}", what.trim()));
        }
        Ok(exit::DONE)
    })
}

struct Found {
    archive: Archive,
    catalog: Catalog,
    windows: Vec<Window>,
}

/// The first repository that can be read.
async fn look(repositories: &[Repository], system: Option<SystemIdentifier>) -> Result<Found, CliError> {
    let mut passed_over: Vec<(&str, RestoreError)> = Vec::new();
    for repository in repositories {
        let attempt = async {
            let archive = repository.choose(system).await?;
            let catalog = archive.catalog().await?;
            let windows = restore::windows(&archive, &catalog).await?;
            Ok::<_, RestoreError>(Found { archive, catalog, windows })
        };
        match attempt.await {
            Ok(found) => {
                for (name, error) in passed_over {
                    tracing::warn!("repository {name} is passed over: {}", chain(&error));
                }
                return Ok(found);
            }
            Err(error) => passed_over.push((repository.name(), error)),
        }
    }
    match passed_over.into_iter().next() {
        Some((_, first)) => Err(first.into()),
        None => Err(CliError::new(exit::USAGE, "no repository is configured", "configure one")),
    }
}

impl Found {
    /// Until when the timeline that is archived now is complete, where a window reaches it.
    fn complete_until(&self) -> Option<PgTime> {
        let current = self.catalog.current_timeline()?;
        self.windows.iter().rev().find(|window| window.timeline == current)?.to_time
    }

    fn told_beyond(&self) -> Option<Lsn> {
        let branch = self.catalog.history(self.catalog.current_timeline()?)?;
        let end = self.catalog.stretches(&branch).last()?.end();
        self.catalog.told_beyond(&branch, end)
    }

    fn json(&self) -> Value {
        let gaps = self.catalog.open_gaps();
        json!({
            "schema": 1,
            "repository": self.archive.repository().name(),
            "system_identifier": self.archive.system(),
            "backups": self.catalog.backups.iter().map(backup_json).collect::<Vec<_>>(),
            "windows": self.windows.iter().map(reading::window_json).collect::<Vec<_>>(),
            "complete_until": self.complete_until(),
            "timelines": self.timelines(),
            "gaps": gaps.iter().map(|gap| json!({
                "timeline": gap.timeline,
                "from_lsn": gap.from_lsn,
                "to_lsn": gap.to_lsn,
                "since": gap.since,
                "reason": gap.reason,
            })).collect::<Vec<_>>(),
        })
    }

    fn timelines(&self) -> Vec<Value> {
        let timelines = self.catalog.timelines.iter().map(|(timeline, wal)| {
            let history = self.catalog.history(*timeline);
            let parent = history.as_ref().and_then(|history| history.parent());
            let first = wal.runs.first().map(|run| run.start);
            let first = first.into_iter().chain(wal.pieces.keys().next().copied()).min();
            json!({
                "timeline": timeline,
                "parent": parent.map(|parent| parent.timeline),
                "switch_lsn": parent.map(|parent| parent.switch),
                "from_lsn": first,
                "to_lsn": wal.last_byte(),
                "history": history.is_some(),
            })
        });
        timelines.collect()
    }

    fn text(&self) -> String {
        let mut text = format!(
            "cluster {}, system {}, in {} ({})\n\n",
            self.archive.repository().cluster(),
            self.archive.system(),
            self.archive.repository().name(),
            self.archive.url()
        );
        if self.catalog.backups.is_empty() {
            text.push_str("No backups.\n");
        } else {
            let mut table = table(&["backup", "timeline", "start", "consistent from", "size", "stored", "label"]);
            for backup in &self.catalog.backups {
                table.add_row([
                    backup.id.to_string(),
                    backup.timeline.to_string(),
                    backup.start_lsn.to_string(),
                    format!("{} ({})", moment(Some(backup.stop_time)), backup.stop_lsn),
                    size(backup.size_bytes),
                    size(backup.stored_bytes),
                    clean(backup.label.as_deref().unwrap_or_default()),
                ]);
            }
            text.push_str(&format!("{table}\n"));
            for damaged in self.catalog.backups.iter().filter_map(BackupJson::pages_damaged) {
                text.push_str(&format!("\nDAMAGED PAGES: {}\n", clean(&damaged)));
            }
        }
        text.push('\n');
        if self.windows.is_empty() {
            text.push_str("Nothing can be restored yet.\n");
        } else {
            text.push_str("Any moment can be restored:\n");
            let mut table = table(&["timeline", "from", "to", "from LSN", "to LSN"]);
            for window in &self.windows {
                table.add_row([
                    window.timeline.to_string(),
                    moment(window.from_time),
                    moment(window.to_time),
                    window.from_lsn.to_string(),
                    window.to_lsn.to_string(),
                ]);
            }
            text.push_str(&format!("{table}\n"));
        }
        if let Some(told) = self.told_beyond() {
            text.push_str(&format!("\nMISSING WAL: {}\n", reading::missing_wal(told)));
        }
        for gap in self.catalog.open_gaps() {
            text.push_str(&format!(
                "\nGAP on timeline {} from {} to {}, since {}: {}\n",
                gap.timeline,
                gap.from_lsn,
                gap.to_lsn,
                moment(Some(gap.since)),
                clean(&gap.reason)
            ));
        }
        text
    }
}

fn backup_json(backup: &BackupJson) -> Value {
    json!({
        "id": backup.id,
        "kind": backup.kind,
        "timeline": backup.timeline,
        "start_lsn": backup.start_lsn,
        "stop_lsn": backup.stop_lsn,
        "start_time": backup.start_time,
        "stop_time": backup.stop_time,
        "postgres_version": backup.postgres_version,
        "size_bytes": backup.size_bytes,
        "stored_bytes": backup.stored_bytes,
        "parent": backup.parent,
        "label": backup.label,
        "duration_seconds": backup.duration_seconds,
        "checksum_failures": backup.checksum_failures,
    })
}

fn table(heading: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(heading);
    table
}

fn moment(time: Option<PgTime>) -> String {
    time.map_or("unknown".into(), |time| time.to_string())
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}
