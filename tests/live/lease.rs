//! One writer at a time (I20).

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, files_below};
use crate::support::{Postgres, Stage, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);
/// The lease's time to live, and a look at it every five seconds.
const TAKE_OVER: Duration = Duration::from_secs(45);

/// Another agent with a spool and a slot of its own.
fn second(first: &Walden, name: &str) -> Walden {
    let config = fs::read_to_string(first.config_path()).expect("the configuration");
    let listen = config.lines().find(|line| line.starts_with("listen")).expect("a port");
    let config = config
        .replace(listen, &format!("listen = \"127.0.0.1:{}\"", parts::free_port()))
        .replace("/spool\"", &format!("/spool-{name}\""))
        .replace("/state\"", &format!("/state-{name}\""))
        .replace("[postgres]\n", &format!("[postgres]\nslot = \"{name}\"\n"));
    Walden::with_config(first.stage(), &config)
}

fn holder(walden: &Walden, postgres: &Postgres) -> (String, u64) {
    let path = cluster_folder(&walden.repository(), "main", postgres).join("lease.json");
    let lease: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("a lease")).expect("JSON");
    (lease["agent"].as_str().expect("an agent").to_owned(), lease["ttl_seconds"].as_u64().expect("a number"))
}

fn agent_id(walden: &Walden, spool: &str) -> String {
    fs::read_to_string(walden.stage().join(spool).join("agent-id")).expect("an id").trim().to_owned()
}

/// An agent hangs (SIGSTOP) with WAL that it had just received, and another one takes over. When it goes on it writes nothing more: it
/// finds its lease run out before it writes, and stands by. The archive is the server's own, byte for byte; when the second one stops
/// cleanly the first takes over at once (I2, I20; B2 of the failure table).
#[test]
fn one_that_lost_its_lease_stops_before_it_writes() {
    let stage = Stage::new("lost");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
    let mut hanging = first.run_connected();
    archive_all(&postgres, &mut hanging);
    postgres.pgbench_init(1);
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "100"]);
    let other = second(&first, "second");
    let mut waiting = other.run();
    waiting.wait_status(MINUTE, "the second agent to stand by", |status| has_cause(status, "lease_held"));
    assert_eq!(holder(&first, &postgres).0, agent_id(&first, "spool"));
    hanging.signal(Signal::STOP);
    waiting.wait_status(TAKE_OVER, "the second agent to take over", |status| {
        !has_cause(status, "lease_held") && !has_cause(status, "not_connected")
    });
    let second_id = agent_id(&first, "spool-second");
    wait_until(MINUTE, "its lease", || holder(&first, &postgres) == (second_id.clone(), 30));
    hanging.signal(Signal::CONT);
    hanging.wait_status(MINUTE, "the first agent to stand by", |status| {
        has_cause(status, "lease_held") && has_cause(status, "not_connected")
    });
    archive_all(&postgres, &mut waiting);
    assert_eq!(holder(&first, &postgres).0, second_id, "the first agent has not written");
    assert!(!waiting.log().contains("conflict"), "{}", waiting.log());

    // Given back, the lease need not run out.
    assert!(waiting.sigterm(MINUTE).success(), "{}", waiting.log_tail());
    let begun = Instant::now();
    hanging.wait_status(MINUTE, "the first agent to go on", |status| {
        !has_cause(status, "lease_held") && !has_cause(status, "not_connected")
    });
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
    load.stop();
    archive_all(&postgres, &mut hanging);
    let folder = cluster_folder(&first.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(3);
    assert!(files_below(&folder.join("gaps")).is_empty());
}

/// An agent that was killed takes its own lease again at once, by the id in its spool; another one has to wait for it.
#[test]
fn a_restart_takes_its_own_lease_at_once() {
    let stage = Stage::new("restart");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    for _ in 0..3 {
        agent.kill9();
        let begun = Instant::now();
        agent = walden.run_connected();
        archive_all(&postgres, &mut agent);
        assert!(begun.elapsed() < Duration::from_secs(15), "it took {:?}", begun.elapsed());
        assert!(!agent.log().contains("stands by"), "{}", agent.log());
    }
}
