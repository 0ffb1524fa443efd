//! The libpq table: the same settings let PostgreSQL's own `psql` and `pg_receivewal` and Walden's two kinds of connection in, or keep them
//! all out. And what only newer libpqs know, on Walden alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::streaming::archive_all;
use crate::support::certificates::{Identity, authority, named, server};
use crate::support::doors::{Doors, PASSWORD, assert_outcome};
use crate::support::oracle::{cluster_folder, compare_stored};
use crate::support::{Walden, has_cause, parts};

const MINUTE: Duration = Duration::from_secs(60);

fn ready(major: u32) -> (Doors, Identity) {
    let doors = Doors::open(major);
    let top = Identity::self_signed(authority("Top"));
    doors.file("root.crt", &top.pem);
    doors.file("other.crt", &Identity::self_signed(authority("Other")).pem);
    doors.serve(&top.issue(server(&["localhost", "127.0.0.1"])), &[]);
    (doors, top)
}

/// What is tried, and in which order, when TLS or the login fails.
#[test]
fn every_sslmode_falls_back_as_in_psql() {
    let (doors, _) = ready(17);
    doors.table(&[
        ("disable", "sslmode=disable", Ok("no TLS")),
        ("allow", "sslmode=allow", Ok("no TLS")),
        ("prefer", "sslmode=prefer", Ok("TLS 1.3")),
        ("default", "", Ok("TLS 1.3, certificate not verified")),
        ("require", "sslmode=require", Ok("TLS 1.3")),
        ("hostssl, disable", "user=tls_only sslmode=disable", Err("pg_hba.conf|without TLS|sslmode=prefer")),
        ("hostssl, allow", "user=tls_only sslmode=allow", Ok("TLS 1.3")),
        ("hostssl, prefer", "user=tls_only", Ok("TLS 1.3")),
        ("hostnossl, allow", "user=plain_only sslmode=allow", Ok("no TLS")),
        ("hostnossl, prefer", "user=plain_only", Ok("no TLS")),
        ("hostnossl, require", "user=plain_only sslmode=require", Err("pg_hba.conf|over TLS")),
        ("wrong root, prefer", "sslrootcert={dir}/other.crt", Ok("no TLS")),
        (
            "wrong root, prefer, hostssl",
            "user=tls_only sslrootcert={dir}/other.crt",
            Err("leads to the authority \"Top\"|other.crt"),
        ),
        (
            "wrong root, allow, hostssl",
            "user=tls_only sslmode=allow sslrootcert={dir}/other.crt",
            Err("leads to the authority \"Top\""),
        ),
        ("wrong root, allow", "sslmode=allow sslrootcert={dir}/other.crt", Ok("no TLS")),
        ("wrong root, require", "sslmode=require sslrootcert={dir}/other.crt", Err("leads to the authority \"Top\"")),
        ("wrong password, prefer", "user=tls_scram password=wrong", Err("refused the password")),
        ("wrong password, allow", "user=tls_scram password=wrong sslmode=allow", Err("refused the password")),
        ("socket, verify-full", "host={dir}/pg sslmode=verify-full", Ok("Unix socket")),
        ("socket, wrong root", "host={dir}/pg sslmode=require sslrootcert={dir}/other.crt", Ok("Unix socket")),
    ]);
    doors.set(&[("ssl", "off")]);
    doors.table(&[
        ("no TLS, prefer", "", Ok("no TLS")),
        ("no TLS, allow", "sslmode=allow", Ok("no TLS")),
        ("no TLS, allow, wrong password", "sslmode=allow user=scram password=wrong", Err("refused the password")),
        ("no TLS, require", "sslmode=require", Err("does not support TLS|sslmode=require|ssl = on")),
        ("no TLS, verify-full", "sslmode=verify-full sslrootcert={dir}/root.crt", Err("does not support TLS")),
    ]);
}

/// Passwords, and SCRAM bound to the connection.
#[test]
fn logins_and_channel_binding_are_as_in_psql() {
    let (doors, _) = ready(17);
    let with = |settings: &str| format!("{settings} password={PASSWORD}");
    let case = |name: &'static str, settings: &str, expected| {
        assert_outcome(name, doors.agreed(name, &doors.settings(&with(settings)), &[]), expected);
    };
    case("scram", "user=scram", Ok("TLS 1.3"));
    case("scram, plain", "user=scram sslmode=disable", Ok("no TLS"));
    case("scram, 1.2", "user=scram ssl_max_protocol_version=TLSv1.2 channel_binding=require", Ok("TLS 1.2"));
    case("md5", "user=hashed", Ok("TLS 1.3"));
    case("clear", "user=clear", Ok("TLS 1.3"));
    case("bound", "user=scram channel_binding=require", Ok("TLS 1.3"));
    case("unbound", "user=scram channel_binding=disable", Ok("TLS 1.3"));
    case("bound, plain", "user=scram channel_binding=require sslmode=disable", Err("channel_binding=require"));
    case("bound, socket", "user=postgres host={dir}/pg channel_binding=require", Err("channel_binding=require"));
    case("bound, md5", "user=hashed channel_binding=require", Err("channel_binding=require"));
    case("bound, clear", "user=clear channel_binding=require", Err("channel_binding=require"));
    case("bound, trust", "user=postgres channel_binding=require", Err("channel_binding=require"));
    doors.table(&[("no password", "user=scram", Err("none was given|.pgpass"))]);
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ECDSA_P521_SHA512, &rcgen::PKCS_RSA_SHA256] {
        doors.serve(&Identity::self_signed_by(named("localhost"), algorithm), &[]);
        case("bound, other hashes", "user=scram channel_binding=require", Ok("TLS 1.3"));
    }
    // libpq and the server know no hash for Ed25519 and fail with it; Walden goes on without binding unless it is required.
    doors.serve(&Identity::self_signed_by(named("localhost"), &rcgen::PKCS_ED25519), &[]);
    let (replication, sql) = doors.walden(&doors.settings(&with("user=scram channel_binding=require")), &[]);
    assert!(replication.is_err_and(|why| why.contains("has no hash")) && sql.is_err());
    let (replication, sql) = doors.walden(&doors.settings(&with("user=scram")), &[]);
    assert!(replication.is_ok() && sql.is_ok(), "{replication:?} {sql:?}");
}

/// The client's own certificate.
#[test]
fn client_certificates_are_sent_as_psql_sends_them() {
    let (doors, top) = ready(17);
    doors.set(&[("ssl_ca_file", &doors.stage.join("root.crt").display().to_string())]);
    let client = top.issue(named("certified"));
    let stranger = Identity::self_signed(authority("Stranger")).issue(named("certified"));
    for (name, identity) in [("client", &client), ("stranger", &stranger)] {
        doors.file(&format!("{name}.crt"), &identity.pem);
        doors.file(&format!("{name}.key"), &identity.key_pem());
    }
    let v1 = top.issue(named("certified")).into_v1(Some(&top));
    doors.file("v1.crt", &v1.pem);
    doors.file("v1.key", &v1.key_pem());
    let mode = |name: &str, mode| {
        let path = doors.file(name, &client.key_pem());
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    };
    mode("open.key", 0o644);
    mode("group.key", 0o640);
    doors.file("locked.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n");
    let pair = |certificate: &str, key: &str| {
        format!("user=certified sslmode=require sslcert={{dir}}/{certificate} sslkey={{dir}}/{key}")
    };
    doors.table(&[
        ("none", "user=certified sslmode=require", Err("pg_hba.conf|over TLS")),
        ("sent", &pair("client.crt", "client.key"), Ok("TLS 1.3")),
        ("sent, v1", &pair("v1.crt", "v1.key"), Ok("TLS 1.3")),
        ("sent, 1.2", &format!("{} ssl_max_protocol_version=TLSv1.2", pair("client.crt", "client.key")), Ok("TLS 1.2")),
        ("not there", &pair("none.crt", "client.key"), Err("pg_hba.conf")),
        ("no key", &pair("client.crt", "none.key"), Err("none.key|does not exist")),
        ("another's key", &pair("client.crt", "stranger.key"), Err("does not belong")),
        ("open key", &pair("client.crt", "open.key"), Err("open.key|others may open it|0600")),
        ("group's key", &pair("client.crt", "group.key"), Err("others may open it")),
        ("locked key", &pair("client.crt", "locked.key"), Err("passphrase")),
        ("no certificate in it", &pair("client.key", "client.key"), Err("sslcert|no certificate")),
        ("unknown authority", &pair("stranger.crt", "stranger.key"), Err("refused our certificate|ssl_ca_file")),
        (
            "unknown authority, 1.2",
            &format!("{} ssl_max_protocol_version=TLSv1.2", pair("stranger.crt", "stranger.key")),
            Err("refused our certificate"),
        ),
    ]);
    // The defaults in the home directory.
    doors.stage.make_dir(".postgresql");
    doors.file(".postgresql/postgresql.crt", &client.pem);
    doors.file(".postgresql/postgresql.key", &client.key_pem());
    doors.table(&[("from home", "user=certified", Ok("TLS 1.3"))]);
}

/// Where settings come from, and lists of hosts.
#[test]
fn settings_are_found_where_libpq_finds_them() {
    let (doors, _) = ready(17);
    let port = doors.server.port.to_string();
    let closed = parts::free_port();
    let dir = doors.stage.path().display().to_string();
    doors.file(".pgpass", &format!("localhost:{port}:*:scram:{PASSWORD}\n127.0.0.1:*:*:hashed:{PASSWORD}\n"));
    doors.file("passwords", &format!("*:*:*:clear:{PASSWORD}\n"));
    let open = doors.file("open", &format!("*:*:*:clear:{PASSWORD}\n"));
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).expect("a mode");
    let services =
        format!("# ours\n[here]\nhost=127.0.0.1\nport={port}\nuser=clear\npassword={PASSWORD}\ndbname=postgres\n");
    doors.file(".pg_service.conf", &services);
    doors.stage.make_dir("etc");
    doors.file("etc/pg_service.conf", &services.replace("[here]", "[there]"));
    doors.file("named.conf", &services.replace("[here]", "[named]"));
    let (socket, url) = (format!("host={dir}/pg"), format!("postgresql://postgres@127.0.0.1:{port}/postgres"));
    let etc = format!("{dir}/etc");
    let named = format!("{dir}/named.conf");
    let (other, passwords) = (format!("{dir}/other.crt"), format!("{dir}/passwords"));
    let cases: Vec<(&str, String, Vec<(&str, &str)>, Result<&str, &str>)> = vec![
        ("URL", format!("{url}?sslmode=require"), vec![], Ok("TLS")),
        (
            "URL, two hosts",
            format!("postgresql://postgres@127.0.0.1:{closed},127.0.0.1:{port}/postgres"),
            vec![],
            Ok("TLS"),
        ),
        ("URL, JDBC", format!("{url}?ssl=true"), vec![], Ok("TLS")),
        ("URL, ? in the password", format!("postgres://postgres:p?w@127.0.0.1:{port}/postgres"), vec![], Ok("TLS")),
        (
            "URL, @ in an option",
            format!("postgres://127.0.0.1:{port}/postgres?user=postgres&application_name=walden@dc1"),
            vec![],
            Ok("TLS"),
        ),
        (
            "URL, @ in a path",
            format!("postgres://127.0.0.1:{port}/postgres?user=postgres&passfile=/x@y"),
            vec![],
            Ok("TLS"),
        ),
        ("URL, odd option", format!("{url}?sslmood=require"), vec![], Err("sslmood")),
        ("URL, percent", format!("postgres://postgres@127%2e0.0.1:{port}/postgres"), vec![], Ok("TLS")),
        (
            "socket in a URL",
            format!("postgresql:///postgres?host={dir}/pg&port={port}&user=postgres"),
            vec![],
            Ok("socket"),
        ),
        (
            "two hosts",
            format!("host={dir}/none,127.0.0.1 port={port} user=postgres dbname=postgres"),
            vec![],
            Ok("TLS"),
        ),
        (
            "two hosts, two ports",
            format!("host=127.0.0.1,127.0.0.1 port={closed},{port} user=postgres dbname=postgres"),
            vec![],
            Ok("TLS"),
        ),
        ("three ports for two hosts", "host=a,b port=1,2,3 user=u".into(), vec![], Err("port")),
        ("nobody there", format!("host=127.0.0.1 port={closed} user=u"), vec![], Err("cannot connect")),
        ("PGHOST", "user=postgres dbname=postgres".into(), vec![("PGHOST", "127.0.0.1"), ("PGPORT", &port)], Ok("TLS")),
        (
            "PGHOSTADDR",
            "host=nowhere.invalid user=postgres dbname=postgres".into(),
            vec![("PGHOSTADDR", "127.0.0.1"), ("PGPORT", &port)],
            Ok("TLS"),
        ),
        ("PGSSLMODE", doors.settings(""), vec![("PGSSLMODE", "disable")], Ok("no TLS")),
        ("PGREQUIRESSL", doors.settings("user=plain_only"), vec![("PGREQUIRESSL", "1")], Err("over TLS")),
        ("PGSSLROOTCERT", doors.settings("sslmode=require"), vec![("PGSSLROOTCERT", &other)], Err("Top")),
        ("PGSSLMAXPROTOCOLVERSION", doors.settings(""), vec![("PGSSLMAXPROTOCOLVERSION", "TLSv1.2")], Ok("TLS 1.2")),
        ("PGCHANNELBINDING", doors.settings(""), vec![("PGCHANNELBINDING", "require")], Err("channel_binding")),
        (
            "PGUSER, PGPASSWORD",
            format!("host=127.0.0.1 port={port} dbname=postgres"),
            vec![("PGUSER", "clear"), ("PGPASSWORD", PASSWORD)],
            Ok("TLS"),
        ),
        (".pgpass", doors.settings("user=hashed"), vec![], Ok("TLS")),
        (".pgpass, other host", doors.settings("host=127.0.0.1 user=scram"), vec![], Err("password")),
        (".pgpass, this host", doors.settings("host=localhost hostaddr=127.0.0.1 user=scram"), vec![], Ok("TLS")),
        ("passfile", doors.settings("user=clear passfile={dir}/passwords"), vec![], Ok("TLS")),
        ("PGPASSFILE", doors.settings("user=clear"), vec![("PGPASSFILE", &passwords)], Ok("TLS")),
        ("open passfile", doors.settings("user=clear passfile={dir}/open"), vec![], Err("others may open it")),
        ("service", "service=here".into(), vec![], Ok("TLS")),
        ("PGSERVICE", String::new(), vec![("PGSERVICE", "here")], Ok("TLS")),
        ("PGSYSCONFDIR", "service=there".into(), vec![("PGSYSCONFDIR", &etc)], Ok("TLS")),
        ("PGSERVICEFILE", "service=named".into(), vec![("PGSERVICEFILE", &named)], Ok("TLS")),
        (
            "PGSERVICEFILE that is missing",
            "service=here".into(),
            vec![("PGSERVICEFILE", "/none.conf")],
            Err("/none.conf"),
        ),
        ("no such service", "service=nowhere".into(), vec![], Err("nowhere")),
        ("the string before the service", "service=here user=postgres".into(), vec![], Ok("TLS")),
        ("options", doors.settings("options='-c work_mem=1MB'"), vec![], Ok("TLS")),
        ("odd options", doors.settings("options='-c nonsense=1'"), vec![], Err("nonsense")),
        (
            "keepalives",
            doors.settings(
                "keepalives=1 keepalives_idle=5 keepalives_interval=2 keepalives_count=2 tcp_user_timeout=9000",
            ),
            vec![],
            Ok("TLS"),
        ),
        ("keepalives that are no number", doors.settings("keepalives_idle=soon"), vec![], Err("keepalives_idle")),
        ("connect_timeout", doors.settings("connect_timeout=5"), vec![], Ok("TLS")),
        ("odd connect_timeout", doors.settings("connect_timeout=soon"), vec![], Err("connect_timeout")),
        ("read-write", doors.settings("target_session_attrs=read-write"), vec![], Ok("TLS")),
        ("primary", doors.settings("target_session_attrs=primary"), vec![], Ok("TLS")),
        ("prefer-standby", doors.settings("target_session_attrs=prefer-standby"), vec![], Ok("TLS")),
        ("standby", doors.settings("target_session_attrs=standby"), vec![], Err("target_session_attrs=standby")),
        ("read-only", doors.settings("target_session_attrs=read-only"), vec![], Err("target_session_attrs=read-only")),
        ("odd session", doors.settings("target_session_attrs=fast"), vec![], Err("target_session_attrs")),
        ("odd sslmode", doors.settings("sslmode=maybe"), vec![], Err("sslmode")),
        ("odd option", doors.settings("hots=a"), vec![], Err("did you mean host?")),
        ("no sni", doors.settings("sslsni=0"), vec![], Ok("TLS")),
        ("GSSAPI", doors.settings("gssencmode=require"), vec![], Err("gssencmode")),
    ];
    for (name, settings, environment, expected) in cases {
        assert_outcome(name, doors.agreed(name, &settings, &environment), expected);
    }
    // An empty value keeps the variable out. pg_receivewal drops it.
    let variables =
        [("PGPASSWORD", PASSWORD), ("PGHOST", "127.0.0.1"), ("PGSSLMODE", "disable"), ("PGAPPNAME", "another")];
    for (name, settings, expected) in [
        ("password", doors.settings("user=clear"), Ok("no TLS")),
        ("no password", doors.settings("user=clear password=''"), Err("none was given")),
        ("no host", format!("host='' port={port} user=postgres dbname=postgres"), Err("cannot connect|.s.PGSQL.")),
        ("no sslmode", doors.settings("sslmode=''"), Err("sslmode")),
        ("no name", doors.settings("application_name='' sslmode=require"), Ok("TLS")),
    ] {
        let (replication, sql) = doors.walden(&settings, &variables);
        let psql = doors.psql(&settings, &variables);
        assert!(psql.is_ok() == replication.is_ok() && psql.is_ok() == sql.is_ok(), "{name}: {psql:?} {replication:?}");
        assert_outcome(name, replication, expected);
    }
    // psql reads no DATABASE_URL.
    let (replication, sql) = doors.walden("", &[("DATABASE_URL", &url)]);
    assert!(replication.is_ok() && sql.is_ok(), "{replication:?} {sql:?}");
    assert!(doors.walden("", &[("PGHOST", &socket[5..]), ("PGPORT", &port), ("PGUSER", "postgres")]).0.is_ok());
    // A server that is read-only without being a standby.
    doors.set(&[("default_transaction_read_only", "on")]);
    for (wanted, fine) in [("read-write", false), ("read-only", true), ("primary", true), ("standby", false)] {
        let outcome = doors.agreed(wanted, &doors.settings(&format!("target_session_attrs={wanted}")), &[]);
        assert_eq!(outcome.is_ok(), fine, "{wanted}: {outcome:?}");
    }
}

/// Settings that came with libpq 16 to 18, which the `psql` at hand may not know.
#[test]
fn the_settings_of_newer_libpqs_do_what_they_say() {
    let (doors, top) = ready(17);
    let with = |settings: &str| doors.settings(&format!("{settings} password={PASSWORD}"));
    let root = doors.stage.join("root.crt").display().to_string();
    let client = top.issue(named("certified"));
    doors.file("client.crt", &client.pem);
    doors.file("client.key", &client.key_pem());
    let pair = "sslcert={dir}/client.crt sslkey={dir}/client.key";
    for (name, settings, expected) in [
        ("direct", "sslmode=require sslnegotiation=direct".to_owned(), Ok("TLS 1.3")),
        (
            "direct, verified",
            "sslmode=verify-full sslrootcert={dir}/root.crt sslnegotiation=direct".to_owned(),
            Ok("host verified"),
        ),
        ("direct, weak", "sslnegotiation=direct".to_owned(), Err("sslmode=require")),
        ("shuffled", "load_balance_hosts=random".to_owned(), Ok("TLS")),
        ("system, weak", "sslmode=require sslrootcert=system".to_owned(), Err("verify-full")),
        ("system, unknown", "sslrootcert=system".to_owned(), Err("system")),
        ("scram asked", "user=scram require_auth=scram-sha-256".to_owned(), Ok("TLS")),
        ("scram asked, md5 wanted", "user=hashed require_auth=scram-sha-256".to_owned(), Err("md5|require_auth")),
        (
            "scram asked, clear wanted",
            "user=clear require_auth=scram-sha-256,md5".to_owned(),
            Err("password|require_auth"),
        ),
        ("not none", "require_auth=!none".to_owned(), Err("none|require_auth")),
        ("certificate not asked for", format!("sslmode=require sslcertmode=require {pair}"), Err("did not ask")),
    ] {
        let (replication, sql) = doors.walden(&with(&settings), &[]);
        assert_eq!(replication.is_ok(), sql.is_ok(), "{name}: {replication:?} {sql:?}");
        assert!(!format!("{replication:?}{sql:?}").contains(PASSWORD));
        assert_outcome(name, replication, expected);
    }
    // The system's authorities, which this variable replaces.
    let system = verified(&doors, "sslrootcert=system").env("SSL_CERT_FILE", &root);
    let said = system.ok(&["check"]);
    assert!(said.contains("certificate and host verified"), "{said}");
    doors.set(&[("ssl_ca_file", &root)]);
    for (name, settings, expected) in [
        ("certificate asked for", format!("user=certified sslmode=require sslcertmode=require {pair}"), Ok("TLS")),
        ("certificate asked for, none there", "sslmode=require sslcertmode=require".to_owned(), Err("none to send")),
        (
            "certificate asked for, none sent",
            format!("user=certified sslmode=require sslcertmode=disable {pair}"),
            Err("pg_hba.conf"),
        ),
    ] {
        assert_outcome(name, doors.walden(&with(&settings), &[]).0, expected);
    }
    doors.set(&[("ssl_max_protocol_version", "TLSv1.2")]);
    doors.table(&[
        ("too old", "sslmode=require ssl_min_protocol_version=TLSv1.3", Err("in common|ssl_min_protocol_version")),
        ("old enough", "sslmode=require", Ok("TLS 1.2")),
        ("too old, prefer", "ssl_min_protocol_version=TLSv1.3", Ok("no TLS")),
    ]);
}

/// Before PostgreSQL 17 nobody answers to TLS that was not asked for.
#[test]
fn direct_negotiation_with_an_older_server_is_said() {
    let (doors, _) = ready(15);
    let (replication, sql) = doors.walden(&doors.settings("sslmode=require sslnegotiation=direct"), &[]);
    assert!(sql.is_err());
    assert_outcome("direct, 15", replication, Err("sslnegotiation=direct needs PostgreSQL 17"));
    doors.table(&[("asked for, 15", "sslmode=require", Ok("TLS 1.3"))]);
}

/// An agent's configuration that verifies the server and binds the login to the connection, with further options of libpq.
fn verified(doors: &Doors, options: &str) -> Walden {
    let folder = doors.stage.path().display();
    let settings = format!(
        "host=127.0.0.1 user=tls_scram password={PASSWORD} sslmode=verify-full sslrootcert={{dir}}/root.crt \
         channel_binding=require {options}"
    );
    Walden::with_config(
        &doors.stage,
        &format!(
            "[postgres]\nurl = \"{}\"\nconnect_timeout = \"3s\"\n[spool]\npath = \"{folder}/spool\"\nfree_bytes_min = 0\n\
             [state]\npath = \"{folder}/state\"\n[backup]\ninitial = false\n[metrics]\nlisten = \"127.0.0.1:{}\"\n\
             [[repository]]\nname = \"main\"\ntype = \"local\"\npath = \"{folder}/archive\"\n",
            doors.settings(&settings),
            parts::free_port()
        ),
    )
}

/// A base backup, and WAL under load that equals the server's own copies, over both versions of TLS.
#[test]
fn wal_and_backups_come_whole_over_tls() {
    for version in ["TLSv1.3", "TLSv1.2"] {
        let (doors, _) = ready(17);
        let walden = verified(&doors, &format!("ssl_max_protocol_version={version}"));
        let mut agent = walden.run_connected();
        doors.server.pgbench_init(5);
        let load = doors.server.pgbench(&["-c", "2", "-T", "600"]);
        walden.ok(&["backup"]);
        load.stop();
        archive_all(&doors.server, &mut agent);
        let folder = cluster_folder(&walden.repository(), "main", &doors.server);
        compare_stored(&folder, &doors.server.oracle).assert_whole(21);
        let used = doors.server.psql("SELECT DISTINCT version FROM pg_stat_ssl JOIN pg_stat_replication USING (pid)");
        assert_eq!(used, [[Some(version.to_owned())]]);
    }
}

/// The agent goes on with a renewed certificate, is unhealthy while it is wrong, and `check` says what is wrong.
#[test]
fn renewed_certificates_count_without_a_restart() {
    let (doors, top) = ready(17);
    let walden = verified(&doors, "");
    let said = walden.ok(&["check"]);
    assert!(said.contains("TLS 1.3, certificate and host verified"), "{said}");
    let mut agent = walden.run_connected();
    let end_streams =
        || doors.server.psql("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active");
    for (name, params, words) in [
        ("expired", expired(), "expired on 2024-02-03"),
        ("of another host", server(&["elsewhere.test"]), "not for 127.0.0.1"),
    ] {
        doors.serve(&top.issue(params), &[]);
        end_streams();
        let status = agent.wait_status(MINUTE, name, |status| status["causes"].to_string().contains(words));
        assert!(has_cause(&status, "not_connected"), "{name}: {status}");
        let check = walden.exec(&["check"]);
        assert!(check.code == Some(1) && check.stdout.contains(words), "{check:?}");
        assert!(!format!("{status}{check:?}{}", agent.log()).contains(PASSWORD));
        doors.serve(&top.issue(server(&["127.0.0.1"])), &[]);
        agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    }
    // Another authority, here and there.
    let next = Identity::self_signed(authority("Next"));
    doors.file("root.crt", &format!("{}{}", top.pem, next.pem));
    doors.serve(&next.issue(server(&["127.0.0.1"])), &[]);
    end_streams();
    let end = doors.server.switch_wal();
    agent.wait_archived(end, MINUTE);
}

fn expired() -> rcgen::CertificateParams {
    let mut params = server(&["127.0.0.1"]);
    params.not_after = rcgen::date_time_ymd(2024, 2, 3);
    params
}
