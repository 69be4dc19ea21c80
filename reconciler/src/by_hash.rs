//! Maps keyed by page hashes.
//!
//! A page hash is random already, and maps look at a few of its bits: the first eight bytes are
//! enough. They are mixed with a number that is another one in each process, so that nobody can
//! plant pages in a guest that all fall into one place. It takes a tenth of what the standard
//! hasher does, which counts where whole disks are looked up.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

use crate::page::PageHash;

pub(crate) type PageMap<T> = HashMap<PageHash, T, ByHash>;
pub(crate) type PageHashes = HashSet<PageHash, ByHash>;

/// Makes [`Mixed`] hashers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByHash(u64);

impl Default for ByHash {
    fn default() -> Self {
        static KEY: OnceLock<u64> = OnceLock::new();
        Self(*KEY.get_or_init(|| RandomState::new().hash_one(0)))
    }
}

impl BuildHasher for ByHash {
    type Hasher = Mixed;

    fn build_hasher(&self) -> Mixed {
        Mixed(self.0)
    }
}

/// The first bytes of a page hash, mixed.
pub(crate) struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let first = bytes.first_chunk().copied().unwrap_or_default();
        // Both halves of a wide product depend on all bits of either side.
        let wide = u128::from(u64::from_le_bytes(first) ^ self.0) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (wide as u64) ^ ((wide >> 64) as u64);
    }

    // The length of an array, which says nothing.
    fn write_usize(&mut self, _len: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_that_differ_are_spread_over_all_bits() {
        let hashes = (0u32..4096).map(|at| PageHash(*blake3::hash(&at.to_le_bytes()).as_bytes()));
        let mixed: Vec<u64> = hashes
            .map(|hash| ByHash::default().hash_one(hash))
            .collect();
        for bit in 0..64 {
            let set = mixed.iter().filter(|mixed| **mixed >> bit & 1 == 1).count();
            assert!((1700..2400).contains(&set), "bit {bit}: {set}");
        }
    }
}
