//! Offers from a source, and answers to them: bounded, and readable again when written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::Offer;

const MAX_PAGES: u64 = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    // The first byte shares the rest out between the offer and the answer.
    let Some((&share, bytes)) = bytes.split_first() else {
        return;
    };
    let (offer, answer) = bytes.split_at(bytes.len() * usize::from(share) / 255);
    let Ok(offer) = Offer::decode(offer, MAX_PAGES) else {
        return;
    };
    assert!(offer.distinct() <= MAX_PAGES);
    let again = offer.encode().expect("an offer that was read");
    assert!(Offer::decode(&again, MAX_PAGES).is_ok());
    if let Ok(pages) = offer.decode_answer(answer) {
        assert!(pages.len() as u64 <= offer.distinct());
    }
});
