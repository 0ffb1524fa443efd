//! A host that can burn: a server and an agent with all that they keep, in one folder. The repository lies elsewhere.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::runtime::Runtime;

use super::postgres::{Load, Postgres};
use super::s3_double::S3Server;
use super::s3_proxy::HttpFault;
use super::walden::{Agent, Walden};
use super::{Stage, crowd, parts};

const MINUTE: Duration = Duration::from_secs(60);

/// A stopped server's data directory, to be copied: initdb takes longer than all else. It has pgbench's tables and the crowd's.
pub struct Template {
    major: u32,
    data: PathBuf,
    bin: PathBuf,
}

impl Template {
    #[track_caller]
    pub fn make(stage: &Stage, major: u32, wal_segsize_mib: u32) -> Template {
        let name = format!("template-{major}-{wal_segsize_mib}");
        let builder = Postgres::builder(major).wal_segsize(wal_segsize_mib).named(&name);
        // The copies have short lives; recycled segments would only be copied along.
        let builder =
            builder.setting("archive_mode", "off").setting("min_wal_size", &format!("{}MB", 2 * wal_segsize_mib));
        let mut server = builder.start(stage);
        server.pgbench_init(1);
        server.psql(crowd::TABLE);
        server.switch_wal();
        server.psql("CHECKPOINT");
        server.stop_fast();
        Template { major, data: server.data.clone(), bin: server.bin().to_owned() }
    }

    pub fn bin(&self) -> &Path {
        &self.bin
    }
}

/// Where WAL and backups go; nothing of it is on the host.
pub enum Store {
    Local(PathBuf),
    /// With the files that hold its keys.
    S3(Box<S3Server>, [PathBuf; 2]),
}

impl Store {
    pub fn local(stage: &Stage, name: &str) -> Store {
        Store::Local(stage.make_dir(name))
    }

    /// An S3 server over a folder, at work in `runtime`.
    pub fn s3(stage: &Stage, name: &str, runtime: &Runtime) -> Store {
        let server = runtime.block_on(S3Server::start_s3s(&stage.make_dir(name)));
        let keys = [
            stage.write(format!("{name}-key"), &server.access_key),
            stage.write(format!("{name}-secret"), &server.secret_key),
        ];
        Store::S3(Box::new(server), keys)
    }

    /// Its `[[repository]]` in a configuration.
    pub fn table(&self, name: &str) -> String {
        match self {
            Store::Local(path) => {
                format!("[[repository]]\nname = \"{name}\"\ntype = \"local\"\npath = \"{}\"\n", path.display())
            }
            // The keys are in files, since a server that is being restored has no environment of ours.
            Store::S3(server, [key, secret]) => format!(
                "[[repository]]\nname = \"{name}\"\ntype = \"s3\"\nbucket = \"{}\"\nregion = \"us-east-1\"\nendpoint = \"{}\"\n\
                 path_style = true\naccess_key_id_file = \"{}\"\nsecret_access_key_file = \"{}\"\n",
                server.bucket,
                server.endpoint,
                key.display(),
                secret.display()
            ),
        }
    }

    fn walden(&self, stage: &Stage, more: &str) -> Walden {
        Walden::with_config(stage, &format!("{more}{}", self.table("store")))
    }

    /// Nothing can be read or written, until `open`, which also ends all other faults.
    pub fn shut(&self) {
        match self {
            Store::Local(path) => set_mode(path, 0o000),
            Store::S3(server, _) => {
                server.faults().clear();
                server.faults().always("", "", HttpFault::Status(503, "SlowDown"));
            }
        }
    }

    pub fn open(&self) {
        match self {
            Store::Local(path) => set_mode(path, 0o700),
            Store::S3(server, _) => server.faults().clear(),
        }
    }

    /// Of a store that is one.
    #[track_caller]
    pub fn server(&self) -> &S3Server {
        match self {
            Store::Local(path) => panic!("{} is a folder", path.display()),
            Store::S3(server, _) => server,
        }
    }

    /// `walden` of somebody who knows the repository and nothing else.
    pub fn stranger(&self, stage: &Stage) -> Walden {
        self.walden(stage, "")
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions of the store's folder");
}

pub struct Host {
    pub postgres: Postgres,
    pub walden: Walden,
    stage: Stage,
    folder: PathBuf,
}

impl Host {
    /// A copy of the template, started. `settings` are for the server (`name=value`), `more` is TOML for the agent: tables that are
    /// not `[postgres]`, `[spool]`, `[state]` or `[metrics]`; more repositories may be among them, last.
    #[track_caller]
    pub fn start(stage: &Stage, name: &str, template: &Template, store: &Store, settings: &[&str], more: &str) -> Host {
        let folder = stage.make_dir(name);
        let data = folder.join(format!("data-{name}"));
        let copied = Command::new("cp").arg("-a").arg(&template.data).arg(&data).status().expect("cp runs");
        assert!(copied.success(), "the template was not copied");
        let mut postgres = Postgres::over(stage, template.major, &data);
        // Files that go with the host, where a killed server would leave them in /dev/shm.
        postgres.overrides.push("dynamic_shared_memory_type=mmap".to_owned());
        postgres.overrides.extend(settings.iter().map(|&setting| setting.to_owned()));
        postgres.start();
        let here = folder.display();
        let toml = format!(
            "[postgres]\nurl = \"{}\"\n[spool]\npath = \"{here}/spool\"\nfree_bytes_min = 0\n[state]\npath = \"{here}/state\"\n\
             [metrics]\nlisten = \"127.0.0.1:{}\"\n{more}",
            postgres.socket_url(),
            parts::free_port()
        );
        Host { walden: store.walden(stage, &toml), postgres, stage: stage.clone(), folder }
    }

    /// SIGKILL for everything that runs on the host, in one of two orders, and all files are gone before anything can be flushed or
    /// said. Gives the moment.
    #[track_caller]
    pub fn burn(mut self, agents: &mut [&mut Agent], server_first: bool) -> Instant {
        let shared_memory = shared_memory_id(&self.postgres.data);
        let moment = Instant::now();
        if !server_first {
            agents.iter().for_each(|agent| agent.signal(Signal::KILL));
        }
        self.postgres.signal(Signal::KILL);
        agents.iter_mut().for_each(|agent| agent.kill9());
        self.postgres.kill9();
        fs::remove_dir_all(&self.folder).expect("nobody is left who could write");
        fs::remove_file(self.walden.config_path()).expect("the configuration is there");
        if let Some(id) = shared_memory {
            // Without the tool a few bytes stay in the kernel.
            let _ = Command::new("ipcrm").args(["-m", &id]).stderr(Stdio::null()).status();
        }
        moment
    }

    pub fn spool(&self) -> PathBuf {
        self.folder.join("spool")
    }

    /// pgbench as fast as it can.
    pub fn full_speed(&self, clients: u32) -> Load {
        self.postgres.pgbench(&["-c", &clients.to_string(), "-T", "3000"])
    }
}

/// The segment by which a server knows that another one is at work; it outlives a SIGKILL. Line 7 of `postmaster.pid`
/// (`LOCK_FILE_LINE_SHMEM_KEY` in PostgreSQL `src/include/utils/pidfile.h`): its key and its identifier.
fn shared_memory_id(data: &Path) -> Option<String> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    text.lines().nth(6)?.split_whitespace().nth(1).map(str::to_owned)
}

/// Restores the newest state from the repository alone, and starts it.
#[track_caller]
pub fn restore(stage: &Stage, name: &str, template: &Template, store: &Store) -> Postgres {
    let data = stage.join(name);
    store.stranger(stage).ok(&["restore", "--pgdata", &data.to_string_lossy()]);
    let mut restored = Postgres::over(stage, template.major, &data);
    restored.overrides.push("fsync=off".to_owned());
    restored.start();
    restored.wait_promoted(MINUTE);
    restored
}
