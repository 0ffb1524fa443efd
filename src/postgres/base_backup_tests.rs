use super::*;
use crate::postgres::wire::testing::{data_row, frame};
use proptest::prelude::*;

fn options() -> BackupOptions {
    BackupOptions { label: "it's".into(), fast_checkpoint: true, max_rate_kib: Some(1), manifest: true }
}

/// Where it starts, and a tablespace beside the data directory.
fn head() -> Vec<u8> {
    [
        frame(b'T', b""),
        data_row(&[Some("0/5000028"), Some("1")]),
        frame(b'C', b"SELECT\0"),
        frame(b'T', b""),
        data_row(&[Some("16394"), Some("/mnt/t"), Some("10")]),
        data_row(&[None, None, Some("20")]),
        frame(b'C', b"SELECT\0"),
    ]
    .concat()
}

fn tail() -> Vec<u8> {
    let row = data_row(&[Some("0/5000100"), Some("1")]);
    [frame(b'T', b""), row, frame(b'C', b"SELECT\0"), frame(b'C', b"x\0"), frame(b'Z', b"I")].concat()
}

fn copy(messages: &[&[u8]]) -> Vec<u8> {
    let body: Vec<u8> = messages.iter().flat_map(|message| frame(b'd', message)).collect();
    [frame(b'H', b"\0\0\0"), body, frame(b'c', b"")].concat()
}

async fn read(script: Vec<u8>, step: usize, version: u32) -> Result<Vec<String>, PostgresError> {
    let connection = ReplicationConnection::scripted(script, step, version);
    let mut backup = connection.base_backup(&options()).await?;
    let mut seen: Vec<String> = vec![format!("{} {}", backup.start_lsn, backup.tablespaces.len())];
    loop {
        let (kind, bytes) = match backup.next().await? {
            BackupEvent::Archive { tablespace } => {
                seen.push(format!("archive {tablespace:?}"));
                continue;
            }
            BackupEvent::ManifestBegins => {
                seen.push("manifest".into());
                continue;
            }
            BackupEvent::Data(bytes) => ("data ", bytes),
            BackupEvent::Manifest(bytes) => ("lines ", bytes),
            BackupEvent::End { stop_lsn, .. } => {
                seen.push(format!("end {stop_lsn}"));
                if backup.pages_damaged() {
                    seen.extend(backup.take_warnings());
                }
                return Ok(seen);
            }
        };
        // Pieces of one message are joined again.
        let text = String::from_utf8_lossy(bytes).into_owned();
        match seen.last_mut() {
            Some(last) if last.starts_with(kind) => last.push_str(&text),
            _ => seen.push(format!("{kind}{text}")),
        }
    }
}

const SEEN: [&str; 8] = [
    "0/5000028 2",
    "archive Some(16394)",
    "data space",
    "archive None",
    "data main",
    "manifest",
    "lines {}",
    "end 0/5000100",
];

fn of_15() -> Vec<u8> {
    let messages: &[&[u8]] =
        &[b"n16394.tar\0/mnt/t\0", b"dsp", b"dace", b"p\0\0\0\0\0\0\0\x09", b"nbase.tar\0\0", b"dmain", b"m", b"d{}"];
    [head(), copy(messages), tail()].concat()
}

#[tokio::test]
async fn both_protocols_give_the_same_events() {
    let of_13 = [head(), copy(&[b"sp", b"ace"]), copy(&[b"main"]), copy(&[b"{}"]), tail()].concat();
    for step in [1, 5, 1000] {
        assert_eq!(read(of_13.clone(), step, 13_00_00).await.unwrap(), SEEN);
        assert_eq!(read(of_15(), step, 15_00_00).await.unwrap(), SEEN);
    }
}

#[tokio::test]
async fn a_backup_that_is_not_whole_or_not_in_order_is_refused() {
    let tablespace = |place: &str| data_row(&[Some("16394"), Some(place), Some("10")]);
    let begun = &head()[..head().len() - frame(b'C', b"SELECT\0").len()];
    let scripts: [Vec<u8>; 11] = [
        [begun, &tablespace(&"x".repeat(1025)), &tail()].concat(),
        [begun, &tablespace(&"x".repeat(1000)).repeat(2200), &tail()].concat(),
        [head(), copy(&[b"nbase.tar\0\0", b"dx"]), tail()].concat(),
        [head(), copy(&[b"n16394.tar\0/mnt/t\0", b"nbase.tar\0\0"]), tail()].concat(),
        [head(), copy(&[b"dx"]), tail()].concat(),
        [head(), copy(&[b"m"]), tail()].concat(),
        [head(), copy(&[b"n16394.tar\0", b"nbase.tar\0", b"m", b"m"]), tail()].concat(),
        [head(), copy(&[b"zx"]), tail()].concat(),
        [head(), copy(&[b""]), tail()].concat(),
        [head(), copy(&[&[b'n'; 9000]]), tail()].concat(),
        [data_row(&[]), head(), tail()].concat(),
    ];
    for (at, script) in scripts.into_iter().enumerate() {
        let error = read(script, 64, 15_00_00).await.unwrap_err();
        assert!(matches!(error, PostgresError::Protocol { .. }), "{at}: {error:?}");
    }
    let whole = of_15();
    for cut in [10, 150, 250, whole.len() - 3] {
        assert!(read(whole[..cut].to_vec(), 64, 15_00_00).await.is_err(), "{cut}");
    }
    let missing = [head(), copy(&[b"space"]), copy(&[b"main"]), tail()].concat();
    assert!(read(missing, 64, 13_00_00).await.is_err());
    let more = [head(), copy(&[b"a"]), copy(&[b"b"]), copy(&[b"c"]), copy(&[b"d"]), tail()].concat();
    assert!(read(more, 64, 13_00_00).await.is_err());
    // What damaged pages look like: everything came, and then the error. Only then the backup is whole.
    let warning = frame(b'N', b"SWARNUNG\0VWARNING\0C01000\0Mblock 3\0\0");
    let error = frame(b'E', b"SERROR\0CXX001\0Mchecksum verification failure\0\0");
    let whole = of_15();
    let script = [&warning, &whole[..whole.len() - 6], &error, &frame(b'Z', b"I")].concat();
    assert_eq!(read(script, 64, 15_00_00).await.unwrap().last().unwrap(), "block 3");
    let early = [&head(), &error, &frame(b'Z', b"I")].map(|part| part.as_slice()).concat();
    assert!(matches!(read(early, 64, 13_00_00).await, Err(PostgresError::PagesDamaged { .. })));
}

/// A server that says these bytes and then nothing more, without hanging up.
async fn silent_after(script: &[u8]) -> (ReplicationConnection, tokio::io::DuplexStream) {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    tokio::io::AsyncWriteExt::write_all(&mut far, script).await.unwrap();
    let mut wire = crate::postgres::wire::Wire::new(crate::postgres::socket::Socket::Scripted(near));
    wire.admitted();
    (ReplicationConnection::over(wire, 15_00_00), far)
}

const SOON: Duration = Duration::from_millis(20);

#[tokio::test]
async fn a_server_that_hangs_is_given_up() {
    let whole = of_15();
    let (connection, _far) = silent_after(&whole[..whole.len() - 40]).await;
    let mut backup = connection.base_backup(&options()).await.unwrap();
    backup.silence_limit = SOON;
    let error = loop {
        if let Err(error) = backup.next().await {
            break error;
        }
    };
    assert!(matches!(error, PostgresError::Timeout { .. }), "{error:?}");
}

/// Between the command and the first file a backup waited for ever, and the agent took no other one.
#[tokio::test]
async fn a_server_that_hangs_before_the_first_file_is_given_up() {
    let head = head();
    for told in [0, 20, head.len()] {
        let (connection, _far) = silent_after(&head[..told]).await;
        let error = BaseBackup::begin_within(connection, &options(), SOON).await.err().unwrap();
        assert!(matches!(error, PostgresError::Timeout { what: "BASE_BACKUP", limit } if limit == SOON), "{error:?}");
    }
}

#[tokio::test]
async fn a_spread_checkpoint_has_the_time_that_the_server_gives_it() {
    let shown = [frame(b'T', b""), data_row(&[Some("0")]), frame(b'C', b"SHOW\0"), frame(b'Z', b"I")].concat();
    let (connection, _far) = silent_after(&shown).await;
    let options = BackupOptions { fast_checkpoint: false, ..options() };
    let error = BaseBackup::begin_within(connection, &options, SOON).await.err().unwrap();
    assert!(matches!(error, PostgresError::Timeout { what: "BASE_BACKUP", limit } if limit == SOON), "{error:?}");
    assert_eq!(spread(SOON, "5min"), Duration::from_secs(600) + SOON);
    for odd in ["soon", "9999999d"] {
        assert_eq!(spread(SOON, odd), 2 * CHECKPOINT_TIMEOUT_MAX + SOON);
    }
}

#[test]
fn the_command_is_what_each_version_understands() {
    let new = command(&options(), true).unwrap();
    let expected = "BASE_BACKUP (LABEL 'it''s', PROGRESS true, CHECKPOINT 'fast', WAIT false, TABLESPACE_MAP true, \
                    MAX_RATE 32, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')";
    assert_eq!(new, expected);
    let old = command(&options(), false).unwrap();
    let expected = "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT MAX_RATE 32 TABLESPACE_MAP MANIFEST 'yes' \
                    MANIFEST_CHECKSUMS 'CRC32C'";
    assert_eq!(old, expected);
    assert!(command(&BackupOptions { label: "a\nb".into(), ..options() }, true).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), old in any::<bool>(), from in 0_usize..300) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut script = of_15();
            script.truncate(from);
            script.extend_from_slice(&bytes);
            let _ = read(script, 50, if old { 13_00_00 } else { 15_00_00 }).await;
        });
    }
}
