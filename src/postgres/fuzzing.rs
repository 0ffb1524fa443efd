//! What a server sends, from its first byte on, for the fuzz targets of [`crate::fuzzing`].
//!
//! The first byte of an input says how the rest arrives and, where it matters, from which version; the rest is the server's.

use std::cell::OnceCell;
use std::future::Future;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::replication::VERSION_15;
use super::socket::Socket;
use super::wire::Wire;
use super::{
    BackupEvent, BackupOptions, ConnectSettings, ControlFile, PostgresError, ReplicationConnection, StartOutcome,
    WalMessage,
};
use crate::wal::{Lsn, TimelineId};

const VERSION_14: u32 = 14_00_00;

thread_local!(static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() });

/// Runs a client against a server that says these bytes and hangs up.
fn with_server<F: Future>(bytes: &[u8], client: impl FnOnce(Socket) -> F) {
    let (how, script) = bytes.split_first().map_or((0, &[][..]), |(how, rest)| (*how, rest));
    let step = match how >> 1 {
        0 => script.len().max(1),
        step => usize::from(step) * usize::from(step),
    };
    RUNTIME.with(|runtime| {
        let runtime = runtime.get_or_init(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().expect("a runtime")
        });
        runtime.block_on(async {
            let (near, mut far) = UnixStream::pair().expect("two sockets");
            let script = script.to_vec();
            // It keeps its end open for what the client says, which nobody reads.
            let server = tokio::spawn(async move {
                for chunk in script.chunks(step) {
                    if far.write_all(chunk).await.is_err() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                let _ = far.shutdown().await;
                std::future::pending::<()>().await
            });
            client(Socket::Unix(near)).await;
            server.abort();
        });
    });
}

fn connection(socket: Socket, bytes: &[u8]) -> ReplicationConnection {
    let mut wire = Wire::new(socket);
    wire.admitted();
    let version = if bytes.first().is_some_and(|how| how & 1 == 1) { VERSION_14 } else { VERSION_15 };
    ReplicationConnection::over(wire, version)
}

/// A panic on another thread comes back as an error.
fn settle<T>(result: Result<T, PostgresError>) -> Option<T> {
    result.map_err(|error| assert!(!error.to_string().contains("panicked"), "{error}")).ok()
}

pub fn server_login(bytes: &[u8]) {
    let settings = ConnectSettings::resolve("host=h user=u password=p", None, "walden", LIMIT, &|_| None);
    let settings = settings.expect("good settings");
    let host = settings.hosts.first().expect("one host").clone();
    with_server(bytes, |socket| async move {
        settle(super::startup::log_in(socket, &settings, &host).await);
    });
}

const LIMIT: Duration = Duration::from_secs(5);

/// The answers to the short commands, one after the other.
pub fn server_answers(bytes: &[u8]) {
    with_server(bytes, |socket| async move {
        let mut connection = connection(socket, bytes);
        settle(connection.identify_system().await);
        settle(connection.segment_size().await);
        settle(connection.read_slot("walden").await);
        settle(connection.create_physical_slot("walden").await);
        let second = TimelineId::new(2).expect("a timeline");
        settle(connection.timeline_history(second).await);
    });
}

pub fn server_wal(bytes: &[u8]) {
    let start = Lsn::new(0x0300_0000);
    with_server(bytes, |socket| async move {
        let started = connection(socket, bytes).start_replication(Some("walden"), start, TimelineId::FIRST).await;
        let Some(StartOutcome::Streaming(mut stream)) = settle(started) else { return };
        let mut next = start;
        loop {
            match stream.next_message() {
                Ok(None) => {
                    if settle(stream.fill().await).is_none() {
                        return;
                    }
                }
                Ok(Some(WalMessage::Data { start, bytes, .. })) => {
                    assert_eq!(start, next, "WAL follows WAL");
                    next = start.checked_add(bytes.len() as u64).expect("the stream has checked it");
                }
                Ok(Some(WalMessage::Keepalive { server_time, .. })) => {
                    server_time.to_timestamp();
                    settle(stream.send_status(next, next, false).await);
                }
                Ok(Some(WalMessage::EndOfTimeline)) => break,
                Err(_) => return,
            }
        }
        if let Some(end) = settle(stream.finish().await) {
            let mut connection = end.connection;
            settle(connection.identify_system().await);
        }
    });
}

pub fn server_backup(bytes: &[u8]) {
    with_server(bytes, |socket| async move {
        let options = BackupOptions {
            label: "l".into(),
            fast_checkpoint: true,
            max_rate_kib: None,
            manifest: bytes.len().is_multiple_of(2),
        };
        let Some(mut backup) = settle(connection(socket, bytes).base_backup(&options).await) else { return };
        loop {
            match backup.next().await {
                Ok(BackupEvent::End { stop_lsn, .. }) => {
                    assert!(stop_lsn >= backup.start_lsn, "a backup ends behind its start");
                    break;
                }
                Ok(_) => {}
                Err(error) => {
                    settle::<()>(Err(error));
                    return;
                }
            }
        }
        settle(backup.into_connection().identify_system().await);
    });
}

/// `postgres.url`.
pub fn conninfo(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if text.len() > 4096 {
        return;
    }
    let resolved = ConnectSettings::resolve(text, None, "walden", LIMIT, &|_| None);
    if let Some(settings) = settle(resolved) {
        assert!(!settings.hosts.is_empty());
        assert_eq!(settings.targets().len(), settings.hosts.len());
        assert_eq!(settings.only_host(settings.hosts.len() - 1).hosts.len(), 1);
    }
}

/// `global/pg_control`. An odd first byte has its checksum put right.
pub fn control_file(bytes: &[u8]) {
    let Some((how, content)) = bytes.split_first() else { return };
    let mut content = content.to_vec();
    if how % 2 == 1 {
        for at in [288, 292] {
            if content.len() >= at + 4 {
                let crc = crc32c::crc32c(&content[..at]);
                content[at..at + 4].copy_from_slice(&crc.to_le_bytes());
                check_control(&content);
            }
        }
    }
    check_control(&content);
}

fn check_control(content: &[u8]) {
    if let Ok(control) = ControlFile::parse(content) {
        control.time.to_timestamp();
        assert!(control.max_connections >= 0);
    }
}
