use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSettings {
    pub level: tracing::Level,
    pub format: LogFormat,
}

/// Logs go to stderr, since stdout is for data. The level is for Walden's own events. Libraries are heard with `error` only, and
/// with `warn` where Walden tells more than usual: what fails in them comes back as an error of ours, in one line, while their own
/// lines are dumps, and below `warn` they may show what they send.
///
/// The first call counts; later ones change nothing.
pub fn start_logging(settings: &LogSettings) {
    let own = LevelFilter::from_level(settings.level);
    let others = if own > LevelFilter::INFO { LevelFilter::WARN } else { own.min(LevelFilter::ERROR) };
    let filter = Targets::new().with_default(others).with_target("walden", own);
    let registry = tracing_subscriber::registry();
    // A log line that cannot be written (a closed pipe) is lost; complaining about it on the same stderr would panic.
    // `try_init` fails if logging was started before.
    let _ = match settings.format {
        LogFormat::Text => {
            let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            let layer = fmt::layer()
                .with_writer(std::io::stderr)
                .log_internal_errors(false)
                .with_ansi(color)
                .with_target(false);
            registry.with(layer.with_filter(filter)).try_init()
        }
        LogFormat::Json => {
            let layer = fmt::layer()
                .json()
                .flatten_event(true)
                .with_writer(std::io::stderr)
                .log_internal_errors(false)
                .with_current_span(false);
            registry.with(layer.with_filter(filter)).try_init()
        }
    };
}
