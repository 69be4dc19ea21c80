//! Orders of device states from a source: bounded, and the same again when written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::Rearrangement;

const LEN: usize = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    let Ok(told) = Rearrangement::decode(bytes) else {
        return;
    };
    assert!(told.len() <= Rearrangement::MOST);
    assert_eq!(told.apply(bytes, LEN).len(), LEN);
    let again = told.encode().expect("one that was read");
    assert_eq!(Rearrangement::decode(&again).expect("one that was written"), told);
});
