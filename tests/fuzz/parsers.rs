use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use walden::fuzzing::{TARGETS, Target};

use super::memory;
use super::mutator::{LENGTH_MAX, Random, mutate};

/// Processor time of one input.
const TIME_MAX: Duration = Duration::from_secs(5);
/// A thread that has not come back after this hangs; others may need the processors as well.
const HANG: Duration = Duration::from_secs(120);
/// Memory of one input of at most 64 KiB: the largest buffers of a decoder are 8 MiB.
const MEMORY_MAX: i64 = 64 << 20;
/// All targets together take no longer than this by the clock, where each has its 10 seconds.
const TOGETHER: f64 = 60.0;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn number<T: std::str::FromStr>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().ok().unwrap_or_else(|| panic!("{variable} is no number: {text}")))
}

/// The corpus of a target: path and content, in the order of the names.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = root().join("corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("a file"))).collect()
}

#[test]
fn every_parser_has_a_fuzz_target_and_a_corpus() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("fuzz/Cargo.toml");
    let listed = |folder: &str| {
        let entries = fs::read_dir(root().join(folder)).expect("a folder").map(|entry| entry.expect("an entry"));
        let names = entries.map(|entry| entry.file_name().into_string().expect("a name"));
        let mut names: Vec<String> = names.map(|name| name.trim_end_matches(".rs").to_owned()).collect();
        names.sort();
        names
    };
    let mut known: Vec<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    known.sort();
    assert_eq!(listed("fuzz_targets"), known);
    assert_eq!(listed("corpus"), known);
    for name in &known {
        let source = fs::read_to_string(root().join(format!("fuzz_targets/{name}.rs"))).expect("a target");
        assert!(source.contains(&format!("walden::fuzzing::{name}(")), "{name} calls something else");
        assert!(manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")), "{name}");
        let inputs = corpus(name);
        assert!(!inputs.is_empty(), "{name} has no corpus");
        assert!(inputs.iter().all(|(_, bytes)| bytes.len() <= LENGTH_MAX), "{name} has large inputs");
    }
}

/// I17: whatever a server, a repository, the spool or a person gives, a parser returns, soon and in little memory.
#[test]
fn no_bytes_from_outside_break_a_parser() {
    let seconds: f64 = number("WALDEN_TEST_FUZZ_SECONDS").unwrap_or(10.0);
    let clock = clock_gettime(ClockId::Realtime);
    // A change is judged by the same inputs each time; the long runs look further.
    let chance = clock.tv_sec.unsigned_abs() << 20 ^ clock.tv_nsec.unsigned_abs();
    let seed = number("WALDEN_TEST_SEED").unwrap_or(if crate::support::is_full() { chance } else { 1 });
    println!("WALDEN_TEST_SEED={seed}");
    let only = std::env::var("WALDEN_TEST_FUZZ_TARGET").ok();
    let targets: Vec<Target> =
        TARGETS.iter().copied().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)).collect();
    assert!(!targets.is_empty(), "WALDEN_TEST_FUZZ_TARGET names none");

    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let needed = (targets.len() as f64 * seconds / TOGETHER).ceil() as usize; // some dozens
    let workers = needed.max(cores).min(targets.len());
    let shared = Arc::new(Shared {
        targets,
        next: AtomicUsize::new(0),
        begun: Instant::now(),
        busy: (0..workers).map(|_| AtomicU64::new(0)).collect(),
        failures: Mutex::default(),
    });
    let threads: Vec<_> = (0..workers)
        .map(|worker| {
            let shared = shared.clone();
            // The stack of a thread of the agent, so that a recursion that is too deep for it is too deep here.
            let builder = std::thread::Builder::new().name("fuzz".into()).stack_size(2 << 20);
            builder.spawn(move || shared.work(worker, seed, Duration::from_secs_f64(seconds))).expect("a thread")
        })
        .collect();
    while threads.iter().any(|thread| !thread.is_finished()) {
        std::thread::sleep(Duration::from_millis(50));
        if let Some(target) = shared.hanging() {
            panic!("{target} hangs; seed {seed}, the input is in {}", trying(target).display());
        }
    }
    threads.into_iter().for_each(|thread| thread.join().expect("a worker"));
    let failures = shared.failures.lock().expect("no worker panicked");
    assert!(failures.is_empty(), "seed {seed}\n{}", failures.join("\n"));
}

struct Shared {
    targets: Vec<Target>,
    next: AtomicUsize,
    begun: Instant,
    /// For each worker: milliseconds since `begun` when it took its input, and the target's index in the low 8 bits; 0 is idle.
    busy: Vec<AtomicU64>,
    failures: Mutex<Vec<String>>,
}

fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Holds the input that is being tried, should the process end with it (an overflowing stack, an allocation that fails).
fn trying(target: &str) -> PathBuf {
    folder().join(format!("{target}.trying"))
}

impl Shared {
    fn hanging(&self) -> Option<&'static str> {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let busy = self.busy.iter().map(|busy| busy.load(Ordering::Relaxed)).filter(|busy| *busy > 0);
        let mut late = busy.filter(|busy| u128::from(now.saturating_sub(busy >> 8)) > HANG.as_millis());
        late.next().map(|busy| self.targets[usize::from(busy.to_le_bytes()[0])].0)
    }

    fn work(&self, worker: usize, seed: u64, time: Duration) {
        // The live tests that run beside this one have deadlines; on Linux this is about the thread alone.
        let _ = rustix::process::setpriority_process(None, 10);
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&(name, _)) = self.targets.get(index) else { return };
            if let Err(failure) = self.fuzz(worker, index, seed, time) {
                self.failures.lock().expect("no worker panicked").push(failure);
            }
            let _ = fs::remove_file(trying(name));
        }
    }

    fn fuzz(&self, worker: usize, index: usize, seed: u64, time: Duration) -> Result<(), String> {
        let (name, target) = self.targets[index];
        let file = File::create(trying(name)).expect("a file");
        let begun = Instant::now();
        let attempt = |input: &[u8]| {
            file.write_all_at(input, 0).and_then(|()| file.set_len(input.len() as u64)).expect("the input is written");
            let millis = u64::try_from(self.begun.elapsed().as_millis()).expect("a short time");
            self.busy[worker].store((millis + 1) << 8 | index as u64, Ordering::Relaxed);
            let result = attempt(target, input);
            self.busy[worker].store(0, Ordering::Relaxed);
            result
        };
        let inputs = corpus(name);
        for (path, input) in &inputs {
            attempt(input).map_err(|why| format!("{name}: {}: {why}", path.display()))?;
        }
        let mut random = Random::new(seed ^ u64::from(crc32(name.as_bytes())) << 32);
        let mut tried = 0_u64;
        while begun.elapsed() < time {
            let mut input = inputs[random.below(inputs.len())].1.clone();
            let other = &inputs[random.below(inputs.len())].1;
            mutate(&mut random, &mut input, other);
            tried += 1;
            if let Err(why) = attempt(&input) {
                let input = smaller(input, |less| attempt(less).is_err());
                let path = folder().join(format!("{name}-{:08x}", crc32(&input)));
                fs::write(&path, &input).expect("the input is kept");
                let (path, shown) =
                    (path.display(), String::from_utf8_lossy(&input[..input.len().min(200)]).into_owned());
                return Err(format!("{name}: {why}\n  input {tried} of this seed, kept in {path}, begins {shown:?}"));
            }
        }
        println!("{name}: {tried} inputs");
        Ok(())
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
}

/// One input: no panic, not too long, not too much memory.
fn attempt(target: fn(&[u8]), input: &[u8]) -> Result<(), String> {
    let before = thread_time();
    let (result, bytes) = memory::measured(|| catch_unwind(AssertUnwindSafe(|| target(input))));
    let time = thread_time() - before;
    if let Err(panic) = result {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        return Err(format!("a panic: {}", text.unwrap_or("of its own")));
    }
    if time > TIME_MAX {
        return Err(format!("{time:?} of processor time"));
    }
    if bytes > MEMORY_MAX {
        return Err(format!("{} MiB of memory", bytes >> 20));
    }
    Ok(())
}

/// Leaves out what is not needed to fail; a few hundred tries.
fn smaller(mut input: Vec<u8>, fails: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let (mut part, mut tries) = (input.len() / 2, 300);
    while part > 0 {
        let mut at = 0;
        while at < input.len() && tries > 0 {
            tries -= 1;
            let mut less = input.clone();
            less.drain(at..(at + part).min(less.len()));
            if fails(&less) { input = less } else { at += part }
        }
        part /= 2;
    }
    input
}

/// The run must be able to fail: a parser that panics, one that takes what it is told, and the input that shows it.
#[test]
fn a_parser_that_breaks_is_found_and_its_input_made_small() {
    let panics: fn(&[u8]) = |bytes| assert!(!bytes.windows(2).any(|pair| pair == b"\xff\xff"), "two of them");
    assert!(attempt(panics, b"harmless").is_ok());
    assert!(attempt(panics, b"a\xff\xff").is_err_and(|why| why.contains("two of them")));
    let greedy: fn(&[u8]) = |bytes| drop(Vec::<u8>::with_capacity(usize::from(bytes[0]) << 20));
    assert!(attempt(greedy, &[10]).is_ok());
    assert!(attempt(greedy, &[200]).is_err_and(|why| why.contains("200 MiB")));

    let mut random = Random::new(7);
    let found = (0..200_000).find_map(|_| {
        let mut input = b"a small input of text".to_vec();
        mutate(&mut random, &mut input, b"another");
        attempt(panics, &input).is_err().then_some(input)
    });
    let input = smaller(found.expect("mutation finds it"), |less| attempt(panics, less).is_err());
    assert_eq!(input, b"\xff\xff");
}
