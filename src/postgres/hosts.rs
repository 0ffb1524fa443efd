//! Where the server may be: hosts, ports, sockets, and how a TCP connection to them is kept alive.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::PostgresError;
use super::conninfo::{ESCAPES, shown};
use super::options::Options;

const DEFAULT_PORT: u16 = 5432;
/// Debian's folder for sockets, then the one of a PostgreSQL built without changes.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];
const HOSTS_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) place: Place,
    pub(super) port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The first of `SOCKET_DIRECTORIES` that has the socket.
    DefaultSocket,
    /// A folder with sockets.
    Socket(PathBuf),
    Tcp {
        name: String,
        address: Option<IpAddr>,
    },
}

/// TCP keepalive: a peer that vanished is noticed after `idle + count * interval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalive {
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    /// How long what was sent may stay without the peer's word that it has it; 0 = the kernel's a quarter of an hour.
    pub(super) user_timeout: Duration,
}

impl Host {
    /// The socket's path, `None` for TCP.
    ///
    /// Source: `UNIXSOCK_PATH` in PostgreSQL `src/include/libpq/pqcomm.h`.
    pub(super) fn socket_path(&self) -> Option<PathBuf> {
        let in_directory = |directory: &Path| directory.join(format!(".s.PGSQL.{}", self.port));
        match &self.place {
            Place::Tcp { .. } => None,
            Place::Socket(directory) => Some(in_directory(directory)),
            Place::DefaultSocket => {
                let paths = SOCKET_DIRECTORIES.map(|directory| in_directory(Path::new(directory)));
                let there = paths.iter().find(|path| path.exists());
                Some(there.unwrap_or(&paths[0]).clone())
            }
        }
    }

    pub(super) fn is_tcp(&self) -> bool {
        matches!(self.place, Place::Tcp { .. })
    }

    /// The name (or address in its place) that a certificate has to have; `None`: only `hostaddr` is given.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.place {
            Place::Tcp { name, .. } if !name.is_empty() => Some(name),
            _ => None,
        }
    }

    pub(super) fn passfile_name(&self) -> String {
        match &self.place {
            Place::DefaultSocket => "localhost".into(),
            Place::Socket(path) if SOCKET_DIRECTORIES.iter().any(|default| path == Path::new(default)) => {
                "localhost".into()
            }
            Place::Socket(path) => path.display().to_string(),
            Place::Tcp { name, address } => match address {
                Some(address) if name.is_empty() => address.to_string(),
                _ => name.clone(),
            },
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp { name, address } if name.is_empty() => match address {
                Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
                Some(IpAddr::V4(address)) => write!(f, "{address}:{}", self.port),
                None => write!(f, "port {}", self.port),
            },
            Place::Tcp { name, .. } if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Place::Tcp { name, .. } => write!(f, "{name}:{}", self.port),
            Place::Socket(_) | Place::DefaultSocket => match self.socket_path() {
                Some(path) => write!(f, "{}", path.display()),
                None => write!(f, "port {}", self.port),
            },
        }
    }
}

/// `host`, `hostaddr` and `port` are lists of equal length; one port may stand for all.
pub(super) fn hosts(options: &Options) -> Result<Vec<Host>, PostgresError> {
    let list = |option: &str| -> Vec<String> {
        options.get(option).map(|text| text.split(',').map(|part| part.trim().to_owned()).collect()).unwrap_or_default()
    };
    let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = names.len().max(addresses.len()).max(1);
    let uneven = |other: &str| PostgresError::settings(format!("{other} does not name as many entries as host"));
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        return Err(uneven("hostaddr"));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(uneven("port"));
    }
    if count > HOSTS_MAX {
        return Err(PostgresError::settings(format!("more than {HOSTS_MAX} hosts are named")));
    }
    (0..count)
        .map(|at| {
            let port = match ports.get(if ports.len() == 1 { 0 } else { at }).map(String::as_str) {
                None | Some("") => DEFAULT_PORT,
                Some(text) => text.parse().ok().filter(|&port| port != 0).ok_or_else(|| wrong_port(text))?,
            };
            let name = names.get(at).cloned().unwrap_or_default();
            let address = match addresses.get(at).map(String::as_str) {
                None | Some("") => None,
                Some(text) => Some(text.parse::<IpAddr>().map_err(|_| {
                    PostgresError::settings(format!("hostaddr \"{}\" is not an IP address", shown(text)))
                })?),
            };
            let place = match (name, address) {
                (name, None) if name.is_empty() => Place::DefaultSocket,
                (name, None) if name.starts_with('/') => Place::Socket(name.into()),
                (name, None) if name.starts_with('@') => {
                    return Err(PostgresError::UnsupportedOption {
                        option: "host".into(),
                        why: "sockets in the abstract namespace are not supported".into(),
                    });
                }
                (name, address) => Place::Tcp { name, address },
            };
            Ok(Host { place, port })
        })
        .collect()
}

/// Keepalive is on unless told otherwise. libpq leaves the times to the kernel, which notices a vanished server after two hours;
/// here it takes a minute.
pub(super) fn keepalive(options: &Options) -> Result<Option<Keepalive>, PostgresError> {
    if options.number("keepalives")? == Some(0) {
        return Ok(None);
    }
    let seconds = |option: &str, default: u64| -> Result<Duration, PostgresError> {
        let number = options.number(option)?.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0);
        Ok(Duration::from_secs(number.unwrap_or(default).min(32_767)))
    };
    let count = options.number("keepalives_count")?.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0);
    let (idle, interval) = (seconds("keepalives_idle", 30)?, seconds("keepalives_interval", 10)?);
    let count = count.unwrap_or(3).min(127);
    // Keepalive is silent while something is unsent or unconfirmed; then this notices as soon.
    let user_timeout = match options.number("tcp_user_timeout")? {
        Some(milliseconds) => Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0)),
        None => idle + interval * count,
    };
    Ok(Some(Keepalive { idle, interval, count, user_timeout }))
}

/// Digits are shown; anything else may be a piece of a password that took the URL apart.
fn wrong_port(text: &str) -> PostgresError {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        PostgresError::settings(format!("{} is not a port (1 to 65535)", shown(text)))
    } else {
        PostgresError::settings(format!("the port is not a number (1 to 65535); {ESCAPES}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(url: &str) -> Vec<Host> {
        hosts(&Options::gather(url, &|_| None).ok().unwrap()).unwrap()
    }

    #[test]
    fn hosts_ports_and_addresses_are_paired() {
        let table = [
            ("host=a,b port=1,2", "a:1 b:2"),
            ("host=a,b port=9", "a:9 b:9"),
            ("host=a,/tmp,::1", "a:5432 /tmp/.s.PGSQL.5432 [::1]:5432"),
            ("postgres://[fe80::1]:7,x", "[fe80::1]:7 x:5432"),
            ("hostaddr=127.0.0.1 port=3", "127.0.0.1:3"),
            ("host=name hostaddr=127.0.0.1", "name:5432"),
            ("postgres:///db?host=/run/pg&port=6", "/run/pg/.s.PGSQL.6"),
        ];
        for (url, expected) in table {
            assert_eq!(of(url).iter().map(Host::to_string).collect::<Vec<_>>().join(" "), expected, "{url}");
        }
        assert_eq!(of("")[0].place, Place::DefaultSocket);
    }

    #[test]
    fn a_server_that_vanished_is_noticed_as_soon_with_unsent_bytes_as_without() {
        let user_timeout = |text: &str| {
            let options = Options::gather(text, &|_| None).ok().unwrap();
            keepalive(&options).unwrap().map(|keepalive| keepalive.user_timeout.as_millis())
        };
        let table = [
            ("", Some(60_000)),
            ("keepalives_idle=300 keepalives_interval=20 keepalives_count=5", Some(400_000)),
            ("tcp_user_timeout=9000", Some(9000)),
            ("tcp_user_timeout=0", Some(0)),
            ("keepalives=0 tcp_user_timeout=9000", None),
        ];
        for (text, expected) in table {
            assert_eq!(user_timeout(text), expected, "{text}");
        }
    }
}
