//! The metrics page, made from a snapshot: a scrape asks neither the server nor a store.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::cause::CauseCode;
use super::counters::{HistogramSnapshot, Stage, UPLOAD_SECONDS};
use super::snapshot::Snapshot;
use crate::wal::Lsn;

/// The values of `wal_status` in the view `pg_replication_slots` (PostgreSQL documentation, "pg_replication_slots").
const WAL_STATUSES: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];

type Labels = Vec<(&'static str, String)>;

impl Snapshot {
    /// Prometheus' text format, version 0.0.4. What is unknown has no sample.
    pub fn metrics_text(&self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.clone()));
        let mut page = String::new();
        text::encode(&mut page, &registry).expect("writing into a string does not fail");
        classic(&page)
    }
}

/// Turns OpenMetrics text into Prometheus' own format, which every scraper and `promtool check metrics` reads: there a counter's
/// `HELP` and `TYPE` carry the `_total` of its samples, and neither `UNIT` nor `EOF` exists.
fn classic(page: &str) -> String {
    let mut out = String::with_capacity(page.len());
    let mut lines = page.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ")
            && let Some((name, text)) = help.split_once(' ')
            && lines.peek().is_some_and(|next| *next == format!("# TYPE {name} counter"))
        {
            out.push_str(&format!("# HELP {name}_total {text}\n# TYPE {name}_total counter\n"));
            lines.next();
        } else if line != "# EOF" && !line.starts_with("# UNIT ") {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut page = Page { encoder, cluster: self.cluster.clone() };
        self.positions(&mut page)?;
        self.server(&mut page)?;
        self.uploads(&mut page)?;
        self.backups(&mut page)?;
        let causes = CauseCode::ALL.map(|code| (vec![("code", code.as_str().into())], flag(self.has_cause(code))));
        page.gauges("cause", "Whether this cause stands; the messages are in the status", causes)?;
        let build = [(vec![("version", env!("CARGO_PKG_VERSION").into())], 1.0)];
        page.gauges("build_info", "The agent's version; always 1", build)
    }
}

impl Snapshot {
    fn positions(&self, page: &mut Page) -> fmt::Result {
        let distance = &self.distance;
        page.gauge("wal_received_lsn", "End of the WAL taken from the server, as a byte position", lsn(self.received))?;
        page.gauge(
            "wal_durable_lsn",
            "End of the WAL that is on the local disk, as a byte position",
            lsn(self.durable),
        )?;
        page.gauge(
            "wal_archived_lsn",
            "End of the WAL that every required repository has without a hole, as a byte position",
            lsn(self.archived),
        )?;
        page.gauge(
            "wal_archive_lag_bytes",
            "WAL in segments completed by the server that is not in every required repository",
            distance.lag_bytes.map(count),
        )?;
        page.gauge(
            "wal_archive_lag_seconds",
            "Age of the oldest byte of wal_archive_lag_bytes by the server's clock",
            distance.lag_seconds,
        )?;
        page.gauge(
            "rpo_bytes",
            "All WAL that is not in every required repository, the open segment included",
            distance.rpo_bytes.map(count),
        )?;
        page.gauge("rpo_seconds", "Age of the oldest byte of rpo_bytes by the server's clock", distance.rpo_seconds)?;
        let stages = Stage::ALL.into_iter().zip(self.wal_bytes);
        let rows = stages.map(|(stage, bytes)| (vec![("stage", stage.as_str().into())], bytes));
        page.counters("wal_bytes", "WAL bytes that passed this stage since the start of the agent, raw; received counts what came twice as well", rows)
    }

    fn server(&self, page: &mut Page) -> fmt::Result {
        page.gauge("connected", "Whether WAL is streaming", Some(flag(self.connected)))?;
        page.gauge("timeline", "The timeline that is being archived", self.timeline.map(|id| f64::from(id.get())))?;
        page.gauge(
            "slot_retained_bytes",
            "WAL that the server keeps because of the slot",
            self.slot.retained_bytes.map(count),
        )?;
        if let Some(status) = &self.slot.wal_status {
            let rows = WAL_STATUSES.map(|each| (vec![("wal_status", each.into())], flag(each == status)));
            page.gauges("slot_wal_status", "The slot's wal_status on the server; 1 for the one that holds", rows)?;
        }
        page.counters(
            "sync_degraded_seconds",
            "Time in which commits that wait for Walden returned without the repositories' word",
            [(Vec::new(), self.unguarded.as_secs())],
        )?;
        page.gauge("wal_gaps", "Ranges of WAL known to be lost", self.gaps_known.then_some(self.gaps.len() as f64))?; // a small count
        page.gauge(
            "queue_segments",
            "Sealed segments that wait for an upload",
            self.queue.map(|(segments, _)| count(segments)),
        )?;
        page.gauge("queue_bytes", "Stored bytes that wait for an upload", self.queue.map(|(_, bytes)| count(bytes)))?;
        page.gauge("spool_free_bytes", "Free bytes on the spool's file system", self.spool_free_bytes.map(count))
    }

    fn uploads(&self, page: &mut Page) -> fmt::Result {
        let name = |at: usize| vec![("repository", self.repositories[at].name.clone())];
        let each = || self.repositories.iter().enumerate();
        page.counters(
            "segments_archived",
            "Complete segments stored in the repository",
            each().map(|(at, repository)| (name(at), repository.segments_archived)),
        )?;
        page.counters(
            "upload_retries",
            "Uploads to the repository that were tried again",
            each().map(|(at, repository)| (name(at), repository.upload_retries)),
        )?;
        page.counters(
            "upload_failures",
            "Tries of an upload to the repository that failed",
            each().map(|(at, repository)| (name(at), repository.upload_failures)),
        )?;
        page.histograms(
            "upload_seconds",
            "Time that a successful upload to the repository took",
            each().map(|(at, repository)| (name(at), &repository.upload_seconds)),
        )
    }

    fn backups(&self, page: &mut Page) -> fmt::Result {
        let last = self.last_backup.as_ref();
        page.gauge(
            "backup_last_success_timestamp_seconds",
            "When the last base backup ended, as Unix time",
            last.map(|backup| backup.stop_time.unix_seconds()),
        )?;
        page.gauge(
            "backup_last_duration_seconds",
            "How long the last base backup took",
            last.map(|backup| backup.duration_seconds),
        )?;
        page.gauge(
            "backup_last_size_bytes",
            "Size of the last base backup, uncompressed",
            last.map(|backup| count(backup.size_bytes)),
        )?;
        page.counters("backup_failures", "Base backups that failed", [(Vec::new(), self.backup_failures)])?;
        page.gauge(
            "recovery_window_start_timestamp_seconds",
            "First moment that can be restored in the window that reaches the present, as Unix time",
            self.window_start.map(|start| start.unix_seconds()),
        )?;
        let end = self.window_start.and(self.shown_complete_until());
        page.gauge(
            "recovery_window_end_timestamp_seconds",
            "Every commit acknowledged before this moment can be restored, as Unix time",
            end.map(|end| end.unix_seconds()),
        )
    }
}

/// Prometheus' numbers are 64-bit floats: exact below 2^53 (8 PiB), then rounded to a few bytes.
fn count(number: u64) -> f64 {
    number as f64
}

fn lsn(position: Option<Lsn>) -> Option<f64> {
    position.map(|position| count(position.get()))
}

fn flag(holds: bool) -> f64 {
    f64::from(u8::from(holds))
}

/// Writes families: the prefix in front of each name and the label `cluster` on each sample.
struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
    cluster: String,
}

impl Page<'_> {
    fn labels(cluster: &str, mut labels: Labels) -> Labels {
        labels.insert(0, ("cluster", cluster.to_owned()));
        labels
    }

    fn gauge(&mut self, name: &str, help: &str, value: Option<f64>) -> fmt::Result {
        match value {
            Some(value) => self.gauges(name, help, [(Vec::new(), value)]),
            None => Ok(()),
        }
    }

    fn gauges(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, f64)>) -> fmt::Result {
        let name = format!("walden_{name}");
        let mut family = self.encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            family.encode_family(&Self::labels(&self.cluster, labels))?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// `name` without `_total`.
    fn counters(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, u64)>) -> fmt::Result {
        let name = format!("walden_{name}");
        let mut family = self.encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            let labels = Self::labels(&self.cluster, labels);
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
        }
        Ok(())
    }

    fn histograms<'h>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, &'h HistogramSnapshot)>,
    ) -> fmt::Result {
        let name = format!("walden_{name}");
        let mut family = self.encoder.encode_descriptor(&name, help, None, MetricType::Histogram)?;
        for (labels, histogram) in rows {
            let labels = Self::labels(&self.cluster, labels);
            let bounds = UPLOAD_SECONDS.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(histogram.buckets).collect();
            let total = histogram.buckets.iter().sum();
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                histogram.sum_seconds,
                total,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}
