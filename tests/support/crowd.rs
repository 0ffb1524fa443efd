//! Several sessions that commit numbered rows, and a record of each commit that the server acknowledged, which lies outside of the
//! host: flushed line by line, with the time of the acknowledgement.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use walden::wal::Lsn;

use super::postgres::Postgres;
use super::sql::Sql;

/// What the sessions write into; to be made before they start.
pub const TABLE: &str = "CREATE TABLE crowd (session int, n bigint, padding text, PRIMARY KEY (session, n))";

/// One acknowledged commit, as it stands in the record.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    pub session: u32,
    /// Counts from 1 in each session, which commits one row after the other.
    pub n: i64,
    /// The commit's record begins at or after it.
    pub after: Lsn,
    /// When COMMIT had returned, by the monotonic clock, counted from the crowd's start.
    pub time: Duration,
}

/// The sessions at work.
pub struct Crowd {
    begun: Instant,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    folder: PathBuf,
    sessions: Vec<JoinHandle<Result<(), String>>>,
}

impl Crowd {
    /// `folder` is made for the record. With a `pause` each session begins a transaction that often, else one after the other.
    #[track_caller]
    pub fn start(postgres: &Postgres, folder: &Path, sessions: u32, pause: Option<Duration>) -> Crowd {
        fs::create_dir_all(folder).expect("a folder for the record");
        let begun = Instant::now();
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let spawn = |number: u32| {
            let session = Session {
                number,
                settings: postgres.socket_url(),
                record: File::create(folder.join(number.to_string())).expect("the record"),
                begun,
                pause,
                stop: stop.clone(),
                count: count.clone(),
            };
            std::thread::spawn(move || session.work())
        };
        let sessions = (0..sessions).map(spawn).collect();
        Crowd { begun, stop, count, folder: folder.to_owned(), sessions }
    }

    /// Acknowledged commits so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The time in which the record counts.
    pub fn time_of(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.begun)
    }

    /// Fails when a session has ended by itself.
    #[track_caller]
    pub fn assert_at_work(&mut self) {
        if let Some(at) = self.sessions.iter().position(JoinHandle::is_finished) {
            panic!("session {at} has ended: {:?}", self.sessions.swap_remove(at).join());
        }
    }

    /// Waits for the sessions, which a server that is gone has ended, and reads the record.
    #[track_caller]
    pub fn stop(mut self) -> Vec<Acknowledged> {
        self.end();
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).expect("the record") {
            let path = entry.expect("the record").path();
            let session = path.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("a session's number");
            for line in fs::read_to_string(&path).expect("the record").lines() {
                let mut fields = line.split('\t');
                let mut field = || fields.next().expect("three fields");
                all.push(Acknowledged {
                    session,
                    n: field().parse().expect("a number"),
                    after: field().parse().expect("an LSN"),
                    time: Duration::from_micros(field().parse().expect("a number")),
                });
            }
        }
        all
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.sessions.drain(..).for_each(|session| drop(session.join()));
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.end();
    }
}

struct Session {
    number: u32,
    settings: String,
    record: File,
    begun: Instant,
    pause: Option<Duration>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
}

impl Session {
    fn work(mut self) -> Result<(), String> {
        let sql = Sql::connect(&self.settings)?;
        let mut next = Instant::now();
        for n in 1.. {
            if let Some(pause) = self.pause {
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                next += pause;
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let rows = sql.try_rows(&format!(
                "BEGIN; INSERT INTO crowd VALUES ({0}, {n}, repeat(md5('{0}-{n}'), 4)) RETURNING pg_current_wal_insert_lsn(); COMMIT",
                self.number
            ))?;
            let time = self.begun.elapsed();
            let after = rows.first().and_then(|row| row.first()?.clone()).ok_or("no LSN")?;
            let flushed =
                writeln!(self.record, "{n}\t{after}\t{}", time.as_micros()).and_then(|()| self.record.sync_data());
            flushed.map_err(|error| error.to_string())?;
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What a restored server holds: the highest number of each session. No row may be missing below it, and each must be what was written.
#[track_caller]
pub fn highest_numbers(restored: &Postgres) -> Vec<(u32, i64)> {
    let rows = restored.psql(
        "SELECT session, max(n), count(*), count(*) FILTER (WHERE padding IS DISTINCT FROM repeat(md5(session || '-' || n), 4)) \
         FROM crowd GROUP BY session",
    );
    let number = |value: &Option<String>| value.as_deref().expect("not null").parse::<i64>().expect("a number");
    let highest = rows.into_iter().map(|row| {
        let (session, highest, count, wrong) = (number(&row[0]), number(&row[1]), number(&row[2]), number(&row[3]));
        assert_eq!(
            (count, wrong),
            (highest, 0),
            "session {session}: rows up to {highest}, {count} of them, {wrong} with other content"
        );
        (u32::try_from(session).expect("a session's number"), highest)
    });
    highest.collect()
}
