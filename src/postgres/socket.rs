//! The byte stream to a server: TCP or a Unix socket; TLS will be a further variant. Also a guard that bounds the frames which
//! `tokio-postgres` reads.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::PostgresError;
use super::hosts::{Host, Keepalive, Place};

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    #[cfg(test)]
    Scripted(tokio::io::DuplexStream),
}

impl Socket {
    /// Connects to one host; of several addresses of a name the first that answers. The caller bounds the time.
    pub(super) async fn connect(host: &Host, keepalive: Option<Keepalive>) -> Result<Self, PostgresError> {
        let failed = |source| PostgresError::Connect { target: host.to_string(), source };
        let addresses: Vec<SocketAddr> = match &host.place {
            Place::Socket(_) | Place::DefaultSocket => {
                let path = host.socket_path().unwrap_or_default();
                return UnixStream::connect(path).await.map(Self::Unix).map_err(failed);
            }
            Place::Tcp { address: Some(address), .. } => vec![(*address, host.port).into()],
            Place::Tcp { name, address: None } => {
                tokio::net::lookup_host((name.as_str(), host.port)).await.map_err(failed)?.collect()
            }
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(failed)?;
                    if let Some(keepalive) = keepalive {
                        set_keepalive(&stream, keepalive).map_err(failed)?;
                    }
                    return Ok(Self::Tcp(stream));
                }
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }
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
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(test)]
            Self::Scripted(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Passes bytes through and fails as soon as a message header announces more than `length_max` bytes.
///
/// `postgres-protocol` reserves whatever a header announces, up to 4 GiB; this keeps a hostile server from that (I17).
/// Only for a connection without TLS negotiation, where every byte from the server belongs to a message.
#[derive(Debug)]
pub(super) struct BoundedFrames<S> {
    inner: S,
    header: [u8; 5],
    header_filled: usize,
    /// Bytes of the current message that are still to come after its header.
    body_left: u64,
    length_max: u32,
}

impl<S> BoundedFrames<S> {
    pub(super) fn new(inner: S, length_max: u32) -> Self {
        Self { inner, header: [0; 5], header_filled: 0, body_left: 0, length_max }
    }

    fn watch(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
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
                self.body_left = u64::from(length - 4);
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
                let mut guard = BoundedFrames::new((), 1000);
                bytes.chunks(step).try_for_each(|chunk| guard.watch(chunk))
            };
            assert!(feed(&good).is_ok());
            assert!(feed(&huge).is_err(), "step {step}");
        }
        assert!(BoundedFrames::new((), 1000).watch(b"Z\0\0\0\x03").is_err());
    }
}
