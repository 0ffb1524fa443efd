//! The files that connection settings live in: password file, `.pgpass`, service file. Read anew at each connect, so that a changed
//! password needs no restart.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::conninfo::{Pairs, shown};
use super::{PostgresError, Secret};

/// Such files are a few lines long.
const SIZE_MAX: u64 = 1 << 20;

fn read_bounded(file: File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(SIZE_MAX + 1).read_to_end(&mut content)?;
    if content.len() as u64 > SIZE_MAX {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(content)
}

/// Opens a regular file. A FIFO would block for ever, so it is looked at first.
fn open_regular(path: &Path) -> io::Result<File> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    File::open(path)
}

/// `postgres.password_file`: the password alone; one newline at the end does not belong to it.
pub(super) fn read_password_file(path: &Path) -> Result<Secret, PostgresError> {
    let read = || -> io::Result<Secret> {
        let file = open_regular(path)?;
        if file.metadata()?.mode() & 0o007 != 0 {
            return Err(io::Error::other("everybody may open it (chmod 0600)"));
        }
        let mut password = read_bounded(file)?;
        if password.ends_with(b"\n") {
            password.pop();
        }
        if password.ends_with(b"\r") {
            password.pop();
        }
        match password {
            password if password.is_empty() => Err(io::Error::other("it is empty")),
            password if password.contains(&0) || password.contains(&b'\n') => {
                Err(io::Error::other("it must hold the password alone, on one line"))
            }
            password => Ok(Secret::new(password)),
        }
    };
    read().map_err(|source| PostgresError::PasswordFile { path: path.to_owned(), source })
}

/// What `.pgpass` had for a connection.
pub(super) enum PassfileAnswer {
    Password(Secret),
    /// No line matches, or there is no file.
    Nothing,
    /// There is a file that cannot be used; why, for the error when the server wants a password after all.
    Unusable(String),
}

/// Looks up a password file in libpq's format.
///
/// `database` is `replication` for replication connections; `host` is the name given, `localhost` for a Unix socket in its default folder.
/// Source: "The Password File" in the libpq chapter, `passwordFromFile` in `fe-connect.c`.
pub(super) fn read_passfile(path: &Path, host: &str, port: u16, database: &str, user: &str) -> PassfileAnswer {
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return PassfileAnswer::Nothing,
        Err(error) => return PassfileAnswer::Unusable(format!("{} cannot be read: {error}", path.display())),
    };
    match file.metadata() {
        Ok(data) if data.mode() & 0o077 == 0 => {}
        Ok(_) => {
            return PassfileAnswer::Unusable(format!("{} is ignored, since others may open it", path.display()));
        }
        Err(error) => return PassfileAnswer::Unusable(format!("{} cannot be read: {error}", path.display())),
    }
    match read_bounded(file) {
        Ok(content) => match find_password(&content, &[host, &port.to_string(), database, user]) {
            Some(password) => PassfileAnswer::Password(password),
            None => PassfileAnswer::Nothing,
        },
        Err(error) => PassfileAnswer::Unusable(format!("{} cannot be read: {error}", path.display())),
    }
}

/// The password of the first line whose four fields match; `*` matches anything, `\` makes `:` and `\` literal.
fn find_password(content: &[u8], wanted: &[&str; 4]) -> Option<Secret> {
    content.split(|&b| b == b'\n').find_map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.starts_with(b"#") {
            return None;
        }
        let mut rest = line;
        for field in wanted {
            let (found, after) = take_field(rest);
            let raw = &rest[..rest.len() - after.map_or(0, |after| after.len() + 1)];
            if raw != b"*" && found != field.as_bytes() {
                return None;
            }
            rest = after?;
        }
        // A colon ends the password as well, as in libpq.
        let (password, _) = take_field(rest);
        (!password.is_empty()).then(|| Secret::new(password))
    })
}

/// Reads up to the next `:`; returns the field without its escapes, and what follows the colon if there is one.
fn take_field(line: &[u8]) -> (Vec<u8>, Option<&[u8]>) {
    let mut field = Vec::new();
    let mut at = 0;
    while at < line.len() && line[at] != b':' {
        if line[at] == b'\\' && at + 1 < line.len() {
            at += 1;
        }
        field.push(line[at]);
        at += 1;
    }
    (field, line.get(at + 1..).filter(|_| at < line.len()))
}

/// The options of one section of the service file.
///
/// Source: "The Connection Service File" in the libpq chapter, `parseServiceInfo` in `fe-connect.c`.
pub(super) fn read_service(
    service: &str,
    named: Option<&str>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Pairs, PostgresError> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    let named = named.map(str::to_owned).or_else(|| env("PGSERVICEFILE").filter(|path| !path.is_empty()));
    match &named {
        Some(path) => candidates.push(path.into()),
        None => candidates.extend(env("HOME").map(|home| Path::new(&home).join(".pg_service.conf"))),
    }
    let system = env("PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".into());
    candidates.push(Path::new(&system).join("pg_service.conf"));
    for (at, path) in candidates.iter().enumerate() {
        let wrong = |why: String| PostgresError::settings(format!("the service file {} {why}", path.display()));
        let file = match open_regular(path) {
            Ok(file) => file,
            // One that was named must be there.
            Err(error) if error.kind() == io::ErrorKind::NotFound && (at > 0 || named.is_none()) => continue,
            Err(error) => return Err(wrong(format!("cannot be read: {error}"))),
        };
        let content = read_bounded(file).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let text = String::from_utf8(content).map_err(|_| wrong("is not UTF-8".into()))?;
        if let Some(pairs) = find_service(&text, service).map_err(wrong)? {
            return Ok(pairs);
        }
    }
    Err(PostgresError::settings(format!("no service file has a section [{}]", shown(service))))
}

fn find_service(text: &str, service: &str) -> Result<Option<Pairs>, String> {
    let mut pairs: Option<Pairs> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            if pairs.is_some() {
                break;
            }
            if name == service {
                pairs = Some(Pairs::new());
            }
        } else if let Some(pairs) = &mut pairs {
            let (key, value) = line.split_once('=').ok_or_else(|| format!("has no \"=\" in line {}", number + 1))?;
            if key == "service" || key == "servicefile" {
                return Err(format!("nests services in line {}", number + 1));
            }
            pairs.push((key.trim().into(), value.trim().into()));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn find(content: &str, wanted: &[&str; 4]) -> Option<String> {
        find_password(content.as_bytes(), wanted).map(|p| String::from_utf8(p.expose().to_vec()).unwrap())
    }

    #[test]
    fn the_first_matching_line_of_pgpass_wins() {
        let content = "# comment\n\
                       h:5432:db:u:first\n\
                       h:*:replication:u:second\n\
                       \\*:1:a:b:star\n\
                       *:*:*:v:third:more\n\
                       a\\:b:1:d\\\\:u:p\\:w\\\\\n\
                       short:line\n\
                       h:5432:db:u:never\n";
        assert_eq!(find(content, &["h", "5432", "db", "u"]).as_deref(), Some("first"));
        assert_eq!(find(content, &["h", "1", "replication", "u"]).as_deref(), Some("second"));
        assert_eq!(find(content, &["x", "1", "y", "v"]).as_deref(), Some("third"));
        assert_eq!(find(content, &["a:b", "1", "d\\", "u"]).as_deref(), Some("p:w\\"));
        assert_eq!(find(content, &["*", "1", "a", "b"]).as_deref(), Some("star"));
        assert_eq!(find(content, &["x", "1", "a", "b"]), None);
    }

    #[test]
    fn a_pgpass_that_others_may_open_is_ignored_and_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "*:*:*:*:secret\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        let answer = read_passfile(&path, "h", 1, "d", "u");
        assert!(matches!(answer, PassfileAnswer::Unusable(why) if why.contains("others") && !why.contains("secret")));
        mode(0o600);
        assert!(
            matches!(read_passfile(&path, "h", 1, "d", "u"), PassfileAnswer::Password(p) if p.expose() == b"secret")
        );
        assert!(matches!(read_passfile(&dir.path().join("no"), "h", 1, "d", "u"), PassfileAnswer::Nothing));
        assert!(matches!(read_passfile(dir.path(), "h", 1, "d", "u"), PassfileAnswer::Unusable(_)));
    }

    #[test]
    fn a_password_file_holds_one_line_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        let write = |content: &str, mode| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write("pass word\n", 0o640);
        assert_eq!(read_password_file(&path).ok().unwrap().expose(), b"pass word");
        write("x", 0o604);
        assert!(read_password_file(&path).is_err());
        write("", 0o600);
        assert!(read_password_file(&path).is_err());
        write("a\nb\n", 0o600);
        assert!(read_password_file(&path).is_err());
    }

    #[test]
    fn a_service_is_found_by_its_section() {
        let text = "# c\n[a]\nhost=ha\n\n[b]\nhost = hb\nport=1\n[c]\nbroken\n";
        assert_eq!(find_service(text, "b").unwrap().unwrap()[0], ("host".into(), "hb".into()));
        assert!(find_service(text, "x").unwrap().is_none());
        assert!(find_service(text, "c").is_err());
    }
}
