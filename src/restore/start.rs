//! Starts PostgreSQL in a restored directory and watches it until the target is reached (`--start`).
//!
//! The server is a child of its own process group that goes on when Walden ends. What it is doing is read from files that every
//! PostgreSQL keeps (`postmaster.pid`, `global/pg_control`) and from the titles of its processes, so no login is needed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::RestoreError;
use super::target::TargetAction;

const LOG_FILE: &str = "walden-start.log";
const POLL: Duration = Duration::from_millis(200);
/// Of the server's log, when it has failed.
const LOG_TAIL_BYTES: u64 = 4096;
const LOG_TAIL_LINES: usize = 12;
/// `DBState` in PostgreSQL `src/include/catalog/pg_control.h`, the same from 13 to 18.
const DB_IN_PRODUCTION: u32 = 6;
const DB_SHUTDOWNED_IN_RECOVERY: u32 = 2;

#[derive(Clone, Debug)]
pub struct StartOptions {
    pub pgdata: PathBuf,
    /// Where `postgres` is.
    pub bin: PathBuf,
    pub config_file: Option<PathBuf>,
    pub action: TargetAction,
}

/// Finds the programs of PostgreSQL `major`, and refuses what cannot work, before anything is written.
pub fn check_can_start(major: u32) -> Result<PathBuf, RestoreError> {
    if rustix::process::geteuid().is_root() {
        return Err(RestoreError::Refused {
            what: "PostgreSQL does not run as root, so `--start` cannot be used by root".into(),
            hint: "run `walden restore` as the user who shall own the database (`runuser -u postgres -- walden restore …`)",
        });
    }
    let mut places: Vec<PathBuf> = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        places.extend(std::env::split_paths(&path).filter(|place| place.is_absolute()));
    }
    if let Some(bin) = pg_config_bin() {
        places.push(bin);
    }
    places.push(format!("/usr/lib/postgresql/{major}/bin").into());
    places.push(format!("/usr/pgsql-{major}/bin").into());
    places.push(format!("/opt/homebrew/opt/postgresql@{major}/bin").into());
    places.push("/usr/local/pgsql/bin".into());
    let found = places.into_iter().find(|place| version_of(&place.join("postgres")) == Some(major));
    found.ok_or_else(|| RestoreError::Server {
        what: format!("{major} was not found (PATH, pg_config, /usr/lib/postgresql/{major}/bin)"),
        hint: "install it or add its bin directory to PATH, or restore without `--start`",
    })
}

fn pg_config_bin() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(text.trim()))
}

/// `postgres (PostgreSQL) 17.10 (Debian 17.10-1)` is 17.
fn version_of(postgres: &Path) -> Option<u32> {
    if !postgres.is_file() {
        return None;
    }
    let output = Command::new(postgres).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<u32> {
    let number = text.strip_prefix("postgres (PostgreSQL) ")?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Starts the server and returns when the target is reached: with `promote` when writes are accepted, with `pause` when replay has
/// paused, with `shutdown` when it has shut down. `replaying` is told the segment that is being replayed.
pub async fn start(options: &StartOptions, mut replaying: impl FnMut(&str)) -> Result<(), RestoreError> {
    let mut server = spawn(options)?;
    let mut shown = String::new();
    loop {
        tokio::time::sleep(POLL).await;
        let status = server.try_wait().map_err(RestoreError::io("watched", &options.pgdata))?;
        if let Some(status) = status {
            if options.action == TargetAction::Shutdown && state(&options.pgdata) == Some(DB_SHUTDOWNED_IN_RECOVERY) {
                return Ok(());
            }
            return Err(RestoreError::Server {
                what: format!("ended before the target was reached ({status}): {}", last_words(&options.pgdata)),
                hint: "see its log in the data directory; nothing was lost, and the restore can be repeated",
            });
        }
        if let Some(segment) = replayed_segment(server.id())
            && segment != shown
        {
            replaying(&segment);
            shown = segment;
        }
        let Some(postmaster) = Postmaster::read(&options.pgdata) else { continue };
        let reached = match options.action {
            // "ready" is written as soon as the server can be read during recovery; the control file tells the end of recovery,
            // and the server itself that it has left it (`StartupXLOG` in PostgreSQL `src/backend/access/transam/xlog.c`).
            TargetAction::Promote => {
                postmaster.status == "ready"
                    && state(&options.pgdata) == Some(DB_IN_PRODUCTION)
                    && accepts_writes(&postmaster).await
            }
            TargetAction::Pause => postmaster.status == "ready" && is_paused(&postmaster).await?,
            TargetAction::Shutdown => false,
        };
        if reached {
            return Ok(());
        }
    }
}

/// Without a shell: no path can be taken for anything else.
fn spawn(options: &StartOptions) -> Result<Child, RestoreError> {
    let path = options.pgdata.join(LOG_FILE);
    let io = || RestoreError::io("created", &path);
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(io())?;
    log.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).map_err(io())?;
    let program = options.bin.join("postgres");
    let mut command = Command::new(&program);
    command.arg("-D").arg(&options.pgdata);
    // The backup's configuration may name the directory of the server it came from.
    let mut own = std::ffi::OsString::from("data_directory=");
    own.push(&options.pgdata);
    command.arg("-c").arg(own);
    if let Some(file) = &options.config_file {
        let mut option = std::ffi::OsString::from("config_file=");
        option.push(file);
        command.arg("-c").arg(option);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone().map_err(io())?).stderr(log);
    // A Ctrl-C meant for Walden is not meant for the server.
    command.process_group(0).current_dir("/");
    command.spawn().map_err(RestoreError::io("started", program))
}

/// Lines of `postmaster.pid` (`LOCK_FILE_LINE_*` in PostgreSQL `src/include/miscadmin.h`, `utils/pidfile.h`).
struct Postmaster {
    port: u16,
    /// Where it listens: a folder with its socket, or the first address if it has none.
    host: Host,
    status: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Host {
    Folder(PathBuf),
    Name(String),
}

impl Postmaster {
    /// `None` while it is not complete.
    fn read(pgdata: &Path) -> Option<Self> {
        let mut text = String::new();
        File::open(pgdata.join("postmaster.pid")).ok()?.take(8192).read_to_string(&mut text).ok()?;
        let lines: Vec<&str> = text.lines().collect();
        Some(Self {
            port: lines.get(3)?.trim().parse().ok()?,
            host: match (lines.get(4)?.trim(), lines.get(5)?.trim()) {
                ("", "" | "*" | "0.0.0.0") => Host::Name("localhost".into()),
                ("", address) => Host::Name(address.into()),
                (folder, _) => Host::Folder(folder.into()),
            },
            status: lines.get(7)?.trim().into(),
        })
    }
}

/// Asked of the server itself. If it does not let this user in (or wants a password), its control file is believed.
async fn accepts_writes(postmaster: &Postmaster) -> bool {
    ask(postmaster, "SELECT NOT pg_is_in_recovery()").await.unwrap_or_else(|error| !is_not_yet(&error))
}

/// The server says itself that it takes no connections at this moment.
fn is_not_yet(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| *code == tokio_postgres::error::SqlState::CANNOT_CONNECT_NOW)
}

/// Only SQL knows whether replay has paused.
async fn is_paused(postmaster: &Postmaster) -> Result<bool, RestoreError> {
    match ask(postmaster, "SELECT pg_is_wal_replay_paused()").await {
        Ok(paused) => Ok(paused),
        Err(error) if is_not_yet(&error) => Ok(false),
        Err(error) => Err(RestoreError::Server {
            what: format!("was started and replays, but cannot be asked whether it has paused: {error}"),
            hint: "ask it yourself: SELECT pg_is_wal_replay_paused()",
        }),
    }
}

async fn ask(postmaster: &Postmaster, question: &str) -> Result<bool, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    match &postmaster.host {
        Host::Folder(folder) => config.host_path(folder),
        Host::Name(name) => config.host(name),
    };
    config
        .port(postmaster.port)
        .dbname("postgres")
        .user(user_name())
        .application_name("walden")
        .connect_timeout(Duration::from_secs(5));
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    let driver = tokio::spawn(connection);
    let row = client.query_one(question, &[]).await;
    drop(client);
    driver.abort();
    row?.try_get(0)
}

/// The operating system's name of this user, which libpq takes too.
fn user_name() -> String {
    let id = rustix::process::geteuid().as_raw();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let known = users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(id)).then(|| fields[0].to_string())
    });
    known.or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| "postgres".into())
}

/// `state` of the control file: the field after system identifier, version and catalogue version.
fn state(pgdata: &Path) -> Option<u32> {
    let mut head = [0; 20];
    File::open(pgdata.join("global/pg_control")).ok()?.read_exact(&mut head).ok()?;
    head[16..].first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes))
}

/// From the title of the startup process, `postgres: startup recovering 000000010000000000000005`.
fn replayed_segment(postmaster: u32) -> Option<String> {
    let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let title = std::fs::read(format!("/proc/{child}/cmdline")).ok()?;
        segment_in_title(&String::from_utf8_lossy(&title))
    })
}

fn segment_in_title(title: &str) -> Option<String> {
    let rest = title.split_once("startup")?.1;
    let segment = rest.split_once("recovering ")?.1;
    let segment: String = segment.chars().take_while(char::is_ascii_hexdigit).collect();
    (segment.len() == 24).then_some(segment)
}

/// The last lines of the server's log, in one line: its own standard error, or the file of its logging collector.
fn last_words(pgdata: &Path) -> String {
    let mut lines = tail(&pgdata.join(LOG_FILE));
    let current = std::fs::read_to_string(pgdata.join("current_logfiles")).unwrap_or_default();
    for line in current.lines() {
        if let Some((_, file)) = line.split_once(' ') {
            lines.extend(tail(&pgdata.join(file)));
        }
    }
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    if lines.is_empty() { "it said nothing".into() } else { lines[from..].join(" | ") }
}

fn tail(path: &Path) -> Vec<String> {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default().lines().map(str::to_string).filter(|line| !line.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_titles_are_read() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_version("something else"), None);
        let title = "postgres: main: startup recovering 000000010000000000000005\0";
        assert_eq!(segment_in_title(title).unwrap(), "000000010000000000000005");
        assert_eq!(segment_in_title("postgres: checkpointer"), None);
        assert_eq!(segment_in_title("postgres: startup waiting for 00000001"), None);
    }

    #[test]
    fn the_state_of_the_postmaster_is_read_once_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Postmaster::read(folder.path()).is_none());
        let file = folder.path().join("postmaster.pid");
        std::fs::write(&file, "4711\n/data\n1763600000\n5432\n").unwrap();
        assert!(Postmaster::read(folder.path()).is_none());
        std::fs::write(&file, "4711\n/data\n1763600000\n5432\n/run/postgresql\nlocalhost\n  1 2\nready   \n").unwrap();
        let read = Postmaster::read(folder.path()).unwrap();
        assert_eq!((read.port, read.status.as_str()), (5432, "ready"));
        assert_eq!(read.host, Host::Folder("/run/postgresql".into()));
        std::fs::write(&file, "4711\n/data\n1763600000\n5432\n\n*\n  1 2\nstandby \n").unwrap();
        let read = Postmaster::read(folder.path()).unwrap();
        assert_eq!((read.host, read.status.as_str()), (Host::Name("localhost".into()), "standby"));
    }

    #[test]
    fn the_end_of_the_log_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(last_words(folder.path()), "it said nothing");
        std::fs::write(folder.path().join(LOG_FILE), "LOG: one\nFATAL: two\n").unwrap();
        assert_eq!(last_words(folder.path()), "LOG: one | FATAL: two");
    }
}
