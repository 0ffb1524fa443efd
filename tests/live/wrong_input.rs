//! Wrong input of every kind, through the real binary: exit status and line to the letter, `check` finds it beforehand, and nothing is
//! changed. The tables are in tests/fixtures/wrong-input.

mod archives;
mod stores;
mod table;
mod worlds;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::Finished;
use crate::support::walden::finish;
use table::{Case, Table};
use worlds::{World, Worlds};

/// Nothing here waits for long.
const PATIENCE: Duration = Duration::from_secs(90);
/// Silence is an alarm within this time (I19).
const SOON: Duration = Duration::from_secs(30);

/// Every case of a table, each in the world that is given for it.
#[track_caller]
fn prove(name: &str) -> usize {
    let table = Table::read(name);
    let mut worlds = Worlds::new();
    let mut said = Vec::new();
    let mut current: Option<(String, World)> = None;
    for case in &table.cases {
        if current.as_ref().is_none_or(|(given, _)| *given != case.given) {
            drop(current.take());
            current = Some((case.given.clone(), worlds.make(&case.given)));
        }
        let (_, world) = current.as_ref().expect("just made");
        said.push(run(case, world));
    }
    drop(current);
    table.compare(&said);
    said.len()
}

/// What the command said, in the table's form. What must never be is added as a line that no table has.
fn run(case: &Case, world: &World) -> Vec<String> {
    let command = case.command();
    let mut wrong = Vec::new();
    let before = world.seen();
    let was_whole = world.looks_whole(case);
    let (code, told) = match command {
        "run" => agent(case, world, &mut wrong),
        _ => {
            let done = finish(world.command(case, false), PATIENCE);
            let code = done.code.map_or("killed".to_owned(), |code| code.to_string());
            let told = match command {
                "check" if done.code != Some(2) => checked(&done, &mut wrong),
                "status" if done.code != Some(2) => {
                    done.stdout.lines().take_while(|line| !line.is_empty()).map(str::to_owned).collect()
                }
                _ => failed(command, &done, &mut wrong),
            };
            (code, told)
        }
    };
    // An agent that is refused for what it finds has its spool by then, and a backup that is alone as well.
    let is_looking = match command {
        "check" | "list" | "status" | "recovery-conf" => true,
        "restore" => ["2", "3", "4"].contains(&code.as_str()),
        "wal-fetch" => code != "0",
        "run" => code == "2" && case.given == "nothing",
        _ => code == "2",
    };
    if is_looking && before != world.seen() {
        wrong.push("it changed something".to_owned());
    }
    if code != "0" && !was_whole && world.looks_whole(case) {
        wrong.push("what is left looks like a whole data directory".to_owned());
    }
    let told: Vec<String> = told.iter().map(|line| world.name(line)).collect();
    if ["2", "3", "4", "5"].contains(&code.as_str()) || (command == "list" && code != "0") {
        // A restore that fails half-way leaves its directory.
        if command == "restore" && code == "5" {
            return table_lines(&code, &told, &wrong);
        }
        let done = finish(world.command(case, true), PATIENCE);
        as_json(&done, &told, &code, world, &mut wrong);
    }
    table_lines(&code, &told, &wrong)
}

fn table_lines(code: &str, told: &[String], wrong: &[String]) -> Vec<String> {
    let mut lines = told.to_vec();
    lines.extend(wrong.iter().map(|why| format!("MUST NOT BE: {why}")));
    if lines.is_empty() {
        lines.push(String::new());
    }
    let front = |at: usize| if at == 0 { code.to_owned() } else { " ".repeat(code.len()) };
    lines.iter().enumerate().map(|(at, line)| format!("{} | {line}", front(at)).trim_end().to_owned()).collect()
}

/// One line on stderr that says what to do, nothing on stdout.
fn failed(command: &str, done: &Finished, wrong: &mut Vec<String>) -> Vec<String> {
    // What `backup` tells while it tries.
    let noted = [" INFO ", " DEBUG ", " WARN trying again ", " ERROR "];
    let logged = |line: &&str| line.starts_with("20") && noted.iter().any(|level| line.contains(level));
    // What `restore` plans is told before it is carried out, and only then.
    let plan = ["target: ", "from: ", "backup: ", "WAL: ", "last commit or abort kept: ", "first left out: "];
    let planned = |line: &&str| done.code == Some(5) && plan.iter().any(|begin| line.starts_with(begin));
    let lines = done.stderr.lines().filter(|line| !logged(line) && !planned(line));
    let said: Vec<String> = lines.map(str::to_owned).collect();
    // A file that is proven absent is no failure: PostgreSQL asks for the one behind the last as well.
    if done.code == Some(0) || (command == "wal-fetch" && done.code == Some(1)) {
        return said;
    }
    judge(&said, wrong);
    if !done.stdout.is_empty() {
        wrong.push("data on stdout".to_owned());
    }
    said
}

/// One line for people: what, why, and what to do.
fn judge(said: &[String], wrong: &mut Vec<String>) {
    if said.len() != 1 || said.iter().any(|line| !line.starts_with("error: ") || !line.contains("; ")) {
        wrong.push("not one line with what to do".to_owned());
    }
    for ugly in ["panicked", "Os {", "Error {", "kind: ", "geheim", "  ", "\u{1b}", "RUST_BACKTRACE"] {
        if said.iter().any(|line| line.contains(ugly)) {
            wrong.push(format!("\"{ugly}\" is not for people"));
        }
    }
}

/// The lines that fail, each with what to do.
fn checked(done: &Finished, wrong: &mut Vec<String>) -> Vec<String> {
    let fails = done.stdout.lines().filter(|line| line.starts_with("FAIL"));
    let said: Vec<String> = fails.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    if said.iter().any(|line| !line.contains("; ")) {
        wrong.push("what to do is not said".to_owned());
    }
    if done.code != Some(i32::from(!said.is_empty())) || !done.stderr.is_empty() {
        wrong.push(format!("more than the checks is told: {}", done.stderr));
    }
    said
}

/// With `--json` the same is said in a document.
fn as_json(done: &Finished, told: &[String], code: &str, world: &World, wrong: &mut Vec<String>) {
    let document: Value = serde_json::from_str(&done.stdout).unwrap_or_default();
    let error = &document["error"];
    let text = |field: &str| error[field].as_str().unwrap_or_default();
    let line = world.name(&format!("error: {}; {}", text("message"), text("hint")));
    let same_code = error["code"].as_u64().is_some_and(|told| told.to_string() == code)
        && done.code.is_some_and(|done| done.to_string() == code);
    if !same_code || told != [line] || error.get("windows").is_some() != (code == "3") {
        wrong.push(format!("another document with --json: {}", done.stdout));
    }
}

/// An agent that is refused ends with one line. Any other goes on, is unhealthy, and its log has one ERROR with its cause.
fn agent(case: &Case, world: &World, wrong: &mut Vec<String>) -> (String, Vec<String>) {
    let mut agent = world.spawn(case);
    let begun = std::time::Instant::now();
    let error = loop {
        let is_running = agent.is_running();
        let log = agent.log();
        let error = log.lines().find(|line| line.contains(" ERROR ")).map(str::to_owned);
        if !is_running || error.is_some() {
            break error;
        }
        if begun.elapsed() > SOON {
            wrong.push("it goes on as if nothing were wrong".to_owned());
            agent.kill9();
            return ("runs".to_owned(), Vec::new());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let Some(error) = error else {
        let code = agent.wait(PATIENCE).code().map_or("killed".to_owned(), |code| code.to_string());
        let log = agent.log();
        let said: Vec<String> = log.lines().filter(|line| !line.contains(" INFO ")).map(str::to_owned).collect();
        judge(&said, wrong);
        return (code, said);
    };
    let status = agent.wait_status(PATIENCE, "unhealthy", |status| status["healthy"] == false);
    let (_, said) = error.split_once(" ERROR ").expect("it was found by it");
    let (message, cause) = said.rsplit_once(" cause=").unwrap_or((said, "none"));
    if !status["causes"].to_string().contains(&format!("\"{cause}\"")) {
        wrong.push(format!("the status does not have the cause: {status}"));
    }
    if !message.contains("; ") {
        wrong.push("what to do is not said".to_owned());
    }
    agent.kill9();
    ("runs".to_owned(), vec![format!("{cause}: {message}")])
}

/// Commands, flags, the file, the environment: nothing is asked and nothing is made.
#[test]
fn usage_and_configuration() {
    assert!(prove("usage.txt") >= 85);
}

#[test]
fn servers() {
    assert!(prove("server.txt") >= 30);
}

#[test]
fn folders() {
    assert!(prove("folders.txt") >= 35);
}

#[test]
fn stores() {
    assert!(prove("stores.txt") >= 20);
}

#[test]
fn targets_and_directories() {
    assert!(prove("restore.txt") >= 30);
}

/// Each fault of the environment that stops a command is found by `check`, in the same world.
#[test]
fn check_finds_what_stops_the_others() {
    let mut worlds: BTreeMap<String, (bool, bool)> = BTreeMap::new();
    for case in ["server.txt", "folders.txt", "stores.txt"].iter().flat_map(|name| Table::read(name).cases) {
        let (found, stopped) = worlds.entry(case.given.clone()).or_default();
        match case.command() {
            "check" => *found |= case.expected.iter().any(|line| line.contains("FAIL")),
            "run" | "backup" => *stopped |= case.expected.first().is_some_and(|line| !line.starts_with('0')),
            _ => {}
        }
    }
    assert!(worlds.len() >= 25, "{worlds:?}");
    let missed: Vec<&String> =
        worlds.iter().filter(|(_, (found, stopped))| *stopped && !found).map(|(given, _)| given).collect();
    assert!(missed.is_empty(), "check does not find {missed:?}");
}
