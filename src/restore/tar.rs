//! Reads the tar of a volume as it arrives. Only what PostgreSQL and Walden write: regular files and directories with ustar
//! headers. Links, devices, sparse files and extension headers (which could rename or resize the next entry) are refused (I17).

const BLOCK: usize = 512;
/// Bytes of an entry's path.
const PATH_MAX: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// As in the archive; not yet checked for where it leads.
    pub path: Vec<u8>,
    pub kind: TarKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TarKind {
    File { size: u64 },
    Directory,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("an entry's header has a wrong checksum")]
    Checksum,
    #[error("an entry's header has a {0} that cannot be read")]
    Field(&'static str),
    #[error("{path} is {what}, which a base backup does not contain")]
    Kind { path: String, what: &'static str },
    #[error("bytes follow its end")]
    AfterEnd,
    #[error("it ends too early")]
    Short,
}

/// What becomes of the entries.
pub trait TarSink {
    type Error: From<TarError>;

    /// A new entry; the data of the one before was complete.
    fn entry(&mut self, entry: TarEntry) -> Result<(), Self::Error>;
    /// The next bytes of a file.
    fn data(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
    /// The file's last byte was given. Also for an empty file.
    fn file_end(&mut self) -> Result<(), Self::Error>;
}

/// Takes a tar apart that arrives in pieces of any size. Needs one block of memory.
#[derive(Debug)]
pub struct TarReader {
    block: Vec<u8>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    Data {
        left: u64,
        padding: u64,
    },
    Padding(u64),
    /// A block of zeros was seen: only zeros may follow.
    End,
}

impl Default for TarReader {
    fn default() -> Self {
        Self { block: Vec::with_capacity(BLOCK), state: State::Header }
    }
}

impl TarReader {
    pub fn push<S: TarSink>(&mut self, mut bytes: &[u8], sink: &mut S) -> Result<(), S::Error> {
        while !bytes.is_empty() {
            match self.state {
                State::Header => {
                    let take = (BLOCK - self.block.len()).min(bytes.len());
                    self.block.extend_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    if self.block.len() == BLOCK {
                        self.header(sink)?;
                        self.block.clear();
                    }
                }
                State::Data { left, padding } => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    sink.data(&bytes[..take])?;
                    bytes = &bytes[take..];
                    let left = left - take as u64; // usize fits
                    self.state = if left > 0 {
                        State::Data { left, padding }
                    } else {
                        sink.file_end()?;
                        State::after(padding)
                    };
                }
                State::Padding(left) => {
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    bytes = &bytes[take..];
                    self.state = State::after(left - take as u64); // usize fits
                }
                State::End => {
                    if bytes.iter().any(|b| *b != 0) {
                        return Err(TarError::AfterEnd.into());
                    }
                    bytes = &[];
                }
            }
        }
        Ok(())
    }

    /// Tells whether the archive ended where it may.
    pub fn finish(&self) -> Result<(), TarError> {
        if self.state == State::End { Ok(()) } else { Err(TarError::Short) }
    }

    fn header<S: TarSink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        if self.block.iter().all(|b| *b == 0) {
            self.state = State::End;
            return Ok(());
        }
        let entry = parse_header(&self.block)?;
        let size = match entry.kind {
            TarKind::File { size } => Some(size),
            TarKind::Directory => None,
        };
        sink.entry(entry)?;
        self.state = match size {
            None => State::Header,
            Some(0) => {
                sink.file_end()?;
                State::Header
            }
            Some(left) => {
                let over = left % BLOCK as u64;
                State::Data { left, padding: if over == 0 { 0 } else { BLOCK as u64 - over } }
            }
        };
        Ok(())
    }
}

impl State {
    fn after(padding: u64) -> Self {
        if padding == 0 { Self::Header } else { Self::Padding(padding) }
    }
}

/// Offsets and lengths: "ustar" in POSIX `pax`, and `tarCreateHeader` in PostgreSQL `src/port/tar.c`.
fn parse_header(block: &[u8]) -> Result<TarEntry, TarError> {
    let stated = number(&block[148..156]).ok_or(TarError::Field("checksum"))?;
    let sum: u64 =
        block.iter().enumerate().map(|(at, b)| u64::from(if (148..156).contains(&at) { b' ' } else { *b })).sum();
    if sum != stated {
        return Err(TarError::Checksum);
    }
    let name = text(&block[0..100]);
    // The prefix exists only where the magic says so; GNU's own format has other things there.
    let prefix = if &block[257..263] == b"ustar\0" { text(&block[345..500]) } else { b"" };
    let mut path = prefix.to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    if name.is_empty() || path.len() > PATH_MAX {
        return Err(TarError::Field("name"));
    }
    let size = number(&block[124..136]).ok_or(TarError::Field("size"))?;
    let what = match block[156] {
        b'0' | 0 => {
            // A file whose name ends in a slash is a directory to some readers and a file to others.
            if path.ends_with(b"/") {
                return Err(TarError::Field("name"));
            }
            return Ok(TarEntry { path, kind: TarKind::File { size } });
        }
        b'5' if size == 0 => {
            while path.last() == Some(&b'/') {
                path.pop();
            }
            return Ok(TarEntry { path, kind: TarKind::Directory });
        }
        b'5' => return Err(TarError::Field("size")),
        b'1' => "a hard link",
        b'2' => "a symbolic link",
        b'3' | b'4' => "a device",
        b'6' => "a FIFO",
        b'x' | b'g' | b'X' => "a PAX header",
        b'L' | b'K' => "a long name",
        b'S' => "a sparse file",
        _ => "an entry of an unknown kind",
    };
    Err(TarError::Kind { path: String::from_utf8_lossy(&path).into_owned(), what })
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// Octal digits, or, with the highest bit set, a big-endian number (`print_tar_number` in PostgreSQL `src/port/tar.c`).
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (first, rest) = (field[0] & 0x7F, &field[1..]);
        let (high, low) = rest.split_at(rest.len().checked_sub(8)?);
        if first != 0 || high.iter().any(|b| *b != 0) {
            return None;
        }
        return Some(u64::from_be_bytes(low.try_into().ok()?)).filter(|size| *size <= i64::MAX as u64);
    }
    let digits: &[u8] = field.split(|b| *b == 0 || *b == b' ').find(|part| !part.is_empty())?;
    let rest = &field[field.windows(digits.len()).position(|w| w == digits)? + digits.len()..];
    if !digits.iter().all(|b| (b'0'..=b'7').contains(b)) || rest.iter().any(|b| *b != 0 && *b != b' ') {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
#[path = "tar_tests.rs"]
pub(super) mod tests;
