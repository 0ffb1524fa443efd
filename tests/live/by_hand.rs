//! docs/restore-by-hand.md, done: lz4, tar, a shell and PostgreSQL, without Walden.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use super::restore::{History, server_time};
use crate::support::oracle::cluster_folder;
use crate::support::{Ledger, Postgres, Stage, Walden, ledger, parts};

/// The page's own shell blocks are run, with its example paths replaced; so a page that is wrong fails here.
#[test]
fn the_page_restores_without_walden() {
    let stage = Stage::new("byhand");
    let postgres = Postgres::builder(parts::full_major()).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let history = History::make(&postgres, &walden, &mut agent);
    assert!(agent.sigterm(Duration::from_secs(60)).success());
    let repository = cluster_folder(&walden.repository(), "main", &postgres);

    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/restore-by-hand.md"))
        .expect("the page");
    let id = history.backup["id"].as_str().expect("an id");
    let blocks: Vec<String> =
        page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or("").to_owned()).collect();
    let wanted = |block: &&String| !block.contains("16384");
    let script: String = blocks
        .iter()
        .filter(wanted)
        .flat_map(|block| block.lines())
        .filter(|line| !line.contains("aws s3"))
        .map(|line| {
            line.replace("/srv/walden-archive/orders/7412345678901234567", &repository.to_string_lossy())
                .replace("20261120T020000Z-full", id)
                // PostgreSQL knows no zone "Z" here.
                .replace("2026-11-20 14:03:00+00", &history.quiet.to_string().replace('Z', "+00"))
                + "\n"
        })
        .filter(|line| !line.starts_with("pg_ctl"))
        .collect();
    let tools = parts::tool("lz4").parent().expect("a folder").to_owned();
    let work = stage.make_dir("by-hand");
    // Only names that the page itself relies on, reachable by the servers' user.
    let reachable = stage.make_dir("tools");
    for name in ["lz4", "zstd"] {
        let copied = std::fs::copy(tools.join(name), reachable.join(name));
        copied.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let path = format!("{}:{}:/usr/bin:/bin", reachable.display(), postgres.bin().display());
    let done = stage
        .command("sh")
        .args(["-e", "-c", &script])
        .current_dir(&work)
        .env("PATH", &path)
        .stdin(Stdio::null())
        .output()
        .expect("sh runs");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{script}\n{said}");
    assert!(said.contains("backup successfully verified"), "{said}");

    let mut restored = Postgres::over(&stage, postgres.major, &work.join("pgdata"));
    restored.path = Some(path);
    restored.start();
    restored.wait_promoted(Duration::from_secs(60));
    let all: Vec<_> = history.before_backup.iter().chain(&history.after_backup).cloned().collect();
    ledger::assert_rows(&restored, &all);
    assert!(server_time(&restored) > history.quiet);
    Ledger::create(&restored).commit();
}
