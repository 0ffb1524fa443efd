use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::error::CliError;
use super::exit;

/// Where a command writes: data to stdout, everything else to stderr.
#[derive(Clone, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    terminal: bool,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, terminal: io::stderr().is_terminal() }
    }

    /// Reads the two flags before anything is parsed, so that usage errors obey them too.
    pub fn from_args(args: &[OsString]) -> Self {
        let before_separator = || args.iter().skip(1).take_while(|arg| *arg != "--");
        let has = |flag: &str| before_separator().any(|arg| arg == flag);
        Self::new(has("--json"), has("-q") || has("--quiet"))
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether stderr is a terminal: somebody watches.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// One JSON document on stdout.
    pub fn document(&self, document: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(document)
            .map_err(|error| CliError::from_error(exit::FAILED, &error, "report this as a bug"))?;
        self.line(&text)
    }

    /// A line of data, or several, on stdout.
    pub fn line(&self, text: &str) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
        written.map_err(|error| {
            CliError::new(exit::FAILED, format!("cannot write to stdout: {error}"), "check what reads it")
        })
    }

    /// A remark for people, on stderr; not with `-q`.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            tell(text);
        }
    }

    /// The one line that says why a command failed; with `--json` the document as well.
    pub fn failure(&self, error: &CliError) {
        tell(&error.to_string());
        if self.json {
            // If stdout is closed, the line above and the exit code have said it.
            let _ = self.line(&error.to_json().to_string());
        }
    }

    /// A bar that counts bytes up to `total`, or a spinner without it. Shown only to a terminal; elsewhere the caller's log
    /// lines tell the progress.
    pub fn progress(&self, total: Option<u64>, what: impl Into<String>) -> ProgressBar {
        let target = if self.terminal && !self.quiet {
            ProgressDrawTarget::stderr_with_hz(5)
        } else {
            ProgressDrawTarget::hidden()
        };
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            None => "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec} {elapsed}",
        };
        let style = ProgressStyle::with_template(template).expect("the template is fixed and tested");
        let bar = ProgressBar::with_draw_target(total, target).with_style(style.progress_chars("=> "));
        bar.set_message(what.into());
        if self.terminal && !self.quiet {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        bar
    }
}

/// For people: `22.4 MiB`.
pub fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// `1 segment`, `2 segments`.
pub fn count(number: impl TryInto<u64>, what: &str) -> String {
    match number.try_into() {
        Ok(1) => format!("1 {what}"),
        Ok(number) => format!("{number} {what}s"),
        Err(_) => format!("many {what}s"),
    }
}

/// To stderr. `eprintln!` would panic where stderr is closed.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Words that others chose, in a repository or a server, on one line: a terminal must not be steered by them.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
