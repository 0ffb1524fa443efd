//! What a release brings beside the program: container image, systemd service, completions, manual page.

use std::collections::BTreeSet;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::walden::finish;
use crate::support::{Postgres, Stage, Walden, has_cause};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn output(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    let done = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    let text = [done.stdout, done.stderr].concat();
    Some((done.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// `walden` with nothing around it: no configuration, no home.
fn walden(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walden"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    let done = finish(command, Duration::from_secs(30));
    assert_eq!(done.code, Some(0), "{arguments:?}: {}", done.stderr);
    done.stdout
}

/// The commands as `walden --help` lists them.
fn commands() -> Vec<String> {
    let help = walden(&["--help"]);
    let (_, list) = help.split_once("Commands:\n").expect("the list");
    let lines = list.lines().take_while(|line| line.starts_with("  "));
    let names = lines.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    let names: Vec<String> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    assert!(names.len() >= 10 && names.contains(&"wal-fetch".to_owned()), "{names:?}");
    names
}

/// Dockerfile's instructions, continued lines joined: the word and the rest.
fn instructions(dockerfile: &str) -> Vec<(String, String)> {
    let joined = dockerfile.replace("\\\n", " ");
    let lines = joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once(' ').expect("a word and its rest")).map(|(a, b)| (a.into(), b.into())).collect()
}

/// No Docker engine is needed for this: what the build copies is there and is not ignored, and Cargo can work with it.
#[test]
fn the_container_image_copies_what_is_there() {
    let dockerfile = read("Dockerfile");
    let allowed: Vec<String> =
        read(".dockerignore").lines().filter_map(|line| Some(line.strip_prefix('!')?.to_owned())).collect();
    let context = tempfile::tempdir().expect("a folder");
    let mut copied = 0;
    for (word, rest) in instructions(&dockerfile) {
        if word != "COPY" || rest.contains("--from=") {
            continue;
        }
        let mut sources: Vec<&str> = rest.split_whitespace().filter(|part| !part.starts_with("--")).collect();
        let target = sources.pop().expect("a target");
        for source in sources {
            let path = root().join(source);
            assert!(path.exists(), "COPY {rest}: {source} does not exist");
            assert!(allowed.iter().any(|name| name == source), "COPY {rest}: .dockerignore keeps {source} away");
            if target.starts_with('/') {
                continue;
            }
            let at = context.path().join(source);
            fs::create_dir_all(at.parent().expect("it has a parent")).expect("a folder");
            let done = Command::new("cp").arg("-a").arg(&path).arg(&at).status().expect("cp runs");
            assert!(done.success());
            copied += 1;
        }
    }
    assert!(copied >= 4, "only {copied} sources");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let manifest = context.path().join("Cargo.toml");
    let manifest = manifest.to_str().expect("it is UTF-8");
    let (good, said) =
        output(&cargo, &["metadata", "--no-deps", "--format-version=1", "--manifest-path", manifest]).expect("cargo");
    assert!(good, "Cargo does not take what is copied: {said}");
}

#[test]
fn the_container_image_is_not_root_and_says_how_it_is() {
    let all = instructions(&read("Dockerfile"));
    let last = |wanted: &str| {
        let found = all.iter().rev().find(|(word, _)| word == wanted);
        found.map(|(_, rest)| rest.clone()).unwrap_or_else(|| panic!("no {wanted}"))
    };
    let runtime = all.iter().rposition(|(word, _)| word == "FROM").expect("stages");
    assert!(runtime > 0, "one stage only: the compiler would be shipped");
    let user = all[runtime..].iter().find(|(word, _)| word == "USER").map(|(_, rest)| rest.clone()).expect("a user");
    let (uid, gid) = user.split_once(':').expect("user and group");
    assert!(uid.parse::<u32>().is_ok_and(|id| id > 0) && gid.parse::<u32>().is_ok_and(|id| id > 0), "{user}");
    assert!(!all[runtime..].iter().any(|(word, _)| word == "RUN"), "the runtime image has no shell");
    let words =
        |text: &str| -> Vec<String> { serde_json::from_str(text).expect("the exec form, since there is no shell") };
    assert_eq!(words(&last("ENTRYPOINT")), ["/usr/local/bin/walden"]);
    let health = last("HEALTHCHECK");
    let command = words(&health[health.find("CMD ").expect("a command") + 4..]);
    assert_eq!(command, ["/usr/local/bin/walden", "status"]);
    let toolchain =
        read("Cargo.toml").lines().find_map(|line| Some(line.strip_prefix("rust-version = ")?.replace('"', "")));
    assert!(all[0].1.starts_with(&format!("rust:{}-", toolchain.expect("a version"))), "{}", all[0].1);
}

/// Everything that the binary is linked with is in the runtime image, as Dockerfile lists it.
#[test]
fn the_binarys_libraries_are_in_the_container_image() {
    let dockerfile = read("Dockerfile");
    let line = dockerfile.lines().find(|line| line.starts_with("# What the binary may need")).expect("the list");
    let there: BTreeSet<&str> = line.split_whitespace().filter(|word| word.contains(".so")).collect();
    let Some((good, text)) = output("readelf", &["--dynamic", env!("CARGO_BIN_EXE_walden")]) else {
        eprintln!("readelf is not here: the binary's libraries were not looked at");
        return;
    };
    assert!(good, "{text}");
    let needed: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .filter(|name| !name.starts_with("ld-linux"))
        .collect();
    assert!(needed.contains("libc.so.6"), "{text}");
    let missing: Vec<_> = needed.difference(&there).collect();
    assert!(missing.is_empty(), "the runtime image has no {missing:?}");
}

#[test]
fn the_service_file_is_sound() {
    let unit = read("config/walden.service");
    let value = |key: &str| unit.lines().find_map(|line| Some(line.strip_prefix(key)?.strip_prefix('=')?.to_owned()));
    assert_eq!(value("Type").as_deref(), Some("notify"));
    assert_eq!(value("User").as_deref(), Some("walden"));
    // What RestartPreventExitStatus names is what `run` ends with at its start, and no more.
    assert_eq!(value("RestartPreventExitStatus").as_deref(), Some("2 4"));
    let start = value("ExecStart").expect("ExecStart");
    let arguments: Vec<&str> = start.split(' ').skip(1).chain(["--help"]).collect();
    assert!(walden(&arguments).contains("The agent"), "{start}");

    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("walden.service");
    fs::write(&copy, unit.replace("/usr/local/bin/walden", env!("CARGO_BIN_EXE_walden"))).expect("a copy");
    let copy = copy.to_str().expect("it is UTF-8");
    match output("systemd-analyze", &["verify", "--man=no", copy]) {
        Some((good, said)) => assert!(good && !said.contains("walden.service"), "{said}"),
        None => eprintln!("systemd-analyze is not here: the service file was not verified"),
    }
}

/// A manager's socket. Each message is one datagram of `NAME=value` lines.
struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Manager {
    fn new(socket: UnixDatagram) -> Self {
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        Self { socket, heard: Vec::new() }
    }

    fn bind(path: &Path) -> Self {
        Self::new(UnixDatagram::bind(path).expect("a socket"))
    }

    /// Reads on until a message has this line.
    #[track_caller]
    fn wait_for(&mut self, wanted: &str) -> String {
        loop {
            let mut buffer = [0; 4096];
            let length = self
                .socket
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("{wanted} did not come ({error}); heard: {:?}", self.heard));
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            self.heard.push(message.clone());
            if message.lines().any(|line| line == wanted) {
                return message;
            }
        }
    }
}

fn socket_in(stage: &Stage) -> (Manager, PathBuf) {
    let path = stage.join("notify");
    let manager = Manager::bind(&path);
    stage.give(&path);
    (manager, path)
}

/// Ready when WAL streams; alive, reloading, stopping; and the end comes after "stopping".
#[test]
fn the_service_manager_is_told_what_happens() {
    let stage = Stage::new("notify");
    let postgres = Postgres::builder(17).start(&stage);
    let (mut manager, path) = socket_in(&stage);
    let walden = Walden::local(&stage, &postgres, "")
        .env("NOTIFY_SOCKET", path.to_str().expect("it is UTF-8"))
        .env("WATCHDOG_USEC", "60000000");
    let mut agent = walden.run();
    manager.wait_for("READY=1");
    let status = agent.status().expect("it answers");
    assert!(status["received_lsn"].is_string(), "ready before WAL streamed: {status}");
    manager.wait_for("WATCHDOG=1");

    agent.signal(Signal::HUP);
    let reloading = manager.wait_for("RELOADING=1");
    let told = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")?.parse::<u64>().ok());
    let uptime = fs::read_to_string("/proc/uptime").expect("Linux has it");
    let uptime: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).expect("seconds");
    let told = told.expect("the time of the reload") as f64 / 1e6;
    assert!(told > 0.0 && told <= uptime + 1.0, "{told} is not on the clock that stands at {uptime}");
    manager.wait_for("READY=1");

    agent.signal(Signal::TERM);
    manager.wait_for("STOPPING=1");
    assert!(agent.wait(Duration::from_secs(30)).success());
    assert!(!manager.heard.iter().any(|message| message.contains("password")), "{:?}", manager.heard);
    let mut postgres = postgres;
    postgres.stop_fast();
}

/// A server that is down is waited for by the agent, not by the manager, which would kill it in the end. The socket is an
/// abstract one, as in some containers.
#[test]
fn the_service_manager_does_not_wait_for_a_server_that_is_down() {
    let stage = Stage::new("notifydown");
    let name = format!("walden-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let mut manager = Manager::new(UnixDatagram::bind_addr(&address).expect("a socket"));
    let mut postgres = Postgres::builder(15).start(&stage);
    postgres.stop_fast();
    let walden = Walden::local(&stage, &postgres, "").env("NOTIFY_SOCKET", &format!("@{name}"));
    let mut agent = walden.run();
    manager.wait_for("READY=1");
    assert!(agent.is_running());
    let status = agent.status().expect("it answers");
    assert!(has_cause(&status, "not_connected"), "{status}");
    let told = |message: &String| message.starts_with("STATUS=not healthy") && message.contains("not_connected");
    assert!(manager.heard.iter().any(told), "{:?}", manager.heard);
    assert!(!manager.heard.iter().any(|message| message.contains("WATCHDOG")), "nobody asked for it");
    assert!(agent.sigterm(Duration::from_secs(30)).success());
    manager.wait_for("STOPPING=1");
}

/// A refusal is no readiness: the manager sees the exit code.
#[test]
fn the_service_manager_never_hears_of_readiness_where_the_start_is_refused() {
    let stage = Stage::new("notifyno");
    let postgres = Postgres::builder(15).start(&stage);
    let (manager, path) = socket_in(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ncompression = \"gzip\"\n")
        .env("NOTIFY_SOCKET", path.to_str().expect("it is UTF-8"));
    assert_eq!(walden.exec(&["run"]).code, Some(2));
    manager.socket.set_nonblocking(true).expect("a mode");
    let mut buffer = [0; 4096];
    while let Ok(length) = manager.socket.recv(&mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..length]);
        assert!(!message.contains("READY=1"), "{message}");
    }
    let mut postgres = postgres;
    postgres.stop_fast();
}

/// Completions and the manual page come from any machine, also one whose configuration is broken.
#[test]
fn completions_know_every_command_and_the_shells_take_them() {
    let folder = tempfile::tempdir().expect("a folder");
    for shell in ["bash", "fish", "zsh"] {
        let script = walden(&["--config", "/nowhere/walden.toml", "completions", shell]);
        for command in commands() {
            assert!(script.contains(&command), "{shell} does not know {command}");
        }
        assert!(script.contains("--target-time") || script.contains("-l target-time"), "{shell} knows no flags");
        let file = folder.path().join(format!("walden.{shell}"));
        fs::write(&file, &script).expect("a file");
        // `-n` reads the script and runs nothing.
        match output(shell, &["-n", file.to_str().expect("it is UTF-8")]) {
            Some((good, said)) => assert!(good, "{shell}: {said}"),
            None => eprintln!("{shell} is not here: its completions were not read by it"),
        }
    }
    // What bash itself offers for `walden res`, and for a flag of `restore`.
    let file = folder.path().join("walden.bash");
    let ask = format!(
        "source {}; COMP_WORDS=(walden res); COMP_CWORD=1; _walden walden res walden; echo ${{COMPREPLY[*]}}; \
         COMP_WORDS=(walden restore --target-t); COMP_CWORD=2; _walden walden --target-t restore; echo ${{COMPREPLY[*]}}",
        file.display()
    );
    if let Some((good, said)) = output("bash", &["-c", &ask]) {
        assert!(good && said == "restore\n--target-time\n", "{said}");
    }
}

#[test]
fn the_manual_page_has_every_command_and_no_fault() {
    let page = walden(&["--config", "/nowhere/walden.toml", "man"]);
    assert!(page.contains(".TH walden 1") || page.contains(".TH WALDEN 1"), "{}", &page[..200.min(page.len())]);
    for command in commands() {
        let heading = format!(".SS \"walden {}\"", command.replace('-', "\\-"));
        assert!(page.contains(&heading), "{heading} is missing");
    }
    for flag in ["\\-\\-target\\-time", "\\-\\-pgdata", "\\-\\-repository", "\\-\\-json"] {
        assert!(page.contains(flag), "{flag} is missing");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("walden.1");
    fs::write(&file, &page).expect("a file");
    match output("groff", &["-man", "-Tutf8", "-ww", "-z", file.to_str().expect("it is UTF-8")]) {
        Some((good, said)) => assert!(good && said.is_empty(), "groff complains: {said}"),
        None => eprintln!("groff is not here: the manual page was not formatted"),
    }
}
