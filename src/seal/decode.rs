use zstd::stream::raw::{DParameter, Decoder as ZstdDecoder, InBuffer, Operation, OutBuffer};

use super::encode::BLOCK_BYTES;
use super::{Checksum, Compression, HEADER_LEN, ObjectHeader, SealError};

/// The largest window a Zstandard frame may ask for, as a power of two: 8 MiB, what every decoder must support.
pub const WINDOW_LOG_MAX: u32 = 23;
/// Raw bytes in the largest LZ4 block that the frame format knows.
const LZ4_BLOCK_MAX: usize = 4 << 20;

/// Undoes the compression of a stream that arrives in pieces. Memory is bounded whatever the input says; `raw_size_max` bounds the output.
pub struct StreamDecoder {
    codec: Codec,
    raw_size: u64,
    raw_size_max: u64,
}

enum Codec {
    Lz4(Box<Lz4>),
    Zstd(Box<Zstd>),
}

struct Zstd {
    decoder: ZstdDecoder<'static>,
    scratch: Box<[u8]>,
    /// A frame has begun and not ended.
    inside: bool,
}

/// An LZ4 frame reader: the header, then blocks that are taken whole.
struct Lz4 {
    state: Lz4State,
    pending: Vec<u8>,
    raw: Box<[u8]>,
}

#[derive(Clone, Copy)]
enum Lz4State {
    /// Between frames: a frame of data or a skippable one may begin.
    FrameHead,
    Skip(u64),
    BlockSize,
    Block {
        size: usize,
        stored: bool,
    },
}

impl StreamDecoder {
    pub fn new(compression: Compression, raw_size_max: u64) -> Result<Self, SealError> {
        let codec = match compression {
            Compression::Lz4 => {
                Codec::Lz4(Box::new(Lz4 { state: Lz4State::FrameHead, pending: Vec::new(), raw: Box::default() }))
            }
            Compression::Zstd => {
                let wrong = |e: std::io::Error| SealError::Data { why: e.to_string() };
                let mut decoder = ZstdDecoder::new().map_err(wrong)?;
                decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(wrong)?;
                Codec::Zstd(Box::new(Zstd { decoder, scratch: vec![0; 128 << 10].into(), inside: false }))
            }
        };
        Ok(Self { codec, raw_size: 0, raw_size_max })
    }

    /// Takes in stored bytes; hands raw bytes to `sink` as they come out.
    pub fn push<E: From<SealError>>(
        &mut self,
        stored: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // Asked to go on without input, Zstandard answers how much it wants of a next frame: as if one had begun.
        if stored.is_empty() {
            return Ok(());
        }
        let (total, limit) = (&mut self.raw_size, self.raw_size_max);
        let mut counted = |raw: &[u8]| {
            *total = total.saturating_add(raw.len() as u64);
            if *total > limit {
                return Err(E::from(SealError::Size { expected: limit, found: *total }));
            }
            sink(raw)
        };
        match &mut self.codec {
            Codec::Lz4(lz4) => lz4.push(stored, &mut counted),
            Codec::Zstd(zstd) => zstd.push(stored, &mut counted),
        }
    }

    /// Raw bytes so far.
    pub fn raw_size(&self) -> u64 {
        self.raw_size
    }

    /// Tells whether the stream ended where a stream may end.
    pub fn finish(&self) -> Result<(), SealError> {
        let whole = match &self.codec {
            Codec::Lz4(lz4) => matches!(lz4.state, Lz4State::FrameHead) && lz4.pending.is_empty(),
            Codec::Zstd(zstd) => !zstd.inside,
        };
        if whole { Ok(()) } else { Err(SealError::Data { why: "it ends too early".into() }) }
    }
}

impl Lz4 {
    fn push<E: From<SealError>>(
        &mut self,
        mut stored: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            match self.state {
                Lz4State::FrameHead => {
                    if !self.gather(&mut stored, 4) {
                        return Ok(());
                    }
                    let magic = u32::from_le_bytes(self.pending[..4].try_into().expect("4 bytes"));
                    if (0x184D_2A50..=0x184D_2A5F).contains(&magic) {
                        if !self.gather(&mut stored, 8) {
                            return Ok(());
                        }
                        let length = u32::from_le_bytes(self.pending[4..8].try_into().expect("4 bytes"));
                        self.state = Lz4State::Skip(u64::from(length));
                    } else {
                        if magic != 0x184D_2204 {
                            return Err(
                                SealError::Data { why: "an LZ4 frame does not begin where one should".into() }.into()
                            );
                        }
                        if !self.gather(&mut stored, 7) {
                            return Ok(());
                        }
                        self.begin_frame()?;
                    }
                    self.pending.clear();
                }
                Lz4State::Skip(left) => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(stored.len());
                    stored = &stored[take..];
                    let left = left - take as u64;
                    self.state = if left == 0 { Lz4State::FrameHead } else { Lz4State::Skip(left) };
                    if left > 0 {
                        return Ok(());
                    }
                }
                Lz4State::BlockSize => {
                    if !self.gather(&mut stored, 4) {
                        return Ok(());
                    }
                    let word = u32::from_le_bytes(self.pending[..4].try_into().expect("4 bytes"));
                    self.pending.clear();
                    let size = (word & 0x7FFF_FFFF) as usize; // 31 bits
                    if size > self.raw.len() {
                        return Err(SealError::Data { why: format!("an LZ4 block of {size} bytes") }.into());
                    }
                    self.state =
                        if word == 0 { Lz4State::FrameHead } else { Lz4State::Block { size, stored: word >> 31 == 1 } };
                }
                Lz4State::Block { size, stored: as_it_is } => {
                    // The common case: the whole block lies in the input and needs no copy.
                    let whole = self.pending.is_empty() && stored.len() >= size;
                    if !whole && !self.gather(&mut stored, size) {
                        return Ok(());
                    }
                    let block = if whole { &stored[..size] } else { &self.pending[..size] };
                    if as_it_is {
                        sink(block)?;
                    } else {
                        let length = lz4_flex::block::decompress_into(block, &mut self.raw)
                            .map_err(|e| SealError::Data { why: e.to_string() })?;
                        sink(&self.raw[..length])?;
                    }
                    if whole {
                        stored = &stored[size..];
                    }
                    self.pending.clear();
                    self.state = Lz4State::BlockSize;
                }
            }
        }
    }

    /// Moves input into `pending` until it has `wanted` bytes; false if the input ended before.
    fn gather(&mut self, stored: &mut &[u8], wanted: usize) -> bool {
        let take = wanted.saturating_sub(self.pending.len()).min(stored.len());
        self.pending.extend_from_slice(&stored[..take]);
        *stored = &stored[take..];
        self.pending.len() >= wanted
    }

    /// `pending` holds magic, FLG, BD and header checksum. Only what Walden writes: independent blocks, no optional fields.
    fn begin_frame(&mut self) -> Result<(), SealError> {
        let (flags, descriptor) = (self.pending[4], self.pending[5]);
        if flags != 0x60 {
            return Err(SealError::Data { why: format!("an LZ4 frame with flags {flags:#04x}") });
        }
        let block_max = match (descriptor >> 4) & 7 {
            4 => 64 << 10,
            5 => BLOCK_BYTES,
            6 => 1 << 20,
            7 => LZ4_BLOCK_MAX,
            other => return Err(SealError::Data { why: format!("an LZ4 block size code {other}") }),
        };
        if self.raw.len() != block_max {
            self.raw = vec![0; block_max].into();
        }
        self.state = Lz4State::BlockSize;
        Ok(())
    }
}

impl Zstd {
    fn push<E: From<SealError>>(
        &mut self,
        stored: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = InBuffer::around(stored);
        loop {
            let before = input.pos();
            let mut output = OutBuffer::around(&mut self.scratch[..]);
            let wanted = self
                .decoder
                .run(&mut input, &mut output)
                .map_err(|e| E::from(SealError::Data { why: e.to_string() }))?;
            let written = output.pos();
            sink(&self.scratch[..written])?;
            self.inside = wanted != 0;
            // Done when the input is used up and the decoder had room to spare, so that nothing waits inside it.
            if input.pos() == stored.len() && (written < self.scratch.len() || !self.inside) {
                return Ok(());
            }
            if input.pos() == before && written == 0 {
                return Err(SealError::Data { why: "it does not decode further".into() }.into());
            }
        }
    }
}

/// Reads a whole sealed WAL object that arrives in pieces: header, body, overflow; checks sizes and all checksums.
pub struct ObjectDecoder {
    head: Vec<u8>,
    header: Option<ObjectHeader>,
    body: Option<StreamDecoder>,
    body_crc32: crc32fast::Hasher,
    body_left: u64,
    overflow: Vec<u8>,
    overflow_left: u64,
    raw: Checksum,
}

impl Default for ObjectDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl ObjectDecoder {
    pub fn new() -> Self {
        Self {
            head: Vec::new(),
            header: None,
            body: None,
            body_crc32: crc32fast::Hasher::new(),
            body_left: 0,
            overflow: Vec::new(),
            overflow_left: 0,
            raw: Checksum::default(),
        }
    }

    /// The header, once its bytes have arrived. Not yet proven: that is `finish`.
    pub fn header(&self) -> Option<&ObjectHeader> {
        self.header.as_ref()
    }

    pub fn push<E: From<SealError>>(
        &mut self,
        mut stored: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.header.is_none() {
            let take = (HEADER_LEN - self.head.len()).min(stored.len());
            self.head.extend_from_slice(&stored[..take]);
            stored = &stored[take..];
            if self.head.len() < HEADER_LEN {
                return Ok(());
            }
            let header = ObjectHeader::parse(&self.head)?;
            self.body_left = header.body_size();
            self.overflow_left = header.overflow.map_or(0, |n| n + 8);
            self.body = Some(StreamDecoder::new(header.compression, header.raw_size)?);
            self.header = Some(header);
        }
        let take = usize::try_from(self.body_left).unwrap_or(usize::MAX).min(stored.len());
        if take > 0 {
            let body = self.body.as_mut().expect("made with the header");
            self.body_crc32.update(&stored[..take]);
            let raw = &mut self.raw;
            body.push(&stored[..take], |bytes| {
                raw.update(bytes);
                sink(bytes)
            })?;
            self.body_left -= take as u64;
            stored = &stored[take..];
        }
        let take = usize::try_from(self.overflow_left).unwrap_or(usize::MAX).min(stored.len());
        self.overflow.extend_from_slice(&stored[..take]);
        self.overflow_left -= take as u64;
        if take < stored.len() {
            return Err(SealError::Data { why: "bytes follow its end".into() }.into());
        }
        Ok(())
    }

    /// Proves the object whole and gives its header, lists included.
    pub fn finish(self) -> Result<ObjectHeader, SealError> {
        let mut header = self.header.ok_or(SealError::NotSealed)?;
        if self.body_left > 0 || self.overflow_left > 0 {
            let missing = self.body_left + self.overflow_left;
            return Err(SealError::Size { expected: header.stored_size, found: header.stored_size - missing });
        }
        if let Some(body) = &self.body {
            body.finish()?;
        }
        if self.raw.length != header.raw_size {
            return Err(SealError::Size { expected: header.raw_size, found: self.raw.length });
        }
        let same = |what, expected, found| {
            if expected == found { Ok(()) } else { Err(SealError::Checksum { what, expected, found }) }
        };
        same("CRC-32 of the stored bytes", header.body_crc32, self.body_crc32.finalize())?;
        same("CRC-32 of the WAL", header.raw_crc32, self.raw.crc32)?;
        same("CRC-32C of the WAL", header.raw_crc32c, self.raw.crc32c)?;
        if header.overflow.is_some() {
            header.read_overflow(&self.overflow)?;
        }
        Ok(header)
    }
}
