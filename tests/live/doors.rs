//! The doors to a server: PostgreSQL's own `psql` and `pg_receivewal`, and Walden's two kinds of connection, are let in and kept out by
//! the same settings.

use std::cell::Cell;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::runtime::Runtime;
use walden::postgres::{ConnectSettings, PostgresError, ReplicationConnection, Sql};

use crate::support::certificates::{Identity, authority, named, server};
use crate::support::walden::finish;
use crate::support::{Postgres, Stage, eventually, parts};

const PASSWORD: &str = "canary-Tr0mbone";
const LIMIT: Duration = Duration::from_secs(30);

/// A server with TLS, and the two sides that knock.
pub struct Doors {
    pub stage: Stage,
    pub server: Postgres,
    runtime: Runtime,
    certificates: Cell<u32>,
}

/// What came of a try: how the connection runs, or why there is none.
type Outcome = Result<String, String>;

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

    fn psql(&self, settings: &str, environment: &[(&str, &str)]) -> Outcome {
        self.original("psql", &["-XAtc", "SELECT 1"], settings, environment)
    }

    fn receivewal(&self, settings: &str, environment: &[(&str, &str)]) -> Outcome {
        let slot = ["--create-slot", "--if-not-exists", "--slot=door"];
        self.original("pg_receivewal", &slot, settings, environment)
    }

    fn walden(&self, settings: &str, environment: &[(&str, &str)]) -> (Outcome, Outcome) {
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
        let host = or("host=", "host=127.0.0.1 ".to_owned());
        let (user, port) =
            (or("user=", "user=postgres ".to_owned()), or("port=", format!("port={} ", self.server.port)));
        let database = or("dbname=", "dbname=postgres ".to_owned());
        format!("{host}{port}{user}{database}{own}")
    }
}

#[track_caller]
fn assert_outcome(name: &str, outcome: Outcome, expected: Result<&str, &str>) {
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

/// What a server's certificate must be, by libpq's rules, for each thing that it can get wrong.
#[test]
fn certificates_are_believed_as_psql_believes_them() {
    let doors = Doors::open(17);
    let full = "host=db.example.test hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt";
    let chain = "sslmode=verify-ca sslrootcert={dir}/root.crt";
    let top = Identity::self_signed(authority("Top"));
    let middle = top.issue(authority("Middle"));
    let name = ["db.example.test"];

    doors.file("root.crt", &top.pem);
    doors.serve(&top.issue(server(&["db.example.test", "127.0.0.1"])), &[]);
    doors.table(&[
        ("name", full, Ok("certificate and host verified")),
        ("address", "host=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt", Ok("host verified")),
        ("no name", "hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt", Err("host")),
        (
            "other name",
            "host=localhost sslmode=verify-full sslrootcert={dir}/root.crt",
            Err("not for localhost|db.example.test, 127.0.0.1"),
        ),
        (
            "other name, chain only",
            "host=localhost sslmode=verify-ca sslrootcert={dir}/root.crt",
            Ok("host not compared"),
        ),
        ("no root", "sslmode=verify-ca sslrootcert={dir}/none.crt", Err("none.crt does not exist|verify-ca")),
        ("no root, require", "sslmode=require sslrootcert={dir}/none.crt", Ok("not verified")),
        ("require with a root verifies", "sslmode=require sslrootcert={dir}/root.crt", Ok("certificate verified")),
        (
            "root is no certificate",
            "sslmode=require sslrootcert={dir}/server-1.key",
            Err("server-1.key|no certificate"),
        ),
        ("1.2", "sslmode=require ssl_max_protocol_version=TLSv1.2", Ok("TLS 1.2")),
        ("1.3", "sslmode=require ssl_min_protocol_version=TLSv1.3", Ok("TLS 1.3")),
        ("no version", "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", Err("above")),
    ]);

    doors.serve(&top.issue(named("db.example.test")), &[]);
    doors.table(&[("common name only", full, Ok("host verified"))]);
    let mut both = server(&["other.example.test"]);
    both.distinguished_name = named("db.example.test").distinguished_name;
    doors.serve(&top.issue(both), &[]);
    doors.table(&[("a name beside the common name", full, Err("other.example.test, not for db"))]);
    doors.serve(&top.issue(named("127.0.0.1")), &[]);
    doors.table(&[("address as common name", "sslmode=verify-full sslrootcert={dir}/root.crt", Ok("host verified"))]);
    let mut both = server(&["other.example.test"]);
    both.distinguished_name = named("127.0.0.1").distinguished_name;
    doors.serve(&top.issue(both), &[]);
    doors.table(&[("address beside a name", "sslmode=verify-full sslrootcert={dir}/root.crt", Ok("host verified"))]);
    doors.serve(&top.issue(server(&["*.example.test"])), &[]);
    doors.table(&[
        ("star", full, Ok("host verified")),
        (
            "star for two labels",
            "host=a.db.example.test hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt",
            Err("*.example.test"),
        ),
        (
            "star for none",
            "host=example.test hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt",
            Err("*.example.test"),
        ),
    ]);

    let leaf = middle.issue(server(&name));
    doors.serve(&leaf, &[&middle]);
    doors.table(&[("chain", full, Ok("host verified"))]);
    doors.file("middle.crt", &middle.pem);
    doors.file("both.crt", &format!("{}{}", middle.pem, top.pem));
    doors.table(&[(
        "middle alone is no root",
        "sslmode=verify-ca sslrootcert={dir}/middle.crt",
        Err("\"Middle\"|\"Top\""),
    )]);
    doors.serve(&leaf, &[]);
    doors.table(&[
        ("middle not sent", full, Err("issued by \"Middle\"")),
        ("middle among the roots", "sslmode=verify-ca sslrootcert={dir}/both.crt", Ok("verified")),
    ]);

    doors.serve(&Identity::self_signed(authority("Other")).issue(server(&name)), &[]);
    doors.table(&[
        ("unknown authority", chain, Err("issued by \"Other\"|root.crt")),
        ("unknown authority, not asked", "sslmode=require", Ok("not verified")),
    ]);
    let mut old = server(&name);
    old.not_after = rcgen::date_time_ymd(2024, 2, 3);
    doors.serve(&top.issue(old), &[]);
    doors.table(&[("expired", chain, Err("expired on 2024-02-03")), ("expired, not asked", "sslmode=require", Ok(""))]);
    let mut young = server(&name);
    young.not_before = rcgen::date_time_ymd(2080, 2, 3);
    doors.serve(&top.issue(young), &[]);
    doors.table(&[("not yet", chain, Err("not valid before 2080-02-03"))]);

    // As the manual makes one: openssl req -new -x509 -nodes -subj /CN=…
    let own = Identity::self_signed(authority("db.example.test"));
    doors.serve(&own, &[]);
    doors.table(&[("self-signed, unknown", full, Err("signed by itself|root.crt"))]);
    doors.file("root.crt", &own.pem);
    doors.table(&[("self-signed, known", full, Ok("host verified"))]);
    let own = Identity::self_signed(server(&name));
    doors.serve(&own, &[]);
    doors.file("root.crt", &own.pem);
    doors.table(&[("self-signed, no authority, known", full, Ok("host verified"))]);
    let leaf = top.issue(server(&name));
    doors.serve(&leaf, &[]);
    doors.file("root.crt", &leaf.pem);
    doors.table(&[("not self-signed, known", full, Err("issued by \"Top\""))]);

    // X.509 v1, as openssl x509 -req writes it.
    doors.file("root.crt", &top.pem);
    doors.serve(&top.issue(named("db.example.test")).as_v1(Some(&top)), &[]);
    doors.table(&[("v1", full, Ok("host verified"))]);
    let first = Identity::self_signed(authority("First")).as_v1(None);
    doors.file("root.crt", &first.pem);
    doors.serve(&first.issue(named("db.example.test")).as_v1(Some(&first)), &[]);
    doors.table(&[("v1 of a v1 root", full, Ok("host verified"))]);
    let second = first.issue(authority("Second")).as_v1(Some(&first));
    doors.serve(&second.issue(server(&name)), &[&second]);
    doors.table(&[("v1 in the middle", full, Err("\"Second\"|Second) cannot be trusted|no authority"))]);
}

/// What authorities may and may not do.
#[test]
fn authorities_are_held_to_their_limits_as_by_psql() {
    let doors = Doors::open(17);
    let full = "host=db.example.test hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={dir}/root.crt";
    let top = Identity::self_signed(authority("Top"));
    doors.file("root.crt", &top.pem);
    let name = ["db.example.test"];

    let client = |mut params: rcgen::CertificateParams| {
        params.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
        params
    };
    doors.serve(&top.issue(client(server(&name))), &[]);
    doors.table(&[("a client's", full, Err("extended key usage"))]);
    let both = client(client(server(&name)));
    let mut both = both;
    both.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    doors.serve(&top.issue(both), &[]);
    doors.table(&[("a client's and a server's", full, Ok("host verified"))]);
    let clients = top.issue(client(authority("Clients")));
    doors.serve(&clients.issue(server(&name)), &[&clients]);
    doors.table(&[("of an authority for clients", full, Err("Clients|extended key usage"))]);
    let mut signer = server(&name);
    signer.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
    doors.serve(&top.issue(signer), &[]);
    doors.table(&[("for lists only", full, Err("key usage"))]);

    let no_authority = top.issue(named("Pretender"));
    doors.serve(&no_authority.issue(server(&name)), &[&no_authority]);
    doors.table(&[("of no authority", full, Err("Pretender|no authority"))]);
    let mut usage = authority("Reader");
    usage.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    let reader = top.issue(usage);
    doors.serve(&reader.issue(server(&name)), &[&reader]);
    doors.table(&[("of one that may not sign", full, Err("Reader|no authority"))]);
    let mut last = authority("Last");
    last.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    let last = top.issue(last);
    let beyond = last.issue(authority("Beyond"));
    doors.serve(&last.issue(server(&name)), &[&last]);
    doors.table(&[("of the last authority", full, Ok("host verified"))]);
    doors.serve(&beyond.issue(server(&name)), &[&beyond, &last]);
    doors.table(&[("beyond the last authority", full, Err("Last|more authorities"))]);

    let limited = |base: &str| {
        let mut params = authority("Limited");
        params.name_constraints = Some(rcgen::NameConstraints {
            permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName(base.to_owned())],
            excluded_subtrees: vec![rcgen::GeneralSubtree::DnsName("no.example.test".to_owned())],
        });
        top.issue(params)
    };
    let (inside, outside) = (limited("example.test"), limited("elsewhere.test"));
    doors.serve(&inside.issue(server(&name)), &[&inside]);
    doors.table(&[("within its names", full, Ok("host verified"))]);
    doors.serve(&outside.issue(server(&name)), &[&outside]);
    doors.table(&[("outside its names", full, Err("\"Limited\" may not issue"))]);
    doors.serve(&outside.issue(named("db.example.test")), &[&outside]);
    doors.table(&[("common name outside its names", full, Err("may not issue"))]);
    doors.serve(&inside.issue(server(&["db.example.test", "x.no.example.test"])), &[&inside]);
    doors.table(&[("one name excluded", full, Err("may not issue"))]);
    let mut odd = server(&name);
    let mut extension = rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
    extension.set_criticality(true);
    odd.custom_extensions = vec![extension];
    doors.serve(&top.issue(odd), &[]);
    doors.table(&[("an extension nobody knows", full, Err("1.3.6.1.4.1.99999.1"))]);

    // Revocation.
    let revoked = |serial: u64| {
        let mut params = server(&name);
        params.serial_number = Some(rcgen::SerialNumber::from(serial));
        params
    };
    let with = |list: &str| format!("{full} sslcrl={{dir}}/{list}");
    doors.file("none.crl", &top.revoke(&[], 2080));
    doors.file("seven.crl", &top.revoke(&[7, 300], 2080));
    doors.file("old.crl", &top.revoke(&[9], 2022));
    doors.file("other.crl", &Identity::self_signed(authority("Other")).revoke(&[], 2080));
    doors.serve(&top.issue(revoked(7)), &[]);
    doors.table(&[
        ("no list", full, Ok("verified")),
        ("not listed", &with("none.crl"), Ok("verified")),
        ("listed", &with("seven.crl"), Err("revoked by \"Top\"")),
        ("an old list", &with("old.crl"), Err("ended on 2022-01-01")),
        ("another's list", &with("other.crl"), Err("no revocation list of \"Top\"|other.crl")),
        ("no verification, no list", "sslmode=require sslcrl={dir}/seven.crl", Ok("not verified")),
    ]);
    let folder = doors.stage.make_dir("lists");
    let list = |name: &str, content: &str| doors.file(&format!("lists/{name}"), content);
    let hashed = hash_of(&doors, "root.crt");
    list(&format!("{hashed}.r0"), &top.revoke(&[7], 2080));
    doors.table(&[("listed in a folder", &format!("{full} sslcrldir={}", folder.display()), Err("revoked"))]);
    doors.serve(&top.issue(revoked(8)), &[]);
    doors.table(&[("not listed in a folder", &format!("{full} sslcrldir={}", folder.display()), Ok("verified"))]);
    doors.stage.make_dir(".postgresql");
    doors.file(".postgresql/root.crt", &top.pem);
    doors.table(&[(
        "the default root",
        "host=db.example.test hostaddr=127.0.0.1 sslmode=verify-full",
        Ok("host verified"),
    )]);
    doors.file(".postgresql/root.crl", &top.revoke(&[8], 2080));
    doors.table(&[("the default list", "host=db.example.test hostaddr=127.0.0.1 sslmode=require", Err("revoked"))]);
    // A list that is named and missing is no list: psql goes on without, Walden does not.
    let missing = doors.settings(&with("missing.crl"));
    assert!(doors.psql(&missing, &[]).is_ok());
    let (replication, sql) = doors.walden(&missing, &[]);
    assert!(replication.is_err_and(|why| why.contains("missing.crl")) && sql.is_err());
}

/// The file name under which OpenSSL looks for an authority's list.
fn hash_of(doors: &Doors, file: &str) -> String {
    let mut command = Command::new(parts::tool("openssl"));
    command.args(["x509", "-noout", "-subject_hash", "-in"]).arg(doors.stage.join(file));
    finish(command, LIMIT).stdout.trim().to_owned()
}
