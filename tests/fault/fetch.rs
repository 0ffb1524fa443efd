//! `wal-fetch`: 0, 1 and 255, and nothing unverified reaches PostgreSQL.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use crate::live::restore::History;
use crate::live::streaming::archive_all;
use crate::support::oracle::{cluster_folder, stored_segments};
use crate::support::{Ledger, Postgres, Stage, Walden};

const MINUTE: Duration = Duration::from_secs(60);

/// 1 only where the listing proves absence; every kind of trouble is 255 (I12).
#[test]
fn wal_fetch_answers_one_only_when_absence_is_proven() {
    let stage = Stage::new("fetch");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    for _ in 0..3 {
        archive_all(&postgres, &mut agent);
    }
    assert!(agent.sigterm(MINUTE).success());
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let stored = stored_segments(&folder);
    let names: Vec<&String> = stored.keys().collect();
    assert!(names.len() >= 3);
    let out = stage.join("out").to_string_lossy().into_owned();
    let fetch = |arguments: &[&str]| {
        let done = walden.exec(arguments);
        (done.code, done.stderr)
    };
    assert_eq!(fetch(&["wal-fetch", names[0], &out]).0, Some(0));
    assert_eq!(fs::metadata(&out).expect("delivered").len(), 1 << 20);
    let delivered = fs::read(&out).expect("delivered");
    // Several at once, for one path: each delivers, and none gives the name to what another one has half written (I13).
    let runs: Vec<_> =
        (0..16).map(|_| walden.command(&["wal-fetch", names[0], &out]).spawn().expect("it starts")).collect();
    for mut run in runs {
        assert_eq!(run.wait().expect("it ends").code(), Some(0));
        assert!(fs::read(&out).expect("it is there") == delivered);
    }
    assert_eq!(
        fs::read_dir(stage.path())
            .expect("the stage")
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().contains("walden-tmp"))
            .count(),
        0
    );
    fs::remove_file(&out).expect("remove it");
    // Beyond the last stored byte, and the history file that no timeline has.
    assert_eq!(fetch(&["wal-fetch", "0000000100000000000000FF", &out]).0, Some(1));
    assert_eq!(fetch(&["wal-fetch", "00000001.history", &out]).0, Some(1));
    assert_eq!(fetch(&["wal-fetch", "00000002.history", &out]).0, Some(1));

    // A missing segment with later ones present.
    let hidden = stage.join("hidden");
    fs::rename(&stored[names[1]], &hidden).expect("hidden");
    assert_eq!(fetch(&["wal-fetch", names[1], &out]).0, Some(255));
    fs::rename(&hidden, &stored[names[1]]).expect("back");

    for arguments in [
        vec!["wal-fetch"],
        vec!["wal-fetch", names[0].as_str()],
        vec!["wal-fetch", "not-a-name", &out],
        vec!["wal-fetch", "../../etc/passwd", &out],
        vec!["wal-fetch", names[0].as_str(), "/no/such/folder/file"],
        vec!["wal-fetch", "--no-such-flag", names[0].as_str(), &out],
        vec!["wal-fetch", "--plan", "/no/such/plan", names[0].as_str(), &out],
        vec!["--repository", "nowhere", "wal-fetch", names[0].as_str(), &out],
    ] {
        let (code, said) = fetch(&arguments);
        assert_eq!(code, Some(255), "{arguments:?}: {said}");
        assert!(!said.trim().is_empty(), "{arguments:?} says nothing");
        let done = walden.exec(&[vec!["--json"], arguments.clone()].concat());
        let document: serde_json::Value = serde_json::from_str(&done.stdout).unwrap_or_default();
        assert!(done.code == Some(255) && document["error"]["code"] == 255, "{arguments:?}: {done:?}");
    }
    let program = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut command = stage.command(walden.binary());
        command
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().expect("it runs").code()
    };
    let config = walden.config_path().to_string_lossy().into_owned();
    assert_eq!(program(&["--config", "/no/such.toml", "wal-fetch", names[0], &out], &[]), Some(255));
    assert_eq!(
        program(&["--config", &config, "wal-fetch", names[0], &out], &[("WALDEN_ARCHIVE__CLUSTR", "x")]),
        Some(255)
    );
    let broken = stage.write("broken.toml", "[nonsense").to_string_lossy().into_owned();
    assert_eq!(program(&["--config", &broken, "wal-fetch", names[0], &out], &[]), Some(255));
    let unreadable = stage.join("unreadable.toml");
    fs::create_dir(&unreadable).expect("a folder where a file should be");
    assert_eq!(program(&["--config", &unreadable.to_string_lossy(), "wal-fetch", names[0], &out], &[]), Some(255));

    // The whole repository gone: nothing is proven.
    let gone = stage.join("gone");
    fs::rename(walden.repository(), &gone).expect("moved away");
    assert_eq!(fetch(&["wal-fetch", names[0], &out]).0, Some(255));
    assert_eq!(fetch(&["wal-fetch", "0000000100000000000000FF", &out]).0, Some(255));
    assert_eq!(fetch(&["wal-fetch", "00000002.history", &out]).0, Some(255));
    fs::rename(&gone, walden.repository()).expect("back");
    assert!(!std::path::Path::new(&out).exists(), "something was left at the target");
}

/// Truncated, flipped, replaced: `wal-fetch` says 255, the target is not written, and a restore that needs the object
/// never opens the database (I12, I13; C3 and E1 of the failure table).
#[test]
fn a_damaged_object_never_reaches_the_server() {
    let stage = Stage::new("damaged");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    ledger.commit_many(3);
    walden.ok(&["backup"]);
    let first = postgres.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
    ledger.commit_many(3);
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success());

    let restored = stage.join("restored");
    walden.ok(&["restore", "--pgdata", &restored.to_string_lossy()]);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let stored = stored_segments(&folder);
    let (name, path) = stored.range(first..).nth(1).expect("a segment after the backup");
    let whole = fs::read(path).expect("it is there");
    let out = stage.join("out");
    let flip = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        bytes
    };
    let damages = [
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("header cut off", whole[..100].to_vec()),
        ("empty", Vec::new()),
        ("flipped in the body", flip(whole.len() / 2)),
        ("flipped in the summary", flip(200)),
        ("something else", b"<html>503</html>".repeat(1000)),
        ("grown", [whole.as_slice(), &[0; 10]].concat()),
    ];
    for (damage, bytes) in damages {
        fs::write(path, bytes).expect("damaged");
        let done = walden.exec(&["wal-fetch", name, &out.to_string_lossy()]);
        assert_eq!(done.code, Some(255), "{damage}: {}", done.stderr);
        assert!(!out.exists(), "{damage}: something was delivered");
    }
    fs::write(path, flip(whole.len() / 2)).expect("damaged");
    let mut server = Postgres::over(&stage, 17, &restored);
    server.spawn();
    let ended = server.wait_for_end(2 * MINUTE);
    assert!(!ended.success(), "{}", server.log_tail());
    assert!(!server.log().contains("database system is ready to accept connections"), "{}", server.log_tail());
    // Healed, the same directory comes up whole.
    fs::write(path, &whole).expect("healed");
    server.start();
    server.wait_promoted(MINUTE);
    crate::support::ledger::assert_rows(&server, ledger.entries());
}

/// A damaged volume or manifest: the restore fails with code 5 and names it, and what it leaves cannot be started (I5, I13).
#[test]
fn a_damaged_volume_is_named_and_leaves_nothing_that_starts() {
    let stage = Stage::new("volume");
    let postgres = Postgres::builder(15).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let history = History::make(&postgres, &walden, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    let folder = cluster_folder(&walden.repository(), "main", &postgres)
        .join("backups")
        .join(history.backup["id"].as_str().expect("an id"));
    for object in ["volumes/000001.tar.lz4", "backup_manifest.lz4"] {
        let path = folder.join(object);
        let whole = fs::read(&path).expect("it is there");
        let mut bytes = whole.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        for (turn, bytes) in [bytes, whole[..whole.len() - 7].to_vec(), Vec::new()].into_iter().enumerate() {
            fs::write(&path, bytes).expect("damaged");
            let target = stage.join(format!("restored-{turn}-{}", object.len()));
            let done = walden.exec(&["restore", "--pgdata", &target.to_string_lossy()]);
            assert_eq!(done.code, Some(5), "{object}: {}", done.stderr);
            assert!(done.stderr.contains(object), "{object} is not named: {}", done.stderr);
            assert!(!target.join("global/pg_control").exists(), "it could be started");
        }
        fs::remove_file(&path).expect("it is there");
        let target = stage.join(format!("restored-none-{}", object.len()));
        let done = walden.exec(&["restore", "--pgdata", &target.to_string_lossy()]);
        assert_eq!(done.code, Some(5), "{object}: {}", done.stderr);
        fs::write(&path, &whole).expect("healed");
    }
}
