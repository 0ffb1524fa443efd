//! Bad input: one clear line with what to do, the right exit code, nothing changed, and no secret anywhere.

use std::time::Duration;

use super::streaming::archive_all;
use crate::support::oracle::files_below;
use crate::support::{Finished, Postgres, Stage, Walden};

const MINUTE: Duration = Duration::from_secs(60);

/// A line for a person: no dump, no backtrace, no multi-line debug output.
#[track_caller]
fn assert_clear(done: &Finished, code: i32, words: &[&str]) {
    let said = format!("{}{}", done.stdout, done.stderr);
    assert_eq!(done.code, Some(code), "{said}");
    for word in words {
        assert!(said.to_lowercase().contains(&word.to_lowercase()), "\"{word}\" is not said: {said}");
    }
    for ugly in ["panicked", "RUST_BACKTRACE", "Os { code", "Error {", "unwrap", "kind: "] {
        assert!(!said.contains(ugly), "this is not for people: {said}");
    }
    assert!(said.lines().count() <= 40, "too much: {said}");
}

/// Usage and configuration: code 2, before anything is connected or written.
#[test]
fn bad_input_gets_one_clear_line_and_its_code() {
    let stage = Stage::new("usage");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let path = stage.join("never").to_string_lossy().into_owned();
    for (arguments, word) in [
        (vec!["no-such-command"], "no-such-command"),
        (vec!["restore"], "--pgdata"),
        (vec!["restore", "--pgdata", &path, "--target-time", "2026-11-20 14:03:00"], "zone"),
        (vec!["restore", "--pgdata", &path, "--target-time", "2026-02-30T00:00:00Z"], "2026-02-30"),
        (vec!["restore", "--pgdata", &path, "--target-time", "yesterday-ish"], "yesterday-ish"),
        (
            vec!["restore", "--pgdata", &path, "--target-time", "2026-10-25T02:30:00", "--time-zone", "Europe/Berlin"],
            "ambiguous",
        ),
        (vec!["restore", "--pgdata", &path, "--target-lsn", "nonsense"], "nonsense"),
        (vec!["restore", "--pgdata", &path, "--target-lsn", "0/1", "--target-xid", "9"], "target"),
        (vec!["restore", "--pgdata", &path, "--target", "latest", "--exclusive"], "exclusive"),
        (vec!["list", "--repository", "nowhere"], "nowhere"),
    ] {
        let done = walden.exec(&arguments);
        assert_eq!(done.code, Some(2), "{arguments:?}: {}{}", done.stdout, done.stderr);
        assert!(done.stderr.to_lowercase().contains(&word.to_lowercase()), "{arguments:?}: {}", done.stderr);
    }
    assert!(!stage.join("never").exists());

    let named = walden
        .stage()
        .command(walden.binary())
        .args(["--config", "/no/such/file.toml", "list"])
        .output()
        .expect("it runs");
    assert_eq!(named.status.code(), Some(2));
    for (config, words) in [
        ("[archive]\ncompresion = \"lz4\"\n", vec!["compresion", "compression"]),
        ("[archive]\ncompression = \"gzip\"\n", vec!["gzip"]),
        // The text itself is not repeated: it may be a secret in the wrong place.
        ("[spool]\nbytes_max = \"many\"\n", vec!["line 2", "spool.bytes_max", "64MiB"]),
        ("[archive]\ncluster = \"../up\"\n", vec!["cluster"]),
        ("[backup]\nschedule = \"every day\"\n", vec!["schedule"]),
        ("this is not toml", vec![]),
    ] {
        let wrong = Walden::with_config(&stage, config);
        assert_clear(&wrong.exec(&["run"]), 2, &words);
        assert_clear(&wrong.exec(&["list"]), 2, &words);
    }
    let wrong = walden.clone().env("WALDEN_ARCHIVE__CLUSTR", "x");
    assert_clear(&wrong.exec(&["list"]), 2, &["clustr", "cluster"]);
}

/// What the server refuses: `check` finds it and says what to do, `backup` fails with one line.
#[test]
fn what_the_server_refuses_is_said_with_what_to_do() {
    let stage = Stage::new("server");
    let minimal = Postgres::builder(17)
        .wal_segsize(1)
        .named("minimal")
        .setting("archive_mode", "off")
        .setting("wal_level", "minimal")
        .setting("max_wal_senders", "0")
        .start(&stage);
    let walden = Walden::local(&stage, &minimal, "");
    let checked = walden.exec(&["check"]);
    assert_eq!(checked.code, Some(1), "{}{}", checked.stdout, checked.stderr);
    drop(minimal);

    let postgres = Postgres::builder(15)
        .wal_segsize(1)
        .hba("host all,replication careful 127.0.0.1/32 scram-sha-256")
        .hba("host all,replication plain 127.0.0.1/32 trust")
        .start(&stage);
    postgres.psql("CREATE ROLE careful LOGIN REPLICATION PASSWORD 'right'");
    postgres.psql("CREATE ROLE plain LOGIN");
    let over = |url: &str, slot: &str| {
        Walden::with_config(
            &stage,
            &format!(
                "[postgres]\nurl = \"{url}\"\nslot = \"{slot}\"\nconnect_timeout = \"3s\"\n[spool]\npath = \"{0}/s\"\nfree_bytes_min = 0\n[state]\npath = \"{0}/st\"\n[metrics]\nlisten = \"\"\n[[repository]]\ntype = \"local\"\npath = \"{0}/r\"\n",
                stage.path().display()
            ),
        )
    };
    let at = |user: &str| format!("host=127.0.0.1 port={} dbname=postgres user={user}", postgres.port);
    for (url, words) in [
        ("host=127.0.0.1 port=1 user=postgres".to_owned(), vec!["127.0.0.1"]),
        ("host=no-such-host.invalid user=postgres".to_owned(), vec!["no-such-host.invalid"]),
        (format!("{} password=wrong", at("careful")), vec!["password"]),
        (at("nobody_here"), vec!["nobody_here"]),
        (at("plain"), vec!["replication"]),
    ] {
        assert_clear(&over(&url, "walden").exec(&["backup"]), 1, &words);
        let checked = over(&url, "walden").exec(&["--json", "check"]);
        assert_eq!(checked.code, Some(1), "{url}: {}", checked.stdout);
        let report: serde_json::Value = serde_json::from_str(&checked.stdout).expect("JSON");
        assert_eq!(report["ok"], false);
        let failed = report["checks"]
            .as_array()
            .expect("checks")
            .iter()
            .find(|check| check["ok"] == false)
            .expect("a failed check");
        assert!(failed["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "no hint: {report}");
    }
    // `run` goes on trying, says so once, and is unhealthy.
    let waiting = Walden::with_repository(&stage, &postgres, "[backup]\ninitial = false\n")
        .env("WALDEN_POSTGRES__URL", "host=127.0.0.1 port=1 user=postgres");
    let mut agent = waiting.run();
    agent.wait_status(MINUTE, "the cause not_connected", |status| {
        status["causes"].as_array().is_some_and(|all| all.iter().any(|cause| cause["code"] == "not_connected"))
    });
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    assert_eq!(waiting.exec(&["status"]).code, Some(1));
    assert!(agent.is_running());
    agent.kill9();

    // A slot that somebody else uses, and one that is not physical.
    let user = over(&at("postgres"), "walden");
    assert_eq!(user.exec(&["check"]).code, Some(0), "{:?}", user.exec(&["check"]));
    let logical = Postgres::builder(17).named("logical").wal_segsize(1).setting("wal_level", "logical").start(&stage);
    logical.psql("SELECT pg_create_logical_replication_slot('walden', 'pgoutput')");
    let checked = over(&logical.socket_url(), "walden").exec(&["check"]);
    assert_eq!(checked.code, Some(1), "{}", checked.stdout);
    assert!(format!("{}{}", checked.stdout, checked.stderr).contains("physical"), "{checked:?}");
}

/// `check` writes below `walden-check` only and leaves nothing; an unwritable spool and repository are found.
#[test]
fn check_proves_and_leaves_nothing() {
    let stage = Stage::new("check");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let report = walden.json(&["check"]);
    assert_eq!(report["ok"], true, "{report}");
    assert!(report["checks"].as_array().is_some_and(|checks| checks.len() >= 5), "{report}");
    let left = files_below(&walden.repository());
    assert!(left.is_empty(), "check left {left:?}");

    let file = stage.write("a-file", "in the way");
    let blocked = format!(
        "[postgres]\nurl = \"{}\"\n[spool]\npath = \"{1}/spool\"\n[state]\npath = \"{1}/state\"\n[[repository]]\ntype = \"local\"\npath = \"{1}/archive\"\n",
        postgres.socket_url(),
        file.display()
    );
    let checked = Walden::with_config(&stage, &blocked).exec(&["--json", "check"]);
    assert_eq!(checked.code, Some(1), "{}", checked.stdout);
    let report: serde_json::Value = serde_json::from_str(&checked.stdout).expect("JSON");
    let failed = report["checks"].as_array().expect("checks").iter().filter(|check| check["ok"] == false).count();
    assert!(failed >= 2, "the spool and the repository: {report}");
}

/// A canary password and key appear in no output, log, status, metric, command line or generated file (I18).
#[test]
fn no_secret_appears_anywhere() {
    let stage = Stage::new("secret");
    let canary = "kanarienvogel7";
    let postgres = Postgres::builder(17)
        .wal_segsize(1)
        .hba("host all,replication careful 127.0.0.1/32 scram-sha-256")
        .start(&stage);
    postgres.psql(&format!("CREATE ROLE careful LOGIN REPLICATION PASSWORD '{canary}'"));
    let file = stage.write("password", format!("{canary}\n"));
    let url = format!("postgresql://careful:{canary}@127.0.0.1:{}/postgres", postgres.port);
    let mut seen = String::new();
    for (with_file, url) in [(false, url.as_str()), (true, &url.replace(&format!(":{canary}"), ""))] {
        let walden = Walden::local(&stage, &postgres, "")
            .env("WALDEN_POSTGRES__URL", url)
            .env("WALDEN_POSTGRES__PASSWORD_FILE", if with_file { file.to_str().expect("UTF-8") } else { "" })
            .env("AWS_SECRET_ACCESS_KEY", canary);
        let mut agent = walden.spawn(&["-v", "run"]);
        agent.wait_status(MINUTE, "the agent to stream", |status| status["received_lsn"].is_string());
        archive_all(&postgres, &mut agent);
        seen += &agent.status().expect("an answer").to_string();
        seen += &agent.get("/metrics").expect("an answer").1;
        seen += &std::fs::read_to_string(format!("/proc/{}/cmdline", agent.pid())).expect("it runs");
        for arguments in
            [vec!["-v", "check"], vec!["-v", "backup"], vec!["list"], vec!["status"], vec!["recovery-conf"]]
        {
            let done = walden.exec(&arguments);
            seen += &done.stdout;
            seen += &done.stderr;
        }
        let target = stage.join(format!("restored-{with_file}"));
        let done = walden.exec(&["-v", "restore", "--pgdata", &target.to_string_lossy()]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        seen += &done.stdout;
        seen += &done.stderr;
        for generated in ["postgresql.auto.conf", "walden-restore.toml", "postgresql.conf"] {
            seen += &std::fs::read_to_string(target.join(generated)).unwrap_or_default();
        }
        assert!(agent.sigterm(MINUTE).success());
        seen += &agent.log();
    }
    let at = seen.find(canary);
    assert!(at.is_none(), "the canary sings: …{}…", &seen[at.unwrap_or(0).saturating_sub(200)..at.unwrap_or(0)]);
    // Whatever the umask: files 0600, folders 0700.
    let kept = ["archive", "spool", "state"].map(|folder| files_below(&stage.join(folder)));
    for path in kept.into_iter().flatten() {
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).expect("it is there").permissions())
                & 0o777;
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    }
}
