use std::error::Error;

use serde_json::{Value, json};

use crate::cli::error::{chain, one_line};

/// How one thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Good,
    /// It works, and there is something to know or to do.
    Remark,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub name: String,
    pub verdict: Verdict,
    /// What was found, one line.
    pub message: String,
    /// What to do, one sentence; empty if nothing.
    pub hint: String,
}

impl Check {
    pub fn good(name: impl Into<String>, message: impl AsRef<str>) -> Self {
        Self::new(name, Verdict::Good, message, "")
    }

    pub fn remark(name: impl Into<String>, message: impl AsRef<str>, hint: impl AsRef<str>) -> Self {
        Self::new(name, Verdict::Remark, message, hint)
    }

    pub fn failed(name: impl Into<String>, message: impl AsRef<str>, hint: impl AsRef<str>) -> Self {
        Self::new(name, Verdict::Failed, message, hint)
    }

    /// A room's error, with its sources.
    pub fn error(name: impl Into<String>, error: &(dyn Error + 'static), hint: impl AsRef<str>) -> Self {
        Self::failed(name, chain(error), hint)
    }

    /// Texts may come from a server or a store.
    fn new(name: impl Into<String>, verdict: Verdict, message: impl AsRef<str>, hint: impl AsRef<str>) -> Self {
        Self { name: name.into(), verdict, message: one_line(message.as_ref()), hint: one_line(hint.as_ref()) }
    }

    fn to_json(&self) -> Value {
        let ok = self.verdict != Verdict::Failed;
        json!({ "name": self.name, "ok": ok, "message": self.message, "hint": self.hint })
    }

    fn line(&self, width: usize) -> String {
        let word = match self.verdict {
            Verdict::Good => "ok",
            Verdict::Remark => "note",
            Verdict::Failed => "FAIL",
        };
        let line = format!("{word:<4}  {:<width$}  {}", self.name, self.message);
        if self.hint.is_empty() { line } else { format!("{line}; {}", self.hint) }
    }
}

/// Everything that was looked at, in the order of the agent's own start.
#[derive(Debug, Default)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    pub fn add(&mut self, check: Check) {
        self.checks.push(check);
    }

    pub fn is_ok(&self) -> bool {
        self.failures() == 0
    }

    fn failures(&self) -> usize {
        self.checks.iter().filter(|check| check.verdict == Verdict::Failed).count()
    }

    pub fn to_json(&self) -> Value {
        let checks: Vec<Value> = self.checks.iter().map(Check::to_json).collect();
        json!({ "schema": 1, "ok": self.is_ok(), "checks": checks })
    }

    /// One line for each check, and one that sums up. `quiet`: only what failed.
    pub fn to_text(&self, quiet: bool) -> String {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        let shown = self.checks.iter().filter(|check| !quiet || check.verdict == Verdict::Failed);
        let mut lines: Vec<String> = shown.map(|check| check.line(width)).collect();
        match self.failures() {
            0 if quiet => {}
            0 => lines.push(format!("all {} checks passed", self.checks.len())),
            failures => lines.push(format!(
                "{failures} of {} checks failed; what depends on them was not looked at",
                self.checks.len()
            )),
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            checks: vec![
                Check::good("slot", "it is\u{1b}[31m there"),
                Check::remark("sql", "not possible", "add a line"),
                Check::failed("spool", "no\nroom", "make room"),
            ],
        }
    }

    #[test]
    fn each_check_is_one_line_that_says_what_to_do() {
        let expected = "ok    slot   it is [31m there\n\
                        note  sql    not possible; add a line\n\
                        FAIL  spool  no room; make room\n\
                        1 of 3 checks failed; what depends on them was not looked at";
        assert_eq!(report().to_text(false), expected);
        assert!(report().to_text(true).starts_with("FAIL  spool"));
        assert_eq!(Report::default().to_text(true), "");
    }

    #[test]
    fn a_remark_is_no_failure() {
        let mut report = report();
        assert_eq!(report.to_json()["ok"], false);
        report.checks.pop();
        let expected = json!({ "schema": 1, "ok": true, "checks": [
            { "name": "slot", "ok": true, "message": "it is [31m there", "hint": "" },
            { "name": "sql", "ok": true, "message": "not possible", "hint": "add a line" },
        ] });
        assert_eq!(report.to_json(), expected);
    }
}
