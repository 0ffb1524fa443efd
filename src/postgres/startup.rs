//! From a socket to a server that is ready: start-up message and authentication.
//!
//! Source: "Start-up" and "SASL Authentication" in the protocol chapter of PostgreSQL's documentation.

use bytes::{Buf, Bytes};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::frontend;

use super::asked::Asked;
use super::door;
use super::hosts::Host;
use super::search::Address;
use super::settings::ConnectSettings;
use super::socket::{Socket, Transport};
use super::tls::{self, Binding, TlsFacts};
use super::wire::{Wire, unexpected};
use super::{PostgresError, Secret};

/// `.pgpass` and pg_hba.conf call a physical replication connection's database so.
pub(super) const REPLICATION_DATABASE: &str = "replication";

/// Connects to one address of a host and goes through authentication until the server is ready for a replication command.
/// The caller bounds the time.
pub(super) async fn establish(
    settings: &ConnectSettings,
    host: &Host,
    address: &Address,
) -> Result<Wire, PostgresError> {
    door::enter(settings, host, address, |socket| log_in(socket, settings, host)).await
}

pub(super) async fn log_in(socket: Socket, settings: &ConnectSettings, host: &Host) -> Result<Wire, PostgresError> {
    let entered = log_in_over(socket, settings, host).await;
    entered.map_err(|error| match error {
        PostgresError::Disconnected { source: Some(source) } => match tls::of_io(&source) {
            Some(tls) => PostgresError::Tls { target: host.to_string(), source: Box::new(tls) },
            None => PostgresError::Disconnected { source: Some(source) },
        },
        other => other,
    })
}

async fn log_in_over(socket: Socket, settings: &ConnectSettings, host: &Host) -> Result<Wire, PostgresError> {
    let (over, tls) = (socket.transport(), socket.tls().cloned());
    let mut wire = Wire::new(socket);
    let mut parameters = vec![("user", settings.user.as_str()), ("replication", "true"), ("client_encoding", "UTF8")];
    if !settings.application_name.is_empty() {
        parameters.push(("application_name", &settings.application_name));
    }
    if let Some(options) = &settings.options {
        parameters.push(("options", options));
    }
    wire.queue(|out| frontend::startup_message(parameters, out))?;
    wire.send().await?;
    let target = host.to_string();
    Authentication { settings, host, target: &target, wire: &mut wire, over, tls, exchanged: false }.run().await?;
    wire.admitted();
    loop {
        match wire.message().await? {
            // BackendKeyData: cancel requests are never sent.
            (b'K', _) => {}
            (b'Z', _) => return Ok(wire),
            (b'E', body) => return Err(refused(&target, settings, over, &body)),
            (tag, _) => return Err(unexpected(tag, "the authentication")),
        }
    }
}

fn refused(target: &str, settings: &ConnectSettings, over: Transport, body: &[u8]) -> PostgresError {
    Asked::Startup { target, user: &settings.user, over, database: None }.classify(super::answer::parse_error(body))
}

struct Authentication<'a> {
    settings: &'a ConnectSettings,
    host: &'a Host,
    target: &'a str,
    wire: &'a mut Wire,
    over: Transport,
    tls: Option<TlsFacts>,
    exchanged: bool,
}

impl Authentication<'_> {
    async fn run(&mut self) -> Result<(), PostgresError> {
        loop {
            let (kind, mut body) = self.request().await?;
            if self.exchanged && kind != 0 {
                // A second exchange would let a hostile server collect further proofs.
                return Err(PostgresError::protocol("the server asks for a second authentication"));
            }
            if let Some(method) = self.settings.allowed.refuses(kind, self.exchanged) {
                return Err(self.cannot(&format!("it asks for {method}, and require_auth does not allow that")));
            }
            // Only SCRAM can bind, and does so below.
            if self.settings.tls.binding == Binding::Require && !self.exchanged && kind != 10 {
                return Err(
                    self.cannot("it does not bind the login to the connection, as channel_binding=require wants")
                );
            }
            self.exchanged = true;
            match kind {
                0 => return Ok(()),
                3 => {
                    let password = self.password().await?;
                    self.answer(password.expose()).await?;
                }
                5 => {
                    let mut salt = [0; 4];
                    body.try_copy_to_slice(&mut salt).map_err(|_| PostgresError::protocol("the md5 salt is short"))?;
                    let password = self.password().await?;
                    let hash = md5_hash(self.settings.user.as_bytes(), password.expose(), salt);
                    self.answer(hash.as_bytes()).await?;
                }
                10 => {
                    self.scram(&body).await?;
                }
                7..=9 => return Err(self.cannot("it asks for GSSAPI or SSPI")),
                other => return Err(self.cannot(&format!("it asks for method {other}"))),
            }
        }
    }

    /// The next authentication request: its kind and the rest of it.
    async fn request(&mut self) -> Result<(u32, Bytes), PostgresError> {
        match self.wire.message().await? {
            (b'R', mut body) => {
                let kind = body.try_get_u32().map_err(|_| PostgresError::protocol("a short authentication request"))?;
                Ok((kind, body))
            }
            (b'E', body) => Err(refused(self.target, self.settings, self.over, &body)),
            (b'v', _) => Err(PostgresError::protocol("protocol 3.0 is not spoken there")),
            (tag, _) => Err(unexpected(tag, "the start-up message")),
        }
    }

    fn cannot(&self, why: &str) -> PostgresError {
        PostgresError::AuthenticationMethod { target: self.target.into(), why: why.into() }
    }

    fn not_proven(&self, why: impl ToString) -> PostgresError {
        PostgresError::ServerNotProven { target: self.target.into(), why: why.to_string() }
    }

    async fn password(&self) -> Result<Secret, PostgresError> {
        let (settings, host) = (self.settings.clone(), self.host.clone());
        let read = tokio::task::spawn_blocking(move || settings.password_for(&host, REPLICATION_DATABASE));
        let (password, note) = read.await.map_err(|error| PostgresError::settings(error.to_string()))??;
        password.ok_or_else(|| PostgresError::PasswordMissing {
            target: self.target.into(),
            user: self.settings.user.clone(),
            note,
        })
    }

    async fn answer(&mut self, password: &[u8]) -> Result<(), PostgresError> {
        self.wire.queue(|out| frontend::password_message(password, out))?;
        self.wire.send().await
    }

    /// The best that server, connection and `channel_binding` have in common. "Unrequested" tells the server that we would have bound, so
    /// that somebody in between who removed its offer is found out.
    ///
    /// Source: `pg_SASL_init` in PostgreSQL `src/interfaces/libpq/fe-auth.c`.
    fn mechanism(&self, offered: &[u8]) -> Result<(&'static str, ChannelBinding), PostgresError> {
        let offers = |wanted: &str| offered.split(|&b| b == 0).any(|name| name == wanted.as_bytes());
        let wanted = self.settings.tls.binding;
        let end_point = self.tls.as_ref().filter(|_| wanted != Binding::Disable).map(|tls| tls.end_point.clone());
        if offers(SCRAM_SHA_256_PLUS) {
            if self.tls.is_none() {
                return Err(self.not_proven("it offers SCRAM-SHA-256-PLUS without TLS"));
            }
            if let Some(Some(end_point)) = end_point {
                return Ok((SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(end_point)));
            }
        }
        if wanted == Binding::Require {
            return Err(self.cannot(match end_point {
                None => "channel_binding=require needs TLS, and this connection has none",
                Some(None) => "the signature of its certificate has no hash that channel_binding=require could bind to",
                Some(Some(_)) => "it does not offer SCRAM-SHA-256-PLUS, which channel_binding=require wants",
            }));
        }
        if !offers(SCRAM_SHA_256) {
            return Err(self.cannot("it asks for a SASL mechanism other than SCRAM-SHA-256"));
        }
        Ok((
            SCRAM_SHA_256,
            match end_point {
                Some(Some(_)) => ChannelBinding::unrequested(),
                _ => ChannelBinding::unsupported(),
            },
        ))
    }

    async fn scram(&mut self, mechanisms: &[u8]) -> Result<(), PostgresError> {
        let (mechanism, binding) = self.mechanism(mechanisms)?;
        let password = self.password().await?;
        let mut scram = ScramSha256::new(password.expose(), binding);
        self.wire.queue(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))?;
        self.wire.send().await?;
        let (11, challenge) = self.request().await? else {
            return Err(PostgresError::protocol("the SASL exchange has no challenge"));
        };
        // Up to 100,000 rounds of HMAC: not on a runtime's worker.
        let answered = tokio::task::spawn_blocking(move || scram.update(&challenge).map(|()| scram)).await;
        let mut scram = answered.map_err(|error| self.not_proven(error))?.map_err(|error| {
            if error.to_string().contains("iteration count") {
                return self.cannot("its scram_iterations pass 100,000, the most that Walden does");
            }
            self.not_proven(error)
        })?;
        self.wire.queue(|out| frontend::sasl_response(scram.message(), out))?;
        self.wire.send().await?;
        let (12, proof) = self.request().await? else {
            return Err(self.not_proven("it ended the exchange early"));
        };
        scram.finish(&proof).map_err(|error| self.not_proven(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::wire::testing::{frame, scripted_socket};
    use std::time::Duration;

    async fn log_in_with(options: &str, messages: &[Vec<u8>]) -> Result<Wire, PostgresError> {
        let url = format!("host=h user=u {options}");
        let settings = ConnectSettings::resolve(&url, None, "walden", Duration::from_secs(5), &|_| None)?;
        let host = settings.hosts[0].clone();
        log_in(scripted_socket(messages.concat(), 5), &settings, &host).await
    }

    fn request(kind: u32, rest: &[u8]) -> Vec<u8> {
        frame(b'R', &[&kind.to_be_bytes()[..], rest].concat())
    }

    fn ready() -> Vec<u8> {
        [frame(b'S', b"server_version\x0015.18\0"), frame(b'K', &[0; 8]), frame(b'Z', b"I")].concat()
    }

    #[tokio::test]
    async fn trust_password_and_md5_are_answered() {
        let salt = request(5, &[1, 2, 3, 4]);
        for messages in [vec![], vec![request(3, b"")], vec![salt.clone()]] {
            let all = [messages, vec![request(0, b""), ready()]].concat();
            let wire = log_in_with("password=p", &all).await.unwrap();
            assert_eq!(wire.parameter("server_version"), Some("15.18"));
        }
        let without = log_in_with("", &[salt]).await.err().unwrap();
        assert!(matches!(without, PostgresError::PasswordMissing { .. }));
    }

    #[tokio::test]
    async fn what_require_auth_excludes_gets_no_password() {
        for (allowed, messages) in [
            ("scram-sha-256", vec![request(3, b"")]),
            ("scram-sha-256", vec![request(5, &[0; 4])]),
            ("!none", vec![request(0, b""), ready()]),
            ("md5", vec![request(10, b"SCRAM-SHA-256\0\0")]),
        ] {
            let error = log_in_with(&format!("password=p require_auth={allowed}"), &messages).await.err().unwrap();
            assert!(matches!(error, PostgresError::AuthenticationMethod { .. }), "{allowed}: {error:?}");
        }
    }

    #[tokio::test]
    async fn a_hostile_server_is_refused() {
        let sasl = request(10, b"SCRAM-SHA-256\0\0");
        let nonce = "x".repeat(30);
        let cases = [
            // It lets us in without having proved that it knows the password.
            vec![sasl.clone(), request(0, b""), ready()],
            vec![sasl.clone(), request(11, b"r=other,s=AAAA,i=4096")],
            vec![sasl.clone(), request(11, format!("r={nonce},s=AAAA,i=4294967295").as_bytes())],
            vec![sasl.clone(), request(11, b"\xff\xfe")],
            vec![sasl.clone(), sasl.clone()],
            vec![request(10, b"SCRAM-SHA-1\0\0")],
            vec![request(3, b""), request(3, b"")],
            vec![request(5, b"ab")],
            vec![request(7, b"")],
            vec![request(99, b"")],
            vec![frame(b'R', b"a")],
            vec![ready()],
            vec![frame(b'v', &[0; 8])],
            vec![[b"E".as_slice(), &70_000_u32.to_be_bytes()].concat()],
            vec![request(0, b""), frame(b'D', b"")],
        ];
        for (at, messages) in cases.into_iter().enumerate() {
            let error = log_in_with("password=p", &messages).await.err().unwrap();
            let fits = matches!(
                error,
                PostgresError::Protocol { .. }
                    | PostgresError::ServerNotProven { .. }
                    | PostgresError::AuthenticationMethod { .. }
            );
            assert!(fits, "{at}: {error:?}");
            assert!(!format!("{error:?}").contains("password=p"));
        }
    }
}
