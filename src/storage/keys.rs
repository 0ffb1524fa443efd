//! The grammar of keys: what may become a path or an object's name.

use super::StorageError;

/// S3's bound on a key, prefix included, in bytes.
const KEY_BYTES_MAX: usize = 1024;
/// The bound of Linux file systems on one name, in bytes.
const PART_BYTES_MAX: usize = 255;
/// How names of files begin that are still being written; never a key's part.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Refuses what is not a key: relative, `/`-separated parts that are neither empty, `.`, `..` nor temporary, without control characters.
pub(super) fn check_key(url: &str, key: &str) -> Result<(), StorageError> {
    let wrong = |why: &str| wrong_key(url, key, why);
    if key.is_empty() {
        return Err(wrong("it is empty"));
    }
    if key.len() > KEY_BYTES_MAX {
        return Err(wrong("it is longer than 1024 bytes"));
    }
    key.split('/').try_for_each(|part| check_part(part).map_err(wrong))
}

/// The same for the beginning of keys: the part after its last `/` may be incomplete or missing, and it may be empty.
pub(super) fn check_prefix(url: &str, prefix: &str) -> Result<(), StorageError> {
    let (folders, rest) = prefix.rsplit_once('/').unwrap_or(("", prefix));
    if prefix.starts_with('/') {
        return Err(wrong_key(url, prefix, "it begins with a slash"));
    }
    if !folders.is_empty() {
        check_key(url, folders)?;
    }
    if rest.chars().any(char::is_control) {
        return Err(wrong_key(url, prefix, "it has a control character"));
    }
    Ok(())
}

fn check_part(part: &str) -> Result<(), &'static str> {
    if part.is_empty() {
        Err("a part between slashes is empty")
    } else if part == "." || part == ".." {
        Err("\".\" and \"..\" are not allowed in it")
    } else if part.len() > PART_BYTES_MAX {
        Err("a part between slashes is longer than 255 bytes")
    } else if part.starts_with(TEMPORARY) {
        Err("\".tmp-\" marks files that are being written")
    } else if part.chars().any(|c| c.is_control() || c == '\\') {
        Err("it has a control character or a backslash")
    } else {
        Ok(())
    }
}

fn wrong_key(url: &str, key: &str, why: &str) -> StorageError {
    let shown: String = key.chars().take(80).collect();
    StorageError::Settings { url: url.to_owned(), why: format!("{shown:?} cannot be a key: {why}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_keys_pass() {
        for good in ["a", "a/b", "main/7/wal/00000001.history", "ü/ x", "a..b/.c"] {
            check_key("x", good).unwrap();
        }
        let long = "k".repeat(256);
        let longest = "abc/".repeat(300);
        for bad in [
            "", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", ".tmp-1", "a/.tmp-x", "a\0b", "a\nb", "a\\b", &long,
            &longest,
        ] {
            assert!(check_key("x", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_prefix_may_end_inside_a_part() {
        for good in ["", "a", "a/", "a/b", "a/b/"] {
            check_prefix("x", good).unwrap();
        }
        for bad in ["/", "/a", "a//", "../", "a/../b", "a/\n"] {
            assert!(check_prefix("x", bad).is_err(), "{bad:?}");
        }
    }
}
