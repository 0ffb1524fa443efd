use super::listing::{Held, Judgement};
use super::patience::{Persistence, persistence};
use super::*;
use crate::repository::test_support::{SYSTEM, seal, seal_with, writer};
use crate::repository::{BackupId, Coverage, Piece, RepositoryWriter, StoredPart};
use crate::restore::plan_file::{PlannedPiece, PlannedRun};
use crate::seal::combine_crc32;
use crate::storage::StorageError;
use crate::wal::Lsn;
use crate::wal::Summary;

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn timeline(id: u32) -> TimelineId {
    TimelineId::new(id).unwrap()
}

fn segment(id: u32, number: u64) -> SegmentName {
    SegmentName::holding(timeline(id), Lsn::new(number * MIB), size())
}

fn raw(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| ((n * 31 + seed) / 7 % 251) as u8).collect()
}

fn run(id: u32, numbers: std::ops::Range<u64>) -> PlannedRun {
    PlannedRun {
        timeline: timeline(id),
        start: Lsn::new(numbers.start * MIB),
        end: Lsn::new(numbers.end * MIB),
        compression: Compression::Lz4,
    }
}

/// Timeline 1 up to the switch in segment 5, timeline 2 from segment 5 on, of which segment 7 is open.
fn plan() -> PlanFile {
    PlanFile {
        format: 1,
        repository: "main".into(),
        cluster: "main".into(),
        system_identifier: SYSTEM,
        segment_size: size(),
        timeline: timeline(2),
        ancestors: vec![(timeline(1), Lsn::new(5 * MIB + 0x100))],
        target: "latest".into(),
        backup: BackupId::parse("20261120T020000Z-full").unwrap(),
        volumes: vec![StoredPart {
            key: "volumes/000001.tar.lz4".into(),
            raw_bytes: 1,
            stored_bytes: 1,
            raw_crc32: 0,
            stored_crc32: 0,
        }],
        manifest: None,
        wal: vec![run(1, 3..5), run(2, 5..7)],
        tails: vec![PlannedTail {
            segment: segment(2, 7).to_string(),
            end: 0x3000,
            raw_crc32: 0,
            pieces: vec![
                PlannedPiece { start: 0, end: 0x1000, compression: Compression::Lz4, raw_crc32: 0 },
                PlannedPiece { start: 0x1000, end: 0x3000, compression: Compression::Lz4, raw_crc32: 0 },
            ],
        }],
        histories: vec![PlannedHistory { timeline: timeline(2), size: 4, crc32: 1 }],
    }
}

#[test]
fn the_decisions_of_a_plan() {
    let plan = plan();
    let seen = |name: &str| match decide(&plan, name) {
        Ok(Decision::Whole(..)) => "whole",
        Ok(Decision::Tail(..)) => "tail",
        Ok(Decision::History(_)) => "history",
        Ok(Decision::AskHistory(_)) => "ask",
        Ok(Decision::Absent(_)) => "absent",
        Ok(Decision::Refused(_)) => "refused",
        Err(_) => "unknown",
    };
    let name = |id: u32, number: u64| segment(id, number).to_string();
    for (asked, expected) in [
        (name(1, 3), "whole"),
        (name(1, 4), "whole"),
        (name(2, 5), "whole"),
        (name(2, 6), "whole"),
        (name(2, 7), "tail"),
        // Behind the plan's last segment, on whatever timeline: at once, and never an error.
        (name(2, 8), "absent"),
        (name(1, 8), "absent"),
        (name(3, 8), "absent"),
        (name(2, 9000), "absent"),
        // PostgreSQL asks for the newest timeline first; the plan has these from timeline 1.
        (name(2, 3), "absent"),
        (name(2, 4), "absent"),
        // Never "absent": a needed part of the WAL could be passed over.
        (name(1, 5), "refused"),
        (name(1, 7), "refused"),
        (name(3, 5), "refused"),
        (name(1, 2), "refused"),
        (name(2, 2), "refused"),
        ("00000001.history".into(), "absent"),
        ("00000002.history".into(), "history"),
        ("00000003.history".into(), "ask"),
        ("000000FF.history".into(), "ask"),
        ("00000000.history".into(), "unknown"),
        ("2.history".into(), "unknown"),
        (format!("{}.partial", name(2, 7)), "unknown"),
        (format!("{}.00000028.backup", name(1, 3)), "unknown"),
        ("RECOVERYXLOG".into(), "unknown"),
        ("".into(), "unknown"),
        ("../../etc/passwd".into(), "unknown"),
        (name(1, 3).to_lowercase() + "x", "unknown"),
    ] {
        assert_eq!(seen(&asked), expected, "{asked}");
    }
    let mut without = plan.clone();
    without.histories.clear();
    assert!(matches!(decide(&without, "00000002.history"), Ok(Decision::Refused(_))));
}

#[test]
fn only_an_outage_is_waited_out() {
    let (url, key, what): (String, String, String) = ("u".into(), "k".into(), "w".into());
    let of_store = |error: StorageError| persistence(&RestoreError::Repository(error.into()));
    let outage = StorageError::Unavailable { url: url.clone(), what: what.clone(), source: None };
    assert_eq!(of_store(outage), Persistence::UntilPatienceEnds);
    assert_eq!(of_store(StorageError::NoBucket { url: url.clone(), source: None }), Persistence::FewTries);
    assert_eq!(of_store(StorageError::NotFound { url, key }), Persistence::FewTries);
    assert_eq!(persistence(&RestoreError::DamagedWal { why: what }), Persistence::FewTries);
    let disk = |kind: std::io::ErrorKind| persistence(&RestoreError::io("created", "/x")(kind.into()));
    assert_eq!(disk(std::io::ErrorKind::StorageFull), Persistence::UntilPatienceEnds);
    assert_eq!(disk(std::io::ErrorKind::NotFound), Persistence::None);
    assert_eq!(persistence(&RestoreError::Timeout { seconds: 1 }), Persistence::FewTries);
}

/// A large segment over a slow line was given up when the patience was over, though it came all the time, and never came whole.
#[tokio::test]
async fn silence_is_bounded_and_not_a_download_that_goes_on() {
    let patience = Duration::from_millis(400);
    let going_on = patiently(patience, |progress| async move {
        for _ in 0..10 {
            tokio::time::sleep(patience / 5).await;
            progress.note();
        }
        Ok(FetchOutcome::Delivered)
    });
    assert_eq!(going_on.await.unwrap(), FetchOutcome::Delivered);
    let silent = patiently(patience, |progress| async move {
        progress.note();
        std::future::pending().await
    });
    assert!(matches!(silent.await, Err(RestoreError::Timeout { .. })));
}

#[test]
fn a_plan_reads_back_and_one_that_contradicts_itself_does_not() {
    let good = plan();
    assert_eq!(PlanFile::parse(&good.to_json()).unwrap(), good);
    type Spoil = fn(&mut PlanFile);
    let spoil: [(&str, Spoil); 6] = [
        ("a run that is not of whole segments", |p| p.wal[0].start = Lsn::new(3 * MIB + 1)),
        ("an empty run", |p| p.wal[0].end = p.wal[0].start),
        ("a timeline that is not on the branch", |p| p.wal[0].timeline = timeline(9)),
        ("pieces with a hole", |p| p.tails[0].pieces[1].start = 0x2000),
        ("pieces that end elsewhere", |p| p.tails[0].end = 0x4000),
        ("a later format", |p| p.format = 2),
    ];
    for (what, spoil) in spoil {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(PlanFile::parse(&bad.to_json()).is_err(), "{what}");
    }
    assert!(PlanFile::parse(b"").is_err());
    assert!(PlanFile::parse(b"{}").is_err());
}

#[test]
fn the_judgement_of_a_complete_listing() {
    let piece =
        |start, end| Piece { segment: segment(1, 7), start, end, compression: Compression::Lz4, stored_bytes: 5000 };
    let held = |last: u64, pieces: &[Piece]| {
        let mut held = Held::default();
        held.pieces = pieces.to_vec();
        held.note_segment(segment(1, last));
        pieces.iter().for_each(|piece| held.note_piece(*piece));
        held
    };
    let told = |end: u64, mut held: Held| {
        held.told = Some(Lsn::new(7 * MIB + end));
        held
    };
    let kind = |held: &Held, number: u64, begin: u64| match held.judge(segment(1, number), Lsn::new(begin)) {
        Judgement::Open(chain) => format!("open to {:X}", chain.end),
        Judgement::Absent(_) => "absent".into(),
        Judgement::Missing(_) => "missing".into(),
        Judgement::Incomplete => "incomplete".into(),
    };
    // Segments up to 6.
    assert_eq!(kind(&held(6, &[]), 7, 0), "absent");
    assert_eq!(kind(&held(6, &[]), 8, 0), "absent");
    assert_eq!(kind(&held(6, &[]), 5, 0), "missing");
    assert_eq!(kind(&held(6, &[]), 2, 4 * MIB + 9), "absent");
    assert_eq!(kind(&held(6, &[]), 4, 4 * MIB + 9), "missing");
    // An open segment 7.
    let tail = [piece(0, 0x1000), piece(0x1000, 0x3000)];
    assert_eq!(kind(&held(6, &tail), 7, 0), "open to 3000");
    assert_eq!(kind(&told(0x4000, held(6, &tail)), 7, 0), "open to 3000");
    // Pieces that were on their way with another one: what is held without a hole counts, unless more was there once.
    let holed = [tail[0], piece(0x2000, 0x3000)];
    assert_eq!(kind(&held(6, &holed), 7, 0), "open to 1000");
    assert_eq!(kind(&told(0x1000, held(6, &holed)), 7, 0), "open to 1000");
    assert_eq!(kind(&told(0x3000, held(6, &holed)), 7, 0), "missing");
    let mut the_next = held(6, &[]);
    holed.iter().for_each(|piece| the_next.note_piece(*piece));
    assert_eq!(kind(&the_next, 8, 0), "absent");
    assert_eq!(kind(&held(6, &tail[1..]), 7, 0), "incomplete");
    assert_eq!(kind(&told(0, held(6, &tail[1..])), 7, 0), "incomplete");
    assert_eq!(kind(&told(0x3000, held(6, &tail[1..])), 7, 0), "missing");
    // Pieces of a segment that is not the last one: something is missing.
    assert_eq!(kind(&held(9, &tail), 7, 0), "missing");
    assert_eq!(kind(&told(0x3000, held(9, &tail)), 7, 0), "missing");
    // Unless the later ones are pieces too, and the archive tells of none of them.
    let mut before_the_next = held(6, &tail);
    before_the_next.note_piece(Piece { segment: segment(1, 8), ..piece(0, 0x1000) });
    assert_eq!(kind(&before_the_next, 7, 0), "missing");
    assert_eq!(kind(&told(0x3000, before_the_next), 7, 0), "open to 3000");
}

struct Bench {
    _folder: tempfile::TempDir,
    writer: RepositoryWriter,
    repositories: Vec<Repository>,
    path: PathBuf,
    patience: Duration,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let writer = writer(folder.path()).await;
        let repositories = vec![writer.archive().repository().clone()];
        let path = folder.path().join("RECOVERYXLOG");
        Self { _folder: folder, writer, repositories, path, patience: Duration::from_secs(5) }
    }

    /// Another repository, which is asked behind the first.
    async fn second(&mut self) -> RepositoryWriter {
        let folder = self.path.with_file_name("second");
        std::fs::create_dir(&folder).unwrap();
        let writer = writer(&folder).await;
        self.repositories.push(writer.archive().repository().clone());
        writer
    }

    async fn store(&self, segment: SegmentName, bytes: &[u8]) {
        let sealed = seal(segment, 0, bytes, Compression::Lz4);
        self.writer.put_segment(segment, &sealed).await.unwrap();
    }

    async fn store_piece(&self, segment: SegmentName, start: u32, bytes: &[u8], prefix_crc32: u32) {
        Self::store_piece_in(&self.writer, segment, start, bytes, prefix_crc32).await;
    }

    async fn store_piece_in(
        writer: &RepositoryWriter,
        segment: SegmentName,
        start: u32,
        bytes: &[u8],
        prefix_crc32: u32,
    ) {
        let sealed = seal_with(segment, u64::from(start), bytes, Compression::Lz4, prefix_crc32, Summary::default());
        let end = start + u32::try_from(bytes.len()).unwrap();
        writer.put_piece(segment, start, end, &sealed).await.unwrap();
    }

    async fn fetch(&self, plan: Option<&PlanFile>, name: &str) -> Result<FetchOutcome, RestoreError> {
        let request = FetchRequest {
            plan: plan.cloned(),
            system: None,
            name: name.into(),
            path: self.path.clone(),
            patience: self.patience,
        };
        let outcome = wal_fetch(&self.repositories, &request).await;
        let folder = std::fs::read_dir(self.path.parent().unwrap()).unwrap();
        let left: Vec<_> =
            folder.map(|e| e.unwrap().file_name()).filter(|n| n.to_string_lossy().contains("tmp")).collect();
        assert!(left.is_empty(), "left over: {left:?}");
        assert_eq!(self.path.exists(), matches!(outcome, Ok(FetchOutcome::Delivered)));
        outcome
    }

    fn delivered(&self) -> Vec<u8> {
        let bytes = std::fs::read(&self.path).unwrap();
        std::fs::remove_file(&self.path).unwrap();
        bytes
    }
}

#[tokio::test]
async fn a_planned_recovery_gets_its_files_and_no_others() {
    let bench = Bench::new().await;
    let mut plan = plan();
    let bytes = raw(3, MIB as usize);
    bench.store(segment(1, 3), &bytes).await;
    assert_eq!(bench.fetch(Some(&plan), &segment(1, 3).to_string()).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), bytes);
    // Needed and not there: an error, never "absent".
    let error = bench.fetch(Some(&plan), &segment(1, 4).to_string()).await.unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    // Not needed: absent without asking, although it is stored.
    bench.store(segment(2, 8), &raw(8, MIB as usize)).await;
    assert_eq!(bench.fetch(Some(&plan), &segment(2, 8).to_string()).await.unwrap(), FetchOutcome::ProvenAbsent);
    // The tail as it was frozen, padded with zeros.
    let tail = raw(7, 0x3000);
    let (first, second) = tail.split_at(0x1000);
    bench.store_piece(segment(2, 7), 0, first, 0).await;
    bench.store_piece(segment(2, 7), 0x1000, second, crc32fast::hash(first)).await;
    plan.tails[0].pieces[0].raw_crc32 = crc32fast::hash(first);
    plan.tails[0].pieces[1].raw_crc32 = crc32fast::hash(second);
    plan.tails[0].raw_crc32 = combine_crc32(crc32fast::hash(first), crc32fast::hash(second), 0x2000);
    let mut padded = tail.clone();
    padded.resize(MIB as usize, 0);
    let name = segment(2, 7).to_string();
    assert_eq!(bench.fetch(Some(&plan), &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), padded);
    // Meanwhile the whole segment has replaced the pieces: the same bytes come from it.
    let mut whole = tail.clone();
    whole.extend(raw(9, MIB as usize - 0x3000));
    bench.store(segment(2, 7), &whole).await;
    bench.writer.delete_pieces(segment(2, 7)).await.unwrap();
    assert_eq!(bench.fetch(Some(&plan), &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), padded);
    plan.tails[0].raw_crc32 ^= 1;
    assert_eq!(bench.fetch(Some(&plan), &name).await.unwrap_err().exit_code(), 5);
    // History files.
    let history = b"1\t0/500100\tx\n";
    bench.writer.put_history(timeline(2), history).await.unwrap();
    let planned = PlannedHistory { timeline: timeline(2), size: history.len() as u64, crc32: crc32fast::hash(history) };
    plan.histories = vec![planned];
    assert_eq!(bench.fetch(Some(&plan), "00000002.history").await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), history);
    assert_eq!(bench.fetch(Some(&plan), "00000003.history").await.unwrap(), FetchOutcome::ProvenAbsent);
    bench.writer.put_history(timeline(3), history).await.unwrap();
    assert_eq!(bench.fetch(Some(&plan), "00000003.history").await.unwrap(), FetchOutcome::Delivered);
    bench.delivered();
    plan.histories[0].crc32 ^= 1;
    assert!(bench.fetch(Some(&plan), "00000002.history").await.is_err());
}

#[tokio::test]
async fn without_a_plan_absence_is_proved_by_a_listing() {
    let bench = Bench::new().await;
    let name = |id, number| segment(id, number).to_string();
    // An archive of which nothing is known proves nothing about a timeline that it does not know.
    assert!(bench.fetch(None, &name(7, 3)).await.is_err());
    for number in [3, 4, 6] {
        bench.store(segment(1, number), &raw(number, MIB as usize)).await;
    }
    assert_eq!(bench.fetch(None, &name(1, 4)).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), raw(4, MIB as usize));
    assert_eq!(bench.fetch(None, &name(1, 5)).await.unwrap_err().exit_code(), 5, "a hole");
    assert_eq!(bench.fetch(None, &name(1, 7)).await.unwrap(), FetchOutcome::ProvenAbsent);
    let tail = raw(7, 0x3000);
    bench.store_piece(segment(1, 7), 0, &tail, 0).await;
    assert_eq!(bench.fetch(None, &name(1, 7)).await.unwrap(), FetchOutcome::Delivered);
    let mut padded = tail;
    padded.resize(MIB as usize, 0);
    assert_eq!(bench.delivered(), padded);
    assert_eq!(bench.fetch(None, &name(1, 8)).await.unwrap(), FetchOutcome::ProvenAbsent);
    assert_eq!(bench.fetch(None, "00000002.history").await.unwrap(), FetchOutcome::ProvenAbsent);
    // A timeline that is known, of which nothing is held yet.
    bench.writer.put_history(timeline(2), b"1\t0/700100\tx\n").await.unwrap();
    assert_eq!(bench.fetch(None, &name(2, 7)).await.unwrap(), FetchOutcome::ProvenAbsent);
    assert_eq!(bench.fetch(None, "00000002.history").await.unwrap(), FetchOutcome::Delivered);
    bench.delivered();
    // Names of other clusters: segments of 16 MiB have at most 256 in 4 GiB, but these are of 1 MiB.
    assert!(bench.fetch(None, "000000010000000000001000").await.is_err());
}

/// One repository whose certificates cannot be read kept every reader from all the others. It must not count as one that proves
/// anything, either (I12).
#[tokio::test]
async fn a_repository_that_cannot_be_opened_hinders_no_other_and_proves_nothing() {
    let mut bench = Bench::new().await;
    bench.store(segment(1, 3), &raw(3, MIB as usize)).await;
    let broken = crate::storage::unopened("s3://b".into(), "`ca_file` /etc/ca.pem: is not there".into());
    bench.repositories.insert(0, Repository::new("broken", "main", broken).unwrap());
    assert_eq!(bench.fetch(None, &segment(1, 3).to_string()).await.unwrap(), FetchOutcome::Delivered);
    bench.delivered();
    let error = bench.fetch(None, &segment(1, 4).to_string()).await.unwrap_err();
    assert!(error.to_string().contains("ca_file"), "{error}");
}

/// The first repository had an open segment's beginning only, and delivered it although the next one had all of it: PostgreSQL took the
/// zeros behind it for the end of the WAL.
#[tokio::test]
async fn of_an_open_segment_the_repository_that_has_most_delivers() {
    let mut bench = Bench::new().await;
    let second = bench.second().await;
    let name = segment(1, 7).to_string();
    let whole = raw(7, MIB as usize);
    let padded = |held: usize| [&whole[..held], &vec![0; MIB as usize - held]].concat();
    bench.store_piece(segment(1, 7), 0, &whole[..0x1000], 0).await;
    assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), padded(0x1000));
    Bench::store_piece_in(&second, segment(1, 7), 0, &whole[..0x3000], 0).await;
    for turn in 0..2 {
        assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered, "{turn}");
        assert_eq!(bench.delivered(), padded(0x3000), "{turn}");
        bench.repositories.reverse();
    }
    // One that cannot be asked may have more.
    let away = format!("{}.away", second.archive().url());
    std::fs::rename(second.archive().url(), &away).unwrap();
    assert!(bench.fetch(None, &name).await.is_err());
    std::fs::rename(&away, second.archive().url()).unwrap();
    let sealed = seal(segment(1, 7), 0, &whole, Compression::Lz4);
    second.put_segment(segment(1, 7), &sealed).await.unwrap();
    assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), whole);
}

/// Four pieces are on their way at once where commits wait for the repository, so a standby that polls the open segment meets holes; 255
/// ended its recovery. Only what the archive told of, and is not there, is lost.
#[tokio::test]
async fn a_hole_in_the_open_segment_is_no_loss_unless_more_was_there() {
    let mut bench = Bench::new().await;
    bench.patience = Duration::from_secs(1);
    let name = segment(1, 7).to_string();
    let bytes = raw(7, 0x3000);
    bench.store_piece(segment(1, 7), 0x2000, &bytes[0x2000..], crc32fast::hash(&bytes[..0x2000])).await;
    let error = bench.fetch(None, &name).await.unwrap_err();
    assert!(matches!(error, RestoreError::Incomplete { .. }) && error.exit_code() == 5, "{error}");
    bench.store_piece(segment(1, 7), 0, &bytes[..0x1000], 0).await;
    let held = [&bytes[..0x1000], &vec![0; MIB as usize - 0x1000]].concat();
    assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), held);
    let time = crate::repository::test_support::time("2026-11-20T06:00:00Z");
    let tell = |end: u64| Coverage {
        format: 1,
        system_identifier: SYSTEM,
        timeline: timeline(1),
        complete_until: time,
        archived_lsn: Lsn::new(7 * MIB + end),
        updated: time,
    };
    bench.writer.put_coverage(&tell(0x1000)).await.unwrap();
    assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered);
    assert_eq!(bench.delivered(), held);
    bench.writer.put_coverage(&tell(0x3000)).await.unwrap();
    let error = bench.fetch(None, &name).await.unwrap_err();
    assert!(matches!(error, RestoreError::DamagedWal { .. }), "{error}");
}

/// Two runs for one path wrote to one temporary file: one removed the other's, or gave its name to what was half written (I13).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_runs_for_one_path_do_not_meet() {
    let bench = Bench::new().await;
    let bytes = raw(3, MIB as usize);
    bench.store(segment(1, 3), &bytes).await;
    let left = |kind: &str| bench.path.with_file_name(format!("RECOVERYXLOG.walden-tmp{kind}"));
    // Left by runs that were killed, the first one of an older release.
    for kind in ["", "-0123456789abcdef"] {
        std::fs::write(left(kind), b"half").unwrap();
    }
    let request = FetchRequest {
        plan: None,
        system: None,
        name: segment(1, 3).to_string(),
        path: bench.path.clone(),
        patience: bench.patience,
    };
    let runs = (0..16).map(|_| {
        let (repositories, request) = (bench.repositories.clone(), request.clone());
        tokio::spawn(async move { wal_fetch(&repositories, &request).await })
    });
    for run in runs.collect::<Vec<_>>() {
        assert_eq!(run.await.unwrap().unwrap(), FetchOutcome::Delivered);
    }
    assert_eq!(bench.delivered(), bytes);
    // Looks for leftovers too.
    assert_eq!(bench.fetch(None, &segment(1, 3).to_string()).await.unwrap(), FetchOutcome::Delivered);
}

#[tokio::test]
async fn damage_and_outage_are_never_absence() {
    let bench = Bench::new().await;
    bench.store(segment(1, 3), &raw(3, MIB as usize)).await;
    let root = bench.repositories[0].url();
    let file = PathBuf::from(&root).join(bench.writer.archive().keys().segment(segment(1, 3), Compression::Lz4));
    let good = std::fs::read(&file).unwrap();
    let name = segment(1, 3).to_string();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    for (what, bytes) in [
        ("flipped", {
            let mut b = good.clone();
            let at = b.len() / 2;
            b[at] ^= 4;
            b
        }),
        ("short", good[..good.len() - 7].to_vec()),
        ("longer", [good.clone(), vec![0; 9]].concat()),
        ("empty", Vec::new()),
        ("of another kind", b"not an object at all".to_vec()),
    ] {
        std::fs::write(&file, bytes).unwrap();
        assert!(bench.fetch(Some(&plan()), &name).await.is_err(), "{what}");
        assert!(bench.fetch(None, &name).await.is_err(), "{what}");
    }
    std::fs::write(&file, &good).unwrap();
    assert_eq!(bench.fetch(None, &name).await.unwrap(), FetchOutcome::Delivered);
    bench.delivered();
    // The repository is not mounted.
    std::fs::rename(&root, format!("{root}.away")).unwrap();
    for name in [name.as_str(), "00000009.history", &segment(1, 99).to_string()] {
        assert!(bench.fetch(None, name).await.is_err(), "{name}");
    }
    assert!(bench.fetch(Some(&plan()), "00000009.history").await.is_err());
    // Behind the plan nothing is asked, so nothing can fail.
    assert_eq!(bench.fetch(Some(&plan()), &segment(2, 8).to_string()).await.unwrap(), FetchOutcome::ProvenAbsent);
}
