//! The byte stream to a server: TCP, TLS over it, or a Unix socket. Also a guard that bounds the frames which `tokio-postgres` reads, and
//! holds back authentications that `require_auth` excludes.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::hosts::Keepalive;
use super::search::Address;
use super::settings::AllowedMethods;
use super::tls::{TlsFacts, TlsSocket};

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Tls(Box<TlsSocket>),
    Unix(UnixStream),
    #[cfg(test)]
    Scripted(tokio::io::DuplexStream),
}

/// How a connection runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Socket,
    /// TCP without TLS.
    Plain,
    Tls,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Socket => "over the Unix socket",
            Self::Plain => "without TLS",
            Self::Tls => "over TLS",
        })
    }
}

impl Socket {
    pub(super) fn tls(&self) -> Option<&TlsFacts> {
        match self {
            Self::Tls(socket) => Some(&socket.facts),
            _ => None,
        }
    }

    pub(super) fn security(&self) -> String {
        match (self.tls(), self.transport()) {
            (Some(tls), _) => {
                let verified = match (tls.is_verified, tls.is_for_host) {
                    (true, true) => "certificate and host verified",
                    (true, false) => "certificate verified, host not compared",
                    (false, _) => "certificate not verified",
                };
                format!("{}, {verified}", tls.version)
            }
            (None, Transport::Socket) => "Unix socket".to_owned(),
            (None, _) => "no TLS".to_owned(),
        }
    }

    /// TCP to another machine without a certificate that proves whose it is.
    pub(super) fn may_be_another(&self) -> bool {
        let (stream, is_verified) = match self {
            Self::Tcp(stream) => (stream, false),
            Self::Tls(socket) => {
                (socket.stream.get_ref().0.get_ref(), socket.facts.is_verified && socket.facts.is_for_host)
            }
            _ => return false,
        };
        !is_verified && stream.peer_addr().is_ok_and(|peer| is_elsewhere(peer.ip()))
    }

    pub(super) fn transport(&self) -> Transport {
        match self {
            Self::Tcp(_) => Transport::Plain,
            Self::Tls(_) => Transport::Tls,
            Self::Unix(_) => Transport::Socket,
            #[cfg(test)]
            Self::Scripted(_) => Transport::Plain,
        }
    }

    /// The caller bounds the time.
    pub(super) async fn connect(address: &Address, keepalive: Option<Keepalive>) -> io::Result<Self> {
        match address {
            Address::Unix(path) => UnixStream::connect(path).await.map(Self::Unix),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                if let Some(keepalive) = keepalive {
                    set_keepalive(&stream, keepalive)?;
                }
                Ok(Self::Tcp(stream))
            }
        }
    }
}

/// A local address, whoever has it, leads to this machine.
fn is_elsewhere(peer: IpAddr) -> bool {
    !peer.to_canonical().is_loopback()
}

fn set_keepalive(stream: &TcpStream, keepalive: Keepalive) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, keepalive.idle)?;
    sockopt::set_tcp_keepintvl(stream, keepalive.interval)?;
    sockopt::set_tcp_keepcnt(stream, keepalive.count)?;
    if keepalive.user_timeout > Duration::ZERO {
        let milliseconds = u32::try_from(keepalive.user_timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    }
    Ok(())
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(socket) => Pin::new(&mut socket.stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(socket) => Pin::new(&mut socket.stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(socket) => Pin::new(&mut socket.stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(socket) => Pin::new(&mut socket.stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// What a server may say until it is ready, and of its parameters afterwards: an honest one comes to a few hundred bytes.
const KEPT_MAX: u64 = 1 << 20;

/// Passes bytes through and fails as soon as a message header announces more than `length_max` bytes, the server tells more than
/// `tokio-postgres` should keep, or it asks for an authentication that is not allowed.
///
/// `postgres-protocol` reserves whatever a header announces, up to 4 GiB; this keeps a hostile server from that (I17). `tokio-postgres`
/// keeps every notice that comes before the server is ready and every parameter, however many; and it would send a password in the
/// clear to whoever asks.
/// Only behind the negotiation of TLS, where every byte from the server belongs to a message.
#[derive(Debug)]
pub(super) struct BoundedFrames<S> {
    inner: S,
    header: [u8; 5],
    header_filled: usize,
    /// Bytes of the current message that are still to come after its header.
    body_left: u64,
    length_max: u32,
    /// The server is ready: notices are not kept any more.
    ready: bool,
    /// Bytes of messages that are kept.
    kept: u64,
    /// Until the server has let us in.
    allowed: Option<AllowedMethods>,
    exchanged: bool,
    /// The kind of an authentication request, byte by byte.
    request: Option<(u32, u8)>,
}

/// The server asks for an authentication that `require_auth` excludes.
#[derive(Debug)]
pub(super) struct NotAllowed(pub(super) &'static str);

impl fmt::Display for NotAllowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it asks for {}, and require_auth does not allow that", self.0)
    }
}

impl std::error::Error for NotAllowed {}

impl<S> BoundedFrames<S> {
    pub(super) fn new(inner: S, length_max: u32, allowed: AllowedMethods) -> Self {
        Self {
            inner,
            header: [0; 5],
            header_filled: 0,
            body_left: 0,
            length_max,
            ready: false,
            kept: 0,
            allowed: Some(allowed),
            exchanged: false,
            request: None,
        }
    }

    pub(super) fn inner(&self) -> &S {
        &self.inner
    }

    /// A byte of an authentication request's kind.
    fn watch_request(&mut self, byte: u8) -> io::Result<()> {
        let Some((kind, seen)) = self.request else { return Ok(()) };
        let (kind, seen) = (kind << 8 | u32::from(byte), seen + 1);
        self.request = (seen < 4).then_some((kind, seen));
        let (Some(allowed), None) = (self.allowed, self.request) else { return Ok(()) };
        if kind == 0 {
            self.allowed = None;
        }
        match allowed.refuses(kind, self.exchanged) {
            Some(method) => Err(io::Error::new(io::ErrorKind::PermissionDenied, NotAllowed(method))),
            None => {
                self.exchanged = true;
                Ok(())
            }
        }
    }

    fn watch(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.body_left > 0 && self.request.is_some() {
                self.watch_request(bytes[0])?;
                self.body_left -= 1;
                bytes = &bytes[1..];
                continue;
            }
            if self.body_left > 0 {
                let skipped = bytes.len().min(usize::try_from(self.body_left).unwrap_or(usize::MAX));
                self.body_left -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            self.header[self.header_filled] = bytes[0];
            self.header_filled += 1;
            bytes = &bytes[1..];
            if self.header_filled == self.header.len() {
                self.header_filled = 0;
                let length = u32::from_be_bytes([self.header[1], self.header[2], self.header[3], self.header[4]]);
                if length < 4 || length > self.length_max {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("the server announced a message of {length} bytes"),
                    ));
                }
                self.ready |= self.header[0] == b'Z';
                if !self.ready || self.header[0] == b'S' {
                    self.kept += u64::from(length) + 1;
                }
                if self.kept > KEPT_MAX {
                    let what = if self.ready { "parameters without an end" } else { "a login without an end" };
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the server sends {what}")));
                }
                self.body_left = u64::from(length - 4);
                self.request = (self.allowed.is_some() && self.header[0] == b'R').then_some((0, 0));
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for BoundedFrames<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => Poll::Ready(this.watch(&buf.filled()[before..])),
            other => other,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for BoundedFrames<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_beyond_the_bound_is_refused_however_it_is_cut() {
        let good = [b"Z\0\0\0\x05I".as_slice(), b"S\0\0\0\x04"].concat();
        let huge = [good.as_slice(), b"D\x7f\xff\xff\xff"].concat();
        for step in 1..huge.len() {
            let feed = |bytes: &[u8]| {
                let mut guard = BoundedFrames::new((), 1000, AllowedMethods::ALL);
                bytes.chunks(step).try_for_each(|chunk| guard.watch(chunk))
            };
            assert!(feed(&good).is_ok());
            assert!(feed(&huge).is_err(), "step {step}");
        }
        assert!(BoundedFrames::new((), 1000, AllowedMethods::ALL).watch(b"Z\0\0\0\x03").is_err());
    }

    /// Each was kept, for as long as `connect_timeout` lets a server send, or for as long as the connection lives.
    #[test]
    fn a_login_and_parameters_without_an_end_are_refused() {
        use crate::postgres::wire::testing::frame;
        let most = usize::try_from(KEPT_MAX).unwrap();
        let fed = |messages: &[Vec<u8>]| {
            let mut guard = BoundedFrames::new((), 4 << 20, AllowedMethods::ALL);
            messages.iter().try_for_each(|bytes| bytes.chunks(5000).try_for_each(|chunk| guard.watch(chunk)))
        };
        let ready = frame(b'Z', b"I");
        for tag in [b'S', b'N', b'A', b'K'] {
            for length in [10, 60_000, most] {
                let message = frame(tag, &vec![b'x'; length]);
                let enough = most / message.len() + 1;
                assert!(fed(&[message.repeat(enough)]).is_err(), "{} {length}", char::from(tag));
                assert!(fed(&[message.repeat(enough - 1)]).is_ok(), "{} {length}", char::from(tag));
                let behind = fed(&[ready.clone(), message.repeat(enough)]);
                assert_eq!(behind.is_err(), tag == b'S', "{} {length}", char::from(tag));
            }
        }
        let rows = frame(b'D', &vec![b'x'; 60_000]).repeat(100);
        assert!(fed(&[ready, rows]).is_ok());
    }

    #[test]
    fn only_other_machines_have_to_prove_who_they_are() {
        let table = [
            ("127.0.0.1", false),
            ("127.9.9.9", false),
            ("::1", false),
            ("::ffff:127.0.0.1", false),
            ("10.0.0.1", true),
        ];
        for (address, elsewhere) in table {
            assert_eq!(is_elsewhere(address.parse().unwrap()), elsewhere, "{address}");
        }
    }

    #[test]
    fn a_request_that_is_not_allowed_is_held_back_however_it_is_cut() {
        let request = |kind: u8| [b"R\0\0\0\x08\0\0\0".as_slice(), &[kind]].concat();
        let scram = [request(10), request(11), request(12), request(0), request(3)].concat();
        for (allowed, bytes, fine) in [
            ("scram-sha-256", scram, true),
            ("scram-sha-256", request(3), false),
            ("scram-sha-256", request(5), false),
            ("scram-sha-256", request(0), false),
            ("md5", request(10), false),
            ("!none", [request(5), request(0)].concat(), true),
            ("!none", request(0), false),
            ("none", request(0), true),
        ] {
            for step in 1..10 {
                let mut guard = BoundedFrames::new((), 1000, AllowedMethods::parse(allowed).unwrap());
                let watched = bytes.chunks(step).try_for_each(|chunk| guard.watch(chunk));
                assert_eq!(watched.is_ok(), fine, "{allowed} {bytes:?} {step}");
            }
        }
    }
}
