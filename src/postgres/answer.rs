//! What a server's answers say: rows and errors, each length checked before it is used.

use std::str::FromStr;

use bytes::{Buf, Bytes};

use super::{PostgresError, ServerMessage};

const COLUMNS_MAX: usize = 64;
const TEXT_MAX: usize = 1000;

/// The columns of a DataRow; `None` is NULL.
pub(super) type Row = Vec<Option<Bytes>>;

/// Text from the server: valid UTF-8, one line, at most 1,000 bytes.
pub(super) fn text(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(TEXT_MAX)];
    String::from_utf8_lossy(cut).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The fields of an ErrorResponse. Never fails: what cannot be read is left empty.
pub(super) fn parse_error(body: &[u8]) -> ServerMessage {
    let mut message = ServerMessage::default();
    for field in body.split(|&b| b == 0) {
        let Some((&kind, value)) = field.split_first() else { continue };
        let value = text(value);
        match kind {
            b'V' => message.severity = value,
            b'S' if message.severity.is_empty() => message.severity = value,
            b'C' => message.sqlstate = value,
            b'M' => message.message = value,
            b'D' => message.detail = Some(value),
            b'H' => message.hint = Some(value),
            b'R' => message.routine = Some(value),
            _ => {}
        }
    }
    message
}

/// The columns of a DataRow.
pub(super) fn parse_row(mut body: Bytes) -> Result<Row, PostgresError> {
    let short = || PostgresError::protocol("a row is shorter than it says");
    let count = usize::from(body.try_get_u16().map_err(|_| short())?);
    if count > COLUMNS_MAX {
        return Err(PostgresError::protocol("a row has too many columns"));
    }
    let mut row = Row::with_capacity(count);
    for _ in 0..count {
        match body.try_get_i32().map_err(|_| short())? {
            -1 => row.push(None),
            length => match usize::try_from(length) {
                Ok(length) if length <= body.len() => row.push(Some(body.split_to(length))),
                _ => return Err(short()),
            },
        }
    }
    Ok(row)
}

/// The column numbered `index` as text; a missing column and NULL are an error.
pub(super) fn column<'a>(row: &'a Row, index: usize, what: &'static str) -> Result<&'a str, PostgresError> {
    optional_column(row, index, what)?.ok_or_else(|| PostgresError::protocol(format!("{what} is missing in a row")))
}

/// The same with `None` for NULL.
pub(super) fn optional_column<'a>(
    row: &'a Row,
    index: usize,
    what: &'static str,
) -> Result<Option<&'a str>, PostgresError> {
    let wrong = || PostgresError::protocol(format!("{what} is missing in a row"));
    match row.get(index).ok_or_else(wrong)? {
        None => Ok(None),
        Some(bytes) => {
            std::str::from_utf8(bytes).map(Some).map_err(|_| PostgresError::protocol(format!("{what} is not text")))
        }
    }
}

/// A column as the type that it has, such as `Lsn`.
pub(super) fn parsed_column<T: FromStr>(row: &Row, index: usize, what: &'static str) -> Result<T, PostgresError> {
    let text = column(row, index, what)?;
    text.parse().map_err(|_| {
        PostgresError::protocol(format!("{what} cannot be \"{}\"", text.chars().take(40).collect::<String>()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_errors_that_lie_are_refused_without_a_panic() {
        assert!(parse_row(Bytes::from_static(b"\0\x02\0\0\0\x01a\xff\xff\xff\xff")).is_ok());
        for body in [&b""[..], b"\0\x01", b"\0\x01\0\0\0\x05ab", b"\0\x01\x80\0\0\0", b"\xff\xff"] {
            assert!(parse_row(Bytes::copy_from_slice(body)).is_err(), "{body:?}");
        }
        let message = parse_error(b"SERROR\0VFATAL\0C28P01\0Mwrong\x1b[31m\npassword\0Rauth_failed\0\0");
        assert_eq!((message.severity.as_str(), message.sqlstate.as_str()), ("FATAL", "28P01"));
        assert_eq!(message.message, "wrong [31m password");
    }
}
