//! Short hashes: what an offer names contents by, how long they are, and how they are packed.
//!
//! # How short
//! A wrong page is taken for a right one when their shorts are equal by chance. Nothing false
//! comes of it, for the full root is compared at the end; the page is found by descending the
//! tree and sent again, in four round trips. So a bit more in each short is worth what it takes
//! on the line as long as that is less than these round trips, times their odds: 23,000 bits
//! are 2.3 ms at 10 Mbit/s, four round trips some 0.2 s, and both are equal where one migration
//! in a hundred or so has to mend a page.
//!
//! - A content that may lie anywhere is compared with all `c` pages that the target searches.
//!   With `s` of these and shorts of `b` bits at most `s * c / 2^b` accidents are expected; `b`
//!   is chosen so that this is at most 2^-9. What lies in shared images is not searched, for
//!   the source has looked there itself.
//! - A content that is looked for at its own address is compared with that page, perhaps with
//!   what a patch makes of it: 2^-6 accidents, if none of `n` pages is right, take log2(n) + 6
//!   bits.
//! - Where the twin has a content at its own address, [check symbols](crate::parity) over 16 bits of
//!   each tell which the target lacks: 2^-6 accidents where a thousand of them are not there.
//!
//! Shorts are keyed with a fresh salt, so that nobody can plant pages in a guest that collide.
//! Contents whose shorts collide with one another make the source take more bits.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::known::Hint;
use crate::page::PageHash;
use crate::wire::Cursor;

/// The expected number of accidents in a migration is at most 2 to minus this.
const COLLISION_BUDGET_BITS: u32 = 9;
/// The same for contents that are compared with one page or two.
const HERE_BUDGET_BITS: u32 = 6;
/// Fewer bits save nothing worth having.
const MIN_BITS: u32 = 16;
pub(crate) const MAX_BITS: u32 = 64;

/// A random value, fresh for each exchange, that shorts are keyed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Salt(pub [u8; 32]);

/// How many bits a short needs where so many contents are looked for at their own addresses.
pub(crate) fn here_bits(contents: u64) -> u32 {
    let bits = contents.max(1).next_power_of_two().trailing_zeros() + HERE_BUDGET_BITS;
    bits.clamp(MIN_BITS, MAX_BITS)
}

/// How many bits a short needs for so many contents and candidates.
pub fn short_bits(contents: u64, candidates: u64) -> u32 {
    let pairs = u128::from(contents.max(1)) * u128::from(candidates.max(1));
    let bits = 128 - (pairs - 1).leading_zeros() + COLLISION_BUDGET_BITS;
    bits.clamp(MIN_BITS, MAX_BITS)
}

/// The first `bits` bits of the salted hash of a page hash.
#[inline]
pub(crate) fn short(salt: &Salt, bits: u32, hash: &PageHash) -> u64 {
    let keyed = blake3::keyed_hash(&salt.0, &hash.0);
    let mut first = [0; 8];
    first.copy_from_slice(&keyed.as_bytes()[..8]);
    let mask = u64::MAX.checked_shr(64 - bits).unwrap_or_default();
    u64::from_le_bytes(first) & mask
}

/// How long the shorts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    pub(crate) anywhere: u32,
    pub(crate) here: u32,
}

impl Bits {
    pub(crate) const fn of(self, hint: Hint) -> u32 {
        match hint {
            Hint::Anywhere => self.anywhere,
            Hint::Here => self.here,
            Hint::Likely | Hint::Shared(_) | Hint::Lacking => 0,
        }
    }
}

/// Whether no two are equal.
pub(crate) fn all_distinct(mut shorts: Vec<u64>) -> bool {
    shorts.sort_unstable();
    shorts.windows(2).all(|pair| pair[0] != pair[1])
}

/// Appends values of so many bits each.
pub(crate) fn pack_bits(out: &mut Vec<u8>, values: impl Iterator<Item = (u64, u32)>) {
    let (mut held, mut count) = (0u128, 0);
    for (value, bits) in values {
        held |= u128::from(value) << count;
        count += bits;
        while count >= 8 {
            out.push(held as u8);
            held >>= 8;
            count -= 8;
        }
    }
    if count > 0 {
        out.push(held as u8);
    }
}

/// Reads values of so many bits each, at most 64.
pub(crate) fn unpack_bits(
    cursor: &mut Cursor<'_>,
    lengths: impl Iterator<Item = u32> + Clone,
) -> Result<Vec<u64>, Error> {
    let all: u64 = lengths.clone().map(u64::from).sum();
    let mut bytes = cursor.bytes(all.div_ceil(8))?.iter();
    let (mut held, mut count) = (0u128, 0);
    let mut out = Vec::new();
    for bits in lengths {
        while count < bits {
            // The bytes hold all bits.
            held |= u128::from(bytes.next().copied().unwrap_or_default()) << count;
            count += 8;
        }
        out.push(held as u64 & u64::MAX.checked_shr(64 - bits).unwrap_or_default());
        held >>= bits;
        count -= bits;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_asks_for_44_bits_in_the_measured_case() {
        assert_eq!(short_bits(26_537, 700_000), 44);
        assert_eq!((here_bits(23_000), here_bits(0)), (21, MIN_BITS));
        assert_eq!(short_bits(0, 0), MIN_BITS);
        assert_eq!(short_bits(1 << 30, 1 << 30), MAX_BITS);
    }
}
