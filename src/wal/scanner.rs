//! Follows records through contiguous WAL, page by page, without keeping any of it.

use super::content::{ContentReader, read_whole};
use super::page::{
    LONG_HEADER_LEN, PAGE_SIZE, PageErrorKind, PageHeader, PageRules, SHORT_HEADER_LEN, header_len, u32_at,
};
use super::record::{Interest, RECORD_HEADER_LEN, RECORD_LEN_MAX, RecordHeader, RecordInfo, RecordKind, info, rmgr};
use super::{Lsn, PageError, SegmentSize, SystemIdentifier, TimelineId};

/// Where a scan begins, and what every page must agree with.
#[derive(Clone, Copy, Debug)]
pub struct ScanStart {
    /// The timeline that is streamed or read; its copied first segment may hold pages of its ancestors.
    pub timeline: TimelineId,
    /// The start of a page. A record that reaches into it from before is passed over, since its beginning is not known.
    pub position: Lsn,
    pub segment_size: SegmentSize,
    /// Checked at each segment start; `None` accepts any.
    pub system_identifier: Option<SystemIdentifier>,
}

/// Visits every complete record of contiguous WAL that comes in pieces of any size, and checks every page header.
///
/// Memory is constant; bodies are jumped over. After an error it stays failed: feeding it again gives the same error.
#[derive(Clone, Debug)]
pub struct RecordScanner {
    /// The next byte to come.
    position: u64,
    rules: PageRules,
    /// Of no record until the first page has told the version.
    interest: Option<Interest>,
    state: State,
    page_header: [u8; LONG_HEADER_LEN],
    record_header: [u8; RECORD_HEADER_LEN],
    failed: Option<PageError>,
}

#[derive(Clone, Debug)]
enum State {
    /// No page has been seen.
    Unknown,
    /// Between records, perhaps in alignment padding.
    Between,
    /// In a record's header, of which `have` bytes (more than 0) are in `record_header`.
    Header { lsn: u64, have: usize },
    /// In a record's body, of which `left` bytes (more than 0) are to come.
    Body { lsn: u64, left: u32, header: RecordHeader, content: Option<Box<ContentReader>> },
    /// In a record that started before the scan, of which `left` bytes are to come.
    Orphan { left: u32 },
    /// Behind an `XLOG_SWITCH` record: nothing until the segment's end.
    Filler,
}

impl RecordScanner {
    /// Panics if `position` is not the start of a page.
    pub fn new(start: ScanStart) -> Self {
        assert!(start.position.get().is_multiple_of(PAGE_SIZE as u64), "a scan starts at a page");
        Self {
            position: start.position.get(),
            rules: PageRules {
                segment_size: start.segment_size,
                system_identifier: start.system_identifier,
                timeline: start.timeline,
                timeline_before: 0,
                version: None,
            },
            interest: None,
            state: State::Unknown,
            page_header: [0; LONG_HEADER_LEN],
            record_header: [0; RECORD_HEADER_LEN],
            failed: None,
        }
    }

    /// The next byte that it wants.
    pub fn position(&self) -> Lsn {
        Lsn::new(self.position)
    }

    /// Where the record starts that has begun and has not ended at `position`. Also `None` within one whose start is not
    /// known because the scan began inside it.
    pub fn open_record(&self) -> Option<Lsn> {
        match &self.state {
            State::Header { lsn, .. } | State::Body { lsn, .. } => Some(Lsn::new(*lsn)),
            State::Unknown | State::Between | State::Orphan { .. } | State::Filler => None,
        }
    }

    /// From here on pages may be of `timeline`, a descendant of the one before: for reading a branch over its switches.
    pub fn continue_on(&mut self, timeline: TimelineId) {
        self.rules.timeline = self.rules.timeline.max(timeline);
    }

    /// PostgreSQL's major version, once a page has told it.
    pub fn major(&self) -> Option<u32> {
        self.rules.version.map(|version| version.major())
    }

    /// Takes the bytes at `position`; `visit` gets each record that ends in them.
    pub fn feed(&mut self, bytes: &[u8], mut visit: impl FnMut(RecordInfo)) -> Result<(), PageError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.feed_pages(bytes, &mut visit);
        self.failed = result.err();
        result
    }

    fn feed_pages(&mut self, mut bytes: &[u8], visit: &mut impl FnMut(RecordInfo)) -> Result<(), PageError> {
        while !bytes.is_empty() {
            let in_page = (self.position % PAGE_SIZE as u64) as usize; // below PAGE_SIZE
            let page_start = Lsn::new(self.position - in_page as u64);
            let header_len = header_len(page_start, self.rules.segment_size);
            let taken = if in_page < header_len {
                let taken = (header_len - in_page).min(bytes.len());
                self.page_header[in_page..in_page + taken].copy_from_slice(&bytes[..taken]);
                if in_page + taken == header_len {
                    self.enter_page(page_start, header_len)?;
                }
                taken
            } else {
                let taken = (PAGE_SIZE - in_page).min(bytes.len());
                self.scan(&bytes[..taken], visit)?;
                taken
            };
            self.position += taken as u64;
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn enter_page(&mut self, lsn: Lsn, header_len: usize) -> Result<(), PageError> {
        let first_of_segment = header_len == LONG_HEADER_LEN;
        if first_of_segment && matches!(self.state, State::Filler) {
            self.state = State::Between;
        }
        // After a switch PostgreSQL zeroes the rest of the segment, page headers included (`CopyXLogRecordToWAL` in
        // xlog.c). A scan that begins there cannot know of the switch.
        if !first_of_segment
            && matches!(self.state, State::Filler | State::Unknown)
            && self.page_header[..SHORT_HEADER_LEN].iter().all(|&byte| byte == 0)
        {
            self.state = State::Filler;
            return Ok(());
        }
        let header = self.rules.check(lsn, &self.page_header[..header_len])?;
        self.rules.timeline_before = header.timeline;
        if self.rules.version.is_none() {
            self.rules.version = Some(header.version);
            self.interest = Some(Interest::new(header.version));
        }
        self.join(header).map_err(|kind| PageError { lsn, kind })
    }

    /// Fits a page to what the page before left open.
    fn join(&mut self, page: PageHeader) -> Result<(), PageErrorKind> {
        let open = match &self.state {
            State::Filler => return Ok(()),
            State::Unknown => {
                self.state = match page.continues {
                    Some(0) => return Err(PageErrorKind::Continuation { expected: None, found: Some(0) }),
                    Some(left) => State::Orphan { left },
                    None => State::Between,
                };
                return Ok(());
            }
            State::Between => None,
            State::Header { have, .. } => {
                // `have` is at least 8 at a page's end: records are aligned, pages a multiple of that.
                let total_len = u32_at(&self.record_header, 0);
                Some(total_len - *have as u32) // checked by `check_len` once the first 4 bytes were there
            }
            State::Body { left, .. } | State::Orphan { left } => Some(*left),
        };
        match (open, page.continues) {
            (Some(expected), Some(found)) if expected == found => Ok(()),
            (None, None) => Ok(()),
            // A crash cut the record off; the server marks the page and begins anew on it (`XLogReadRecord`).
            (Some(_), None) if page.overwrites => {
                self.state = State::Between;
                Ok(())
            }
            (expected, found) => Err(PageErrorKind::Continuation { expected, found }),
        }
    }

    /// Takes bytes that lie in one page, behind its header, at `position`.
    #[inline]
    fn scan(&mut self, bytes: &[u8], visit: &mut impl FnMut(RecordInfo)) -> Result<(), PageError> {
        let mut at = 0;
        while at < bytes.len() {
            let here = self.position + at as u64;
            match &mut self.state {
                State::Between => {
                    at += here.wrapping_neg() as usize & 7; // padding up to the next multiple of 8
                    if at < bytes.len() {
                        at = self.whole_records(bytes, at, visit)?;
                    }
                }
                State::Header { lsn, have } => {
                    let taken = (RECORD_HEADER_LEN - *have).min(bytes.len() - at);
                    self.record_header[*have..*have + taken].copy_from_slice(&bytes[at..at + taken]);
                    *have += taken;
                    at += taken;
                    let (lsn, have) = (*lsn, *have);
                    if have >= 4 {
                        check_len(lsn, u32_at(&self.record_header, 0))?;
                    }
                    if have == RECORD_HEADER_LEN {
                        self.begin_body(lsn, self.position + at as u64, visit);
                    }
                }
                State::Body { left, content, .. } => {
                    let taken = (bytes.len() - at).min(*left as usize);
                    if let Some(content) = content {
                        content.feed(&bytes[at..at + taken]);
                    }
                    at += taken;
                    *left -= taken as u32; // at most `left`
                    if *left == 0 {
                        self.end_body(self.position + at as u64, visit);
                    }
                }
                State::Orphan { left } => {
                    let taken = (bytes.len() - at).min(*left as usize);
                    at += taken;
                    *left -= taken as u32; // at most `left`
                    if *left == 0 {
                        self.state = State::Between;
                    }
                }
                State::Filler => at = bytes.len(),
                State::Unknown => unreachable!("a page's header comes before its content"),
            }
        }
        Ok(())
    }

    /// The hot loop: records that lie wholly in `bytes`, from the aligned offset `at` on. Gives the offset of the first
    /// byte that it has not dealt with.
    #[inline]
    fn whole_records(
        &mut self,
        bytes: &[u8],
        mut at: usize,
        visit: &mut impl FnMut(RecordInfo),
    ) -> Result<usize, PageError> {
        let (Some(interest), Some(version)) = (self.interest, self.rules.version) else {
            unreachable!("a page's header comes before its content");
        };
        while let Some(head) = bytes.get(at..).and_then(|rest| rest.first_chunk::<RECORD_HEADER_LEN>()) {
            let header = RecordHeader::parse(head);
            let lsn = self.position + at as u64;
            check_len(lsn, header.total_len)?;
            let end = at + header.total_len as usize;
            if end > bytes.len() {
                break;
            }
            let record = |kind| RecordInfo {
                lsn: Lsn::new(lsn),
                end: Lsn::new(self.position + end as u64),
                total_len: header.total_len,
                rmid: header.rmid,
                info: header.info,
                xid: header.xid,
                kind,
            };
            if !interest.has(&header) {
                visit(record(RecordKind::Other));
            } else {
                let body = &bytes[at + RECORD_HEADER_LEN..end];
                visit(record(read_whole(version, Lsn::new(lsn), header, body)));
                if is_switch(header) {
                    self.after_switch(self.position + end as u64);
                    return Ok(end);
                }
            }
            at += (header.total_len as usize).next_multiple_of(8); // position + at stays aligned
        }
        if at < bytes.len() {
            self.state = State::Header { lsn: self.position + at as u64, have: 0 };
        }
        Ok(at.min(bytes.len()))
    }

    /// A record's header is complete in `record_header`; `end` is the position behind it.
    fn begin_body(&mut self, lsn: u64, end: u64, visit: &mut impl FnMut(RecordInfo)) {
        let header = RecordHeader::parse(&self.record_header);
        let interesting = self.interest.is_some_and(|interest| interest.has(&header));
        let content = match self.rules.version {
            // The one allocation, of constant size: only for an interesting record that two pages or pieces share.
            Some(version) if interesting => Some(Box::new(ContentReader::new(version, Lsn::new(lsn), header))),
            _ => None,
        };
        let left = header.total_len - RECORD_HEADER_LEN as u32; // checked by `check_len`
        self.state = State::Body { lsn, left, header, content };
        if left == 0 {
            self.end_body(end, visit);
        }
    }

    fn end_body(&mut self, end: u64, visit: &mut impl FnMut(RecordInfo)) {
        let State::Body { lsn, header, content, .. } = std::mem::replace(&mut self.state, State::Between) else {
            unreachable!("only called in a body");
        };
        visit(RecordInfo {
            lsn: Lsn::new(lsn),
            end: Lsn::new(end),
            total_len: header.total_len,
            rmid: header.rmid,
            info: header.info,
            xid: header.xid,
            kind: content.map_or(RecordKind::Other, |content| content.finish()),
        });
        if is_switch(header) {
            self.after_switch(end);
        }
    }

    fn after_switch(&mut self, end: u64) {
        // A switch record that fills its segment exactly leaves nothing to pass over.
        if !self.rules.segment_size.is_boundary(Lsn::new(end)) {
            self.state = State::Filler;
        }
    }
}

#[inline(always)]
fn is_switch(header: RecordHeader) -> bool {
    header.rmid == rmgr::XLOG && header.info & 0xF0 == info::SWITCH
}

#[inline(always)]
fn check_len(lsn: u64, total_len: u32) -> Result<(), PageError> {
    if (RECORD_HEADER_LEN as u32..=RECORD_LEN_MAX).contains(&total_len) {
        Ok(())
    } else {
        Err(PageError { lsn: Lsn::new(lsn), kind: PageErrorKind::RecordLength { found: total_len } })
    }
}
