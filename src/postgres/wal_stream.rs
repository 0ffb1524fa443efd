//! WAL as it comes: XLogData handed out where it lies in the read buffer, keepalives, the end of a timeline.
//!
//! Source: "Streaming Replication Protocol", START_REPLICATION, in the protocol chapter of PostgreSQL's documentation.

use std::time::Duration;

use bytes::BufMut;
use postgres_protocol::message::frontend;

use crate::wal::{Lsn, PgTime, TimelineId};

use super::answer::parse_row;
use super::asked::Asked;
use super::replication::next_timeline;
use super::wire::{HEADER, Header, unexpected};
use super::{PostgresError, ReplicationConnection, ServerMessage};

/// How long the server may take to end a stream.
const FINISH_LIMIT: Duration = Duration::from_secs(30);
/// `w`, start, end of WAL, time.
const DATA_HEADER: usize = 25;
/// `k`, end of WAL, time, reply requested.
const KEEPALIVE: usize = 18;

/// A running physical stream. Dropping it closes the connection.
pub struct WalStream {
    connection: ReplicationConnection,
    /// The position of the next byte. XLogData that starts elsewhere is a protocol error.
    next: Lsn,
    /// Bytes of the current XLogData that are still to come, and its end of WAL.
    data_left: usize,
    server_end: Lsn,
    /// The server has sent CopyDone.
    ended: bool,
}

/// One message, or a piece of one.
#[derive(Debug, PartialEq, Eq)]
pub enum WalMessage<'a> {
    /// WAL from `start` on; it follows directly what came before. `server_end` is the end of WAL on the server, as it was sent.
    Data {
        start: Lsn,
        server_end: Lsn,
        bytes: &'a [u8],
    },
    Keepalive {
        server_end: Lsn,
        server_time: PgTime,
        reply_requested: bool,
    },
    /// The server has no more WAL of this timeline: call `finish`.
    EndOfTimeline,
}

/// What a stream leaves when it has ended.
pub struct EndOfStream {
    /// From the server's own answer (I10); `None` if it ended for another reason.
    pub next_timeline: Option<(TimelineId, Lsn)>,
    pub connection: ReplicationConnection,
}

/// What lies at the front of the buffer; found before anything is borrowed.
enum Front {
    Data { length: usize },
    Keepalive { server_end: Lsn, server_time: PgTime, reply_requested: bool },
    EndOfTimeline,
}

impl WalStream {
    pub(super) fn new(connection: ReplicationConnection, start: Lsn) -> Self {
        Self { connection, next: start, data_left: 0, server_end: Lsn::ZERO, ended: false }
    }

    /// The end of what was handed out: the position of the next byte.
    pub fn next_lsn(&self) -> Lsn {
        self.next
    }

    pub fn server_version(&self) -> u32 {
        self.connection.server_version()
    }

    /// Waits for more bytes from the server, and sends what status is still queued. Cancel-safe.
    pub async fn fill(&mut self) -> Result<(), PostgresError> {
        self.connection.wire.fill().await
    }

    /// The next message, or piece of XLogData, that is in the buffer; `None`: call `fill`. Never waits.
    pub fn next_message(&mut self) -> Result<Option<WalMessage<'_>>, PostgresError> {
        Ok(match self.take_front()? {
            None => None,
            Some(Front::Data { length }) => {
                let end = self.next.checked_add(length as u64);
                let start = self.next;
                self.next = end.ok_or_else(|| PostgresError::protocol("WAL beyond the last position"))?;
                self.data_left -= length;
                self.connection.wire.consume(length);
                let bytes = self.connection.wire.consumed(length);
                Some(WalMessage::Data { start, server_end: self.server_end, bytes })
            }
            Some(Front::Keepalive { server_end, server_time, reply_requested }) => {
                Some(WalMessage::Keepalive { server_end, server_time, reply_requested })
            }
            Some(Front::EndOfTimeline) => Some(WalMessage::EndOfTimeline),
        })
    }

    fn take_front(&mut self) -> Result<Option<Front>, PostgresError> {
        if self.ended {
            return Ok(Some(Front::EndOfTimeline));
        }
        loop {
            if self.data_left > 0 {
                let length = self.data_left.min(self.connection.wire.buffered());
                return Ok((length > 0).then_some(Front::Data { length }));
            }
            let Some(header) = self.connection.wire.header()? else { return Ok(None) };
            match header.tag {
                b'd' => match self.take_copy_data(header)? {
                    Some(Front::Data { .. }) => {}
                    other => return Ok(other),
                },
                b'c' => {
                    if self.connection.wire.take_whole(header).is_none() {
                        return Ok(None);
                    }
                    self.ended = true;
                    return Ok(Some(Front::EndOfTimeline));
                }
                b'E' => {
                    let Some(body) = self.connection.wire.take_whole(header) else { return Ok(None) };
                    let message = super::answer::parse_error(body);
                    return Err(Asked::Stream { slot: None }.classify(message));
                }
                // Without CopyDone before it: all WAL is sent and confirmed, and the server shuts down.
                //
                // Source: `WalSndDone` in PostgreSQL `src/backend/replication/walsender.c`.
                b'C' => {
                    let message = "the server has sent all its WAL and shuts down".into();
                    let sqlstate = "57P01".into();
                    let source = Box::new(ServerMessage { message, sqlstate, ..ServerMessage::default() });
                    return Err(PostgresError::NotReady { source });
                }
                _ if self.connection.wire.absorb(header) => {}
                b'N' | b'S' | b'A' => return Ok(None),
                tag => return Err(unexpected(tag, "START_REPLICATION")),
            }
        }
    }

    /// A keepalive, or the header of XLogData (then `Data`, without bytes yet); `None`: not there yet.
    fn take_copy_data(&mut self, header: Header) -> Result<Option<Front>, PostgresError> {
        let unread = &self.connection.wire.unread()[HEADER..];
        let number = |at: usize| unread[at..at + 8].iter().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
        match unread.first() {
            None if header.body > 0 => Ok(None),
            Some(b'w') if header.body >= DATA_HEADER => {
                if unread.len() < DATA_HEADER {
                    return Ok(None);
                }
                let start = Lsn::new(number(1));
                if start != self.next {
                    return Err(PostgresError::protocol(format!("WAL came from {start}, expected {}", self.next)));
                }
                self.server_end = Lsn::new(number(9));
                self.connection.wire.consume(HEADER + DATA_HEADER);
                self.data_left = header.body - DATA_HEADER;
                Ok(Some(Front::Data { length: 0 }))
            }
            Some(b'k') if header.body == KEEPALIVE => {
                if unread.len() < KEEPALIVE {
                    return Ok(None);
                }
                let server_end = Lsn::new(number(1));
                let server_time = PgTime::from_pg_micros(number(9).cast_signed());
                let reply_requested = unread[17] != 0;
                self.connection.wire.consume(HEADER + KEEPALIVE);
                Ok(Some(Front::Keepalive { server_end, server_time, reply_requested }))
            }
            _ => Err(PostgresError::protocol("copied data is neither WAL nor a keepalive")),
        }
    }

    /// Tells the server what is written and what is durable (I1); apply is always 0.
    ///
    /// Never waits for the server: what the socket does not take at once goes out with the next `fill`. If the server does not read at
    /// all, further ones are dropped until it does. `reply_requested` asks for a keepalive.
    pub async fn send_status(
        &mut self,
        written: Lsn,
        flushed: Lsn,
        reply_requested: bool,
    ) -> Result<(), PostgresError> {
        if self.ended {
            return Ok(());
        }
        let time = PgTime::from_timestamp(jiff::Timestamp::now());
        let mut body = Vec::with_capacity(34);
        body.put_u8(b'r');
        body.put_u64(written.get());
        body.put_u64(flushed.get());
        body.put_u64(0);
        body.put_i64(time.pg_micros());
        body.put_u8(u8::from(reply_requested));
        self.connection.wire.send_soon(|out| frontend::CopyData::new(&body[..]).map(|data| data.write(out))).await
    }

    /// Ends the stream from both sides. WAL that still comes is dropped; it was never acknowledged and comes again.
    pub async fn finish(mut self) -> Result<EndOfStream, PostgresError> {
        let work = async {
            self.connection.wire.queue(|out| {
                frontend::copy_done(out);
                Ok(())
            })?;
            self.connection.wire.send().await?;
            while !self.ended {
                match self.next_message()? {
                    Some(_) => {}
                    None => self.fill().await?,
                }
            }
            let mut next = None;
            loop {
                match self.connection.wire.message().await? {
                    (b'D', body) => next = Some(next_timeline(&parse_row(body)?)?),
                    (b'T' | b'C', _) => {}
                    (b'Z', _) => break,
                    (b'E', body) => return Err(self.connection.wire.fail(Asked::Stream { slot: None }, &body).await),
                    (tag, _) => return Err(unexpected(tag, "the end of streaming")),
                }
            }
            self.connection.wire.command_ended();
            Ok(next)
        };
        let what = "the end of streaming";
        let ended = tokio::time::timeout(FINISH_LIMIT, work).await;
        let next_timeline = ended.unwrap_or(Err(PostgresError::Timeout { what, limit: FINISH_LIMIT }))?;
        Ok(EndOfStream { next_timeline, connection: self.connection })
    }
}

#[cfg(test)]
#[path = "wal_stream_tests.rs"]
mod tests;
