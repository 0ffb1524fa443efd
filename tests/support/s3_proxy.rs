//! An HTTP proxy in front of an S3 server: one request per connection upstream, faults by a plan, a record of all request heads.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::s3_double::Stopped;

const HEAD_MAX: usize = 64 * 1024;

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum HttpFault {
    /// Answered with this status and S3 error code; the server never sees it.
    Status(u16, &'static str),
    /// Answered with this status, no body, and these header lines.
    Headers(u16, &'static str),
    /// Answered 200 with this body.
    Body(String),
    /// Answered with this status and a page for a browser.
    Page(u16, &'static str),
    /// Passed on after a pause.
    Delay(Duration),
    /// Never answered; the connection stays open.
    Hang,
    /// The connection is closed once this many bytes of the body have come.
    ResetAfter(usize),
    /// Passed on and done; the connection is closed instead of the answer.
    AnswerLost,
    /// The head of the answer comes at once, and then a byte each time.
    Trickle(Duration),
    /// The answer is cut after this many bytes, head included.
    ShortAnswer(usize),
    /// One byte of the answer's body is changed, the given number of bytes before its end.
    FlipFromEnd(usize),
    /// A request header is taken out before it is passed on (works where the server does not check signatures).
    DropHeader(&'static str),
    /// A header of the answer is taken out.
    DropAnswerHeader(&'static str),
}

#[derive(Clone, Debug)]
struct Planned {
    method: &'static str,
    path_part: String,
    first: u64,
    times: u64,
    seen: u64,
    fault: HttpFault,
}

#[derive(Default)]
struct State {
    plan: Vec<Planned>,
    requests: Vec<Request>,
}

/// A request as it came over the wire.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// The plan of faults and the record of requests, shared by all clones.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    /// For each request of the method ("" = any) whose path and query contain `path_part`, from the `first`-th (from 1), `times` times.
    pub fn add(&self, method: &'static str, path_part: &str, first: u64, times: u64, fault: HttpFault) {
        let planned = Planned { method, path_part: path_part.to_owned(), first, times, seen: 0, fault };
        self.0.lock().unwrap().plan.push(planned);
    }

    /// For each such request until `clear`.
    pub fn always(&self, method: &'static str, path_part: &str, fault: HttpFault) {
        self.add(method, path_part, 1, u64::MAX, fault);
    }

    /// Everything is well again.
    pub fn clear(&self) {
        self.0.lock().unwrap().plan.clear();
    }

    /// The requests so far, oldest first; bodies are cut at 1 MiB.
    pub fn requests(&self) -> Vec<Request> {
        self.0.lock().unwrap().requests.clone()
    }

    pub fn forget_requests(&self) {
        self.0.lock().unwrap().requests.clear();
    }

    fn take(&self, request: &Request) -> Option<HttpFault> {
        let mut state = self.0.lock().unwrap();
        let mut found = None;
        for planned in &mut state.plan {
            let matches = (planned.method.is_empty() || planned.method == request.method)
                && request.path.contains(&planned.path_part);
            if matches {
                planned.seen += 1;
                if found.is_none() && planned.seen >= planned.first && planned.seen - planned.first < planned.times {
                    found = Some(planned.fault.clone());
                }
            }
        }
        state.requests.push(Request { body: Vec::new(), ..request.clone() });
        found
    }
}

pub struct Proxy {
    /// `127.0.0.1:port`.
    pub address: String,
    _task: Stopped,
}

/// One PUT with a condition per path at a time.
type Gates = Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>;

impl Proxy {
    pub async fn start(upstream: String, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let gates = Gates::default();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (upstream, faults, gates) = (upstream.clone(), faults.clone(), gates.clone());
                // An error here is a connection that one side closed.
                tokio::spawn(async move { serve(client, &upstream, &faults, &gates).await.ok() });
            }
        });
        Self { address, _task: Stopped(task) }
    }
}

/// One request and its answer; the connection is closed after it, as the answer says.
async fn serve(mut client: TcpStream, upstream: &str, faults: &Faults, gates: &Gates) -> io::Result<()> {
    let Some((mut request, mut body)) = read_head(&mut client).await? else { return Ok(()) };
    let fault = faults.take(&request);
    match &fault {
        Some(HttpFault::Status(status, code)) => {
            let text =
                format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>a planned fault</Message></Error>");
            return answer(&mut client, *status, "", if request.method == "HEAD" { "" } else { &text }).await;
        }
        Some(HttpFault::Headers(status, headers)) => return answer(&mut client, *status, headers, "").await,
        Some(HttpFault::Body(text)) => return answer(&mut client, 200, "", text).await,
        Some(HttpFault::Page(status, page)) => {
            return answer_as("text/html; charset=utf-8", &mut client, *status, "", page).await;
        }
        Some(HttpFault::Delay(pause)) => tokio::time::sleep(*pause).await,
        Some(HttpFault::Hang) => std::future::pending().await,
        Some(HttpFault::ResetAfter(bytes)) => {
            while body.len() < *bytes && client.read_buf(&mut body).await? > 0 {}
            return Ok(());
        }
        Some(HttpFault::DropHeader(name)) => request.headers.retain(|(found, _)| found != name),
        _ => {}
    }
    let length: usize = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while body.len() < length {
        if client.read_buf(&mut body).await? == 0 {
            return Ok(());
        }
    }
    let conditional = request.header("if-none-match").or(request.header("if-match")).is_some();
    let gate = conditional.then(|| gates.lock().unwrap().entry(request.path.clone()).or_default().clone());
    let _turn = match &gate {
        Some(gate) => Some(gate.lock().await),
        None => None,
    };
    if let Some(record) =
        faults.0.lock().unwrap().requests.iter_mut().rev().find(|r| r.path == request.path && r.body.is_empty())
    {
        record.body = body[..body.len().min(1024 * 1024)].to_vec();
    }
    let mut server = TcpStream::connect(upstream).await?;
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method, request.path);
    for (name, value) in request.headers.iter().filter(|(name, _)| name != "connection") {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("connection: close\r\n\r\n");
    server.write_all(head.as_bytes()).await?;
    server.write_all(&body).await?;
    drop(body);
    match fault {
        None | Some(HttpFault::Delay(_) | HttpFault::DropHeader(_)) => {
            tokio::io::copy(&mut server, &mut client).await?;
        }
        Some(fault) => {
            let mut reply = Vec::new();
            server.read_to_end(&mut reply).await?;
            match fault {
                HttpFault::AnswerLost => return Ok(()),
                HttpFault::Trickle(pause) => {
                    let end = reply.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |at| at + 4);
                    let body = reply.split_off(end);
                    client.write_all(&reply).await?;
                    for byte in body {
                        client.write_all(&[byte]).await?;
                        tokio::time::sleep(pause).await;
                    }
                    reply.clear();
                }
                HttpFault::ShortAnswer(bytes) => reply.truncate(bytes),
                HttpFault::FlipFromEnd(back) => {
                    if let Some(byte) = reply.len().checked_sub(back).and_then(|at| reply.get_mut(at)) {
                        *byte ^= 1;
                    }
                }
                HttpFault::DropAnswerHeader(name) => reply = without_header(&reply, name),
                _ => {}
            }
            client.write_all(&reply).await?;
        }
    }
    client.shutdown().await
}

/// The head of the request, and what came of the body with it. `None`: closed before a request.
async fn read_head(client: &mut TcpStream) -> io::Result<Option<(Request, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if bytes.len() > HEAD_MAX || client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let (method, path) = (first.next().unwrap_or_default().to_owned(), first.next().unwrap_or_default().to_owned());
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Some((Request { method, path, headers, body: Vec::new() }, bytes.split_off(end + 4))))
}

async fn answer(client: &mut TcpStream, status: u16, headers: &str, body: &str) -> io::Result<()> {
    answer_as("application/xml", client, status, headers, body).await
}

async fn answer_as(kind: &str, client: &mut TcpStream, status: u16, headers: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} Planned\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n"
    );
    client.write_all(head.as_bytes()).await?;
    client.write_all(body.as_bytes()).await?;
    client.shutdown().await
}

fn without_header(reply: &[u8], name: &str) -> Vec<u8> {
    let Some(end) = reply.windows(4).position(|window| window == b"\r\n\r\n") else { return reply.to_vec() };
    let head = String::from_utf8_lossy(&reply[..end]).into_owned();
    let kept: Vec<&str> =
        head.split("\r\n").filter(|line| !line.to_lowercase().starts_with(&format!("{name}:"))).collect();
    [kept.join("\r\n").as_bytes(), &reply[end..]].concat()
}
