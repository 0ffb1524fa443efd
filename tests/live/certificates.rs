//! The certificate table: servers' certificates of every kind, believed and refused by PostgreSQL's own programs and by Walden alike.

use crate::support::certificates::{Identity, authority, named, server};
use crate::support::doors::Doors;

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
        Err("leads to the authority \"Top\"|middle.crt"),
    )]);
    doors.serve(&leaf, &[]);
    doors.table(&[
        ("middle not sent", full, Err("leads to the authority \"Middle\"")),
        ("middle among the roots", "sslmode=verify-ca sslrootcert={dir}/both.crt", Ok("verified")),
    ]);

    doors.serve(&Identity::self_signed(authority("Other")).issue(server(&name)), &[]);
    doors.table(&[
        ("unknown authority", chain, Err("leads to the authority \"Other\"|root.crt")),
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
    doors.table(&[("not self-signed, known", full, Err("leads to the authority \"Top\""))]);

    // X.509 v1, as openssl x509 -req writes it.
    doors.file("root.crt", &top.pem);
    doors.serve(&top.issue(named("db.example.test")).into_v1(Some(&top)), &[]);
    doors.table(&[("v1", full, Ok("host verified"))]);
    let first = Identity::self_signed(authority("First")).into_v1(None);
    doors.file("root.crt", &first.pem);
    doors.serve(&first.issue(named("db.example.test")).into_v1(Some(&first)), &[]);
    doors.table(&[("v1 of a v1 root", full, Ok("host verified"))]);
    let second = first.issue(authority("Second")).into_v1(Some(&first));
    doors.serve(&second.issue(server(&name)), &[&second]);
    doors.table(&[("v1 in the middle", full, Err("authority \"Second\" cannot be trusted|no authority"))]);

    // What OpenSSL says of keys of another time depends on how it was built; Walden never believes them.
    doors.serve_weak("db.example.test");
    let (replication, sql) = doors.walden(&doors.settings("sslmode=require"), &[]);
    assert!(replication.is_err_and(|why| why.contains("RSA key of less than 2048 bits")) && sql.is_err());
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
    let hashed = doors.hash_of("root.crt");
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
