//! A throw-away PostgreSQL server that also archives by itself, into the folder which is the oracle.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use walden::wal::{Lsn, SegmentSize, SystemIdentifier};

use super::parts;
use super::sql::{Row, Sql};
use super::stage::Stage;
use super::wait::{eventually, wait_until};

const START: Duration = Duration::from_secs(60);

pub struct Builder {
    major: u32,
    wal_segsize_mib: u32,
    settings: Vec<(String, String)>,
    hba: Vec<String>,
    name: String,
}

impl Builder {
    /// 1, 2, 4, … 1024; 16 if not given.
    pub fn wal_segsize(mut self, mib: u32) -> Self {
        self.wal_segsize_mib = mib;
        self
    }

    /// A line of postgresql.conf; the last one for a name counts.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A line for pg_hba.conf, before the lines that trust every local connection.
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// The folder's name in the stage, if a test has several servers ("pg" if not given).
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// initdb and start. The superuser is `postgres`, local and loopback connections are trusted.
    #[track_caller]
    pub fn start(self, stage: &Stage) -> Postgres {
        let folder = stage.make_dir(&self.name);
        let mut server = Postgres::in_folder(stage, self.major, &folder, folder.join("data"));
        let archive = stage.make_dir(format!("{}-oracle", self.name));
        let made = server
            .program("initdb")
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--data-checksums", "--no-sync"])
            .arg(format!("--wal-segsize={}", self.wal_segsize_mib))
            .arg("-D")
            .arg(&server.data)
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let hba = format!(
            "{}\nlocal all all trust\nhost all all 127.0.0.1/32 trust\nlocal replication all trust\nhost replication all 127.0.0.1/32 trust\n",
            self.hba.join("\n")
        );
        fs::write(server.data.join("pg_hba.conf"), hba).expect("pg_hba.conf");
        let mut conf = format!(
            "listen_addresses = '127.0.0.1'\nmax_wal_senders = 16\nmax_replication_slots = 16\nwal_level = replica\n\
             fsync = on\ntrack_commit_timestamp = on\nlog_line_prefix = '%m [%p] '\nlog_timezone = 'UTC'\n\
             timezone = 'UTC'\nshared_buffers = '32MB'\nautovacuum_naptime = '5s'\narchive_mode = on\narchive_command = '{}'\n",
            archive_command(&archive)
        );
        // A restored copy that is started by something else than the tests finds its port and socket folder here.
        conf.push_str(&format!("port = {}\nunix_socket_directories = '{}'\n", server.port, server.sockets.display()));
        // The default of 80 MB is too little for large segments.
        conf.push_str(&format!(
            "min_wal_size = {0}MB\nmax_wal_size = {1}MB\n",
            2 * self.wal_segsize_mib.max(40),
            4 * self.wal_segsize_mib.max(256)
        ));
        for (name, value) in &self.settings {
            conf.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        fs::write(server.data.join("postgresql.conf"), conf).expect("postgresql.conf");
        server.oracle = archive;
        server.start();
        server
    }
}

/// Copies atomically; a segment offered again after a crash must be the same.
fn archive_command(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "if test -f \"{folder}/%f\"; then cmp -s \"%p\" \"{folder}/%f\"; \
         else cp \"%p\" \"{folder}/.tmp-%f\" && mv \"{folder}/.tmp-%f\" \"{folder}/%f\"; fi"
    )
}

pub struct Postgres {
    pub major: u32,
    pub data: PathBuf,
    /// The folder of the Unix socket.
    pub sockets: PathBuf,
    pub port: u16,
    /// Where the server's own `archive_command` copies to; empty path for a server that was not made by the builder.
    pub oracle: PathBuf,
    /// Command line settings of the next start: `-c name=value`.
    pub overrides: Vec<String>,
    /// PATH of the server, which its `restore_command` inherits; `None`: the caller's.
    pub path: Option<String>,
    stage: Stage,
    bin: PathBuf,
    libraries: Option<String>,
    log: PathBuf,
    process: Option<Child>,
}

impl Postgres {
    pub fn builder(major: u32) -> Builder {
        Builder { major, wal_segsize_mib: 16, settings: Vec::new(), hba: Vec::new(), name: "pg".to_owned() }
    }

    /// A server over a data directory that exists, such as a restored one, not started yet. Its own port and socket
    /// folder and `archive_mode=off` are given on the command line, so that nothing of the original is disturbed.
    pub fn over(stage: &Stage, major: u32, data: &Path) -> Postgres {
        let name = data.file_name().expect("a data directory has a name").to_string_lossy().into_owned();
        let folder = stage.make_dir(format!("run-{name}"));
        let mut server = Postgres::in_folder(stage, major, &folder, data.to_owned());
        server.overrides = vec!["archive_mode=off".to_owned(), "listen_addresses=127.0.0.1".to_owned()];
        server
    }

    fn in_folder(stage: &Stage, major: u32, folder: &Path, data: PathBuf) -> Postgres {
        let (root, bin) = parts::postgres_home(major);
        let system = root.starts_with("/usr");
        let home = if system { root.clone() } else { stage.reachable(&format!("postgres-{major}"), &root) };
        let libraries = root.ends_with(".cache/unpacked").then(|| {
            let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
            format!("{0}/usr/lib/{triplet}:{0}/lib/{triplet}", home.display())
        });
        Postgres {
            major,
            data,
            sockets: folder.to_owned(),
            port: parts::free_port(),
            oracle: PathBuf::new(),
            overrides: Vec::new(),
            path: None,
            stage: stage.clone(),
            bin: home.join(bin),
            libraries,
            log: folder.join("server.log"),
            process: None,
        }
    }

    /// The folder with `postgres`, `initdb`, `pg_ctl` that the servers' user can enter.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// One of the server's own programs, as the servers' user.
    pub fn program(&self, name: &str) -> Command {
        let mut command = self.stage.command(self.bin.join(name));
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Starts the server and waits until it answers SQL (in recovery too, if hot standby is on).
    #[track_caller]
    pub fn start(&mut self) {
        self.spawn();
        eventually(START, "PostgreSQL to answer", || {
            let status = self.process.as_mut().expect("just spawned").try_wait().expect("wait");
            assert!(status.is_none(), "PostgreSQL ended at start ({status:?}):\n{}", self.log_tail());
            self.connect().and_then(|sql| sql.try_rows("SELECT 1")).map(|_| ())
        });
    }

    /// Starts the server and does not wait; for servers that are expected to fail or to take their time.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "this server runs already");
        let log = File::options().create(true).append(true).open(&self.log).expect("the server's log");
        let mut command = self.program("postgres");
        command.arg("-D").arg(&self.data);
        command.arg("-c").arg(format!("port={}", self.port));
        command.arg("-c").arg(format!("unix_socket_directories={}", self.sockets.display()));
        for setting in &self.overrides {
            command.arg("-c").arg(setting);
        }
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        command.stdout(log.try_clone().expect("the log again")).stderr(log);
        self.process = Some(command.spawn().expect("postgres runs"));
    }

    /// Waits for the server to end by itself.
    #[track_caller]
    pub fn wait_for_end(&mut self, deadline: Duration) -> ExitStatus {
        let process = self.process.as_mut().expect("the server runs");
        let status = eventually(deadline, "PostgreSQL to end", || match process.try_wait().expect("wait") {
            Some(status) => Ok(status),
            None => Err("it runs".to_owned()),
        });
        self.process = None;
        status
    }

    /// As a crash of the server: every process leaves at once, without a checkpoint.
    #[track_caller]
    pub fn stop_immediate(&mut self) {
        self.stop_by(Signal::QUIT);
    }

    /// SIGKILL for the first process and then for all others, which the first one can no longer tell to go in an orderly way.
    #[track_caller]
    pub fn kill9(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let _ = process.kill();
        self.stage.kill_below(&self.data);
        let _ = process.wait();
    }

    /// A clean shutdown: disconnects everybody, writes a checkpoint, waits for WAL senders.
    #[track_caller]
    pub fn stop_fast(&mut self) {
        self.stop_by(Signal::INT);
    }

    /// For the first process only.
    pub fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            kill_process(pid_of(process), signal).expect("the server runs");
        }
    }

    #[track_caller]
    fn stop_by(&mut self, signal: Signal) {
        if self.process.is_none() {
            return;
        }
        self.signal(signal);
        self.wait_for_end(Duration::from_secs(60));
    }

    #[track_caller]
    pub fn restart(&mut self) {
        self.stop_fast();
        self.start();
    }

    /// Crash and start again.
    #[track_caller]
    pub fn crash_and_restart(&mut self) {
        self.stop_immediate();
        self.start();
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// libpq's settings over the Unix socket, as `postgres`.
    pub fn socket_url(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.sockets.display(), self.port)
    }

    /// The same over TCP, as a URL.
    pub fn tcp_url(&self) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/postgres", self.port)
    }

    pub fn connect(&self) -> Result<Sql, String> {
        Sql::connect(&self.socket_url())
    }

    /// Runs statements in a session of their own and gives their rows.
    #[track_caller]
    pub fn psql(&self, sql: &str) -> Vec<Row> {
        self.connect().unwrap_or_else(|error| panic!("cannot connect: {error}\n{}", self.log_tail())).rows(sql)
    }

    /// The first value of the first row.
    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        self.connect().unwrap_or_else(|error| panic!("cannot connect: {error}\n{}", self.log_tail())).value(sql)
    }

    #[track_caller]
    pub fn lsn(&self, sql: &str) -> Lsn {
        self.value(sql).parse().expect("an LSN")
    }

    #[track_caller]
    pub fn insert_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_insert_lsn()")
    }

    #[track_caller]
    pub fn flush_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_flush_lsn()")
    }

    #[track_caller]
    pub fn switch_wal(&self) -> Lsn {
        self.lsn("SELECT pg_switch_wal()")
    }

    #[track_caller]
    pub fn system_identifier(&self) -> SystemIdentifier {
        self.value("SELECT system_identifier FROM pg_control_system()").parse().expect("a system identifier")
    }

    #[track_caller]
    pub fn segment_size(&self) -> SegmentSize {
        let bytes = self.value("SELECT bytes_per_wal_segment FROM pg_control_init()");
        SegmentSize::new(bytes.parse().expect("a number")).expect("a segment size")
    }

    /// A physical slot's `restart_lsn`; `None` when there is no such slot or it holds nothing.
    #[track_caller]
    pub fn slot_restart_lsn(&self, slot: &str) -> Option<Lsn> {
        let text = self.value(&format!("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '{slot}'"));
        if text.is_empty() { None } else { Some(text.parse().expect("an LSN")) }
    }

    /// Drops a slot. The server notices a moment later that a receiver was killed, and refuses until then.
    #[track_caller]
    pub fn drop_slot(&self, slot: &str) {
        eventually(START, "the slot to be dropped", || {
            self.connect()?.try_rows(&format!("SELECT pg_drop_replication_slot('{slot}')")).map(|_| ())
        });
    }

    /// Waits until the server has ended recovery and takes writes.
    #[track_caller]
    pub fn wait_promoted(&mut self, deadline: Duration) {
        eventually(deadline, "recovery to end", || {
            let status = self.process.as_mut().expect("the server runs").try_wait().expect("wait");
            assert!(status.is_none(), "PostgreSQL ended in recovery ({status:?}):\n{}", self.log_tail());
            let answer = self.connect()?.try_rows("SELECT pg_is_in_recovery()")?;
            if answer[0][0].as_deref() == Some("f") { Ok(()) } else { Err("in recovery".to_owned()) }
        });
    }

    /// Makes sure that every complete segment so far is in the oracle: switches, and waits for the archiver.
    #[track_caller]
    pub fn wait_oracle_complete(&self) {
        // Releases differ in what segment a boundary belongs to, and 13 cannot subtract from an LSN.
        let end = Lsn::new(self.switch_wal().get() - 1);
        let last = self.value(&format!("SELECT pg_walfile_name('{end}')"));
        wait_until(Duration::from_secs(60), &format!("the server to archive {last}"), || {
            self.oracle.join(&last).exists()
        });
    }

    /// pgbench's tables.
    #[track_caller]
    pub fn pgbench_init(&self, scale: u32) {
        let done = self.pgbench_command().args(["-i", "-q", "-s", &scale.to_string()]).output().expect("pgbench runs");
        assert!(done.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Load in the background until the handle is stopped or dropped; `arguments` as for pgbench, such as
    /// `["-c", "4", "-T", "600"]`. A server that goes away ends it.
    pub fn pgbench(&self, arguments: &[&str]) -> Load {
        let log = File::create(self.stage.join(format!("pgbench-{}.log", parts::free_port()))).expect("pgbench's log");
        let mut command = self.pgbench_command();
        command
            .args(["-n", "-M", "prepared"])
            .args(arguments)
            .stdout(log.try_clone().expect("the log again"))
            .stderr(log);
        Load(Some(command.spawn().expect("pgbench runs")))
    }

    fn pgbench_command(&self) -> Command {
        let mut command = Command::new(parts::tool("pgbench"));
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string()).env("PGUSER", "postgres");
        command.env("PGDATABASE", "postgres").stdin(Stdio::null());
        command
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// True once nothing listens on the port any more.
    pub fn is_port_silent(&self) -> bool {
        TcpStream::connect(("127.0.0.1", self.port)).is_err()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Immediate shutdown takes the children along, which a SIGKILL of the first process would not.
            let _ = kill_process(pid_of(&process), Signal::QUIT);
            for _ in 0..200 {
                if !matches!(process.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(25));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// pgbench at work.
pub struct Load(Option<Child>);

impl Load {
    /// Stops it; it may have ended already.
    pub fn stop(mut self) {
        self.end();
    }

    pub fn is_running(&mut self) -> bool {
        self.0.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Waits for it to end by itself (`-t` or `-T`).
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) {
        let mut child = self.0.take().expect("not stopped");
        wait_until(deadline, "pgbench to end", || !matches!(child.try_wait(), Ok(None)));
    }

    fn end(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}
