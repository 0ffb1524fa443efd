//! What makes a restored directory recover: settings at the end of `postgresql.auto.conf`, `recovery.signal`, the plan, and, where the
//! server kept its configuration elsewhere, a minimal one.

use std::path::{Path, PathBuf};

use super::RestoreError;
use super::directory::{Directory, InnerPath};
use super::plan::target_settings;
use super::plan_file::PLAN_FILE;
use super::quoting::{config_quoted, restore_command_path};
use super::resolve::Plan;
use crate::wal::SystemIdentifier;

const AUTO_CONF: &str = "postgresql.auto.conf";
/// What `restore` writes when the configuration is not just a file.
pub const RESTORE_TOML: &str = "walden-restore.toml";
/// Bytes that a configuration file may have.
const CONF_BYTES_MAX: u64 = 16 << 20;

/// Settings of an earlier life. `recovery_` covers the targets, `recovery_end_command` and `recovery_min_apply_delay`.
pub(super) const REMOVED: [&str; 4] =
    ["restore_command", "primary_conninfo", "primary_slot_name", "archive_cleanup_command"];
const REMOVED_PREFIX: &str = "recovery_";

/// Whose standbys commits wait for.
const SYNCHRONOUS: &str = "synchronous_standby_names";

/// PostgreSQL's defaults for the settings that must not be lower than the primary's.
const DEFAULTS: [(&str, i64); 5] = [
    ("max_connections", 100),
    ("max_worker_processes", 8),
    ("max_wal_senders", 10),
    ("max_prepared_transactions", 0),
    ("max_locks_per_transaction", 64),
];

const MINIMAL_CONF: &str = "\
# Written by walden restore: the backup has no postgresql.conf, since its server kept it elsewhere (as Debian does).
# Local connections only. Put the real one here, or start with -c config_file=...
listen_addresses = 'localhost'
";
const MINIMAL_HBA: &str = "\
# Written by walden restore: the backup has no pg_hba.conf. Only the operating system's user of the same name may connect.
local   all             all                                     peer
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveMode {
    /// As the backup has it.
    Keep,
    /// The copy does not archive.
    Off,
}

/// Where the settings of Walden come from, for the `restore_command` that PostgreSQL runs in its own environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// A file alone: an absolute path.
    File(PathBuf),
    /// Flags or the environment took part: the effective settings without secrets, to be written into the directory.
    Effective(String),
}

/// How the `restore_command` calls Walden.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// Absolute path of the program.
    pub binary: PathBuf,
    pub config: Option<PathBuf>,
    /// The cluster's name, where no file says it.
    pub cluster: Option<String>,
    /// The repository, where no file says it.
    pub repository: Option<String>,
    pub plan: Option<PathBuf>,
    /// Which one of several under the cluster's name, where no plan says it.
    pub system: Option<SystemIdentifier>,
}

impl CommandLine {
    /// The value of `restore_command`, not yet quoted for the file.
    pub fn restore_command(&self) -> Vec<u8> {
        let mut command = restore_command_path(&self.binary);
        let mut option = |name: &str, value: Option<&Path>| {
            if let Some(value) = value {
                command.extend_from_slice(format!(" {name} ").as_bytes());
                command.extend_from_slice(&restore_command_path(value));
            }
        };
        option("--config", self.config.as_deref());
        option("--cluster", self.cluster.as_deref().map(Path::new));
        option("--repository", self.repository.as_deref().map(Path::new));
        command.extend_from_slice(b" wal-fetch");
        if let Some(plan) = &self.plan {
            command.extend_from_slice(b" --plan ");
            command.extend_from_slice(&restore_command_path(plan));
        }
        if let Some(system) = self.system {
            command.extend_from_slice(format!(" --system-identifier {system}").as_bytes());
        }
        // PostgreSQL fills these in itself: a file name of its own and a path below its data directory.
        command.extend_from_slice(b" %f \"%p\"");
        command
    }
}

/// What `restore` writes beside the backup's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    pub binary: PathBuf,
    pub source: ConfigSource,
    /// The configuration file to start with, outside the data directory.
    pub config_file: Option<PathBuf>,
    pub archive_mode: ArchiveMode,
}

impl Configuration {
    /// The command for a restore into `pgdata`.
    pub fn command_line(&self, pgdata: &Path) -> CommandLine {
        let config = match &self.source {
            ConfigSource::File(path) => path.clone(),
            ConfigSource::Effective(_) => pgdata.join(RESTORE_TOML),
        };
        CommandLine {
            binary: self.binary.clone(),
            config: Some(config),
            cluster: None,
            repository: None,
            plan: Some(pgdata.join(PLAN_FILE)),
            system: None,
        }
    }
}

/// The settings of a plan in the order in which they must stand: name and value.
pub fn settings(
    plan: &Plan,
    command: &CommandLine,
    required: &[(&'static str, i64)],
    archive_mode: ArchiveMode,
) -> Vec<(&'static str, Vec<u8>)> {
    let mut settings: Vec<(&'static str, Vec<u8>)> =
        required.iter().map(|(name, value)| (*name, value.to_string().into_bytes())).collect();
    if archive_mode == ArchiveMode::Off {
        settings.push(("archive_mode", b"off".to_vec()));
        // A copy has no standbys yet: its first commit would wait for them for ever.
        settings.push((SYNCHRONOUS, Vec::new()));
    }
    // A file outside the data directory may set these; a standby's delay would hold up the restore, its commands are not ours.
    settings.push(("recovery_min_apply_delay", b"0".to_vec()));
    settings.push(("recovery_end_command", Vec::new()));
    settings.push(("archive_cleanup_command", Vec::new()));
    settings.push(("restore_command", command.restore_command()));
    let targets = target_settings(plan.stop, plan.timeline, plan.request.action);
    settings.extend(targets.into_iter().map(|(name, value)| (name, value.into_bytes())));
    settings
}

/// Lines for a configuration file.
pub fn configuration_lines(settings: &[(&'static str, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in settings {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b" = ");
        out.extend_from_slice(&config_quoted(value));
        out.push(b'\n');
    }
    out
}

/// The required settings that `files` (in the order in which PostgreSQL reads them) do not reach, with the value to set. Where a file
/// includes others, which may say less, all are set: to what was found here, never to less than is needed.
pub fn raised(required: &[(&'static str, i32)], files: &[&[u8]]) -> Vec<(&'static str, i64)> {
    let unknown = files.is_empty() || files.iter().any(|file| includes_others(file));
    let mut raised = Vec::new();
    for (name, needed) in required {
        let default = DEFAULTS.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value);
        let found = files.iter().rev().find_map(|file| setting(file, name));
        let effective = found.unwrap_or(default);
        let needed = i64::from(*needed);
        if effective < needed || unknown {
            raised.push((*name, effective.max(needed)));
        }
    }
    raised
}

/// The name at the beginning of a line of a configuration file, in lower case, and what follows it.
fn split_line(line: &[u8]) -> Option<(String, &[u8])> {
    let line = line.trim_ascii_start();
    let end =
        line.iter().position(|b| !(b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'$'))).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_ascii_start();
    let value = rest.strip_prefix(b"=").unwrap_or(rest).trim_ascii();
    Some((String::from_utf8_lossy(name).to_ascii_lowercase(), value))
}

/// The last value of a setting in a file, without quotes and comment.
fn text_setting(file: &[u8], name: &str) -> Option<String> {
    let mut lines = file.rsplit(|b| *b == b'\n').filter_map(split_line);
    lines.find(|(found, _)| found == name).map(|(_, value)| {
        let text = String::from_utf8_lossy(value);
        match text.strip_prefix('\'') {
            Some(quoted) => quoted.split('\'').next().unwrap_or_default().to_owned(),
            None => text.split(['#', ' ', '\t']).next().unwrap_or_default().to_owned(),
        }
    })
}

fn setting(file: &[u8], name: &str) -> Option<i64> {
    let text = text_setting(file, name)?;
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// What the user must know of commits that wait for standbys.
fn synchronous_note(files: &[&[u8]], archive_mode: ArchiveMode) -> Option<String> {
    let names =
        files.iter().rev().find_map(|file| text_setting(file, SYNCHRONOUS)).filter(|names| !names.is_empty())?;
    let names = names.replace(char::is_control, " ");
    Some(match archive_mode {
        ArchiveMode::Off => format!(
            "{SYNCHRONOUS} was emptied (it was '{names}'), since commits would wait for servers that do not stream from the copy: set it again once they do"
        ),
        ArchiveMode::Keep => format!(
            "{SYNCHRONOUS} is '{names}': commits wait until these stream from the restored server, or until ALTER SYSTEM SET {SYNCHRONOUS} = '' and a reload"
        ),
    })
}

fn includes_others(file: &[u8]) -> bool {
    let lines = file.split(|b| *b == b'\n').filter_map(split_line);
    lines.into_iter().any(|(name, _)| matches!(name.as_str(), "include" | "include_dir" | "include_if_exists"))
}

/// `postgresql.auto.conf` without the lines of an earlier recovery, and with `block` at its end.
pub(super) fn rewritten(auto_conf: &[u8], block: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(auto_conf.len() + block.len() + 200);
    for line in auto_conf.split_inclusive(|b| *b == b'\n') {
        let removed = split_line(line)
            .is_some_and(|(name, _)| REMOVED.contains(&name.as_str()) || name.starts_with(REMOVED_PREFIX));
        if !removed {
            out.extend_from_slice(line);
        }
    }
    if out.last().is_some_and(|b| *b != b'\n') {
        out.push(b'\n');
    }
    out.extend_from_slice(b"# Written by walden restore. ALTER SYSTEM may change it.\n");
    out.extend_from_slice(block);
    out
}

fn inner(name: &str) -> InnerPath {
    InnerPath::parse(name.as_bytes()).expect("a plain name")
}

/// Writes everything into the directory; gives notes for the user.
pub fn write(directory: &Directory, plan: &Plan, configuration: &Configuration) -> Result<Vec<String>, RestoreError> {
    let mut notes = Vec::new();
    let pgdata = directory.path();
    let io = |what: &'static str, name: &str| RestoreError::io(what, pgdata.join(name));
    let read = |name: &str| directory.read(&inner(name), CONF_BYTES_MAX).map_err(io("read", name));
    let write = |name: &str, bytes: &[u8]| directory.write(&inner(name), bytes).map_err(io("written", name));

    let conf = read("postgresql.conf")?;
    let outside = match &configuration.config_file {
        Some(path) => Some(std::fs::read(path).map_err(RestoreError::io("read", path))?),
        None => None,
    };
    let used = match (&outside, conf) {
        (Some(content), _) => {
            let path = configuration.config_file.as_ref().expect("its content was read");
            notes.push(format!("start it with the option -c config_file={}", path.display()));
            content.clone()
        }
        (None, Some(content)) => {
            if let Some(warning) = leads_elsewhere(&content) {
                notes.push(warning);
            }
            content
        }
        (None, None) => {
            write("postgresql.conf", MINIMAL_CONF.as_bytes())?;
            notes.push(
                "the backup has no postgresql.conf; a minimal one was written (local connections only): put the real one in its place, or use --config-file"
                    .into(),
            );
            MINIMAL_CONF.as_bytes().to_vec()
        }
    };
    if read("pg_hba.conf")?.is_none() && configuration.config_file.is_none() {
        write("pg_hba.conf", MINIMAL_HBA.as_bytes())?;
        notes.push(
            "the backup has no pg_hba.conf; a minimal one was written (local connections of the same user only)".into(),
        );
    }

    let auto_conf = read(AUTO_CONF)?.unwrap_or_default();
    let required = raised(&plan.required_settings, &[&used, &auto_conf]);
    for (name, value) in &required {
        notes.push(format!("{name} was set to {value}, since recovery needs what the archived server had"));
    }
    notes.extend(synchronous_note(&[&used, &auto_conf], configuration.archive_mode));
    let command = configuration.command_line(pgdata);
    let block = configuration_lines(&settings(plan, &command, &required, configuration.archive_mode));
    if let ConfigSource::Effective(toml) = &configuration.source {
        write(RESTORE_TOML, toml.as_bytes())?;
    }
    write(PLAN_FILE, &plan.file.to_json())?;
    write(AUTO_CONF, &rewritten(&auto_conf, &block))?;
    write("recovery.signal", b"")?;
    Ok(notes)
}

/// A configuration file of the backup that points to files of the server it came from.
fn leads_elsewhere(conf: &[u8]) -> Option<String> {
    let lines = conf.split(|b| *b == b'\n').filter_map(split_line);
    let names: Vec<String> = lines
        .map(|(name, _)| name)
        .filter(|name| matches!(name.as_str(), "data_directory" | "hba_file" | "ident_file" | "external_pid_file"))
        .collect();
    if names.is_empty() {
        return None;
    }
    Some(format!("postgresql.conf sets {}: correct it before you start the copy beside its original", names.join(", ")))
}

/// Files that `restore` writes or changes beside those of the backup.
pub fn written_files(configuration: &Configuration) -> Vec<&'static str> {
    let mut files = vec![AUTO_CONF, "recovery.signal", PLAN_FILE];
    if matches!(configuration.source, ConfigSource::Effective(_)) {
        files.push(RESTORE_TOML);
    }
    files
}

#[cfg(test)]
#[path = "configure_tests.rs"]
mod tests;
