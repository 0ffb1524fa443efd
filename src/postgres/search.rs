//! Which host is connected to, and at which of its addresses: one after the other, each with `connect_timeout` for itself.
//!
//! Source: `PQconnectPoll` and `pqConnectDBComplete` in PostgreSQL `src/interfaces/libpq/fe-connect.c`. Unlike there, a host that refuses
//! the login does not end the search.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::PostgresError;
use super::hosts::{Host, Place};
use super::settings::ConnectSettings;

/// A name with more addresses than this is not one server's.
const ADDRESSES_MAX: usize = 64;
/// Of so many hosts the reasons are told.
const TOLD_MAX: usize = 8;

/// Where one attempt goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// The first host on which `attempt` succeeds.
pub(super) async fn first_host<T, F>(
    settings: &ConnectSettings,
    attempt: impl Fn(usize, Host, Address) -> F,
) -> Result<T, PostgresError>
where
    F: Future<Output = Result<T, PostgresError>>,
{
    let limit = settings.connect_timeout;
    let mut failed = Vec::new();
    for (index, host) in settings.order() {
        let found = match within(host, limit, addresses(host, settings.shuffle)).await {
            Ok(addresses) => {
                first_address(host, limit, addresses, |address| attempt(index, host.clone(), address)).await
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => return Ok(found),
            Err(error) => failed.push((host.to_string(), error)),
        }
    }
    Err(none_of(failed))
}

/// An address that cannot be reached, or from which nothing has come of it within `limit`, is passed over. What else is said there counts
/// for the whole host.
async fn first_address<T, F>(
    host: &Host,
    limit: Duration,
    addresses: Vec<Address>,
    attempt: impl Fn(Address) -> F,
) -> Result<T, PostgresError>
where
    F: Future<Output = Result<T, PostgresError>>,
{
    let mut last = None;
    for address in addresses {
        match within(host, limit, attempt(address)).await {
            Err(error @ (PostgresError::Connect { .. } | PostgresError::ConnectTimeout { .. })) => last = Some(error),
            other => return other,
        }
    }
    Err(last.unwrap_or_else(|| PostgresError::Connect {
        target: host.to_string(),
        source: io::Error::new(io::ErrorKind::NotFound, "the name has no address"),
    }))
}

async fn within<T>(
    host: &Host,
    limit: Duration,
    work: impl Future<Output = Result<T, PostgresError>>,
) -> Result<T, PostgresError> {
    let late = || PostgresError::ConnectTimeout { target: host.to_string(), limit };
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(late()))
}

/// Where the host is, in the order in which it is to be tried; in any order with `shuffle`.
async fn addresses(host: &Host, shuffle: bool) -> Result<Vec<Address>, PostgresError> {
    let mut found: Vec<SocketAddr> = match &host.place {
        Place::Socket(_) | Place::DefaultSocket => {
            return Ok(vec![Address::Unix(host.socket_path().unwrap_or_default())]);
        }
        Place::Tcp { address: Some(address), .. } => vec![(*address, host.port).into()],
        Place::Tcp { name, address: None } => {
            let looked_up = tokio::net::lookup_host((name.as_str(), host.port)).await;
            let failed = |source| PostgresError::Connect { target: host.to_string(), source };
            looked_up.map_err(failed)?.take(ADDRESSES_MAX).collect()
        }
    };
    if shuffle {
        found.sort_by_cached_key(|_| uuid::Uuid::new_v4());
    }
    Ok(found.into_iter().map(Address::Tcp).collect())
}

/// Of several hosts all reasons are told. The first that is not merely the other part of primary and standby is the one to act on.
fn none_of(mut failed: Vec<(String, PostgresError)>) -> PostgresError {
    if failed.len() < 2 {
        let only = failed.pop().map(|(_, error)| error);
        return only.unwrap_or_else(|| PostgresError::settings("no host is named"));
    }
    let tried = failed.iter().map(|(host, _)| host.as_str()).collect::<Vec<_>>().join(", ");
    let telling = failed.iter().position(|(_, error)| !matches!(error, PostgresError::SessionAttributes { .. }));
    let (host, source) = failed.remove(telling.unwrap_or(0));
    let mut others: Vec<String> = failed.iter().take(TOLD_MAX).map(|(host, error)| told(host, error)).collect();
    if failed.len() > TOLD_MAX {
        others.push(format!("{} more", failed.len() - TOLD_MAX));
    }
    // Most errors name their host themselves.
    let whose = if chain(&source).contains(&host) { String::new() } else { format!(", {host}") };
    PostgresError::NoHost { tried, others: others.join(", and "), whose, source: Box::new(source) }
}

fn told(host: &str, error: &PostgresError) -> String {
    let text = chain(error);
    if text.contains(host) { text } else { format!("{host}: {text}") }
}

/// The error and its causes in one line.
fn chain(error: &PostgresError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::failure::NextStep;
    use crate::postgres::wire::testing::frame;
    use crate::postgres::{ReplicationConnection, ServerMessage};

    fn settings(url: &str, limit: Duration) -> ConnectSettings {
        ConnectSettings::resolve(url, None, "walden", limit, &|_| None).ok().unwrap()
    }

    /// Lets everybody in.
    async fn willing() -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let welcome = [frame(b'R', &[0; 4]), frame(b'S', b"server_version\x0015.18\0"), frame(b'Z', b"I")].concat();
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(&welcome).await;
                tokio::spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await });
            }
        });
        (address, server)
    }

    /// The first address of a name used all of `connect_timeout` up, every time, and the next one was never tried.
    #[tokio::test]
    async fn each_address_of_a_name_has_its_own_time() {
        let limit = Duration::from_millis(300);
        // The kernel takes the connection, and nobody answers.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (answering, _server) = willing().await;
        let settings = settings("host=name user=u sslmode=disable", limit);
        let all = [silent.local_addr().unwrap(), refusing, answering].map(Address::Tcp).to_vec();
        let tried = std::sync::Mutex::new(Vec::new());
        let attempt = |address: Address| {
            tried.lock().unwrap().push(address.clone());
            let settings = settings.clone();
            async move { ReplicationConnection::enter(&settings, &settings.hosts[0].clone(), &address, 0).await }
        };
        let begun = Instant::now();
        let found = first_address(&settings.hosts[0], limit, all.clone(), attempt).await;
        assert!(found.is_ok(), "{:?}", found.err());
        assert_eq!(*tried.lock().unwrap(), all);
        assert!(begun.elapsed() >= limit);

        let error = first_address(&settings.hosts[0], limit, all[..1].to_vec(), attempt).await.err().unwrap();
        assert!(matches!(error, PostgresError::ConnectTimeout { .. }), "{error:?}");
        assert!(first_address(&settings.hosts[0], limit, Vec::new(), attempt).await.is_err());
    }

    fn refused() -> PostgresError {
        PostgresError::PasswordRefused { target: "db1:5432".into(), user: "u".into(), source: Box::default() }
    }

    fn standby() -> PostgresError {
        PostgresError::SessionAttributes { target: "db2:5432".into(), wanted: "primary" }
    }

    fn starting() -> PostgresError {
        let source = ServerMessage { message: "the database system is starting up".into(), ..ServerMessage::default() };
        PostgresError::NotReady { source: Box::new(source) }
    }

    fn none(errors: Vec<(&str, PostgresError)>) -> PostgresError {
        none_of(errors.into_iter().map(|(host, error)| (host.to_owned(), error)).collect())
    }

    /// Only the last host's reason was told, and the wrong password of the primary never.
    #[test]
    fn of_several_hosts_all_reasons_are_told_and_the_one_to_act_on_decides() {
        for errors in [
            vec![("db1:5432", refused()), ("db2:5432", standby())],
            vec![("db2:5432", standby()), ("db1:5432", refused())],
        ] {
            let error = none(errors);
            let text = chain(&error);
            assert!(text.contains("db1:5432 refused the password") && text.contains("db2:5432 is not what"), "{text}");
            assert!(error.is_auth() && error.hint().contains("password"), "{text}");
            assert_eq!(error.next_step(), NextStep::Retry);
        }
        let text = chain(&none(vec![("db2:5432", standby()), ("db3:5432", starting())]));
        assert!(text.contains("), db3:5432: the server is starting up"), "{text}");
        let text = chain(&none(vec![("db1:5432", refused()), ("db3:5432", starting())]));
        assert!(text.contains("(db3:5432: the server is starting up"), "{text}");
        // What to do is told behind the first semicolon.
        assert!(!text.contains(';'), "{text}");
        assert!(matches!(none(vec![("db2:5432", standby())]), PostgresError::SessionAttributes { .. }));
        let many = (0..20).map(|_| ("db1:5432", refused())).collect();
        let text = none(many).to_string();
        assert!(text.contains("11 more") && text.matches("refused").count() == TOLD_MAX, "{text}");
    }

    #[tokio::test]
    async fn a_host_that_refuses_does_not_end_the_search() {
        let (answering, _server) = willing().await;
        let url = format!("host=127.0.0.1,127.0.0.1 port=1,{} user=u sslmode=disable", answering.port());
        let found = ReplicationConnection::connect(&settings(&url, Duration::from_secs(5))).await;
        assert_eq!(found.ok().unwrap().host_index(), 1);
    }
}
