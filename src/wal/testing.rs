//! Writes WAL as PostgreSQL does, for tests: pages, records over page and segment borders, switches, torn records.

use super::{Lsn, PAGE_SIZE, PgTime, SegmentSize, TimelineId};

/// One timeline's WAL in memory, contiguous from `start`.
#[derive(Clone)]
pub(crate) struct WalWriter {
    pub bytes: Vec<u8>,
    pub start: Lsn,
    pub magic: u16,
    pub timeline: u32,
    pub system_identifier: u64,
    pub segment_size: SegmentSize,
    pub previous: Lsn,
}

pub(crate) const SYSTEM: u64 = 7_400_000_000_000_000_001;

/// A transaction's end, as `WalWriter::transaction` writes it.
#[derive(Clone, Default)]
pub(crate) struct EndParts {
    pub database: bool,
    pub subtransactions: u32,
    pub relations: u32,
    pub statistics: u32,
    pub invalidations: u32,
    /// Of a prepared transaction, with its global id.
    pub prepared_xid: Option<u32>,
    pub gid: bool,
    pub origin: bool,
}

impl WalWriter {
    pub fn new(start: u64, segment_size: SegmentSize) -> Self {
        Self {
            bytes: Vec::new(),
            start: Lsn::new(start),
            magic: 0xD110,
            timeline: 1,
            system_identifier: SYSTEM,
            segment_size,
            previous: Lsn::ZERO,
        }
    }

    pub fn major(mut self, major: u32) -> Self {
        self.magic = [0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118][major as usize - 13];
        self
    }

    pub fn position(&self) -> u64 {
        self.start.get() + self.bytes.len() as u64
    }

    /// Bytes from `from` on.
    pub fn from(&self, from: Lsn) -> &[u8] {
        &self.bytes[(from.get() - self.start.get()) as usize..]
    }

    pub fn timeline_id(&self) -> TimelineId {
        TimelineId::new(self.timeline).unwrap()
    }

    fn page_header(&mut self, rem_len: Option<u32>, overwrite: bool) {
        let position = self.position();
        let first = self.segment_size.is_boundary(Lsn::new(position));
        let flags = u16::from(rem_len.is_some()) | u16::from(first) << 1 | u16::from(overwrite) << 3;
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(position.to_le_bytes());
        self.bytes.extend(rem_len.unwrap_or(0).to_le_bytes());
        self.bytes.extend([0; 4]);
        if first {
            self.bytes.extend(self.system_identifier.to_le_bytes());
            self.bytes.extend((self.segment_size.get() as u32).to_le_bytes());
            self.bytes.extend((PAGE_SIZE as u32).to_le_bytes());
        }
    }

    fn at_page_start(&self) -> bool {
        self.position().is_multiple_of(PAGE_SIZE as u64)
    }

    /// A record from its header's fields and the bytes after the header. Gives where it starts.
    pub fn raw(&mut self, rmid: u8, info: u8, xid: u32, body: &[u8]) -> Lsn {
        self.raw_len(rmid, info, xid, body, usize::MAX)
    }

    /// As `raw`, cut off after `written_max` bytes of the record, at the latest at the end of a page.
    fn raw_len(&mut self, rmid: u8, info: u8, xid: u32, body: &[u8], written_max: usize) -> Lsn {
        let padding = self.position().wrapping_neg() % 8;
        self.bytes.extend(vec![0; padding as usize]);
        if self.at_page_start() {
            self.page_header(None, false);
        }
        let lsn = Lsn::new(self.position());
        let total = 24 + body.len() as u32;
        let mut record = Vec::with_capacity(total as usize);
        record.extend(total.to_le_bytes());
        record.extend(xid.to_le_bytes());
        record.extend(self.previous.get().to_le_bytes());
        record.extend([info, rmid, 0, 0]);
        record.extend([0xCC; 4]);
        record.extend(body);
        let mut rest = &record[..];
        while !rest.is_empty() {
            if self.at_page_start() {
                if record.len() - rest.len() >= written_max {
                    break;
                }
                self.page_header(Some(rest.len() as u32), false);
            }
            let room = PAGE_SIZE - (self.position() % PAGE_SIZE as u64) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
        self.previous = lsn;
        lsn
    }

    /// A record with data of its own and no blocks.
    pub fn record(&mut self, rmid: u8, info: u8, xid: u32, data: &[u8]) -> Lsn {
        let mut body = Vec::new();
        match u8::try_from(data.len()) {
            _ if data.is_empty() => {}
            Ok(short) => body.extend([255, short]),
            Err(_) => {
                body.push(254);
                body.extend((data.len() as u32).to_le_bytes());
            }
        }
        body.extend(data);
        self.raw(rmid, info, xid, &body)
    }

    /// Something that no reader here asks about, `len` bytes of data.
    pub fn filler(&mut self, xid: u32, len: usize) -> Lsn {
        self.record(11, 0, xid, &vec![0xAB; len])
    }

    pub fn commit(&mut self, xid: u32, time: i64) -> Lsn {
        self.record(1, 0x00, xid, &time.to_le_bytes())
    }

    pub fn abort(&mut self, xid: u32, time: i64) -> Lsn {
        self.record(1, 0x20, xid, &time.to_le_bytes())
    }

    /// Any end of a transaction; `operation` is the record's info without `XLOG_XACT_HAS_INFO`.
    pub fn transaction(&mut self, operation: u8, xid: u32, time: i64, parts: &EndParts) -> Lsn {
        let mut flags = 0u32;
        let mut data = Vec::new();
        if parts.database {
            flags |= 1;
            data.extend([1; 8]);
        }
        let mut list = |data: &mut Vec<u8>, flag: u32, count: u32, len: usize| {
            if count > 0 {
                flags |= flag;
                data.extend(count.to_le_bytes());
                data.extend(vec![0x5A; count as usize * len]);
            }
        };
        list(&mut data, 1 << 1, parts.subtransactions, 4);
        list(&mut data, 1 << 2, parts.relations, 12);
        list(&mut data, 1 << 8, parts.statistics, if self.magic >= 0xD118 { 16 } else { 12 });
        list(&mut data, 1 << 3, parts.invalidations, 16);
        if let Some(prepared) = parts.prepared_xid {
            flags |= 1 << 4;
            data.extend(prepared.to_le_bytes());
            if parts.gid {
                flags |= 1 << 7;
                data.extend(b"the-gid\0");
            }
        }
        if parts.origin {
            flags |= 1 << 5;
            data.extend([9; 16]);
        }
        let mut whole = time.to_le_bytes().to_vec();
        whole.extend(flags.to_le_bytes());
        whole.extend(data);
        self.record(1, operation | 0x80, xid, &whole)
    }

    pub fn restore_point(&mut self, name: &str, time: i64) -> Lsn {
        let mut data = time.to_le_bytes().to_vec();
        data.extend(name.as_bytes());
        data.resize(72, 0);
        self.record(0, 0x70, 0, &data)
    }

    pub fn checkpoint(&mut self, redo: Lsn, unix_time: i64) -> Lsn {
        let mut data = vec![0; 88];
        data[0..8].copy_from_slice(&redo.get().to_le_bytes());
        data[8..12].copy_from_slice(&self.timeline.to_le_bytes());
        data[64..72].copy_from_slice(&unix_time.to_le_bytes());
        self.record(0, 0x10, 0, &data)
    }

    pub fn parameter_change(&mut self, values: [i32; 6]) -> Lsn {
        let mut data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        data.extend([0; 4]);
        self.record(0, 0x60, 0, &data)
    }

    /// `XLOG_SWITCH`, and the rest of the segment as PostgreSQL leaves it: zero.
    pub fn switch(&mut self) -> Lsn {
        let lsn = self.record(0, 0x40, 0, &[]);
        self.zero_to_segment_end();
        lsn
    }

    pub fn zero_to_segment_end(&mut self) {
        let end = self.segment_size.start_of(Lsn::new(self.position() + self.segment_size.get() - 1)).get();
        self.bytes.resize((end - self.start.get()) as usize, 0);
    }

    /// A record that a crash cut off at the end of a page, then the page on which the server goes on.
    pub fn torn(&mut self, len: usize) -> Lsn {
        let lsn = self.raw_len(11, 0, 0, &vec![0xEE; len], 1);
        assert!(self.at_page_start(), "a torn record must reach over its page");
        self.page_header(None, true);
        let mut data = lsn.get().to_le_bytes().to_vec();
        data.extend(5i64.to_le_bytes());
        self.record(0, 0xD0, 0, &data);
        lsn
    }

    /// Fillers until exactly `left` bytes of the page are left, counted from the next record's start.
    pub fn leave_in_page(&mut self, left: usize) {
        assert!(left.is_multiple_of(8) && left < PAGE_SIZE - 64);
        let in_page = |w: &Self| (w.position().next_multiple_of(8) % PAGE_SIZE as u64) as usize;
        while in_page(self) == 0 || PAGE_SIZE - in_page(self) < left + 32 {
            self.filler(0, 64);
        }
        let total = PAGE_SIZE - in_page(self) - left;
        let data = if total - 26 < 256 { total - 26 } else { total - 29 };
        self.filler(0, data);
        assert_eq!(PAGE_SIZE - in_page(self), left);
    }
}

pub(crate) fn time(micros: i64) -> PgTime {
    PgTime::from_pg_micros(micros)
}
