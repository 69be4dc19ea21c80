//! Chains by themselves; what a site makes of them is tested with the steps of ownership.

use proptest::prelude::*;

use super::*;

const VM: Id = Id([1; 16]);

fn sites<const N: usize>() -> [Identity; N] {
    std::array::from_fn(|_| Identity::ephemeral().unwrap())
}

fn peer(of: &Identity) -> Peer {
    let addr = "127.0.0.1:1".parse().unwrap();
    Peer::new("b".parse().unwrap(), addr, of.key())
}

/// Starts at the first, and goes from each to the next.
fn through(sites: &[&Identity]) -> Chain {
    let mut chain = Chain::start(VM, 1, sites[0]);
    for pair in sites.windows(2) {
        chain.hand_over(VM, pair[1].key(), pair[0]).unwrap();
    }
    chain
}

#[test]
fn a_chain_leads_from_each_of_its_links_to_its_last() {
    let [a, b, c] = sites();
    let chain = through(&[&a, &b, &c, &a]);
    let proven = chain.prove(VM).unwrap();
    assert_eq!((proven.owner(), proven.fence()), (a.key(), 4));
    for known in 1..=chain.links.len() {
        let mut known_there = chain.clone();
        known_there.links.truncate(known);
        assert_eq!(proven.way_from(&known_there), Way::On(Vec::new()));
        assert_eq!(proven.added_to(&known_there), chain);
        let older = known_there.prove(VM).unwrap().way_from(&chain);
        let newest = known == chain.links.len();
        let expected = if newest {
            Way::On(Vec::new())
        } else {
            Way::Behind
        };
        assert_eq!(older, expected);
    }
}

#[test]
fn who_signs_for_others_breaks_the_chain() {
    let [a, b, m] = sites();
    let mut chain = through(&[&a, &b]);
    chain.hand_over(VM, m.key(), &m).unwrap();
    assert_eq!(chain.prove(VM).unwrap_err(), ChainError::Broken { at: 3 });
    // Under the owner's name, without its key.
    chain.links[2].by = b.public();
    assert_eq!(
        chain.prove(VM).unwrap_err(),
        ChainError::Signature { at: 3 }
    );
}

#[test]
fn a_chain_is_of_one_vm() {
    let [a, b] = sites();
    let chain = through(&[&a, &b]);
    let other = chain.prove(Id([2; 16])).unwrap_err();
    assert_eq!(other, ChainError::Signature { at: 1 });
    assert_eq!(Chain::default().prove(VM).unwrap_err(), ChainError::Empty);
}

#[test]
fn links_of_one_place_do_not_fit_another() {
    let [a, b] = sites();
    let chain = through(&[&a, &b, &a, &b]);
    let mut moved = chain.clone();
    // The same giver and taker.
    moved.links[3] = Link {
        before: 3,
        after: 4,
        ..moved.links[1]
    };
    assert_eq!(
        moved.prove(VM).unwrap_err(),
        ChainError::Signature { at: 4 }
    );
    let mut left_out = chain;
    left_out.links.drain(1..3);
    assert_eq!(
        left_out.prove(VM).unwrap_err(),
        ChainError::Broken { at: 2 }
    );
}

#[test]
fn a_new_key_goes_on_with_the_chain() {
    let [a, old, new, m] = sites();
    let keys = [
        NewKey::sign(&old, m.key()),
        // The one before never came to be.
        NewKey::sign(&old, new.key()),
    ];
    let mut chain = through(&[&a, &old]);
    let before = chain.clone();
    assert!(!chain.succeed(&keys[..1], new.key()));
    assert_eq!(chain, before);
    assert!(chain.succeed(&keys, new.key()));
    chain.hand_over(VM, a.key(), &new).unwrap();
    let proven = chain.prove(VM).unwrap();
    assert_eq!((proven.owner(), proven.fence()), (a.key(), 3));
    assert_eq!(proven.way_from(&before), Way::On(Vec::new()));
    // It is worth nothing where the key had nothing.
    let mut stolen = through(&[&old, &a]);
    stolen.links.push(chain.links[2]);
    assert_eq!(stolen.prove(VM).unwrap_err(), ChainError::Broken { at: 3 });
}

#[test]
fn keys_that_follow_one_another_in_a_circle_end() {
    let [a, b, c] = sites();
    let keys = [NewKey::sign(&a, b.key()), NewKey::sign(&b, a.key())];
    assert!(!through(&[&a]).succeed(&keys, c.key()));
}

#[test]
fn takeovers_are_told_and_hand_overs_that_part_are_not_followed() {
    let [a, b, c] = sites();
    let known = through(&[&a, &b, &a]);
    let mut lost = known.clone();
    lost.hand_over(VM, c.key(), &a).unwrap();
    // From an older copy than the lost site's.
    let mut taken = known.clone();
    taken.take_over(VM, 3, 1003, &b);
    let proven = taken.prove(VM).unwrap();
    let told = [taken.links.last().unwrap()];
    assert_eq!(proven.way_from(&known), Way::On(told.to_vec()));
    assert_eq!(proven.way_from(&lost), Way::On(told.to_vec()));
    assert_eq!(proven.added_to(&lost), taken);
    assert_eq!(lost.prove(VM).unwrap().way_from(&taken), Way::Apart);
    // Two hand-overs of one site in one place.
    let mut twice = known.clone();
    twice.hand_over(VM, b.key(), &a).unwrap();
    assert_eq!(twice.prove(VM).unwrap().way_from(&lost), Way::Apart);
    // One that names no higher number.
    let mut low = known;
    low.take_over(VM, 3, 4, &b);
    assert_eq!(low.prove(VM).unwrap().way_from(&lost), Way::Apart);
}

#[test]
fn a_peer_is_shown_what_it_does_not_know() {
    let [a, b, c] = sites();
    let chain = through(&[&a, &b, &c, &a, &c, &a]);
    let for_b = chain.since(VM, &peer(&b));
    // It gave the VM with the third.
    assert_eq!(for_b.links, chain.links[2..]);
    let proven = for_b.prove(VM).unwrap();
    let known = through(&[&a, &b, &c]);
    // Signatures are the same each time: RFC 8032.
    assert_eq!(proven.way_from(&known), Way::On(Vec::new()));
    assert_eq!(proven.added_to(&known), chain);
    let stranger = Identity::ephemeral().unwrap();
    assert_eq!(chain.since(VM, &peer(&stranger)), chain);
    // What is not shown of what is known is not taken for known.
    let mut short = chain.clone();
    short.drop_first(VM, 3);
    assert_eq!(short.prove(VM).unwrap().way_from(&known), Way::Apart);
}

#[test]
fn a_long_chain_keeps_its_newest_links() {
    let [a, b] = sites();
    let mut chain = through(&[&a]);
    let mut link = chain.links[0];
    let mut hash = LinkHash::default();
    let mut known = chain.clone();
    for number in 1..=(Chain::MOST as u64) {
        hash = link.hash(VM, &hash);
        let (giver, taker) = if number % 2 == 1 { (&a, &b) } else { (&b, &a) };
        let terms = Terms {
            step: Step::HandOver,
            before: number,
            after: number + 1,
            to: taker.key(),
        };
        link = Link::sign(VM, &hash, terms, giver);
        if number == 1 {
            // Nobody knows of the first.
            known = Chain {
                last_before: hash,
                links: vec![link],
            };
        }
        chain.links.push(link);
    }
    let stranger = Identity::ephemeral().unwrap();
    let shown = chain.since(VM, &peer(&stranger));
    assert_eq!(shown.links, chain.links[1..]);
    let proven = shown.prove(VM).unwrap();
    assert_eq!(proven.way_from(&known), Way::On(Vec::new()));
    assert_eq!(proven.added_to(&known).links.len(), Chain::MOST);
    // A longer one is not read.
    let bytes = postcard::to_allocvec(&chain).unwrap();
    assert!(postcard::from_bytes::<Chain>(&bytes).is_err());
    let bytes = postcard::to_allocvec(&shown).unwrap();
    assert_eq!(postcard::from_bytes::<Chain>(&bytes).unwrap(), shown);
    assert!(bytes.len() < 150 * Chain::MOST, "{} bytes", bytes.len());
    // Nor is memory taken for links that are only said to come.
    let said = [&[32][..], &[0; 32], &[0xff, 0xff, 0xff, 0xff, 0x0f]].concat();
    assert!(postcard::from_bytes::<Chain>(&said).is_err());
}

proptest! {
    #[test]
    fn any_change_is_seen(at in 0..400_usize, bit in 0..8_u8) {
        let [a, b] = sites();
        let chain = through(&[&a, &b, &a]);
        let mut bytes = postcard::to_allocvec(&chain).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        if let Ok(changed) = postcard::from_bytes::<Chain>(&bytes) {
            // One that ends earlier was true when it ended there.
            let earlier = chain.links.starts_with(&changed.links);
            prop_assert!(earlier || changed.prove(VM).is_err());
        }
    }
}
