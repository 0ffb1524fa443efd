//! libpq's options for TLS. What they name is read at each connection; only what can never work is refused here.

use std::fmt;
use std::path::{Path, PathBuf};

use super::super::PostgresError;
use super::super::conninfo::shown;
use super::super::options::Options;

/// `sslmode`. Each one asks for more than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    const ALL: [Self; 6] = [Self::Disable, Self::Allow, Self::Prefer, Self::Require, Self::VerifyCa, Self::VerifyFull];

    fn name(self) -> &'static str {
        match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        }
    }
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A protocol version; the ones before 1.2 are never spoken, but may be named as a lower bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::postgres) enum Version {
    Older,
    Tls12,
    Tls13,
}

/// `channel_binding`: whether SCRAM ties the password's proof to the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::postgres) enum Binding {
    Disable,
    Prefer,
    Require,
}

/// `sslcertmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::postgres) enum CertMode {
    Disable,
    Allow,
    Require,
}

#[derive(Clone, Debug)]
pub(in crate::postgres) enum Roots {
    System,
    /// libpq's default or what `sslrootcert` names; `None`: there is no home to look in.
    File(Option<PathBuf>),
}

/// One file or folder, and whether the user named it.
#[derive(Clone, Debug)]
pub(in crate::postgres) struct Named {
    pub(in crate::postgres) path: PathBuf,
    pub(in crate::postgres) given: bool,
}

#[derive(Clone, Debug)]
pub(in crate::postgres) struct TlsSettings {
    pub(in crate::postgres) mode: SslMode,
    /// TLS at once, without asking for it first.
    pub(in crate::postgres) direct: bool,
    pub(in crate::postgres) roots: Roots,
    pub(in crate::postgres) list: Option<Named>,
    pub(in crate::postgres) list_folder: Option<PathBuf>,
    pub(in crate::postgres) certificate: Option<PathBuf>,
    pub(in crate::postgres) key: Option<PathBuf>,
    pub(in crate::postgres) cert_mode: CertMode,
    pub(in crate::postgres) send_name: bool,
    pub(in crate::postgres) oldest: Version,
    pub(in crate::postgres) newest: Version,
    pub(in crate::postgres) binding: Binding,
}

impl TlsSettings {
    /// Source: `pqConnectOptions2` in PostgreSQL `src/interfaces/libpq/fe-connect.c`.
    pub(in crate::postgres) fn resolve(options: &Options, home: Option<&Path>) -> Result<Self, PostgresError> {
        let in_home = |name: &str| home.map(|home| home.join(".postgresql").join(name));
        let path = |option: &str| options.get(option).map(PathBuf::from);
        let roots = match options.get("sslrootcert") {
            Some("system") => Roots::System,
            Some(path) => Roots::File(Some(path.into())),
            None => Roots::File(in_home("root.crt")),
        };
        let mode = match options.get("sslmode") {
            Some(text) => choose("sslmode", text, &SslMode::ALL.map(|mode| (mode.name(), mode)))?,
            // The system's authorities vouch for everybody's servers: only the name tells whose it is.
            None if matches!(roots, Roots::System) => SslMode::VerifyFull,
            None => SslMode::Prefer,
        };
        if matches!(roots, Roots::System) && mode != SslMode::VerifyFull {
            return Err(PostgresError::settings(format!("sslrootcert=system needs sslmode=verify-full, not {mode}")));
        }
        let direct = choose(
            "sslnegotiation",
            options.get("sslnegotiation").unwrap_or("postgres"),
            &[("postgres", false), ("direct", true)],
        )?;
        if direct && mode < SslMode::Require {
            let why = format!("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full, not {mode}");
            return Err(PostgresError::settings(why));
        }
        let (oldest, newest) =
            (version(options, "ssl_min_protocol_version")?, version(options, "ssl_max_protocol_version")?);
        if newest == Some(Version::Older) {
            return Err(PostgresError::UnsupportedOption {
                option: "ssl_max_protocol_version".into(),
                why: "Walden speaks TLSv1.2 and TLSv1.3".into(),
            });
        }
        let (oldest, newest) = (oldest.unwrap_or(Version::Tls12), newest.unwrap_or(Version::Tls13));
        if oldest > newest {
            return Err(PostgresError::settings("ssl_min_protocol_version is above ssl_max_protocol_version"));
        }
        let list_folder = path("sslcrldir");
        let list = match path("sslcrl") {
            Some(path) => Some(Named { path, given: true }),
            None if list_folder.is_some() => None,
            None => in_home("root.crl").map(|path| Named { path, given: false }),
        };
        Ok(Self {
            mode,
            direct,
            roots,
            list,
            list_folder,
            certificate: path("sslcert").or_else(|| in_home("postgresql.crt")),
            key: path("sslkey").or_else(|| in_home("postgresql.key")),
            cert_mode: choose(
                "sslcertmode",
                options.get("sslcertmode").unwrap_or("allow"),
                &[("disable", CertMode::Disable), ("allow", CertMode::Allow), ("require", CertMode::Require)],
            )?,
            send_name: choose("sslsni", options.get("sslsni").unwrap_or("1"), &[("1", true), ("0", false)])?,
            oldest,
            newest,
            binding: choose(
                "channel_binding",
                options.get("channel_binding").unwrap_or("prefer"),
                &[("disable", Binding::Disable), ("prefer", Binding::Prefer), ("require", Binding::Require)],
            )?,
        })
    }
}

fn version(options: &Options, option: &str) -> Result<Option<Version>, PostgresError> {
    let names = [
        ("tlsv1", Version::Older),
        ("tlsv1.1", Version::Older),
        ("tlsv1.2", Version::Tls12),
        ("tlsv1.3", Version::Tls13),
    ];
    options.get(option).map(|text| choose(option, &text.to_ascii_lowercase(), &names)).transpose()
}

/// One of several words.
pub(in crate::postgres) fn choose<T: Copy>(option: &str, text: &str, known: &[(&str, T)]) -> Result<T, PostgresError> {
    known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        PostgresError::settings(format!("{option} \"{}\" does not exist ({})", shown(text), names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(url: &str) -> Result<TlsSettings, PostgresError> {
        TlsSettings::resolve(&Options::gather(url, &|_| None)?, Some(Path::new("/h")))
    }

    #[test]
    fn defaults_are_those_of_libpq() {
        let tls = resolve("").unwrap();
        assert_eq!((tls.mode, tls.direct, tls.binding), (SslMode::Prefer, false, Binding::Prefer));
        assert!(matches!(tls.roots, Roots::File(Some(path)) if path == Path::new("/h/.postgresql/root.crt")));
        assert_eq!(tls.key.unwrap(), Path::new("/h/.postgresql/postgresql.key"));
        assert!(tls.list.is_some_and(|list| !list.given) && tls.send_name);
        assert_eq!(resolve("sslrootcert=system").unwrap().mode, SslMode::VerifyFull);
        assert!(resolve("sslcrldir=/x").unwrap().list.is_none());
        assert_eq!(resolve("ssl_min_protocol_version=TLSv1").unwrap().oldest, Version::Older);
    }

    #[test]
    fn what_can_never_work_is_refused() {
        for (url, word) in [
            ("sslmode=maybe", "verify-full"),
            ("sslrootcert=system sslmode=require", "verify-full"),
            ("sslnegotiation=direct", "require"),
            ("sslnegotiation=direct sslmode=prefer", "require"),
            ("sslnegotiation=maybe", "direct"),
            ("ssl_max_protocol_version=TLSv1.1", "TLSv1.2"),
            ("ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "above"),
            ("ssl_min_protocol_version=3", "tlsv1.2"),
            ("sslcertmode=maybe", "allow"),
            ("sslsni=yes", "sslsni"),
            ("channel_binding=maybe", "prefer"),
        ] {
            let error = resolve(url).expect_err(url);
            assert!(error.to_string().contains(word), "{url}: {error}");
        }
    }
}
