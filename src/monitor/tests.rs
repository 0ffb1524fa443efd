use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::telemetry::{AlertSettings, BoardRepository, BoardSetup, Clock, StatusJson, SystemClock};
use crate::wal::{Lsn, SegmentSize, SystemIdentifier};

fn board() -> Board {
    Board::new(BoardSetup {
        cluster: "main".into(),
        slot: "walden".into(),
        repositories: vec![BoardRepository { name: "a".into(), url: "/a".into(), required: true }],
        alert: AlertSettings::default(),
        clock: Arc::new(SystemClock::new()),
    })
}

fn make_healthy(board: &Board) {
    board.set_identity(SystemIdentifier::new(7), SegmentSize::DEFAULT);
    board.set_received(Lsn::new(5));
    board.set_durable(Lsn::new(5));
    board.repositories()[0].set_archived(Lsn::new(5));
    board.note_flush_sample(SystemClock::new().wall(), Lsn::new(5));
    board.set_connected();
}

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

async fn start(board: &Board) -> Server {
    start_with(board, CONNECTION_LIFE).await
}

async fn start_with(board: &Board, connection_life: Duration) -> Server {
    let mut monitor = Monitor::bind("127.0.0.1:0", board.clone()).await.expect("port 0 is always free");
    monitor.connection_life = connection_life;
    let (address, stop) = (monitor.address(), CancellationToken::new());
    let task = tokio::spawn(monitor.serve(stop.clone()));
    Server { address, stop, task }
}

/// The whole answer; it ends because the server closes the connection.
async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("it answers");
    answer
}

async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = ask(address, &format!("GET {path} HTTP/1.1\r\nHost: walden\r\n\r\n")).await;
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    let body = answer.split_once("\r\n\r\n").expect("a header and a body").1;
    (code, body.to_owned())
}

#[tokio::test]
async fn the_pages_tell_the_boards_state() {
    let board = board();
    let server = start(&board).await;
    assert_eq!(fetch(server.address, "/livez").await, (200, "alive\n".into()));
    let (code, body) = fetch(server.address, "/readyz").await;
    assert!(code == 503 && body.contains("not_connected"), "{code} {body}");

    make_healthy(&board);
    let (code, body) = fetch(server.address, "/readyz").await;
    assert_eq!((code, body.as_str()), (200, r#"{"healthy":true,"causes":[]}"#));
    let (_, body) = fetch(server.address, "/status").await;
    let status: StatusJson = serde_json::from_str(&body).expect("the document of `walden status`");
    assert!(status.healthy && status.archived_lsn == Some(Lsn::new(5)));
    let (code, body) = fetch(server.address, "/metrics").await;
    assert!(code == 200 && body.contains("walden_connected{cluster=\"main\"} 1.0"), "{body}");
    assert_eq!(fetch(server.address, "/else").await.0, 404);
    assert!(
        ask(server.address, "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.contains(" 405 ")
    );
    server.stop.cancel();
    server.task.await.expect("it stops");
}

#[tokio::test]
async fn a_taken_port_is_told_and_breaks_nothing() {
    let board = board();
    let server = start(&board).await;
    let error = Monitor::bind(&server.address.to_string(), board).await.err().expect("the port is taken");
    assert_eq!(error.next_step(), NextStep::Retry);
    assert!(error.to_string().contains(&server.address.to_string()) && error.hint().contains("metrics.listen"));
    assert_eq!(fetch(server.address, "/livez").await.0, 200);
}

/// Clients that connect and say nothing hold every slot; after their time they are cut and others are answered.
#[tokio::test]
async fn silent_clients_are_cut_off() {
    let board = board();
    let server = start_with(&board, Duration::from_millis(200)).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.expect("the kernel queues it"));
    }
    assert_eq!(fetch(server.address, "/livez").await.0, 200);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_silent_clients() {
    let board = board();
    let server = start(&board).await;
    let mut silent = TcpStream::connect(server.address).await.expect("it listens");
    silent.write_all(b"GET /status HTTP/1.1\r\n").await.expect("it reads");
    assert_eq!(fetch(server.address, "/livez").await.0, 200);
    let begin = Instant::now();
    server.stop.cancel();
    server.task.await.expect("it stops");
    assert!(begin.elapsed() < Duration::from_secs(5));
}
