//! Servers whose commits wait for Walden.

use std::time::Duration;

use walden::wal::Lsn;

use crate::support::{Postgres, Stage, Walden, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// On a segment boundary the position is held back by a page, so that the next connection has something to compare (I7).
/// A commit that ends there would wait for other WAL then: a server that waits for Walden is told the boundary itself.
#[test]
fn a_boundary_is_confirmed_to_a_server_that_waits() {
    let stage = Stage::new("waits");
    let postgres = Postgres::builder(17).wal_segsize(1).setting("checkpoint_timeout", "1h").start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let _agent = walden.run_connected();
    let confirmed = || postgres.lsn("SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication");
    let size = postgres.segment_size();
    // The server writes by itself now and then; the next boundary counts then.
    for _ in 0..5 {
        postgres.psql("DROP TABLE IF EXISTS t; CREATE TABLE t ()");
        let boundary = Lsn::new(size.start_of(postgres.switch_wal()).get() + size.get());
        wait_until(MINUTE, "the held back position", || confirmed() >= Lsn::new(boundary.get() - 8192));
        if postgres.insert_lsn() <= boundary {
            assert_eq!(confirmed(), Lsn::new(boundary.get() - 8192), "nobody waits yet");
        }
        postgres.psql("ALTER SYSTEM SET synchronous_standby_names = 'walden'");
        postgres.psql("SELECT pg_reload_conf()");
        wait_until(MINUTE, "the boundary", || confirmed() >= boundary);
        if confirmed() == boundary {
            return;
        }
        postgres.psql("ALTER SYSTEM RESET synchronous_standby_names");
        postgres.psql("SELECT pg_reload_conf()");
    }
    panic!("the server wrote WAL right behind each boundary");
}
