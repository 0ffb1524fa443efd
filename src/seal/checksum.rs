/// CRC-32 (as S3 and zlib) and CRC-32C (as PostgreSQL) of a run of bytes, taken while they pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum {
    pub crc32: u32,
    pub crc32c: u32,
    pub length: u64,
}

impl Checksum {
    pub fn update(&mut self, bytes: &[u8]) {
        let mut hasher = crc32fast::Hasher::new_with_initial_len(self.crc32, self.length);
        hasher.update(bytes);
        self.crc32 = hasher.finalize();
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        self.length += bytes.len() as u64; // usize fits
    }

    /// The checksum of `self` followed by `next`, without reading a byte again.
    pub fn append(&mut self, next: Checksum) {
        self.crc32 = combine_crc32(self.crc32, next.crc32, next.length);
        let length = usize::try_from(next.length).expect("a 64-bit machine");
        self.crc32c = crc32c::crc32c_combine(self.crc32c, next.crc32c, length);
        self.length += next.length;
    }
}

/// CRC-32 of two runs of bytes in a row from the CRC-32 of each.
pub fn combine_crc32(first: u32, second: u32, second_length: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial_len(first, 0);
    hasher.combine(&crc32fast::Hasher::new_with_initial_len(second, second_length));
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_checksums_equal_those_of_the_whole() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        for split in [0, 1, 4096, 99_999, 100_000] {
            let (mut whole, mut first, mut second) = (Checksum::default(), Checksum::default(), Checksum::default());
            whole.update(&bytes);
            first.update(&bytes[..split]);
            second.update(&bytes[split..]);
            first.append(second);
            assert_eq!(first, whole);
        }
        assert_eq!(crc32fast::hash(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
    }
}
