//! The table of wrong inputs as text (tests/fixtures/wrong-input): made to be read, compared to the letter.
//!
//! ```text
//! given a server that is down        the world that the cases below live in, set up anew for each `given`
//!
//! | [archive]                        a configuration file of the case's own
//! $ PGPORT=none walden run           variables, then the command line; quotes as in a shell
//! 2 | error: …                       exit status, and everything that was said
//! ```
//!
//! Of `check` it is the lines that fail. Of an agent that goes on (`runs`) it is the ERROR in its log. What differs from run to run has a
//! name in braces. `WALDEN_ACCEPT=1` writes what was said into the table; read the difference before you keep it.

use std::fs;
use std::path::{Path, PathBuf};

use regex_lite::Regex;

/// One command line and what comes of it.
#[derive(Clone, Debug)]
pub struct Case {
    pub given: String,
    pub config: Option<String>,
    pub environment: Vec<(String, String)>,
    /// Behind `walden`.
    pub arguments: Vec<String>,
    pub line: usize,
    pub expected: Vec<String>,
}

impl Case {
    /// Empty where none is given.
    pub fn command(&self) -> &str {
        let known = ["run", "check", "backup", "list", "status", "restore", "recovery-conf", "wal-fetch", "adopt"];
        self.arguments.iter().map(String::as_str).find(|word| known.contains(word)).unwrap_or_default()
    }
}

pub struct Table {
    path: PathBuf,
    lines: Vec<String>,
    pub cases: Vec<Case>,
}

impl Table {
    #[track_caller]
    pub fn read(name: &str) -> Table {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wrong-input").join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let (mut cases, mut given, mut config): (Vec<Case>, String, Option<String>) = Default::default();
        for (at, line) in lines.iter().enumerate() {
            if let Some(world) = line.strip_prefix("given ") {
                world.clone_into(&mut given);
            } else if let Some(toml) = line.strip_prefix("| ").or((line == "|").then_some("")) {
                let config = config.get_or_insert_default();
                config.push_str(toml);
                config.push('\n');
            } else if let Some(command) = line.strip_prefix("$ ") {
                let (environment, arguments) = command_of(command);
                let expected = lines[at + 1..].iter().take_while(|line| is_expected(line)).cloned().collect();
                let config = config.take();
                cases.push(Case { given: given.clone(), config, environment, arguments, line: at, expected });
            }
        }
        Table { path, lines, cases }
    }

    /// Panics with all that is not as the table says. `said` is what each case said.
    #[track_caller]
    pub fn compare(&self, said: &[Vec<String>]) {
        if std::env::var_os("WALDEN_ACCEPT").is_some() {
            let mut text = String::new();
            let mut skip = 0;
            for (at, line) in self.lines.iter().enumerate() {
                if skip > 0 {
                    skip -= 1;
                    continue;
                }
                text.push_str(line);
                text.push('\n');
                if let Some(number) = self.cases.iter().position(|case| case.line == at) {
                    said[number].iter().for_each(|line| text.push_str(&format!("{line}\n")));
                    skip = self.cases[number].expected.len();
                }
            }
            fs::write(&self.path, text).expect("the table can be written");
            return;
        }
        let mut wrong = Vec::new();
        for (case, said) in self.cases.iter().zip(said) {
            if case.expected != *said {
                let (place, command) = (case.line + 1, &self.lines[case.line]);
                let (expected, said) = (case.expected.join("\n      "), said.join("\n      "));
                wrong.push(format!(
                    "line {place}, given {}: {command}\n  expected\n      {expected}\n  said\n      {said}",
                    case.given
                ));
            }
        }
        assert!(
            wrong.is_empty(),
            "{} of {} cases in {}:\n{}",
            wrong.len(),
            said.len(),
            self.path.display(),
            wrong.join("\n")
        );
    }
}

/// `2 | …`, `runs | …`, and further lines with nothing in front.
fn is_expected(line: &str) -> bool {
    let front = line.split(" |").next().unwrap_or_default().trim();
    line.contains(" |") && (front.is_empty() || front == "runs" || front.parse::<u8>().is_ok())
}

#[track_caller]
fn command_of(line: &str) -> (Vec<(String, String)>, Vec<String>) {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (c, quote) {
            ('\'' | '"', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            (' ', None) => words.push(String::new()),
            _ => words.last_mut().expect("it begins with one").push(c),
        }
    }
    let name = words.iter().position(|word| word == "walden").unwrap_or_else(|| panic!("no walden in {line}"));
    let variables = words[..name].iter().map(|word| {
        let (name, value) = word.split_once('=').unwrap_or_else(|| panic!("{word} is no variable: {line}"));
        (name.to_owned(), value.to_owned())
    });
    (variables.collect(), words[name + 1..].iter().map(|word| word.replace("\\n", "\n")).collect())
}

/// Gives names to what differs from run to run. `named`: those of this world, the longest text first. Where nothing is given, what looks
/// like a position or a time is the case's own or an example, and stays.
pub fn named(text: &str, named: &[(String, &str)], is_served: bool) -> String {
    let mut text = text.to_owned();
    for (value, name) in named {
        text = match value.bytes().all(|b| b.is_ascii_digit()) {
            // A port or a process may stand inside a longer number, such as the day in a backup's id.
            true => Regex::new(&format!(r"\b{value}\b")).expect("digits").replace_all(&text, *name).into_owned(),
            false => text.replace(value.as_str(), name),
        };
    }
    let patterns = [
        (r"[^ ]*/walden-\d+\.toml", "{config}"),
        (r"\bsince [^ ]+Z \(\d+ s ago\)", "since {time} ({age} ago)"),
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "{uuid}"),
        (r"\b\d{8}T\d{6}Z-full\b", "{backup}"),
        (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00)\b", "{time}"),
        (r"\b\d+ s ago\b", "{age} ago"),
        (r"\bprocess \d+\b", "process {pid}"),
        (r"\bPID \d+\b", "PID {pid}"),
        (r"\b(base|global)/[0-9a-z_/]+", "{file}"),
        (r"\b[0-9A-F]{8} instead of [0-9A-F]{8}\b", "{crc} instead of {crc}"),
        (r"\b\d+ bytes instead of \d+\b", "{n} bytes instead of {n}"),
        (r"\b[0-9A-F]{1,8}/[0-9A-F]{5,8}\b", "{lsn}"),
        (r"\b\d+\.\d [KMGT]iB\b", "{size}"),
    ];
    let fixed = 3;
    for (pattern, name) in patterns.into_iter().take(if is_served { usize::MAX } else { fixed }) {
        text = Regex::new(pattern).expect("a pattern").replace_all(&text, name).into_owned();
    }
    text
}
