//! Random moments that can be repeated: the same in every run of `make test`, others each time in the full run, always printed.

/// SplitMix64: small, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From `WALDEN_TEST_SEED`; without it 1, or the clock in the full run.
    pub fn of_this_run() -> Random {
        let given = std::env::var("WALDEN_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let chance = || jiff::Timestamp::now().as_nanosecond() as u64; // the low bits are enough
        let seed = given.unwrap_or_else(|| if super::is_full() { chance() } else { 1 });
        // libtest shows it when the test fails.
        println!("WALDEN_TEST_SEED={seed}");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is more than 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.number_below(end as u64)).expect("below a usize")
    }

    /// Below `end`, which is more than 0.
    pub fn number_below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
