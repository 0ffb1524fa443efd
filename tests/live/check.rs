//! `walden check` and the start of `walden run` on a server, a disk and stores that are not as they should be: each fault is one clear
//! line, nothing is changed, and the agent heals without a restart once the fault is gone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Runtime;

use super::streaming::{archive_all, majors};
use crate::support::s3_double::{ACCESS_KEY, BUCKET, S3Server, SECRET_KEY};
use crate::support::s3_proxy::HttpFault;
use crate::support::{Agent, Finished, Postgres, Stage, Walden, parts, wait_until, walden};

const MINUTE: Duration = Duration::from_secs(60);
const MAJOR: u32 = 15;

/// Everything below the test's folder but servers, logs and the binary: path, mode, size.
fn listing(stage: &Stage) -> Vec<(String, u32, u64)> {
    fn add(folder: &Path, root: &Path, found: &mut Vec<(String, u32, u64)>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let (path, metadata) = (entry.path(), entry.metadata().expect("it was just listed"));
            let name = path.strip_prefix(root).expect("below").display().to_string();
            if ["pg", "walden-", "postgres-", "s3", "pgbench"].iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let size = if metadata.is_dir() { 0 } else { metadata.len() };
            found.push((name, metadata.permissions().mode() & 0o7777, size));
            if metadata.is_dir() {
                add(&path, root, found);
            }
        }
    }
    let mut found = Vec::new();
    add(stage.path(), stage.path(), &mut found);
    found.sort();
    found
}

/// The configuration of a test: everything in the stage, quick to try again.
fn configured(stage: &Stage, url: &str, spool: &str, repository: &str) -> Walden {
    Walden::with_config(
        stage,
        &format!(
            "[postgres]\nurl = \"{url}\"\nconnect_timeout = \"3s\"\n[spool]\npath = \"{spool}\"\nfree_bytes_min = 0\n[state]\npath = \"{}\"\n\
             [upload]\nretry_delay_max = \"500ms\"\nrequest_timeout = \"5s\"\n[backup]\ninitial = false\n[metrics]\nlisten = \"127.0.0.1:{}\"\n{repository}",
            stage.join("state").display(),
            parts::free_port(),
        ),
    )
}

fn local(stage: &Stage, url: &str) -> Walden {
    configured(stage, url, &stage.join("spool").to_string_lossy(), &local_repository(&stage.join("archive")))
}

fn local_repository(path: &Path) -> String {
    format!("[[repository]]\nname = \"main\"\ntype = \"local\"\npath = \"{}\"\n", path.display())
}

/// The checks that failed, by name.
fn failed(report: &Value) -> Vec<(String, String, String)> {
    let text = |check: &Value, field: &str| check[field].as_str().expect("a text").to_owned();
    let checks = report["checks"].as_array().expect("checks");
    checks
        .iter()
        .filter(|check| check["ok"] == false)
        .map(|check| (text(check, "name"), text(check, "message"), text(check, "hint")))
        .collect()
}

#[track_caller]
fn report(done: &Finished) -> Value {
    serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {done:?}"))
}

/// `check` fails in `name` alone, says these words and what to do, in both forms, and changes nothing.
#[track_caller]
fn assert_found(walden: &Walden, name: &str, words: &[&str]) {
    let before = listing(walden.stage());
    let done = walden.exec(&["--json", "check"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    let report = report(&done);
    assert_eq!((&report["ok"], &report["schema"]), (&Value::Bool(false), &Value::from(1)), "{report}");
    let failed = failed(&report);
    assert_eq!(failed.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(), [name], "{report:#}");
    let (_, message, hint) = &failed[0];
    let said = format!("{message}; {hint}");
    for word in words {
        assert!(said.contains(word), "\"{word}\" is not said: {said}");
    }
    assert!(!hint.is_empty() && !said.contains('\n'), "{said}");
    let people = walden.exec(&["check"]);
    assert_eq!(people.code, Some(1));
    let lines: Vec<&str> = people.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(lines.len(), 1, "{}", people.stdout);
    assert!(people.stderr.is_empty(), "{}", people.stderr);
    assert_eq!(walden.exec(&["-q", "check"]).stdout.lines().count(), 2, "the failed check and the sum");
    assert_eq!(before, listing(walden.stage()), "check changed something");
}

/// The agent says its fault in one ERROR line and is unhealthy; then `heal`, and it streams without a restart.
#[track_caller]
fn assert_heals(walden: &Walden, cause: &str, words: &[&str], heal: impl FnOnce()) -> Agent {
    let mut agent = walden.run();
    let status = agent.wait_status(MINUTE, cause, |status| has_cause(status, cause));
    assert_eq!(status["healthy"], false);
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    assert_eq!(walden.exec(&["status"]).code, Some(1));
    // It is tried again a few times, and not said again.
    std::thread::sleep(Duration::from_secs(3));
    assert!(agent.is_running(), "{}", agent.log_tail());
    let log = agent.log();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains(" ERROR ")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    for word in words {
        assert!(errors[0].contains(word), "\"{word}\" is not said: {}", errors[0]);
    }
    assert!(errors[0].contains("; "), "no word on what to do: {}", errors[0]);
    heal();
    agent.wait_status(MINUTE, "healthy without a restart", |status| {
        status["healthy"] == true && status["received_lsn"].is_string()
    });
    agent
}

fn has_cause(status: &Value, code: &str) -> bool {
    status["causes"].as_array().is_some_and(|all| all.iter().any(|cause| cause["code"] == code))
}

/// A set-up that works passes, without and beside an agent, and nothing is left of it.
#[test]
fn a_healthy_set_up_passes_and_nothing_is_changed() {
    majors().into_iter().for_each(assert_passes);
}

fn assert_passes(major: u32) {
    let stage = Stage::new("check");
    let postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
    let walden = local(&stage, &postgres.socket_url());
    let before = listing(&stage);
    let done = walden.exec(&["--json", "check"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let checks = report(&done);
    assert_eq!(checks["ok"], true);
    let names: Vec<&str> = checks["checks"]
        .as_array()
        .expect("checks")
        .iter()
        .map(|check| check["name"].as_str().expect("a name"))
        .collect();
    for name in [
        "configuration",
        "connection",
        "privileges",
        "sql",
        "wal_level",
        "max_wal_senders",
        "slot",
        "wal_sender_timeout",
        "spool",
        "state",
        "repository.main",
        "abilities.main",
        "identity.main",
        "restore.main",
        "clock",
        "metrics",
    ] {
        assert!(names.contains(&name), "{name} was not looked at: {names:?}");
    }
    assert_eq!(before, listing(&stage), "no spool, no state, no repository");
    assert_eq!(postgres.value("SELECT count(*) FROM pg_replication_slots"), "0");
    // An empty folder that was there stays.
    stage.make_dir("archive");
    assert_eq!(walden.exec(&["check"]).code, Some(0));
    assert!(stage.join("archive").is_dir() && fs::read_dir(stage.join("archive")).expect("a folder").count() == 0);

    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    for _ in 0..3 {
        let done = walden.exec(&["check"]);
        assert_eq!(done.code, Some(0), "{done:?}");
        for words in ["the running agent streams from it", "the running agent holds it", "the running agent serves"] {
            assert!(done.stdout.contains(words), "\"{words}\" is not said: {}", done.stdout);
        }
    }
    let names = |all: &[(String, u32, u64)]| all.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>();
    let left = || {
        let all = names(&listing(&stage)).into_iter();
        all.filter(|name| name.contains("check") || name.contains(".tmp")).collect::<Vec<_>>()
    };
    // The agent writes beside it all the time; only what stays was left behind.
    wait_until(MINUTE, "nothing to be left by check", || left().is_empty());
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy still", |status| status["healthy"] == true);
    assert!(!agent.log().contains(" ERROR ") && !agent.log().contains(" WARN "), "{}", agent.log());

    // A second agent on this slot and repository would only stand by.
    let other = configured(
        &stage,
        &postgres.socket_url(),
        &stage.join("spool-2").to_string_lossy(),
        &local_repository(&stage.join("archive")),
    )
    .env("WALDEN_STATE__PATH", &stage.join("state-2").to_string_lossy());
    let done = other.exec(&["--json", "check"]);
    let found: Vec<String> = failed(&report(&done)).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(found, ["slot", "lease.main"], "{}", done.stdout);
    assert!(agent.sigterm(MINUTE).success());
}

#[test]
fn a_server_that_is_down_is_said_and_waited_for() {
    let stage = Stage::new("down");
    let mut postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    postgres.stop_fast();
    let walden = local(&stage, &postgres.tcp_url());
    let words = ["cannot connect to PostgreSQL at 127.0.0.1", "refused", "check host, port"];
    assert_found(&walden, "connection", &words);
    assert_heals(&walden, "not_connected", &words, || postgres.start());
}

#[test]
fn roles_that_may_not_are_said_and_heal() {
    let stage = Stage::new("roles");
    let postgres = Postgres::builder(MAJOR)
        .wal_segsize(1)
        .hba("host all,replication careful 127.0.0.1/32 scram-sha-256")
        .hba("host all,replication plain 127.0.0.1/32 trust")
        .hba("host all stranger 127.0.0.1/32 trust")
        .hba("host replication stranger 127.0.0.1/32 reject")
        .start(&stage);
    postgres.psql("CREATE ROLE careful LOGIN REPLICATION PASSWORD 'right'; CREATE ROLE plain LOGIN; CREATE ROLE stranger LOGIN REPLICATION");
    let at = |user: &str| format!("host=127.0.0.1 port={} dbname=postgres user={user}", postgres.port);

    let file = stage.write("password", "wrong\n");
    let walden = local(&stage, &at("careful")).env("WALDEN_POSTGRES__PASSWORD_FILE", &file.to_string_lossy());
    let words = ["refused the password of user \"careful\"", "check the user's password"];
    assert_found(&walden, "connection", &words);
    let mut agent = assert_heals(&walden, "not_connected", &words, || {
        stage.write("password", "right\n");
    });
    assert!(agent.sigterm(MINUTE).success());
    assert_eq!(walden.exec(&["check"]).code, Some(0));

    let walden = local(&stage, &at("plain"));
    let words = ["REPLICATION", "ALTER ROLE"];
    assert_found(&walden, "privileges", &words);
    let mut agent = assert_heals(&walden, "not_connected", &words, || {
        postgres.psql("ALTER ROLE plain REPLICATION");
    });
    assert!(agent.sigterm(MINUTE).success());
    assert_eq!(walden.exec(&["check"]).code, Some(0));

    assert_found(&local(&stage, &at("stranger")), "connection", &["pg_hba.conf", "stranger", "host replication"]);
    assert_found(&local(&stage, &at("nobody_here")), "connection", &["nobody_here"]);
    assert_found(
        &local(&stage, "host=no-such-host.invalid user=x"),
        "connection",
        &["no-such-host.invalid", "check host"],
    );
    // Ordinary SQL is not needed.
    let streaming = "host=127.0.0.1 port={} user=careful dbname=no_such_database password=right"
        .replace("{}", &postgres.port.to_string());
    let done = local(&stage, &streaming).exec(&["check"]);
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    assert!(
        done.stdout.lines().any(|line| line.starts_with("note") && line.contains("no_such_database")),
        "{}",
        done.stdout
    );
}

/// A role with LOGIN and REPLICATION and nothing else checks, streams, backs up and sees its slot. With pg_monitor the agent also sees
/// that commits wait for it.
#[test]
fn the_least_privileges_are_enough() {
    let stage = Stage::new("least");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    postgres.psql("CREATE ROLE least LOGIN REPLICATION");
    let url = format!("host=127.0.0.1 port={} dbname=postgres user=least", postgres.port);
    let walden = local(&stage, &url);
    let privileges = |word: &str| {
        let done = walden.exec(&["check"]);
        assert_eq!(done.code, Some(0), "{}", done.stdout);
        let line = done.stdout.lines().find(|line| line.split_whitespace().nth(1) == Some("privileges"));
        let line = line.expect("privileges are looked at").to_owned();
        for word in ["LOGIN and REPLICATION", "all that is needed", "pg_monitor", word] {
            assert!(line.contains(word), "\"{word}\" is not said: {line}");
        }
    };
    privileges("optional: not granted");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    walden.ok(&["backup"]);
    let status = agent.wait_status(MINUTE, "the slot, and no complaint", |status| {
        status["slot"]["wal_status"] == "reserved" && status["healthy"] == true && status["complete_until"].is_string()
    });
    assert_eq!(status["causes"].as_array().map(Vec::len), Some(0), "{status}");

    postgres.psql("GRANT pg_monitor TO least");
    privileges("optional: granted");
    postgres.psql("ALTER SYSTEM SET synchronous_standby_names = '*'");
    postgres.psql("SELECT pg_reload_conf()");
    agent.wait_status(MINUTE, "the cause", |status| has_cause(status, "unexpected_sync"));
    postgres.psql("ALTER SYSTEM RESET synchronous_standby_names");
    postgres.psql("SELECT pg_reload_conf()");
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    assert!(agent.sigterm(MINUTE).success());
}

#[test]
fn a_server_without_replication_is_said_and_heals() {
    let stage = Stage::new("minimal");
    let mut postgres = Postgres::builder(MAJOR)
        .wal_segsize(1)
        .setting("archive_mode", "off")
        .setting("wal_level", "minimal")
        .setting("max_wal_senders", "0")
        .start(&stage);
    let walden = local(&stage, &postgres.socket_url());
    let done = walden.exec(&["--json", "check"]);
    assert_eq!(done.code, Some(1));
    let found = failed(&report(&done));
    assert_eq!(
        found.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(),
        ["wal_level", "max_wal_senders"],
        "{}",
        done.stdout
    );
    assert!(found[0].2.contains("wal_level = replica"), "{found:?}");
    let mut agent = assert_heals(&walden, "not_connected", &["wal_level", "max_wal_senders"], || {
        postgres.stop_fast();
        postgres.overrides = ["wal_level=replica", "max_wal_senders=10"].map(str::to_owned).to_vec();
        postgres.start();
    });
    assert!(agent.sigterm(MINUTE).success());
    postgres.stop_fast();
    postgres.overrides.push("max_wal_senders=1".to_owned());
    postgres.start();
    assert_found(&walden, "max_wal_senders", &["0 of 1", "base backup", "raise max_wal_senders"]);
}

/// Ends with its owner.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn slots_that_cannot_be_used_are_said_and_heal() {
    let stage = Stage::new("slots");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).setting("wal_level", "logical").start(&stage);
    let walden = local(&stage, &postgres.socket_url());
    let without = local(&stage, &postgres.socket_url()).env("WALDEN_POSTGRES__CREATE_SLOT", "false");
    let words = ["\"walden\"", "create_slot", "pg_create_physical_replication_slot"];
    assert_found(&without, "slot", &words);
    let mut agent = assert_heals(&without, "slot_missing", &words, || {
        postgres.psql("SELECT pg_create_physical_replication_slot('walden', true)");
    });
    assert!(agent.sigterm(MINUTE).success());

    let folder = stage.make_dir("received");
    let receive = || {
        let mut command = stage.command(parts::tool("pg_receivewal"));
        command.args(["-d", &postgres.socket_url(), "--slot", "walden", "-D"]).arg(&folder);
        let receiver =
            Receiver(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("pg_receivewal runs"));
        wait_until(MINUTE, "pg_receivewal to stream", || {
            postgres.value("SELECT active FROM pg_replication_slots WHERE slot_name = 'walden'") == "t"
        });
        receiver
    };
    let receiver = receive();
    let words = ["\"walden\"", "in use", "postgres.slot"];
    let found = report(&walden.exec(&["--json", "check"]));
    let in_use = failed(&found);
    assert_eq!(in_use.len(), 1, "{found:#}");
    assert!(words.iter().all(|word| format!("{}; {}", in_use[0].1, in_use[0].2).contains(word)), "{in_use:?}");
    assert!(in_use[0].1.contains("pg_receivewal"), "who uses it: {in_use:?}");
    let mut agent = assert_heals(&walden, "not_connected", &words, move || drop(receiver));
    assert!(agent.sigterm(MINUTE).success());

    postgres.psql("SELECT pg_drop_replication_slot('walden')");
    postgres.psql("SELECT pg_create_logical_replication_slot('walden', 'pgoutput')");
    let words = ["\"walden\"", "logical", "postgres.slot"];
    assert_found(&walden, "slot", &["not a physical one", "postgres.slot"]);
    let mut agent = assert_heals(&walden, "slot_missing", &words, || {
        postgres.psql("SELECT pg_drop_replication_slot('walden')");
    });
    assert!(agent.sigterm(MINUTE).success());

    postgres.psql("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'");
    postgres.psql("SELECT pg_reload_conf()");
    for _ in 0..6 {
        postgres.psql("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))");
        postgres.switch_wal();
    }
    postgres.psql("CHECKPOINT");
    assert_found(&walden, "slot", &["invalidated", "base backup", "max_slot_wal_keep_size"]);
}

#[test]
fn folders_that_cannot_be_written_are_said_and_heal() {
    let stage = Stage::new("folders");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    let mode =
        |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");

    let shut = stage.make_dir("shut");
    mode(&shut, 0o500);
    let spool = shut.join("spool");
    let walden =
        configured(&stage, &postgres.socket_url(), &spool.to_string_lossy(), &local_repository(&stage.join("archive")));
    let words = [&*spool.to_string_lossy(), "Permission denied"];
    assert_found(&walden, "spool", &[words[0], words[1], "spool.path"]);
    let mut agent = assert_heals(&walden, "spool_failing", &[words[1], "spool.path"], || mode(&shut, 0o700));
    assert!(agent.sigterm(MINUTE).success());
    // Others may write to it.
    mode(&spool, 0o777);
    assert_found(&walden, "spool", &["others may write to it", "chmod 700"]);
    let mut agent = assert_heals(&walden, "spool_failing", &["others may write to it"], || mode(&spool, 0o700));
    assert!(agent.sigterm(MINUTE).success());
    let full = walden.clone().env("WALDEN_SPOOL__FREE_BYTES_MIN", "1000TiB");
    assert_found(&full, "spool", &["free", "make room"]);

    let archive = stage.make_dir("read-only");
    mode(&archive, 0o500);
    let spool = stage.join("spool");
    let walden = configured(&stage, &postgres.socket_url(), &spool.to_string_lossy(), &local_repository(&archive))
        .env("WALDEN_STATE__PATH", &stage.join("state-2").to_string_lossy());
    postgres.psql("SELECT pg_drop_replication_slot('walden')");
    let words = [&*archive.to_string_lossy(), "EACCES", "own the directory"];
    assert_found(&walden, "repository.main", &words);
    let mut agent = assert_heals(&walden, "store_failing", &words, || mode(&archive, 0o700));
    assert!(agent.sigterm(MINUTE).success());
    let lost = configured(
        &stage,
        &postgres.socket_url(),
        &spool.to_string_lossy(),
        &local_repository(&stage.join("not/there")),
    );
    assert_found(&lost, "repository.main", &["does not exist", "create it"]);
}

/// A repository over S3 with the keys in files.
fn s3(stage: &Stage, server: &S3Server, postgres: &Postgres, id: &Path, secret: &Path) -> Walden {
    let repository = format!(
        "[[repository]]\nname = \"main\"\ntype = \"s3\"\nbucket = \"{BUCKET}\"\nprefix = \"p\"\nregion = \"us-east-1\"\nendpoint = \"{}\"\npath_style = true\n\
         access_key_id_file = \"{}\"\nsecret_access_key_file = \"{}\"\n",
        server.endpoint,
        id.display(),
        secret.display()
    );
    configured(stage, &postgres.socket_url(), &stage.join("spool").to_string_lossy(), &repository)
}

#[test]
fn wrong_keys_are_said_and_heal() {
    let stage = Stage::new("keys");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(S3Server::start_s3s(&stage.join("s3")));
    let (id, secret) = (stage.write("id", ACCESS_KEY), stage.write("secret", "wrong-canary"));
    let walden = s3(&stage, &server, &postgres, &id, &secret);
    let words = ["s3://walden-test/p", "SignatureDoesNotMatch", "correct the access key"];
    assert_found(&walden, "repository.main", &words);
    let mut agent = assert_heals(&walden, "store_failing", &words, || {
        stage.write("secret", SECRET_KEY);
    });
    archive_all(&postgres, &mut agent);
    server.faults().forget_requests();
    let done = walden.exec(&["check"]);
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    // What was written and deleted lies below the folder for that.
    let touched: Vec<String> = server
        .faults()
        .requests()
        .into_iter()
        .filter(|request| {
            ["PUT", "POST", "DELETE"].contains(&request.method.as_str()) && request.path.contains("walden-check")
        })
        .map(|request| request.path)
        .collect();
    assert!(touched.len() >= 6, "{touched:?}");
    assert!(touched.iter().all(|path| path.starts_with(&format!("/{BUCKET}/p/main/walden-check/"))), "{touched:?}");
    assert!(agent.sigterm(MINUTE).success());
    // Alone, everything that is written is seen.
    server.faults().forget_requests();
    assert_eq!(walden.exec(&["check"]).code, Some(0));
    for request in server.faults().requests() {
        let is_write = ["PUT", "POST", "DELETE"].contains(&request.method.as_str());
        assert!(!is_write || request.path.contains("/p/main/walden-check/"), "{} {}", request.method, request.path);
    }
    let left = crate::support::oracle::files_below(&stage.join("s3"));
    assert!(left.iter().all(|path| !path.to_string_lossy().contains("walden-check")), "{left:?}");
}

#[test]
fn a_missing_bucket_is_said_and_heals() {
    let stage = Stage::new("bucket");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(S3Server::start_moto());
    let (id, secret) = (stage.write("id", ACCESS_KEY), stage.write("secret", SECRET_KEY));
    let walden = s3(&stage, &server, &postgres, &id, &secret);
    let config = fs::read_to_string(walden.config_path()).expect("the configuration").replace(BUCKET, "not-made-yet");
    let walden = Walden::with_config(&stage, &config);
    let words = ["s3://not-made-yet/p", "does not exist", "create it"];
    assert_found(&walden, "repository.main", &words);
    let mut agent = assert_heals(&walden, "store_failing", &words, || {
        let mut request =
            std::net::TcpStream::connect(server.endpoint.trim_start_matches("http://")).expect("moto listens");
        let authorization =
            "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
        let text = format!(
            "PUT /not-made-yet HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\nAuthorization: {authorization}\r\n\r\n"
        );
        std::io::Write::write_all(&mut request, text.as_bytes()).expect("a request");
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut request, &mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
    assert!(agent.sigterm(MINUTE).success());
}

/// A store that passes over conditions cannot tell a second writer: `run` refuses until the operator vouches that there is none.
#[test]
fn a_store_without_conditions_is_refused() {
    let stage = Stage::new("conditions");
    let postgres = Postgres::builder(MAJOR).wal_segsize(1).start(&stage);
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(S3Server::start_moto());
    for header in ["if-none-match", "if-match"] {
        server.faults().always("PUT", "", HttpFault::DropHeader(header));
    }
    let (id, secret) = (stage.write("id", ACCESS_KEY), stage.write("secret", SECRET_KEY));
    let walden = s3(&stage, &server, &postgres, &id, &secret);
    let words = ["conditional writes", "single_writer = true"];
    assert_found(&walden, "abilities.main", &words);
    let done = walden.exec(&["run"]);
    assert_eq!(done.code, Some(2), "{done:?}");
    let errors: Vec<&str> = done.stderr.lines().filter(|line| line.contains("error")).collect();
    assert!(errors.len() == 1 && words.iter().all(|word| errors[0].contains(word)), "{}", done.stderr);
    let vouched = walden.env("WALDEN_REPOSITORY__0__SINGLE_WRITER", "true");
    assert_eq!(vouched.exec(&["check"]).code, Some(0));
    let mut agent = vouched.run_connected();
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
}

#[test]
fn another_cluster_and_a_taken_port_are_said() {
    let stage = Stage::new("other");
    let first = Postgres::builder(MAJOR).wal_segsize(1).named("pg-1").start(&stage);
    let second = Postgres::builder(MAJOR).wal_segsize(1).named("pg-2").start(&stage);
    let walden = local(&stage, &first.socket_url());
    let mut agent = walden.run_connected();
    archive_all(&first, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    let other = Walden::with_config(&stage, &config.replace(&first.socket_url(), &second.socket_url()));
    let done = other.exec(&["--json", "check"]);
    assert_eq!(done.code, Some(1));
    let found: Vec<String> = failed(&report(&done)).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(found, ["spool.identity", "identity.main"], "{}", done.stdout);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("bound").to_string();
    let walden = walden.env("WALDEN_METRICS__LISTEN", &address);
    assert_found(&walden, "metrics", &[&address, "another program", "metrics.listen"]);
    // The agent archives all the same, and says why it cannot be asked.
    let mut agent = walden.run();
    wait_until(MINUTE, "the agent to stream", || first.value("SELECT count(*) FROM pg_stat_replication") != "0");
    wait_until(MINUTE, "the ERROR", || agent.log().contains(" ERROR "));
    // Started a second time, it says only what it is refused for.
    let refused = walden.exec(&["run"]);
    let lines: Vec<&str> = refused.stderr.lines().filter(|line| !line.contains(" INFO walden starts")).collect();
    assert_eq!((refused.code, lines.len()), (Some(4), 1), "{}", refused.stderr);
    assert!(lines[0].contains("another Walden uses the spool"), "{}", refused.stderr);
    let log = agent.log();
    let line = log.lines().find(|line| line.contains(" ERROR ")).expect("it was there");
    for word in [&*address, "in use", "metrics.listen", "; ", "cause=metrics_failing"] {
        assert!(line.contains(word), "\"{word}\" is not said: {line}");
    }
    // Said once; and once the port is free, the agent takes it without a restart.
    drop(taken);
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
    wait_until(MINUTE, "the agent to answer", || walden::http_get(port, "/readyz").is_ok_and(|(code, _)| code == 200));
    let (_, metrics) = walden::http_get(port, "/metrics").expect("an answer");
    assert!(metrics.contains("code=\"metrics_failing\"} 0"), "{metrics}");
    assert_eq!(agent.log().matches(" ERROR ").count(), 1, "{}", agent.log());
    assert!(agent.log().contains("cause=metrics_failing since="), "{}", agent.log());
    assert!(agent.sigterm(MINUTE).success());
}

/// Passwords and keys, right and wrong, appear in no output, also where things fail (I18).
#[test]
fn no_secret_appears_where_things_fail() {
    let canary = "kanarienvogel7";
    let stage = Stage::new("canary");
    let postgres = Postgres::builder(MAJOR)
        .wal_segsize(1)
        .hba("host all,replication careful 127.0.0.1/32 scram-sha-256")
        .start(&stage);
    postgres.psql("CREATE ROLE careful LOGIN REPLICATION PASSWORD 'right'");
    let runtime = Runtime::new().expect("a runtime");
    let server = runtime.block_on(S3Server::start_s3s(&stage.join("s3")));
    let (id, secret) = (stage.write("id", ACCESS_KEY), stage.write("secret", canary));
    let port = postgres.port;
    let mut seen = String::new();
    for url in [
        format!("postgresql://careful:{canary}@127.0.0.1:{port}/postgres"),
        format!("host=127.0.0.1 port={port} user=careful dbname=postgres password={canary}"),
    ] {
        let config =
            fs::read_to_string(s3(&stage, &server, &postgres, &id, &secret).config_path()).expect("the configuration");
        let walden = Walden::with_config(&stage, &config.replace(&postgres.socket_url(), &url));
        let mut agent = walden.spawn(&["-vv", "run"]);
        agent.wait_status(MINUTE, "the fault", |status| status["causes"].to_string().contains("refused the password"));
        seen += &agent.status().expect("an answer").to_string();
        seen += &agent.get("/metrics").expect("an answer").1;
        seen += &fs::read_to_string(format!("/proc/{}/cmdline", agent.pid())).expect("it runs");
        for arguments in [vec!["-vv", "check"], vec!["--json", "check"], vec!["-vv", "status"]] {
            let done = walden.exec(&arguments);
            assert_eq!(done.code, Some(1), "{done:?}");
            seen += &(done.stdout + &done.stderr);
        }
        assert!(agent.sigterm(MINUTE).success());
        seen += &agent.log();
    }
    // The server lets in, the store does not.
    let walden = s3(&stage, &server, &postgres, &id, &secret);
    let mut agent = walden.spawn(&["-vv", "run"]);
    agent.wait_status(MINUTE, "the store to refuse", |status| has_cause(status, "store_failing"));
    seen += &agent.status().expect("an answer").to_string();
    seen += &agent.get("/metrics").expect("an answer").1;
    assert!(agent.sigterm(MINUTE).success());
    seen += &agent.log();
    // Connection strings that cannot be read, in every place where one may stand.
    for wrong in [
        format!("postgresql://careful:{canary}@127.0.0.1:port/postgres"),
        format!("postgresql://careful:{canary}@[::1/postgres"),
        format!("postgresql://careful:{canary}%zz@127.0.0.1/postgres"),
        format!("host=127.0.0.1 password='{canary}"),
        format!("host=127.0.0.1 password={canary} bogus=1"),
        format!("host=127.0.0.1 password=ge {canary} port=1"),
        format!("host=127.0.0.1 password=ge {canary}=x port=1"),
        format!("postgresql://careful:{canary}/x@127.0.0.1:1/postgres"),
        format!("postgresql://careful:12/{canary}@127.0.0.1:1/postgres"),
        format!("postgresql://careful:12/a?{canary}@127.0.0.1:1/postgres"),
        format!("host=127.0.0.1 passwort={canary}"),
        canary.to_owned(),
    ] {
        let quoted = wrong.replace('\\', "\\\\").replace('"', "\\\"");
        let walden = local(&stage, &quoted);
        let plain = local(&stage, "");
        for (walden, arguments) in [
            (&walden, vec!["run"]),
            (&walden, vec!["--json", "check"]),
            (&plain.clone().env("DATABASE_URL", &wrong), vec!["run"]),
            (&plain.clone().env("WALDEN_POSTGRES__URL", &wrong), vec!["check"]),
        ] {
            let done = walden::finish(
                {
                    let mut command = walden.command(&arguments);
                    command.env("PGCONNECT_TIMEOUT", "1");
                    command
                },
                MINUTE,
            );
            assert!(matches!(done.code, Some(1 | 2)), "{wrong} {arguments:?}: {done:?}");
            seen += &(done.stdout + &done.stderr);
        }
    }
    // A flag with a password is in the list of processes already: refused, and not repeated.
    let done =
        local(&stage, "").exec(&["--url", &format!("postgresql://careful:{canary}@127.0.0.1/postgres"), "check"]);
    assert_eq!(done.code, Some(2), "{done:?}");
    seen += &(done.stdout + &done.stderr);
    let done = Walden::with_config(&stage, &format!("[postgres]\nurl = \"postgres://u:{canary}@h\nslot = {canary}\n"))
        .exec(&["check"]);
    assert_eq!(done.code, Some(2), "{done:?}");
    seen += &(done.stdout + &done.stderr);
    for secret in [canary, SECRET_KEY] {
        let at = seen.find(secret);
        assert!(at.is_none(), "a secret is told: …{}…", &seen[at.unwrap_or(0).saturating_sub(300)..at.unwrap_or(0)]);
    }
}
