//! Changes an input as one would who looks for mistakes: bits, numbers, cuts, repetitions, parts of another input.

pub const LENGTH_MAX: usize = 64 << 10;

const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    i64::MAX as u64,
    u64::MAX,
];
/// What formats of text are made of, and what they seldom expect.
const WORDS: [&[u8]; 40] = [
    b"0",
    b"-1",
    b"1e999",
    b"4294967295",
    b"4294967296",
    b"18446744073709551615",
    b"18446744073709551616",
    b"0x10",
    b"+1",
    b"null",
    b"true",
    b"\"",
    b"\\u0000",
    b"\\ud800",
    b"[[[[[[[[",
    b"{\"a\":",
    b"]",
    b"}",
    b",",
    b":",
    b"=",
    b"'",
    b"\\",
    b"/",
    b"..",
    b"\0",
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    b"%00",
    b"%",
    b"\xff\xfe",
    "\u{e4}\u{1F600}".as_bytes(),
    b"\xc3",
    b"F",
    b"00000000",
    b"FFFFFFFF",
    b"Z",
    b"9999",
];

pub use crate::support::random::Random;

/// A part of something that has `length` bytes, mostly a short one.
fn range(random: &mut Random, length: usize) -> std::ops::Range<usize> {
    let start = random.below(length + 1);
    let longest = if random.next().is_multiple_of(8) { length } else { 32 };
    let end = (start + 1 + random.below(longest.max(1))).min(length);
    start.min(end)..end
}

/// `input` becomes another one; parts of `other` may come into it.
pub fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..1 << random.below(4) {
        step(random, input, other);
    }
    input.truncate(LENGTH_MAX);
}

fn step(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    let length = input.len();
    match random.below(14) {
        0 | 1 if length > 0 => input[random.below(length)] ^= 1 << random.below(8),
        2 if length > 0 => input[random.below(length)] = random.next().to_le_bytes()[0],
        3 | 4 => number(random, input),
        5 if length > 0 => {
            let at = random.below(length);
            let by = random.next().to_le_bytes()[0] % 16;
            input[at] =
                if random.next().is_multiple_of(2) { input[at].wrapping_add(by) } else { input[at].wrapping_sub(by) };
        }
        6 => drop(input.drain(range(random, length))),
        7 => {
            let part = input[range(random, length)].to_vec();
            let times = if random.next().is_multiple_of(16) { 64 } else { 1 };
            insert(random, input, &part.repeat(times));
        }
        8 => {
            let bytes = random.next().to_le_bytes();
            let length = 1 + random.below(8);
            insert(random, input, &bytes[..length]);
        }
        9 => {
            let part = range(random, other.len());
            insert(random, input, &other[part]);
        }
        10 => {
            let part = &other[range(random, other.len())];
            let at = random.below(length + 1);
            let end = (at + part.len()).min(length);
            input.splice(at..end, part.iter().copied());
        }
        11 => input.truncate(random.below(length + 1)),
        12 => {
            let word = WORDS[random.below(WORDS.len())];
            insert(random, input, word);
        }
        _ => digits(random, input),
    }
}

fn insert(random: &mut Random, input: &mut Vec<u8>, part: &[u8]) {
    let at = random.below(input.len() + 1);
    input.splice(at..at, part.iter().copied());
}

/// Overwrites 1 to 8 bytes with a number at which things change, in either order of bytes.
fn number(random: &mut Random, input: &mut [u8]) {
    let width = 1 << random.below(4);
    if input.len() < width {
        return;
    }
    let at = random.below(input.len() - width + 1);
    let value = NUMBERS[random.below(NUMBERS.len())].wrapping_add(random.next() % 3).wrapping_sub(1);
    let bytes = value.to_le_bytes();
    let place = &mut input[at..at + width];
    place.copy_from_slice(&bytes[..width]);
    if random.next().is_multiple_of(2) {
        place.reverse();
    }
}

/// Replaces a number that is written in digits.
fn digits(random: &mut Random, input: &mut Vec<u8>) {
    let from = random.below(input.len() + 1);
    let Some(start) = input[from..].iter().position(u8::is_ascii_hexdigit).map(|at| from + at) else { return };
    let end = input[start..].iter().position(|byte| !byte.is_ascii_hexdigit()).map_or(input.len(), |at| start + at);
    let value = NUMBERS[random.below(NUMBERS.len())].wrapping_add(random.next() % 3).wrapping_sub(1);
    let text = match random.below(3) {
        0 => value.to_string(),
        1 => format!("{value:X}"),
        // As long as before, as names want it.
        _ => format!("{value:0width$X}", width = end - start).chars().take(end - start).collect(),
    };
    input.splice(start..end, text.into_bytes());
}
