//! Chains of hand-overs from a source: bounded, the same again when written, and none that holds but
//! what the keys here have signed.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use site::chain::{Chain, Link, Way};
use site::identity::Identity;
use site::transport::framing::{decode, encode_frame};
use site::vm::Id;

const VM: Id = Id([1; 16]);

/// What is known here: the seeds go on from it.
static KNOWN: LazyLock<Chain> = LazyLock::new(|| Chain::start(VM, 1, &caller()));

fn caller() -> Identity {
    let dir = tempfile::tempdir().expect("a folder");
    fuzz_seeds::caller(dir.path()).expect("a key")
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(chain) = decode::<Chain>(bytes) else {
        return;
    };
    assert!(chain.links().len() <= Chain::MOST);
    let mut again = Vec::new();
    encode_frame(&chain, &mut again, 1 << 20).expect("one that was read");
    assert_eq!(decode::<Chain>(&again[4..]).expect("one that was written"), chain);
    let text = serde_json::to_string(&chain).expect("one that was read");
    assert_eq!(serde_json::from_str::<Chain>(&text).expect("just written"), chain);
    let Ok(proven) = chain.prove(VM) else {
        return;
    };
    let last: &Link = chain.links().last().expect("an empty one does not hold");
    assert_eq!((proven.owner(), proven.fence()), (last.to, last.after));
    let known = proven.added_to(&KNOWN);
    assert!(known.links().len() <= Chain::MOST);
    if let Way::On(_) = proven.way_from(&KNOWN) {
        let whole = known.prove(VM).expect("of two that hold");
        assert_eq!((whole.owner(), whole.fence()), (last.to, last.after));
    }
});
