use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::error::ConfigError;
use super::raw::clip;
use super::reader::Reader;
use super::repository;
use super::schedule::Schedule;
use super::sections;
use super::sources::{self, Sources};
use crate::seal::Compression;
use crate::telemetry::{AlertSettings, LogSettings};

/// All settings, checked. Paths are absolute. Each room gets its own part and sees no other.
#[derive(Clone)]
pub struct Settings {
    /// The file that was read.
    pub file: Option<PathBuf>,
    pub postgres: PostgresSettings,
    pub archive: ArchiveSettings,
    pub sync: SyncSettings,
    pub spool: SpoolSettings,
    pub state: StateSettings,
    pub upload: UploadSettings,
    pub backup: BackupSettings,
    pub restore: RestoreSettings,
    pub alert: AlertSettings,
    pub metrics: MetricsSettings,
    pub log: LogSettings,
    /// At least one, and at least one of them is required. In the order in which they are tried for reading.
    pub repositories: Vec<RepositorySettings>,
    from_file_alone: bool,
    warnings: Vec<String>,
    sources: Arc<Sources>,
}

/// A libpq connection string. It may hold a password, so it cannot be printed.
#[derive(Clone)]
pub struct ConnectionUrl(pub(super) String);

impl ConnectionUrl {
    /// For the connection only. Empty: the `DATABASE_URL`, else libpq's `PG*` variables.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

#[derive(Clone)]
pub struct PostgresSettings {
    pub url: ConnectionUrl,
    pub password_file: Option<PathBuf>,
    pub slot: String,
    pub create_slot: bool,
    /// The name that `synchronous_standby_names` would list.
    pub application_name: String,
    pub connect_timeout: Duration,
    /// Upper bound; a third of the server's `wal_sender_timeout` may be less.
    pub status_interval: Duration,
}

/// When the server is told that WAL is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Flushed to the local disk.
    Spool,
    /// Stored in every required repository.
    Repository,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ArchiveSettings {
    /// The user's name for the cluster; a single path component.
    pub cluster: String,
    pub compression: Compression,
    /// 0 = the codec's fastest useful one.
    pub compression_level: i32,
    pub durability: Durability,
    /// How long bytes of the open segment wait at most before they are shipped; `None` = until the segment is complete.
    pub tail_interval: Option<Duration>,
    /// So many bytes of the open segment are shipped at once.
    pub tail_bytes: u64,
    /// How long a stopping agent may still ship.
    pub stop_timeout: Duration,
}

/// What becomes of commits that wait for the repositories, once they have waited too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDelay {
    /// They wait on.
    Wait,
    /// They return after the local disk has their WAL, until the repositories keep up again.
    Degrade,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncSettings {
    pub on_delay: OnDelay,
    /// How long is too long.
    pub max_delay: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SpoolSettings {
    pub path: PathBuf,
    pub bytes_max: u64,
    /// Free bytes that are left on its file system.
    pub free_bytes_min: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct StateSettings {
    pub path: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub struct UploadSettings {
    pub concurrency: usize,
    pub request_timeout: Duration,
    pub retry_delay_max: Duration,
    /// The size of a part, and the size from which an object is sent in parts.
    pub multipart_bytes: u64,
}

/// The checkpoint that a base backup begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checkpoint {
    Fast,
    Spread,
}

#[derive(Clone, Debug)]
pub struct BackupSettings {
    pub schedule: Option<Schedule>,
    /// Whether `run` takes one when the repository has none that is usable.
    pub initial: bool,
    pub checkpoint: Checkpoint,
    /// Bytes per second.
    pub max_rate: Option<u64>,
    /// Raw bytes of a volume; one that would be longer begins a new one, but a single file is never split.
    pub volume_bytes: u64,
    /// How long to wait for the WAL through the stop LSN.
    pub wal_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RestoreSettings {
    /// 0 = one per CPU.
    pub jobs: usize,
    /// How long `wal-fetch` tries.
    pub fetch_timeout: Duration,
}

impl RestoreSettings {
    pub fn jobs_or_cpus(&self) -> usize {
        match self.jobs {
            0 => std::thread::available_parallelism().map_or(1, NonZero::get),
            jobs => jobs,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct MetricsSettings {
    /// `host:port`; `None` = no HTTP.
    pub listen: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RepositorySettings {
    pub name: String,
    /// Whether WAL counts as archived only when it is here too.
    pub required: bool,
    /// The operator vouches that nobody else writes, where the store cannot prove it.
    pub single_writer: bool,
    pub store: StoreSettings,
}

#[derive(Clone, Debug, PartialEq)]
pub enum StoreSettings {
    Local { path: PathBuf },
    S3(Box<S3Options>),
}

/// What is not given is left to the AWS SDK's own chain (environment, profile, process, web identity, container, instance).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct S3Options {
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
    pub region: Option<String>,
    pub endpoint: Option<String>,
    pub path_style: bool,
    pub profile: Option<String>,
    /// Both of the first two or none.
    pub access_key_id_file: Option<PathBuf>,
    pub secret_access_key_file: Option<PathBuf>,
    pub session_token_file: Option<PathBuf>,
    pub storage_class: Option<String>,
    /// `AES256` or `aws:kms`.
    pub sse: Option<String>,
    pub sse_kms_key_id: Option<String>,
    pub ca_file: Option<PathBuf>,
}

/// The parts that S3 takes for one object at most ("Amazon S3 multipart upload limits").
const PARTS_MAX: u64 = 10_000;

impl Settings {
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let gathered = sources::gather(sources)?;
        let (raw, base) = (&gathered.raw, gathered.base.as_path());
        let section = |name| Reader::new(name, raw.sections.get(name), base);
        let settings = Self {
            postgres: sections::postgres(&section("postgres"))?,
            archive: sections::archive(&section("archive"))?,
            sync: sections::sync(&section("sync"))?,
            spool: sections::spool(&section("spool"))?,
            state: StateSettings { path: section("state").path("path")? },
            upload: sections::upload(&section("upload"))?,
            backup: sections::backup(&section("backup"))?,
            restore: sections::restore(&section("restore"))?,
            alert: sections::alert(&section("alert"))?,
            metrics: MetricsSettings { listen: sections::listen(&section("metrics"))? },
            log: sections::log(&section("log"))?,
            repositories: repository::read(&raw.repositories, base)?,
            from_file_alone: gathered.from_file_alone,
            warnings: sections::warnings(raw, gathered.file.as_deref()),
            file: gathered.file,
            sources: Arc::new(sources.clone()),
        };
        settings.check_together()?;
        Ok(settings)
    }

    /// Reads everything again: the file as it is now, the environment and the flags as they were at the start.
    pub fn reload(&self) -> Result<Self, ConfigError> {
        Self::load(&self.sources)
    }

    /// Forgets all repositories but one, for a command that shall read from this one alone. It counts as required then.
    pub fn choose_repository(&mut self, name: &str) -> Result<(), ConfigError> {
        let Some(at) = self.repositories.iter().position(|repository| repository.name == name) else {
            let known = self.repositories.iter().map(|each| each.name.clone()).collect();
            return Err(ConfigError::UnknownRepository { name: clip(name), known });
        };
        let chosen = self.repositories.swap_remove(at);
        self.repositories = vec![RepositorySettings { required: true, ..chosen }];
        self.from_file_alone = false;
        Ok(())
    }

    /// Neither the environment nor a flag changed anything, so that `--config FILE` gives the same settings anywhere.
    pub fn is_from_file_alone(&self) -> bool {
        self.from_file_alone && self.file.is_some()
    }

    /// What is unwise but not wrong, one sentence each; to be logged at the start.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn check_together(&self) -> Result<(), ConfigError> {
        let together = |why: String| Err(ConfigError::Together { why });
        if self.upload.multipart_bytes.saturating_mul(PARTS_MAX) < self.backup.volume_bytes.saturating_mul(2) {
            return together(
                "backup.volume_bytes is too large for upload.multipart_bytes: a volume would need more than 10,000 parts".into(),
            );
        }
        if self.spool.bytes_max < self.archive.tail_bytes {
            return together("archive.tail_bytes is larger than spool.bytes_max".into());
        }
        let local = self.repositories.iter().filter_map(|repository| match &repository.store {
            StoreSettings::Local { path } => Some((format!("the path of repository \"{}\"", repository.name), path)),
            StoreSettings::S3(_) => None,
        });
        let mut folders =
            vec![("spool.path".to_owned(), &self.spool.path), ("state.path".to_owned(), &self.state.path)];
        folders.extend(local);
        for (at, (name, path)) in folders.iter().enumerate() {
            for (other_name, other) in &folders[..at] {
                if path.starts_with(other) || other.starts_with(path) {
                    return together(format!(
                        "{other_name} and {name} must not lie in each other ({})",
                        path.display()
                    ));
                }
            }
        }
        Ok(())
    }
}
