use std::io::{Read, Write};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::config::{QuickSettings, Sources};
use crate::monitor::Monitor;
use crate::telemetry::{AlertSettings, Board, BoardSetup, CauseJson, QueueJson, RepositoryJson, SlotJson};
use crate::wal::{Lsn, SystemIdentifier, TimelineId};

fn at(seconds: i64) -> PgTime {
    PgTime::from_pg_micros(seconds * 1_000_000)
}

#[test]
fn an_unhealthy_agent_says_why_first() {
    let status = StatusJson {
        schema: 1,
        causes: vec![CauseJson { code: "lag".into(), message: "32 MiB\u{1b}[2J wait".into(), since: at(0) }],
        system_identifier: Some(SystemIdentifier::new(7)),
        timeline: Some(TimelineId::FIRST),
        server_lsn: Some(Lsn::new(0x500_0000)),
        archived_lsn: Some(Lsn::new(0x300_0000)),
        rpo_bytes: Some(32 << 20),
        rpo_seconds: Some(3700.0),
        lag_bytes: Some(0),
        complete_until: Some(at(10)),
        slot: SlotJson { name: Some("walden".into()), retained_bytes: Some(1 << 20), ..SlotJson::default() },
        queue: QueueJson { segments: Some(2), bytes: Some(2048) },
        repositories: vec![RepositoryJson {
            name: "main".into(),
            url: "s3://b".into(),
            archived_lsn: None,
            last_error: Some("PUT was refused".into()),
        }],
        ..StatusJson::default()
    };
    let page = render(&status, "main", at(90_070));
    let mut lines = page.lines();
    assert_eq!(lines.next(), Some("NOT HEALTHY"));
    assert_eq!(lines.next(), Some("  lag since 2000-01-01T00:00:00Z (1 d 1 h ago)"));
    assert_eq!(lines.next(), Some("    32 MiB [2J wait"));
    for line in [
        "cluster                main, system 7, timeline 1",
        "server at              0/5000000",
        "received               unknown",
        "not archived           32.0 MiB, the oldest is 1 h 1 min old",
        "  in complete segments nothing",
        "slot                   walden, from unknown, unknown, keeps 1.0 MiB",
        "queue                  2 segments, 2.0 KiB",
        "repository             main (s3://b), archived unknown",
        "  last error           PUT was refused",
        "last backup            none known",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\nis not in\n{page}");
    }
}

#[test]
fn spans_are_short() {
    for (seconds, text) in [(0.4, "0 s"), (61.0, "1 min 1 s"), (7260.0, "2 h 1 min"), (180_000.0, "2 d 2 h")] {
        assert_eq!(span(seconds), text);
    }
}

fn settings_with(listen: &str) -> Settings {
    let quick = QuickSettings { listen: Some(listen.into()), ..QuickSettings::default() };
    let sources = Sources { config: None, quick, environment: Vec::new(), working_directory: "/".into() };
    Settings::load(&sources).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_running_agent_is_asked() {
    let board = Board::new(BoardSetup {
        cluster: "main".into(),
        slot: "walden".into(),
        repositories: Vec::new(),
        alert: AlertSettings::default(),
        clock: Arc::new(SystemClock::new()),
    });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let monitor = runtime.block_on(Monitor::bind("127.0.0.1:0", board)).expect("port 0 is always free");
    let address = monitor.address();
    runtime.spawn(monitor.serve(CancellationToken::new()));
    // The address that the agent listens on may mean all of the host's.
    for listen in [address.to_string(), format!("0.0.0.0:{}", address.port())] {
        let document = ask(&settings_with(&listen)).unwrap_or_else(|why| panic!("{why}"));
        assert_eq!(document["causes"][0]["code"], "not_connected");
        assert_eq!(document["slot"]["name"], "walden");
    }
}

#[test]
fn another_server_is_not_taken_for_an_agent() {
    for answer in [
        "HTTP/1.1 200 OK\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\n\r\n<html>",
        "HTTP/1.1 404 Not Found\r\n\r\n",
        "SSH-2.0\r\n",
        "",
    ] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("port 0 is always free");
        let address = listener.local_addr().expect("it is bound").to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("somebody asks");
            // The question is read before the end, or closing would reset the connection.
            let mut question = [0; 1024];
            assert!(stream.read(&mut question).expect("it asks") > 0);
            stream.write_all(answer.as_bytes()).expect("it reads");
        });
        let why = ask(&settings_with(&address)).expect_err("no agent");
        assert!(why.contains(&address) && why.contains("--listen"), "{answer:?}: {why}");
        server.join().expect("it answered");
    }
    assert!(ask(&settings_with("")).is_err_and(|why| why.contains("metrics.listen")));
}
