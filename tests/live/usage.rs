//! Wrong flags and wrong settings, by the real binary: one line with what, why and what to do, code 2, nothing touched.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::{Stage, Walden, walden};

/// Nothing here waits for anything.
const AT_ONCE: Duration = Duration::from_secs(30);

/// A command line over a configuration file (`None`: no file is named), and the words that its one line must have.
struct Case {
    config: Option<&'static str>,
    environment: &'static [(&'static str, &'static str)],
    arguments: &'static [&'static str],
    words: &'static [&'static str],
}

const fn flags(arguments: &'static [&'static str], words: &'static [&'static str]) -> Case {
    Case { config: Some(""), environment: &[], arguments, words }
}

const fn file(config: &'static str, words: &'static [&'static str]) -> Case {
    Case { config: Some(config), environment: &[], arguments: &["run"], words }
}

const fn variable(name_and_value: &'static [(&'static str, &'static str)], words: &'static [&'static str]) -> Case {
    Case { config: Some(""), environment: name_and_value, arguments: &["run"], words }
}

const CASES: &[Case] = &[
    // Commands and flags.
    flags(&[], &["a command is missing", "walden --help"]),
    flags(&["frobnicate"], &["frobnicate"]),
    flags(&["statsu"], &["statsu", "status"]),
    flags(&["run", "--frobnicate"], &["--frobnicate", "walden run --help"]),
    flags(&["run", "extra"], &["extra"]),
    flags(&["adopt"], &["--system-identifier"]),
    flags(&["adopt", "--system-identifier", "new"], &["new", "--system-identifier"]),
    flags(&["run", "-q", "-v"], &["--quiet", "--verbose"]),
    flags(&["run", "--cluster"], &["--cluster", "value"]),
    flags(&["run", "--cluster", "../up"], &["--cluster", "archive.cluster", "letters"]),
    flags(&["run", "--slot", "Walden-1"], &["--slot", "lower-case"]),
    flags(&["run", "--listen", "here"], &["--listen", "metrics.listen", "127.0.0.1:9847"]),
    flags(&["run", "--repository", "ftp://host/x"], &["--repository", "s3://bucket/prefix"]),
    flags(&["run", "--repository", "s3://"], &["--repository", "bucket"]),
    flags(&["run", "--url", "postgres://u:geheim@h/d"], &["--url", "password", "PGPASSWORD"]),
    flags(&["run", "--url", "postgres://u@h/d?bogus=1"], &["bogus"]),
    flags(&["run", "--url", "host=h sslmode=maybe"], &["sslmode", "verify-full"]),
    flags(&["run", "--url", "host=h port=70000"], &["70000", "65535"]),
    flags(&["backup", "--label", "two\nlines"], &["label", "one line"]),
    flags(&["list", "--system-identifier", "many"], &["many", "--system-identifier"]),
    flags(&["list", "--repository", "nowhere"], &["nowhere", "main"]),
    flags(&["restore"], &["--pgdata"]),
    flags(&["restore", "--pgdata", "x", "--target-lsn", "nonsense"], &["nonsense", "--target-lsn"]),
    flags(&["restore", "--pgdata", "x", "--target-xid", "0x5"], &["0x5", "--target-xid", "decimal"]),
    flags(&["restore", "--pgdata", "x", "--target-lsn", "0/1", "--target-xid", "9"], &["--target-lsn", "--target-xid"]),
    flags(&["restore", "--pgdata", "x", "--target", "now"], &["now", "latest", "immediate"]),
    flags(&["restore", "--pgdata", "x", "--target", "latest", "--exclusive"], &["--exclusive", "--target-time"]),
    flags(&["restore", "--pgdata", "x", "--target-name", "a", "--exclusive"], &["--exclusive"]),
    flags(&["restore", "--pgdata", "x", "--time-zone", "UTC"], &["--time-zone", "--target-time"]),
    flags(&["restore", "--pgdata", "x", "--timeline", "0"], &["--timeline", "0"]),
    flags(&["restore", "--pgdata", "x", "--timeline", "1F"], &["--timeline", "decimal"]),
    flags(&["restore", "--pgdata", "x", "--jobs", "0"], &["--jobs", "256"]),
    flags(&["restore", "--pgdata", "x", "--action", "stop"], &["stop", "promote", "pause", "shutdown"]),
    flags(&["restore", "--pgdata", "x", "--dry-run", "--start"], &["--dry-run", "--start"]),
    flags(&["restore", "--pgdata", "x", "--tablespace-map", "a=b"], &["--tablespace-map", "absolute"]),
    flags(&["restore", "--pgdata", "x", "--tablespace-map", "/a"], &["--tablespace-map", "OLD=NEW"]),
    // The file.
    file("[archive]\ncompresion = \"lz4\"\n", &["line 2", "archive.compresion", "archive.compression"]),
    file("[archve]\ncluster = \"a\"\n", &["line 1", "archve", "archive"]),
    file("cluster = \"a\"\n", &["line 1", "cluster", "archive.cluster"]),
    file("[archive]\nbucket = \"a\"\n", &["line 2", "archive.bucket", "repository.bucket"]),
    file("[[repository]]\nbuket = \"a\"\n", &["line 2", "repository.buket", "repository.bucket"]),
    file("this is not toml", &["line 1", "not TOML"]),
    file("[archive]\ncluster = main\n", &["line 2", "quotation marks"]),
    file("[archive]\ncluster = \"a\"\ncluster = \"b\"\n", &["line 3", "not TOML"]),
    file("[archive]\ncompression = \"gzip\"\n", &["line 2", "\"lz4\" or \"zstd\"", "gzip"]),
    file("[archive]\ncompression_level = 3\n", &["line 2", "archive.compression_level", "lz4"]),
    file("[archive]\ncompression = \"zstd\"\ncompression_level = 40\n", &["19", "40"]),
    file("[archive]\ncluster = \"\"\n", &["archive.cluster"]),
    file("[archive]\ncluster = 7\n", &["archive.cluster", "quotation marks"]),
    file("[archive]\ndurability = \"disk\"\n", &["\"spool\" or \"repository\""]),
    file("[archive]\ntail_interval = \"1ms\"\n", &["archive.tail_interval", "10ms"]),
    file("[archive]\ntail_interval = \"a while\"\n", &["archive.tail_interval", "\"500ms\""]),
    file("[archive]\ntail_bytes = \"16GiB\"\n", &["archive.tail_bytes", "GiB"]),
    file("[postgres]\nslot = \"walden-1\"\n", &["postgres.slot", "underscores"]),
    file("[postgres]\ncreate_slot = \"yes\"\n", &["postgres.create_slot", "true or false"]),
    file("[postgres]\nconnect_timeout = -1\n", &["line 2", "postgres.connect_timeout", "negative"]),
    file("[postgres]\nurl = \"host=h bogus=1\"\n", &["bogus"]),
    file("[spool]\nbytes_max = \"many\"\n", &["spool.bytes_max", "\"64MiB\""]),
    file("[spool]\nbytes_max = \"8MB\"\n", &["spool.bytes_max", "MiB"]),
    file("[spool]\npath = \"\"\n", &["spool.path"]),
    file("[spool]\npath = \"x\"\n[state]\npath = \"x/y\"\n", &["spool.path", "state.path"]),
    file("[upload]\nconcurrency = 0\n", &["upload.concurrency", "from 1"]),
    file("[backup]\nschedule = \"every day\"\n", &["backup.schedule", "cron"]),
    file(
        "[backup]\nvolume_bytes = \"1TiB\"\n[upload]\nmultipart_bytes = \"5MiB\"\n",
        &["backup.volume_bytes", "upload.multipart_bytes"],
    ),
    file("[metrics]\nlisten = 9847\n", &["metrics.listen", "quotation marks"]),
    file("[log]\nlevel = \"loud\"\n", &["log.level", "\"info\""]),
    file("[[repository]]\ntype = \"gcs\"\n", &["\"local\" or \"s3\""]),
    file("[[repository]]\ntype = \"s3\"\n", &["line 2", "repository.bucket", "missing"]),
    file("[[repository]]\ntype = \"local\"\n", &["line 2", "repository.path", "missing"]),
    file("[[repository]]\npath = \"x\"\nregion = \"eu\"\n", &["repository.region", "s3"]),
    file("[[repository]]\nbucket = \"b\"\nendpoint = \"s3.example.com\"\n", &["repository.endpoint", "https://"]),
    file(
        "[[repository]]\nbucket = \"b\"\nendpoint = \"https://key:geheim@s3.example.com\"\n",
        &["repository.endpoint", "access_key_id_file"],
    ),
    file("[[repository]]\nbucket = \"b\"\naccess_key_id_file = \"k\"\n", &["secret_access_key_file"]),
    file("[[repository]]\nbucket = \"b\"\nsse = \"yes\"\n", &["repository.sse", "AES256"]),
    file(
        "[[repository]]\npath = \"a\"\nname = \"x\"\n[[repository]]\npath = \"b\"\nname = \"x\"\n",
        &["repository.name", "x"],
    ),
    file("[[repository]]\npath = \"a\"\nrequired = false\n", &["repository.required", "true"]),
    file("[repository]\npath = \"a\"\n", &["[[repository]]"]),
    // The environment.
    variable(&[("WALDEN_ARCHIVE__CLUSTR", "x")], &["WALDEN_ARCHIVE__CLUSTR", "archive.cluster"]),
    variable(&[("WALDEN_ARCHVE__CLUSTER", "x")], &["WALDEN_ARCHVE__CLUSTER", "archive.cluster"]),
    variable(&[("WALDEN_LOG__LEVEL", "loud")], &["WALDEN_LOG__LEVEL", "\"info\""]),
    variable(&[("WALDEN_REPOSITORY__BUCKET", "b")], &["WALDEN_REPOSITORY__BUCKET", "WALDEN_REPOSITORY__0__BUCKET"]),
    variable(&[("WALDEN_REPOSITORY__7__BUCKET", "b")], &["WALDEN_REPOSITORY__7__BUCKET"]),
    variable(&[("DATABASE_URL", "mysql://h/d")], &["postgres"]),
    variable(&[("PGPORT", "none")], &["port", "65535"]),
    variable(&[("PGSSLMODE", "require")], &["sslmode=require"]),
    // Files that are not there.
    Case {
        config: None,
        environment: &[],
        arguments: &["--config", "/no/such/file.toml", "list"],
        words: &["/no/such/file.toml", "--config"],
    },
    Case {
        config: None,
        environment: &[("WALDEN_CONFIG", "/no/such.toml")],
        arguments: &["run"],
        words: &["/no/such.toml", "WALDEN_CONFIG"],
    },
    Case { config: None, environment: &[("WALDEN_CONFIG", "/")], arguments: &["check"], words: &["cannot read", "/"] },
];

fn command(stage: &Stage, plain: &Walden, case: &Case, json: bool) -> Command {
    let mut command = match case.config {
        Some(text) => {
            let main = format!("[[repository]]\nname = \"main\"\npath = \"{}\"\n", stage.join("archive").display());
            let has_own = text.contains("repository") || !text.is_empty();
            let walden = Walden::with_config(stage, if has_own { text } else { &main });
            walden.command(&[])
        }
        None => stage.command(plain.binary()),
    };
    if json {
        command.arg("--json");
    }
    command.args(case.arguments).envs(case.environment.iter().copied());
    command
}

#[test]
fn each_mistake_is_one_line_and_its_code() {
    let stage = Stage::new("usage");
    let plain = Walden::with_config(&stage, "");
    let mut wrong = Vec::new();
    for case in CASES {
        let what = format!("{:?} {:?} {:?}", case.config.unwrap_or("no file"), case.environment, case.arguments);
        let mut complain = |why: &str, said: &str| wrong.push(format!("{what}\n  {why}: {said}"));
        let done = walden::finish(command(&stage, &plain, case, false), AT_ONCE);
        let said = done.stderr.trim_end();
        println!("{said}"); // `--nocapture` shows all messages, to be read by a person
        if done.code != Some(2) {
            complain(&format!("code {:?}", done.code), said);
        }
        if said.lines().count() != 1 || !said.starts_with("error: ") || !said.contains("; ") || !done.stdout.is_empty()
        {
            complain("not one line with what to do", &format!("{said}{}", done.stdout));
        }
        for word in case.words {
            if !said.contains(word) {
                complain(&format!("\"{word}\" is not said"), said);
            }
        }
        for ugly in ["panicked", "Os {", "Error {", "kind: ", "geheim", "  ", "\u{1b}"] {
            if said.contains(ugly) {
                complain(&format!("\"{ugly}\" is not for people"), said);
            }
        }
        let done = walden::finish(command(&stage, &plain, case, true), AT_ONCE);
        let document: Value = serde_json::from_str(&done.stdout).unwrap_or_default();
        let error = &document["error"];
        let is_text = |field: &str| error[field].as_str().is_some_and(|text| !text.is_empty() && !text.contains('\n'));
        if done.code != Some(2) || error["code"] != 2 || !is_text("message") || !is_text("hint") {
            complain("the document", &done.stdout);
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
    for made in ["archive", "walden-archive", "walden-spool", "walden-state", "x"] {
        assert!(!stage.join(made).exists(), "{made} was made");
    }
    assert!(fs::read_dir(stage.path()).expect("the folder").count() > 0);
}

/// Help and version are data: stdout, code 0, and no line too wide for a terminal of 100 columns.
#[test]
fn help_is_data_and_fits_a_terminal() {
    let stage = Stage::new("help");
    let plain = Walden::with_config(&stage, "");
    let run = |arguments: &[&str]| {
        let mut command = stage.command(plain.binary());
        command.args(arguments).env("COLUMNS", "100");
        walden::finish(command, AT_ONCE)
    };
    let version = run(&["--version"]);
    assert_eq!((version.code, version.stdout.trim()), (Some(0), concat!("walden ", env!("CARGO_PKG_VERSION"))));
    for command in
        [&[][..], &["run"], &["check"], &["backup"], &["list"], &["status"], &["restore"], &["recovery-conf"]]
    {
        for flag in ["--help", "-h"] {
            let done = run(&[command, &[flag]].concat());
            assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{command:?}");
            let wide = done.stdout.lines().find(|line| line.chars().count() > 100);
            assert!(wide.is_none(), "{command:?}: {wide:?}");
        }
    }
    // PostgreSQL must never take help for a file.
    let fetch = run(&["wal-fetch", "--help"]);
    assert_eq!((fetch.code, fetch.stdout.as_str()), (Some(255), ""));
}
