//! One writer at a time (I20).

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::stores::{local_table, runtime, s3_table};
use super::streaming::{archive_all, few, majors};
use crate::support::oracle::{cluster_folder, compare_stored, files_below};
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;
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
    // Mostly waiting, so the majors wait together.
    std::thread::scope(|scope| {
        let each: Vec<_> = majors().into_iter().map(|major| scope.spawn(move || lose_the_lease(major))).collect();
        each.into_iter().for_each(|major| major.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    });
}

fn lose_the_lease(major: u32) {
    let stage = Stage::new("lost");
    let postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
    let mut hanging = first.run_connected();
    archive_all(&postgres, &mut hanging);
    postgres.pgbench_init(1);
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "50"]);
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

/// Two agents with repositories of their own and one slot name, as when a configuration is copied: no lease keeps them apart, so the
/// server does. The second one says who is in the way, takes nothing, and goes on when the first one stops; neither archive has a hole
/// that it does not tell.
#[test]
fn two_agents_with_one_slot_take_turns_and_say_so() {
    few(&[13, 18]).into_iter().for_each(share_a_slot);
}

fn share_a_slot(major: u32) {
    let stage = Stage::new("oneslot");
    let postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = first.run_connected();
    archive_all(&postgres, &mut agent);
    let config = fs::read_to_string(second(&first, "second").config_path()).expect("the configuration");
    let config = config.replace("slot = \"second\"\n", "").replace("/archive\"", "/archive-second\"");
    let other = Walden::with_config(&stage, &config);
    let mut waiting = other.run();
    let status = waiting.wait_status(MINUTE, "the slot to be in use", |status| {
        has_cause(status, "not_connected") && status.to_string().contains("is active")
    });
    assert_eq!(status["healthy"], false);
    let checked = other.exec(&["check"]);
    assert_eq!(checked.code, Some(1), "{}", checked.stdout);
    assert!(checked.stdout.contains("in use by another receiver"), "{}", checked.stdout);
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "the first agent to go on", |status| status["healthy"] == true);
    let whole = cluster_folder(&first.repository(), "main", &postgres);
    compare_stored(&whole, &postgres.oracle).assert_whole(2);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    waiting.wait_status(MINUTE, "the second agent to stream", |status| !has_cause(status, "not_connected"));
    archive_all(&postgres, &mut waiting);
    let begun = cluster_folder(&stage.join("archive-second"), "main", &postgres);
    compare_stored(&begun, &postgres.oracle).assert_whole(1);
}

/// Two repositories and two agents, each with one lease: the one that came first could not reach the first repository then. Both waited
/// for each other for ever. The second repository's lease follows the first one's: one agent has both, and archives (I20, I21).
#[test]
fn of_two_agents_with_one_lease_each_one_gets_both() {
    let stage = Stage::new("twoleases");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    // Two doors into one store, so that one agent's can be shut.
    let door = || runtime.block_on(S3Server::start_s3s(&folder));
    let (door, other_door) = (door(), door());
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let more = format!(
        "[backup]\ninitial = false\n[upload]\nretry_delay_max = \"1s\"\n[archive]\nstop_timeout = \"1s\"\n{}{}",
        s3_table("a", &door),
        local_table("b", &stage.join("archive"))
    );
    let with_keys =
        |walden: Walden| door.environment().iter().fold(walden, |walden, (name, value)| walden.env(name, value));
    let first = with_keys(Walden::with_repository(&stage, &postgres, &more));
    let mut agent = first.run_connected();
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    door.faults().always("", "", HttpFault::Status(503, "SlowDown"));
    let mut agent = first.run();
    wait_until(MINUTE, "the lease of the repository that answers", || holder(&first, &postgres).1 == 30);

    let config = fs::read_to_string(second(&first, "second").config_path()).expect("the configuration");
    let other = with_keys(Walden::with_config(&stage, &config.replace(&door.endpoint, &other_door.endpoint)));
    let mut waiting = other.run();
    waiting.wait_status(MINUTE, "the second agent to have the other one's", |status| {
        has_cause(status, "lease_held") && causes_say(status, "repository b")
    });
    door.faults().clear();
    waiting.wait_status(MINUTE, "the second agent to archive", |status| {
        !has_cause(status, "lease_held") && !has_cause(status, "not_connected")
    });
    agent.wait_status(MINUTE, "the first agent to stand by", |status| has_cause(status, "lease_held"));
    assert_eq!(holder(&first, &postgres), (agent_id(&first, "spool-second"), 30));
    archive_all(&postgres, &mut waiting);
    let here = cluster_folder(&stage.join("archive"), "main", &postgres);
    let there = cluster_folder(&folder.join(&door.bucket).join("deep/down"), "main", &postgres);
    for repository in [&here, &there] {
        compare_stored(repository, &postgres.oracle).assert_whole(2);
    }
}

fn causes_say(status: &serde_json::Value, text: &str) -> bool {
    status["causes"].to_string().contains(text)
}

/// A cloned machine has a copy of the spool, and so the same agent id. The two took the lease from each other every few seconds. The one
/// that begins later has it, as after a restart, and the other one stands by.
#[test]
fn a_copied_spool_is_another_agent() {
    let stage = Stage::new("twins");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "");
    let mut agent = first.run_connected();
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let copied = stage.command("cp").arg("-a").arg(first.spool()).arg(stage.join("spool-twin")).status();
    assert!(copied.expect("cp runs").success());
    let mut agent = first.run_connected();
    let mut twin = second(&first, "twin").run_connected();
    assert_eq!(agent_id(&first, "spool"), agent_id(&first, "spool-twin"));
    agent.wait_status(MINUTE, "the first one to stand by", |status| {
        has_cause(status, "lease_held") && has_cause(status, "not_connected")
    });
    let begun = Instant::now();
    twin.wait_status(MINUTE, "twelve seconds in peace", |status| {
        assert!(!has_cause(status, "lease_lost") && !has_cause(status, "lease_held"), "{status}");
        begun.elapsed() > Duration::from_secs(12)
    });
    archive_all(&postgres, &mut twin);
    assert_eq!(agent.log().matches("this agent holds the lease").count(), 1, "{}", agent.log());
    let folder = cluster_folder(&first.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
}
