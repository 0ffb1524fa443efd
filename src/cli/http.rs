//! One question to the agent's HTTP endpoint.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// The body of a 200 answer to `GET path`. `listen` is `host:port` as the agent has it; an address that means "all of
/// them" is asked on loopback.
pub async fn get(listen: &str, path: &str, patience: Duration) -> io::Result<String> {
    tokio::time::timeout(patience, ask(listen, path)).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", patience.as_secs())))
    })
}

async fn ask(listen: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(reachable(listen)).await?;
    // HTTP/1.0: the answer is neither chunked nor followed by another one.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: walden\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8(answer).map_err(|_| wrong("it is not text"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| wrong("it is not HTTP"))?;
    let status = head.split(' ').nth(1).filter(|_| head.starts_with("HTTP/1."));
    match status {
        Some("200") => Ok(body.to_owned()),
        Some(code) => Err(wrong(&format!("it has status {}", code.chars().take(8).collect::<String>()))),
        None => Err(wrong("it is not HTTP")),
    }
}

fn reachable(listen: &str) -> String {
    match listen.rsplit_once(':') {
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => listen.to_owned(),
    }
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the answer is not a Walden agent's: {why}"))
}
