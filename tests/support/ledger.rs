//! A table of numbered rows, one transaction each, with a record of every commit that the server acknowledged.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use walden::wal::Lsn;

use super::postgres::Postgres;
use super::sql::Sql;

/// One acknowledged commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub n: i64,
    pub xid: u32,
    /// The commit's time as in its record, RFC 3339 in UTC with microseconds.
    pub time: String,
    /// The server's insert position right after the acknowledgement: the commit record ends at or before it, and any
    /// later row's records start at or after it.
    pub lsn: Lsn,
}

impl Entry {
    pub fn timestamp(&self) -> jiff::Timestamp {
        self.time.parse().expect("written by PostgreSQL in RFC 3339")
    }
}

/// Rows one at a time, from this thread.
pub struct Ledger {
    sql: Sql,
    file: File,
    entries: Vec<Entry>,
    next: i64,
}

impl Ledger {
    /// Makes the table `ledger` (or goes on with it). The record is kept in `ledger.tsv` in the stage too, each line
    /// fsynced before the next commit begins.
    #[track_caller]
    pub fn create(postgres: &Postgres) -> Ledger {
        let sql = postgres.connect().expect("a connection for the ledger");
        sql.run("CREATE TABLE IF NOT EXISTS ledger (n bigint PRIMARY KEY, padding text)");
        let next = sql.value("SELECT coalesce(max(n), 0) + 1 FROM ledger").parse().expect("a number");
        let file =
            File::options().create(true).append(true).open(postgres.stage().join("ledger.tsv")).expect("the record");
        Ledger { sql, file, entries: Vec::new(), next }
    }

    /// Inserts the next row, commits, and records it.
    #[track_caller]
    pub fn commit(&mut self) -> Entry {
        self.try_commit().expect("the ledger's commit")
    }

    /// As `commit`. After an error nobody knows whether the row is there: its number is not used again.
    pub fn try_commit(&mut self) -> Result<Entry, String> {
        let n = self.next;
        self.next += 1;
        let inserted = self.sql.try_rows(&format!(
            "BEGIN; INSERT INTO ledger VALUES ({n}, repeat(md5({n}::text), 4)) RETURNING pg_current_xact_id(); COMMIT"
        ))?;
        let xid = inserted[0][0].clone().unwrap_or_default();
        // The 64-bit number's lower half is what the WAL and the commit log know.
        let xid = u32::try_from(xid.parse::<u64>().map_err(|e| e.to_string())? & 0xFFFF_FFFF).expect("masked");
        let told = self.sql.try_rows(&format!(
            "SELECT to_char(pg_xact_commit_timestamp('{xid}'::xid) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
             pg_current_wal_insert_lsn()"
        ))?;
        let time = told[0][0].clone().ok_or("track_commit_timestamp is off")?;
        let lsn = told[0][1].clone().unwrap_or_default().parse().map_err(|_| "no LSN")?;
        let entry = Entry { n, xid, time, lsn };
        writeln!(self.file, "{}\t{}\t{}\t{}", entry.n, entry.xid, entry.time, entry.lsn).map_err(|e| e.to_string())?;
        self.file.sync_data().map_err(|e| e.to_string())?;
        self.entries.push(entry.clone());
        Ok(entry)
    }

    #[track_caller]
    pub fn commit_many(&mut self, count: usize) -> Vec<Entry> {
        (0..count).map(|_| self.commit()).collect()
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    #[track_caller]
    pub fn last(&self) -> &Entry {
        self.entries.last().expect("something was committed")
    }
}

/// The rows that a server holds, in order.
#[track_caller]
pub fn rows_in(postgres: &Postgres) -> Vec<i64> {
    let rows = postgres.psql("SELECT n FROM ledger ORDER BY n");
    rows.into_iter().map(|row| row[0].as_deref().expect("not null").parse().expect("a number")).collect()
}

/// The restored server holds exactly these rows.
#[track_caller]
pub fn assert_rows(restored: &Postgres, expected: &[Entry]) {
    let expected: Vec<i64> = expected.iter().map(|entry| entry.n).collect();
    let held = rows_in(restored);
    if held != expected {
        let missing: Vec<_> = expected.iter().filter(|n| !held.contains(n)).take(10).collect();
        let extra: Vec<_> = held.iter().filter(|n| !expected.contains(n)).take(10).collect();
        panic!(
            "the restored server holds {} rows, expected {}; missing {missing:?}, too many {extra:?}",
            held.len(),
            expected.len()
        );
    }
}

/// Commits rows in the background, through crashes and restarts of the server, until it is stopped.
pub struct Recorder {
    stop: Arc<AtomicBool>,
    entries: Arc<Mutex<Vec<Entry>>>,
    doubtful: Arc<Mutex<Vec<i64>>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    #[track_caller]
    pub fn start(postgres: &Postgres) -> Recorder {
        let mut ledger = Ledger::create(postgres);
        let settings = postgres.socket_url();
        let stop = Arc::new(AtomicBool::new(false));
        let (entries, doubtful) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let (stop_seen, kept, unknown) = (stop.clone(), entries.clone(), doubtful.clone());
        let thread = std::thread::spawn(move || {
            while !stop_seen.load(Ordering::Relaxed) {
                let attempted = ledger.next;
                match ledger.try_commit() {
                    Ok(entry) => kept.lock().expect("no panic while held").push(entry),
                    Err(_) => {
                        unknown.lock().expect("no panic while held").push(attempted);
                        while !stop_seen.load(Ordering::Relaxed) {
                            match Sql::connect(&settings) {
                                Ok(sql) => {
                                    ledger.sql = sql;
                                    break;
                                }
                                Err(_) => std::thread::sleep(Duration::from_millis(50)),
                            }
                        }
                    }
                }
            }
        });
        Recorder { stop, entries, doubtful, thread: Some(thread) }
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().expect("no panic while held").clone()
    }

    /// Stops; every acknowledged commit, and the numbers whose fate nobody was told.
    pub fn stop(mut self) -> (Vec<Entry>, Vec<i64>) {
        self.end();
        (self.entries(), self.doubtful.lock().expect("no panic while held").clone())
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end();
    }
}
