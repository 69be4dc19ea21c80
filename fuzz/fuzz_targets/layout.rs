//! Layouts from a source: bounded, and the same again when written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::Layout;

const PAGES: u64 = 1 << 14;

fuzz_target!(|bytes: &[u8]| {
    let Ok(layout) = Layout::decode(bytes, PAGES) else {
        return;
    };
    assert!(layout.pages() as u64 <= PAGES);
    let again = layout.encode().expect("a layout that was read");
    assert_eq!(Layout::decode(&again, PAGES).expect("a layout that was written"), layout);
});
