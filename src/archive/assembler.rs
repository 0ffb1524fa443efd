//! Raw WAL in, compressed and summed body out: the one pass over every byte, on the live path's own thread.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::seal::{
    Checksum, Compression, Encoder, HEADER_LEN, ObjectHeader, ObjectKind, SealError, SealedFrames, combine_crc32,
};
use crate::spool::{Mark, Spool, SpooledName};
use crate::wal::{Indexer, Lsn, PageError, SegmentName, SegmentSize, Summary, SystemIdentifier};

/// Body bytes gathered before they are handed to the disk.
const WRITE_BYTES: usize = 256 << 10;

/// A run of the open segment between two cuts. Its body bytes decode alone, so it can be shipped as a tail piece.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// Offsets in the segment, `[start, end)`.
    pub start: u64,
    pub end: u64,
    /// Offset of its first body byte in the file, and how many there are.
    pub file_offset: u64,
    pub body_len: u64,
    pub body_crc32: u32,
    pub raw: Checksum,
    pub summary: Summary,
}

impl Stretch {
    /// Adds the stretch that follows directly.
    pub fn append(&mut self, next: &Stretch) {
        assert_eq!(self.end, next.start, "stretches follow each other");
        self.end = next.end;
        self.body_crc32 = combine_crc32(self.body_crc32, next.body_crc32, next.body_len);
        self.body_len += next.body_len;
        self.raw.append(next.raw);
        self.summary.append(&next.summary);
    }
}

/// What the disk is to do, in this order.
#[derive(Debug)]
pub enum Command {
    Begin {
        segment: SegmentName,
        path: PathBuf,
    },
    Append(Vec<u8>),
    /// The bytes of the stretch are in the file and may be shipped. They are durable with the next mark.
    Offer {
        stretch: Box<Stretch>,
    },
    /// Flush, then tell: the segment is durable up to the mark.
    Mark {
        mark: Box<Mark>,
        /// `None`: all of it was offered before.
        stretch: Option<Box<Stretch>>,
    },
    /// The segment, or a timeline's last part, is whole.
    Seal {
        name: SpooledName,
        frames: SealedFrames,
        end: Lsn,
        /// What was not cut before. `None` as well for a timeline's last part, which is shipped as it is.
        last: Option<Box<Stretch>>,
    },
}

/// What does not change while one timeline is received.
#[derive(Clone, Debug)]
pub struct AssemblerSettings {
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    pub server_version: Option<u32>,
    pub compression: Compression,
    pub compression_level: i32,
}

#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error("the server sends WAL that does not fit: {0}")]
    Page(#[from] PageError),
    #[error("the WAL could not be compressed: {0}")]
    Seal(#[from] SealError),
}

/// Builds segments from a contiguous stream of one timeline.
pub struct Assembler {
    settings: AssemblerSettings,
    spool: Spool,
    indexer: Indexer,
    encoder: Encoder,
    segment: SegmentName,
    position: Lsn,
    /// Segments that end at or before this are sealed already: they are only indexed.
    sealed_until: Lsn,
    /// Offsets in the first built segment at which a cut must fall, so that shipped tail pieces are continued exactly.
    wanted_cuts: BTreeSet<u64>,
    open: Option<Open>,
    /// Sealed segments' summary state needs a cut of the indexer where a built one begins.
    commands: Vec<Command>,
}

/// The segment being built.
struct Open {
    out: Vec<u8>,
    /// Body bytes so far, those in `out` included.
    body_len: u64,
    body_crc32: u32,
    raw: Checksum,
    summary: Summary,
    stretch_start: u64,
    stretch_raw: Checksum,
    stretch_body_len: u64,
    stretch_body_crc32: u32,
    /// A stretch was offered without a mark behind it.
    is_unmarked: bool,
}

impl Assembler {
    /// `start` is a segment start and where `indexer` stands.
    pub fn new(
        settings: AssemblerSettings,
        spool: Spool,
        indexer: Indexer,
        start: SegmentName,
        sealed_until: Lsn,
        wanted_cuts: BTreeSet<u64>,
    ) -> Result<Self, AssembleError> {
        let encoder = Encoder::new(settings.compression, settings.compression_level)?;
        let position = start.start();
        let commands = Vec::new();
        Ok(Self {
            settings,
            spool,
            indexer,
            encoder,
            segment: start,
            position,
            sealed_until,
            wanted_cuts,
            open: None,
            commands,
        })
    }

    /// The first byte not yet taken in.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Bytes of the open segment since the last cut.
    pub fn uncut_bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.stretch_raw.length)
    }

    /// Whether bytes of the open segment came since the last mark.
    pub fn has_unmarked(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.is_unmarked || open.stretch_raw.length > 0)
    }

    /// Takes what is to be done on disk since the last call.
    pub fn take_commands(&mut self) -> std::vec::Drain<'_, Command> {
        self.commands.drain(..)
    }

    pub fn has_commands(&self) -> bool {
        !self.commands.is_empty()
    }

    /// Takes in the bytes that follow `position()`.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), AssembleError> {
        while !bytes.is_empty() {
            let offset = self.settings.segment_size.offset_of(self.position);
            let mut room = self.settings.segment_size.get() - offset;
            if self.segment.end() > self.sealed_until
                && let Some(&cut) = self.wanted_cuts.range(offset + 1..).next()
            {
                room = room.min(cut - offset);
            }
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(take);
            if self.segment.end() > self.sealed_until {
                self.build(now)?;
            } else {
                self.indexer.feed(now)?;
            }
            self.position = Lsn::new(self.position.get() + take as u64); // usize fits
            if self.position == self.segment.end() {
                self.end_segment()?;
            } else if self.open.is_some() && self.wanted_cuts.contains(&(offset + take as u64)) {
                self.cut()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn build(&mut self, bytes: &[u8]) -> Result<(), AssembleError> {
        if self.open.is_none() {
            self.begin()?;
        }
        self.indexer.feed(bytes)?;
        let open = self.open.as_mut().expect("just begun");
        open.stretch_raw.update(bytes);
        let before = open.out.len();
        self.encoder.write(bytes, &mut open.out)?;
        open.count_body(before);
        if open.out.len() >= WRITE_BYTES {
            let full = std::mem::replace(&mut open.out, Vec::with_capacity(WRITE_BYTES + (64 << 10)));
            self.commands.push(Command::Append(full));
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), AssembleError> {
        assert!(self.settings.segment_size.is_boundary(self.position), "a segment is built from its start");
        // What the indexer saw of sealed segments is in their own headers.
        let _ = self.indexer.cut();
        self.encoder.reset()?;
        let path = self.spool.open_path(self.segment, self.settings.compression);
        self.commands.push(Command::Begin { segment: self.segment, path });
        let mut open = Open {
            out: Encoder::prefix(self.settings.compression).to_vec(),
            body_len: 0,
            body_crc32: 0,
            raw: Checksum::default(),
            summary: Summary::default(),
            stretch_start: 0,
            stretch_raw: Checksum::default(),
            stretch_body_len: 0,
            stretch_body_crc32: 0,
            is_unmarked: false,
        };
        // The prefix counts for the body, not for the first stretch: a piece brings its own.
        open.body_len = open.out.len() as u64; // a few bytes
        open.body_crc32 = crc32fast::hash(&open.out);
        self.open = Some(open);
        Ok(())
    }

    /// Ends the current stretch: what was taken in becomes shippable, but not yet durable. Nothing happens if there is nothing new.
    pub fn offer(&mut self) -> Result<(), AssembleError> {
        if let Some(stretch) = self.end_stretch()? {
            self.commands.push(Command::Offer { stretch });
        }
        Ok(())
    }

    /// Ends the current stretch: what was taken in becomes durable and shippable. Nothing happens if all is durable.
    pub fn cut(&mut self) -> Result<(), AssembleError> {
        if !self.has_unmarked() {
            return Ok(());
        }
        let stretch = self.end_stretch()?;
        let Some(open) = self.open.as_mut() else { return Ok(()) };
        open.is_unmarked = false;
        let mark = Mark {
            format: 1,
            generation: 0, // the file counts
            system_identifier: self.settings.system,
            timeline: self.segment.timeline(),
            segment: self.segment.to_string(),
            segment_size: self.settings.segment_size,
            compression: self.settings.compression,
            raw_len: open.raw.length,
            body_len: open.body_len,
            raw_crc32: open.raw.crc32,
            raw_crc32c: open.raw.crc32c,
            body_crc32: open.body_crc32,
        };
        self.commands.push(Command::Mark { mark: Box::new(mark), stretch });
        Ok(())
    }

    /// Ends the current stretch and hands its bytes over. `None`: there is nothing new.
    fn end_stretch(&mut self) -> Result<Option<Box<Stretch>>, AssembleError> {
        let Some(open) = self.open.as_mut().filter(|open| open.stretch_raw.length > 0) else { return Ok(None) };
        let before = open.out.len();
        self.encoder.cut(&mut open.out)?;
        open.count_body(before);
        let stretch = open.end_stretch(self.indexer.cut());
        open.is_unmarked = true;
        if !open.out.is_empty() {
            self.commands.push(Command::Append(std::mem::take(&mut open.out)));
        }
        Ok(Some(Box::new(stretch)))
    }

    fn end_segment(&mut self) -> Result<(), AssembleError> {
        if self.open.is_some() {
            let name = Spool::segment(self.segment, self.settings.compression);
            self.seal(ObjectKind::Segment, name)?;
            self.wanted_cuts.clear();
        }
        self.segment = self.segment.next();
        Ok(())
    }

    /// The timeline ends at `position()`: its last part, if there is one, is sealed as a piece from 0. Gives its name.
    pub fn end_timeline(&mut self) -> Result<Option<SpooledName>, AssembleError> {
        if self.open.is_none() {
            return Ok(None);
        }
        let end = self.settings.segment_size.offset_of(self.position);
        let name = Spool::timeline_end(self.segment, end, self.settings.compression);
        self.seal(ObjectKind::Piece, name.clone())?;
        Ok(Some(name))
    }

    fn seal(&mut self, kind: ObjectKind, name: SpooledName) -> Result<(), AssembleError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let before = open.out.len();
        self.encoder.cut(&mut open.out)?;
        open.count_body(before);
        let last = (open.stretch_raw.length > 0).then(|| Box::new(open.end_stretch(self.indexer.cut())));
        let last = last.filter(|_| kind == ObjectKind::Segment);
        let suffix = Encoder::suffix(self.settings.compression);
        open.body_crc32 = combine_crc32(open.body_crc32, crc32fast::hash(suffix), suffix.len() as u64);
        open.body_len += suffix.len() as u64; // a few bytes
        open.out.extend_from_slice(suffix);
        let header = header_of(&self.settings, self.segment, kind, 0, open.raw, open.summary, open.body_crc32, 0);
        if !open.out.is_empty() {
            self.commands.push(Command::Append(open.out));
        }
        let frames = header.frame(open.body_len);
        self.commands.push(Command::Seal { name, frames, end: self.position, last });
        Ok(())
    }
}

impl Open {
    /// Sums what was added to `out` behind `before`.
    fn count_body(&mut self, before: usize) {
        let new = &self.out[before..];
        if new.is_empty() {
            return;
        }
        let crc32 = crc32fast::hash(new);
        let length = new.len() as u64; // usize fits
        self.body_crc32 = combine_crc32(self.body_crc32, crc32, length);
        self.body_len += length;
        self.stretch_body_crc32 = combine_crc32(self.stretch_body_crc32, crc32, length);
        self.stretch_body_len += length;
    }

    fn end_stretch(&mut self, summary: Summary) -> Stretch {
        let stretch = Stretch {
            start: self.stretch_start,
            end: self.stretch_start + self.stretch_raw.length,
            file_offset: HEADER_LEN as u64 + self.body_len - self.stretch_body_len,
            body_len: self.stretch_body_len,
            body_crc32: self.stretch_body_crc32,
            raw: self.stretch_raw,
            summary,
        };
        if self.raw.length == 0 {
            self.summary = stretch.summary.clone();
        } else {
            self.summary.append(&stretch.summary);
        }
        self.raw.append(self.stretch_raw);
        self.stretch_start = stretch.end;
        self.stretch_raw = Checksum::default();
        self.stretch_body_len = 0;
        self.stretch_body_crc32 = 0;
        stretch
    }
}

/// The header of an object that holds `[start, start + raw.length)` of a segment.
#[expect(clippy::too_many_arguments, reason = "each is one field of the header")]
pub fn header_of(
    settings: &AssemblerSettings,
    segment: SegmentName,
    kind: ObjectKind,
    start: u64,
    raw: Checksum,
    summary: Summary,
    body_crc32: u32,
    prefix_crc32: u32,
) -> ObjectHeader {
    ObjectHeader {
        format: ObjectHeader::FORMAT,
        kind,
        system_identifier: settings.system,
        timeline: segment.timeline(),
        segment: segment.to_string(),
        segment_size: settings.segment_size,
        start_offset: start,
        end_offset: start + raw.length,
        raw_size: raw.length,
        raw_crc32: raw.crc32,
        raw_crc32c: raw.crc32c,
        prefix_crc32,
        stored_size: 0, // filled in by `frame`
        body_crc32,
        compression: settings.compression,
        server_version: settings.server_version,
        summary,
        overflow: None,
    }
}
