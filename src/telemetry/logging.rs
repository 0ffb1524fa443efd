use std::io::IsTerminal;

use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
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
/// As JSON each line is one object: `timestamp`, `level`, `message`, and the fields of docs/operations.md, which keep their names. The
/// events that matter have a word of their own in `event`.
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
                .with_target(false)
                .fmt_fields(fmt::format::debug_fn(text_field));
            registry.with(layer.with_filter(filter)).try_init()
        }
        LogFormat::Json => {
            let layer = fmt::layer()
                .json()
                .flatten_event(true)
                .with_writer(std::io::stderr)
                .log_internal_errors(false)
                .with_target(false) // module paths, which change
                .with_current_span(false)
                .with_span_list(false);
            registry.with(layer.with_filter(filter)).try_init()
        }
    };
}

/// The message, then `name=value`. `event` is for programs, and says to people what the message does. One event is one line, whatever a
/// server or a store put into a text.
fn text_field(writer: &mut Writer<'_>, field: &Field, value: &dyn std::fmt::Debug) -> std::fmt::Result {
    let text = match field.name() {
        "event" => return Ok(()),
        "message" => format!("{value:?}"),
        name => format!(" {name}={value:?}"),
    };
    writer.write_str(&text.replace(char::is_control, " "))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_text_line_is_one_line_with_its_fields_behind_the_message() {
        let kept = Kept::default();
        let writer = kept.clone();
        let layer = fmt::layer().with_writer(move || writer.clone()).with_ansi(false).with_target(false).without_time();
        let layer = layer.fmt_fields(fmt::format::debug_fn(text_field));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let said = "no\nroom \u{1b}[31m";
            tracing::warn!(event = "spool_full", repository = "main", %said, bytes = 7, "the spool is full: {said}");
        });
        let text = String::from_utf8(kept.0.lock().expect("no panic").clone()).expect("text");
        assert_eq!(text, " WARN the spool is full: no room  [31m repository=\"main\" said=no room  [31m bytes=7\n");
    }
}
