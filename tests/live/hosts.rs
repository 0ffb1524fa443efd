//! Several hosts: a primary and its standby in one list. The agent follows the primary, and a failover leaves no gap.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use walden::wal::Lsn;

use super::restore::restore;
use super::streaming::{archive_all, few, turns};
use crate::support::ledger::assert_rows;
use crate::support::oracle::{cluster_folder, compare_stored};
use crate::support::{Agent, Ledger, Postgres, Random, Recorder, Stage, Walden, has_cause, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// A primary that keeps no more WAL than it must, and a standby that follows it.
pub fn pair(stage: &Stage, major: u32) -> (Postgres, Postgres) {
    let mut primary = Postgres::builder(major)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "8MB")
        .start(stage);
    primary.stop_fast();
    let data = stage.join("standby");
    assert!(stage.command("cp").arg("-a").arg(&primary.data).arg(&data).status().expect("cp runs").success());
    primary.start();
    let mut standby = Postgres::over(stage, major, &data);
    standby.overrides.push(format!(
        "primary_conninfo=host={} port={} user=postgres",
        primary.sockets.display(),
        primary.port
    ));
    standby.overrides.push("wal_retrieve_retry_interval=200ms".into());
    fs::write(data.join("standby.signal"), "").expect("standby.signal");
    stage.give(&data.join("standby.signal"));
    standby.start();
    wait_until(MINUTE, "the standby to stream", || {
        standby.value("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'") == "1"
    });
    (primary, standby)
}

/// `hosts` of `postgres.url` in this order.
pub fn archiving(stage: &Stage, hosts: &[&Postgres], attributes: &str) -> Walden {
    let sockets: Vec<String> = hosts.iter().map(|host| host.sockets.display().to_string()).collect();
    let ports: Vec<String> = hosts.iter().map(|host| host.port.to_string()).collect();
    let url = format!(
        "host={} port={} user=postgres dbname=postgres target_session_attrs={attributes}",
        sockets.join(","),
        ports.join(",")
    );
    let walden =
        Walden::local(stage, hosts[0], "[archive]\ntail_interval = \"200ms\"\n[upload]\nretry_delay_max = \"1s\"\n");
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    Walden::with_config(stage, &config.replace(&hosts[0].socket_url(), &url))
}

fn received_on(standby: &Postgres) -> Lsn {
    standby.lsn("SELECT pg_last_wal_receive_lsn()")
}

#[track_caller]
fn wait_healthy_without_gap(agent: &mut Agent, timeline: u32) {
    let status = agent.wait_status(MINUTE, "healthy on the timeline", |status| {
        status["healthy"] == true && status["timeline"] == timeline
    });
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
}

/// On the standby too the agent keeps a slot and advances it. While the agent is away the standby is promoted and both servers
/// remove what no slot holds: nothing is lost; and where there was no slot, the gap is told (I3). The old primary that comes back, first in the list, is passed over, and `check` names
/// the slot that was left on it.
#[test]
fn a_failover_to_another_host_leaves_no_gap() {
    for (major, kept) in turns(&[true, false]) {
        let stage = Stage::new("failover");
        let (mut primary, mut standby) = pair(&stage, major);
        let walden = archiving(&stage, &[&primary, &standby], "primary");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&primary);
        ledger.commit_many(3);
        walden.ok(&["backup"]);
        let size = primary.segment_size().get();
        for _ in 0..4 {
            ledger.commit();
            archive_all(&primary, &mut agent);
        }
        wait_until(MINUTE, "the standby's slot to be advanced", || {
            ledger.commit();
            let slot = standby.slot_restart_lsn("walden");
            slot.is_some_and(|slot| primary.flush_lsn().bytes_since(slot) < 3 * size)
        });
        let slot = standby.slot_restart_lsn("walden").expect("just seen");
        let durable: Lsn = agent.status().expect("an answer")["durable_lsn"]
            .as_str()
            .and_then(|text| text.parse().ok())
            .expect("known");
        assert!(slot <= durable, "the slot is at {slot}, durable is {durable}");
        let checked = walden.exec(&["check"]);
        assert_eq!(checked.code, Some(0), "{}", checked.stdout);
        let named = format!("slot.{}", standby.sockets.join(format!(".s.PGSQL.{}", standby.port)).display());
        assert!(checked.stdout.contains(&named), "{}", checked.stdout);
        agent.kill9();
        if !kept {
            standby.drop_slot("walden");
        }

        for _ in 0..8 {
            ledger.commit_many(3);
            primary.switch_wal();
        }
        let end = primary.flush_lsn();
        wait_until(MINUTE, "the standby to have everything", || received_on(&standby) >= end);
        primary.psql("CHECKPOINT");
        standby.psql("CHECKPOINT");
        let rows = ledger.entries().to_vec();
        drop(ledger);
        primary.stop_immediate();
        standby.psql("SELECT pg_promote()");
        standby.wait_promoted(MINUTE);
        let mut ledger = Ledger::create(&standby);
        let mut rows = rows;
        for _ in 0..4 {
            rows.extend(ledger.commit_many(2));
            standby.switch_wal();
            standby.psql("CHECKPOINT");
        }
        drop(ledger);
        let mut agent = walden.run_connected();
        let end = standby.switch_wal();
        if !kept {
            // On each of the two timelines that it lies on.
            let status = agent.wait_status(MINUTE, "the gap to be told", |status| {
                has_cause(status, "gap") && status["gaps"].as_array().is_some_and(|gaps| gaps.len() > 1)
            });
            let timelines: Vec<_> =
                status["gaps"].as_array().expect("a list").iter().map(|gap| &gap["timeline"]).collect();
            assert_eq!(timelines, [1, 2], "{status}");
            continue;
        }
        agent.wait_archived(end, MINUTE);
        wait_healthy_without_gap(&mut agent, 2);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        assert_rows(&restore(&walden, major, "after", &[]), &rows);

        primary.start();
        primary.psql("SELECT pg_logical_emit_message(true, 'test', 'left behind')");
        let mut agent = walden.run();
        standby.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
        let end = standby.switch_wal();
        agent.wait_archived(end, MINUTE);
        wait_healthy_without_gap(&mut agent, 2);
        let other = archiving(&stage, &[&standby, &primary], "primary");
        let checked = other.exec(&["check"]);
        assert!(
            checked.stdout.contains("left behind on timeline 1") || major < 15,
            "{}{}",
            checked.stdout,
            checked.stderr
        );
        assert!(checked.stdout.contains("pg_drop_replication_slot('walden')"), "{}", checked.stdout);
    }
}

/// The standby has lost touch when it is promoted: its timeline begins before the end of what is held. The agent goes over to it,
/// what the old primary had written beyond stays, and both branches are restored.
#[test]
fn a_lagging_standby_that_is_promoted_is_followed() {
    few(&[13, 17]).into_iter().for_each(promote_the_lagging_standby);
}

fn promote_the_lagging_standby(major: u32) {
    let stage = Stage::new("lagging");
    let (mut primary, mut standby) = pair(&stage, major);
    let walden = archiving(&stage, &[&primary, &standby], "read-write");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&primary);
    ledger.commit_many(3);
    walden.ok(&["backup"]);
    archive_all(&primary, &mut agent);
    ledger.commit_many(5);
    let end = primary.flush_lsn();
    wait_until(MINUTE, "the standby to have these", || received_on(&standby) >= end);
    wait_until(MINUTE, "a slot on the standby", || standby.slot_restart_lsn("walden").is_some());
    let common = ledger.entries().to_vec();
    standby.stop_fast();
    standby.overrides.retain(|setting| !setting.starts_with("primary_conninfo"));
    ledger.commit_many(5);
    archive_all(&primary, &mut agent);
    ledger.commit_many(5);
    let last = ledger.commit().lsn;
    agent.wait_archived(last, MINUTE);
    let old = ledger.entries().to_vec();
    drop(ledger);
    primary.stop_immediate();
    let allow = |mode| fs::set_permissions(walden.repository(), fs::Permissions::from_mode(mode)).expect("changed");
    allow(0);
    standby.start();
    standby.psql("SELECT pg_promote()");
    standby.wait_promoted(MINUTE);
    let mut ledger = Ledger::create(&standby);
    let mut new = common.clone();
    new.extend(ledger.commit_many(10));
    drop(ledger);
    // The old timeline's end, which the repository holds, lies behind all of that.
    agent.wait_status(MINUTE, "the new timeline's WAL to be at risk", |status| {
        status["timeline"] == 2 && status["rpo_bytes"].as_u64() > Some(0) && status["rpo_seconds"].as_f64() > Some(3.0)
    });
    allow(0o700);
    let end = standby.switch_wal();
    agent.wait_status(MINUTE, "the new timeline", |status| status["timeline"] == 2);
    agent.wait_archived(end, MINUTE);
    wait_healthy_without_gap(&mut agent, 2);
    let folder = cluster_folder(&walden.repository(), "main", &standby);
    compare_stored(&folder, &primary.oracle).assert_whole(1);
    assert_rows(&restore(&walden, major, "new", &[]), &new);
    assert_rows(&restore(&walden, major, "old", &["--timeline", "1"]), &old);
}

/// A standby is the source of the stream. It is behind what is held for a while, as one that the agent goes over to may be: it is
/// waited for, and not called diverged. When its primary is promoted anew, it is followed onto the next timeline.
#[test]
fn a_standby_is_a_source_and_waited_for_while_it_lags() {
    few(&[15, 18]).into_iter().for_each(stream_from_a_standby);
}

fn stream_from_a_standby(major: u32) {
    let stage = Stage::new("source");
    let (mut primary, mut standby) = pair(&stage, major);
    let walden = archiving(&stage, &[&primary], "any");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&primary);
    ledger.commit_many(3);
    archive_all(&primary, &mut agent);
    let end = primary.flush_lsn();
    wait_until(MINUTE, "the standby to have these", || received_on(&standby) >= end);
    let conninfo = standby.overrides.clone();
    standby.stop_fast();
    standby.overrides.retain(|setting| !setting.starts_with("primary_conninfo"));
    standby.start();
    ledger.commit_many(5);
    archive_all(&primary, &mut agent);
    ledger.commit_many(5);
    let last = ledger.commit().lsn;
    agent.wait_archived(last, MINUTE);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());

    let from_standby = archiving(&stage, &[&standby], "standby");
    let mut agent = from_standby.run();
    let status = agent.wait_status(MINUTE, "the standby to be found behind", |status| {
        has_cause(status, "not_connected") && status.to_string().contains("behind")
    });
    assert!(!has_cause(&status, "diverged"), "{status}");
    standby.stop_fast();
    standby.overrides = conninfo;
    standby.start();
    ledger.commit_many(5);
    archive_all(&primary, &mut agent);
    wait_healthy_without_gap(&mut agent, 1);

    primary.stop_fast();
    fs::write(primary.data.join("standby.signal"), "").expect("standby.signal");
    stage.give(&primary.data.join("standby.signal"));
    primary.start();
    primary.psql("SELECT pg_promote()");
    primary.wait_promoted(MINUTE);
    drop(ledger);
    Ledger::create(&primary).commit_many(5);
    archive_all(&primary, &mut agent);
    wait_healthy_without_gap(&mut agent, 2);
    let folder = cluster_folder(&walden.repository(), "main", &primary);
    compare_stored(&folder, &primary.oracle).assert_whole(3);
}

/// A standby that has no WAL receiver, since it replays an archive, is a source like any other: its position is what it has replayed. It
/// was no position, and the agent unhealthy for as long.
#[test]
fn a_standby_that_replays_an_archive_is_a_healthy_source() {
    let stage = Stage::new("replays");
    let (primary, mut standby) = pair(&stage, 17);
    standby.stop_fast();
    standby.overrides.retain(|setting| !setting.starts_with("primary_conninfo"));
    standby.overrides.push(format!("restore_command=cp {}/%f %p", primary.oracle.display()));
    standby.start();
    let mut agent = archiving(&stage, &[&standby], "standby").run();
    let mut ledger = Ledger::create(&primary);
    ledger.commit_many(3);
    archive_all(&primary, &mut agent);
    wait_healthy_without_gap(&mut agent, 1);
    let status = agent.wait_status(MINUTE, "the standby's position", |status| status["server_lsn"].is_string());
    assert_eq!(standby.value("SELECT pg_last_wal_receive_lsn() IS NULL"), "t", "{status}");
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// What a database holds, in one number.
fn content(server: &Postgres) -> Vec<String> {
    ["accounts", "tellers", "branches", "history"]
        .map(|table| {
            let rows = format!(
                "SELECT md5(coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '')) FROM pgbench_{table} t"
            );
            server.value(&rows)
        })
        .into()
}

/// Under the load of pgbench the primary dies and the standby is promoted in the same moment, each time at another one, with the agent
/// beside them or away. The agent goes over; what is restored is what the new primary holds (I7, I10; A5 of the failure table).
#[test]
fn a_promotion_at_a_random_moment_under_load_is_followed() {
    let mut random = Random::of_this_run();
    for (major, away) in turns(&[false, true]) {
        let stage = Stage::new("random");
        let (mut primary, mut standby) = pair(&stage, major);
        let walden = archiving(&stage, &[&primary, &standby], "primary");
        let mut agent = walden.run_connected();
        primary.pgbench_init(2);
        walden.ok(&["backup"]);
        wait_until(MINUTE, "a slot on the standby", || standby.slot_restart_lsn("walden").is_some());
        let recorder = Recorder::start(&primary);
        let load = primary.pgbench(&["-c", "4", "-T", "600"]);
        let moment = 30 + usize::try_from(random.number_below(60)).expect("a small number");
        wait_until(MINUTE, "a random moment", || recorder.entries().len() > moment);
        // Anywhere between two commits, too.
        std::thread::sleep(Duration::from_micros(random.number_below(20_000)));
        if away {
            agent.kill9();
        }
        primary.stop_immediate();
        standby.psql("SELECT pg_promote()");
        standby.wait_promoted(MINUTE);
        load.stop();
        recorder.stop();
        let more = standby.pgbench(&["-c", "2", "-t", "200"]);
        more.wait(MINUTE);
        if away {
            agent = walden.run();
        }
        let end = standby.switch_wal();
        agent.wait_status(MINUTE, "the new timeline", |status| status["timeline"] == 2);
        agent.wait_archived(end, MINUTE);
        wait_healthy_without_gap(&mut agent, 2);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let restored = restore(&walden, major, "after", &[]);
        assert_eq!(content(&restored), content(&standby));
        let folder = cluster_folder(&walden.repository(), "main", &standby);
        assert!(folder.join("wal/00000002.history").exists());
        compare_stored(&folder, &primary.oracle).assert_whole(1);
    }
}

/// `target_session_attrs=any`: the first host lags, so the agent streams from the second one. The server's position and the backup come
/// from that one as well; what is late against the first is not what is late (I19).
#[test]
fn the_host_that_is_streamed_from_is_the_one_that_is_asked() {
    few(&[13]).into_iter().for_each(ask_the_one_that_is_streamed_from);
}

fn ask_the_one_that_is_streamed_from(major: u32) {
    let stage = Stage::new("asked");
    let (primary, mut standby) = pair(&stage, major);
    for sql in ["ALTER SYSTEM SET log_replication_commands = on", "SELECT pg_reload_conf()"] {
        primary.psql(sql);
    }
    let mut agent = archiving(&stage, &[&primary], "any").run_connected();
    let mut ledger = Ledger::create(&primary);
    ledger.commit_many(3);
    archive_all(&primary, &mut agent);
    standby.stop_fast();
    standby.overrides.retain(|setting| !setting.starts_with("primary_conninfo"));
    standby.overrides.push("log_replication_commands=on".into());
    standby.start();
    ledger.commit_many(3);
    archive_all(&primary, &mut agent);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());

    let walden = archiving(&stage, &[&standby, &primary], "any");
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    let walden = Walden::with_config(&stage, &config.replace("initial = false", "initial = true"));
    let mut agent = walden.run();
    let end = ledger.commit().lsn;
    agent.wait_status(MINUTE, "the position of the host that is streamed from", |status| {
        status["server_lsn"].as_str().and_then(|lsn| lsn.parse::<Lsn>().ok()).is_some_and(|lsn| lsn >= end)
    });
    let slot = |status: &serde_json::Value| status["slot"]["restart_lsn"].as_str().map(str::to_owned);
    agent.wait_status(MINUTE, "its slot", |status| {
        slot(status) == primary.slot_restart_lsn("walden").map(|lsn| lsn.to_string())
    });
    agent.wait_status(2 * MINUTE, "a backup", |status| status["last_backup"]["id"].is_string());
    assert!(primary.log().contains("BASE_BACKUP"), "{}", primary.log_tail());
    assert!(!standby.log().contains("BASE_BACKUP"), "{}", standby.log_tail());
    // A host where no slot can be kept is told, and makes nobody unhealthy: a standby may be away for an hour.
    standby.stop_fast();
    let status = agent.wait_status(MINUTE, "the cause failover_gap", |status| has_cause(status, "failover_gap"));
    assert_eq!(status["healthy"], true, "{status}");
    standby.start();
    agent.wait_status(MINUTE, "its end", |status| !has_cause(status, "failover_gap"));
    let checked = walden.exec(&["check"]);
    let told = checked.stdout.lines().find(|line| line.contains("slot.")).unwrap_or_default();
    assert!(told.contains("holds WAL from"), "{}", checked.stdout);
    // One that is alone streams first, and takes its backup from the same host.
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    walden.ok(&["backup"]);
    assert!(!standby.log().contains("BASE_BACKUP"), "{}", standby.log_tail());
}
