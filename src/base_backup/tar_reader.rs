//! A server's tar, taken apart as it comes: nothing is kept but the header being read.

use super::BackupError;
use super::header::{BLOCK, Header, padding};

/// What is found in a tar, in its order.
pub(super) trait Entries {
    fn begin(&mut self, header: Header) -> Result<(), BackupError>;
    /// The entry's next bytes.
    fn content(&mut self, bytes: &[u8]) -> Result<(), BackupError>;
    /// All of the entry's bytes have come.
    fn end(&mut self) -> Result<(), BackupError>;
}

pub(super) struct TarReader {
    state: State,
    header: [u8; BLOCK],
    /// Bytes of `header` that are there.
    filled: usize,
}

enum State {
    Header,
    Content {
        left: u64,
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// An empty block was seen: only further ones may come.
    Ended,
}

impl TarReader {
    pub(super) fn new() -> Self {
        Self { state: State::Header, header: [0; BLOCK], filled: 0 }
    }

    pub(super) fn push(&mut self, mut bytes: &[u8], entries: &mut impl Entries) -> Result<(), BackupError> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Header => {
                    let take = bytes.len().min(BLOCK - self.filled);
                    self.header[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
                    self.filled += take;
                    bytes = &bytes[take..];
                    if self.filled == BLOCK {
                        self.filled = 0;
                        self.state = self.enter(entries)?;
                    }
                }
                State::Content { left, padding } => {
                    let take = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    entries.content(&bytes[..take])?;
                    *left -= take as u64;
                    bytes = &bytes[take..];
                    if *left == 0 {
                        let padding = *padding;
                        entries.end()?;
                        self.state = if padding == 0 { State::Header } else { State::Padding { left: padding } };
                    }
                }
                State::Padding { left } => {
                    let take = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    *left -= take as u64;
                    bytes = &bytes[take..];
                    if *left == 0 {
                        self.state = State::Header;
                    }
                }
                State::Ended => {
                    if bytes.iter().any(|&b| b != 0) {
                        return Err(BackupError::Tar { why: "data follows the end of the archive".into() });
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn enter(&self, entries: &mut impl Entries) -> Result<State, BackupError> {
        let Some(header) = Header::parse(&self.header)? else { return Ok(State::Ended) };
        let size = header.size;
        entries.begin(header)?;
        if size > 0 {
            return Ok(State::Content { left: size, padding: padding(size) });
        }
        entries.end()?;
        Ok(State::Header)
    }

    /// The archive's bytes are at an end. 13 and 14 leave out the empty blocks.
    pub(super) fn finish(self) -> Result<(), BackupError> {
        match self.state {
            State::Ended => Ok(()),
            State::Header if self.filled == 0 => Ok(()),
            _ => Err(BackupError::Tar { why: "the archive ended inside an entry".into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::testing::header;
    use super::*;
    use proptest::prelude::*;

    #[derive(Default, Debug, PartialEq)]
    struct Seen(Vec<(Vec<u8>, Vec<u8>)>);

    impl Entries for Seen {
        fn begin(&mut self, header: Header) -> Result<(), BackupError> {
            self.0.push((header.name, Vec::new()));
            Ok(())
        }
        fn content(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
            self.0.last_mut().unwrap().1.extend_from_slice(bytes);
            Ok(())
        }
        fn end(&mut self) -> Result<(), BackupError> {
            Ok(())
        }
    }

    fn read(stream: &[u8], step: usize) -> Result<Seen, BackupError> {
        let (mut reader, mut seen) = (TarReader::new(), Seen::default());
        for chunk in stream.chunks(step) {
            reader.push(chunk, &mut seen)?;
        }
        reader.finish()?;
        Ok(seen)
    }

    fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            builder.append_data(&mut header, name, &content[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    proptest! {
        #[test]
        fn it_reads_what_the_tar_crate_writes(
            files in proptest::collection::vec(("[a-z]{1,8}(/[a-z]{1,8}){0,2}", proptest::collection::vec(any::<u8>(), 0..1500)), 0..6),
            step in 1_usize..2000,
        ) {
            let stream = archive(&files);
            let seen = read(&stream, step).unwrap();
            let expected: Vec<_> = files.iter().map(|(n, c)| (n.clone().into_bytes(), c.clone())).collect();
            prop_assert_eq!(&seen.0, &expected);
            // Without the empty blocks at its end, as 13 and 14 send it.
            prop_assert_eq!(&read(&stream[..stream.len() - 1024], step).unwrap().0, &expected);
        }

        #[test]
        fn no_stream_makes_it_panic(stream in proptest::collection::vec(any::<u8>(), 0..2000), step in 1_usize..600) {
            let _ = read(&stream, step);
            let _ = read(&[&header("a", b'0', 700)[..], &stream].concat(), step);
        }
    }

    #[test]
    fn a_cut_archive_and_one_with_an_appendix_are_refused() {
        let stream = archive(&[("a".into(), vec![1; 700])]);
        for cut in [100, 512, 600, 1300, 1535] {
            assert!(read(&stream[..cut], 512).is_err(), "{cut}");
        }
        assert!(read(&[&stream[..], &header("b", b'0', 0)].concat(), 512).is_err());
    }
}
