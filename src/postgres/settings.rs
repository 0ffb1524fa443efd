use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::conninfo::shown;
use super::files::{self, PassfileAnswer};
use super::hosts::{Host, Keepalive, hosts, keepalive};
use super::options::Options;
use super::tls::{TlsSettings, choose};
use super::{PostgresError, Secret};

/// Where and how to connect: libpq's settings, resolved once. Passwords in files are read anew at each connect.
///
/// Not `Debug`, since it may hold a password. `Display` shows user and hosts only.
#[derive(Clone)]
pub struct ConnectSettings {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    /// For SQL; `None` = as libpq, the user's name.
    pub(super) dbname: Option<String>,
    pub(super) application_name: String,
    pub(super) options: Option<String>,
    password: Option<Secret>,
    password_file: Option<PathBuf>,
    passfile: Option<PathBuf>,
    /// For one address of a host until the server there is ready, and for looking the addresses up.
    pub(super) connect_timeout: Duration,
    pub(super) keepalive: Option<Keepalive>,
    pub(super) session: SessionAttributes,
    pub(super) allowed: AllowedMethods,
    pub(super) tls: TlsSettings,
    /// `load_balance_hosts=random`: hosts and their addresses are tried in any order.
    pub(super) shuffle: bool,
}

/// `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionAttributes {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

impl SessionAttributes {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::ReadWrite => "read-write",
            Self::ReadOnly => "read-only",
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::PreferStandby => "prefer-standby",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let all = [Self::Any, Self::ReadWrite, Self::ReadOnly, Self::Primary, Self::Standby, Self::PreferStandby];
        all.into_iter().find(|attributes| attributes.name() == text)
    }
}

/// `require_auth`: which authentications the server may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AllowedMethods {
    pub(super) none: bool,
    pub(super) password: bool,
    pub(super) md5: bool,
    pub(super) scram: bool,
}

impl AllowedMethods {
    pub(super) const ALL: Self = Self { none: true, password: true, md5: true, scram: true };

    /// `a,b` allows these alone, `!a,!b` all but these.
    pub(super) fn parse(text: &str) -> Result<Self, PostgresError> {
        let wrong = |method: &str| PostgresError::UnsupportedOption {
            option: "require_auth".into(),
            why: format!("\"{}\" is not one of none, password, md5, scram-sha-256", shown(method)),
        };
        let negated = text.starts_with('!');
        let mut allowed =
            if negated { Self::ALL } else { Self { none: false, password: false, md5: false, scram: false } };
        for method in text.split(',').map(str::trim) {
            let name = match (method.strip_prefix('!'), negated) {
                (Some(name), true) => name,
                (None, false) => method,
                _ => {
                    let why = "allowed and excluded methods cannot be mixed".into();
                    return Err(PostgresError::UnsupportedOption { option: "require_auth".into(), why });
                }
            };
            match name {
                "none" => allowed.none = !negated,
                "password" => allowed.password = !negated,
                "md5" => allowed.md5 = !negated,
                "scram-sha-256" => allowed.scram = !negated,
                // Walden never does these, so excluding them is fulfilled.
                "gss" | "sspi" | "oauth" if negated => {}
                other => return Err(wrong(other)),
            }
        }
        Ok(allowed)
    }
}

impl AllowedMethods {
    /// The method that an authentication request stands for, if it is excluded. `exchanged`: it is not the first request.
    pub(super) fn refuses(self, kind: u32, exchanged: bool) -> Option<&'static str> {
        match kind {
            0 if !exchanged && !self.none => Some("none"),
            3 if !self.password => Some("password"),
            5 if !self.md5 => Some("md5"),
            10 if !self.scram => Some("scram-sha-256"),
            _ => None,
        }
    }
}

impl ConnectSettings {
    /// Resolves `postgres.url` (URL or key=value; empty: DATABASE_URL, then PG* alone) with libpq's defaults.
    ///
    /// `password_file` wins over every other source. `application_name` and `connect_timeout` are defaults: the URL or the
    /// environment may name others. Reads the service file; password files are read at connect. An unknown option is an error.
    pub fn resolve(
        url: &str,
        password_file: Option<&Path>,
        application_name: &str,
        connect_timeout: Duration,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, PostgresError> {
        let options = Options::gather(url, env)?;
        let user = match options.owned("user") {
            Some(user) => user,
            None => whoami::username()
                .map_err(|_| PostgresError::settings("no user is given and this process's user has no name"))?,
        };
        if user.is_empty() || user.len() > 1024 {
            return Err(PostgresError::settings("the user's name is empty or too long"));
        }
        let session = match options.get("target_session_attrs") {
            None => SessionAttributes::Any,
            Some(text) => SessionAttributes::parse(text).ok_or_else(|| PostgresError::UnsupportedOption {
                option: "target_session_attrs".into(),
                why: "it must be any, read-write, read-only, primary, standby or prefer-standby".into(),
            })?,
        };
        let home = env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let passfile = match options.get("passfile") {
            Some(path) => Some(PathBuf::from(path)),
            None => home.as_ref().map(|home| home.join(".pgpass")),
        };
        let balance = options.get("load_balance_hosts").unwrap_or("disable");
        let connect_timeout = match options.number("connect_timeout")? {
            None => connect_timeout,
            // libpq: no limit. A day is as good, and nothing here waits for ever.
            Some(seconds) if seconds <= 0 => Duration::from_secs(86_400),
            Some(seconds) => Duration::from_secs(u64::try_from(seconds).unwrap_or(86_400)),
        };
        Ok(Self {
            hosts: hosts(&options)?,
            user,
            dbname: options.owned("dbname"),
            application_name: options
                .owned("application_name")
                .or_else(|| (!application_name.is_empty()).then(|| application_name.to_owned()))
                .or_else(|| options.owned("fallback_application_name"))
                .unwrap_or_default(),
            options: options.owned("options"),
            password: options.owned("password").map(Secret::new),
            password_file: password_file.map(Path::to_owned),
            passfile,
            connect_timeout,
            keepalive: keepalive(&options)?,
            session,
            allowed: options.get("require_auth").map_or(Ok(AllowedMethods::ALL), AllowedMethods::parse)?,
            tls: TlsSettings::resolve(&options, home.as_deref())?,
            shuffle: choose("load_balance_hosts", balance, &[("disable", false), ("random", true)])?,
        })
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    /// The hosts as they are printed, in the order in which they are tried.
    pub fn targets(&self) -> Vec<String> {
        self.hosts.iter().map(Host::to_string).collect()
    }

    /// The hosts with their numbers, in the order in which they are to be tried now.
    pub(super) fn order(&self) -> Vec<(usize, &Host)> {
        let mut order: Vec<_> = self.hosts.iter().enumerate().collect();
        if self.shuffle {
            order.sort_by_cached_key(|_| uuid::Uuid::new_v4());
        }
        order
    }

    /// The same settings with the host numbered `index` alone, as `ReplicationConnection::host_index` tells it: so that a second
    /// connection reaches the same server.
    #[must_use]
    pub fn only_host(&self, index: usize) -> Self {
        let mut settings = self.clone();
        if let Some(host) = self.hosts.get(index) {
            settings.hosts = vec![host.clone()];
        }
        settings
    }

    /// That host alone, primary or standby, whatever `target_session_attrs` asks for: the server that is streamed from may have
    /// changed its part since it was chosen.
    #[must_use]
    pub fn this_host(&self, index: usize) -> Self {
        Self { session: SessionAttributes::Any, ..self.only_host(index) }
    }

    /// The password for one host, and a note for the error if there is none. Reads files; call it off the runtime's workers.
    /// `database` as `.pgpass` names it: `replication` for a replication connection.
    pub(super) fn password_for(&self, host: &Host, database: &str) -> Result<(Option<Secret>, String), PostgresError> {
        if let Some(path) = &self.password_file {
            return files::read_password_file(path).map(|password| (Some(password), String::new()));
        }
        if let Some(password) = &self.password {
            return Ok((Some(password.clone()), String::new()));
        }
        let Some(path) = &self.passfile else { return Ok((None, String::new())) };
        Ok(match files::read_passfile(path, &host.passfile_name(), host.port, database, &self.user) {
            PassfileAnswer::Password(password) => (Some(password), String::new()),
            PassfileAnswer::Nothing => (None, String::new()),
            PassfileAnswer::Unusable(why) => (None, format!(" ({why})")),
        })
    }
}

impl fmt::Display for ConnectSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.user, self.targets().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn resolve(url: &str, env: &[(&str, &str)]) -> Result<ConnectSettings, PostgresError> {
        ConnectSettings::resolve(url, None, "walden", Duration::from_secs(10), &|name| {
            env.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn impossible_settings_are_refused() {
        for url in [
            "host=a,b port=1,2,3",
            "port=0",
            "port=70000",
            "hostaddr=nohost",
            "host=a,b hostaddr=1.1.1.1",
            "sslmode=maybe",
            "load_balance_hosts=maybe",
            "target_session_attrs=fast",
            "connect_timeout=soon",
            "require_auth=gss",
            "require_auth=md5,!none",
            "host=@abstract",
        ] {
            assert!(resolve(url, &[]).is_err(), "{url}");
        }
    }

    #[test]
    fn what_is_given_wins_over_defaults() {
        let settings =
            resolve("user=u connect_timeout=3", &[("PGAPPNAME", "other"), ("PGDATABASE", "d")]).ok().unwrap();
        assert_eq!(
            (settings.user(), settings.application_name(), settings.dbname.as_deref(), settings.connect_timeout),
            ("u", "other", Some("d"), Duration::from_secs(3))
        );
        let settings = resolve("require_auth=!md5,!password keepalives=0", &[]).ok().unwrap();
        assert_eq!(settings.allowed, AllowedMethods { none: true, password: false, md5: false, scram: true });
        assert_eq!((settings.keepalive, settings.application_name()), (None, "walden"));
    }

    #[test]
    fn the_password_comes_from_the_nearest_source() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path
        };
        write(".pgpass", "localhost:5432:replication:u:from pgpass\nh:*:*:u:other\n");
        let file = write("password", "from file\n");
        let home = dir.path().to_str().unwrap();
        let password = |settings: &ConnectSettings| {
            let (password, _) = settings.password_for(&settings.hosts[0], "replication").unwrap();
            password.map(|p| String::from_utf8(p.expose().to_vec()).unwrap())
        };
        let settings = resolve("user=u", &[("HOME", home)]).ok().unwrap();
        assert_eq!(password(&settings).as_deref(), Some("from pgpass"));
        let settings = resolve("host=h user=u", &[("HOME", home)]).ok().unwrap();
        assert_eq!(password(&settings).as_deref(), Some("other"));
        let settings = resolve("host=h user=u", &[("HOME", home), ("PGPASSWORD", "from env")]).ok().unwrap();
        assert_eq!(password(&settings).as_deref(), Some("from env"));
        let with_file =
            ConnectSettings::resolve("password=url", Some(&file), "", Duration::ZERO, &|_| None).ok().unwrap();
        assert_eq!(password(&with_file).as_deref(), Some("from file"));
    }
}
