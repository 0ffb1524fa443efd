//! Paths into `restore_command`, which three readers take apart one after the other: the configuration file, PostgreSQL's own
//! placeholders, and the shell. Bytes, since a path need not be UTF-8.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// One word for a POSIX shell, whatever is in it.
pub fn shell_quoted(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![b'\''];
    for &b in bytes {
        match b {
            // Leave the quotes, write one, enter them again.
            b'\'' => out.extend_from_slice(b"'\\''"),
            b => out.push(b),
        }
    }
    out.push(b'\'');
    out
}

/// A path as a word of `restore_command`: for the shell, and with `%` doubled, since PostgreSQL replaces `%f`, `%p` and `%r` first
/// (`BuildRestoreCommand` in `src/common/archive.c`).
pub fn restore_command_path(path: &Path) -> Vec<u8> {
    shell_quoted(path.as_os_str().as_bytes())
        .iter()
        .flat_map(|&b| if b == b'%' { vec![b; 2] } else { vec![b] })
        .collect()
}

/// A value in a configuration file: in single quotes, which are doubled inside; backslashes too, since `GUC_scanstr` reads escapes; and
/// no line end, which the file's grammar does not allow (`src/backend/utils/misc/guc-file.l`).
pub fn config_quoted(value: &[u8]) -> Vec<u8> {
    let mut out = vec![b'\''];
    for &b in value {
        match b {
            b'\'' => out.extend_from_slice(b"''"),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b => out.push(b),
        }
    }
    out.push(b'\'');
    out
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::path::PathBuf;

    use super::*;

    /// PostgreSQL's `GUC_scanstr`.
    fn scan(quoted: &[u8]) -> Vec<u8> {
        assert!(quoted.len() >= 2 && quoted[0] == b'\'' && quoted[quoted.len() - 1] == b'\'');
        let inner = &quoted[1..quoted.len() - 1];
        assert!(!inner.contains(&b'\n'), "the grammar has no line end in a string");
        let (mut out, mut at) = (Vec::new(), 0);
        while at < inner.len() {
            match inner[at] {
                b'\\' => {
                    at += 1;
                    out.push(match inner[at] {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        other => other,
                    });
                }
                b'\'' => {
                    at += 1;
                    assert_eq!(inner[at], b'\'', "a quote that ends the string");
                    out.push(b'\'');
                }
                other => out.push(other),
            }
            at += 1;
        }
        out
    }

    /// PostgreSQL's placeholders.
    fn replace(command: &[u8]) -> Vec<u8> {
        let (mut out, mut at) = (Vec::new(), 0);
        while at < command.len() {
            if command[at] == b'%' {
                at += 1;
                match command[at] {
                    b'%' => out.push(b'%'),
                    b'f' => out.extend_from_slice(b"000000010000000000000001"),
                    other => panic!("placeholder %{}", other as char),
                }
            } else {
                out.push(command[at]);
            }
            at += 1;
        }
        out
    }

    #[test]
    fn any_path_reaches_the_program_unchanged() {
        for path in [
            "/usr/bin/walden",
            "/opt/with space/w",
            "/it's/here",
            "/a\"b",
            "/$(touch /tmp/pwned)/x",
            "/`id`/x",
            "/a;b&c|d>e<f*g?h[i]j{k}l~m#n!o",
            "/line\nend\rhere",
            "/tab\there",
            "/back\\slash\\n",
            "/100%/%f/%p/%%",
            "/trailing\\",
            "/--flag",
            "/'''",
            "/é/ü",
        ] {
            let path = PathBuf::from(path);
            let written = config_quoted(&[b"printf %%s ".to_vec(), restore_command_path(&path)].concat());
            let command = replace(&scan(&written));
            let output = std::process::Command::new("/bin/sh")
                .arg("-c")
                .arg(std::ffi::OsString::from_vec(command))
                .output()
                .unwrap();
            assert!(output.status.success(), "{path:?}: {output:?}");
            assert_eq!(output.stdout, path.as_os_str().as_bytes(), "{path:?}");
        }
        let raw = PathBuf::from(std::ffi::OsString::from_vec(b"/latin-\xe9".to_vec()));
        assert_eq!(restore_command_path(&raw), b"'/latin-\xe9'");
    }
}
