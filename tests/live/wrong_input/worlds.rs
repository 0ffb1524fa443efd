//! The worlds of the table: servers, folders and stores that are not as they should be.
//!
//! Long because it is flat: one arm of one `match` for each world, under the name that the table gives it. Worlds of stores and of
//! archives are in files of their own.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::runtime::Runtime;
use walden::wal::Lsn;

use super::table::{Case, named};
use crate::live::streaming::archive_all;
use crate::support::oracle::files_below;
use crate::support::s3_double::{ACCESS_KEY, BUCKET, S3Server, SECRET_KEY};
use crate::support::{Agent, Ledger, Postgres, Stage, Walden, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);
const MAJOR: u32 = 15;

/// Makes worlds one after the other; servers and stores that stay well are shared.
pub struct Worlds {
    pub(super) stage: Stage,
    pub(super) postgres: Option<Postgres>,
    pub(super) store: Option<(Runtime, S3Server)>,
    pub(super) past: Option<Past>,
    pub(super) made: usize,
}

/// An archive with something in it: a backup, commits, restore points. Its server is gone.
pub(super) struct Past {
    archive: PathBuf,
    named: Vec<(String, &'static str)>,
}

/// One world, and what a command is told of it.
pub struct World {
    walden: Walden,
    environment: Vec<(String, String)>,
    /// Texts that differ from run to run, and their names.
    named: Vec<(String, &'static str)>,
    is_bare: bool,
    slots: Option<String>,
    store: Option<PathBuf>,
    _held: Vec<Box<dyn std::any::Any>>,
}

/// Ends with its world.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a world is made of; each `given` changes a part.
pub(super) struct Plan {
    pub(super) home: PathBuf,
    /// Empty: a server that nobody asks.
    pub(super) url: String,
    pub(super) postgres: String,
    pub(super) spool: PathBuf,
    pub(super) state: PathBuf,
    pub(super) repository: String,
    pub(super) more: String,
    pub(super) listen: u16,
    pub(super) environment: Vec<(String, String)>,
    pub(super) named: Vec<(String, &'static str)>,
    pub(super) slots: Option<String>,
    pub(super) store: Option<PathBuf>,
    pub(super) held: Vec<Box<dyn std::any::Any>>,
}

impl Plan {
    pub(super) fn set(&mut self, name: &str, value: impl AsRef<Path>) {
        self.environment.push((name.to_owned(), value.as_ref().to_string_lossy().into_owned()));
    }

    /// With the values for the names.
    pub(super) fn text(&self, text: &str) -> String {
        self.named.iter().fold(text.to_owned(), |text, (value, name)| text.replace(name, value))
    }

    fn make_world(mut self, stage: &Stage) -> World {
        let config = format!(
            "[postgres]\nurl = \"{}\"\nconnect_timeout = \"5s\"\n{}[spool]\npath = \"{}\"\nfree_bytes_min = 0\n[state]\npath = \"{}\"\n\
             [upload]\nretry_delay_max = \"500ms\"\nrequest_timeout = \"3s\"\n[restore]\nfetch_timeout = \"1s\"\n\
             [backup]\ninitial = false\nwal_timeout = \"10s\"\n[metrics]\nlisten = \"127.0.0.1:{}\"\n{}{}",
            self.url,
            self.postgres,
            self.spool.display(),
            self.state.display(),
            self.listen,
            self.more,
            self.repository
        );
        let walden = Walden::with_config(stage, &config);
        self.named.push((self.home.display().to_string(), "{home}"));
        self.named.push((walden.config_path().display().to_string(), "{config}"));
        self.named.push((stage.path().display().to_string(), "{stage}"));
        self.named.push((self.listen.to_string(), "{listen}"));
        self.named.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        let (environment, named, slots, store) = (self.environment, self.named, self.slots, self.store);
        World { walden, environment, named, is_bare: self.url.is_empty(), slots, store, _held: self.held }
    }
}

impl World {
    /// With names for what differs from run to run.
    pub fn name(&self, text: &str) -> String {
        named(text, &self.named, !self.is_bare)
    }

    fn text(&self, text: &str) -> String {
        self.named.iter().fold(text.to_owned(), |text, (value, name)| text.replace(name, value))
    }

    fn of(&self, case: &Case) -> Walden {
        let mut walden = self.walden.clone();
        if let Some(config) = &case.config {
            walden = Walden::with_config(walden.stage(), &self.text(config));
        }
        for (name, value) in self.environment.iter().chain(&case.environment) {
            walden = walden.env(name, &self.text(value));
        }
        walden
    }

    /// The case's command line. A case that names a file itself gets none of ours.
    pub fn command(&self, case: &Case, json: bool) -> Command {
        let walden = self.of(case);
        let arguments: Vec<String> = case.arguments.iter().map(|argument| self.text(argument)).collect();
        let names_file = case.arguments.iter().any(|word| word == "--config")
            || case.environment.iter().any(|(name, _)| name == "WALDEN_CONFIG");
        let mut command = if names_file {
            let mut command = walden.stage().command(walden.binary());
            command.envs(case.environment.iter().map(|(name, value)| (name, self.text(value)))).stdin(Stdio::null());
            command
        } else {
            walden.command(&[])
        };
        if json {
            command.arg("--json");
        }
        command.args(arguments);
        command
    }

    pub fn spawn(&self, case: &Case) -> Agent {
        let arguments: Vec<String> = case.arguments.iter().map(|argument| self.text(argument)).collect();
        self.of(case).spawn(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Whether PostgreSQL would take the case's `--pgdata` for a data directory that can be started.
    pub fn looks_whole(&self, case: &Case) -> bool {
        let directory = case.arguments.iter().skip_while(|word| *word != "--pgdata").nth(1);
        directory.is_some_and(|path| Path::new(&self.text(path)).join("global/pg_control").exists())
    }

    /// Everything that a command might change: files with mode and size, the server's slots, the store's objects.
    pub fn seen(&self) -> (BTreeSet<String>, String, BTreeSet<PathBuf>) {
        let root = self.walden.stage().path();
        let mut files = BTreeSet::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let (path, metadata) = (entry.path(), entry.metadata().expect("it was just listed"));
                let name = path.strip_prefix(root).expect("below").display().to_string();
                // Servers, their copies, configurations and logs of the tests themselves.
                if ["pg", "walden-", "postgres-", "s3"].iter().any(|prefix| name.starts_with(prefix)) {
                    continue;
                }
                let size = if metadata.is_dir() { 0 } else { metadata.len() };
                files.insert(format!("{name} {:o} {size}", metadata.permissions().mode() & 0o7777));
                if metadata.is_dir() {
                    folders.push(path);
                }
            }
        }
        let slots = self.slots.as_ref().map_or_else(String::new, |url| {
            let sql = crate::support::Sql::connect(url).expect("the server answers");
            let rows =
                sql.try_rows("SELECT slot_name, slot_type, active, CASE WHEN NOT active THEN restart_lsn END FROM pg_replication_slots ORDER BY 1");
            format!("{:?}", rows.expect("the slots"))
        });
        let objects = self.store.iter().flat_map(|folder| files_below(folder)).collect();
        (files, slots, objects)
    }
}

pub(super) fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");
}

fn local(path: &Path) -> String {
    format!("[[repository]]\nname = \"main\"\npath = \"{}\"\n", path.display())
}

impl Worlds {
    pub fn new() -> Worlds {
        Worlds { stage: Stage::new("wrong"), postgres: None, store: None, past: None, made: 0 }
    }

    /// A server that works, with roles of several kinds.
    pub(super) fn server(&mut self) -> &Postgres {
        let stage = &self.stage;
        self.postgres.get_or_insert_with(|| {
            let postgres = Postgres::builder(MAJOR)
                .wal_segsize(1)
                .setting("wal_level", "logical")
                .hba("host all,replication careful 127.0.0.1/32 scram-sha-256")
                .hba("host replication stranger 127.0.0.1/32 reject")
                .start(stage);
            postgres.psql(
                "CREATE ROLE careful LOGIN REPLICATION PASSWORD 'right'; CREATE ROLE plain LOGIN; \
                 CREATE ROLE stranger LOGIN REPLICATION; CREATE ROLE least LOGIN REPLICATION; CREATE ROLE nologin REPLICATION",
            );
            postgres
        })
    }

    pub(super) fn plan(&mut self) -> Plan {
        self.made += 1;
        let home = self.stage.make_dir(format!("home-{}", self.made));
        let (spool, state, archive) = (home.join("spool"), home.join("state"), home.join("archive"));
        let repository = local(&archive);
        Plan {
            home,
            url: "host=127.0.0.1 port=1 user=walden".into(),
            postgres: String::new(),
            spool,
            state,
            repository,
            more: String::new(),
            listen: parts::free_port(),
            environment: Vec::new(),
            named: Vec::new(),
            slots: None,
            store: None,
            held: Vec::new(),
        }
    }

    /// A world with a server that works; what is wrong comes on top.
    pub(super) fn served(&mut self, user: &str) -> Plan {
        let mut plan = self.plan();
        let postgres = self.server();
        // The server may find only now that a killed agent's connection is gone.
        wait_until(MINUTE, "the world before to end", || {
            postgres.psql(
                "DO $$ DECLARE s record; BEGIN FOR s IN SELECT slot_name FROM pg_replication_slots LOOP \
                 BEGIN PERFORM pg_drop_replication_slot(s.slot_name); EXCEPTION WHEN object_in_use THEN NULL; END; \
                 END LOOP; END $$",
            );
            postgres.value("SELECT count(*) FROM pg_replication_slots") == "0"
        });
        plan.url = format!("host=127.0.0.1 port={} dbname=postgres user={user}", postgres.port);
        plan.named.push((postgres.port.to_string(), "{port}"));
        plan.named.push((postgres.system_identifier().to_string(), "{system}"));
        plan.named.push((postgres.sockets.display().to_string(), "{sockets}"));
        plan.slots = Some(postgres.socket_url());
        plan
    }

    /// A repository over S3 in a store that works.
    pub(super) fn stored(&mut self) -> Plan {
        let mut plan = self.served("postgres");
        let folder = self.stage.make_dir("s3");
        let (_, server) = self.store.get_or_insert_with(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            let runtime = runtime.expect("a runtime");
            let server = runtime.block_on(S3Server::start_s3s(&folder));
            (runtime, server)
        });
        server.faults().clear();
        let key = |name: &str, value: &str| {
            let path = self.stage.write(plan.home.join(name), value);
            format!("{name}_file = \"{}\"\n", path.display())
        };
        let (id, secret) = (key("access_key_id", ACCESS_KEY), key("secret_access_key", SECRET_KEY));
        plan.repository = format!(
            "[[repository]]\nname = \"main\"\nbucket = \"{BUCKET}\"\nprefix = \"world-{}\"\nregion = \"us-east-1\"\nendpoint = \"{}\"\npath_style = true\n{id}{secret}",
            self.made, server.endpoint
        );
        plan.named.push((server.endpoint.clone(), "{endpoint}"));
        plan.named.push((format!("world-{}", self.made), "{prefix}"));
        plan.store = Some(folder.join(BUCKET));
        plan
    }

    pub(super) fn faults(&self) -> crate::support::s3_proxy::Faults {
        self.store.as_ref().expect("the store was started").1.faults()
    }

    /// A world in which something was archived, and no server.
    pub(super) fn after_a_past(&mut self) -> Plan {
        if self.past.is_none() {
            self.past = Some(self.make_past());
        }
        let mut plan = self.plan();
        let past = self.past.as_ref().expect("just made");
        let archive = plan.home.join("archive");
        let copied = self.stage.command("cp").arg("-a").arg(&past.archive).arg(&archive).status().expect("cp runs");
        assert!(copied.success());
        plan.named.extend(past.named.iter().cloned());
        plan
    }

    fn make_past(&mut self) -> Past {
        let mut postgres = Postgres::builder(MAJOR).wal_segsize(1).named("pg-past").start(&self.stage);
        let walden = Walden::local(&self.stage, &postgres, "");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        let before = ledger.commit_many(2).remove(0);
        walden.ok(&["backup"]);
        ledger.commit_many(3);
        for name in ["good", "twice", "twice"] {
            postgres.psql(&format!("SELECT pg_create_restore_point('{name}')"));
        }
        // So that WAL lies behind the segment after the backup's, too.
        postgres.switch_wal();
        let last = ledger.commit();
        archive_all(&postgres, &mut agent);
        assert!(agent.sigterm(MINUTE).success());
        let system = postgres.system_identifier().to_string();
        let list = walden.json(&["list"]);
        let text = |field: &str| list["backups"][0][field].as_str().expect("a text").to_owned();
        let backup = text("id");
        // Segments of 1 MiB: the number of the one in which the backup begins.
        let start: Lsn = text("start_lsn").parse().expect("an LSN");
        let segment = |number: u64| format!("00000001{:08X}{:08X}", number >> 12, number & 0xFFF);
        let first = start.get() >> 20;
        postgres.stop_fast();
        let archive = self.stage.join("past");
        fs::rename(walden.repository(), &archive).expect("the archive moves");
        for folder in [walden.spool(), walden.state()] {
            fs::remove_dir_all(folder).expect("the rest goes");
        }
        let named = vec![
            (system, "{system}"),
            (backup, "{backup}"),
            (before.time, "{before the backup}"),
            (last.xid.to_string(), "{last xid}"),
            (segment(first), "{the backup's segment}"),
            (segment(first + 1), "{the segment behind}"),
        ];
        Past { archive, named }
    }

    #[track_caller]
    pub fn make(&mut self, given: &str) -> World {
        let stage = self.stage.clone();
        let plan = match given {
            "nothing" => Plan { url: String::new(), ..self.plan() },
            // Servers.
            "a server that is down" => {
                let mut plan = self.plan();
                let port = parts::free_port();
                plan.url = format!("host=127.0.0.1 port={port} user=walden");
                plan.named.push((port.to_string(), "{port}"));
                plan
            }
            "something that is no PostgreSQL server" => {
                let mut plan = self.plan();
                let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
                let port = listener.local_addr().expect("bound").port();
                std::thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        let mut stream = stream;
                        let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n");
                    }
                });
                plan.url = format!("host=127.0.0.1 port={port} user=walden");
                plan.named.push((port.to_string(), "{port}"));
                plan
            }
            "a server that never answers" => {
                let mut plan = self.plan();
                let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
                let port = listener.local_addr().expect("bound").port();
                plan.url = format!("host=127.0.0.1 port={port} user=walden connect_timeout=2");
                plan.named.push((port.to_string(), "{port}"));
                plan.held.push(Box::new(listener));
                plan
            }
            "a socket that is not there" => {
                let mut plan = self.plan();
                plan.url = format!("host={} user=walden", plan.home.display());
                plan
            }
            "a wrong password" => {
                let mut plan = self.served("careful");
                let file = stage.write(plan.home.join("password"), "wrong\n");
                plan.postgres = format!("password_file = \"{}\"\n", file.display());
                plan
            }
            "no password where one is wanted" => self.served("careful"),
            "a password file that others may read" => {
                let mut plan = self.served("careful");
                let file = stage.write(plan.home.join("password"), "right\n");
                mode(&file, 0o644);
                plan.postgres = format!("password_file = \"{}\"\n", file.display());
                plan
            }
            "a password file that is missing" => {
                let mut plan = self.served("careful");
                plan.postgres = format!("password_file = \"{}\"\n", plan.home.join("nowhere").display());
                plan
            }
            "a role that does not exist" => self.served("nobody_here"),
            "a role without LOGIN" => self.served("nologin"),
            "a role without REPLICATION" => self.served("plain"),
            "a role that pg_hba.conf does not let in" => self.served("stranger"),
            "a role with LOGIN and REPLICATION alone" => self.served("least"),
            "wal_level = minimal" | "max_wal_senders = 1" => {
                let mut plan = self.plan();
                let builder = Postgres::builder(MAJOR).wal_segsize(1).named(&format!("pg-{}", self.made));
                let postgres = if given.starts_with("wal_level") {
                    let builder = builder.setting("archive_mode", "off").setting("wal_level", "minimal");
                    builder.setting("max_wal_senders", "0").start(&stage)
                } else {
                    builder.setting("max_wal_senders", "1").start(&stage)
                };
                plan.url = postgres.tcp_url();
                plan.slots = Some(postgres.socket_url());
                plan.named.push((postgres.port.to_string(), "{port}"));
                plan.named.push((postgres.system_identifier().to_string(), "{system}"));
                plan.held.push(Box::new(postgres));
                plan
            }
            "no free replication slot" => {
                let mut plan = self.plan();
                let builder = Postgres::builder(MAJOR).wal_segsize(1).named(&format!("pg-{}", self.made));
                let postgres = builder.setting("max_replication_slots", "1").start(&stage);
                postgres.psql("SELECT pg_create_physical_replication_slot('other', true)");
                plan.url = postgres.tcp_url();
                plan.slots = Some(postgres.socket_url());
                plan.named.push((postgres.port.to_string(), "{port}"));
                plan.held.push(Box::new(postgres));
                plan
            }
            "no slot, and none may be made" => {
                let mut plan = self.served("postgres");
                plan.postgres = "create_slot = false\n".into();
                plan
            }
            "a logical slot" => {
                let plan = self.served("postgres");
                self.server().psql("SELECT pg_create_logical_replication_slot('walden', 'pgoutput')");
                plan
            }
            "a slot that another receiver uses" => {
                let mut plan = self.served("postgres");
                let folder = stage.make_dir(format!("pg-received-{}", self.made));
                let postgres = self.server();
                postgres.psql("SELECT pg_create_physical_replication_slot('walden', true)");
                let mut command = stage.command(parts::tool("pg_receivewal"));
                command.args(["-d", &postgres.socket_url(), "--slot", "walden", "-D"]).arg(&folder);
                let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pg_receivewal runs");
                plan.held.push(Box::new(Process(child)));
                wait_until(MINUTE, "pg_receivewal to stream", || {
                    postgres.value("SELECT active FROM pg_replication_slots WHERE slot_name = 'walden'") == "t"
                });
                plan
            }
            "a slot that the server invalidated" => {
                let mut plan = self.plan();
                let builder = Postgres::builder(MAJOR).wal_segsize(1).named(&format!("pg-{}", self.made));
                let postgres = builder.setting("max_slot_wal_keep_size", "1MB").start(&stage);
                postgres.psql("SELECT pg_create_physical_replication_slot('walden', true)");
                for _ in 0..6 {
                    postgres.psql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))");
                    postgres.switch_wal();
                }
                postgres.psql("CHECKPOINT");
                plan.url = postgres.tcp_url();
                plan.slots = Some(postgres.socket_url());
                plan.named.push((postgres.port.to_string(), "{port}"));
                plan.held.push(Box::new(postgres));
                plan
            }
            // Folders.
            "a spool that cannot be made" => {
                let mut plan = self.served("postgres");
                let shut = stage.make_dir(plan.home.join("shut"));
                mode(&shut, 0o500);
                plan.spool = shut.join("spool");
                plan
            }
            "a file where the spool should be" => {
                let plan = self.served("postgres");
                stage.write(&plan.spool, "in the way");
                plan
            }
            "a spool that others may write to" => {
                let plan = self.served("postgres");
                mode(&stage.make_dir(&plan.spool), 0o777);
                plan
            }
            "a spool that belongs to somebody else" => {
                let plan = self.served("postgres");
                // Writable all the same, so that only the owner is wrong.
                if rustix::process::getuid().is_root() {
                    fs::create_dir(&plan.spool).expect("a folder of root's");
                    mode(&plan.spool, 0o777);
                } else {
                    std::os::unix::fs::symlink("/tmp", &plan.spool).expect("a link");
                }
                plan
            }
            "a spool that its group may write to" => {
                let plan = self.served("postgres");
                mode(&stage.make_dir(&plan.spool), 0o770);
                plan
            }
            "a spool that others may read" => {
                let plan = self.served("postgres");
                mode(&stage.make_dir(&plan.spool), 0o755);
                plan
            }
            "a spool whose folder for the cluster belongs to somebody else" => {
                let plan = self.served("postgres");
                stage.make_dir(&plan.spool);
                let folder = plan.spool.join("main");
                if rustix::process::getuid().is_root() {
                    fs::create_dir(&folder).expect("a folder of root's");
                    mode(&folder, 0o777);
                } else {
                    std::os::unix::fs::symlink("/tmp", &folder).expect("a link");
                }
                plan
            }
            "a state that belongs to somebody else" => {
                let plan = self.served("postgres");
                if rustix::process::getuid().is_root() {
                    fs::create_dir(&plan.state).expect("a folder of root's");
                    mode(&plan.state, 0o777);
                } else {
                    std::os::unix::fs::symlink("/tmp", &plan.state).expect("a link");
                }
                plan
            }
            "no room for the spool" => {
                let mut plan = self.served("postgres");
                plan.set("WALDEN_SPOOL__FREE_BYTES_MIN", "1000TiB");
                plan
            }
            "a spool that another Walden uses" => {
                let mut plan = self.served("postgres");
                let spool = stage.make_dir(&plan.spool);
                let lock = fs::File::create(spool.join("lock")).expect("the lock");
                stage.give(&spool.join("lock"));
                rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
                plan.held.push(Box::new(lock));
                plan
            }
            "a spool of another cluster" => {
                let plan = self.served("postgres");
                for part in ["", "main", "main/7000000000000000001", "main/7000000000000000001/wal"] {
                    stage.make_dir(plan.spool.join(part));
                }
                plan
            }
            "a file where the state should be" => {
                let plan = self.served("postgres");
                stage.write(&plan.state, "in the way");
                plan
            }
            // Repositories in folders.
            "a repository whose parent is missing" => {
                let mut plan = self.served("postgres");
                plan.repository = local(&plan.home.join("not/there"));
                plan
            }
            "a repository that cannot be written" => {
                let plan = self.served("postgres");
                mode(&stage.make_dir(plan.home.join("archive")), 0o500);
                plan
            }
            "a file where the repository should be" => {
                let plan = self.served("postgres");
                stage.write(plan.home.join("archive"), "in the way");
                plan
            }
            "a repository of another cluster" => {
                let plan = self.served("postgres");
                for part in [
                    "archive",
                    "archive/main",
                    "archive/main/7000000000000000001",
                    "archive/main/7000000000000000001/wal",
                ] {
                    stage.make_dir(plan.home.join(part));
                }
                stage.write(plan.home.join("archive/main/7000000000000000001/coverage.json"), "{}");
                plan
            }
            "a repository with foreign content" => {
                let plan = self.served("postgres");
                for part in ["archive", "archive/main", "archive/main/photos", "archive/main/tmp"] {
                    stage.make_dir(plan.home.join(part));
                }
                stage.write(plan.home.join("archive/main/photos/cat.jpg"), "a cat");
                stage.write(plan.home.join("archive/README"), "mine");
                plan
            }
            "a repository whose lease another agent holds"
            | "a lease that cannot be read"
            | "a lease of a newer Walden" => {
                let plan = self.served("postgres");
                let system = self.server().system_identifier();
                let mut folder = plan.home.join("archive");
                for part in ["", "main", &system.to_string()] {
                    folder = stage.make_dir(folder.join(part));
                }
                let now = jiff::Timestamp::now();
                let lease = match given {
                    "a lease that cannot be read" => "{ this is no JSON".to_owned(),
                    other => format!(
                        "{{\"format\": {}, \"agent\": \"3f0c62a0-0000-4000-8000-000000000001\", \"host\": \"db2\", \"taken\": \"{now}\", \"renewed\": \"{now}\", \"ttl_seconds\": 3600}}",
                        if other.contains("newer") { 9 } else { 1 }
                    ),
                };
                stage.write(folder.join("lease.json"), lease);
                plan
            }
            other => match self.in_a_store(other).or_else(|| self.with_an_archive(other)) {
                Some(plan) => plan,
                None => panic!("no world is known for \"given {other}\""),
            },
        };
        plan.make_world(&stage)
    }
}
