//! The host burns: agent, server, spool, state and data directory are gone at one moment, and the repository is all there is.
//!
//! | variable | means |
//! | --- | --- |
//! | `WALDEN_TEST_SEED` | the same moments again; every run prints its seed |
//! | `WALDEN_TEST_BURNS` | how many burns of each kind (100 in the long runs) |
//! | `WALDEN_TEST_BURN` | this one only, by its number |

use std::fmt;
use std::time::{Duration, Instant};

use walden::wal::Lsn;

use crate::support::crowd::{Acknowledged, Crowd, highest_numbers};
use crate::support::host::{self, Host, Store, Template};
use crate::support::random::Random;
use crate::support::s3_proxy::HttpFault;
use crate::support::{Agent, Postgres, Stage, is_full, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);
const TAIL_INTERVAL: Duration = Duration::from_secs(1);
/// Until a cut is on disk and its upload begins, by a debug build beside other tests.
const SLACK: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Any,
    AfterSwitch,
    AtBoundary,
    DuringBackup,
    /// The agent alone was killed before, and has begun again.
    AfterRestart,
    /// The store was away, and is back; in synchronous mode perhaps it is not.
    AfterOutage,
}

const MOMENTS: [Moment; 6] = [
    Moment::Any,
    Moment::AtBoundary,
    Moment::AfterRestart,
    Moment::AfterSwitch,
    Moment::AfterOutage,
    Moment::DuringBackup,
];

#[derive(Clone, Copy)]
struct Case {
    major: u32,
    wal_segsize_mib: u32,
    /// pgbench as fast as it can, or about ten commits a second in all.
    full_speed: bool,
    moment: Moment,
    s3: bool,
    /// A second repository is required, a folder: in synchronous mode each of the two has to hold every commit.
    two: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = if self.full_speed { "full speed" } else { "10 commits/s" };
        let store = match (self.s3, self.two) {
            (false, false) => "folder",
            (true, false) => "S3",
            (false, true) => "two folders",
            (true, true) => "S3 and a folder",
        };
        write!(f, "PostgreSQL {}, {} MiB, {load}, {:?}, {store}", self.major, self.wal_segsize_mib, self.moment)
    }
}

/// What was lost.
struct Burnt {
    number: usize,
    acknowledged: usize,
    lost: usize,
    /// How long before the burn the oldest lost commit was acknowledged; 0 when none was lost.
    age: Duration,
    /// An upper bound of the slowest PUT of this agent.
    put: Duration,
}

/// What is not lost: every commit acknowledged more than `tail_interval` and one PUT before, in 99 of 100 burns.
#[test]
fn a_burnt_host_loses_no_more_than_the_tail_interval() {
    let slice = [
        (17, 16, true, Moment::Any, false, false),
        (17, 16, false, Moment::AfterRestart, false, false),
        (17, 16, true, Moment::DuringBackup, true, false),
    ];
    let burnt = burn_all(&slice, false);
    let mut ages: Vec<Duration> = burnt.iter().map(|burnt| burnt.age).collect();
    ages.sort_unstable();
    let at = |percent: usize| ages[(ages.len() * percent).div_ceil(100) - 1].as_secs_f64();
    eprintln!(
        "{} burns; oldest acknowledged commit lost: p50 {:.2} s, p99 {:.2} s, max {:.2} s",
        ages.len(),
        at(50),
        at(99),
        at(100)
    );
    let strict = burnt.iter().filter(|burnt| burnt.age <= TAIL_INTERVAL + burnt.put).count();
    eprintln!("{strict} within tail_interval and one PUT, the others within {SLACK:?} more");
    let late: Vec<_> = burnt.iter().filter(|burnt| burnt.age > TAIL_INTERVAL + burnt.put + SLACK).collect();
    let told: Vec<_> =
        late.iter().map(|burnt| format!("burn {}: {:.2?}, PUT {:.2?}", burnt.number, burnt.age, burnt.put)).collect();
    assert!(late.len() * 100 <= burnt.len(), "lost for longer than tail_interval and one PUT: {told:?}");
}

/// With `durability = "repository"` and the server told to wait for Walden, nothing that was acknowledged is ever lost (I1).
#[test]
fn a_burnt_host_loses_no_commit_that_waited_for_the_repository() {
    let slice = [
        (17, 1, true, Moment::AtBoundary, false, false),
        (17, 1, false, Moment::AfterOutage, false, true),
        (13, 1, true, Moment::AfterRestart, false, false),
    ];
    let burnt = burn_all(&slice, true);
    // `burn` itself fails for a commit that is lost.
    let commits: usize = burnt.iter().map(|burnt| burnt.acknowledged).sum();
    eprintln!("{} burns; {commits} acknowledged commits, none lost", burnt.len());
}

type Row = (u32, u32, bool, Moment, bool, bool);

fn burn_all(slice: &[Row], synchronous: bool) -> Vec<Burnt> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let clock = jiff::Timestamp::now().as_nanosecond() as u64; // the low bits are enough
    let seed = number("WALDEN_TEST_SEED").unwrap_or(if is_full() { clock } else { 4 });
    let count = number("WALDEN_TEST_BURNS").or(is_full().then_some(100)).map(|count| count as usize); // small
    eprintln!("WALDEN_TEST_SEED={seed}");
    let stage = Stage::new("burn");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let mut templates: Vec<(u32, u32, Template)> = Vec::new();
    let only = number("WALDEN_TEST_BURN").map(|only| only as usize); // small
    let mut all = Vec::new();
    for burn in 0..count.unwrap_or(slice.len()) {
        if only.is_some_and(|only| only != burn) {
            continue;
        }
        // Each burn has a seed of its own, so that it can be repeated alone.
        let own = 2 * burn as u64 + u64::from(synchronous);
        let mut random = Random::new(seed.wrapping_mul(1 << 20).wrapping_add(own));
        let (major, mib, full_speed, moment, s3, two) = match count {
            None => slice[burn],
            Some(_) => {
                let majors = parts::postgres_majors();
                let moment = MOMENTS[burn / 2 % MOMENTS.len()];
                (
                    majors[random.below(majors.len())],
                    [1, 16][random.below(2)],
                    burn % 2 == 0,
                    moment,
                    random.below(8) == 0,
                    synchronous && random.below(4) == 0,
                )
            }
        };
        let case = Case { major, wal_segsize_mib: mib, full_speed, moment, s3, two };
        let known = templates.iter().position(|template| (template.0, template.1) == (major, mib));
        let template = known.unwrap_or_else(|| {
            templates.push((major, mib, Template::make(&stage, major, mib)));
            templates.len() - 1
        });
        let name = format!("store{burn}");
        let store = if s3 { Store::s3(&stage, &name, &runtime) } else { Store::local(&stage, &name) };
        let second = format!("second{burn}");
        let stores: Vec<Store> = std::iter::once(store).chain(two.then(|| Store::local(&stage, &second))).collect();
        let begun = Instant::now();
        let burnt = burn_one(&stage, &templates[template].2, &stores, burn, case, synchronous, &mut random);
        eprintln!(
            "burn {burn}, {case}: {} acknowledged, {} lost, the oldest {:.3} s before; PUT up to {:.3} s; {:.1} s in all",
            burnt.acknowledged,
            burnt.lost,
            burnt.age.as_secs_f64(),
            burnt.put.as_secs_f64(),
            begun.elapsed().as_secs_f64()
        );
        all.push(burnt);
        let _ = std::fs::remove_dir_all(stage.join(&name));
        let _ = std::fs::remove_dir_all(stage.join(&second));
    }
    all
}

fn burn_one(
    stage: &Stage,
    template: &Template,
    stores: &[Store],
    number: usize,
    case: Case,
    synchronous: bool,
    random: &mut Random,
) -> Burnt {
    let name = format!("burn{number}");
    let (store, others) = stores.split_first().expect("at least one repository");
    let settings: &[&str] =
        if synchronous { &["synchronous_standby_names=walden", "synchronous_commit=on"] } else { &[] };
    let durability = if synchronous { "repository" } else { "spool" };
    let others: String = others.iter().map(|other| other.table("second")).collect();
    let more = format!(
        "[archive]\ndurability = \"{durability}\"\ntail_interval = \"{}ms\"\n[upload]\nretry_delay_max = \"1s\"\n{others}",
        TAIL_INTERVAL.as_millis()
    );
    if case.s3 {
        // A store that is far away: what a PUT takes counts then.
        let far = HttpFault::Delay(Duration::from_millis(100 + random.below(500) as u64)); // small
        store.server().faults().always("PUT", "/tail/", far);
    }
    let host = Host::start(stage, &name, template, store, settings, &more);
    let mut agent = host.walden.run_connected();
    agent.wait_status(MINUTE, "the first backup", |status| !status["last_backup"].is_null());
    let pause = (!case.full_speed).then_some(Duration::from_millis(200));
    let sessions = if case.full_speed { 4 } else { 2 };
    let mut crowd = Crowd::start(&host.postgres, &stage.join(format!("ledger{number}")), sessions, pause);
    let _load = case.full_speed.then(|| host.full_speed(4));
    let some = if case.full_speed { 50 } else { 3 };
    wait_until(MINUTE, "some commits", || crowd.count() > some);
    let mut agents = vec![agent];
    approach(&host, store, &mut agents, case.moment, synchronous, random);
    crowd.assert_at_work();
    let put = slowest_put(&agents[0]);
    let mut agents: Vec<&mut Agent> = agents.iter_mut().collect();
    let moment = crowd.time_of(host.burn(&mut agents, random.below(2) == 0));
    let record = crowd.stop();
    // A store that is still away comes back some day.
    store.open();

    // What a commit waited for is in each; what it did not wait for is looked for in the first.
    let lost = stores.iter().map(|store| {
        let lost = lost_with(stage, template, store, number, &record);
        if let Some(first) = lost.first().filter(|_| synchronous) {
            panic!(
                "burn {number}, {case}: {} of {} acknowledged commits are lost; the first one is row {} of session {}, whose record begins at \
                 or after {} and which was acknowledged {:?} before the burn; the repository ends at {}",
                lost.len(),
                record.len(),
                first.n,
                first.session,
                first.after,
                moment.saturating_sub(first.time),
                end_of(&store.stranger(stage).json(&["list"]))
            );
        }
        lost
    });
    let lost = lost.collect::<Vec<_>>().swap_remove(0);
    let age = lost.first().map_or(Duration::ZERO, |row| moment.saturating_sub(row.time));
    Burnt { number, acknowledged: record.len(), lost: lost.len(), age, put }
}

/// The acknowledged rows that a restore from `store` alone does not give back, the oldest first.
fn lost_with<'a>(
    stage: &Stage,
    template: &Template,
    store: &Store,
    number: usize,
    record: &'a [Acknowledged],
) -> Vec<&'a Acknowledged> {
    let mut restored = host::restore(stage, &format!("restored{number}"), template, store);
    let held = highest_numbers(&restored);
    restored.stop_immediate();
    std::fs::remove_dir_all(&restored.data).expect("it was there");
    let is_held =
        |row: &Acknowledged| held.iter().any(|(session, highest)| *session == row.session && row.n <= *highest);
    let mut lost: Vec<&Acknowledged> = record.iter().filter(|row| !is_held(row)).collect();
    lost.sort_by_key(|row| row.time);
    lost
}

/// Brings about what the moment is to be near, and waits for it. The agents that run then are in `agents`, the archiver first.
fn approach(
    host: &Host,
    store: &Store,
    agents: &mut Vec<Agent>,
    moment: Moment,
    synchronous: bool,
    random: &mut Random,
) {
    let begun = Instant::now();
    let within = |random: &mut Random, most: usize| {
        std::thread::sleep(Duration::from_micros(random.below(most * 1000) as u64)); // below an hour
    };
    match moment {
        Moment::Any => within(random, 3000),
        Moment::AfterSwitch => {
            within(random, 1500);
            host.postgres.switch_wal();
            within(random, 50);
        }
        Moment::AtBoundary => {
            within(random, 1000);
            cross_boundary(&host.postgres);
            within(random, 20);
        }
        Moment::DuringBackup => {
            agents.push(host.walden.spawn(&["backup"]));
            within(random, 1200);
        }
        Moment::AfterRestart => {
            within(random, 1000);
            agents[0].kill9();
            within(random, 500);
            agents[0] = host.walden.run();
            if !synchronous {
                catch_up(&host.postgres, &mut agents[0]);
            }
            within(random, 1500);
        }
        Moment::AfterOutage => {
            within(random, 500);
            store.shut();
            within(random, 2000);
            let stays = synchronous && random.below(3) == 0;
            if !stays {
                store.open();
                if !synchronous {
                    catch_up(&host.postgres, &mut agents[0]);
                }
                within(random, 1500);
            }
        }
    }
    assert!(begun.elapsed() < 2 * MINUTE, "{moment:?} took {:?}", begun.elapsed());
}

/// What is lost while the agent or the store is away is not the tail's matter: it counts from where all was well again.
#[track_caller]
fn catch_up(postgres: &Postgres, agent: &mut Agent) {
    let here = postgres.flush_lsn();
    agent.wait_archived(here, MINUTE);
}

/// Fills the open segment almost to its end, so that the next commits cross into the next one, and waits until they have.
#[track_caller]
fn cross_boundary(postgres: &Postgres) {
    let size = postgres.segment_size();
    let sql = postgres.connect().expect("a session");
    let position = || sql.value("SELECT pg_current_wal_insert_lsn()").parse::<Lsn>().expect("an LSN");
    let begun = size.start_of(position());
    let left = size.get() - size.offset_of(position());
    if left > 4096 {
        // Not transactional: nobody waits for it. Its pages take some more, so that it ends before the boundary, or just beyond.
        sql.run(&format!(
            "SELECT pg_logical_emit_message(false, 'burn', repeat('x', {}))",
            (left - 2048) / 8192 * 8100
        ));
    }
    wait_until(MINUTE, "the next segment", || size.start_of(position()) > begun);
}

/// The upper bound of the last bucket that the agent's PUTs have reached; 0 when there was none, or it does not say.
fn slowest_put(agent: &Agent) -> Duration {
    let Ok((_, text)) = agent.get("/metrics") else { return Duration::ZERO };
    let buckets = text.lines().filter_map(|line| {
        let (labels, count) = line.strip_prefix("walden_upload_seconds_bucket{")?.rsplit_once("} ")?;
        let bound = labels.split_once("le=\"")?.1.split('"').next()?;
        Some((bound.parse::<f64>().ok()?, count.parse::<u64>().ok()?))
    });
    let buckets: Vec<(f64, u64)> = buckets.collect();
    let total = buckets.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let bound = buckets.iter().find(|(_, count)| total > 0 && *count == total).map(|(bound, _)| *bound);
    bound.map_or(Duration::ZERO, |bound| Duration::from_secs_f64(bound.min(MINUTE.as_secs_f64())))
}

fn end_of(list: &serde_json::Value) -> String {
    let windows = list["windows"].as_array().map_or(&[][..], Vec::as_slice);
    windows.last().map_or_else(|| "no window".to_owned(), |window| window["to_lsn"].to_string())
}
