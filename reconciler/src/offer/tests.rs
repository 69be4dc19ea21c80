use proptest::prelude::*;

use super::*;

fn tree(kinds: &[u8]) -> ImageTree {
    let mut tree = ImageTree::zero(kinds.len() as u64).unwrap();
    for (i, &kind) in kinds.iter().enumerate() {
        let hash = if kind == 0 {
            PageHash::ZERO
        } else {
            PageHash([kind; 32])
        };
        tree.set(PageIndex(i as u64), hash).unwrap();
    }
    tree
}

fn options(force_bits: Option<u32>) -> OfferOptions {
    OfferOptions {
        salt: Salt([3; 32]),
        candidates: 1000,
        force_bits,
        seek_from: 0,
    }
}

proptest! {
    #[test]
    fn offers_come_back(
        old in prop::collection::vec(0u8..6, 0..300),
        new in prop::collection::vec(0u8..6, 0..300),
        force_bits in prop::option::of(1u32..65),
    ) {
        let (old, new) = (tree(&old), tree(&new));
        let offer = Offer::new(&new, &old, &options(force_bits)).unwrap();
        let bytes = offer.encode().unwrap();
        prop_assert!(bytes.len() as u64 <= Offer::max_encoded_len(new.pages()));
        let back = Offer::decode(&bytes, new.pages()).unwrap();
        let expected = Expected::default();
        prop_assert_eq!(&back, &Offer { expected, ..offer.clone() });
        let first = offer.first_pages();
        prop_assert_eq!(first.len() as u64, offer.distinct());
        for (index, content) in back.changed_contents() {
            prop_assert_eq!(new.leaf(first[content as usize]), new.leaf(index));
        }
        if new.pages() > 0 {
            prop_assert!(Offer::decode(&bytes, new.pages() - 1).is_err());
        }
    }

    #[test]
    fn damaged_offers_are_refused_or_harmless(
        new in prop::collection::vec(0u8..6, 1..300),
        at: prop::sample::Index,
        byte: u8,
    ) {
        let new = tree(&new);
        let old = ImageTree::zero(0).unwrap();
        let mut bytes = Offer::new(&new, &old, &options(None)).unwrap().encode().unwrap();
        let at = at.index(bytes.len());
        prop_assert!(Offer::decode(&bytes[..at], 1000).is_err());
        bytes[at] = byte;
        if let Ok(offer) = Offer::decode(&bytes, 1000) {
            prop_assert_eq!(offer.contents.len() as u64, offer.changed.len());
            prop_assert!(offer.contents.iter().all(|&c| u64::from(c) < offer.distinct()));
            prop_assert_eq!(offer.first_pages().len() as u64, offer.distinct());
        }
    }
}
