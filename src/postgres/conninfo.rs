//! The two spellings of libpq's connection strings, taken apart into (option, value) pairs. What an option means is in `options`.
//!
//! Source: "Connection Strings" in the libpq chapter of PostgreSQL's documentation, and `conninfo_parse`, `conninfo_uri_parse_options`
//! in `src/interfaces/libpq/fe-connect.c`.

use super::PostgresError;
use super::options::is_known;

/// Longer strings are refused; nobody writes them by hand.
const LENGTH_MAX: usize = 64 * 1024;

/// What to do about a password that takes a URL apart in the wrong place.
pub(super) const ESCAPES: &str = "in the URL's password write / ? # @ : % as %2F %3F %23 %40 %3A %25";

pub(super) type Pairs = Vec<(String, String)>;

/// Takes apart `postgres://…`, `postgresql://…` or `key=value …`. The result never shows a value in an error, since one may be a password.
pub(super) fn parse(text: &str) -> Result<Pairs, PostgresError> {
    if text.len() > LENGTH_MAX {
        return Err(PostgresError::settings(format!("it is longer than {LENGTH_MAX} bytes")));
    }
    if text.contains('\0') {
        return Err(PostgresError::settings("it contains a zero byte"));
    }
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => parse_url(rest),
        None if text.contains("://") && !text.contains('=') => {
            Err(PostgresError::settings("a URL begins with postgres:// or postgresql://"))
        }
        None => parse_key_values(text),
    }
}

fn parse_key_values(text: &str) -> Result<Pairs, PostgresError> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_ascii_whitespace()).unwrap_or(rest.len());
        let key = &rest[..end];
        rest = rest[end..].trim_start();
        let Some(after) = rest.strip_prefix('=') else {
            // The word is not shown: it may be the second half of a password with a space.
            let why = if pairs.is_empty() {
                "it is neither key=value text nor a URL such as postgres://user@host/database"
            } else {
                "a word is followed by no \"=\"; a value with spaces needs single quotes"
            };
            return Err(PostgresError::settings(why));
        };
        let (value, after) = parse_value(after.trim_start(), key)?;
        pairs.push((key.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// One value: bare up to white space, or in single quotes; a backslash makes the next character literal in both.
fn parse_value<'a>(text: &'a str, key: &str) -> Result<(String, &'a str), PostgresError> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            c if !quoted && c.is_ascii_whitespace() => return Ok((value, &text[at..])),
            c => value.push(c),
        }
    }
    if quoted {
        return Err(PostgresError::settings(format!("the quoted value of {} does not end", shown(key))));
    }
    Ok((value, ""))
}

/// `[user[:password]@][host[:port][,…]][/dbname][?option=value[&…]]`, every part percent-encoded.
fn parse_url(text: &str) -> Result<Pairs, PostgresError> {
    let mut pairs = Pairs::new();
    let (login, rest) = split_login(text);
    let (hosts, behind) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (path, query) = behind.split_once('?').unwrap_or((behind, ""));
    // A slash in a password ends the hosts too early, and the password's beginning looks like a port.
    let is_cut = path.contains('@') || (query.contains('@') && !is_of_options(query));
    if login.is_none() && hosts.contains(':') && is_cut {
        return Err(PostgresError::settings(format!("an @ stands behind the host; {ESCAPES}")));
    }
    if let Some(login) = login {
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        push(&mut pairs, "user", user)?;
        push(&mut pairs, "password", password)?;
    }
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = split_port(host)?;
        names.push(name);
        ports.push(port);
    }
    // The lists keep empty places, so that the nth port stays the nth host's.
    if names.iter().any(|name| !name.is_empty()) || names.len() > 1 {
        pairs.push(("host".into(), decode(&names.join(","))?));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        pairs.push(("port".into(), decode(&ports.join(","))?));
    }
    push(&mut pairs, "dbname", path.strip_prefix('/').unwrap_or(path))?;
    for option in query.split('&').filter(|option| !option.is_empty()) {
        let Some((key, value)) = option.split_once('=') else {
            return Err(PostgresError::settings(format!("the URL's option \"{}\" has no value", shown(option))));
        };
        let (key, value) = (decode(key)?, decode(value)?);
        // JDBC's spelling, which libpq accepts as well.
        match (key.as_str(), value.as_str()) {
            ("ssl", "true") => pairs.push(("sslmode".into(), "require".into())),
            _ => pairs.push((key, value)),
        }
    }
    Ok(pairs)
}

/// The login ends at the first `@`, if no slash comes before it; a question mark does not end it. A further `@` before the hosts end can
/// only be the password's, which is taken here although libpq wants it escaped.
fn split_login(text: &str) -> (Option<&str>, &str) {
    let Some(first) = text.find(['@', '/']).filter(|at| text[*at..].starts_with('@')) else { return (None, text) };
    let hosts = &text[first + 1..];
    let hosts = &hosts[..hosts.find(['/', '?']).unwrap_or(hosts.len())];
    let end = hosts.rfind('@').map_or(first, |at| first + 1 + at);
    (Some(&text[..end]), &text[end + 1..])
}

fn is_of_options(query: &str) -> bool {
    query.split('&').all(|option| option.split_once('=').is_some_and(|(key, _)| is_known(key)))
}

fn push(pairs: &mut Pairs, key: &str, encoded: &str) -> Result<(), PostgresError> {
    if !encoded.is_empty() {
        pairs.push((key.into(), decode(encoded)?));
    }
    Ok(())
}

/// `name:port`, `[IPv6]:port`; either may be empty.
fn split_port(host: &str) -> Result<(&str, &str), PostgresError> {
    if let Some(inner) = host.strip_prefix('[') {
        let Some((address, after)) = inner.split_once(']') else {
            return Err(PostgresError::settings("an IPv6 address in the URL lacks its closing bracket"));
        };
        return match after.strip_prefix(':') {
            Some(port) => Ok((address, port)),
            None if after.is_empty() => Ok((address, "")),
            None => Err(PostgresError::settings("only a port may follow an IPv6 address in brackets")),
        };
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

/// Undoes percent-encoding. `+` is not a space here, and `%00` is refused, as in libpq.
fn decode(text: &str) -> Result<String, PostgresError> {
    let wrong = |why: &str| PostgresError::settings(format!("the URL has {why}"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = after;
            continue;
        }
        let digit = |at: usize| after.get(at).and_then(|&b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err(wrong("a % that two hexadecimal digits do not follow (write % as %25)"));
        };
        if high == 0 && low == 0 {
            return Err(wrong("a forbidden %00"));
        }
        bytes.push((high * 16 + low) as u8); // both below 16
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| wrong("percent-encoded bytes that are not UTF-8"))
}

/// A name for an error message: short, without anything that could disturb a terminal.
pub(super) fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> String {
        match parse(text) {
            Ok(pairs) => pairs.iter().map(|(k, v)| format!("{k}=<{v}>")).collect::<Vec<_>>().join(" "),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn both_spellings_are_taken_apart_as_libpq_does() {
        let table = [
            ("", ""),
            ("host=a port=5433", "host=<a> port=<5433>"),
            ("  host = a\tuser='b c' ", "host=<a> user=<b c>"),
            (r"password='it\'s \\ here' user=a\ b", r"password=<it's \ here> user=<a b>"),
            ("user=''", "user=<>"),
            ("postgres://", ""),
            ("postgresql://h", "host=<h>"),
            (
                "postgres://u:p%40ss@h:5433/db?sslmode=disable",
                "user=<u> password=<p@ss> host=<h> port=<5433> dbname=<db> sslmode=<disable>",
            ),
            ("postgres://u@[::1]:5433", "user=<u> host=<::1> port=<5433>"),
            ("postgres://%2Fvar%2Frun/db", "host=</var/run> dbname=<db>"),
            ("postgres:///db?host=/tmp", "dbname=<db> host=</tmp>"),
            ("postgres://a:1,b,c:3/", "host=<a,b,c> port=<1,,3>"),
            ("postgres://h?ssl=true", "host=<h> sslmode=<require>"),
            ("postgres://u:p?w@h/d", "user=<u> password=<p?w> host=<h> dbname=<d>"),
            ("postgres://u:1?x=y@h?user=v", "user=<u> password=<1?x=y> host=<h> user=<v>"),
            ("postgres://u:p@ss@h/d", "user=<u> password=<p@ss> host=<h> dbname=<d>"),
            ("postgres://h:1/db?user=walden@tenant", "host=<h> port=<1> dbname=<db> user=<walden@tenant>"),
            (
                "postgres://h:1/db?application_name=a@b&ssl=true",
                "host=<h> port=<1> dbname=<db> application_name=<a@b> sslmode=<require>",
            ),
            ("postgres://h?sslrootcert=/x@y", "host=<h> sslrootcert=</x@y>"),
            ("postgres://u@h/db?passfile=/x@y", "user=<u> host=<h> dbname=<db> passfile=</x@y>"),
        ];
        for (text, expected) in table {
            assert_eq!(pairs(text), expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_without_showing_values() {
        for text in [
            "host",
            "password='hunter2",
            "postgres://u:hunter2%zz@h",
            "postgres://[::1",
            "postgres://[::1]x",
            "postgres://h/%00",
            "mysql://h",
            "postgres://h?x",
            "password=ge hunter2 host=h",
            "hunter2",
            "postgres://u:1/hunter2@h/d",
            "postgres://u:1/a?hunter2@h/d",
            "postgres://u:1/a?hunter2=b@h/d",
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}", url in "postgres://[a-z:@/?%&=,\\[\\]0-9]{0,60}") {
            let _ = (parse(&text), parse(&url));
        }

        #[test]
        fn a_quoted_value_comes_back(value in "[^\0]{0,40}") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            let back = parse(&format!("password='{quoted}' host=h")).unwrap();
            proptest::prop_assert_eq!(&back[0].1, &value);
        }
    }
}
