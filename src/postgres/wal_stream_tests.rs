use super::*;
use crate::postgres::StartOutcome;
use crate::postgres::wire::testing::{data_row, frame};
use proptest::prelude::*;

const START: u64 = 0x100_0000;

fn xlog_data(start: u64, bytes: &[u8]) -> Vec<u8> {
    frame(b'd', &[b"w", &start.to_be_bytes()[..], &99_u64.to_be_bytes(), &7_u64.to_be_bytes(), bytes].concat())
}

fn keepalive(end: u64, reply: u8) -> Vec<u8> {
    frame(b'd', &[b"k", &end.to_be_bytes()[..], &5_u64.to_be_bytes(), &[reply]].concat())
}

async fn stream(messages: &[Vec<u8>], step: usize) -> Result<WalStream, PostgresError> {
    let script = [frame(b'W', b"\0\0\0"), messages.concat()].concat();
    let connection = ReplicationConnection::scripted(script, step, 15_00_00);
    match connection.start_replication(Some("s"), Lsn::new(START), TimelineId::FIRST).await? {
        StartOutcome::Streaming(stream) => Ok(stream),
        StartOutcome::AtEnd { .. } => Err(PostgresError::protocol("at its end")),
    }
}

/// All WAL that comes and the number of keepalives, until the timeline's end or an error.
async fn read(stream: &mut WalStream) -> Result<(Vec<u8>, usize), PostgresError> {
    let (mut wal, mut keepalives) = (Vec::new(), 0);
    loop {
        match stream.next_message()? {
            None => stream.fill().await?,
            Some(WalMessage::Data { start, bytes, server_end }) => {
                assert_eq!((start.get(), server_end.get()), (START + wal.len() as u64, 99));
                wal.extend_from_slice(bytes);
            }
            Some(WalMessage::Keepalive { .. }) => keepalives += 1,
            Some(WalMessage::EndOfTimeline) => return Ok((wal, keepalives)),
        }
    }
}

#[tokio::test]
async fn wal_comes_in_pieces_however_it_is_cut() {
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
    let messages = [
        keepalive(1, 1),
        xlog_data(START, &bytes[..200_000]),
        frame(b'N', b"VNOTICE\0\0"),
        xlog_data(START + 200_000, &bytes[200_000..]),
        keepalive(2, 0),
        frame(b'c', b""),
        data_row(&[Some("2"), Some("0/2000000")]),
        frame(b'C', b"x\0"),
        frame(b'Z', b"I"),
    ];
    for step in [1000, 4096, 65_000] {
        let mut stream = stream(&messages, step).await.unwrap();
        let (wal, keepalives) = read(&mut stream).await.unwrap();
        assert!(wal == bytes && keepalives == 2);
        assert_eq!(stream.next_lsn().get(), START + 300_000);
        let end = stream.finish().await.unwrap();
        let next = end.next_timeline.map(|(timeline, switch)| (timeline.get(), switch.get()));
        assert_eq!(next, Some((2, 0x200_0000)));
    }
}

#[tokio::test]
async fn a_hostile_stream_is_a_protocol_error() {
    let huge = [b"d".as_slice(), &u32::MAX.to_be_bytes()].concat();
    let large = [b"d".as_slice(), &((16_u32 << 20) + 1).to_be_bytes()].concat();
    for messages in [
        vec![xlog_data(START + 1, b"x")],
        vec![xlog_data(START, b"xx"), xlog_data(START + 1, b"x")],
        vec![xlog_data(0, b"")],
        vec![frame(b'd', b"")],
        vec![frame(b'd', b"w123")],
        vec![frame(b'd', b"k123")],
        vec![frame(b'd', b"zzz")],
        vec![frame(b'D', b"")],
        vec![frame(b'R', b"")],
        vec![huge],
        vec![large],
    ] {
        let mut stream = stream(&messages, 100).await.unwrap();
        assert!(matches!(read(&mut stream).await, Err(PostgresError::Protocol { .. })), "{messages:?}");
    }
}

#[tokio::test]
async fn what_ends_a_stream_is_told_apart() {
    let mut shutdown = stream(&[frame(b'C', b"COPY 0\0")], 100).await.unwrap();
    assert!(matches!(read(&mut shutdown).await, Err(PostgresError::NotReady { .. })));
    let removed = frame(b'E', b"SERROR\0C58P01\0Mrequested WAL segment has already been removed\0\0");
    let mut removed = stream(&[removed], 100).await.unwrap();
    assert!(read(&mut removed).await.unwrap_err().is_wal_removed());
    let mut gone = stream(&[xlog_data(START, b"x")], 100).await.unwrap();
    assert!(matches!(read(&mut gone).await, Err(PostgresError::Disconnected { .. })));
}

#[tokio::test]
async fn a_status_never_waits_for_a_server_that_does_not_read() {
    let (near, _far) = tokio::io::duplex(64);
    let mut wire = crate::postgres::wire::Wire::new(crate::postgres::socket::Socket::Scripted(near));
    for _ in 0..10_000 {
        let send = wire.send_soon(|out| {
            out.put_slice(&[0; 40]);
            Ok(())
        });
        tokio::time::timeout(Duration::from_secs(5), send).await.expect("at once").unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), good in 0_usize..50, step in 1_usize..200) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let messages = [xlog_data(START, &vec![1; good]), bytes];
            if let Ok(mut stream) = stream(&messages, step).await {
                let _ = read(&mut stream).await;
            }
        });
    }
}
