//! Numbers that look like chance and are the same for the same seed: a case that fails is run
//! again by its number.

/// SplitMix64 (Steele et al., *Fast splittable pseudorandom number generators*, OOPSLA '14).
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        // The bias is of no matter: `end` is far below 2^64.
        (self.next() % end as u64) as usize
    }

    /// Either, as often as not.
    pub(crate) fn coin(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}
