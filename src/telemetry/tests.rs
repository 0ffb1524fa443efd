use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use super::progress::{FlushSamples, Held, measure};
use super::*;
use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineId};

/// Both clocks at the same number of seconds, moved by hand.
struct HandClock(AtomicI64);

impl HandClock {
    fn forward(&self, seconds: i64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn wall(&self) -> PgTime {
        at(self.0.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(u64::try_from(self.0.load(Ordering::Relaxed)).expect("tests do not go below 0"))
    }
}

fn at(seconds: i64) -> PgTime {
    PgTime::from_pg_micros(seconds * 1_000_000)
}

fn board_with(alert: AlertSettings, required: &[bool]) -> (Board, Arc<HandClock>) {
    let clock = Arc::new(HandClock(AtomicI64::new(1000)));
    let repositories = required.iter().enumerate().map(|(number, required)| BoardRepository {
        name: format!("store-{number}"),
        url: format!("/archive/{number}"),
        required: *required,
    });
    let setup = BoardSetup {
        cluster: "main".into(),
        slot: "walden".into(),
        repositories: repositories.collect(),
        alert,
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
    };
    (Board::new(setup), clock)
}

const MIB: u64 = 1 << 20;
const SEGMENT: u64 = 16 * MIB;

fn stream(board: &Board, position: u64, archived: u64) {
    board.set_identity(SystemIdentifier::new(7_000_000_000_000_000_001), SegmentSize::DEFAULT);
    board.set_timeline(TimelineId::FIRST, Lsn::ZERO);
    board.set_received(Lsn::new(position));
    board.set_durable(Lsn::new(position));
    for repository in board.repositories() {
        repository.set_archived(Lsn::new(archived));
    }
    board.set_connected();
}

#[test]
fn a_new_agent_is_not_healthy_before_it_has_proved_anything() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    assert!(!board.snapshot().healthy());
    assert!(board.is_raised(CauseCode::NotConnected));

    board.set_connected();
    let snapshot = board.snapshot();
    assert!(!snapshot.healthy(), "connected, but no position is known");
    assert!(snapshot.has_cause(CauseCode::Lag) && !snapshot.has_cause(CauseCode::NotConnected));

    stream(&board, SEGMENT, SEGMENT);
    assert!(!board.snapshot().healthy(), "the server's position is still unknown");
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    assert!(board.snapshot().healthy());
}

#[test]
fn an_idle_server_stays_healthy_and_its_restorable_time_advances() {
    let settings = AlertSettings {
        lag: Some(Duration::from_secs(5)),
        rpo: Some(Duration::from_secs(5)),
        ..AlertSettings::default()
    };
    let (board, clock) = board_with(settings, &[true]);
    stream(&board, SEGMENT, SEGMENT);
    for _ in 0..5000 {
        board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
        clock.forward(2);
        let snapshot = board.snapshot();
        assert!(snapshot.healthy());
        assert_eq!(snapshot.distance.rpo_seconds, Some(0.0));
        assert_eq!(snapshot.distance.complete_until, Some(at(snapshot_time(&clock) - 2)));
    }
}

fn snapshot_time(clock: &HandClock) -> i64 {
    clock.0.load(Ordering::Relaxed)
}

#[test]
fn silence_of_the_server_is_an_alarm() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    clock.forward(30);
    assert!(board.snapshot().healthy());
    clock.forward(1);
    let snapshot = board.snapshot();
    assert!(!snapshot.healthy());
    let status = snapshot.status();
    assert_eq!((status.server_lsn, status.lag_bytes, status.rpo_seconds), (None, None, None));
    assert_eq!(status.received_lsn, Some(Lsn::new(SEGMENT)));
}

#[test]
fn a_stream_that_stands_still_behind_the_server_is_an_alarm() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    for _ in 0..16 {
        clock.forward(2);
        board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT + MIB));
        board.snapshot();
    }
    assert!(board.snapshot().healthy(), "behind for 30 s only");
    clock.forward(2);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT + MIB));
    let snapshot = board.snapshot();
    assert!(snapshot.has_cause(CauseCode::Lag));
    assert!(snapshot.causes[0].message.contains("nothing has been received"), "{}", snapshot.causes[0].message);
    board.set_received(Lsn::new(SEGMENT + MIB));
    assert!(board.snapshot().healthy());
}

#[test]
fn lag_counts_completed_segments_and_rpo_every_byte() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    clock.forward(10);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT + MIB));
    clock.forward(5);
    let status = board.snapshot().status();
    assert_eq!((status.lag_bytes, status.lag_seconds), (Some(0), Some(0.0)));
    assert_eq!((status.rpo_bytes, status.rpo_seconds), (Some(MIB), Some(15.0)));

    board.note_flush_sample(clock.wall(), Lsn::new(2 * SEGMENT + MIB));
    clock.forward(1);
    let snapshot = board.snapshot();
    assert_eq!(snapshot.distance.lag_bytes, Some(SEGMENT));
    assert_eq!(snapshot.distance.lag_seconds, Some(16.0));
    assert_eq!(snapshot.distance.lag_waiting_seconds, Some(1.0));
    assert_eq!(snapshot.distance.rpo_bytes, Some(SEGMENT + MIB));
    assert_eq!(snapshot.distance.complete_until, Some(at(1000)));

    board.repositories()[0].set_archived(Lsn::new(2 * SEGMENT));
    let status = board.snapshot().status();
    assert_eq!((status.lag_bytes, status.lag_seconds), (Some(0), Some(0.0)));
    assert_eq!(status.complete_until, Some(at(1010)));
}

#[test]
fn archived_is_the_lowest_of_the_required_repositories() {
    let (board, _clock) = board_with(AlertSettings::default(), &[true, false, true]);
    let stores = board.repositories();
    stores[0].set_archived(Lsn::new(300));
    stores[1].set_archived(Lsn::new(100));
    assert_eq!(board.archived(), None, "one required repository is unknown");
    stores[2].set_archived(Lsn::new(200));
    assert_eq!(board.archived(), Some(Lsn::new(200)));
}

#[test]
fn thresholds_raise_and_clear_causes_and_unknown_does_neither() {
    let settings = AlertSettings {
        lag: Some(Duration::from_secs(60)),
        lag_bytes: Some(4 * SEGMENT),
        rpo: Some(Duration::from_secs(30)),
        slot_retained_bytes: Some(MIB),
    };
    let (board, clock) = board_with(settings, &[true]);
    stream(&board, 3 * SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    clock.forward(2);
    board.note_flush_sample(clock.wall(), Lsn::new(3 * SEGMENT));
    assert!(board.snapshot().healthy());
    clock.forward(29);
    board.note_flush_sample(clock.wall(), Lsn::new(3 * SEGMENT));
    assert!(board.snapshot().has_cause(CauseCode::Rpo) && !board.is_raised(CauseCode::Lag));
    clock.forward(31);
    board.note_flush_sample(clock.wall(), Lsn::new(3 * SEGMENT));
    assert!(board.snapshot().has_cause(CauseCode::Lag), "a segment has waited for 60 s");

    // The server goes away: what waits is still known to wait.
    board.set_disconnected("the server closed the connection");
    clock.forward(3600);
    assert!(board.snapshot().has_cause(CauseCode::Lag));
    // All that was known is archived, but the server may have gone on: not cleared without proof.
    board.repositories()[0].set_archived(Lsn::new(3 * SEGMENT));
    assert!(board.snapshot().has_cause(CauseCode::Lag));
    board.set_connected();
    board.note_flush_sample(clock.wall(), Lsn::new(3 * SEGMENT));
    assert!(board.snapshot().healthy());

    let retained = |bytes| Some(SlotFacts { retained_bytes: bytes, ..SlotFacts::default() });
    board.set_slot(retained(Some(MIB)));
    assert!(board.snapshot().has_cause(CauseCode::SlotRetention));
    board.set_slot(retained(None));
    assert!(board.snapshot().has_cause(CauseCode::SlotRetention));
    board.set_slot(retained(Some(MIB - 1)));
    assert!(board.snapshot().healthy());
}

#[test]
fn a_quiet_server_filling_a_segment_for_hours_raises_no_lag() {
    let settings = AlertSettings { lag: Some(Duration::from_secs(300)), ..AlertSettings::default() };
    let (board, clock) = board_with(settings, &[true]);
    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    for minute in 1..=120 {
        clock.forward(20);
        board.set_received(Lsn::new(SEGMENT + minute * (SEGMENT / 120 + 1)));
        board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT + minute * (SEGMENT / 120 + 1)));
        assert!(board.snapshot().healthy());
    }
    assert_eq!(board.snapshot().distance.lag_bytes, Some(SEGMENT));
}

#[test]
fn a_cause_keeps_its_first_time_and_its_last_message() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    board.raise(CauseCode::StoreFailing, "first");
    clock.forward(60);
    board.raise(CauseCode::StoreFailing, "second");
    let snapshot = board.snapshot();
    let cause = snapshot.causes.iter().find(|cause| cause.code == CauseCode::StoreFailing).expect("raised");
    assert_eq!((cause.message.as_str(), cause.since), ("second", at(1000)));
    board.clear(CauseCode::StoreFailing);
    assert!(!board.is_raised(CauseCode::StoreFailing));
}

#[test]
fn missing_sql_alone_is_healthy() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    board.raise(CauseCode::NoSql, "pg_hba.conf has no line for SQL");
    let status = board.snapshot().status();
    assert!(status.healthy && status.causes.len() == 1);
}

#[test]
fn the_codes_are_distinct_and_listed_once() {
    let names: std::collections::BTreeSet<_> = CauseCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(names.len(), CauseCode::ALL.len());
}

#[test]
fn samples_are_bounded_and_thinning_never_promises_more() {
    let mut samples = FlushSamples::default();
    let second = Duration::from_secs;
    for number in 1..=20_000u64 {
        samples.note(at(i64::try_from(number).expect("small")), Lsn::new(number), second(number));
        assert!(samples.len() <= 4096);
    }
    for held in [1, 2, 777, 5000, 12_345, 19_999, 20_000] {
        let until = samples.complete_until(Lsn::new(held)).expect("the oldest sample stays");
        assert!(until <= at(i64::try_from(held).expect("small")), "{until} is promised although only {held} is held");
    }
    assert_eq!(samples.complete_until(Lsn::new(20_000)), Some(at(20_000)));
    assert_eq!(samples.complete_until(Lsn::ZERO), None);
}

#[test]
fn a_server_clock_set_back_dates_nothing_twice() {
    let mut samples = FlushSamples::default();
    samples.note(at(100), Lsn::new(10), Duration::from_secs(1));
    samples.note(at(110), Lsn::new(20), Duration::from_secs(11));
    samples.note(at(120), Lsn::new(20), Duration::from_secs(21));
    samples.note(at(50), Lsn::new(20), Duration::from_secs(22));
    // The times from 50 to 120 will come again with later positions.
    assert_eq!(samples.complete_until(Lsn::new(20)), Some(at(50)));
    assert_eq!(samples.complete_until(Lsn::new(19)), None);
}

#[test]
fn a_position_that_falls_forgets_the_other_history() {
    let mut samples = FlushSamples::default();
    samples.note(at(100), Lsn::new(1000), Duration::from_secs(1));
    samples.note(at(110), Lsn::new(500), Duration::from_secs(11));
    assert_eq!(samples.complete_until(Lsn::new(1000)), Some(at(110)));
    assert_eq!(samples.complete_until(Lsn::new(499)), None);
}

#[test]
fn received_wal_counts_before_a_sample_shows_it() {
    let mut samples = FlushSamples::default();
    samples.note(at(100), Lsn::new(SEGMENT), Duration::from_secs(1));
    let held = Held {
        received: Some(Lsn::new(3 * SEGMENT)),
        archived: Some(Lsn::new(SEGMENT)),
        segment_size: Some(SegmentSize::DEFAULT),
    };
    let distance = measure(&samples, &held, Duration::from_secs(5));
    assert_eq!(distance.lag_bytes, Some(2 * SEGMENT));
    assert_eq!(distance.lag_seconds, Some(4.0));
    assert_eq!(distance.lag_waiting_seconds, Some(0.0));
}

#[test]
fn the_status_document_has_every_field_and_reads_back() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    let empty = serde_json::to_value(board.snapshot().status()).expect("plain data");
    let fields = "schema healthy causes system_identifier timeline server_lsn received_lsn durable_lsn archived_lsn lag_bytes \
        lag_seconds rpo_bytes rpo_seconds complete_until diverged gaps slot queue repositories last_backup";
    let expected: std::collections::BTreeSet<&str> = fields.split_whitespace().collect();
    let found: std::collections::BTreeSet<&str> =
        empty.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(found, expected);
    assert!(empty["server_lsn"].is_null() && empty["slot"]["restart_lsn"].is_null());

    stream(&board, SEGMENT, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    board.set_gaps(vec![GapFact {
        timeline: TimelineId::FIRST,
        from_lsn: Lsn::new(1),
        to_lsn: Lsn::new(2),
        since: at(5),
        reason: "the slot was dropped".into(),
    }]);
    board.backup_succeeded(backup());
    let status = board.snapshot().status();
    let text = serde_json::to_string(&status).expect("plain data");
    assert!(text.contains(r#""system_identifier":"7000000000000000001""#), "{text}");
    assert!(text.contains(r#""archived_lsn":"0/1000000""#), "{text}");
    assert!(text.contains(r#""complete_until":"2000-01-01T00:16:40.000000Z""#), "{text}");
    assert_eq!(serde_json::from_str::<StatusJson>(&text).expect("reads back"), status);
}

/// Only a backup behind every gap ends the alarm: one that was found while the backup ran stands on.
#[test]
fn a_gaps_alarm_ends_once_every_gap_is_past() {
    let (board, _) = board_with(AlertSettings::default(), &[true]);
    let sample = |board: &Board| board.snapshot().metrics_text().contains("walden_wal_gaps{");
    assert!(!sample(&board), "no repository has told yet");
    board.set_gaps_known();
    assert!(sample(&board));
    let find = |from: u64, to: u64| {
        let (from_lsn, to_lsn) = (Lsn::new(from), Lsn::new(to));
        board.add_gap(GapFact { timeline: TimelineId::FIRST, from_lsn, to_lsn, since: at(5), reason: "lost".into() });
        board.raise(CauseCode::Gap, "lost");
    };
    board.raise(CauseCode::SlotLost, "invalidated");
    find(10, 20);
    board.settle_slot();
    assert!(board.is_raised(CauseCode::SlotLost), "it has cost WAL");
    find(30, 40);
    board.settle_gaps(|gap| gap.to_lsn <= Lsn::new(25));
    assert!(board.is_raised(CauseCode::Gap) && board.is_raised(CauseCode::SlotLost));
    board.settle_gaps(|gap| gap.to_lsn <= Lsn::new(40));
    assert!(!board.is_raised(CauseCode::Gap) && !board.is_raised(CauseCode::SlotLost));
    board.raise(CauseCode::SlotLost, "invalidated");
    board.settle_gaps(|_| true);
    assert!(board.is_raised(CauseCode::SlotLost), "what it has cost is not known yet");
    board.settle_slot();
    assert!(!board.is_raised(CauseCode::SlotLost));

    board.raise_unproven(Lsn::new(50), "not compared");
    board.raise_unproven(Lsn::new(40), "not compared");
    board.settle_unproven(|at| at <= Lsn::new(45));
    assert!(board.is_raised(CauseCode::ContinuityUnproven));
    board.settle_unproven(|at| at <= Lsn::new(50));
    assert!(!board.is_raised(CauseCode::ContinuityUnproven));
}

fn backup() -> BackupFacts {
    BackupFacts {
        id: "20261120T020000Z-full".into(),
        timeline: TimelineId::FIRST,
        start_lsn: Lsn::new(0x200_0028),
        stop_lsn: Lsn::new(0x200_0100),
        start_time: at(10),
        stop_time: at(20),
        duration_seconds: 10.5,
        size_bytes: 30 * MIB,
        stored_bytes: 4 * MIB,
    }
}

#[test]
fn every_metric_is_on_the_page_under_its_name() {
    let (board, clock) = board_with(AlertSettings::default(), &[true]);
    stream(&board, SEGMENT + 5, SEGMENT);
    board.note_flush_sample(clock.wall(), Lsn::new(SEGMENT));
    board.count_received(12);
    board.set_queue(3, 400);
    board.set_spool_free(Some(1 << 40));
    board.set_slot(Some(SlotFacts {
        restart_lsn: Some(Lsn::new(SEGMENT)),
        wal_status: Some("extended".into()),
        retained_bytes: Some(77),
    }));
    board.backup_succeeded(backup());
    board.backup_failed("no space");
    board.set_window_start(Some(at(0)));
    board.set_gaps_known();
    let store = &board.repositories()[0];
    store.segment_archived();
    store.observe_upload(Duration::from_millis(30));
    store.observe_upload(Duration::from_secs(600));
    store.upload_failed();
    let page = board.snapshot().metrics_text();
    for line in [
        r#"walden_wal_received_lsn{cluster="main"} 16777221.0"#,
        r#"walden_wal_bytes_total{cluster="main",stage="received"} 12"#,
        r#"walden_segments_archived_total{cluster="main",repository="store-0"} 1"#,
        r#"walden_upload_seconds_bucket{le="0.05",cluster="main",repository="store-0"} 1"#,
        r#"walden_upload_seconds_bucket{le="+Inf",cluster="main",repository="store-0"} 2"#,
        r#"walden_upload_failures_total{cluster="main",repository="store-0"} 1"#,
        r#"walden_slot_wal_status{cluster="main",wal_status="extended"} 1.0"#,
        r#"walden_cause{cluster="main",code="backup_failed"} 1.0"#,
        r#"walden_cause{cluster="main",code="gap"} 0.0"#,
        r#"walden_recovery_window_start_timestamp_seconds{cluster="main"} 946684800.0"#,
        "# TYPE walden_backup_failures_total counter",
        "# TYPE walden_upload_seconds histogram",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\nis not in\n{page}");
    }
    let names = "wal_received_lsn wal_durable_lsn wal_archived_lsn wal_archive_lag_bytes wal_archive_lag_seconds rpo_bytes rpo_seconds \
        wal_bytes_total segments_archived_total upload_seconds upload_retries_total upload_failures_total queue_segments queue_bytes \
        spool_free_bytes slot_retained_bytes slot_wal_status wal_gaps connected timeline backup_last_success_timestamp_seconds \
        backup_last_duration_seconds backup_last_size_bytes backup_failures_total recovery_window_start_timestamp_seconds \
        recovery_window_end_timestamp_seconds cause build_info";
    for name in names.split_whitespace() {
        assert!(page.contains(&format!("# HELP walden_{name} ")), "{name} has no help text");
        assert!(page.contains(&format!("# TYPE walden_{name} ")), "{name} has no type");
    }
    assert!(page.lines().all(|line| line.starts_with('#') || line.contains(r#"cluster="main""#)));
    assert!(!page.contains("# EOF") && !page.contains("# UNIT"));
}
