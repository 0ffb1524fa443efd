//! No secret in any output, and nothing that others may read.

use std::time::Duration;

use super::streaming::archive_all;
use crate::support::oracle::files_below;
use crate::support::{Postgres, Stage, Walden};

const MINUTE: Duration = Duration::from_secs(60);

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
