//! The setting `synchronous_standby_names`, as far as it says whom commits wait for (`src/backend/replication/syncrep_scanner.l`).

/// The names in the list, without quotes. `*` stands for every standby.
fn names(value: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut name = String::new();
    let mut characters = value.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' => {
                while let Some(c) = characters.next() {
                    match c {
                        '"' if characters.next_if_eq(&'"').is_none() => break,
                        c => name.push(c),
                    }
                }
            }
            // Before it stands how many of them, and which.
            '(' => name.clear(),
            ',' | ')' => names.push(std::mem::take(&mut name)),
            c if c.is_whitespace() => {}
            c => name.push(c),
        }
    }
    names.push(name);
    names.retain(|name| !name.is_empty());
    names
}

/// Whether the list names the standby, in its own name.
pub fn names_explicitly(value: &str, standby: &str) -> bool {
    // The server compares without regard to case (`SyncRepGetStandbyPriority` in syncrep.c).
    names(value).iter().any(|name| name.eq_ignore_ascii_case(standby))
}

/// Whether commits may wait for the standby.
pub fn names_standby(value: &str, standby: &str) -> bool {
    names_explicitly(value, standby) || names_explicitly(value, "*")
}

/// How many of the list a commit waits for, whichever they are: `ANY n (…)`. `None`: the first ones in its order are waited for.
pub fn quorum(value: &str) -> Option<u64> {
    let (method, rest) = value.trim_start().split_at_checked(3)?;
    let (number, _) = rest.split_once('(')?;
    method.eq_ignore_ascii_case("any").then(|| number.trim().parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_says_how_many() {
        assert_eq!(quorum("ANY 1 (replica, walden)"), Some(1));
        assert_eq!(quorum(" any 2(a, b, walden)"), Some(2));
        for value in ["", "walden", "any", "any, b", "FIRST 1 (a, b)", "2 (a, b)", "é"] {
            assert_eq!(quorum(value), None, "{value}");
        }
    }

    #[test]
    fn every_form_of_the_list_is_read() {
        let named = |value| (names_explicitly(value, "walden"), names_standby(value, "walden"));
        for value in [
            "walden",
            "WALDEN",
            "a, walden",
            "ANY 1 (replica, walden)",
            "first 2 (walden,b)",
            "1 (walden)",
            r#""walden""#,
        ] {
            assert_eq!(named(value), (true, true), "{value}");
        }
        for value in ["", "walden2", "a, b", r#""walden, b""#, "ANY 1 (a)", r#""wal""den""#] {
            assert_eq!(named(value), (false, false), "{value}");
        }
        for value in ["*", "ANY 1 (*)", "a, *"] {
            assert_eq!(named(value), (false, true), "{value}");
        }
        assert!(names_explicitly(r#"ANY 1 ("wal ""den")"#, "wal \"den"));
    }
}
