use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::{Lsn, WalError};

/// One line of the cluster's history. Decimal in flags and JSON, 8 hexadecimal digits in file and key names (`to_hex`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    pub const FIRST: TimelineId = TimelineId(NonZeroU32::MIN);

    pub fn new(id: u32) -> Result<Self, WalError> {
        NonZeroU32::new(id).map(Self).ok_or(WalError::Timeline { text: "0".into() })
    }

    pub const fn get(self) -> u32 {
        self.0.get()
    }

    pub fn to_hex(self) -> String {
        format!("{:08X}", self.get())
    }

    /// Parses the 8 upper-case hexadecimal digits of a file or key name.
    pub fn from_hex(text: &str) -> Result<Self, WalError> {
        let wrong = || WalError::Timeline { text: text.chars().take(64).collect() };
        if text.len() != 8 || !text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)) {
            return Err(wrong());
        }
        Self::new(u32::from_str_radix(text, 16).map_err(|_| wrong())?).map_err(|_| wrong())
    }

    /// `0000000N.history`.
    pub fn history_file_name(self) -> String {
        format!("{}.history", self.to_hex())
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.get())
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// One ancestor in a history: WAL on `timeline` counts up to `switch`, exclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ancestor {
    pub timeline: TimelineId,
    pub switch: Lsn,
}

/// A timeline and its ancestors, oldest first, as a `.history` file tells them.
///
/// Source: `readTimeLineHistory` in PostgreSQL `src/backend/access/transam/timeline.c`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<Ancestor>,
}

impl TimelineHistory {
    /// A timeline without ancestors: timeline 1 has no history file.
    pub fn without_ancestors(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Parses the content of `timeline`'s history file. Lines are `parent<TAB>switch LSN<TAB>reason`; `#` begins a comment.
    /// Ancestors must be ascending, below `timeline`, and switch at ascending positions.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<Self, WalError> {
        let wrong = |why: &str| WalError::History { timeline, why: why.chars().take(200).collect() };
        if content.len() > 1 << 20 {
            return Err(wrong("it is larger than 1 MiB"));
        }
        let text = String::from_utf8_lossy(content);
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text.lines() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.split_whitespace();
            let (Some(parent), Some(switch)) = (fields.next(), fields.next()) else {
                return Err(wrong("a line has no switch position"));
            };
            let parent: u32 = parent.parse().map_err(|_| wrong("a line does not begin with a timeline number"))?;
            let parent = TimelineId::new(parent).map_err(|_| wrong("timeline 0 does not exist"))?;
            let switch: Lsn = switch.parse().map_err(|_| wrong("a switch position is not an LSN"))?;
            if parent >= timeline {
                return Err(wrong("an ancestor is not below the timeline"));
            }
            if let Some(last) = ancestors.last()
                && (last.timeline >= parent || last.switch > switch)
            {
                return Err(wrong("ancestors are not in ascending order"));
            }
            ancestors.push(Ancestor { timeline: parent, switch });
        }
        Ok(Self { timeline, ancestors })
    }

    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Oldest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    pub fn parent(&self) -> Option<&Ancestor> {
        self.ancestors.last()
    }

    /// The timeline whose WAL is this branch's at `position`, the first byte wanted.
    pub fn timeline_at(&self, position: Lsn) -> TimelineId {
        self.ancestors.iter().find(|a| position < a.switch).map_or(self.timeline, |a| a.timeline)
    }

    /// Where this branch's use of `timeline` begins and, for an ancestor, ends (exclusive). `None` if not on the branch.
    pub fn range_of(&self, timeline: TimelineId) -> Option<(Lsn, Option<Lsn>)> {
        let mut begin = Lsn::ZERO;
        for ancestor in &self.ancestors {
            if ancestor.timeline == timeline {
                return Some((begin, Some(ancestor.switch)));
            }
            begin = ancestor.switch;
        }
        (timeline == self.timeline).then_some((begin, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(id: u32) -> TimelineId {
        TimelineId::new(id).unwrap()
    }

    fn parse(id: u32, content: &str) -> Result<TimelineHistory, WalError> {
        TimelineHistory::parse(timeline(id), content.as_bytes())
    }

    #[test]
    fn a_history_tells_whose_wal_counts_where() {
        let history = parse(
            5,
            "# a comment\n1\t0/3000000\tno recovery target specified\n\n  3\t0/5000060\tbefore 2026-11-20 10:00:00+00\n",
        )
        .unwrap();
        assert_eq!(history.timeline(), timeline(5));
        assert_eq!(history.ancestors().len(), 2);
        assert_eq!(history.parent(), Some(&Ancestor { timeline: timeline(3), switch: Lsn::new(0x5000060) }));
        for (position, id) in [(0, 1), (0x2FFFFFF, 1), (0x3000000, 3), (0x500005F, 3), (0x5000060, 5), (u64::MAX, 5)] {
            assert_eq!(history.timeline_at(Lsn::new(position)), timeline(id), "{position:X}");
        }
        assert_eq!(history.range_of(timeline(3)), Some((Lsn::new(0x3000000), Some(Lsn::new(0x5000060)))));
        assert_eq!(history.range_of(timeline(5)), Some((Lsn::new(0x5000060), None)));
        assert_eq!(history.range_of(timeline(2)), None);
        let first = TimelineHistory::without_ancestors(TimelineId::FIRST);
        assert_eq!(first.range_of(TimelineId::FIRST), Some((Lsn::ZERO, None)));
    }

    #[test]
    fn a_history_that_cannot_be_is_refused() {
        for content in [
            "1",
            "x\t0/1\twhy",
            "0\t0/1\twhy",
            "1\tzero\twhy",
            "5\t0/1\twhy",
            "2\t0/1\twhy\n1\t0/2\twhy",
            "1\t0/2\twhy\n2\t0/1\twhy",
            "1\t0/2\twhy\n1\t0/3\twhy",
        ] {
            let error = parse(5, content).unwrap_err();
            assert!(error.to_string().starts_with("the history file of timeline 5 cannot be read"), "{error}");
        }
        assert!(TimelineHistory::parse(timeline(2), &vec![b'#'; (1 << 20) + 1]).is_err());
        assert!(TimelineHistory::parse(timeline(2), &[0xFF, 0xFE, b'\t', 0x80]).is_err());
    }

    #[test]
    fn a_timeline_is_8_upper_case_hexadecimal_digits_in_names() {
        assert_eq!(timeline(0x1A).to_hex(), "0000001A");
        assert_eq!(timeline(0x1A).history_file_name(), "0000001A.history");
        assert_eq!(timeline(0x1A).to_string(), "26");
        assert_eq!(TimelineId::from_hex("0000001A").unwrap(), timeline(0x1A));
        for text in ["", "1A", "0000001a", "00000000", "0000001A0", "+000001A"] {
            assert!(TimelineId::from_hex(text).is_err(), "{text}");
        }
    }
}
