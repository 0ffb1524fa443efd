//! Messages on a socket: one bounded read buffer, whose bytes are handed out where they lie.
//!
//! Source: "Frontend/Backend Protocol" in PostgreSQL's documentation. Every length is looked at before anything is reserved for it:
//! a message that must be seen whole may have `limit` bytes; CopyData, which is handed out in pieces, 16 MiB.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::PostgresError;
use super::answer::{Row, parse_error, parse_row, text};
use super::asked::Asked;
use super::socket::Socket;

/// 128 KiB stay in the second-level cache between the kernel's copy and the use of the bytes.
const READ_BUFFER: usize = 128 * 1024;
/// Before the server has let us in: libpq allows less.
const LIMIT_STARTUP: usize = 64 * 1024;
/// For one message, and for all rows of an answer. A timeline history file may have 1 MiB; nothing else comes near.
pub(super) const LIMIT_READY: usize = 2 * 1024 * 1024;
pub(super) const COPY_DATA_MAX: usize = 16 * 1024 * 1024;
const ROWS_MAX: usize = 65_536;
const WARNINGS_MAX: usize = 100;
const WARNING_CHARS_MAX: usize = 512;
/// Beyond this the server is not reading; further status messages are pointless until it does.
const OUTBOX_MAX: usize = 16 * 1024;

pub(super) struct Wire {
    socket: Socket,
    inbox: Vec<u8>,
    /// The bytes read and not yet used are `inbox[start..end]`.
    start: usize,
    end: usize,
    outbox: BytesMut,
    limit: usize,
    parameters: HashMap<String, String>,
    /// What the server has warned of.
    warnings: Vec<String>,
    /// A command was sent and its end not seen: if its future was dropped, the connection cannot be used again.
    busy: bool,
}

/// A message's tag and the length of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) tag: u8,
    pub(super) body: usize,
}

pub(super) const HEADER: usize = 5;

impl Wire {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            socket,
            inbox: vec![0; READ_BUFFER],
            start: 0,
            end: 0,
            outbox: BytesMut::new(),
            limit: LIMIT_STARTUP,
            parameters: HashMap::new(),
            warnings: Vec::new(),
            busy: false,
        }
    }

    /// The server has let us in: longer messages are allowed.
    pub(super) fn admitted(&mut self) {
        self.limit = LIMIT_READY;
    }

    /// What the server has warned of since the last call; more than a bounded number is not kept.
    pub(super) fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    pub(super) fn security(&self) -> String {
        self.socket.security()
    }

    pub(super) fn may_be_another(&self) -> bool {
        self.socket.may_be_another()
    }

    // -- reading ------------------------------------------------------------------------------------------------------

    pub(super) fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The bytes read and not yet used.
    pub(super) fn unread(&self) -> &[u8] {
        &self.inbox[self.start..self.end]
    }

    pub(super) fn consume(&mut self, length: usize) {
        assert!(length <= self.buffered(), "only what was read can be used");
        self.start += length;
    }

    /// The `length` bytes just consumed. Call before the next `fill`.
    pub(super) fn consumed(&self, length: usize) -> &[u8] {
        &self.inbox[self.start - length..self.start]
    }

    /// Waits for more bytes, writing meanwhile what is still to be sent. Cancel-safe.
    pub(super) async fn fill(&mut self) -> Result<(), PostgresError> {
        self.make_room();
        poll_fn(|cx| self.poll_fill(cx)).await.map_err(disconnected)
    }

    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && (self.buffered() < 4096 || self.end == self.inbox.len()) {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.buffered());
        } else if self.end == self.inbox.len() {
            // A message that is needed whole and passes the buffer; `header` has checked it against `limit`.
            let larger = (self.inbox.len() * 2).min(self.limit + HEADER).max(self.inbox.len() + 1);
            self.inbox.resize(larger, 0);
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.outbox.is_empty()
            && let Poll::Ready(Err(error)) = self.poll_send(cx)
        {
            return Poll::Ready(Err(error));
        }
        let mut buf = ReadBuf::new(&mut self.inbox[self.end..]);
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buf))?;
        match buf.filled().len() {
            0 => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            length => {
                self.end += length;
                Poll::Ready(Ok(()))
            }
        }
    }

    /// The next message's header without using it; `None` when its five bytes are not all there.
    pub(super) fn header(&self) -> Result<Option<Header>, PostgresError> {
        let [tag, a, b, c, d, ..] = *self.unread() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize; // 32 bits fit
        let max = if tag == b'd' { COPY_DATA_MAX } else { self.limit };
        if length < 4 || length > max {
            return Err(PostgresError::protocol(format!("a message of {length} bytes was announced ({})", shown(tag))));
        }
        Ok(Some(Header { tag, body: length - 4 }))
    }

    /// The next message if it is there whole; used up on return. Not for CopyData.
    pub(super) fn take_whole(&mut self, header: Header) -> Option<&[u8]> {
        let length = HEADER + header.body;
        if self.buffered() < length {
            return None;
        }
        self.start += length;
        Some(&self.inbox[self.start - header.body..self.start])
    }

    /// Handles what may come at any time; `true` if the message was such a one.
    pub(super) fn absorb(&mut self, header: Header) -> bool {
        match header.tag {
            // NotificationResponse
            b'A' => self.take_whole(header).is_some(),
            // NoticeResponse
            b'N' => {
                let Some(body) = self.take_whole(header) else { return false };
                let notice = parse_error(body);
                if notice.severity == "WARNING" && self.warnings.len() < WARNINGS_MAX {
                    self.warnings.push(notice.message.chars().take(WARNING_CHARS_MAX).collect());
                }
                true
            }
            b'S' => {
                let Some(body) = self.take_whole(header) else { return false };
                let mut parts = body.split(|&b| b == 0);
                if let (Some(name), Some(value)) = (parts.next(), parts.next()) {
                    let (name, value) = (text(name), text(value));
                    if self.parameters.len() < 64 || self.parameters.contains_key(&name) {
                        self.parameters.insert(name, value);
                    }
                }
                true
            }
            _ => false,
        }
    }

    /// The next message that is not one of those which may come at any time.
    pub(super) async fn message(&mut self) -> Result<(u8, Bytes), PostgresError> {
        loop {
            if let Some(header) = self.header()? {
                if header.body > self.limit {
                    return Err(PostgresError::protocol("copied data came where none was asked for"));
                }
                if self.absorb(header) {
                    continue;
                }
                if !matches!(header.tag, b'N' | b'A' | b'S')
                    && let Some(body) = self.take_whole(header)
                {
                    return Ok((header.tag, Bytes::copy_from_slice(body)));
                }
            }
            self.fill().await?;
        }
    }

    // -- writing ------------------------------------------------------------------------------------------------------

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.outbox))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.outbox.advance(written),
            }
        }
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// Encodes a message into the outbox; `send` or the next `fill` brings it out.
    pub(super) fn queue(&mut self, encode: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<(), PostgresError> {
        let before = self.outbox.len();
        encode(&mut self.outbox).map_err(|error| {
            self.outbox.truncate(before);
            PostgresError::settings(format!("a value cannot be sent: {error}"))
        })
    }

    /// Waits until everything queued is sent. Dropped, it loses nothing: the rest stays queued.
    pub(super) async fn send(&mut self) -> Result<(), PostgresError> {
        poll_fn(|cx| self.poll_send(cx)).await.map_err(disconnected)
    }

    /// Queues and sends what the socket takes at once; the next `fill` sends the rest. Drops the message if the server does not read.
    pub(super) async fn send_soon(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<(), PostgresError> {
        if self.outbox.len() < OUTBOX_MAX {
            self.queue(encode)?;
        }
        poll_fn(|cx| match self.poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        })
        .await
        .map_err(disconnected)
    }

    // -- commands -----------------------------------------------------------------------------------------------------

    /// Sends a command by the simple query protocol; its answer is read by the caller.
    pub(super) async fn begin_command(&mut self, command: &str) -> Result<(), PostgresError> {
        if self.busy {
            return Err(PostgresError::Disconnected { source: None });
        }
        self.queue(|out| postgres_protocol::message::frontend::query(command, out))?;
        self.busy = true;
        self.send().await
    }

    /// ReadyForQuery was seen.
    pub(super) fn command_ended(&mut self) {
        self.busy = false;
    }

    /// After an ErrorResponse: reads on to ReadyForQuery, so that the connection can be used again, and gives the error.
    /// After a FATAL one the server hangs up instead, which is no error of its own.
    pub(super) async fn fail(&mut self, asked: Asked<'_>, body: &[u8]) -> PostgresError {
        let error = asked.classify(parse_error(body));
        let rest = async {
            while self.message().await?.0 != b'Z' {}
            Ok::<_, PostgresError>(())
        };
        // A server that never ends its answer leaves the connection busy, and so unusable.
        if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(5), rest).await {
            self.busy = false;
        }
        error
    }

    /// Sends a command and reads its rows, those of several result sets in one list.
    pub(super) async fn command(
        &mut self,
        command: &str,
        asked: Asked<'_>,
        limit: Duration,
    ) -> Result<Vec<Row>, PostgresError> {
        let what = asked.what();
        let work = async {
            self.begin_command(command).await?;
            let (mut rows, mut bytes) = (Vec::new(), 0);
            loop {
                match self.message().await? {
                    (b'D', body) => {
                        bytes += HEADER + body.len();
                        if rows.len() == ROWS_MAX || bytes > LIMIT_READY + HEADER {
                            return Err(PostgresError::protocol(format!("the answer to {what} is too long")));
                        }
                        rows.push(parse_row(body)?);
                    }
                    (b'T' | b'C' | b'I', _) => {}
                    (b'Z', _) => {
                        self.command_ended();
                        return Ok(rows);
                    }
                    (b'E', body) => return Err(self.fail(asked, &body).await),
                    (tag, _) => return Err(unexpected(tag, what)),
                }
            }
        };
        tokio::time::timeout(limit, work).await.unwrap_or(Err(PostgresError::Timeout { what, limit }))
    }
}

pub(super) fn disconnected(error: io::Error) -> PostgresError {
    let source = (error.kind() != io::ErrorKind::UnexpectedEof).then_some(error);
    PostgresError::Disconnected { source }
}

pub(super) fn unexpected(tag: u8, when: &str) -> PostgresError {
    PostgresError::protocol(format!("message {} came in answer to {when}", shown(tag)))
}

fn shown(tag: u8) -> String {
    if tag.is_ascii_graphic() { format!("'{}'", char::from(tag)) } else { format!("{tag:#04x}") }
}

/// Scripted servers for the tests of this room.
#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use tokio::io::AsyncWriteExt;

    pub(in crate::postgres) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[tag], length.as_slice(), body].concat()
    }

    pub(in crate::postgres) fn data_row(columns: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        for column in columns {
            let length = column.map_or(-1, |text| i32::try_from(text.len()).unwrap());
            body.extend_from_slice(&length.to_be_bytes());
            body.extend_from_slice(column.unwrap_or("").as_bytes());
        }
        frame(b'D', &body)
    }

    /// A connection to a server that sends these bytes, in chunks of `step`, and then hangs up; what it is sent it ignores.
    pub(in crate::postgres) fn scripted(bytes: Vec<u8>, step: usize) -> Wire {
        let mut wire = Wire::new(scripted_socket(bytes, step));
        wire.admitted();
        wire
    }

    pub(in crate::postgres) fn scripted_socket(bytes: Vec<u8>, step: usize) -> Socket {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(far);
            let listen = tokio::spawn(async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await });
            for chunk in bytes.chunks(step) {
                if writer.write_all(chunk).await.is_err() {
                    break;
                }
            }
            let _ = writer.shutdown().await;
            drop(writer);
            let _ = listen.await;
        });
        Socket::Scripted(near)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::frame;
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    /// What a connection makes of these bytes, followed by the end of the stream.
    async fn read_all(bytes: Vec<u8>) -> Vec<Result<(u8, Bytes), String>> {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut wire = Wire::new(Socket::Scripted(near));
        wire.admitted();
        let script = tokio::spawn(async move {
            let _ = far.write_all(&bytes).await;
        });
        let mut seen = Vec::new();
        loop {
            match wire.message().await {
                Ok(message) => seen.push(Ok(message)),
                Err(error) => {
                    seen.push(Err(error.to_string()));
                    break;
                }
            }
        }
        script.abort();
        assert!(wire.inbox.len() <= LIMIT_READY + HEADER + 1);
        seen
    }

    #[tokio::test]
    async fn notices_and_parameters_may_come_anywhere() {
        let stream = [frame(b'N', b"VNOTICE\0\0"), frame(b'S', b"a\0b\0"), frame(b'Z', b"I")].concat();
        let seen = read_all(stream).await;
        assert_eq!(seen[0], Ok((b'Z', Bytes::from_static(b"I"))));
    }

    #[tokio::test]
    async fn a_message_larger_than_the_buffer_is_read_and_one_beyond_the_limit_refused() {
        let large = vec![7; 300_000];
        let seen = read_all(frame(b'D', &large)).await;
        assert_eq!(seen[0].as_ref().unwrap().1.len(), 300_000);
        for length in [0_u32, 3, (LIMIT_READY + 1) as u32, 1 << 30, u32::MAX] {
            let seen = read_all([&b"D"[..], &length.to_be_bytes(), &[0; 64]].concat()).await;
            assert!(seen[0].as_ref().unwrap_err().contains("announced"), "{length}: {seen:?}");
        }
    }

    /// Each row may be long; all of them together were bounded only by 128 GiB.
    #[tokio::test]
    async fn rows_without_an_end_are_refused() {
        for (length, rows) in [(LIMIT_READY - 10, 2), (1 << 20, 3), (300, 8000), (0, ROWS_MAX + 1)] {
            let text = "x".repeat(length);
            let row = testing::data_row(&[Some(&text)]);
            let script = [row.repeat(rows), frame(b'Z', b"I")].concat();
            let mut wire = testing::scripted(script, 1 << 16);
            let answer = wire.command("SHOW all", Asked::Other("SHOW"), Duration::from_secs(20)).await;
            let error = answer.expect_err("too long").to_string();
            assert!(error.contains("too long"), "{length}: {error}");
        }
        let most = testing::data_row(&[Some(&"x".repeat(LIMIT_READY - 10))]);
        let mut wire = testing::scripted([most, frame(b'Z', b"I")].concat(), 1 << 16);
        assert!(wire.command("SHOW all", Asked::Other("SHOW"), Duration::from_secs(20)).await.is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn hostile_bytes_never_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(read_all(bytes.clone()));
            let _ = (parse_row(Bytes::from(bytes.clone())), parse_error(&bytes));
        }
    }
}
