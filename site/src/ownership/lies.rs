//! What a trusted site may say of a VM whose stale copy lies here, and what it may not.
//!
//! Site A has had the VM since number 7, by a hand-over of M's, and this site, T, knows of that.
//! All three trust each other.

use super::*;
use crate::identity::Identity;
use crate::local;
use crate::peers::Peer;
use crate::protocol::{Hello, Purpose};
use crate::target::check_known;
use crate::vm::VmRecord;

const ID: Id = Id([1; 16]);

struct World {
    vm: VmDir,
    a: Identity,
    m: Identity,
    /// Up to A, as T knows it.
    known: Chain,
    _dir: tempfile::TempDir,
}

fn peer(name: &str, of: &Identity) -> Peer {
    let addr = "127.0.0.1:1".parse().unwrap();
    Peer::new(name.parse().unwrap(), addr, of.key())
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vm = Store::open(dir.path())
            .unwrap()
            .vm(&"desk".parse().unwrap());
        let [a, m] = [(); 2].map(|()| Identity::ephemeral().unwrap());
        let mut known = Chain::start(ID, 6, &m);
        known.hand_over(ID, a.key(), &m).unwrap();
        let world = Self {
            vm,
            a,
            m,
            known: known.clone(),
            _dir: dir,
        };
        let title = Title::new(world.elsewhere(), known);
        world.vm.create(&VmRecord::example(), title).unwrap();
        for (name, of) in [("a", &world.a), ("m", &world.m)] {
            let peers = world.vm.store().peers();
            peers.trust(peer(name, of), None).unwrap();
        }
        world
    }

    fn elsewhere(&self) -> Lease {
        Lease::Elsewhere {
            fence: 7,
            owner: self.a.key(),
            owner_name: "a".into(),
        }
    }

    /// What T knows as a program of before there were chains.
    fn forget_chain(&self) {
        self.elsewhere().store(&self.vm.lease_path()).unwrap();
    }

    /// What T makes of an offer.
    fn offer(&self, by: &Identity, fence: u64, chain: &Chain) -> Result<Chain> {
        let name = if by.key() == self.a.key() { "a" } else { "m" };
        self.offer_of(&peer(name, by), fence, chain)
    }

    fn offer_of(&self, by: &Peer, fence: u64, chain: &Chain) -> Result<Chain> {
        let hello = Hello {
            fence,
            chain: chain.clone(),
            ..Hello::example(Purpose::Migrate)
        };
        check_known(&self.vm, &hello, by)
    }

    /// Why T refuses an offer.
    fn refused(&self, by: &Identity, fence: u64, chain: &Chain) -> String {
        let before = self.vm.title().unwrap();
        let refused = self.offer(by, fence, chain).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)));
        assert_eq!(self.vm.title().unwrap(), before);
        refused.to_string()
    }
}

#[test]
fn a_higher_number_counts_where_each_hand_over_is_signed() {
    let world = World::new();
    world.offer(&world.a, 7, &world.known).unwrap();
    // On through sites of which nothing is known here.
    let [b, c] = [(); 2].map(|()| Identity::ephemeral().unwrap());
    let mut chain = world.known.clone();
    chain.hand_over(ID, b.key(), &world.a).unwrap();
    chain.hand_over(ID, c.key(), &b).unwrap();
    let whole = world.offer(&c, 9, &chain).unwrap();
    assert_eq!(whole, chain);
    // Only what is not known need be shown.
    let shown = chain.since(ID, &peer("m", &world.m));
    assert!(shown.links().len() < chain.links().len());
    assert_eq!(world.offer(&c, 9, &shown).unwrap(), chain);
}

#[test]
fn a_number_that_was_made_up_is_refused() {
    let world = World::new();
    let (a, m) = (&world.a, &world.m);
    // A chain of its own.
    let said = world.refused(m, 9, &Chain::start(ID, 9, m));
    assert!(said.contains("from a"), "{said}");
    // The owner's chain, which leads to the owner.
    let said = world.refused(m, 7, &world.known);
    assert!(said.contains("another site"), "{said}");
    // Gone on with, in the owner's place.
    let mut stolen = world.known.clone();
    stolen.hand_over(ID, m.key(), m).unwrap();
    let said = world.refused(m, 8, &stolen);
    assert!(said.contains("link 3"), "{said}");
    // More than its own hand-overs come to.
    let mut own = Chain::start(ID, 6, m);
    for _ in 0..5 {
        own.hand_over(ID, m.key(), m).unwrap();
    }
    let said = world.refused(m, 1 << 40, &own);
    assert!(said.contains("number 11"), "{said}");
    // Given by itself once more, in the place where it gave the VM to A.
    let said = world.refused(m, 11, &own);
    assert!(said.contains("from a"), "{said}");
    let said = world.refused(m, 9, &Chain::default());
    assert!(said.contains("no hand-over"), "{said}");
    // None of this keeps the owner out.
    world.offer(a, 7, &world.known).unwrap();
}

#[test]
fn a_chain_of_the_past_is_refused() {
    let world = World::new();
    let past = Chain::start(ID, 6, &world.m);
    let said = world.refused(&world.m, 6, &past);
    assert!(said.contains("handed on since"), "{said}");
    // Where more is known than by the lease: a seed brought it.
    let mut newer = world.known.clone();
    newer.hand_over(ID, world.m.key(), &world.a).unwrap();
    newer.hand_over(ID, world.a.key(), &world.m).unwrap();
    let title = Title::new(world.elsewhere(), newer);
    title.store(&world.vm.lease_path()).unwrap();
    let said = world.refused(&world.a, 7, &world.known);
    assert!(said.contains("handed on since"), "{said}");
}

#[test]
fn a_chain_of_another_vm_is_refused() {
    let world = World::new();
    let (a, m) = (&world.a, &world.m);
    let other = Id([9; 16]);
    let mut chain = Chain::start(other, 6, m);
    chain.hand_over(other, a.key(), m).unwrap();
    chain.hand_over(other, m.key(), a).unwrap();
    let said = world.refused(m, 8, &chain);
    assert!(said.contains("isn't signed"), "{said}");
}

#[test]
fn a_chain_that_leaves_out_what_is_known_is_refused() {
    let world = World::new();
    let (a, m) = (&world.a, &world.m);
    let b = Identity::ephemeral().unwrap();
    let mut chain = world.known.clone();
    chain.hand_over(ID, b.key(), a).unwrap();
    chain.hand_over(ID, m.key(), &b).unwrap();
    // From B on: true, and of no use to T.
    let shown = chain.since(ID, &peer("b", &b));
    assert_eq!(shown.links().len(), 1);
    let said = world.refused(m, 9, &shown);
    assert!(said.contains("from a"), "{said}");
    let mut cut = chain;
    cut.take_back();
    let said = world.refused(m, 9, &cut);
    assert!(said.contains("number 8"), "{said}");
}

#[test]
fn a_takeover_is_believed_when_a_person_says_so() {
    let world = World::new();
    let m = &world.m;
    let mut taken = world.known.clone();
    taken.take_over(ID, 7, 1007, m);
    let said = world.refused(m, 1007, &taken);
    assert!(said.contains("--by m"), "{said}");
    // Of another site.
    local::believe(&world.vm, &peer("a", &world.a)).unwrap();
    world.refused(m, 1007, &taken);
    local::believe(&world.vm, &peer("m", m)).unwrap();
    assert_eq!(world.offer(m, 1007, &taken).unwrap(), taken);
    // What is not along the chain is refused all the same.
    world.refused(m, 1007, &Chain::start(ID, 1007, m));
}

#[test]
fn an_owner_with_a_new_key_is_the_owner() {
    let world = World::new();
    let b = Identity::ephemeral().unwrap();
    let mut rekeyed = peer("a", &b);
    // By the old key's word, which anybody can check.
    let mut chain = world.known.clone();
    assert!(chain.succeed(&[crate::identity::NewKey::sign(&world.a, b.key())], b.key()));
    rekeyed.former.push(world.a.key());
    world.offer_of(&rekeyed, 7, &chain).unwrap();
    // By the word of a person here, where the old key was lost.
    let anew = Chain::start(ID, 7, &b);
    assert_eq!(world.offer_of(&rekeyed, 7, &anew).unwrap(), anew);
    world.offer_of(&peer("b", &b), 7, &anew).unwrap_err();
    world
        .offer_of(&rekeyed, 8, &Chain::start(ID, 8, &b))
        .unwrap_err();
}

#[test]
fn nobody_else_offers_a_vm_with_its_owners_number() {
    let world = World::new();
    let (a, m) = (&world.a, &world.m);
    for chains in [true, false] {
        if !chains {
            world.forget_chain();
        }
        let of = |by: &Identity| Chain::start(ID, 7, by);
        world.refused(m, 7, &of(m));
        world.refused(a, 6, &Chain::start(ID, 6, a));
    }
    // The owner begins a chain with the number that it has, and goes on from there.
    let mut chain = Chain::start(ID, 7, a);
    world.offer(a, 7, &chain).unwrap();
    chain.hand_over(ID, m.key(), a).unwrap();
    assert_eq!(world.offer(m, 8, &chain).unwrap(), chain);
    // One that passes over what is known does not.
    let mut own = Chain::start(ID, 6, m);
    own.hand_over(ID, m.key(), m).unwrap();
    own.hand_over(ID, m.key(), m).unwrap();
    world.refused(m, 8, &own);
    let mut taken = chain;
    taken.take_over(ID, 8, 1008, m);
    let said = world.refused(m, 1008, &taken);
    assert!(said.contains("--by m"), "{said}");
}

#[test]
fn a_rotated_key_goes_on_with_what_the_old_one_had() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let held = Lease::Held {
        fence: 4,
        transfer: None,
    };
    let vm = store.vm(&"desk".parse().unwrap());
    // Made before there were chains.
    vm.create(&VmRecord::example(), &held).unwrap();
    let old = store.identity().unwrap();
    let seen = proof(&vm).unwrap();
    assert_eq!(seen.owner(), Some(old.key()));
    store.rotate_identity().unwrap();
    store.rotate_identity().unwrap();
    let new = store.identity().unwrap();
    let chain = proof(&vm).unwrap();
    assert_eq!((chain.owner(), chain.fence()), (Some(new.key()), Some(4)));
    let way = chain.prove(ID).unwrap().way_from(&seen);
    assert_eq!(way, crate::chain::Way::On(Vec::new()));
}
