//! `walden restore`: a data directory as it was at a target, ready to start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::args::{ArchiveMode, RestoreArgs};
use super::error::CliError;
use super::output::{Output, clean};
use super::{exit, reading};
use crate::config::{Settings, StoreSettings};
use crate::restore::{
    self, ConfigSource, Configuration, FetchProgress, Plan, RestoreOptions, StartOptions, TablespaceMap,
};

/// Between two lines about the progress, where no terminal shows a bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub fn run(settings: &Settings, output: &Output, args: &RestoreArgs) -> Result<u8, CliError> {
    let request = reading::request(&args.target)?;
    let pgdata = absolute(&args.pgdata)?;
    let configuration = configuration(settings, args)?;
    refuse_own_places(settings, &pgdata)?;
    if !args.dry_run {
        restore::refuse_occupied(&pgdata, args.force)?;
    }
    reading::runtime()?.block_on(async {
        let repositories = reading::open(settings).await?;
        let plan = restore::plan(&repositories, args.system.system_identifier, &request).await?;
        let command = configuration.command_line(&pgdata);
        let shown = restore::settings(&plan, &command, &[], configuration.archive_mode);
        let files: Vec<String> =
            restore::written_files(&configuration).iter().map(|file| pgdata.join(file).display().to_string()).collect();
        let options = options(settings, args, &pgdata);
        if args.dry_run {
            if output.is_json() {
                output.document(&reading::plan_json(&plan, &shown, &files))?;
            } else {
                output.line(&plan_lines(&plan, &options)?.join("\n"))?;
            }
            return Ok(exit::DONE);
        }
        let bin = match args.start {
            true => Some(restore::check_can_start(plan.backup.postgres_version / 10_000)?),
            false => None,
        };
        // The plan is told when it will be carried out, not in front of a refusal.
        restore::check_places(&plan, &options)?;
        for line in plan_lines(&plan, &options)? {
            output.note(&line);
        }
        fetch(&plan, settings, output, &options, &configuration).await?;
        if let Some(bin) = bin {
            start(&plan, output, &pgdata, bin, args).await?;
        }
        if output.is_json() {
            output.document(&reading::plan_json(&plan, &shown, &files))?;
        }
        Ok(exit::DONE)
    })
}

/// The plan, and what is written outside of the data directory.
fn plan_lines(plan: &Plan, options: &RestoreOptions) -> Result<Vec<String>, CliError> {
    let mut lines = reading::plan_lines(plan);
    for (location, place) in restore::tablespaces(plan, &options.tablespaces)? {
        let place = place.display().to_string();
        lines.push(match location == place {
            true => format!("tablespace: {}", clean(&place)),
            false => format!("tablespace: {}, at {} in the backup", clean(&place), clean(&location)),
        });
    }
    Ok(lines)
}

fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|error| {
        CliError::from_error(
            exit::USAGE,
            &error,
            format!("give --pgdata an absolute path instead of {}", path.display()),
        )
    })
}

/// With `--force` a repository given as the directory would be renamed, and nothing could be restored any more.
fn refuse_own_places(settings: &Settings, pgdata: &Path) -> Result<(), CliError> {
    let local = settings.repositories.iter().filter_map(|repository| match &repository.store {
        StoreSettings::Local { path } => Some((format!("the repository \"{}\"", repository.name), path)),
        StoreSettings::S3(_) => None,
    });
    let own = [("the spool".to_owned(), &settings.spool.path), ("the state".to_owned(), &settings.state.path)];
    let wanted = real(pgdata);
    for (what, path) in local.chain(own).filter(|(_, path)| path.exists()) {
        let path = real(path);
        if wanted.starts_with(&path) || path.starts_with(&wanted) {
            return Err(CliError::new(
                exit::USAGE,
                format!("{} and {what} at {} lie in each other", pgdata.display(), path.display()),
                "give --pgdata another directory",
            ));
        }
    }
    Ok(())
}

/// Without links and dots, as far as it is there.
fn real(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    match found {
        // Only parts, so that no slash is added where nothing follows.
        Some((above, mut real)) => {
            real.extend(path.strip_prefix(above).into_iter().flat_map(Path::components));
            real
        }
        None => path.to_owned(),
    }
}

/// How PostgreSQL's `restore_command` will find this program and its settings.
pub fn config_source(settings: &Settings) -> ConfigSource {
    match &settings.file {
        Some(file) if settings.is_from_file_alone() => {
            ConfigSource::File(std::path::absolute(file).unwrap_or_else(|_| file.clone()))
        }
        _ => ConfigSource::Effective(settings.to_restore_toml()),
    }
}

/// This program, for `restore_command`.
pub fn own_binary() -> Result<PathBuf, CliError> {
    let hint = "run walden by a path that stays, such as /usr/local/bin/walden";
    let path = std::env::current_exe().map_err(|error| CliError::from_error(exit::FAILED, &error, hint))?;
    if path.is_file() {
        return Ok(path);
    }
    Err(CliError::new(exit::FAILED, format!("this program is not at {} any more", path.display()), hint))
}

fn configuration(settings: &Settings, args: &RestoreArgs) -> Result<Configuration, CliError> {
    let config_file = match &args.config_file {
        Some(path) => {
            let path = absolute(path)?;
            if !path.is_file() {
                let what = format!("{} is not a file", path.display());
                return Err(CliError::new(exit::USAGE, what, "correct --config-file"));
            }
            Some(path)
        }
        None => None,
    };
    Ok(Configuration {
        binary: own_binary()?,
        source: config_source(settings),
        config_file,
        archive_mode: match args.archive_mode {
            ArchiveMode::Keep => restore::ArchiveMode::Keep,
            ArchiveMode::Off => restore::ArchiveMode::Off,
        },
    })
}

fn options(settings: &Settings, args: &RestoreArgs, pgdata: &Path) -> RestoreOptions {
    let tablespaces =
        args.tablespace_map.iter().map(|entry| TablespaceMap { old: entry.old.clone(), new: entry.new.clone() });
    RestoreOptions {
        pgdata: pgdata.into(),
        tablespaces: tablespaces.collect(),
        force: args.force,
        jobs: args.jobs.map_or_else(|| settings.restore.jobs_or_cpus(), usize::from),
    }
}

async fn fetch(
    plan: &Plan,
    settings: &Settings,
    output: &Output,
    options: &RestoreOptions,
    configuration: &Configuration,
) -> Result<(), CliError> {
    let total = plan.backup.size_bytes;
    let bar = output.progress(Some(total), format!("restoring {}", plan.backup.id));
    let progress = Arc::new(Bar { bar: bar.clone(), total, told: std::sync::Mutex::new(Instant::now()) });
    let restored = restore::restore(plan, options, configuration, progress).await;
    bar.finish_and_clear();
    let restored = restored?;
    for (from, to) in &restored.renamed {
        output.note(&format!("{} is now {}", from.display(), to.display()));
    }
    for note in &restored.notes {
        output.note(note);
    }
    if rustix::process::geteuid().is_root() {
        output.note(
            "the files belong to root: give them to the user that PostgreSQL runs as (chown -R) before you start it",
        );
    }
    let needed = settings.environment_needed(&|name| std::env::var_os(name).is_some());
    if !needed.is_empty() {
        output.note(&format!("PostgreSQL's own environment must have {}, for the restore_command", needed.join(", ")));
    }
    output.note(&format!("restored {} to {}", plan.backup.id, options.pgdata.display()));
    Ok(())
}

/// A bar for a terminal, a line now and then elsewhere.
struct Bar {
    bar: ProgressBar,
    total: u64,
    told: std::sync::Mutex<Instant>,
}

impl FetchProgress for Bar {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        let Ok(mut told) = self.told.try_lock() else { return };
        if self.bar.is_hidden() && told.elapsed() >= LINE_INTERVAL {
            *told = Instant::now();
            tracing::info!(bytes = self.bar.position(), of = self.total, "restoring");
        }
    }
}

async fn start(plan: &Plan, output: &Output, pgdata: &Path, bin: PathBuf, args: &RestoreArgs) -> Result<(), CliError> {
    let options = StartOptions {
        pgdata: pgdata.into(),
        bin,
        config_file: args.config_file.as_deref().map(absolute).transpose()?,
        action: plan.request.action,
    };
    let total = plan.wal.segment_count(plan.segment_size);
    let bar = output.progress(None, "replaying");
    let mut told = Instant::now();
    let outcome = restore::start(&options, |segment| {
        bar.set_message(format!("replaying {segment} ({total} segments in all)"));
        if bar.is_hidden() && told.elapsed() >= LINE_INTERVAL {
            told = Instant::now();
            tracing::info!(segment, "replaying");
        }
    })
    .await;
    bar.finish_and_clear();
    outcome?;
    output.note(match args.target.action {
        super::args::Action::Promote => "the target is reached and the server accepts writes",
        super::args::Action::Pause => {
            "the target is reached and replay has paused: SELECT pg_wal_replay_resume() ends it"
        }
        super::args::Action::Shutdown => "the target is reached and the server has shut down",
    });
    Ok(())
}
