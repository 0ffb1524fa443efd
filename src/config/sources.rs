use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::keys::{self, REPOSITORY};
use super::raw::{Entry, Origin, REPOSITORIES_MAX, Raw, Section, clip};
use super::value::Scalar;

/// Read when no file is named and this one is there.
const FILE_DEFAULT: &str = "/etc/walden/walden.toml";
const FILE_BYTES_MAX: u64 = 1 << 20;
const PREFIX: &str = "WALDEN_";

/// The flags for first tries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QuickSettings {
    pub url: Option<String>,
    pub slot: Option<String>,
    pub cluster: Option<String>,
    pub listen: Option<String>,
    /// `s3://bucket/prefix` or a path: the only repository then.
    pub repository: Option<String>,
}

/// Everything that settings are made from. The environment holds secrets of others, so this cannot be printed.
#[derive(Clone)]
pub struct Sources {
    /// The file named by `--config`.
    pub config: Option<PathBuf>,
    pub quick: QuickSettings,
    pub environment: Vec<(OsString, OsString)>,
    /// Absolute.
    pub working_directory: PathBuf,
}

impl Sources {
    /// Takes environment and working directory from this process.
    pub fn from_process(config: Option<PathBuf>, quick: QuickSettings) -> Result<Self, ConfigError> {
        let working_directory = std::env::current_dir().map_err(|source| ConfigError::WorkingDirectory { source })?;
        Ok(Self { config, quick, environment: std::env::vars_os().collect(), working_directory })
    }

    fn variable(&self, name: &str) -> Option<&OsString> {
        self.environment.iter().find(|(found, _)| found == name).map(|(_, value)| value)
    }
}

/// All sources put together.
pub struct Gathered {
    pub raw: Raw,
    /// The file that was read, absolute.
    pub file: Option<PathBuf>,
    /// Relative paths start here: the file's folder, else the working directory.
    pub base: PathBuf,
    pub from_file_alone: bool,
}

pub fn gather(sources: &Sources) -> Result<Gathered, ConfigError> {
    let named = sources
        .config
        .clone()
        .or_else(|| sources.variable("WALDEN_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from));
    let (raw, file) = match named {
        Some(path) => {
            let path = sources.working_directory.join(path);
            let text = read(&path)?.ok_or_else(|| ConfigError::Missing { path: path.clone() })?;
            (Raw::parse(&text, &path)?, Some(path))
        }
        None => match read(Path::new(FILE_DEFAULT))? {
            Some(text) => (Raw::parse(&text, Path::new(FILE_DEFAULT))?, Some(PathBuf::from(FILE_DEFAULT))),
            None => (Raw::default(), None),
        },
    };
    let base = file.as_deref().and_then(Path::parent).unwrap_or(&sources.working_directory).to_owned();
    let mut gathered = Gathered { raw, file, base, from_file_alone: true };
    add_environment(&mut gathered, sources)?;
    add_flags(&mut gathered, sources)?;
    Ok(gathered)
}

/// `None` if there is no such file.
fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(unreadable(io::Error::other("it is larger than 1 MiB")));
    }
    Ok(Some(text))
}

/// `WALDEN_ARCHIVE__CLUSTER`, `WALDEN_REPOSITORY__0__BUCKET`. Names without `__` are none of ours, or not settings.
fn add_environment(gathered: &mut Gathered, sources: &Sources) -> Result<(), ConfigError> {
    let mut repositories: Vec<(usize, &'static str, Entry)> = Vec::new();
    for (name, value) in &sources.environment {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX) && name.contains("__")) else { continue };
        let origin = Origin::Environment(name.to_owned());
        let setting = name[PREFIX.len()..].to_ascii_lowercase();
        // The prefix's own underscore may be one of the two: WALDEN__CLUSTER.
        let (section, rest) = setting.split_once("__").unwrap_or(("", setting.trim_start_matches('_')));
        let dotted = format!("{section}.{}", rest.replace("__", "."));
        let dotted = dotted.trim_start_matches('.').to_owned();
        let Some(value) = value.to_str() else {
            return Err(ConfigError::Value { key: clip(&dotted), origin, why: "is not UTF-8".into() });
        };
        let entry = Entry { value: Scalar::from_text(value), text: Some(value.to_owned()), origin: origin.clone() };
        let unknown =
            || ConfigError::UnknownKey { key: clip(&dotted), origin: origin.clone(), nearest: keys::nearest(&dotted) };
        if section == REPOSITORY {
            let indexed = rest.split_once("__").and_then(|(index, key)| Some((index.parse().ok()?, key)));
            let Some((index, key)) = indexed else {
                return Err(ConfigError::Value {
                    key: clip(&dotted),
                    origin,
                    why: "needs the repository's number, from 0: WALDEN_REPOSITORY__0__BUCKET".into(),
                });
            };
            let key = keys::find(REPOSITORY, key).ok_or_else(unknown)?;
            repositories.push((index, key.name, entry));
        } else {
            let key = keys::find(section, rest).ok_or_else(unknown)?;
            gathered.raw.set(key.section, key.name, entry);
        }
        gathered.from_file_alone = false;
    }
    if sources.quick.repository.is_some() {
        gathered.raw.repositories.clear(); // the flag names the only one; what the environment says of the first still holds
    }
    repositories.sort_by_key(|(index, ..)| *index);
    for (index, name, entry) in repositories {
        let count = gathered.raw.repositories.len();
        if index > count || index >= REPOSITORIES_MAX {
            return Err(ConfigError::Value {
                key: format!("{REPOSITORY}.{index}"),
                origin: entry.origin,
                why: format!(
                    "does not follow on: the next repository has the number {count}, {REPOSITORIES_MAX} are possible"
                ),
            });
        }
        if index == count {
            gathered.raw.repositories.push(Section::new());
        }
        gathered.raw.repositories[index].insert(name, entry);
    }
    Ok(())
}

fn add_flags(gathered: &mut Gathered, sources: &Sources) -> Result<(), ConfigError> {
    let quick = &sources.quick;
    let simple = [
        ("postgres", "url", "--url", &quick.url),
        ("postgres", "slot", "--slot", &quick.slot),
        ("archive", "cluster", "--cluster", &quick.cluster),
        ("metrics", "listen", "--listen", &quick.listen),
    ];
    for (section, name, flag, value) in simple {
        if let Some(value) = value {
            gathered.raw.set(section, name, text_entry(value, flag));
            gathered.from_file_alone = false;
        }
    }
    if let Some(url) = &quick.repository {
        let given = repository_flag(url, &sources.working_directory)?;
        if gathered.raw.repositories.is_empty() {
            gathered.raw.repositories.push(Section::new());
        }
        let first = &mut gathered.raw.repositories[0];
        for name in ["type", "path", "bucket", "prefix"] {
            first.remove(name);
        }
        first.extend(given);
        gathered.from_file_alone = false;
    }
    Ok(())
}

fn text_entry(value: &str, flag: &'static str) -> Entry {
    Entry { value: Scalar::Text(value.to_owned()), text: Some(value.to_owned()), origin: Origin::Flag(flag) }
}

/// `s3://bucket/prefix`, `file:///path` or a path, which starts in the working directory, as everywhere on a command line.
fn repository_flag(url: &str, working_directory: &Path) -> Result<Section, ConfigError> {
    const FLAG: &str = "--repository";
    let wrong = |why: &str| ConfigError::Value { key: REPOSITORY.into(), origin: Origin::Flag(FLAG), why: why.into() };
    let mut section = Section::new();
    let mut set = |name, value: &str| section.insert(name, text_entry(value, FLAG));
    if let Some(rest) = url.strip_prefix("s3://") {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        set("type", "s3");
        set("bucket", bucket);
        set("prefix", prefix);
        return Ok(section);
    }
    let path = url.strip_prefix("file://").unwrap_or(url);
    if path.contains("://") {
        return Err(wrong("is neither s3://bucket/prefix nor a path"));
    }
    if path.is_empty() {
        return Err(wrong("is empty; write s3://bucket/prefix or a path"));
    }
    let path = working_directory.join(path);
    let path = path.to_str().ok_or_else(|| wrong("lies in a folder whose name is not UTF-8"))?;
    set("type", "local");
    set("path", path);
    Ok(section)
}
