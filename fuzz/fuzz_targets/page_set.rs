//! Sets of pages from a peer: none beyond the limit, and one coding for each set.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::PageSet;

const LIMIT: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(set) = PageSet::decode(bytes, LIMIT) {
        assert!(set.end() <= LIMIT);
        assert_eq!(set.encode(), bytes);
    }
});
