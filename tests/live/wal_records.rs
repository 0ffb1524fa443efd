//! The records that `walden::wal` finds in real WAL are those that PostgreSQL itself finds there.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use walden::wal::{
    DropKind, Indexer, IndexerStart, Lsn, RecordInfo, RecordKind, RecordScanner, ScanStart, SegmentName, Summary,
    TimelineId,
};

use crate::support::oracle::{files_below, has_waldump};
use crate::support::{Postgres, Stage, parts, wait_until};

/// `rmgrlist.h`, the same from 13 to 18; by the names that pg_waldump and pg_walinspect print.
const MANAGERS: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// A record as PostgreSQL lists it.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    lsn: Lsn,
    total_len: u32,
    rmid: u8,
    xid: u32,
}

impl Listed {
    fn of(record: &RecordInfo) -> Self {
        Self { lsn: record.lsn, total_len: record.total_len, rmid: record.rmid, xid: record.xid }
    }

    fn new(lsn: &str, total_len: &str, manager: &str, xid: &str) -> Option<Self> {
        let rmid = MANAGERS.iter().position(|name| *name == manager)?;
        Some(Self {
            lsn: lsn.parse().ok()?,
            total_len: total_len.parse().ok()?,
            rmid: u8::try_from(rmid).ok()?,
            xid: xid.parse().ok()?,
        })
    }
}

#[test]
fn every_record_of_every_major_is_read_as_postgresql_reads_it() {
    for major in parts::postgres_majors() {
        for (segment_mib, wal_level) in [(1, "replica"), (16, "logical")] {
            if segment_mib == 16 && major != 15 {
                continue; // one major is enough to see that nothing depends on the segment size
            }
            check(major, segment_mib, wal_level);
        }
    }
}

fn check(major: u32, segment_mib: u32, wal_level: &str) {
    let stage = Stage::new("records");
    let mut postgres = Postgres::builder(major)
        .wal_segsize(segment_mib)
        .setting("wal_level", wal_level)
        .setting("max_prepared_transactions", "10")
        .setting("wal_keep_size", "2GB")
        .start(&stage);
    // Transactions before this point have records too, but the server does not tell their times.
    let first_xid: u32 = postgres.value("select txid_current()").parse().expect("a number");
    work(&postgres);
    postgres.pgbench_init(1);
    let next_xid = || -> u64 {
        let xmax = postgres.value("select txid_snapshot_xmax(txid_current_snapshot())");
        xmax.parse().expect("a number")
    };
    let before_load = next_xid();
    let load = postgres.pgbench(&["-c", "4", "-T", "600"]);
    wait_until(Duration::from_secs(120), "commits under load", || next_xid() > before_load + 800);
    postgres.crash_and_restart();
    load.stop();
    for sql in ["insert into t values (300001, 'after the crash')", "alter system set max_connections = 120"] {
        postgres.psql(sql);
    }
    postgres.restart();
    let point = postgres.lsn("select pg_create_restore_point('last point')");
    let times = commit_times(&postgres, first_xid);
    if major >= 15 {
        postgres.psql("create extension pg_walinspect");
    }
    complete_oracle(&postgres);

    let (records, summary) = read_oracle(&postgres);
    let what = format!("PostgreSQL {major}, segments of {segment_mib} MiB");
    let unreadable = records.iter().filter(|record| record.kind == RecordKind::Unreadable).count();
    assert_eq!(unreadable, 0, "{what}");
    let theirs = match (has_waldump(&postgres), major) {
        (true, _) => by_waldump(&postgres),
        (false, 15..) => by_walinspect(&postgres, records[0].lsn),
        (false, _) => Vec::new(), // no tool of theirs reads it here: the times below decide
    };
    if !theirs.is_empty() || major >= 15 {
        assert!(theirs.len() > 5000, "{what}: only {} records to compare with", theirs.len());
        let until = theirs[theirs.len() - 1].lsn;
        let from = theirs[0].lsn;
        let ours: Vec<Listed> =
            records.iter().filter(|record| record.lsn >= from && record.lsn <= until).map(Listed::of).collect();
        if let Some(at) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            panic!("{what}: {:?} instead of {:?}", ours[at], theirs[at]);
        }
        assert_eq!(ours.len(), theirs.len(), "{what}");
    }

    let ours: BTreeMap<u32, String> = records
        .iter()
        .filter_map(|record| match &record.kind {
            RecordKind::Commit(end) => Some((end.xid, end.time.to_string())),
            _ => None,
        })
        .collect();
    let compared = times.iter().filter(|(xid, _)| ours.contains_key(xid)).count();
    assert!(compared > 300, "{what}: only {compared} commit times to compare");
    for (xid, time) in &times {
        // The server knows the time of subtransactions as well, which have no record of their own.
        assert!(ours.get(xid).is_none_or(|ours| ours == time), "{what}: {xid} at {:?} instead of {time}", ours[xid]);
    }
    check_summary(&summary, &records, point, wal_level, &what);
}

fn check_summary(summary: &Summary, records: &[RecordInfo], point: Lsn, wal_level: &str, what: &str) {
    let count = |is: fn(&RecordKind) -> bool| records.iter().filter(|record| is(&record.kind)).count() as u64;
    assert_eq!(summary.records, records.len() as u64, "{what}");
    assert_eq!(summary.commits, count(|kind| matches!(kind, RecordKind::Commit(_))), "{what}");
    assert_eq!(summary.aborts, count(|kind| matches!(kind, RecordKind::Abort(_))), "{what}");
    let names: Vec<&str> = summary.restore_points.iter().map(|point| point.name.as_str()).collect();
    assert_eq!(names, ["first point", "last point"], "{what}");
    let last = records.iter().find(|record| record.lsn == summary.restore_points[1].lsn).expect("the record");
    assert_eq!(last.end.get().next_multiple_of(8), point.get(), "{what}: the server gives where its record ends");
    assert_eq!(summary.parameter_changes.last().map(|change| change.max_connections), Some(120), "{what}");
    let has = |kind: DropKind| summary.drops.iter().any(|drop| drop.kind == kind);
    assert!(has(DropKind::Relation) && has(DropKind::Database), "{what}: {:?}", summary.drops);
    assert_eq!(records.iter().any(|r| matches!(r.kind, RecordKind::Truncate { .. })), wal_level == "logical");
    assert!(summary.checkpoint.is_some() && !summary.truncated, "{what}");
    let prepared = |record: &RecordInfo| match &record.kind {
        RecordKind::Commit(end) | RecordKind::Abort(end) => end.prepared && end.xid != 0 && record.xid == 0,
        _ => false,
    };
    assert_eq!(records.iter().filter(|record| prepared(record)).count(), 3, "{what}");
}

/// Of everything that has a record of its own, and records longer than several pages.
fn work(postgres: &Postgres) {
    let sql = postgres.connect().expect("a session");
    sql.run("create table t(a int primary key, b text)");
    sql.run("insert into t select g, repeat(md5(g::text), 4) from generate_series(1, 500) g");
    sql.run("select pg_create_restore_point('first point')");
    sql.run(
        "begin; insert into t values (100001, 'x'); savepoint a; insert into t values (100002, 'y'); savepoint b; \
             insert into t values (100003, 'z'); rollback to b; commit",
    );
    sql.run("begin; insert into t values (100011, 'x'); rollback");
    sql.run("create table gone(a int); insert into gone values (1); create index on gone(a)");
    sql.run("drop table gone");
    sql.run("create table emptied(a int); insert into emptied values (1)");
    sql.run("truncate emptied");
    sql.run("begin; insert into t values (100021, 'p'); prepare transaction 'gid one'");
    sql.run("begin; insert into t values (100022, 'p'); savepoint s; create table pt(a int primary key); prepare transaction 'gid two'");
    sql.run("begin; insert into t values (100023, 'p'); drop table emptied; prepare transaction 'gid three'");
    sql.run("commit prepared 'gid one'");
    sql.run("rollback prepared 'gid two'");
    sql.run("select pg_switch_wal()");
    sql.run("commit prepared 'gid three'");
    sql.run(
        "do $$ begin for i in 1..120 loop begin insert into t values (200000 + i, 'sub'); \
             exception when others then null; end; end loop; end $$",
    );
    sql.run("create database dropped");
    sql.run("drop database dropped");
    sql.run("select pg_logical_emit_message(false, 'big', repeat('0123456789abcdef', 200000))");
    sql.run("checkpoint");
    sql.run("select pg_switch_wal()");
}

/// Has the server copy all that it wrote. In SQL that 13 knows as well.
fn complete_oracle(postgres: &Postgres) {
    let end = postgres.lsn("select pg_switch_wal()").get() - 1;
    let last = SegmentName::holding(TimelineId::FIRST, Lsn::new(end), postgres.segment_size()).to_string();
    wait_until(Duration::from_secs(60), &format!("the server to archive {last}"), || {
        postgres.oracle.join(&last).exists()
    });
}

/// xid to commit time, by the server.
fn commit_times(postgres: &Postgres, first_xid: u32) -> BTreeMap<u32, String> {
    let rows = postgres.psql(&format!(
        "select xid, to_char(pg_xact_commit_timestamp(xid::text::xid) at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') \
         from generate_series({first_xid}, (txid_current() - 1)::bigint) xid \
         where pg_xact_commit_timestamp(xid::text::xid) is not null"
    ));
    let text = |field: &Option<String>| field.clone().expect("not null");
    rows.iter().map(|row| (text(&row[0]).parse().expect("a number"), text(&row[1]))).collect()
}

/// Reads the server's own copies: every record, and the summary of all of it made segment by segment.
fn read_oracle(postgres: &Postgres) -> (Vec<RecordInfo>, Summary) {
    let names = segments(postgres);
    let first = names[0];
    let (timeline, position, segment_size) = (first.timeline(), first.start(), first.size());
    let system_identifier = Some(postgres.system_identifier());
    let mut scanner = RecordScanner::new(ScanStart { timeline, position, segment_size, system_identifier });
    let start = IndexerStart { timeline, position, segment_size, system_identifier, branch_max_time: None };
    let mut indexer = Indexer::new(start);
    let (mut records, mut sum): (Vec<RecordInfo>, Option<Summary>) = (Vec::new(), None);
    for (number, name) in names.iter().enumerate() {
        assert_eq!(name.start(), indexer.position(), "the copies have no hole");
        let bytes = fs::read(postgres.oracle.join(name.to_string())).expect("a copied segment");
        for piece in bytes.chunks(1 << (8 + number % 10)) {
            scanner.feed(piece, |record| records.push(record)).expect("PostgreSQL's own pages");
            indexer.feed(piece).expect("PostgreSQL's own pages");
        }
        let part = indexer.cut();
        match &mut sum {
            Some(sum) => {
                assert!(part.max_time >= sum.max_time);
                sum.append(&part);
            }
            None => sum = Some(part),
        }
    }
    assert_eq!(scanner.major(), Some(postgres.major));
    (records, sum.expect("segments"))
}

fn segments(postgres: &Postgres) -> Vec<SegmentName> {
    let mut names: Vec<SegmentName> = files_below(&postgres.oracle)
        .iter()
        .filter_map(|path| SegmentName::parse(path.file_name()?.to_str()?, postgres.segment_size()).ok())
        .collect();
    names.sort();
    names
}

/// `rmgr: Heap  len (rec/tot): 54/  8166, tx: 735, lsn: 0/0154F2E8, prev …`
fn by_waldump(postgres: &Postgres) -> Vec<Listed> {
    let names = segments(postgres);
    let done = Command::new(parts::tool("pg_waldump"))
        .arg("-p")
        .arg(&postgres.oracle)
        .args([names[0].to_string(), names[names.len() - 1].to_string()])
        .output()
        .expect("pg_waldump runs");
    let parse = |line: &str| {
        let (fields, _) = line.split_once(", prev ")?;
        let (manager, rest) = fields.strip_prefix("rmgr: ")?.split_once(" len (rec/tot): ")?;
        let (lengths, rest) = rest.split_once(", tx:")?;
        let (xid, lsn) = rest.split_once(", lsn:")?;
        let total_len = lengths.split_once('/')?.1;
        Listed::new(lsn.trim(), total_len.trim(), manager.trim(), xid.trim())
    };
    // It ends with an error where the last segment ends; what it printed stands. Messages are printed byte by byte.
    let text = String::from_utf8_lossy(&done.stdout);
    text.lines().map(|line| parse(line).unwrap_or_else(|| panic!("pg_waldump: {:.200}", line))).collect()
}

fn by_walinspect(postgres: &Postgres, from: Lsn) -> Vec<Listed> {
    let until = postgres.flush_lsn();
    let rows = postgres.psql(&format!(
        "select start_lsn, record_length, resource_manager, xid::text from pg_get_wal_records_info('{from}', '{until}')"
    ));
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let listed = |row: &Vec<Option<String>>| {
        Listed::new(&text(&row[0]), &text(&row[1]), &text(&row[2]), &text(&row[3])).expect("a record")
    };
    rows.iter().map(listed).collect()
}
