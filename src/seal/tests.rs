use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;
use crate::wal::{Lsn, PgTime, RestorePoint, SegmentName, SegmentSize, Summary, SystemIdentifier, TimelineId};

/// Bytes that compress about as WAL does: runs, repeats and noise.
fn wal_like(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let run = (state >> 33) as usize % 97;
        match (state >> 60) & 3 {
            0 => bytes.extend(std::iter::repeat_n(0, run)),
            1 => bytes.extend_from_slice(&state.to_le_bytes()),
            _ if bytes.len() > 200 => bytes.extend_from_within(bytes.len() - 190..bytes.len() - 190 + run),
            _ => bytes.push(state as u8),
        }
    }
    bytes.truncate(length);
    bytes
}

fn header(kind: ObjectKind, start: u64, end: u64, compression: Compression) -> ObjectHeader {
    let size = SegmentSize::new(1 << 20).unwrap();
    let segment = SegmentName::holding(TimelineId::FIRST, Lsn::new(5 << 20), size);
    ObjectHeader {
        format: ObjectHeader::FORMAT,
        kind,
        system_identifier: SystemIdentifier::new(u64::MAX),
        timeline: TimelineId::FIRST,
        segment: segment.to_string(),
        segment_size: size,
        start_offset: start,
        end_offset: end,
        raw_size: end - start,
        raw_crc32: 0,
        raw_crc32c: 0,
        prefix_crc32: 0,
        stored_size: 0,
        body_crc32: 0,
        compression,
        server_version: Some(170_010),
        summary: Summary::default(),
        overflow: None,
    }
}

/// Seals `raw` as an object, the body cut at `cuts`; gives the object and the body's cut offsets.
fn seal(raw: &[u8], cuts: &[usize], compression: Compression, summary: Summary) -> (Vec<u8>, Vec<usize>) {
    let mut encoder = Encoder::new(compression, 0).unwrap();
    let mut body = Encoder::prefix(compression).to_vec();
    let mut offsets = Vec::new();
    let mut from = 0;
    for &cut in cuts {
        encoder.write(&raw[from..cut], &mut body).unwrap();
        encoder.cut(&mut body).unwrap();
        offsets.push(body.len());
        from = cut;
    }
    encoder.write(&raw[from..], &mut body).unwrap();
    encoder.cut(&mut body).unwrap();
    body.extend_from_slice(Encoder::suffix(compression));
    let mut checksum = Checksum::default();
    checksum.update(raw);
    let mut header = header(ObjectKind::Segment, 0, raw.len() as u64, compression);
    header.summary = summary;
    header.raw_crc32 = checksum.crc32;
    header.raw_crc32c = checksum.crc32c;
    header.body_crc32 = crc32fast::hash(&body);
    let frames = header.frame(body.len() as u64);
    let object = [&frames.head[..], &body, &frames.tail].concat();
    assert_eq!(crc32fast::hash(&object), frames.object_crc32);
    assert_eq!(object.len() as u64, frames.stored_size);
    (object, offsets)
}

fn open(object: &[u8], step: usize) -> Result<(ObjectHeader, Vec<u8>), SealError> {
    let mut decoder = ObjectDecoder::new();
    let mut raw = Vec::new();
    for part in object.chunks(step) {
        decoder.push(part, |bytes| {
            raw.extend_from_slice(bytes);
            Ok::<(), SealError>(())
        })?;
    }
    Ok((decoder.finish()?, raw))
}

#[test]
fn the_lz4_frame_header_is_the_one_that_the_library_writes() {
    let mut info = lz4_flex::frame::FrameInfo::new();
    info.block_size = lz4_flex::frame::BlockSize::Max256KB;
    info.block_mode = lz4_flex::frame::BlockMode::Independent;
    let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
    encoder.write_all(b"x").unwrap();
    let frame = encoder.finish().unwrap();
    assert_eq!(&frame[..7], Encoder::prefix(Compression::Lz4));
}

#[test]
fn what_is_sealed_opens_again_in_steps_of_any_size() {
    let raw = wal_like(1 << 20, 7);
    for compression in [Compression::Lz4, Compression::Zstd] {
        let (object, _) = seal(&raw, &[1, 300_000, 300_001], compression, Summary::default());
        assert!(object.len() < raw.len());
        for step in [1021, 65_536, object.len()] {
            let (header, back) = open(&object, step).unwrap();
            assert_eq!(header.raw_size, raw.len() as u64);
            assert!(back == raw, "{compression:?} in steps of {step}");
        }
    }
}

#[test]
fn other_decoders_pass_over_the_header_and_read_the_body() {
    let raw = wal_like(1 << 20, 11);
    let (object, _) = seal(&raw, &[4096], Compression::Lz4, Summary::default());
    let mut back = Vec::new();
    lz4_flex::frame::FrameDecoder::new(&object[HEADER_LEN..]).read_to_end(&mut back).unwrap();
    assert!(back == raw);
    let (object, _) = seal(&raw, &[4096], Compression::Zstd, Summary::default());
    assert!(zstd::stream::decode_all(&object[..]).unwrap() == raw);
}

#[test]
fn a_stretch_between_two_cuts_decodes_alone() {
    let raw = wal_like(1 << 20, 13);
    for compression in [Compression::Lz4, Compression::Zstd] {
        let (object, cuts) = seal(&raw, &[100_000, 700_000], compression, Summary::default());
        let body = &object[HEADER_LEN..];
        let stretch = [Encoder::prefix(compression), &body[cuts[0]..cuts[1]], Encoder::suffix(compression)].concat();
        let mut decoder = StreamDecoder::new(compression, 600_000).unwrap();
        let mut back = Vec::new();
        decoder
            .push(&stretch, |bytes| {
                back.extend_from_slice(bytes);
                Ok::<(), SealError>(())
            })
            .unwrap();
        decoder.finish().unwrap();
        assert!(back == raw[100_000..700_000]);
    }
}

/// A store's last chunk may be empty. Zstandard took it for the beginning of a further frame, and a good object for a cut one.
#[test]
fn an_empty_piece_changes_nothing() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let (object, _) = seal(&wal_like(1 << 20, 29), &[], compression, Summary::default());
        let mut decoder = StreamDecoder::new(compression, 1 << 20).unwrap();
        for piece in [&[][..], &object[HEADER_LEN..], &[]] {
            decoder.push(piece, |_| Ok::<(), SealError>(())).unwrap();
        }
        decoder.finish().unwrap();
        assert_eq!(decoder.raw_size(), 1 << 20);
    }
}

#[test]
fn lists_that_do_not_fit_into_the_header_go_behind_the_body() {
    let raw = wal_like(1 << 20, 17);
    let mut summary = Summary::default();
    for n in 0..3000u64 {
        let name = format!("{n:0>60}");
        summary.restore_points.push(RestorePoint { name, lsn: Lsn::new(n), time: PgTime::from_pg_micros(n as i64) });
    }
    let (object, _) = seal(&raw, &[], Compression::Lz4, summary.clone());
    let first = ObjectHeader::parse(&object).unwrap();
    assert!(first.overflow.is_some() && first.summary.restore_points.is_empty());
    let (header, back) = open(&object, 10_000).unwrap();
    assert_eq!(header.summary, summary);
    assert!(back == raw);
}

#[test]
fn incompressible_bytes_grow_by_next_to_nothing() {
    let mut state = 1u64;
    let raw: Vec<u8> = (0..1 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    for compression in [Compression::Lz4, Compression::Zstd] {
        let (object, _) = seal(&raw, &[], compression, Summary::default());
        assert!(object.len() < raw.len() + HEADER_LEN + 256);
        assert!(open(&object, 65_536).unwrap().1 == raw);
    }
}

#[test]
fn a_bomb_is_stopped_at_the_size_that_the_header_names() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut encoder = Encoder::new(compression, 0).unwrap();
        let mut body = Encoder::prefix(compression).to_vec();
        encoder.write(&vec![0; 8 << 20], &mut body).unwrap();
        encoder.cut(&mut body).unwrap();
        let mut decoder = StreamDecoder::new(compression, 1 << 20).unwrap();
        let mut seen = 0;
        let result = decoder.push(&body, |bytes| {
            seen += bytes.len();
            Ok::<(), SealError>(())
        });
        assert!(matches!(result, Err(SealError::Size { .. })), "{result:?}");
        assert!(seen <= 1 << 20);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_object_is_an_error_and_never_a_panic(at in 0usize..60_000, bit in 0u8..8, cut in 0usize..60_000, zstd: bool) {
        let compression = if zstd { Compression::Zstd } else { Compression::Lz4 };
        let raw = wal_like(1 << 20, 23);
        let (mut object, _) = seal(&raw, &[5000], compression, Summary::default());
        let whole = object.clone();
        let at = at % object.len();
        object[at] ^= 1 << bit;
        // Only a flip that turns one kind of white space in the header's padding into another can pass.
        if let Ok((_, back)) = open(&object, 4099) {
            prop_assert!(back == raw && at < HEADER_LEN && object[at].is_ascii_whitespace());
        }
        prop_assert!(open(&whole[..cut % whole.len()], 4099).is_err());
    }
}
