//! Stored hash trees: bounded, and written back as they were read. The checksum at the end is
//! put right, or nothing would get past it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::ImageTree;

const MAX_PAGES: u64 = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    let _ = ImageTree::decode(bytes, MAX_PAGES);
    let mut whole = bytes.to_vec();
    whole.extend_from_slice(blake3::hash(bytes).as_bytes());
    if let Ok(tree) = ImageTree::decode(&whole, MAX_PAGES) {
        let again = ImageTree::decode(&tree.encode(), MAX_PAGES).expect("just written");
        assert_eq!(again.root(), tree.root());
    }
});
