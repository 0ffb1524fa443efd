//! Which calls fail, and how.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::storage::StorageError;

/// A method of `ObjectStore` or `MultipartUpload`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Probe,
    PutNew,
    CompareAndSwap,
    Get,
    GetRange,
    GetStream,
    Head,
    List,
    ListFolders,
    Delete,
    BeginMultipart,
    PutPart,
    Complete,
    Abort,
}

/// The error that a call ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Unavailable,
    Throttled,
    Denied,
    NoBucket,
    Full,
    NotFound,
    UploadGone,
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done; the call ends with the error.
    Fail(Failure),
    /// Done after a pause.
    Delay(Duration),
    /// Never ends.
    Hang,
    /// Done, and then the call ends with `Unavailable` all the same.
    AnswerLost,
    /// One byte, in the middle, is changed: of what is stored by a write, of what a read gives.
    FlipByte,
    /// What is written or read is cut to its half.
    Short,
    /// A listing is cut to its half without saying so.
    TruncatedList,
    /// An existing object is overwritten.
    IgnorePrecondition,
}

/// One fault: which calls, and what happens to them.
#[derive(Clone, Debug)]
pub struct Rule {
    operation: Option<Operation>,
    key_part: String,
    first_call: u64,
    times: u64,
    effect: Effect,
}

impl Rule {
    /// For every call of the operation, on every key.
    pub fn new(operation: Operation, effect: Effect) -> Self {
        Self { operation: Some(operation), key_part: String::new(), first_call: 1, times: u64::MAX, effect }
    }

    /// For every call at all.
    pub fn any(effect: Effect) -> Self {
        Self { operation: None, ..Self::new(Operation::Probe, effect) }
    }

    /// Only for keys or prefixes that contain `part`.
    pub fn keys(self, part: impl Into<String>) -> Self {
        Self { key_part: part.into(), ..self }
    }

    /// Lets the matching calls before the `call`-th (from 1) pass.
    pub fn from_call(self, call: u64) -> Self {
        Self { first_call: call, ..self }
    }

    /// Acts on so many calls, then no more.
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }
}

/// The rules, shared by all clones.
#[derive(Clone, Default, Debug)]
pub struct FaultPlan {
    rules: Arc<Mutex<Vec<Planned>>>,
    hits: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Planned {
    rule: Rule,
    /// Calls that matched so far.
    seen: u64,
}

impl FaultPlan {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn add(&self, rule: Rule) {
        self.lock().push(Planned { rule, seen: 0 });
    }

    /// Heals everything.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// How many calls a rule acted on.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    pub(super) fn effect(&self, operation: Operation, key: &str) -> Option<Effect> {
        let mut found = None;
        for planned in self.lock().iter_mut() {
            let rule = &planned.rule;
            if rule.operation.is_some_and(|wanted| wanted != operation) || !key.contains(&rule.key_part) {
                continue;
            }
            planned.seen += 1;
            let acts = planned.seen >= rule.first_call && planned.seen - rule.first_call < rule.times;
            if acts && found.is_none() {
                found = Some(rule.effect);
                self.hits.fetch_add(1, Ordering::Relaxed);
            }
        }
        found
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Planned>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Failure {
    pub(super) fn error(self, url: &str, key: &str) -> StorageError {
        let (url, what, source) = (url.to_owned(), format!("a call for {key}"), Some("a planned fault".into()));
        match self {
            Self::Unavailable => StorageError::Unavailable { url, what, source },
            Self::Throttled => StorageError::Throttled { url, what, source },
            Self::Denied => StorageError::Denied { url, what, code: "AccessDenied".to_owned(), source },
            Self::NoBucket => StorageError::NoBucket { url, source },
            Self::Full => StorageError::Full { url, key: key.to_owned(), source },
            Self::NotFound => StorageError::NotFound { url, key: key.to_owned() },
            Self::UploadGone => StorageError::UploadGone { url, key: key.to_owned() },
        }
    }
}
