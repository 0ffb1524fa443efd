//! What the tail costs: requests to the store, by what they are for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::support::host::{Host, Store, Template};
use crate::support::oracle::files_below;
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;
use crate::support::{Stage, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// Requests by method and by what they are about: `PUT tail`, `GET list`, `PUT coverage.json`.
fn requests(server: &S3Server) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    for request in server.faults().requests() {
        let about = ["coverage.json", "lease.json"].into_iter().find(|name| request.path.contains(name));
        let about = about.or_else(|| request.path.contains("list-type=").then_some("list"));
        let about = about.or_else(|| {
            ["tail", "wal", "backups"].into_iter().find(|part| request.path.contains(&format!("/{part}/")))
        });
        *counted.entry(format!("{} {}", request.method, about.unwrap_or("other"))).or_insert(0) += 1;
    }
    counted
}

/// On an idle server nothing is at risk, now and some seconds later, and nothing of the tail is stored.
#[test]
fn an_idle_server_risks_nothing_and_stores_nothing() {
    let stage = Stage::new("idletail");
    let template = Template::make(&stage, 17, 16);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let store = Store::s3(&stage, "store", &runtime);
    let more = "[archive]\ntail_interval = \"200ms\"\n[backup]\ninitial = false\n";
    let host = Host::start(&stage, "host", &template, &store, &["autovacuum=off"], more);
    let mut agent = host.walden.run_connected();
    host.postgres.psql("INSERT INTO crowd VALUES (0, 1, 'the last for a while')");
    // The server itself writes a record now and then; then it is begun again.
    for _ in 0..10 {
        let end = host.postgres.flush_lsn();
        agent.wait_archived(end, MINUTE);
        agent.wait_status(MINUTE, "nothing at risk", |status| status["rpo_bytes"] == 0);
        store.server().faults().forget_requests();
        let begun = Instant::now();
        let mut seen = Vec::new();
        wait_until(MINUTE, "five quiet seconds", || {
            let status = agent.status().expect("the agent answers");
            seen.push((status["rpo_seconds"].clone(), status["rpo_bytes"].clone()));
            begun.elapsed() > Duration::from_secs(5)
        });
        let counted = requests(store.server());
        if host.postgres.flush_lsn() != end {
            continue;
        }
        eprintln!("five idle seconds: {counted:?}");
        assert!(seen.len() > 15 && seen.iter().all(|(seconds, bytes)| *seconds == 0.0 && *bytes == 0), "{seen:?}");
        let stored = counted.keys().any(|kind| ["PUT tail", "PUT wal", "DELETE tail"].contains(&kind.as_str()));
        assert!(!stored, "{counted:?}");
        return;
    }
    panic!("the server was never idle");
}

/// A piece is one PUT: nothing is asked before it and nothing after it.
#[test]
fn a_piece_of_the_tail_is_one_request() {
    let stage = Stage::new("tailcost");
    let template = Template::make(&stage, 17, 16);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let store = Store::s3(&stage, "store", &runtime);
    let more = "[archive]\ntail_interval = \"200ms\"\n[backup]\ninitial = false\n";
    let host = Host::start(&stage, "host", &template, &store, &["autovacuum=off", "checkpoint_timeout=1h"], more);
    let mut agent = host.walden.run_connected();
    let here = host.postgres.flush_lsn();
    agent.wait_archived(here, MINUTE);
    store.server().faults().forget_requests();
    let (begun, sql) = (Instant::now(), host.postgres.connect().expect("a session"));
    let mut n = 1;
    wait_until(MINUTE, "ten seconds of small commits", || {
        sql.run(&format!("INSERT INTO crowd VALUES (1, {n}, 'small')"));
        n += 1;
        begun.elapsed() > Duration::from_secs(10)
    });
    let counted = requests(store.server());
    eprintln!("ten seconds of small commits, a piece every 200 ms: {counted:?}");
    let count = |kind: &str| counted.get(kind).copied().unwrap_or(0);
    assert!(count("PUT tail") >= 10 && count("PUT tail") <= 52, "{counted:?}");
    // An agent that has just begun looks once at what there is.
    assert!(count("HEAD tail") + count("HEAD wal") == 0 && count("GET tail") + count("GET list") < 10, "{counted:?}");
}

/// Without the right to delete, pieces stay beside their segments. A start looked at all of them, segment by segment, and tried to
/// delete each, before anything went out.
#[test]
fn pieces_that_may_not_be_deleted_do_not_slow_a_start() {
    let stage = Stage::new("nodelete");
    let template = Template::make(&stage, 17, 1);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let store = Store::s3(&stage, "store", &runtime);
    let more = "[archive]\ntail_interval = \"20ms\"\ndurability = \"repository\"\n[backup]\ninitial = false\n";
    let host = Host::start(&stage, "host", &template, &store, &["autovacuum=off"], more);
    let faults = store.server().faults();
    let forbid = || faults.always("DELETE", "/tail/", HttpFault::Status(403, "AccessDenied"));
    forbid();
    let mut agent = host.walden.run_connected();
    for n in 0..12 {
        for part in 0..2 {
            host.postgres.psql(&format!(
                "INSERT INTO crowd SELECT {n}, {part} * 10000 + i, md5(i::text) FROM generate_series(1, 3000) i"
            ));
            let here = host.postgres.flush_lsn();
            agent.wait_archived(here, MINUTE);
        }
        host.postgres.switch_wal();
    }
    let end = host.postgres.flush_lsn();
    agent.wait_archived(end, MINUTE);
    agent.wait_status(MINUTE, "an empty queue", |status| status["queue"]["segments"] == 0);
    agent.kill9();
    let pieces =
        files_below(&stage.join("store")).iter().filter(|path| path.to_string_lossy().contains("/tail/")).count();
    assert!(pieces >= 20, "{pieces} pieces");

    faults.forget_requests();
    let mut agent = host.walden.run_connected();
    host.postgres.psql("INSERT INTO crowd VALUES (99, 1, 'more')");
    let end = host.postgres.flush_lsn();
    agent.wait_archived(end, MINUTE);
    let counted = requests(store.server());
    eprintln!("a start with {pieces} pieces that stay: {counted:?}");
    let count = |kind: &str| counted.get(kind).copied().unwrap_or(0);
    // The pieces of one segment are tried, then none.
    assert!(count("DELETE tail") <= 8 && count("GET list") < 20, "{counted:?}");
    assert!(count("HEAD wal") < 12, "{counted:?}");
}
