//! A server with TLS and many kinds of login, and those who knock: PostgreSQL's own `psql` and `pg_receivewal`, and Walden's two kinds of
//! connection.

use std::cell::Cell;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::runtime::Runtime;
use walden::postgres::{ConnectSettings, PostgresError, ReplicationConnection, Sql};

use super::certificates::Identity;
use super::walden::finish;
use super::{Postgres, Stage, eventually, parts};

pub const PASSWORD: &str = "canary-Tr0mbone";
const LIMIT: Duration = Duration::from_secs(30);

/// A server with TLS, and the two sides that knock.
pub struct Doors {
    pub stage: Stage,
    pub server: Postgres,
    runtime: Runtime,
    certificates: Cell<u32>,
}

/// What came of a try: how the connection runs, or why there is none.
pub type Outcome = Result<String, String>;

impl Doors {
    /// pg_hba.conf asks each role for what it is named after; `postgres` is trusted.
    pub fn open(major: u32) -> Doors {
        let stage = Stage::new("doors");
        let mut builder = Postgres::builder(major).wal_segsize(1).setting("password_encryption", "scram-sha-256");
        for line in [
            "hostssl all,replication tls_only 127.0.0.1/32 trust",
            "hostnossl all,replication plain_only 127.0.0.1/32 trust",
            "hostssl all,replication tls_scram 127.0.0.1/32 scram-sha-256",
            "hostssl all,replication certified 127.0.0.1/32 trust clientcert=verify-ca",
            "host all,replication scram 127.0.0.1/32 scram-sha-256",
            "host all,replication clear 127.0.0.1/32 password",
            "host all,replication hashed 127.0.0.1/32 md5",
            "host all,replication tls_only,plain_only,tls_scram,certified 127.0.0.1/32 reject",
        ] {
            builder = builder.hba(line);
        }
        let server = builder.start(&stage);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        for role in ["tls_only", "plain_only", "tls_scram", "certified", "scram", "clear"] {
            server.psql(&format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{PASSWORD}'"));
        }
        server.psql(&format!(
            "SET password_encryption = 'md5'; CREATE ROLE hashed LOGIN REPLICATION PASSWORD '{PASSWORD}'"
        ));
        Doors { stage, server, runtime, certificates: Cell::new(0) }
    }

    /// Changes settings of the server and waits until new sessions have them.
    #[track_caller]
    pub fn set(&self, settings: &[(&str, &str)]) {
        for (name, value) in settings {
            self.server.psql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        }
        self.server.psql("SELECT pg_reload_conf()");
        for (name, value) in settings {
            eventually(LIMIT, "the server to take its settings", || {
                let now = self.server.connect()?.value(&format!("SHOW {name}"));
                if now == *value { Ok(()) } else { Err(format!("{name} is {now}")) }
            });
        }
        let log = self.server.log();
        assert!(!log.contains("SSL configuration was not reloaded"), "{}", self.server.log_tail());
    }

    /// Gives the server a certificate, with others that it sends along.
    #[track_caller]
    pub fn serve(&self, identity: &Identity, others: &[&Identity]) {
        self.certificates.set(self.certificates.get() + 1);
        let number = self.certificates.get();
        let chain = others.iter().fold(identity.pem.clone(), |chain, other| chain + &other.pem);
        let certificate = self.stage.write(format!("server-{number}.crt"), chain);
        let key = self.stage.write(format!("server-{number}.key"), identity.key_pem());
        let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
        self.set(&[("ssl_cert_file", &certificate), ("ssl_key_file", &key), ("ssl", "on")]);
    }

    /// As `serve`, for a certificate that is signed by itself with a key that only `openssl` still makes.
    #[track_caller]
    pub fn serve_weak(&self, name: &str) {
        let (certificate, key) = (self.file("weak.crt", ""), self.file("weak.key", ""));
        let mut command = Command::new(parts::tool("openssl"));
        command.args(["req", "-x509", "-newkey", "rsa:1024", "-nodes", "-days", "30", "-subj", &format!("/CN={name}")]);
        command.arg("-out").arg(&certificate).arg("-keyout").arg(&key);
        let done = finish(command, LIMIT);
        assert_eq!(done.code, Some(0), "{done:?}");
        let (certificate, key) = (certificate.display().to_string(), key.display().to_string());
        self.set(&[("ssl_cert_file", &certificate), ("ssl_key_file", &key), ("ssl", "on")]);
    }

    /// The name under which OpenSSL looks for an authority's list in a folder.
    pub fn hash_of(&self, file: &str) -> String {
        let mut command = Command::new(parts::tool("openssl"));
        command.args(["x509", "-noout", "-subject_hash", "-in"]).arg(self.stage.join(file));
        finish(command, LIMIT).stdout.trim().to_owned()
    }

    /// A file in the test's folder, with its path.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        self.stage.write(name, content)
    }

    /// PostgreSQL's own programs, one for each kind of connection.
    fn original(&self, program: &str, arguments: &[&str], settings: &str, environment: &[(&str, &str)]) -> Outcome {
        let mut command = Command::new(parts::tool(program));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        command.env("HOME", self.stage.path()).env("LC_ALL", "C").envs(environment.iter().copied());
        command.args(arguments).args(["-w", "-d", settings]);
        let done = finish(command, LIMIT);
        if done.code == Some(0) { Ok(done.stdout.trim().to_owned()) } else { Err(done.stderr) }
    }

    pub fn psql(&self, settings: &str, environment: &[(&str, &str)]) -> Outcome {
        self.original("psql", &["-XAtc", "SELECT 1"], settings, environment)
    }

    pub fn receivewal(&self, settings: &str, environment: &[(&str, &str)]) -> Outcome {
        let slot = ["--create-slot", "--if-not-exists", "--slot=door"];
        self.original("pg_receivewal", &slot, settings, environment)
    }

    pub fn walden(&self, settings: &str, environment: &[(&str, &str)]) -> (Outcome, Outcome) {
        let home = self.stage.path().display().to_string();
        let env = |name: &str| match environment.iter().find(|(known, _)| *known == name) {
            Some((_, value)) => Some((*value).to_owned()),
            None => (name == "HOME").then(|| home.clone()),
        };
        let resolved = ConnectSettings::resolve(settings, None, "walden", Duration::from_secs(10), &env);
        let resolved = match resolved {
            Ok(resolved) => resolved,
            Err(error) => return (Err(told(&error)), Err(told(&error))),
        };
        self.runtime.block_on(async {
            let replication = match ReplicationConnection::connect(&resolved).await {
                Ok(mut connection) => connection.identify_system().await.map(|_| connection.security()),
                Err(error) => Err(error),
            };
            let sql = match Sql::connect(&resolved).await {
                Ok(sql) => sql.is_in_recovery().await.map(|_| String::new()),
                Err(error) => Err(error),
            };
            (replication.map_err(|error| told(&error)), sql.map_err(|error| told(&error)))
        })
    }

    /// All four agree; gives what the replication connection came to.
    #[track_caller]
    pub fn agreed(&self, name: &str, settings: &str, environment: &[(&str, &str)]) -> Outcome {
        let (psql, receivewal) = (self.psql(settings, environment), self.receivewal(settings, environment));
        let (replication, sql) = self.walden(settings, environment);
        let seen = format!(
            "{name}: {settings}\npsql {psql:?}\npg_receivewal {receivewal:?}\nwalden {replication:?}\nsql {sql:?}"
        );
        println!("{seen}\n");
        assert!(psql.is_ok() == replication.is_ok() && receivewal.is_ok() == replication.is_ok(), "{seen}");
        assert_eq!(replication.is_ok(), sql.is_ok(), "{seen}");
        for said in [&replication, &sql].into_iter().filter_map(|outcome| outcome.as_ref().err()) {
            assert!(!said.contains(PASSWORD) && !said.contains("PRIVATE KEY") && !said.contains('\n'), "{said}");
            assert!(said.contains("; "), "no word on what to do: {said}");
        }
        replication
    }

    /// A table: name, settings, and words of how the connection runs (`Ok`) or why there is none (`Err`).
    #[track_caller]
    pub fn table(&self, cases: &[(&str, &str, Result<&str, &str>)]) {
        for (name, settings, expected) in cases {
            let outcome = self.agreed(name, &self.settings(settings), &[]);
            assert_outcome(name, outcome, *expected);
        }
    }

    /// Over TCP to the server, unless the case says otherwise. `{dir}` is the test's folder.
    pub fn settings(&self, own: &str) -> String {
        let own = own.replace("{dir}", &self.stage.path().display().to_string());
        let own = own.replace("{port}", &self.server.port.to_string());
        let or = |key: &str, default: String| if own.contains(key) { String::new() } else { default };
        let host = if own.contains("hostaddr=") { String::new() } else { or("host=", "host=127.0.0.1 ".to_owned()) };
        let (user, port) =
            (or("user=", "user=postgres ".to_owned()), or("port=", format!("port={} ", self.server.port)));
        let database = or("dbname=", "dbname=postgres ".to_owned());
        format!("{host}{port}{user}{database}{own}")
    }
}

#[track_caller]
pub fn assert_outcome(name: &str, outcome: Outcome, expected: Result<&str, &str>) {
    match (&outcome, expected) {
        (Ok(said), Ok(words)) | (Err(said), Err(words)) => {
            for word in words.split('|') {
                assert!(said.contains(word), "{name}: \"{word}\" is not said: {said}");
            }
        }
        _ => panic!("{name}: {outcome:?} instead of {expected:?}"),
    }
}

/// What, why and what to do, as a command prints it.
fn told(error: &PostgresError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    format!("{text}; {}", error.hint())
}
