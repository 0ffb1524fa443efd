//! SIGKILL at any moment, half of them at a random fsync, rename or write, with the state database deleted in between.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use walden::disk::Disk;
use walden::seal::{ObjectDecoder, SealError};
use walden::spool::read_open;
use walden::wal::{Lsn, SegmentName};

use crate::live::streaming::archive_all;
use crate::support::oracle::{assert_no_temporary_names, cluster_folder, compare_fetched, compare_stored, files_below};
use crate::support::random::Random;
use crate::support::{Agent, Postgres, Recorder, Stage, Walden, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);
/// Kills altogether, and those at a random fsync, rename or write.
const KILLS: u32 = 52;
const AT_A_CALL: u32 = 26;

/// The server removes WAL as soon as the slot lets it (`wal_keep_size = 0`, frequent checkpoints), so a position that
/// was confirmed too early shows as a segment that nobody has any more. The archive must be whole, equal to the
/// server's own copies, and hold every acknowledged commit (I1, I2, I3, I4, I8, I9, I21; A1 of the failure table).
#[test]
fn fifty_kills_under_load_lose_and_change_nothing() {
    let seed = std::env::var("WALDEN_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| jiff::Timestamp::now().as_nanosecond() as u64 | 1); // the low bits are enough
    eprintln!("WALDEN_TEST_SEED={seed}");
    let mut random = Random::new(seed);

    let stage = Stage::new("kills");
    let postgres = Postgres::builder(17)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "8MB")
        .setting("checkpoint_timeout", "30s")
        .start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
    postgres.pgbench_init(2);
    let mut agent = walden.run_connected();
    let recorder = Recorder::start(&postgres);
    let load = postgres.pgbench(&["-c", "2", "-T", "3000", "--rate", "400"]);
    // Before anything came, the slot stands where the server made it.
    agent.wait_durable(postgres.flush_lsn(), MINUTE);
    let mut last_slot = postgres.slot_restart_lsn("walden").expect("the agent made a slot that holds WAL");
    let (mut kills, mut at_a_call) = (0, 0);

    // After each kill: the slot went forward only, and not beyond what is on disk.
    let mut check = |random: &mut Random| {
        let slot = postgres.slot_restart_lsn("walden").expect("the slot is there");
        assert!(slot >= last_slot, "the slot went back from {last_slot} to {slot}");
        last_slot = slot;
        let held = held_end(&walden, &postgres);
        assert!(slot <= held, "the server was told {slot}, but spool and repository end at {held}");
        match random.number_below(4) {
            // The last agent may have died before it made a new one.
            0 if walden.state().exists() => std::fs::remove_dir_all(walden.state()).expect("it can be removed"),
            1 => {
                postgres.psql("CHECKPOINT");
            }
            2 => {
                postgres.switch_wal();
            }
            _ => {}
        }
    };
    let mut traced = false;
    while kills < KILLS || at_a_call < AT_A_CALL {
        assert!(kills < 2 * KILLS, "only {at_a_call} of {kills} kills were at an fsync, a rename or a write");
        let begun = std::time::Instant::now();
        if traced {
            // The wrapped agent dies by itself on entering some thread's Nth call of one kind, N random; one that is not
            // reached within some seconds of load is killed from outside.
            wait_until(MINUTE, "the agent to meet its call", || {
                !agent.is_running() || begun.elapsed() > Duration::from_secs(4)
            });
            if !agent.is_running() {
                // strace ends as its child did.
                let ended = agent.wait(MINUTE);
                assert_eq!(ended.signal(), Some(9), "it ended by itself ({ended}):\n{}", agent.log_tail());
                at_a_call += 1;
            }
            assert!(!agent.log().contains("panicked"), "{}", agent.log_tail());
            kill_traced(&stage);
            agent.kill9();
        } else {
            // Streaming, or still on its way to it: both are moments to be killed in.
            let pause = Duration::from_millis(random.number_below(1200));
            wait_until(MINUTE, "the moment to kill", || begun.elapsed() >= pause);
            agent.kill9();
        }
        kills += 1;
        check(&mut random);
        traced = !traced;
        agent = if traced { run_traced(&stage, &walden, &mut random) } else { walden.run() };
    }
    eprintln!("{kills} kills, {at_a_call} of them at a call");
    kill_traced(&stage);
    agent.kill9();
    check(&mut random);

    let mut agent = walden.run_connected();
    load.stop();
    let (rows, _) = recorder.stop();
    let end = archive_all(&postgres, &mut agent);
    assert!(rows.len() > 100 && rows.last().is_some_and(|row| row.lsn <= end));
    let status = agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(21);
    compare_fetched(&walden, &folder, &postgres.oracle).assert_whole(21);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    assert_no_temporary_names(&walden.repository());
    assert_no_temporary_names(&walden.spool());
}

/// The end of the WAL that the spool and the repository hold on disk, as a dead agent left them: what it may have confirmed.
pub fn held_end(walden: &Walden, postgres: &Postgres) -> Lsn {
    let size = postgres.segment_size();
    let mut end = Lsn::new(0);
    for path in files_below(&walden.spool()).into_iter().chain(files_below(&walden.repository())) {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        let parent =
            path.parent().and_then(|folder| folder.file_name()).expect("a folder").to_string_lossy().into_owned();
        let here = if parent == "open" {
            let marked = read_open(&Disk::default(), &path).ok().flatten().map(|found| {
                let segment = SegmentName::parse(&found.mark.segment, size).expect("a segment's name in a mark");
                segment.start().get() + found.mark.raw_len
            });
            // Between its last flush and its name a whole segment has a header in the place of the marks.
            marked.or_else(|| finished_end(&path))
        } else if let Ok(segment) = SegmentName::parse(name.split('.').next().unwrap_or_default(), size) {
            Some(segment.end().get())
        } else if let Ok(segment) = SegmentName::parse(&parent, size) {
            let offset = name.split('.').next().and_then(|range| range.split_once('-')).map(|(_, end)| end);
            offset.and_then(|hex| u64::from_str_radix(hex, 16).ok()).map(|offset| segment.start().get() + offset)
        } else {
            None
        };
        end = end.max(Lsn::new(here.unwrap_or(0)));
    }
    end
}

/// The end of a finished object that was killed before it had its name; `None` if it is not whole.
fn finished_end(path: &std::path::Path) -> Option<u64> {
    let mut decoder = ObjectDecoder::new();
    decoder.push(&std::fs::read(path).ok()?, |_| Ok::<(), SealError>(())).ok()?;
    let header = decoder.finish().ok()?;
    Some(header.segment_name().start().get() + header.end_offset)
}

/// The agent under strace, which kills it when it enters its Nth fsync, rename or write.
fn run_traced(stage: &Stage, walden: &Walden, random: &mut Random) -> Agent {
    let (calls, most) = [
        // strace counts for each thread alone.
        ("fsync,fdatasync", 25),
        ("fsync", 6),
        ("fdatasync", 40),
        ("rename,renameat,renameat2", 12),
        ("write,pwrite64,writev,pwritev", 200),
    ][random.below(5)];
    let when = 1 + random.number_below(most);
    let strace = parts::tool("strace").canonicalize().expect("it is set up");
    let strace = stage.reachable("strace", &strace);
    let inject = format!("inject={calls}:signal=KILL:when={when}");
    let trace = format!("trace={calls}");
    let log = stage.join("strace.log");
    walden
        .clone()
        .below(&[
            &strace.to_string_lossy(),
            "-f",
            "-qq",
            // Not with --seccomp-bpf: its stops take no signal.
            "-o",
            &log.to_string_lossy(),
            "-e",
            &trace,
            "-e",
            &inject,
            "--",
        ])
        .run()
}

/// strace's child outlives a SIGKILL of strace itself only for a moment, but a new agent must not meet it.
pub fn kill_traced(stage: &Stage) {
    let traced = || {
        stage
            .processes()
            .into_iter()
            .filter(|(_, line)| line.contains("walden-bin") || line.contains("/walden --config"))
    };
    for (pid, _) in traced() {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    wait_until(MINUTE, "the killed agent to be gone", || traced().count() == 0);
}
