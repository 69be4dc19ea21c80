//! What a source wants looked for again: bounded, and the same again when written.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use reconciler::{ImageTree, Offer, OfferOptions, PAGE_SIZE, Salt, Seek, SlicePages, no_progress};

const PAGES: u8 = 200;

static OFFER: LazyLock<Offer> = LazyLock::new(|| {
    let image: Vec<u8> = (1..=PAGES).flat_map(|seed| [seed; PAGE_SIZE]).collect();
    let tree = ImageTree::build(&SlicePages(&image), &no_progress).expect("in memory");
    let base = ImageTree::zero(u64::from(PAGES)).expect("a few pages");
    let options = OfferOptions {
        salt: Salt([1; 32]),
        candidates: 1,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    Offer::new(&tree, &base, &options).expect("a few pages")
});

fuzz_target!(|bytes: &[u8]| {
    let Ok(seek) = Seek::decode(bytes, &OFFER) else {
        return;
    };
    let again = seek.encode().expect("one that was read");
    assert!(again.len() as u64 <= Seek::max_encoded_len(u64::from(PAGES)));
    assert_eq!(Seek::decode(&again, &OFFER).expect("one that was written"), seek);
});
