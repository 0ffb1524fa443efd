//! What a monitoring system sees of an agent: the metrics, the alert rules over them, and the log.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, stored_segments};
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;
use crate::support::{Agent, Ledger, Postgres, Stage, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// Every metric there is: name, type, labels besides `cluster`.
const METRICS: &[(&str, &str, &str)] = &[
    ("wal_received_lsn", "gauge", ""),
    ("wal_durable_lsn", "gauge", ""),
    ("wal_archived_lsn", "gauge", ""),
    ("wal_archive_lag_bytes", "gauge", ""),
    ("wal_archive_lag_seconds", "gauge", ""),
    ("rpo_bytes", "gauge", ""),
    ("rpo_seconds", "gauge", ""),
    ("wal_bytes_total", "counter", "stage"),
    ("sync_degraded_seconds_total", "counter", ""),
    ("segments_archived_total", "counter", "repository"),
    ("upload_seconds", "histogram", "repository"),
    ("upload_retries_total", "counter", "repository"),
    ("upload_failures_total", "counter", "repository"),
    ("queue_segments", "gauge", ""),
    ("queue_bytes", "gauge", ""),
    ("spool_free_bytes", "gauge", ""),
    ("slot_retained_bytes", "gauge", ""),
    ("slot_wal_status", "gauge", "wal_status"),
    ("wal_gaps", "gauge", ""),
    ("connected", "gauge", ""),
    ("timeline", "gauge", ""),
    ("backup_last_success_timestamp_seconds", "gauge", ""),
    ("backup_last_duration_seconds", "gauge", ""),
    ("backup_last_size_bytes", "gauge", ""),
    ("backup_failures_total", "counter", ""),
    ("recovery_window_start_timestamp_seconds", "gauge", ""),
    ("recovery_window_end_timestamp_seconds", "gauge", ""),
    ("cause", "gauge", "code"),
    ("build_info", "gauge", "version"),
];

/// A page of metrics: the type of each, and its samples by name and labels.
struct Page {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

impl Page {
    #[track_caller]
    fn of(agent: &Agent) -> Page {
        let (code, text) = agent.get("/metrics").expect("an answer");
        assert_eq!(code, 200);
        assert_promtool(&["check", "metrics"], &text);
        let mut page = Page { types: BTreeMap::new(), samples: BTreeMap::new() };
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                page.types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') {
                let (sample, value) = line.rsplit_once(' ').expect("a value");
                let twice = page.samples.insert(sample.to_owned(), value.parse().expect("a number"));
                assert!(twice.is_none(), "{sample} stands there twice");
            }
        }
        page
    }

    /// `sample` without prefix and `cluster`: `connected`, `wal_bytes_total{stage="durable"}`.
    #[track_caller]
    fn value(&self, sample: &str) -> f64 {
        let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
        let labels = if labels == "}" { "}".to_owned() } else { format!(",{labels}") };
        let full = format!("walden_{name}{{cluster=\"main\"{labels}");
        *self.samples.get(&full).unwrap_or_else(|| panic!("there is no {full} in {:#?}", self.samples.keys()))
    }

    fn names(&self) -> BTreeSet<&str> {
        self.types.keys().map(String::as_str).collect()
    }
}

/// promtool finds nothing to complain about.
#[track_caller]
fn assert_promtool(arguments: &[&str], input: &str) {
    let mut child = Command::new(parts::tool("promtool"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), input.as_bytes()).expect("promtool reads");
    let done = child.wait_with_output().expect("promtool ends");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "promtool {arguments:?}: {said}\n{input}");
    assert!(arguments != ["check", "metrics"] || said.is_empty(), "promtool {arguments:?}: {said}\n{input}");
}

fn s3(server: &S3Server) -> String {
    format!(
        "[[repository]]\nname = \"there\"\ntype = \"s3\"\nbucket = \"{}\"\nregion = \"us-east-1\"\nendpoint = \"{}\"\npath_style = true\n",
        server.bucket, server.endpoint
    )
}

/// An agent with two repositories, at work: every metric of the table is there with its type and labels and no other, promtool finds
/// nothing wrong, the values are those of the server, of the stores and of `walden list`, and the rules name no metric that does not
/// exist. A page comes at once while the server stands still and the store hangs: a scrape asks neither.
#[test]
fn every_metric_is_there_and_true() {
    let stage = Stage::new("metrics");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let server = runtime.block_on(S3Server::start_s3s(&stage.make_dir("s3")));
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let here = format!("[[repository]]\nname = \"here\"\npath = \"{}\"\n", stage.join("archive").display());
    let more = format!("[backup]\ninitial = true\n[upload]\nrequest_timeout = \"5s\"\n{here}{}", s3(&server));
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
    agent.wait_status(MINUTE, "the first backup", |status| status["last_backup"].is_object());
    let end = archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy, and nothing to do", |status| {
        status["healthy"] == true && status["queue"]["segments"] == 0 && status["rpo_bytes"] == 0
    });
    // The next question to the server shows the slot as it is now.
    wait_until(MINUTE, "the slot to be shown", || agent.metric("walden_slot_wal_status").is_some());
    let page = Page::of(&agent);

    let known: BTreeSet<String> = METRICS.iter().map(|(name, ..)| format!("walden_{name}")).collect();
    assert_eq!(page.names(), known.iter().map(String::as_str).collect());
    for (name, kind, label) in METRICS {
        assert_eq!(page.types[&format!("walden_{name}")], *kind, "{name}");
        let sample = if *kind == "histogram" { format!("walden_{name}_count{{") } else { format!("walden_{name}{{") };
        let samples: Vec<&String> = page.samples.keys().filter(|found| found.starts_with(&sample)).collect();
        assert!(!samples.is_empty(), "{name} was never set");
        for found in samples {
            let labels = found[sample.len()..].trim_end_matches('}');
            let names: Vec<&str> = labels.split(',').filter_map(|label| label.split('=').next()).collect();
            let expected: Vec<&str> = ["cluster", label].into_iter().filter(|label| !label.is_empty()).collect();
            assert_eq!(names, expected, "{found}");
        }
    }
    for store in ["here", "there"] {
        let stored = if store == "here" { walden.repository() } else { stage.join("s3").join(&server.bucket) };
        let segments = stored_segments(&cluster_folder(&stored, "main", &postgres)).len() as f64;
        assert_eq!(page.value(&format!("segments_archived_total{{repository=\"{store}\"}}")), segments, "{store}");
        assert!(page.value(&format!("upload_seconds_count{{repository=\"{store}\"}}")) >= segments);
        assert_eq!(page.value(&format!("upload_failures_total{{repository=\"{store}\"}}")), 0.0);
        assert_eq!(page.value(&format!("upload_retries_total{{repository=\"{store}\"}}")), 0.0);
    }
    let status = agent.status().expect("an answer");
    let position = |field: &str| -> f64 {
        status[field].as_str().expect("known").parse::<walden::wal::Lsn>().expect("an LSN").get() as f64
    };
    for (metric, field) in
        [("wal_received_lsn", "received_lsn"), ("wal_durable_lsn", "durable_lsn"), ("wal_archived_lsn", "archived_lsn")]
    {
        assert!(page.value(metric) >= end.get() as f64 && page.value(metric) <= position(field), "{metric}");
    }
    // Bytes count once, however often and wherever to they travel.
    let bytes = |stage: &str| page.value(&format!("wal_bytes_total{{stage=\"{stage}\"}}"));
    let log = agent.log();
    let begun = log.split("archiving begins here from=").nth(1).and_then(|rest| rest.split(' ').next()).expect("told");
    let begun = begun.parse::<walden::wal::Lsn>().expect("an LSN").get() as f64;
    assert!(bytes("archived") <= bytes("durable") && bytes("durable") <= bytes("received"), "{:#?}", page.samples);
    assert_eq!(bytes("archived"), page.value("wal_archived_lsn") - begun);
    assert_eq!(bytes("durable"), page.value("wal_durable_lsn") - begun);
    for nothing in [
        "wal_archive_lag_bytes",
        "wal_archive_lag_seconds",
        "rpo_bytes",
        "rpo_seconds",
        "queue_segments",
        "queue_bytes",
        "wal_gaps",
    ] {
        assert_eq!(page.value(nothing), 0.0, "{nothing}");
    }
    assert_eq!((page.value("connected"), page.value("timeline"), page.value("backup_failures_total")), (1.0, 1.0, 0.0));
    assert!(page.value("spool_free_bytes") > 1e6 && page.value("slot_retained_bytes") < 1e9);
    let statuses = ["reserved", "extended", "unreserved", "lost"]
        .map(|status| page.value(&format!("slot_wal_status{{wal_status=\"{status}\"}}")));
    assert_eq!(statuses, [1.0, 0.0, 0.0, 0.0]);
    let raised: f64 =
        page.samples.iter().filter(|(sample, _)| sample.starts_with("walden_cause{")).map(|(_, v)| v).sum();
    assert_eq!(raised, 0.0, "{:#?}", page.samples);
    let seconds = |time: &Value| -> f64 {
        let time: jiff::Timestamp = time.as_str().expect("a time").parse().expect("RFC 3339");
        time.as_microsecond() as f64 / 1e6
    };
    let listed = walden.json(&["list"]);
    let backup = &listed["backups"][0];
    assert_eq!(page.value("backup_last_success_timestamp_seconds"), seconds(&backup["stop_time"]));
    assert_eq!(page.value("backup_last_size_bytes"), backup["size_bytes"].as_f64().expect("bytes"));
    assert_eq!(page.value("backup_last_duration_seconds"), backup["duration_seconds"].as_f64().expect("seconds"));
    assert_eq!(page.value("recovery_window_start_timestamp_seconds"), seconds(&listed["windows"][0]["from_time"]));
    let now = jiff::Timestamp::now().as_microsecond() as f64 / 1e6;
    let until = page.value("recovery_window_end_timestamp_seconds");
    assert!(until <= now && now - until < 30.0, "{until} at {now}");

    let rules = fs::read_to_string(root().join("config/alerts.yml")).expect("the rules");
    let named = metrics_in(&rules);
    assert!(named.len() >= 15, "{named:?}");
    for name in named {
        let family = ["_count", "_sum", "_bucket"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        assert!(page.types.contains_key(family), "the rules look at {name}, which no agent has");
    }

    // A backup that somebody else took is seen too.
    let by_hand = walden.json(&["backup"]);
    wait_until(MINUTE, "the other backup to be shown", || {
        agent.metric("walden_backup_last_success_timestamp_seconds") == Some(seconds(&by_hand["stop_time"]))
    });

    server.faults().always("", "", HttpFault::Hang);
    let stopped = stage.processes().into_iter().filter(|(_, line)| line.contains("postgres")).collect::<Vec<_>>();
    let signal = |signal| {
        for (pid, _) in &stopped {
            let pid = i32::try_from(*pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
            let _ = rustix::process::kill_process(pid, signal);
        }
    };
    assert!(stopped.len() > 5, "{stopped:?}");
    signal(Signal::STOP);
    let begun = Instant::now();
    for _ in 0..20 {
        Page::of(&agent);
        agent.status().expect("an answer");
    }
    let took = begun.elapsed();
    signal(Signal::CONT);
    server.faults().clear();
    assert!(took < Duration::from_secs(10), "40 answers took {took:?}");
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    assert!(agent.sigterm(MINUTE).success());
}

/// What a store refuses is counted and shown under its name, and the others go on.
#[test]
fn what_fails_is_counted_where_it_fails() {
    let stage = Stage::new("failing");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let server = runtime.block_on(S3Server::start_s3s(&stage.make_dir("s3")));
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let here = format!("[[repository]]\nname = \"here\"\npath = \"{}\"\n", stage.join("archive").display());
    let more = format!("[backup]\ninitial = false\n[upload]\nretry_delay_max = \"200ms\"\n{here}{}", s3(&server));
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    let before = Page::of(&agent);
    assert_eq!(before.samples.keys().find(|sample| sample.starts_with("walden_backup_last")), None, "none is known");
    server.faults().always("PUT", "/wal/", HttpFault::Status(503, "SlowDown"));
    postgres.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    postgres.switch_wal();
    agent.wait_status(MINUTE, "the store to fail", |status| has_cause(status, "store_failing"));
    let counted =
        |what: &str, store: &str| Page::of(&agent).value(&format!("upload_{what}_total{{repository=\"{store}\"}}"));
    wait_until(MINUTE, "retries to be counted", || counted("retries", "there") >= 2.0);
    let page = Page::of(&agent);
    assert!(
        page.value("upload_failures_total{repository=\"there\"}")
            >= page.value("upload_retries_total{repository=\"there\"}")
    );
    assert_eq!(page.value("cause{code=\"store_failing\"}"), 1.0);
    assert_eq!(page.value("upload_failures_total{repository=\"here\"}"), 0.0);
    assert!(page.value("queue_segments") >= 1.0 && page.value("queue_bytes") > 0.0 && page.value("rpo_bytes") > 0.0);
    assert_eq!(
        page.value("segments_archived_total{repository=\"there\"}"),
        before.value("segments_archived_total{repository=\"there\"}")
    );
    server.faults().clear();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    let page = Page::of(&agent);
    assert_eq!((page.value("queue_segments"), page.value("cause{code=\"store_failing\"}")), (0.0, 0.0));
    assert!(agent.sigterm(MINUTE).success());
}

/// Of a server that is away the agent claims nothing: no lag of 0, no slot.
#[test]
fn what_is_unknown_has_no_sample() {
    let stage = Stage::new("unknown");
    let mut postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    postgres.stop_fast();
    let mut agent = walden.run();
    agent.wait_status(MINUTE, "the fault to be told", |status| status["causes"].to_string().contains("cannot connect"));
    let unknown = [
        "wal_received_lsn",
        "wal_archive_lag_bytes",
        "rpo_seconds",
        "slot_retained_bytes",
        "slot_wal_status",
        "timeline",
    ];
    let page = Page::of(&agent);
    for name in unknown {
        assert!(!page.types.contains_key(&format!("walden_{name}")), "{name}: {:#?}", page.samples);
    }
    assert_eq!((page.value("connected"), page.value("cause{code=\"not_connected\"}")), (0.0, 1.0));
    postgres.start();
    agent.wait_status(MINUTE, "the slot", |status| {
        status["slot"]["wal_status"].is_string() && status["healthy"] == true
    });
    assert_eq!(Page::of(&agent).value("connected"), 1.0);
    postgres.stop_fast();
    agent.wait_status(MINUTE, "the slot to be unknown again", |status| {
        has_cause(status, "not_connected") && status["slot"]["wal_status"].is_null()
    });
    assert!(!Page::of(&agent).types.contains_key("walden_slot_retained_bytes"));
    assert!(agent.sigterm(MINUTE).success());
}

/// Streaming works and SQL does not, for a reason that is neither password nor pg_hba.conf: it is told within half a minute, and the
/// server's log is not filled with tries. Such a reason was told nowhere, and each try was two seconds after the one before.
#[test]
fn sql_that_the_server_refuses_is_told_and_tried_less_and_less() {
    let stage = Stage::new("nosql");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    let elsewhere = postgres.socket_url().replace("dbname=postgres", "dbname=nowhere");
    assert!(elsewhere.contains("nowhere"), "{elsewhere}");
    let begun = Instant::now();
    let mut agent = Walden::with_config(&stage, &config.replace(&postgres.socket_url(), &elsewhere)).run();
    let told = "database \"nowhere\" does not exist";
    let status = agent.wait_status(Duration::from_secs(30), "the cause", |status| has_cause(status, "no_sql"));
    assert!(status["causes"].to_string().contains("nowhere") && status["slot"]["restart_lsn"].is_null(), "{status}");
    // The position comes over the replication connection, so that the agent is healthy all the same.
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true && status["server_lsn"].is_string());
    // Every two seconds there would be the fifth after six: one when it starts, one when the stream begins, and three more.
    wait_until(MINUTE, "five tries", || postgres.log().matches(told).count() >= 5);
    assert!(begun.elapsed() >= Duration::from_secs(7), "five tries within {:?}", begun.elapsed());
    postgres.psql("CREATE DATABASE nowhere");
    // A server that has just let the stream in is asked at once.
    postgres.psql("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active");
    agent
        .wait_status(MINUTE, "SQL", |status| !has_cause(status, "no_sql") && status["slot"]["restart_lsn"].is_string());
    assert!(agent.sigterm(MINUTE).success());
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The names of Walden's metrics in the expressions of the rules.
fn metrics_in(rules: &str) -> BTreeSet<String> {
    let expressions = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let words = expressions.flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    words.filter(|word| word.starts_with("walden_")).map(str::to_owned).collect()
}

/// promtool proves each rule on a case where it fires and on one where it does not, and each has its paragraph in the operations page,
/// which knows no other alerts, and every cause there is its own.
#[test]
fn every_alert_fires_is_quiet_and_is_explained() {
    assert_promtool(&["check", "rules", "config/alerts.yml"], "");
    assert_promtool(&["test", "rules", "tests/fixtures/alerts.yml"], "");
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (rules, cases, page) =
        (read("config/alerts.yml"), read("tests/fixtures/alerts.yml"), read("docs/operations.md"));
    let after = |text: &str, prefix: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.trim().strip_prefix(prefix)).map(str::to_owned).collect()
    };
    let alerts = after(&rules, "- alert: ");
    assert!(alerts.len() >= 12, "{alerts:?}");
    let (mut fires, mut quiet) = (BTreeSet::new(), BTreeSet::new());
    for case in cases.split("\n  - name: ").skip(1) {
        let named = after(case, "alertname: ");
        let [alert] = named.as_slice() else { panic!("a case looks at one alert: {case}") };
        if case.contains("exp_alerts: []") {
            quiet.insert(alert.clone());
        } else {
            assert!(case.contains("exp_labels"), "{case}");
            fires.insert(alert.clone());
        }
    }
    let all: BTreeSet<String> = alerts.iter().cloned().collect();
    assert_eq!(alerts.len(), all.len(), "a name stands there twice");
    assert_eq!(fires, all, "each alert has a case where it fires");
    assert_eq!(quiet, all, "each alert has a case where it does not");
    for alert in &alerts {
        let paragraph =
            page.split(&format!("\n### {alert}\n")).nth(1).unwrap_or_else(|| panic!("{alert} is not explained"));
        let paragraph = paragraph.split("\n###").next().unwrap_or_default();
        assert!(paragraph.len() > 120, "{alert}: {paragraph}");
        assert!(rules.contains(&format!("runbook: docs/operations.md#{}\n", alert.to_lowercase())), "{alert}");
    }
    let explained = after(&page, "### Walden");
    assert_eq!(explained.len(), alerts.len(), "{explained:?}");
    let metrics = page.split("## Metrics").nth(1).and_then(|text| text.split("\n## ").next()).expect("the section");
    for (name, ..) in METRICS {
        assert!(metrics.contains(&format!("`walden_{name}")), "walden_{name} is not explained");
    }
    for code in walden::telemetry::CauseCode::ALL {
        let has_paragraph = page
            .lines()
            .filter_map(|line| line.strip_prefix("### "))
            .any(|heading| heading.split(", ").any(|c| c == code.as_str()));
        assert!(has_paragraph, "{code} is not explained");
    }
}

/// Every line of an agent's log as JSON.
#[track_caller]
fn events(agent: &Agent) -> Vec<Value> {
    let log = agent.log();
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    log.lines().map(parse).collect()
}

/// The names that a line may have, and how their values look.
fn assert_is_an_event(line: &Value) {
    let object = line.as_object().expect("an object");
    for (name, value) in object {
        let fits = match name.as_str() {
            "timestamp" => {
                value.as_str().is_some_and(|time| time.parse::<jiff::Timestamp>().is_ok() && time.ends_with('Z'))
            }
            "level" => value.as_str().is_some_and(|level| ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level)),
            "message" | "event" | "cause" | "since" | "repository" | "address" | "slot" | "id" | "object"
            | "position" | "held_to" | "at" | "durable" | "archived" | "version" | "cluster" | "repositories"
            | "error" | "hint" | "segment" | "path" | "url" => value.as_str().is_some_and(|text| !text.contains('\n')),
            "bytes" | "seconds" | "timeline" | "segments" => value.is_number(),
            "from" | "to" => value.is_number() || value.is_string(), // timelines, positions
            _ => false,
        };
        assert!(fits, "{name} in {line}");
    }
    for name in ["timestamp", "level", "message"] {
        assert!(object.contains_key(name), "{line} has no {name}");
    }
}

/// A whole life of an agent, in JSON: every line is an object with known names, each event that matters is one line in its place, and
/// each fault is told once, with what to do, and once more when it is over.
#[test]
fn the_log_tells_a_life_in_json() {
    let stage = Stage::new("log");
    let mut postgres = Postgres::builder(15)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "4MB")
        .start(&stage);
    let walden = Walden::local(&stage, &postgres, "[log]\nformat = \"json\"\n[backup]\ninitial = true\n");
    let mut agent = walden.spawn(&["-v", "run"]);
    agent.wait_status(MINUTE, "the backup", |status| status["last_backup"].is_object() && status["healthy"] == true);
    archive_all(&postgres, &mut agent);
    postgres.stop_fast();
    agent.wait_status(MINUTE, "the end of the stream", |status| has_cause(status, "not_connected"));
    fs::write(postgres.data.join("standby.signal"), "").expect("standby.signal");
    stage.give(&postgres.data.join("standby.signal"));
    postgres.start();
    agent.wait_status(MINUTE, "the stream from the standby", |status| !has_cause(status, "not_connected"));
    postgres.psql("SELECT pg_promote()");
    postgres.wait_promoted(MINUTE);
    agent.wait_status(MINUTE, "the second timeline", |status| status["timeline"] == 2);
    archive_all(&postgres, &mut agent);
    agent.signal(Signal::HUP);
    wait_until(MINUTE, "the configuration to be read", || agent.log().contains("\"reloaded\""));
    assert!(agent.sigterm(MINUTE).success());
    let life = events(&agent);
    life.iter().for_each(assert_is_an_event);
    let told: Vec<&str> = life.iter().filter_map(|line| line["event"].as_str()).collect();
    let mut rest = told.as_slice();
    for event in [
        "starting",
        "serving",
        "slot_created",
        "archiving_begins",
        "connected",
        "backup_begun",
        "backup_ended",
        "uploaded",
        "cause",
        "cause_over",
        "connected",
        "timeline_changed",
        "connected",
        "uploaded",
        "reloaded",
        "stopping",
        "stopped",
    ] {
        let at = rest.iter().position(|found| *found == event);
        let at = at.unwrap_or_else(|| panic!("{event} is not told in its place: {told:#?}"));
        rest = &rest[at + 1..];
    }
    let count = |event: &str| told.iter().filter(|found| **found == event).count();
    for once in [
        "starting",
        "serving",
        "slot_created",
        "archiving_begins",
        "lease_taken",
        "timeline_changed",
        "reloaded",
        "stopping",
        "stopped",
    ] {
        assert_eq!(count(once), 1, "{once}: {told:#?}");
    }
    assert_eq!(count("cause"), count("cause_over"), "{told:#?}");
    let uploaded = life.iter().find(|line| line["event"] == "uploaded").expect("there are some");
    assert_eq!(uploaded["level"], "DEBUG");
    let changed = life.iter().find(|line| line["event"] == "timeline_changed").expect("it was there");
    assert_eq!((&changed["from"], &changed["to"]), (&Value::from(1), &Value::from(2)));
    for line in life.iter().filter(|line| line["level"] == "ERROR") {
        assert!(line["message"].as_str().is_some_and(|said| said.contains("; ")), "what to do is not said: {line}");
    }

    // WAL is lost while the agent is away: one line says so, and where.
    postgres.psql("SELECT pg_drop_replication_slot('walden')");
    let mut ledger = Ledger::create(&postgres);
    let held = postgres.value("SELECT pg_walfile_name(pg_current_wal_lsn())");
    wait_until(MINUTE, "the server to remove what the agent lacks", || {
        ledger.commit();
        postgres.switch_wal();
        postgres.psql("CHECKPOINT");
        postgres.wait_oracle_complete();
        !postgres.data.join("pg_wal").join(&held).exists()
    });
    let mut agent = walden.run();
    agent.wait_status(MINUTE, "the gap and its backup", |status| {
        status["gaps"].as_array().is_some_and(|gaps| gaps.len() == 1) && status["healthy"] == true
    });
    // Started a second time: refused, and that is a line of JSON as well.
    let refused = walden.exec(&["run"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    let last: Value = serde_json::from_str(refused.stderr.lines().last().unwrap_or_default()).expect("JSON");
    assert_eq!(
        (&last["event"], &last["level"], &last["code"]),
        (&"ended".into(), &"ERROR".into(), &4.into()),
        "{last}"
    );
    assert!(agent.sigterm(MINUTE).success());
    let second = events(&agent);
    let gaps: Vec<&Value> = second.iter().filter(|line| line["cause"] == "gap" && line["event"] == "cause").collect();
    assert_eq!(gaps.len(), 1, "{second:#?}");
    assert!(
        gaps[0]["message"].as_str().is_some_and(|said| said.contains(" to ") && said.contains("timeline 2")),
        "{gaps:?}"
    );
    assert!(second.iter().all(|line| line["level"] != "DEBUG"), "only with -v");
}
