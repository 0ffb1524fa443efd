//! Values as the server's `SHOW` prints them.

use std::time::Duration;

/// A time setting with its unit, such as `1min`, `60s`, `500ms`, `0`; milliseconds without one. `None` if it is not one.
///
/// Source: `convert_int_from_base_unit` in `src/backend/utils/misc/guc.c`, which prints the largest unit that fits.
pub fn shown_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit {
        "ms" | "" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_durations_are_read_as_show_prints_them() {
        for (text, expected) in [("1min", 60_000), ("60s", 60_000), ("500ms", 500), ("0", 0), ("2h", 7_200_000)] {
            assert_eq!(shown_duration(text), Some(Duration::from_millis(expected)), "{text}");
        }
        assert_eq!(shown_duration("soon"), None);
    }
}
