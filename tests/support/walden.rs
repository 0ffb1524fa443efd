//! The built binary at work: one-off commands and the agent.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use super::parts;
use super::postgres::{Postgres, pid_of};
use super::stage::Stage;
use super::wait::eventually;

/// One-off commands end within this, or the test fails.
const COMMAND: Duration = Duration::from_secs(300);

/// A configuration and the binary.
#[derive(Clone)]
pub struct Walden {
    stage: Stage,
    binary: PathBuf,
    config: PathBuf,
    listen: Option<u16>,
    environment: Vec<(String, String)>,
    wrapper: Vec<String>,
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Walden {
    /// Over a configuration file with exactly this text.
    pub fn with_config(stage: &Stage, toml: &str) -> Walden {
        let listen = toml
            .lines()
            .find_map(|line| line.trim().strip_prefix("listen = \"127.0.0.1:")?.split('"').next()?.parse().ok());
        let binary = stage.reachable("walden-bin", Path::new(env!("CARGO_BIN_EXE_walden")));
        let config = stage.write(format!("walden-{}.toml", parts::free_port()), toml);
        Walden { stage: stage.clone(), binary, config, listen, environment: Vec::new(), wrapper: Vec::new() }
    }

    /// Over the server's Unix socket, with spool, state and a local repository in the stage (`spool`, `state`,
    /// `archive`), the HTTP port free and no backup by itself. `more` is TOML that follows: tables that are not
    /// `[postgres]`, `[spool]`, `[state]`, `[metrics]` or `[[repository]]`.
    pub fn local(stage: &Stage, postgres: &Postgres, more: &str) -> Walden {
        let repository = format!(
            "[[repository]]\nname = \"main\"\ntype = \"local\"\npath = \"{}\"\n",
            stage.join("archive").display()
        );
        let backup = if more.contains("[backup]") { "" } else { "[backup]\ninitial = false\n" };
        Walden::with_repository(stage, postgres, &format!("{repository}{backup}{more}"))
    }

    /// As `local`, but the repositories are in `more`, and so is `[backup]`.
    pub fn with_repository(stage: &Stage, postgres: &Postgres, more: &str) -> Walden {
        let toml = format!(
            "[postgres]\nurl = \"{}\"\n[spool]\npath = \"{}\"\nfree_bytes_min = 0\n[state]\npath = \"{}\"\n[metrics]\nlisten = \"127.0.0.1:{}\"\n{more}",
            postgres.socket_url(),
            stage.join("spool").display(),
            stage.join("state").display(),
            parts::free_port()
        );
        Walden::with_config(stage, &toml)
    }

    pub fn env(mut self, name: &str, value: &str) -> Walden {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs every later command below this program, such as `["strace", "-f", "-o", "FILE", …]`.
    pub fn below(mut self, wrapper: &[&str]) -> Walden {
        self.wrapper = wrapper.iter().map(|&part| part.to_owned()).collect();
        self
    }

    pub fn config_path(&self) -> &Path {
        &self.config
    }

    pub fn binary(&self) -> &Path {
        &self.binary
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// The repository of [`Walden::local`].
    pub fn repository(&self) -> PathBuf {
        self.stage.join("archive")
    }

    pub fn spool(&self) -> PathBuf {
        self.stage.join("spool")
    }

    pub fn state(&self) -> PathBuf {
        self.stage.join("state")
    }

    /// `walden --config FILE ARGUMENTS…` as the servers' user, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match self.wrapper.split_first() {
            Some((program, rest)) => {
                let mut command = self.stage.command(program);
                command.args(rest).arg(&self.binary);
                command
            }
            None => self.stage.command(&self.binary),
        };
        command.arg("--config").arg(&self.config).args(arguments).stdin(Stdio::null()).env("RUST_BACKTRACE", "1");
        for (name, value) in &self.environment {
            command.env(name, value);
        }
        command
    }

    /// Runs a command to its end.
    #[track_caller]
    pub fn exec(&self, arguments: &[&str]) -> Finished {
        finish(self.command(arguments), COMMAND)
    }

    /// Runs a command that must succeed, and gives its stdout.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let done = self.exec(arguments);
        assert_eq!(done.code, Some(0), "walden {arguments:?}:\n{}{}", done.stdout, done.stderr);
        done.stdout
    }

    /// Runs a command with `--json` that must succeed.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("walden {all:?} printed no JSON ({error}): {text}"))
    }

    /// Starts the agent and does not wait.
    pub fn run(&self) -> Agent {
        self.spawn(&["run"])
    }

    /// Starts the agent and waits until it streams.
    #[track_caller]
    pub fn run_connected(&self) -> Agent {
        let mut agent = self.run();
        agent.wait_status(Duration::from_secs(30), "the agent to stream", |status| status["received_lsn"].is_string());
        agent
    }

    /// Any long command, in the background.
    pub fn spawn(&self, arguments: &[&str]) -> Agent {
        let log = self.stage.join(format!("walden-{}-{}.log", arguments.first().unwrap_or(&""), parts::free_port()));
        let file = File::create(&log).expect("a log file");
        let mut command = self.command(arguments);
        command.stdout(file.try_clone().expect("the log again")).stderr(file);
        let child = command.spawn().expect("walden runs");
        Agent { child: Some(child), ended: None, log, listen: self.listen }
    }
}

/// Runs any command to its end within `deadline`.
#[track_caller]
pub fn finish(mut command: Command, deadline: Duration) -> Finished {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if begun.elapsed() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} did not end within {deadline:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Finished { code: status.code(), stdout: stdout.join().expect("reader"), stderr: stderr.join().expect("reader") }
}

/// Reads a pipe to its end on a thread, so that a chatty program never blocks.
fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A `walden` in the background, killed when dropped.
pub struct Agent {
    child: Option<Child>,
    ended: Option<ExitStatus>,
    log: PathBuf,
    listen: Option<u16>,
}

impl Agent {
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    pub fn is_running(&mut self) -> bool {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(None)) => true,
            Some(Ok(Some(status))) => {
                self.ended = Some(status);
                self.child = None;
                false
            }
            _ => false,
        }
    }

    /// SIGKILL, and collected.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            self.ended = child.wait().ok();
        }
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            // It may have ended by itself.
            let _ = kill_process(pid_of(child), signal);
        }
    }

    /// SIGTERM, then waits for the end.
    #[track_caller]
    pub fn sigterm(&mut self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(deadline)
    }

    /// Waits for the end.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let begun = Instant::now();
        while self.is_running() {
            assert!(begun.elapsed() < deadline, "walden did not end within {deadline:?}:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.ended.expect("it has ended")
    }

    /// Everything it has written to stdout and stderr.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// GET on the agent's HTTP port: status code and body.
    pub fn get(&self, path: &str) -> Result<(u16, String), String> {
        http_get(self.listen.ok_or("metrics.listen is not 127.0.0.1")?, path)
    }

    /// The JSON of `/status`.
    pub fn status(&self) -> Result<Value, String> {
        let (_, body) = self.get("/status")?;
        serde_json::from_str(&body).map_err(|error| format!("{error}: {body}"))
    }

    /// Waits until `/status` satisfies `holds`, and gives it. Fails at once when the agent has ended.
    #[track_caller]
    pub fn wait_status(&mut self, deadline: Duration, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        eventually(deadline, what, || {
            assert!(self.is_running(), "walden ended ({:?}) before {what}:\n{}", self.ended, self.log_tail());
            let status = self.status()?;
            if holds(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Waits until everything before `lsn` is in every required repository.
    #[track_caller]
    pub fn wait_archived(&mut self, lsn: walden::wal::Lsn, deadline: Duration) {
        self.wait_position("archived_lsn", lsn, deadline);
    }

    /// Waits until everything before `lsn` is durable by the policy.
    #[track_caller]
    pub fn wait_durable(&mut self, lsn: walden::wal::Lsn, deadline: Duration) {
        self.wait_position("durable_lsn", lsn, deadline);
    }

    #[track_caller]
    fn wait_position(&mut self, field: &str, lsn: walden::wal::Lsn, deadline: Duration) {
        self.wait_status(deadline, &format!("{field} to reach {lsn}"), |status| {
            status[field]
                .as_str()
                .and_then(|text| text.parse().ok())
                .is_some_and(|reached: walden::wal::Lsn| reached >= lsn)
        });
    }

    /// One value of `/metrics`: the first sample whose name and labels begin with `sample`.
    pub fn metric(&self, sample: &str) -> Option<f64> {
        let (_, body) = self.get("/metrics").ok()?;
        let line = body.lines().find(|line| line.starts_with(sample) && !line.starts_with('#'))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// The highest resident memory so far, in KiB (`VmHWM`).
    #[track_caller]
    pub fn peak_memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the agent runs");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number of kB")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("walden's log ends:\n{}", self.log_tail());
        }
        self.kill9();
    }
}

/// Whether a status names this cause.
pub fn has_cause(status: &Value, code: &str) -> bool {
    status["causes"].as_array().is_some_and(|all| all.iter().any(|cause| cause["code"] == code))
}

/// HTTP/1.0 by hand: a status code and the body.
pub fn http_get(port: u16, path: &str) -> Result<(u16, String), String> {
    let describe = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(describe)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(describe)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).map_err(describe)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(describe)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no HTTP answer: {answer}"))?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| format!("no status: {head}"))?;
    Ok((code, body.to_owned()))
}
