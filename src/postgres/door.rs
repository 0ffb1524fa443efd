//! From an address to a socket that is ready for the start-up message, encrypted as `sslmode` wants it, and what is tried when the server
//! does not let us in that way.
//!
//! Source: "SSL Session Encryption" in the protocol chapter of PostgreSQL's documentation; `PQconnectPoll` in
//! `src/interfaces/libpq/fe-connect.c`.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::PostgresError;
use super::hosts::Host;
use super::search::Address;
use super::settings::ConnectSettings;
use super::socket::Socket;
use super::tls::{self, SslMode, TlsError, TlsSocket};

/// `NEGOTIATE_SSL_CODE` of `src/include/libpq/pqcomm.h`, behind the message's length.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Plain,
    /// TLS; without it on the same connection if the server has none.
    TlsIfOffered,
    Tls,
}

/// A Unix socket needs no TLS whatever is asked for.
fn ways(mode: SslMode, is_tcp: bool) -> &'static [Way] {
    match mode {
        _ if !is_tcp => &[Way::Plain],
        SslMode::Disable => &[Way::Plain],
        SslMode::Allow => &[Way::Plain, Way::Tls],
        SslMode::Prefer => &[Way::TlsIfOffered, Way::Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Way::Tls],
    }
}

/// Connects to an address of a host and logs in with `log_in`, in each way that `sslmode` allows until the server lets us in. The caller bounds the time.
///
/// `prefer` goes on without TLS if TLS fails (a certificate that is not trusted included) or the server refuses the login; `allow` goes on
/// with TLS if the server refuses the login.
pub(super) async fn enter<T, F>(
    settings: &ConnectSettings,
    host: &Host,
    address: &Address,
    log_in: impl Fn(Socket) -> F,
) -> Result<T, PostgresError>
where
    F: Future<Output = Result<T, PostgresError>>,
{
    let ways = ways(settings.tls.mode, host.is_tcp());
    let mut first = None;
    for (at, &way) in ways.iter().enumerate() {
        let (error, may_differ) = match open(settings, host, address, way).await {
            Ok(socket) => {
                let as_asked = socket.tls().is_some() == (way != Way::Plain);
                match log_in(socket).await {
                    Ok(done) => return Ok(done),
                    Err(error) => {
                        let refused = is_refusal(&error);
                        (error, as_asked && refused)
                    }
                }
            }
            Err(error) => {
                let is_tls = matches!(error, PostgresError::Tls { .. });
                (error, is_tls)
            }
        };
        let error = match first {
            Some(first) => more_telling(first, error),
            None => error,
        };
        if !may_differ || at + 1 == ways.len() {
            return Err(error);
        }
        first = Some(error);
    }
    Err(first.unwrap_or_else(|| PostgresError::settings("no way to connect is left")))
}

/// The server's own refusal of a login, which may differ with and without TLS.
fn is_refusal(error: &PostgresError) -> bool {
    matches!(
        error,
        PostgresError::NoHbaLine { .. }
            | PostgresError::PasswordRefused { .. }
            | PostgresError::NoRole { .. }
            | PostgresError::Refused { .. }
    )
}

/// Of two ways that failed, the one whose error says what to repair: not that the other way has no line in pg_hba.conf.
fn more_telling(first: PostgresError, second: PostgresError) -> PostgresError {
    match &second {
        PostgresError::NoHbaLine { .. } => first,
        PostgresError::Tls { source, .. } if matches!(**source, TlsError::NotOffered { .. }) => first,
        _ => second,
    }
}

async fn open(settings: &ConnectSettings, host: &Host, address: &Address, way: Way) -> Result<Socket, PostgresError> {
    let failed = |source| PostgresError::Connect { target: host.to_string(), source };
    let socket = Socket::connect(address, settings.keepalive).await.map_err(failed)?;
    let Socket::Tcp(mut stream) = socket else { return Ok(socket) };
    let without = |source: TlsError| PostgresError::Tls { target: host.to_string(), source: Box::new(source) };
    if way == Way::Plain {
        return Ok(Socket::Tcp(stream));
    }
    let tls = &settings.tls;
    if !tls.direct {
        stream.write_all(&SSL_REQUEST).await.map_err(failed)?;
        // One byte and no more: whatever else came before the handshake is then taken for a part of it, and fails there.
        match stream.read_u8().await.map_err(failed)? {
            b'S' => {}
            b'N' if way == Way::TlsIfOffered => return Ok(Socket::Tcp(stream)),
            b'N' => return Err(without(TlsError::NotOffered { mode: tls.mode })),
            // The text behind it is not shown: nobody vouches for it.
            b'E' => return Err(PostgresError::protocol("the request for TLS was answered with an error")),
            _ => return Err(PostgresError::protocol("the request for TLS was answered with neither yes nor no")),
        }
    }
    let socket: TlsSocket = tls::handshake(tls, host.name(), stream).await.map_err(without)?;
    Ok(Socket::Tls(Box::new(socket)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_has_its_ways() {
        assert_eq!(ways(SslMode::Prefer, true), [Way::TlsIfOffered, Way::Plain]);
        assert_eq!(ways(SslMode::Allow, true), [Way::Plain, Way::Tls]);
        for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
            assert_eq!(ways(mode, true), [Way::Tls]);
            assert_eq!(ways(mode, false), [Way::Plain], "a Unix socket");
        }
        assert_eq!(ways(SslMode::Disable, true), [Way::Plain]);
    }

    #[test]
    fn the_error_that_says_what_to_repair_is_kept() {
        let no_line = || PostgresError::NoHbaLine {
            target: "h".into(),
            user: "u".into(),
            over: super::super::socket::Transport::Plain,
            source: Box::default(),
        };
        let refused =
            || PostgresError::PasswordRefused { target: "h".into(), user: "u".into(), source: Box::default() };
        let tls = |error| PostgresError::Tls { target: "h".into(), source: Box::new(error) };
        let not_offered = || tls(TlsError::NotOffered { mode: SslMode::Allow });
        assert!(matches!(more_telling(refused(), no_line()), PostgresError::PasswordRefused { .. }));
        assert!(matches!(more_telling(no_line(), refused()), PostgresError::PasswordRefused { .. }));
        assert!(matches!(more_telling(tls(TlsError::Unreadable), no_line()), PostgresError::Tls { .. }));
        assert!(matches!(more_telling(refused(), not_offered()), PostgresError::PasswordRefused { .. }));
        assert!(matches!(more_telling(no_line(), tls(TlsError::Unreadable)), PostgresError::Tls { .. }));
    }
}
