//! SIGTERM: what is acknowledged goes into the repository before the end, or the end says that it did not.

use std::time::{Duration, Instant};

use crate::support::crowd::{Acknowledged, Crowd, highest_numbers};
use crate::support::host::{self, Host, Store, Template};
use crate::support::s3_proxy::HttpFault;
use crate::support::{Stage, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// The next piece of the tail would be due in an hour, commits come in to the last moment, and after a stop that complains of nothing
/// the host may burn: what was acknowledged when the signal was sent is in the repository.
#[test]
fn an_agent_that_was_stopped_leaves_nothing_on_its_host() {
    // With the tail off the rest goes out all the same.
    for tail_interval in ["1h", "0"] {
        stop_and_burn(tail_interval);
    }
}

fn stop_and_burn(tail_interval: &str) {
    let stage = Stage::new("stopped");
    let template = Template::make(&stage, 17, 16);
    let store = Store::local(&stage, "store");
    let more = format!("[archive]\ntail_interval = \"{tail_interval}\"\n");
    let host = Host::start(&stage, "host", &template, &store, &[], &more);
    let mut agent = host.walden.run_connected();
    agent.wait_status(MINUTE, "the first backup", |status| !status["last_backup"].is_null());
    let crowd = Crowd::start(&host.postgres, &stage.join("ledger"), 4, None);
    wait_until(MINUTE, "some commits", || crowd.count() > 200);
    let asked = Instant::now();
    let ended = agent.sigterm(MINUTE);
    assert!(ended.success() && !agent.log().contains("ERROR"), "{}", agent.log_tail());
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(8), "it took {took:?} to stop: {}", agent.log_tail());
    let asked = crowd.time_of(asked);
    host.burn(&mut [], true);
    let record = crowd.stop();

    let mut restored = host::restore(&stage, "restored", &template, &store);
    let held = highest_numbers(&restored);
    restored.stop_immediate();
    let is_held =
        |row: &Acknowledged| held.iter().any(|(session, highest)| *session == row.session && row.n <= *highest);
    let lost = record.iter().filter(|row| row.time <= asked && !is_held(row));
    let lost: Vec<_> = lost.map(|row| (row.session, row.n, row.after, asked - row.time)).collect();
    assert!(lost.is_empty(), "acknowledged before the signal and lost: {lost:?}\n{}", agent.log_tail());
}

/// A store that hangs holds the end up for `stop_timeout` and no longer. The last words say what stays where, and the next start
/// ships it.
#[test]
fn an_agent_that_cannot_ship_ends_in_time_and_says_what_stays() {
    let stage = Stage::new("stays");
    let template = Template::make(&stage, 17, 1);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let store = Store::s3(&stage, "store", &runtime);
    let more = "[archive]\ntail_interval = \"200ms\"\nstop_timeout = \"2s\"\n[upload]\nretry_delay_max = \"1s\"\n[backup]\ninitial = false\n";
    let host = Host::start(&stage, "host", &template, &store, &[], more);
    let mut agent = host.walden.run_connected();
    let here = host.postgres.flush_lsn();
    agent.wait_archived(here, MINUTE);
    store.server().faults().always("", "", HttpFault::Hang);
    host.postgres.psql("CREATE TABLE more AS SELECT n, md5(n::text) FROM generate_series(1, 30000) n");
    let end = host.postgres.flush_lsn();
    agent.wait_durable(end, MINUTE);
    let asked = Instant::now();
    let ended = agent.sigterm(MINUTE);
    let took = asked.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(12), "it took {took:?}: {}", agent.log_tail());
    assert_eq!(ended.code(), Some(0), "{}", agent.log_tail());
    let log = agent.log();
    let last = log.lines().last().expect("last words");
    assert!(last.contains(" ERROR ") && last.contains(&host.spool().display().to_string()), "{last}");
    assert!(last.contains("not in the repository") && last.contains("start walden again"), "{last}");

    store.open();
    let mut agent = host.walden.run_connected();
    agent.wait_archived(end, MINUTE);
    assert_eq!(agent.sigterm(MINUTE).code(), Some(0), "{}", agent.log_tail());
}
