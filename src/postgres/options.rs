//! libpq's options: which exist, which environment variable stands for each, and what Walden does with it.
//!
//! Source: "Parameter Key Words" and "Environment Variables" in the libpq chapter of PostgreSQL's documentation.

use std::collections::HashMap;

use super::conninfo::{self, Pairs, shown};
use super::{PostgresError, files};

/// What Walden does with an option.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Treatment {
    Honoured,
    /// Changes nothing that Walden does: accepted, as in a line copied from `primary_conninfo`.
    NoEffect,
    /// These values change nothing and are accepted; any other is refused, since ignoring it would be wrong.
    Only(&'static [&'static str]),
}

use Treatment::{Honoured, NoEffect, Only};

const OPTIONS: &[(&str, &str, Treatment)] = &[
    ("service", "PGSERVICE", Honoured),
    ("servicefile", "PGSERVICEFILE", Honoured),
    ("host", "PGHOST", Honoured),
    ("hostaddr", "PGHOSTADDR", Honoured),
    ("port", "PGPORT", Honoured),
    ("user", "PGUSER", Honoured),
    ("password", "PGPASSWORD", Honoured),
    ("passfile", "PGPASSFILE", Honoured),
    ("dbname", "PGDATABASE", Honoured),
    ("options", "PGOPTIONS", Honoured),
    ("application_name", "PGAPPNAME", Honoured),
    ("fallback_application_name", "", Honoured),
    ("connect_timeout", "PGCONNECT_TIMEOUT", Honoured),
    ("sslmode", "PGSSLMODE", Honoured),
    ("target_session_attrs", "PGTARGETSESSIONATTRS", Honoured),
    ("require_auth", "PGREQUIREAUTH", Honoured),
    ("keepalives", "", Honoured),
    ("keepalives_idle", "", Honoured),
    ("keepalives_interval", "", Honoured),
    ("keepalives_count", "", Honoured),
    ("tcp_user_timeout", "", Honoured),
    ("channel_binding", "PGCHANNELBINDING", Honoured),
    ("gssencmode", "PGGSSENCMODE", Only(&["disable", "prefer"])),
    ("load_balance_hosts", "PGLOADBALANCEHOSTS", Honoured),
    ("replication", "", Only(&["true", "on", "yes", "1", "false", "off", "no", "0"])),
    ("requirepeer", "PGREQUIREPEER", Only(&[])),
    ("sslnegotiation", "PGSSLNEGOTIATION", Honoured),
    // Walden reads numbers and names only and always asks for UTF-8.
    ("client_encoding", "", NoEffect),
    ("sslcompression", "PGSSLCOMPRESSION", NoEffect),
    ("sslcert", "PGSSLCERT", Honoured),
    ("sslkey", "PGSSLKEY", Honoured),
    // Opens an encrypted key, and such a key is refused when it is read.
    ("sslpassword", "", NoEffect),
    ("sslcertmode", "PGSSLCERTMODE", Honoured),
    ("sslrootcert", "PGSSLROOTCERT", Honoured),
    ("sslcrl", "PGSSLCRL", Honoured),
    ("sslcrldir", "PGSSLCRLDIR", Honoured),
    ("sslsni", "PGSSLSNI", Honoured),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", Honoured),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", Honoured),
    ("min_protocol_version", "PGMINPROTOCOLVERSION", Only(&["3.0"])),
    ("max_protocol_version", "PGMAXPROTOCOLVERSION", NoEffect),
    ("krbsrvname", "PGKRBSRVNAME", NoEffect),
    ("gsslib", "PGGSSLIB", NoEffect),
    ("gssdelegation", "PGGSSDELEGATION", NoEffect),
    ("sslkeylogfile", "", Only(&[])),
    ("scram_client_key", "", Only(&[])),
    ("scram_server_key", "", Only(&[])),
    ("oauth_issuer", "", Only(&[])),
    ("oauth_client_id", "", Only(&[])),
    ("oauth_client_secret", "", Only(&[])),
    ("oauth_scope", "", Only(&[])),
];

/// An empty value for these is refused, as in libpq: what it would leave out is a demand.
const NEVER_EMPTY: [&str; 7] = [
    "sslmode",
    "sslcertmode",
    "sslnegotiation",
    "channel_binding",
    "gssencmode",
    "target_session_attrs",
    "load_balance_hosts",
];

/// Whether libpq or JDBC has such an option.
pub(super) fn is_known(key: &str) -> bool {
    key == "ssl" || OPTIONS.iter().any(|(option, _, _)| *option == key)
}

/// The options with what was given for them. An empty value stands for libpq's default, and keeps service file and variables from giving
/// another; an empty variable counts as none.
///
/// Source: `conninfo_add_defaults` in PostgreSQL `src/interfaces/libpq/fe-connect.c`.
pub(super) struct Options {
    given: HashMap<&'static str, String>,
}

impl Options {
    /// From `url` (or DATABASE_URL when it is empty), then the service file, then the PG* variables.
    pub(super) fn gather(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, PostgresError> {
        let mut options = Self { given: HashMap::new() };
        if url.trim().is_empty() {
            options.fill(&conninfo::parse(env("DATABASE_URL").as_deref().unwrap_or("").trim())?, true)?;
        } else {
            options.fill(&conninfo::parse(url.trim())?, true)?;
        }
        let of_env = |name: &str| env(name).filter(|value| !value.is_empty());
        let service = options.given.get("service").cloned().or_else(|| of_env("PGSERVICE"));
        if let Some(service) = service.filter(|service| !service.is_empty()) {
            let named = options.get("servicefile").map(str::to_owned);
            options.fill(&files::read_service(&service, named.as_deref(), env)?, false)?;
        }
        let from_env: Pairs = OPTIONS
            .iter()
            .filter(|(_, variable, _)| !variable.is_empty())
            .filter_map(|(option, variable, _)| of_env(variable).map(|value| ((*option).to_owned(), value)))
            .collect();
        options.fill(&from_env, false)?;
        // libpq's old name for sslmode=require.
        if of_env("PGREQUIRESSL").is_some_and(|value| value.starts_with('1')) {
            options.fill(&vec![("sslmode".into(), "require".into())], false)?;
        }
        let is_empty = |option: &&&str| options.given.get(**option).is_some_and(String::is_empty);
        if let Some(option) = NEVER_EMPTY.iter().find(is_empty) {
            return Err(PostgresError::settings(format!("{option} is given without a value")));
        }
        Ok(options)
    }

    /// Takes what is not set yet; with `again`, a later pair replaces an earlier one.
    fn fill(&mut self, pairs: &Pairs, again: bool) -> Result<(), PostgresError> {
        let mut before = "";
        for (key, value) in pairs {
            let behind_password = matches!(std::mem::replace(&mut before, key), "password" | "sslpassword");
            let Some((option, _, treatment)) = OPTIONS.iter().find(|(option, _, _)| option == key) else {
                if behind_password {
                    // What is no option there may be the second half of the password.
                    return Err(PostgresError::settings(
                        "what follows the password is no option of libpq's; a password with spaces needs single quotes",
                    ));
                }
                return Err(PostgresError::UnsupportedOption {
                    option: shown(key),
                    why: match nearest(key) {
                        Some(near) => format!("libpq has no such option (did you mean {near}?)"),
                        None => "libpq has no such option".into(),
                    },
                });
            };
            if let Only(values) = treatment
                && !value.is_empty()
                && !values.contains(&value.as_str())
            {
                let why = match values {
                    [] => "Walden cannot do what it asks for".into(),
                    values => format!("Walden knows {} here", values.join(", ")),
                };
                return Err(PostgresError::UnsupportedOption { option: (*option).into(), why });
            }
            if again || !self.given.contains_key(option) {
                self.given.insert(option, value.clone());
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, option: &str) -> Option<&str> {
        self.given.get(option).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn owned(&self, option: &str) -> Option<String> {
        self.get(option).map(str::to_owned)
    }

    /// A whole number, as libpq reads it.
    pub(super) fn number(&self, option: &str) -> Result<Option<i64>, PostgresError> {
        let Some(text) = self.get(option) else { return Ok(None) };
        let number: i32 = text.trim().parse().map_err(|_| {
            PostgresError::settings(format!("{option} must be a whole number, not \"{}\"", shown(text)))
        })?;
        Ok(Some(i64::from(number)))
    }
}

/// The known option with the smallest edit distance, if it is at most 2.
fn nearest(key: &str) -> Option<&'static str> {
    if key.len() > 40 {
        return None;
    }
    let distance = |known: &str| -> usize {
        let known: Vec<char> = known.chars().collect();
        let mut row: Vec<usize> = (0..=known.len()).collect();
        for (i, a) in key.chars().enumerate() {
            let mut diagonal = row[0];
            row[0] = i + 1;
            for (j, b) in known.iter().enumerate() {
                let substituted = diagonal + usize::from(a != *b);
                diagonal = row[j + 1];
                row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
            }
        }
        row[known.len()]
    };
    OPTIONS.iter().map(|(option, _, _)| (distance(option), *option)).filter(|(d, _)| *d <= 2).min().map(|(_, o)| o)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(url: &str, env: &[(&str, &str)]) -> Result<Options, PostgresError> {
        Options::gather(url, &|name| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn the_url_wins_over_the_environment_and_database_url_stands_for_an_empty_one() {
        let env = [("PGHOST", "e"), ("PGUSER", "eu"), ("DATABASE_URL", "postgres://d:1")];
        let options = gather("host=u", &env).unwrap();
        assert_eq!((options.get("host"), options.get("user"), options.get("port")), (Some("u"), Some("eu"), None));
        let options = gather("", &env).unwrap();
        assert_eq!((options.get("host"), options.get("user"), options.get("port")), (Some("d"), Some("eu"), Some("1")));
        assert_eq!(gather("host=a host=b", &[]).unwrap().get("host"), Some("b"));
        assert_eq!(gather("", &[("PGREQUIRESSL", "1")]).unwrap().get("sslmode"), Some("require"));
        let env = [("PGREQUIRESSL", "1"), ("PGSSLMODE", "prefer")];
        assert_eq!(gather("", &env).unwrap().get("sslmode"), Some("prefer"));
    }

    #[test]
    fn an_empty_value_keeps_the_variable_out() {
        let env =
            [("PGHOST", "e"), ("PGPASSWORD", "p"), ("PGUSER", ""), ("PGSSLMODE", "verify-full"), ("PGSERVICE", "s")];
        let options = gather("host='' password='' user=u service=''", &env).unwrap();
        assert_eq!((options.get("host"), options.get("password"), options.get("user")), (None, None, Some("u")));
        assert_eq!(options.get("sslmode"), Some("verify-full"));
        assert_eq!(gather("postgres://h?password=", &env[1..4]).unwrap().get("password"), None);
        assert_eq!(gather("user=a user=''", &[]).unwrap().get("user"), None);
        // Whoever asks for nothing here may not be given less than the variable asks for.
        for empty in ["sslmode=", "postgres://h?channel_binding=", "target_session_attrs=''"] {
            assert!(gather(empty, &[]).err().unwrap().to_string().contains("without a value"), "{empty}");
        }
    }

    #[test]
    fn unknown_and_unenforceable_options_are_named() {
        let error = |url: &str| gather(url, &[]).err().unwrap().to_string();
        assert!(error("hots=a").contains("hots") && error("hots=a").contains("did you mean host?"));
        assert!(error("requirepeer=postgres").contains("requirepeer"));
        assert!(error("gssencmode=require").contains("gssencmode"));
        assert!(error("sslkeylogfile=/tmp/keys").contains("sslkeylogfile"));
        assert!(gather("sslcompression=0 krbsrvname=postgres gssencmode=prefer sslsni=1", &[]).is_ok());
    }
}
