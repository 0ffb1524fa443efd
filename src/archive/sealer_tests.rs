use std::path::Path;
use std::sync::mpsc::sync_channel;

use super::*;
use crate::archive::assembler::{Stretch, header_of};
use crate::archive::backlog::Index;
use crate::archive::held::tests::{SYSTEM, segment, settings, size};
use crate::archive::held::{find_in_spool, name_finished};
use crate::archive::records::unrecorded;
use crate::disk::{Disk, DiskOp, Faults};
use crate::seal::{Checksum, Compression, Encoder, ObjectKind};
use crate::spool::Mark;
use crate::telemetry::{AlertSettings, BoardSetup, SystemClock};
use crate::wal::{Summary, TimelineId};

/// Refuses operations with EIO: after so many that go well, so many of one kind on paths that contain a text.
#[derive(Debug, Default)]
struct Failing(Mutex<Vec<(DiskOp, &'static str, u32, u32)>>);

impl Faults for Failing {
    fn before(&self, op: DiskOp, path: &Path) -> std::io::Result<()> {
        let mut plan = self.0.lock().unwrap();
        let fits = |(kind, part, _, left): &&mut (DiskOp, &str, u32, u32)| {
            *kind == op && *left > 0 && path.to_string_lossy().contains(part)
        };
        match plan.iter_mut().find(fits) {
            Some((_, _, well, _)) if *well > 0 => *well -= 1,
            Some((_, _, _, left)) => {
                *left -= 1;
                return Err(std::io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
            }
            None => {}
        }
        Ok(())
    }
}

/// The disk side without its threads.
struct Bench {
    _folder: tempfile::TempDir,
    faults: Arc<Failing>,
    shared: Shared,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let faults = Arc::new(Failing::default());
        let disk = Disk::with_faults(faults.clone());
        let spool = Spool::open(disk.clone(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
        let index = Index { disk, folder: folder.path().join("state"), queue: None, retry_at: None };
        let start = segment(1).start();
        let shared = Shared {
            spool,
            of: (SYSTEM, size()),
            backlog: Arc::new(Backlog::new(index, vec!["a".into()], vec!["a".into()], Vec::new())),
            tail: Tail::new(),
            missing: Missing::default(),
            board: Board::new(BoardSetup {
                cluster: "main".into(),
                slot: "walden".into(),
                repositories: Vec::new(),
                alert: AlertSettings::default(),
                clock: Arc::new(SystemClock::new()),
            }),
            bounds: SpoolBounds { bytes_max: 1 << 30, free_bytes_min: 0 },
            positions: Mutex::new(Positions { sealed: start, marked: None }),
            state: watch::channel(DiskState { durable: start, failed: None, finished: false }).0,
            old_open: Mutex::new(None),
            ending: Arc::default(),
            sealing_bytes: AtomicU64::new(0),
        };
        Self { _folder: folder, faults, shared }
    }

    fn fail(&self, op: DiskOp, part: &'static str, after: u32, times: u32) {
        self.faults.0.lock().unwrap().push((op, part, after, times));
    }

    fn heal(&self) {
        self.faults.0.lock().unwrap().clear();
    }

    /// Where the next session would go on: what it tells the server.
    fn held_end(&self) -> Option<Lsn> {
        name_finished(&self.shared.spool, SYSTEM, size()).unwrap();
        find_in_spool(&self.shared.spool, SYSTEM, size()).unwrap().held.map(|held| held.end)
    }
}

/// A segment of zeros on its way to the disk.
struct Writing {
    segment: SegmentName,
    encoder: Encoder,
    raw: Checksum,
    body_len: u64,
    body_crc32: crc32fast::Hasher,
    open: Option<(OpenSegment, SegmentName)>,
    sealings: (SyncSender<Sealing>, Receiver<Sealing>),
}

impl Writing {
    fn begin(bench: &Bench, number: u64) -> Self {
        let segment = segment(number);
        let mut writing = Self {
            segment,
            encoder: Encoder::new(Compression::Lz4, 0).unwrap(),
            raw: Checksum::default(),
            body_len: 0,
            body_crc32: crc32fast::Hasher::new(),
            open: None,
            sealings: sync_channel(SEALS_MAX),
        };
        let path = bench.shared.spool.open_path(segment, Compression::Lz4);
        writing.obey(bench, Command::Begin { segment, path }).unwrap();
        writing.append(bench, Encoder::prefix(Compression::Lz4).to_vec());
        writing
    }

    fn obey(&mut self, bench: &Bench, command: Command) -> Result<bool, DiskFailure> {
        bench.shared.obey(command, &mut self.open, &self.sealings.0)
    }

    fn append(&mut self, bench: &Bench, bytes: Vec<u8>) {
        self.body_len += bytes.len() as u64;
        self.body_crc32.update(&bytes);
        self.obey(bench, Command::Append(bytes)).unwrap();
    }

    /// More of the segment, up to an offset in it.
    fn write_to(&mut self, bench: &Bench, until: u64) -> Stretch {
        let (start, file_offset) = (self.raw.length, self.body_len);
        let bytes = vec![0; usize::try_from(until - start).unwrap()];
        let mut body = Vec::new();
        self.encoder.write(&bytes, &mut body).unwrap();
        self.encoder.cut(&mut body).unwrap();
        self.raw.update(&bytes);
        let mut raw = Checksum::default();
        raw.update(&bytes);
        let (body_len, body_crc32) = (body.len() as u64, crc32fast::hash(&body));
        self.append(bench, body);
        Stretch { start, end: until, file_offset, body_len, body_crc32, raw, summary: Summary::default() }
    }

    fn mark(&mut self, bench: &Bench, until: u64) -> Result<bool, DiskFailure> {
        let stretch = Box::new(self.write_to(bench, until));
        let mark = Box::new(Mark {
            format: 1,
            generation: 0,
            system_identifier: SYSTEM,
            timeline: TimelineId::FIRST,
            segment: self.segment.to_string(),
            segment_size: size(),
            compression: Compression::Lz4,
            raw_len: self.raw.length,
            body_len: self.body_len,
            raw_crc32: self.raw.crc32,
            raw_crc32c: self.raw.crc32c,
            body_crc32: self.body_crc32.clone().finalize(),
        });
        self.obey(bench, Command::Mark { mark, stretch: Some(stretch) })
    }

    fn seal(mut self, bench: &Bench) -> Sealing {
        self.write_to(bench, size().get());
        self.append(bench, Encoder::suffix(Compression::Lz4).to_vec());
        let crc = self.body_crc32.clone().finalize();
        let header = header_of(&settings(), self.segment, ObjectKind::Segment, 0, self.raw, Summary::default(), crc, 0);
        let (name, frames) = (Spool::segment(self.segment, Compression::Lz4), header.frame(self.body_len));
        let end = self.segment.end();
        self.obey(bench, Command::Seal { name, frames, end, last: None }).unwrap();
        self.sealings.1.try_recv().unwrap()
    }
}

/// A flush fails, and so does the flush of the copy of what was proven before. The page cache showed the new mark all the same, and the
/// next session told the server its position, although no flush of it had ever succeeded (I1, I9; D3 of the failure table).
#[test]
fn a_mark_whose_flush_failed_is_never_believed_whatever_else_fails() {
    for also in [(DiskOp::Sync, "/open", 0, 1), (DiskOp::Create, "/open", 0, 1), (DiskOp::Remove, "/open", 0, 9)] {
        let bench = Bench::new();
        let mut writing = Writing::begin(&bench, 1);
        writing.mark(&bench, 300_000).unwrap();
        let proven = Some(Lsn::new(segment(1).start().get() + 300_000));
        assert_eq!(bench.held_end(), proven);
        bench.fail(DiskOp::Sync, "/open", 0, 1);
        bench.fail(also.0, also.1, also.2, also.3);
        let failed = writing.mark(&bench, 700_000);
        assert!(matches!(failed, Err(DiskFailure::Spool(SpoolError::Sync { .. }))), "{failed:?}");
        assert_eq!(bench.held_end(), proven, "{also:?}");
        assert_eq!(Some(bench.shared.state.borrow().durable), proven);
    }
}

/// The first mark proves the file's name as well: if that cannot be flushed, nothing is proven.
#[test]
fn a_mark_whose_name_was_not_flushed_is_never_believed() {
    let bench = Bench::new();
    let mut writing = Writing::begin(&bench, 1);
    bench.fail(DiskOp::SyncFolder, "/open", 0, 1);
    bench.fail(DiskOp::Remove, "/open", 0, 9);
    assert!(writing.mark(&bench, 300_000).is_err());
    assert_eq!(bench.held_end(), None);
}

/// The same for a whole segment: neither its header nor a second flush by the next session makes it durable.
#[test]
fn a_whole_segment_whose_flush_failed_is_never_believed() {
    // With a mark there are two flushes, of the body and of the header, and a third of the copy.
    for (marked, well) in [(true, 0), (true, 1), (false, 0)] {
        let bench = Bench::new();
        let mut writing = Writing::begin(&bench, 1);
        if marked {
            writing.mark(&bench, 300_000).unwrap();
        }
        let proven = bench.held_end();
        assert_eq!(proven.is_some(), marked);
        let sealing = writing.seal(&bench);
        bench.fail(DiskOp::Sync, "/open", well, 2);
        bench.fail(DiskOp::Remove, "/open", 0, 9);
        assert!(bench.shared.seal_group(vec![sealing]).is_err());
        assert_eq!(bench.held_end(), proven, "after {well} flushes that went well");
        assert_eq!(bench.shared.backlog.depth().0, 0);
    }
}

/// What got a name counts as held, and the archived position goes over it: without a record it was shipped by the next start only, and
/// until then the archive had a gap that nobody was told of (I3).
#[test]
fn names_that_could_not_be_flushed_are_taken_back_or_recorded() {
    let group = |bench: &Bench| (1..=2).map(|number| Writing::begin(bench, number).seal(bench)).collect::<Vec<_>>();
    let path = |bench: &Bench, n| bench.shared.spool.path_of(&Spool::segment(segment(n), Compression::Lz4));
    for (op, part, after) in [(DiskOp::SyncFolder, "wal/00000001", 0), (DiskOp::Rename, "wal/00000001", 1)] {
        for can_be_taken_back in [true, false] {
            let bench = Bench::new();
            let group = group(&bench);
            bench.fail(op, part, after, 1);
            if !can_be_taken_back {
                bench.fail(DiskOp::Rename, "/open", 0, 9);
            }
            assert!(bench.shared.seal_group(group).is_err());
            assert_eq!(bench.shared.backlog.depth().0, 0);
            assert_eq!(path(&bench, 1).exists(), !can_be_taken_back);
            bench.heal();
            // As the next session does.
            let Shared { spool, backlog, .. } = &bench.shared;
            backlog.insert(&name_finished(spool, SYSTEM, size()).unwrap());
            backlog.insert(&unrecorded(spool, backlog, SYSTEM, size()).unwrap());
            assert_eq!(bench.held_end(), Some(segment(2).end()));
            assert_eq!(backlog.depth().0, 2, "everything that counts as held is to be shipped");
        }
    }
}

/// A session that ended while the spool was full left its alarm behind for ever.
#[test]
fn a_full_spool_is_over_when_the_next_session_finds_room() {
    let bench = Bench::new();
    bench.shared.board.raise(CauseCode::SpoolFull, "told by the session before");
    assert!(bench.shared.wait_for_room());
    assert!(!bench.shared.board.is_raised(CauseCode::SpoolFull));
}
